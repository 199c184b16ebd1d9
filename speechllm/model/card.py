"""README.md of a model's folder: what it is, how to use it, what it reached.

The header is that of model cards on the Hugging Face hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from speechllm.encoder import WhisperEncoder
from speechllm.files import replaced_file
from speechllm.hub import hub_id
from speechllm.model.config import ModelConfig

logger = logging.getLogger(__name__)

_RESULTS = "## Results"
_OWN_RESULTS = re.compile(rf"\n{_RESULTS}\n\n```\n[^`]*\n```\n\Z")
_HEADER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_TASK = "automatic-speech-recognition"


def model_card(config: ModelConfig, parts: Sequence[tuple[str, nn.Module]]) -> str:
    """The card of a `SpeechLLM`, without results.

    Args:
      config: of the model, its prompt written out.
      parts: what the card calls them, and the modules.
    """
    tune = None if config.llm is None else config.llm.tune
    tuned = (
        "" if tune is None else f"The language model was tuned with {tune.method}; `adapter/` has that by itself.\n\n"
    )
    what = f"""Speech recognition with a language model: an encoder, a projector and a language model that reads
`{config.prompt.asr!r}` and writes the text."""
    languages = config.languages or ["en"]
    needs_language = config.prompt.slots().intersection(("lang", "language"))
    language = languages[0].partition(">")[0] if needs_language else None
    return _card("SpeechLLM", "speechllm", what, config, parts, tuned, language)


def encoder_card(config: ModelConfig, parts: Sequence[tuple[str, nn.Module]], how: str) -> str:
    """The card of an `EncoderModel`, without results; `how` it recognizes speech, such as `CTC`."""
    what = f"""Speech recognition with {how}, without a language model. A `SpeechLLM` takes this folder as its
`model.encoder.path`."""
    return _card("EncoderModel", "speechllm.model.encoder_model", what, config, parts)


def _card(
    name: str,
    module: str,
    what: str,
    config: ModelConfig,
    parts: Sequence[tuple[str, nn.Module]],
    note: str = "",
    language: str | None = None,
) -> str:
    argument, option = ("", "") if language is None else (f', language="{language}"', f" --language {language}")
    rows = "".join(f"| {part_name} | {_millions(part)} |\n" for part_name, part in parts)
    return f"""---
{_yaml(_metadata(config))}---

# {name}

{what}

| part | parameters |
|---|---:|
{rows}
{note}## Use

```python
from {module} import {name}

model = {name}.from_pretrained("PATH OF THIS FOLDER, OR ITS ID ON THE HUB")
print(model.transcribe(["speech.wav"]{argument})[0].text)
```

or `speechllm transcribe speech.wav --model PATH{option}`.
"""


def _metadata(config: ModelConfig) -> dict[str, Any]:
    """What the Hub reads of a card: its filters, and the models that this one is made of."""
    spoken = {tag for pair in config.languages or () for tag in pair.split(">")}
    sections = [config.encoder, *(more.encoder for more in config.more_encoders), config.llm]
    paths = [section.path for section in sections if section is not None and section.path]
    bases = list(dict.fromkeys(id.repo for path in paths if (id := hub_id(path)) is not None))
    return {
        "library_name": "speechllm",
        "pipeline_tag": _TASK,
        "tags": [_TASK],
        **({"language": sorted(spoken)} if spoken else {}),
        **({"base_model": bases} if bases else {}),
    }


def add_results(folder: str | Path, table: str, rates: Mapping[tuple[str, str], float] | None = None) -> None:
    """Put results into the card of a model's folder, in place of earlier ones.

    A card in which somebody has written of results in other words, or something after them, is left as it is.

    Args:
        table: of error rates, as it was printed.
        rates: WER in percent by test set and search, for the card's metadata (`model-index`, of which the Hub makes its
            widget and leaderboards).
    """
    path = Path(folder) / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = _OWN_RESULTS.sub("", card)
    if f"\n{_RESULTS}\n" in card:
        logger.info("%s: has results in words of its own, and is left as it is", path)
        return
    header = _HEADER.match(card)
    if rates and header is not None:
        metadata = yaml.safe_load(header[1]) | {"model-index": _model_index(Path(folder).resolve().name, rates)}
        card = f"---\n{_yaml(metadata)}---\n{card[header.end() :]}"
    with replaced_file(path) as tmp:
        tmp.write_text(f"{card}\n{_RESULTS}\n\n```\n{table.strip()}\n```\n", encoding="utf-8")


def _model_index(name: str, rates: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Results in the form that cards on the Open ASR Leaderboard have."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for (test_set, search), rate in rates.items():
        metric = {"type": "wer", "value": rate, "name": f"Test WER ({search})"}
        by_set.setdefault(test_set, []).append(metric)
    results = [
        {
            "task": {"type": _TASK, "name": "Automatic Speech Recognition"},
            "dataset": {"name": test_set, "type": test_set, "split": "test"},
            "metrics": metrics,
        }
        for test_set, metrics in by_set.items()
    ]
    return [{"name": name, "results": results}]


def _yaml(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)


def encoder_name(encoder: nn.Module) -> str:
    """What the card calls an encoder."""
    return "Whisper encoder" if isinstance(encoder, WhisperEncoder) else "Zipformer encoder"


def _millions(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
