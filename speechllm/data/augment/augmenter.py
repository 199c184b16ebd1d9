"""Augmentation of training utterances: its configuration, one section for each kind, and what applies it.

Every random choice comes from a generator that is handed in, so that an utterance is the same in whichever process and
order it is made. Samples may leave [-1, 1]: they are floats, and nothing clips them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeGuard, TypeVar

import numpy as np
from lhotse.cut import Cut
from torch import Tensor

from speechllm.config import check_limits, setting
from speechllm.data.augment.codec import CODECS, check_codec, telephone_band, transcode
from speechllm.data.augment.noise import SoundBank, babble, mean_power, noise_at_snr
from speechllm.data.augment.reverb import reverberate, simulate_rir
from speechllm.data.augment.specaugment import SpecAugmentConfig, spec_augment, spec_augment_twice
from speechllm.data.manifests.manifest import DataError, SourceConfig


@dataclass
class SpeedConfig:
    """Played faster by one of `factors` with `probability`, pitch and all (Ko et al., Interspeech 2015)."""

    factors: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])
    probability: float = setting(1.0, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.factors or not all(0.5 <= factor <= 2.0 for factor in self.factors):
            raise ValueError(f"factors: need some, between 0.5 and 2.0, found {self.factors}")


@dataclass
class ReverbConfig:
    """Reverberation with `probability`, by the impulse responses that the manifests `sources` hold (of several channels
    the first, unless the source says which), or without any in simulated rooms.

    Simulated: the speaker is `distance_low` to `distance_high` metres away, in rooms of `volume_low` to `volume_high`
    cubic metres whose reverberation decays by 60 dB in `t60_low` to `t60_high` seconds.
    """

    probability: float = setting(0.3, at_least=0, at_most=1)
    sources: list[SourceConfig] = field(default_factory=list)
    t60_low: float = 0.1
    t60_high: float = setting(0.8, "no room echoes longer", at_most=10)
    distance_low: float = 0.3
    distance_high: float = 3.0
    volume_low: float = 30.0
    volume_high: float = 500.0

    def __post_init__(self) -> None:
        check_limits(self)
        _check_weights(self.sources)
        for name in ("t60", "distance", "volume"):
            _check_range(self, name, above=0.0)


@dataclass
class NoiseConfig:
    """A piece of noise from the manifests `sources`, added with `probability` at a signal-to-noise ratio between
    `snr_low` and `snr_high` dB."""

    sources: list[SourceConfig]
    probability: float = setting(0.5, at_least=0, at_most=1)
    snr_low: float = 10.0
    snr_high: float = 20.0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: noise needs manifests; tools/prepare_noise.py makes one of a folder")
        check_limits(self)
        _check_weights(self.sources)
        _check_range(self, "snr")


@dataclass
class BabbleConfig:
    """`voices_low` to `voices_high` other utterances of the training data at once, added with `probability` at a
    signal-to-noise ratio between `snr_low` and `snr_high` dB."""

    probability: float = setting(0.2, at_least=0, at_most=1)
    voices_low: int = 3
    voices_high: int = 7
    snr_low: float = 13.0
    snr_high: float = 20.0

    def __post_init__(self) -> None:
        check_limits(self)
        _check_range(self, "voices", above=0)
        _check_range(self, "snr")


@dataclass
class TelephoneConfig:
    """The band of telephones alone, 300 to 3400 Hz, with `probability`."""

    probability: float = setting(0.2, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass
class CodecConfig:
    """Encoded and decoded with one of `codecs` (mulaw, alaw, gsm, at 8 kHz; mp3, vorbis) with `probability`."""

    probability: float = setting(0.2, at_least=0, at_most=1)
    codecs: list[str] = field(default_factory=lambda: list(CODECS))

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.codecs:
            raise ValueError(f"codecs: need some of {', '.join(CODECS)}")
        for codec in self.codecs:
            check_codec(codec)


@dataclass
class VolumeConfig:
    """A gain between `low` and `high` with `probability`. Samples may leave [-1, 1]; they are not clipped."""

    probability: float = setting(0.5, at_least=0, at_most=1)
    low: float = 0.125
    high: float = 2.0

    def __post_init__(self) -> None:
        check_limits(self)
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low {self.low} and high {self.high}: need 0 < low <= high")


@dataclass
class AugmentConfig:
    """What is done to training utterances, in this order; a section that is absent (or null) is not done, an empty one
    (`{}`) with its defaults."""

    speed: SpeedConfig | None = None
    reverb: ReverbConfig | None = None
    noise: NoiseConfig | None = None
    babble: BabbleConfig | None = None
    telephone: TelephoneConfig | None = None
    codec: CodecConfig | None = None
    volume: VolumeConfig | None = None
    spec_augment: SpecAugmentConfig | None = None

    @property
    def changes_waveform(self) -> bool:
        """Whether anything but SpecAugment is on."""
        sections = (self.speed, self.reverb, self.noise, self.babble, self.telephone, self.codec, self.volume)
        return any(_on(section) for section in sections)

    def draw_speeds(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count,) random speed factors for `load_samples`, 1.0 for none. They are drawn before batches are made:
        they decide how long an utterance is."""
        if self.speed is None:
            return np.ones(count)
        return np.where(rng.random(count) < self.speed.probability, rng.choice(self.speed.factors, count), 1.0)

    @property
    def slowest(self) -> float:
        """The lowest factor of speed, 1 if all are faster."""
        return min([1.0, *self.speed.factors]) if self.speed is not None and self.speed.probability > 0 else 1.0

    @property
    def fastest(self) -> float:
        """The highest factor of speed, which makes an utterance so many times shorter; 1 if all are slower."""
        return max([1.0, *self.speed.factors]) if _on(self.speed) else 1.0


