"""SpecAugment of Park et al. (arXiv 1904.08779), with the adaptive time masks of Park et al. (arXiv 1912.05533) as in
lhotse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from speechllm.config import check_limits, setting
from speechllm.data.features import kind_bins


@dataclass
class SpecAugmentConfig:
    """Masks over (T, 80) features, filled with the utterance's mean; `probability` of any at all.

    `freq_masks` masks of up to `freq_mask_bins` mel bins; up to `time_masks` masks of up to
    `time_mask_frames` frames (10 ms each), all together at most `max_time_fraction` of the utterance; time
    warp by up to `time_warp_frames`, 0 for none.
    """

    probability: float = setting(0.9, at_least=0, at_most=1)
    freq_masks: int = setting(2, at_least=0)
    freq_mask_bins: int = setting(27, at_least=0)
    time_masks: int = setting(10, at_least=0)
    time_mask_frames: int = setting(100, at_least=0)
    max_time_fraction: float = setting(0.15, at_least=0, at_most=1)
    time_warp_frames: int = setting(0, at_least=0)

    def __post_init__(self) -> None:
        check_limits(self)


def spec_augment(features: Tensor, config: SpecAugmentConfig, rng: np.random.Generator, kind: str = "fbank") -> Tensor:
    """SpecAugment of one utterance: (T, F) -> (T, F); an utterance too short for a mask gets none.

    Args:
        kind: of `features.MEL_BINS`; of several, `fbank+whisper80`, each has masks of frequency of its own, and those
            of time are at the same place.
    """
    if rng.random() >= config.probability:
        return features
    return _masked(time_warp(features, config.time_warp_frames, rng), config, rng, kind)


def spec_augment_twice(features: Tensor, config: SpecAugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Two views of one utterance, (T, F) each, with masks of their own. Time is warped in both alike, so that their
    frames can be compared (CR-CTC, arXiv 2410.05101)."""
    if rng.random() < config.probability:
        features = time_warp(features, config.time_warp_frames, rng)
    first, second = (
        _masked(features, config, rng, "fbank") if rng.random() < config.probability else features for _ in range(2)
    )
    return first, second


def _masked(features: Tensor, config: SpecAugmentConfig, rng: np.random.Generator, kind: str) -> Tensor:
    frames = len(features)
    features = features.clone()
    means_and_parts = [(part.mean(), part) for part in features.split(kind_bins(kind), dim=1)]
    for mean, part in means_and_parts:
        bins = part.shape[1]
        for _ in range(config.freq_masks):
            width = int(rng.integers(min(config.freq_mask_bins, bins) + 1))
            start = int(rng.integers(bins - width + 1))
            part[:, start : start + width] = mean
    # as many masks as it takes to cover the fraction with full-width ones, so that short utterances get few
    budget = int(config.max_time_fraction * frames)
    if config.time_masks > 0 and config.time_mask_frames > 0 and budget > 0:
        count = min(config.time_masks, -(-budget // config.time_mask_frames))
        widest = min(config.time_mask_frames, budget // count)
        for _ in range(count):
            width = int(rng.integers(widest + 1))
            start = int(rng.integers(frames - width + 1))
            for mean, part in means_and_parts:
                part[start : start + width] = mean
    return features


def time_warp(features: Tensor, max_shift: int, rng: np.random.Generator) -> Tensor:
    """Stretch one side of a random frame and squeeze the other: (T, F) -> (T, F)."""
    frames = len(features)
    if max_shift == 0 or frames <= 2 * max_shift + 1:
        return features
    center = int(rng.integers(max_shift + 1, frames - max_shift))
    target = int(rng.integers(center - max_shift, center + max_shift + 1))
    if target == center:
        return features
    sides = [(features[:center], target), (features[center:], frames - target)]
    warped = [
        torch.nn.functional.interpolate(
            side[None, None], size=(length, features.shape[1]), mode="bicubic", align_corners=False
        )
        for side, length in sides
    ]
    return torch.cat(warped, dim=2)[0, 0]
