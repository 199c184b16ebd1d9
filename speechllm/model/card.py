"""README.md of a model's folder: what it is, how to use it, what it reached.

The header is that of model cards on the Hugging Face hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from speechllm.encoder import WhisperEncoder
from speechllm.files import replaced_file

if TYPE_CHECKING:
    from speechllm.model.encoder_model import EncoderModel
    from speechllm.model.speech_llm import SpeechLLM

_RESULTS = "## Results"


def model_card(model: SpeechLLM) -> str:
    """The card of a model, without results."""
    parts = [(_encoder_name(model.encoder), model.encoder), ("projector", model.projector)]
    for i, more in enumerate(model.more_encoders, start=2):
        parts += [(f"{_encoder_name(more['encoder'])} {i}", more["encoder"]), (f"projector {i}", more["projector"])]
    parts.append((f"{model.llm.name} language model", model.llm))
    if model.ctc_head is not None:
        parts.append(("CTC head", model.ctc_head))
    prompt = model.config.prompt
    tune = model.config.llm.tune
    tuned = (
        "" if tune is None else f"The language model was tuned with {tune.method}; `adapter/` has that by itself.\n\n"
    )
    what = f"""Speech recognition with a language model: an encoder, a projector and a language model that reads
`{prompt.asr!r}` and writes the text."""
    languages = model.config.languages or ["en"]
    needs_language = prompt.slots().intersection(("lang", "language"))
    return _card(model, what, parts, tuned, languages[0].partition(">")[0] if needs_language else None)


def encoder_card(model: EncoderModel) -> str:
    """The card of an encoder without a language model, without results."""
    parts = [(_encoder_name(model.encoder), model.encoder)]
    parts += [("CTC head", model.ctc_head)] if model.ctc_head is not None else []
    parts += [("transducer (decoder and joiner)", model.transducer)] if model.transducer is not None else []
    how = " and ".join(name for name, given in (("CTC", model.ctc_head), ("a transducer", model.transducer)) if given)
    what = f"""Speech recognition with {how}, without a language model. A `SpeechLLM` takes this folder as its
`model.encoder.path`."""
    return _card(model, what, parts)


def _card(
    model: nn.Module,
    what: str,
    parts: Sequence[tuple[str, nn.Module]],
    note: str = "",
    language: str | None = None,
) -> str:
    name = type(model).__name__
    module = "speechllm" if name == "SpeechLLM" else "speechllm.model.encoder_model"
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


def _encoder_name(encoder: nn.Module) -> str:
    return "Whisper encoder" if isinstance(encoder, WhisperEncoder) else "Zipformer encoder"


def _millions(part: nn.Module) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