class Augmenter:
    """Applies an `AugmentConfig`.

    Args:
        config: what to do.
        corpus: utterances whose voices make babble.

    Raises:
        ManifestError: a manifest of noise or of impulse responses is missing.
        DataError: nothing in one of them can be used; there is babble to make and no corpus.
    """

    def __init__(self, config: AugmentConfig, corpus: Sequence[Cut] = ()) -> None:
        self.config = config
        self._noise = SoundBank.from_sources(config.noise.sources, "noise") if _on(config.noise) else None
        self._rirs: SoundBank | None = None
        if _on(config.reverb) and config.reverb.sources:
            # An average of channels, as for speech, would hear the direct sound once per microphone.
            sources = [replace(s, channel=0 if s.channel is None else s.channel) for s in config.reverb.sources]
            self._rirs = SoundBank.from_sources(sources, "impulse response")
        self._voices: SoundBank | None = None
        if _on(config.babble):
            if not corpus:
                raise DataError("augment.babble: there are no training utterances to take voices from")
            self._voices = SoundBank(corpus)

    @property
    def fingerprints(self) -> list[str]:
        """Of the manifests of noise and impulse responses."""
        banks = [bank for bank in (self._noise, self._rirs) if bank is not None]
        return [fingerprint for bank in banks for fingerprint in bank.fingerprints]

    def samples(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(num_samples,) float32 at 16 kHz -> (num_samples,): as heard in a room, with noise and babble, over the
        telephone, through a codec, at another volume. The signal-to-noise ratios are those to the speech in its
        room."""
        config, size = self.config, len(samples)
        if _happens(config.reverb, rng):
            rir = _simulate(config.reverb, rng) if self._rirs is None else self._rirs.draw_whole(rng)
            if rir is not None:
                samples = reverberate(samples, rir)
        speech_power = mean_power(samples)
        if self._noise is not None and _happens(config.noise, rng):
            snr = rng.uniform(config.noise.snr_low, config.noise.snr_high)
            noise = self._noise.draw(size, rng)
            if noise is not None:
                samples = samples + noise_at_snr(noise, speech_power, snr)
        if self._voices is not None and _happens(config.babble, rng):
            snr = rng.uniform(config.babble.snr_low, config.babble.snr_high)
            count = int(rng.integers(config.babble.voices_low, config.babble.voices_high + 1))
            samples = samples + noise_at_snr(babble(self._voices, count, size, rng), speech_power, snr)
        if _happens(config.telephone, rng):
            samples = telephone_band(samples)
        if _happens(config.codec, rng):
            samples = transcode(samples, str(rng.choice(config.codec.codecs)), rng)
        if _happens(config.volume, rng):
            samples = np.float32(rng.uniform(config.volume.low, config.volume.high)) * samples
        return samples

    def features(self, features: Tensor, rng: np.random.Generator, kind: str) -> Tensor:
        """(T, F) of this kind (see `speechllm.data.features.MEL_BINS`) with SpecAugment."""
        config = self.config.spec_augment
        return features if config is None else spec_augment(features, config, rng, kind)

    def two_views(self, features: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(T, F) twice, with other masks of SpecAugment."""
        config = self.config.spec_augment
        if config is None:
            raise DataError("augment.spec_augment: two views of an utterance would be the same without it")
        return spec_augment_twice(features, config, rng)


def _simulate(config: ReverbConfig, rng: np.random.Generator) -> np.ndarray:
    t60 = rng.uniform(config.t60_low, config.t60_high)
    distance = rng.uniform(config.distance_low, config.distance_high)
    return simulate_rir(t60, distance, rng.uniform(config.volume_low, config.volume_high), rng)


class _Chance(Protocol):
    """A section that says how likely what it configures is."""

    probability: float


_Section = TypeVar("_Section", bound=_Chance)


def _on(section: _Section | None) -> TypeGuard[_Section]:
    return section is not None and section.probability > 0


def _happens(section: _Section | None, rng: np.random.Generator) -> TypeGuard[_Section]:
    """Draws from `rng` where the section is on."""
    return _on(section) and rng.random() < section.probability


def _check_range(section: object, name: str, above: float = -math.inf) -> None:
    low, high = getattr(section, f"{name}_low"), getattr(section, f"{name}_high")
    if not above < low <= high < math.inf:
        limit = f"{above:g} < " if above > -math.inf else ""
        raise ValueError(f"{name}_low {low} and {name}_high {high}: need {limit}low <= high")


def _check_weights(sources: Sequence[SourceConfig]) -> None:
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("sources: give a weight to all of them or to none")
