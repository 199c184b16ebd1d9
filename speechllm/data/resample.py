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
    if from_rate == to_rate:
        yield from (np.asarray(block, dtype=np.float32) for block in blocks)
        return
    period, new_period = _ratio(from_rate, to_rate)
    # the filter reaches its width to both sides; whole periods, so that the phases of a later start are the same
    margin = math.ceil(_resampler(period, new_period).width / period) * period
    parts: list[np.ndarray] = []
    held = context = 0  # samples in parts, and how many of them were resampled before
    for block in blocks:
        parts.append(block)
        held += block.shape[-1]
        if held < context + 2 * margin + from_rate:
            continue
        samples = np.concatenate(parts, axis=-1)
        end = (held - margin) // period * period
        found = resample(samples[..., : end + margin], period, new_period)
        yield found[..., context // period * new_period : end // period * new_period]
        parts, held, context = [samples[..., end - margin :]], held - end + margin, margin
    if parts:
        found = resample(np.concatenate(parts, axis=-1), period, new_period)
        yield found[..., context // period * new_period :]


def _ratio(from_rate: int, to_rate: int) -> tuple[int, int]:
    """The rates as the smallest integers of their ratio."""
    ratio = Fraction(from_rate, to_rate).limit_denominator(_MOST_PHASES)
    return ratio.numerator, ratio.denominator


@functools.lru_cache(maxsize=32)
def _resampler(from_rate: int, to_rate: int) -> Any:
    """torchaudio's `Resample` with its filter, which is computed once."""
    return import_torchaudio().transforms.Resample(from_rate, to_rate)
