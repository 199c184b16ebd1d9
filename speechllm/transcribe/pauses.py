"""Audio of any length, cut into segments at pauses. Memory does not grow with the length.

How a stream is cut (levels are those of 10 ms frames, their mean taken off, in dB of full scale):

1. Audio of at most `max_seconds` is one segment, as it is.
2. In longer audio the next `max_seconds` are looked at. A frame is sound when it is above -70 dB; and above 40 dB below
   the loudness of the stream so far (the level that its loudest 5 % exceed); and above the noise (the 10th percentile
   of these `max_seconds`) by 6 dB, unless that is more than 15 dB below the loudness.
3. Silence in front is left out. A segment ends where there is silence for 2 s, and else at the quietest 0.2 s of the
   second half.
4. Where even these are less than 15 dB below the speech around them, there is no pause: the segment goes on for 1 s,
   and the next one begins 1 s before, so that a word that was cut is whole in one of them.
5. A segment with less than 0.1 s of sound is left out, also that of rule 1: a language model finds words in silence
   too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from speechllm.data.features import SAMPLE_RATE

FRAME = SAMPLE_RATE // 100  # samples
_FRAMES_PER_SECOND = 100
_LOWEST_LEVEL, _HIGHEST_LEVEL = -100, 60
SILENCE = -70.0
SOUND_RANGE = 40.0
_LOUD_SHARE = 0.05
NOISE_PERCENTILE = 10
NOISE_MARGIN = 6.0
_QUIETER = 15.0
PADDING = 30  # frames kept before and after sound
LEAST_SOUND = 10
_LONG_SILENCE = 200
_PAUSE = 20
_OVERLAP = 100  # frames on both sides of a cut

SHORTEST_MAX_SECONDS = 5.0


@dataclass(frozen=True)
class AudioSegment:
    """A part of a stream.

    Attributes:
        samples: (num_samples,) float32, 16 kHz.
        start: where it begins, in seconds.
        overlap: so many seconds at its beginning are the end of the segment before, too.
    """

    samples: np.ndarray
    start: float
    overlap: float


def split_at_pauses(blocks: Iterable[np.ndarray], max_seconds: float = 30.0) -> Iterator[AudioSegment]:
    """Segments of a stream, in the order of time; see the rules above. How it is divided into blocks has no influence.

    Args:
        blocks: (num_samples,) float32 in [-1, 1], 16 kHz mono each; may be empty.
        max_seconds: of a segment, at least 5.

    Raises:
        ValueError: `max_seconds` is less.
    """
    if not max_seconds >= SHORTEST_MAX_SECONDS:
        raise ValueError(f"max_seconds: must be at least {SHORTEST_MAX_SECONDS:g}, got {max_seconds}")
    max_frames = int(max_seconds * _FRAMES_PER_SECOND)
    blocks, loudness = iter(blocks), Loudness()
    buffer = np.zeros(0, dtype=np.float32)
    start = shared = 0  # frames before the buffer; frames at its beginning that the last segment has too
    while True:
        buffer, is_rest = _filled(buffer, blocks, max_frames * FRAME)
        levels = frame_levels(buffer[: max_frames * FRAME])
        loudness.add(start, levels)
        loud = loudness.level()
        sound = levels > _threshold(levels, loud)
        first = int(sound.argmax()) if sound.any() else len(levels)
        if is_rest and (start == 0 or first == len(levels)):
            end = after = len(levels)
        elif first > PADDING:
            end = after = first - PADDING
        elif (silence := _long_silence(sound, first)) is not None:
            end = after = silence + PADDING
        elif is_rest:
            end = after = len(levels)
        else:
            end, after = best_cut(levels, loud)
        if emitted := np.count_nonzero(sound[:end]) >= LEAST_SOUND:
            samples = buffer if is_rest and end == len(levels) else buffer[: end * FRAME]
            overlap = shared / _FRAMES_PER_SECOND
            yield AudioSegment(samples.copy(), start / _FRAMES_PER_SECOND, overlap)
        if is_rest and after == len(levels):
            return
        # What was left out in front may have been shared.
        shared = end - after if emitted else max(0, shared - after)
        start += after
        buffer = buffer[after * FRAME :]


def _filled(buffer: np.ndarray, blocks: Iterator[np.ndarray], size: int) -> tuple[np.ndarray, bool]:
    """More than `size` samples, or all that is left, and whether it is that."""
    parts, held = [buffer], len(buffer)
    while held <= size:
        block = next(blocks, None)
        if block is None:
            break
        parts.append(block)
        held += len(block)
    return np.concatenate(parts), held <= size


def frame_levels(samples: np.ndarray) -> np.ndarray:
    """(num_frames,) dB; a last frame that is not complete is none."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    return 10 * np.log10(frames.var(axis=1, dtype=np.float64) + 10.0 ** (_LOWEST_LEVEL / 10))


class Loudness:
    """The level that the loudest frames of a stream exceed, to 1 dB, in memory that does not grow."""

    def __init__(self) -> None:
        self._counts = np.zeros(_HIGHEST_LEVEL - _LOWEST_LEVEL + 1, dtype=np.int64)
        self._end = 0

    def add(self, start: int, levels: np.ndarray) -> None:
        """Frames from number `start` on; those seen before count once."""
        new = levels[max(0, self._end - start) :]
        self._end = max(self._end, start + len(levels))
        bins = np.floor(new).clip(_LOWEST_LEVEL, _HIGHEST_LEVEL).astype(np.int64) - _LOWEST_LEVEL
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def level(self) -> float:
        counts = self._counts[int(SILENCE) - _LOWEST_LEVEL :]
        louder = counts[::-1].cumsum()
        return _HIGHEST_LEVEL - float(np.argmax(louder >= _LOUD_SHARE * louder[-1])) if louder[-1] else SILENCE


def _threshold(levels: np.ndarray, loud: float) -> float:
    """The level above which a frame is sound."""
    noise = float(np.percentile(levels, NOISE_PERCENTILE)) if len(levels) else SILENCE
    return max(SILENCE, loud - SOUND_RANGE, min(noise + NOISE_MARGIN, loud - _QUIETER))


def _long_silence(sound: np.ndarray, first: int) -> int | None:
    """The frame in which the first long silence behind frame `first` begins."""
    places = np.flatnonzero(np.append(sound[first:], True)) + first
    gaps = np.diff(places)
    long = np.flatnonzero(gaps > _LONG_SILENCE)
    return int(places[long[0]]) + 1 if len(long) else None


def best_cut(levels: np.ndarray, loud: float) -> tuple[int, int]:
    """Where to end a segment and where to begin the next one, in frames."""
    power = 10 ** (levels / 10)
    window = slice(len(levels) // 2 - _PAUSE // 2, len(levels) - _OVERLAP + _PAUSE // 2)
    means = np.convolve(power[window], np.full(_PAUSE, 1 / _PAUSE), mode="valid")
    quietest = int(means.argmin())
    cut = window.start + quietest + _PAUSE // 2
    speech = float(np.percentile(levels, 100 * (1 - _LOUD_SHARE)))
    is_pause = 10 * math.log10(means[quietest]) <= max(_threshold(levels, loud), speech - _QUIETER)
    return (cut, cut) if is_pause else (cut + _OVERLAP, cut - _OVERLAP)
