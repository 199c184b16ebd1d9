"""Samples in memory, as `model.transcribe` takes them: arrays and tensors, checked as files are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from speechllm.data.audio_file import AudioNote, UtteranceError
from speechllm.data.blocks import mono_blocks
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.resample import resample_blocks

_RATES = range(1000, 1_000_001)
_MAX_CHANNELS = 64


def sample_blocks(
    audio: np.ndarray | Tensor | Sequence[float], sampling_rate: int, name: str, notes: list[AudioNote] | None = None
) -> Iterator[np.ndarray]:
    """Samples in memory as `speechllm.data.blocks.read_blocks` gives those of a file.

    Args:
        audio: (num_samples,), or with channels, (channels, num_samples) or (num_samples, channels), the shorter side
            being that of the channels. Floating point in [-1, 1]; or int16, int32 or uint8 as in WAV files.
        name: for errors.
        notes: gets what is to be known of the audio, such as channels that were chosen.

    Yields:
        (num_samples,) float32, 16 kHz.

    Raises:
        UtteranceError: no samples, another shape or type, or values that are not finite or far beyond full scale.
    """
    if sampling_rate not in _RATES:
        raise UtteranceError(
            "wrong sampling rate", f"{name}: {sampling_rate!r}: give samples per second, such as 16000"
        )
    samples = _floating_point(audio, name)
    if samples.ndim == 2:
        channels, length = sorted(samples.shape)
        if channels == length or channels > _MAX_CHANNELS:
            raise UtteranceError(
                "wrong shape", f"{name}: {samples.shape}: which side is that of the channels? Give one channel"
            )
        samples = samples if samples.shape[0] == channels else samples.T
    elif samples.ndim != 1:
        raise UtteranceError(
            "wrong shape",
            f"{name}: {samples.shape}, expected (num_samples,), (channels, num_samples) or (num_samples, channels)",
        )
    if not samples.size:
        raise UtteranceError("wrong duration", f"{name}: no samples")
    rate = int(sampling_rate)
    blocks = mono_blocks([np.atleast_2d(np.ascontiguousarray(samples))], rate, name, notes=notes)
    yield from resample_blocks(blocks, rate, SAMPLE_RATE)


def _floating_point(audio: Any, name: str) -> np.ndarray:
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()
    try:
        samples = np.asarray(audio)
    except ValueError as error:
        raise UtteranceError("wrong shape", f"{name}: {error}") from error
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "f":
        return samples.astype(np.float32)
    if (kind, bits) in (("i", 16), ("i", 32)):
        return (samples / 2.0 ** (bits - 1)).astype(np.float32)
    if (kind, bits) == ("u", 8):
        return ((samples - 128.0) / 128.0).astype(np.float32)
    what = type(audio).__name__ if kind == "O" else f"samples of type {samples.dtype}"
    raise UtteranceError(
        "wrong type",
        f"{name}: {what}; give a path, or samples as floating point in [-1, 1], int16, int32 or uint8",
    )
