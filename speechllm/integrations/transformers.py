"""A model where a pipeline of transformers for `automatic-speech-recognition` is expected.

transformers' own `pipeline(...)` takes models that derive from its `PreTrainedModel`; this is called like what that
gives.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from speechllm.decode.options import RecognizeOptions
from speechllm.model.base import SpeechModel
from speechllm.model.build import load_model, prepare_for_inference
from speechllm.transcribe.formats import Recording

_ASKED = ("language", "task", "target_language")


class SpeechPipeline:
    """Made by `pipeline`; `task` is what transformers and evaluate look at."""

    task = "automatic-speech-recognition"

    def __init__(self, model: SpeechModel, options: RecognizeOptions | None = None, batch_size: int = 8) -> None:
        self.model, self.options, self.batch_size = model, options, batch_size

    def __call__(
        self,
        inputs: Any,
        *,
        return_timestamps: bool | str | None = None,
        batch_size: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        chunk_length_s: float | None = None,
        stride_length_s: object = None,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Transcribe audio of any length.

        Args:
            inputs: a path; the content of a file as bytes; samples (num_samples,) of 16 kHz; a dictionary with
                `sampling_rate` and samples as `raw` or `array`; what datasets decodes audio with; a list of such; or
                any other iterable, which is read as results are asked for.
            return_timestamps: True for `chunks` of segments, "word" for those of words.
            batch_size: how many inputs are heard together; what they are cut into is batched by duration.
            generate_kwargs: `language`; `target_language`, or task="translate" for English.
            chunk_length_s, stride_length_s: without effect, as long audio is cut at pauses.

        Returns:
            `{"text": ...}`, with `chunks` of `text` and `timestamp` (start, end) in seconds if asked for, and each
            other key of a dictionary with a list of its value; a list of such for a list, an iterator for an iterable.

        Raises:
            ValueError: other options.
            UserError: see `SpeechModel.transcribe`.
        """
        if return_timestamps not in (None, False, True, "word"):
            raise ValueError(f"return_timestamps: {return_timestamps!r}, choose from True and 'word'")
        asked = dict(generate_kwargs or {})
        if unknown := asked.keys() - set(_ASKED):
            raise ValueError(f"generate_kwargs: unknown {', '.join(sorted(unknown))}; known are {', '.join(_ASKED)}")
        task = asked.pop("task", "transcribe")
        if task not in ("transcribe", "translate"):
            raise ValueError(f"generate_kwargs: task: {task!r}, choose from 'transcribe' and 'translate'")
        if task == "translate":
            asked.setdefault("target_language", "en")
        alone = isinstance(inputs, str | os.PathLike | bytes | np.ndarray | Tensor | dict) or _is_decoder(inputs)
        results = self._results([inputs] if alone else inputs, return_timestamps, batch_size or self.batch_size, asked)
        if alone:
            return next(results)
        return list(results) if isinstance(inputs, list | tuple) else results

    def _results(
        self, inputs: Iterable[Any], return_timestamps: bool | str | None, batch_size: int, asked: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        options = self.model.config.recognize_options(self.options)
        options = replace(options, timestamps=options.timestamps or return_timestamps == "word")
        inputs = iter(inputs)
        while batch := list(islice(inputs, batch_size)):
            with ExitStack() as files:
                audio = [_audio(item, files) for item in batch]
                for rate, group in groupby(audio, key=lambda item: item[1]):
                    same = list(group)
                    found = self.model.transcribe([a for a, _, _ in same], options=options, sampling_rate=rate, **asked)
                    for (_, _, more), recording in zip(same, found, strict=True):
                        assert isinstance(recording, Recording)  # errors are raised
                        yield _result(recording, return_timestamps) | {key: [value] for key, value in more.items()}


def pipeline(
    model: SpeechModel | str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    options: RecognizeOptions | None = None,
    batch_size: int = 8,
) -> SpeechPipeline:
    """A model, or its folder or id of the Hub, as a pipeline: `pipeline("models/english")("my.wav")["text"]`.

    Args:
        device, dtype: of a model that is loaded, see `speechllm.model.build.prepare_for_inference`.
        options: the search; None for the model's own.
        batch_size: see `SpeechPipeline`.
    """
    if not isinstance(model, SpeechModel):
        loaded = load_model(model)
        prepare_for_inference(loaded, device, dtype)
        model = loaded
    return SpeechPipeline(model, options, batch_size)


def _is_decoder(item: Any) -> bool:
    """As datasets gives audio from 4.0 on: torchcodec's `AudioDecoder`."""
    return hasattr(item, "get_all_samples")


def _audio(item: Any, files: ExitStack) -> tuple[Any, int, dict[str, Any]]:
    """A path or samples, their sampling rate, and what else is in a dictionary."""
    if isinstance(item, bytes):
        file = Path(files.enter_context(tempfile.TemporaryDirectory()), "audio")
        file.write_bytes(item)
        return file, 16000, {}
    if _is_decoder(item):
        samples = item.get_all_samples()
        return samples.data, samples.sample_rate, {}
    if not isinstance(item, dict):
        return item, 16000, {}
    key = next((key for key in ("raw", "array") if item.get(key) is not None), None)
    if key is None or "sampling_rate" not in item:
        raise ValueError(f"a dictionary needs sampling_rate, and raw or array; there is {', '.join(map(str, item))}")
    more = {k: v for k, v in item.items() if k not in ("raw", "array", "path", "sampling_rate")}
    return item[key], item["sampling_rate"], more


def _result(recording: Recording, return_timestamps: bool | str | None) -> dict[str, Any]:
    result: dict[str, Any] = {"text": recording.text}
    spoken = [segment for segment in recording.segments if segment.text]
    if return_timestamps == "word":
        parts = [(word.text, word.start, word.end) for segment in spoken for word in segment.words or ()]
    else:
        parts = [(segment.text, segment.offset, segment.offset + segment.duration) for segment in spoken]
    if return_timestamps:
        # as Whisper's, they have the spaces between them, and make up the text
        end, chunks = 0, []
        for text, *times in parts:
            begin, end = end, max(recording.text.find(text, end), end) + len(text)
            chunks.append({"text": recording.text[begin:end], "timestamp": tuple(times)})
        result["chunks"] = chunks
    return result
