"""Augmentation of training utterances: speed, volume, additive noise, SpecAugment; each is off unless
configured.

Every random choice comes from a generator that is handed in, so that an utterance is the same in whichever
process and order it is made. Speed perturbation follows Ko et al. (Interspeech 2015), SpecAugment Park et al.
(arXiv 1904.08779) with the adaptive time masks of Park et al. (arXiv 1912.05533) as in lhotse.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from lhotse.audio.mixer import AudioMixer
from lhotse.cut import Cut
from torch import Tensor

from speechllm.data.audio import UtteranceError, load_samples
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifest import DataError, SourceConfig, read_manifest


@dataclass
class SpecAugmentConfig:
    """Masks over (T, 80) features, filled with the utterance's mean; `probability` of any at all.

    `freq_masks` masks of up to `freq_mask_bins` mel bins; up to `time_masks` masks of up to
    `time_mask_frames` frames (10 ms each), all together at most `max_time_fraction` of the utterance; time
    warp by up to `time_warp_frames`, 0 for none.
    """

    probability: float = 0.9
    freq_masks: int = 2
    freq_mask_bins: int = 27
    time_masks: int = 10
    time_mask_frames: int = 100
    max_time_fraction: float = 0.15
    time_warp_frames: int = 0

    def __post_init__(self) -> None:
        _check_probability("spec_augment.probability", self.probability)
        _check_probability("spec_augment.max_time_fraction", self.max_time_fraction)
        for name in ("freq_masks", "freq_mask_bins", "time_masks", "time_mask_frames", "time_warp_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"spec_augment.{name}: {getattr(self, name)} is negative")


@dataclass
class AugmentConfig:
    """What is done to training utterances.

    `speed`: factors, one is drawn per utterance, such as [0.9, 1.0, 1.1]; empty for none.
    `volume_probability`: of a gain between `volume_low` and `volume_high`. `noise`: manifests of noise;
    `noise_probability`: of adding a piece of it at a signal-to-noise ratio between `noise_snr_low` and
    `noise_snr_high` dB.
    """

    speed: list[float] = field(default_factory=list)
    volume_probability: float = 0.0
    volume_low: float = 0.125
    volume_high: float = 2.0
    noise: list[SourceConfig] = field(default_factory=list)
    noise_probability: float = 0.5
    noise_snr_low: float = 10.0
    noise_snr_high: float = 20.0
    spec_augment: SpecAugmentConfig | None = None

    def __post_init__(self) -> None:
        _check_probability("volume_probability", self.volume_probability)
        _check_probability("noise_probability", self.noise_probability)
        if not all(0.5 <= factor <= 2.0 for factor in self.speed):
            raise ValueError(f"speed: factors must be between 0.5 and 2.0, found {self.speed}")
        if not 0 < self.volume_low <= self.volume_high:
            raise ValueError(f"volume_low {self.volume_low} and volume_high {self.volume_high}: need 0 < low <= high")
        if self.noise_snr_low > self.noise_snr_high:
            raise ValueError(f"noise_snr_low {self.noise_snr_low} is above noise_snr_high {self.noise_snr_high}")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {value} is not between 0 and 1")


class NoiseBank:
    """Pieces of noise from manifests, kept in memory once read (up to `cache_seconds`, per process).

    Raises:
        ManifestError: a manifest is missing or wrong.
        DataError: the manifests have no noise.
    """

    def __init__(self, sources: list[SourceConfig], cache_seconds: float = 1800.0) -> None:
        self._cuts: list[Cut] = []
        weights: list[float] = []
        for source in sources:
            cuts = list(read_manifest(source.path))
            self._cuts += cuts
            weights += [source.weight / max(1, len(cuts))] * len(cuts)
        if not self._cuts:
            raise DataError(f"noise: no noise in {', '.join(source.path for source in sources)}")
        self._cumulative = np.cumsum(weights) / np.sum(weights)
        self._room = int(cache_seconds * SAMPLE_RATE)
        self._cache: dict[int, np.ndarray | None] = {}

    def draw(self, num_samples: int, rng: np.random.Generator) -> np.ndarray | None:
        """(num_samples,) of a random noise from a random place, repeated where it is short; None if it is
        unreadable."""
        index = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._cuts) - 1)
        start = rng.random()
        noise = self._read(index)
        if noise is None:
            return None
        if len(noise) > num_samples:
            first = int(start * (len(noise) - num_samples))
            return noise[first : first + num_samples]
        return np.resize(np.roll(noise, -int(start * len(noise))), num_samples)

    def _read(self, index: int) -> np.ndarray | None:
        if index in self._cache:
            return self._cache[index]
        try:
            noise = load_samples(self._cuts[index])
        except UtteranceError as error:
            logging.warning("noise %s is left out: %s", self._cuts[index].id, error)
            noise = None
        size = 0 if noise is None else len(noise)
        if size <= self._room:
            self._room -= size
            self._cache[index] = noise
        return noise


class Augmenter:
    """Applies an `AugmentConfig`, one utterance at a time."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._noise = NoiseBank(config.noise) if config.noise and config.noise_probability > 0 else None

    def speed(self, rng: np.random.Generator) -> float:
        """A random speed factor, 1.0 for none."""
        return float(rng.choice(self.config.speed)) if self.config.speed else 1.0

    def samples(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(num_samples,) with noise and another volume."""
        config = self.config
        if self._noise is not None and rng.random() < config.noise_probability:
            snr = rng.uniform(config.noise_snr_low, config.noise_snr_high)
            noise = self._noise.draw(len(samples), rng)
            if noise is not None:
                mixer = AudioMixer(samples[None], SAMPLE_RATE)
                mixer.add_to_mix(noise[None], snr=snr)
                samples = mixer.mixed_mono_audio[0]
        if config.volume_probability > 0 and rng.random() < config.volume_probability:
            samples = samples * np.float32(rng.uniform(config.volume_low, config.volume_high))
        return samples

    def features(self, features: Tensor, rng: np.random.Generator) -> Tensor:
        """(T, F) with SpecAugment."""
        config = self.config.spec_augment
        return features if config is None else spec_augment(features, config, rng)


def spec_augment(features: Tensor, config: SpecAugmentConfig, rng: np.random.Generator) -> Tensor:
    """SpecAugment of one utterance: (T, F) -> (T, F); an utterance too short for a mask gets none."""
    if rng.random() >= config.probability:
        return features
    features = time_warp(features, config.time_warp_frames, rng)
    frames, bins = features.shape
    mean = features.mean()
    features = features.clone()
    for _ in range(config.freq_masks):
        width = int(rng.integers(min(config.freq_mask_bins, bins) + 1))
        start = int(rng.integers(bins - width + 1))
        features[:, start : start + width] = mean
    # as many masks as it takes to cover the fraction with full-width ones, so that short utterances get few
    budget = int(config.max_time_fraction * frames)
    if config.time_masks > 0 and config.time_mask_frames > 0 and budget > 0:
        count = min(config.time_masks, -(-budget // config.time_mask_frames))
        widest = min(config.time_mask_frames, budget // count)
        for _ in range(count):
            width = int(rng.integers(widest + 1))
            start = int(rng.integers(frames - width + 1))
            features[start : start + width] = mean
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
