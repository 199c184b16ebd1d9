"""Samples in memory, as `model.transcribe` takes them: arrays and tensors, checked as files are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from speechllm.data.audio import UtteranceError
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.resample import resample

_RATES = range(1000, 1_000_001)
_MAX_CHANNELS = 64
# Floating-point samples may go beyond full scale, 1; what is far beyond was scaled otherwise.
_LOUDEST = 1000.0


def mono_samples(audio: np.ndarray | Tensor | Sequence[float], sampling_rate: int, name: str) -> np.ndarray:
    """What a recogniser hears of samples in memory.

    Args:
        audio: (num_samples,), or with channels, of which the mean is taken: (channels, num_samples) or (num_samples,
            channels), the shorter side being that of the channels. Floating point in [-1, 1]; or int16, int32 or uint8
            as in WAV files.
        name: for errors.

    Returns:
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
        samples = samples.mean(axis=samples.shape.index(channels))
    if samples.ndim != 1:
        raise UtteranceError(
            "wrong shape",
            f"{name}: {samples.shape}, expected (num_samples,), (channels, num_samples) or (num_samples, channels)",
        )
    if not len(samples):
        raise UtteranceError("wrong duration", f"{name}: no samples")
    if not np.isfinite(samples).all():
        bad = np.count_nonzero(~np.isfinite(samples))
        raise UtteranceError("non-finite samples", f"{name}: {bad} of {len(samples)} samples")
    if (loudest := np.abs(samples).max()) > _LOUDEST:
        raise UtteranceError(
            "implausible samples",
            f"{name}: up to {loudest:.3g}, where 1 is full scale; divide what were 16-bit integers by 32768",
        )
    return resample(np.ascontiguousarray(samples, dtype=np.float32), int(sampling_rate), SAMPLE_RATE)


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
