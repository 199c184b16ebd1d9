"""README.md of a model's folder: what it is, how to use it, what it reached.

The header is that of model cards on the Hugging Face hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from speechllm.encoder import WhisperEncoder
from speechllm.files import replaced_file
from speechllm.model.config import ModelConfig

_RESULTS = "## Results"


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
    return _card("SpeechLLM", "speechllm", what, parts, tuned, language)


def encoder_card(parts: Sequence[tuple[str, nn.Module]], how: str) -> str:
    """The card of an `EncoderModel`, without results; `how` it recognizes speech, such as `CTC`."""
    what = f"""Speech recognition with {how}, without a language model. A `SpeechLLM` takes this folder as its
`model.encoder.path`."""
    return _card("EncoderModel", "speechllm.model.encoder_model", what, parts)


def _card(
    name: str,
    module: str,
    what: str,
    parts: Sequence[tuple[str, nn.Module]],
    note: str = "",
    language: str | None = None,
) -> str:
    argument, option = ("", "") if language is None else (f', language="{language}"', f" --language {language}")
    rows = "".join(f"| {part_name} | {_millions(part)} |\n" for part_name, part in parts)
    return f"""---
library_name: speechllm
tags:
- automatic-speech-recognition
pipeline_tag: automatic-speech-recognition
---

# {name}

{what}

| part | parameters |
|---|---:|
{rows}
{note}## Use

```python
from {module} import {name}

model = {name}.from_pretrained("PATH OF THIS FOLDER")
print(model.transcribe(["speech.wav"]{argument})[0].text)
```

or `speechllm transcribe speech.wav --model PATH{option}`.
"""


def add_results(folder: str | Path, table: str) -> None:
    """Put a table of error rates, as it was printed, into the card of a model's folder, in place of an earlier one."""
    path = Path(folder) / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = card.partition(f"\n{_RESULTS}\n")[0]
    with replaced_file(path) as tmp:
        tmp.write_text(f"{card}\n{_RESULTS}\n\n```\n{table.strip()}\n```\n", encoding="utf-8")


def encoder_name(encoder: nn.Module) -> str:
    """What the card calls an encoder."""
    return "Whisper encoder" if isinstance(encoder, WhisperEncoder) else "Zipformer encoder"


def _millions(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
