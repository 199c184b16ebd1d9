"""Changing the sampling rate of audio, by torchaudio: the same for training, checks and transcription."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from speechllm.torchaudio_import import import_torchaudio

# torchaudio's filter has a row for each phase between the two rates, as long as a period of them. Every common rate has
# at most 640 phases to 16 kHz (11,025 Hz), but 44,101 Hz would have 16,000 of 44,000 values: gigabytes for one file
# with an odd header. With 1,000 phases no rate is off by more than 1/16,000, what the clocks of recorders are off too.
_MOST_PHASES = 1000


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Samples at another rate, by torchaudio's windowed sinc filter with its default width and roll-off.

    Args:
        samples: (..., num_samples), floating point.
        from_rate, to_rate: in Hz, above 0. Rates of which the ratio has more than 1,000 phases are taken for the
            nearest that have fewer.

    Returns:
        (..., ceil(num_samples * to_rate / from_rate)) float32; what has `to_rate` already is not copied.

    Raises:
        UserError: torchaudio does not import.
    """
    samples = np.asarray(samples, dtype=np.float32)
    if from_rate == to_rate:
        return samples
    resampler = _resampler(*_ratio(from_rate, to_rate))
    return resampler(torch.from_numpy(np.ascontiguousarray(samples))).numpy()


def resample_blocks(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    """`resample` of a stream in blocks of any length, (..., num_samples) each: the blocks that are yielded are the
    same as one call would give for all of it, joined. What is held is two seconds, or two of the blocks."""
    stream = ResampledStream(from_rate, to_rate, at_least=from_rate)
    for block in blocks:
        found = stream.accept(block)
        if found is not None:
            yield found
    found = stream.finish()
    if found is not None:
        yield found


class ResampledStream:
    """`resample` of samples as they come: all that it gives, joined, is what one call would give of all of them.

    Args:
        at_least: of so many samples that wait something is made; 1 is the shortest delay, more is less computing.
    """

    def __init__(self, from_rate: int, to_rate: int, at_least: int = 1) -> None:
        self._is_same = from_rate == to_rate
        if self._is_same:
            return
        self._period, self._new_period = _ratio(from_rate, to_rate)
        # the filter reaches its width to both sides; whole periods, so that the phases of a later start are the same
        width = _resampler(self._period, self._new_period).width
        self._margin = math.ceil(width / self._period) * self._period
        self._at_least = max(at_least, self._period)
        self._parts: list[np.ndarray] = []
        self._held = self._context = 0  # samples in parts, and how many of them were resampled before

    def accept(self, block: np.ndarray) -> np.ndarray | None:
        """(..., num_samples) -> (..., new_num_samples) float32; None where it is too little yet."""
        if self._is_same:
            return np.asarray(block, dtype=np.float32)
        self._parts.append(block)
        self._held += block.shape[-1]
        if self._held < self._context + 2 * self._margin + self._at_least:
            return None
        samples = np.concatenate(self._parts, axis=-1)
        end = (self._held - self._margin) // self._period * self._period
        found = self._resampled(samples[..., : end + self._margin])
        self._parts = [samples[..., end - self._margin :]]
        beyond = found[..., self._new_place(self._context) : self._new_place(end)]
        self._held, self._context = self._held - end + self._margin, self._margin
        return beyond

    def finish(self) -> np.ndarray | None:
        """The rest; None where nothing has come. Nothing may come after."""
        if self._is_same or not self._parts:
            return None
        return self._resampled(np.concatenate(self._parts, axis=-1))[..., self._new_place(self._context) :]

    def _resampled(self, samples: np.ndarray) -> np.ndarray:
        return resample(samples, self._period, self._new_period)

    def _new_place(self, place: int) -> int:
        return place // self._period * self._new_period


def _ratio(from_rate: int, to_rate: int) -> tuple[int, int]:
    """The rates as the smallest integers of their ratio."""
    ratio = Fraction(from_rate, to_rate).limit_denominator(_MOST_PHASES)
    return ratio.numerator, ratio.denominator


@functools.lru_cache(maxsize=32)
def _resampler(from_rate: int, to_rate: int) -> Any:
    """torchaudio's `Resample` with its filter, which is computed once."""
    return import_torchaudio().transforms.Resample(from_rate, to_rate)
