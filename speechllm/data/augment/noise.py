"""Sounds to mix with training utterances: noise from manifests, voices of the corpus; mixing at an SNR."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence

import numpy as np
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from speechllm.data.audio import load_samples
from speechllm.data.audio_file import UtteranceError
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifests.manifest import (
    HEADER_UNREAD,
    IS_SEGMENT,
    LINE_ERRORS,
    DataError,
    ManifestError,
    SourceConfig,
    explain,
    iter_objects,
    to_cut,
)

# Of a longer recording only the piece that is needed is read, each time; shorter ones are read whole and kept.
_LONG_SECONDS = 60.0


class SoundBank:
    """Sounds to draw from at random, kept in memory once read (up to `cache_seconds`, per process).

    Args:
        cuts: the sounds.
        weights: how often each is drawn, relative to the others; None for equally often.
        fingerprints: of the manifests that they are from.
    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        weights: Sequence[float] | None = None,
        cache_seconds: float = 1800.0,
        fingerprints: Sequence[str] = (),
    ) -> None:
        self.fingerprints = list(fingerprints)
        self._cuts = cuts
        shares = np.ones(len(cuts)) if weights is None else np.asarray(weights)
        self._cumulative = np.cumsum(shares) / shares.sum()
        self._room = int(cache_seconds * SAMPLE_RATE)
        self._cache: dict[int, np.ndarray | None] = {}

    @classmethod
    def from_sources(cls, sources: Sequence[SourceConfig], what: str) -> SoundBank:
        """The sounds of manifests. A source is drawn from as often as its weight says; without weights each sound is
        drawn equally often. A line that cannot be used is left out, with a warning.

        Args:
            what: what is in the manifests, for the error message.

        Raises:
            ManifestError: a manifest is missing.
            DataError: nothing in a manifest can be used.
        """
        cuts: list[Cut] = []
        weights: list[float] = []
        fingerprints: list[str] = []
        for source in sources:
            found, fingerprint = _sounds_in(source, what)
            cuts += found
            weights += [1.0 if source.weight is None else source.weight / len(found)] * len(found)
            fingerprints.append(fingerprint)
        return cls(cuts, weights, fingerprints=fingerprints)

    def draw(self, num_samples: int, rng: np.random.Generator) -> np.ndarray | None:
        """(num_samples,) of a random sound from a random place, repeated where it is short; None if it is
        unreadable."""
        index = self._draw_index(rng)
        start = rng.random()
        cut = self._cuts[index]
        if cut.duration > max(_LONG_SECONDS, num_samples / SAMPLE_RATE):
            if self._cache.get(index, cut) is None:  # known to be unreadable
                return None
            piece = _load(_piece(cut, start, num_samples), num_samples)
            if piece is None:
                self._cache[index] = None
            return piece
        sound = self._load_whole(index)
        if sound is None:
            return None
        if len(sound) > num_samples:
            first = int(start * (len(sound) - num_samples))
            return sound[first : first + num_samples]
        return np.resize(np.roll(sound, -int(start * len(sound))), num_samples)

    def draw_whole(self, rng: np.random.Generator) -> np.ndarray | None:
        """All samples of a random sound; None if it is unreadable."""
        return self._load_whole(self._draw_index(rng))

    def _draw_index(self, rng: np.random.Generator) -> int:
        return min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self._cuts) - 1)

    def _load_whole(self, index: int) -> np.ndarray | None:
        if index in self._cache:
            return self._cache[index]
        sound = _load(self._cuts[index])
        size = 0 if sound is None else len(sound)
        if size <= self._room:
            self._room -= size
            self._cache[index] = sound
        return sound


def _sounds_in(source: SourceConfig, what: str) -> tuple[list[Cut], str]:
    """The sounds of a manifest, and a fingerprint of its lines.

    Raises:
        ManifestError: the manifest is missing.
        DataError: it has none, or none that can be read.
    """
    cuts: list[Cut] = []
    checksum, first_error = 0, ""
    for location, found in iter_objects(source):
        try:
            if isinstance(found, ManifestError):
                raise found
            checksum = zlib.crc32(json.dumps(found, sort_keys=True).encode(), checksum)
            cuts.append(to_cut(found, source))
        except (ManifestError, *LINE_ERRORS) as error:
            details = explain(error).removeprefix(f"{location}: ")
            first_error = first_error or f"{location}: {details}"
            logging.warning("%s is left out of the augmentation: %s", location, details)
    if cuts and not any(_is_readable(cut) for cut in cuts):  # stops at the first that is
        first_error = f"none of its {len(cuts)} can be read; the log says why"
        cuts = []
    if not cuts:
        raise DataError(f"{source.path}: no {what} in it{f': {first_error}' if first_error else ''}")
    return cuts, f"{checksum:08x}"


def _is_readable(cut: Cut) -> bool:
    return _load(cut if cut.duration <= _LONG_SECONDS else _piece(cut, 0.0, SAMPLE_RATE)) is not None


def babble(voices: SoundBank, count: int, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """(num_samples,) of `count` random voices at equal power; unreadable and silent ones are missing from it."""
    mixed = np.zeros(num_samples, np.float32)
    for _ in range(count):
        voice = voices.draw(num_samples, rng)
        if voice is not None and (power := mean_power(voice)) > 0:
            mixed += voice / np.float32(np.sqrt(power))
    return mixed


def noise_at_snr(noise: np.ndarray, speech_power: float, snr: float) -> np.ndarray:
    """`noise` (num_samples,) as loud as it must be for `snr` dB beside speech of `speech_power`. Beside silence it is
    silent too, for no loudness would be right; silent noise stays what it is."""
    power = mean_power(noise)
    return noise * np.float32(np.sqrt(speech_power / power * 10 ** (-snr / 10))) if power > 0 else noise


def mean_power(samples: np.ndarray) -> float:
    """The mean square of (num_samples,)."""
    return float(np.mean(np.square(samples), dtype=np.float64))  # BLAS would depend on the number of threads


def _piece(cut: Cut, start: float, num_samples: int) -> Cut:
    """What is needed of a long cut, from `start` (in [0, 1)) of the places where it fits."""
    seconds = num_samples / SAMPLE_RATE
    piece = cut.truncate(offset=start * (cut.duration - seconds), duration=seconds)
    if (cut.custom or {}).get(HEADER_UNREAD):
        piece = fastcopy(piece, custom={**piece.custom, IS_SEGMENT: True})
    return piece


def _load(cut: Cut, num_samples: int | None = None) -> np.ndarray | None:
    """The samples of a cut, `num_samples` of them if given; None, and a warning, if it is unreadable."""
    try:
        sound = load_samples(cut)
    except UtteranceError as error:
        logging.warning("%s is left out of the augmentation: %s", cut.id, error)
        return None
    return sound if num_samples is None else np.resize(sound, num_samples)
