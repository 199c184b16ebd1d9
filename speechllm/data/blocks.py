"""Audio as blocks of 16 kHz mono: what training, `speechllm data check` and `speechllm transcribe` have in common.

Several channels become one in windows of ten seconds. It is their mean, unless that loses what one of them says:

- Channels that cancel out, such as stereo in opposite phase: the mean has less than half the power that it would have
  if the channels had nothing in common. The loudest is taken.
- One or few of many that speak: the mean is more than 10 dB below the loudest channel, which is more than 6 dB above
  the middle one. The mean of those within 10 dB of the loudest is taken, or the loudest where these cancel out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from lhotse.utils import compute_num_samples

from speechllm.data.audio_file import BLOCK_SECONDS, AudioFile, AudioNote, UtteranceError, open_audio
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.resample import resample_blocks

# Seconds by which audio may be shorter or longer than its manifest says: manifests round durations, and coders add a
# little at both ends.
DURATION_TOLERANCE = 0.5
# Floating-point files may go beyond full scale, 1; what is far beyond is no audio, or was scaled wrongly.
_LOUDEST = 1000.0
_TEN_DB, _SIX_DB = 10.0, 4.0  # as ratios of power

# For a number of channels, those to take.
Choice = Callable[[int], Sequence[int]]


def read_blocks(
    source: str | Path | bytes,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
    *,
    choose: Choice | None = None,
    track: int | None = None,
    name: str | None = None,
    tolerance: float = DURATION_TOLERANCE,
    notes: list[AudioNote] | None = None,
) -> Iterator[np.ndarray]:
    """An audio file of any format, sampling rate and length, in blocks.

    All blocks together are what `speechllm.data.load_samples` gives of the file.

    Args:
        source: a path, or the contents of a file.
        start, duration: seconds; without a duration, to the end.
        channel: which one to take of several; None takes the mean, or those that speak (see above).
        choose: gives the channels to mix, for so many as there are; instead of `channel`.
        track: which one to take of several audio tracks, from 0; None for the default one.
        name: for messages; None for the path.
        tolerance: seconds that may be missing of `duration`.
        notes: gets what is to be known of the audio: damage, channels that were chosen.

    Yields:
        (num_samples,) float32, 16 kHz.

    Raises:
        UtteranceError: the file is missing or unreadable, ends before it should, does not have the channel or track, or
            has samples that are not finite numbers; the message names it.
    """
    name = name or (f"{len(source)} bytes of audio" if isinstance(source, bytes) else str(source))
    notes = [] if notes is None else notes
    if channel is not None:
        choose = _only(channel, name)
    with open_audio(source, name, track=track, notes=notes) as file:
        rate = file.rate
        first = compute_num_samples(start, rate) if start else 0
        wanted = None if duration is None else compute_num_samples(duration, rate)
        blocks = _checked_part(file, first, wanted, round(tolerance * rate))
        yield from resample_blocks(mono_blocks(blocks, rate, name, choose, notes), rate, SAMPLE_RATE)


def part_of(file: AudioFile, start: int, count: int | None) -> Iterator[np.ndarray]:
    """(channels, num_samples) blocks of `count` samples, or fewer where the file ends; None for all that there are."""
    left = count
    for block in file.blocks(start):
        yield block if left is None else block[:, :left]
        if left is not None:
            left -= block.shape[1]
            if left <= 0:
                return


def _checked_part(file: AudioFile, start: int, wanted: int | None, tolerance: int) -> Iterator[np.ndarray]:
    """`part_of` a file that may have `tolerance` samples less, but not none."""
    read = 0
    for block in part_of(file, start, wanted):
        read += block.shape[1]
        yield block
    if read == 0:
        raise UtteranceError("wrong duration", f"{file.name}: no samples there")
    if wanted is not None and read < wanted - tolerance:
        said, found = wanted / file.rate, read / file.rate
        raise UtteranceError("wrong duration", f"{file.name}: {said:.3f} s are asked for, it ends after {found:.3f} s")


def _only(channel: int, name: str) -> Choice:
    def choose(count: int) -> list[int]:
        if channel >= count:
            raise UtteranceError("no such channel", f"{name}: {channel} is not among {list(range(count))}")
        return [channel]

    return choose


def mono_blocks(
    blocks: Iterable[np.ndarray],
    rate: int,
    name: str,
    choose: Choice | None = None,
    notes: list[AudioNote] | None = None,
) -> Iterator[np.ndarray]:
    """One channel of (channels, num_samples) blocks, as this module's description says, of those that `choose` gives.

    Raises:
        UtteranceError: samples are not finite, or absurdly large; what `choose` raises.
    """
    mixer = _Mixer(name)
    if choose is not None:
        blocks = (block[list(choose(len(block)))] for block in blocks)
    for block in _windows(blocks, round(BLOCK_SECONDS * rate)):
        _check(block, name)
        yield mixer.mix(block)
    if notes is not None and mixer.chosen:
        notes.append(AudioNote("channels chosen", mixer.summary()))


def _windows(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Blocks of `size` samples, the last of each number of channels aside. One channel is passed on as it comes."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        if held and len(block) != len(held[0]):
            yield np.concatenate(held, axis=1)
            held, count = [], 0
        if len(block) == 1:
            yield block
            continue
        held.append(block)
        count += block.shape[1]
        while count >= size:
            joined = np.concatenate(held, axis=1)
            yield joined[:, :size]
            held, count = [joined[:, size:]], count - size
    if count:
        yield np.concatenate(held, axis=1)


def _check(block: np.ndarray, name: str) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        bad = np.count_nonzero(~finite.all(axis=0))
        raise UtteranceError("non-finite samples", f"{name}: {bad} of {block.shape[1]} samples")
    if (loudest := np.abs(block).max(initial=0.0)) > _LOUDEST:
        raise UtteranceError("implausible samples", f"{name}: up to {loudest:.3g}, where 1 is full scale")


class _Mixer:
    """Makes one channel of several, and remembers which were chosen."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._channels = 0
        self.chosen: set[int] = set()

    def mix(self, block: np.ndarray) -> np.ndarray:
        """(num_samples,) of (channels, num_samples)."""
        self._channels = max(self._channels, len(block))
        if len(block) == 1 or not block.shape[1]:
            return block[0]
        powers = block.var(axis=1, dtype=np.float64)
        mean = block.mean(axis=0)
        if not _cancels(mean, powers) and not _drowns(mean, powers):
            return mean
        loud = np.flatnonzero(powers * _TEN_DB >= powers.max())
        found = block[loud].mean(axis=0)
        if _cancels(found, powers[loud]):
            loud = powers.argmax(keepdims=True)
            found = block[loud[0]]
        self.chosen.update(map(int, loud))
        return found

    def summary(self) -> str:
        """Which channels were taken."""
        which = ", ".join(map(str, sorted(self.chosen)))
        return (
            f"{self._name}: of {self._channels} channels {which} was taken where the mean of all would lose the speech"
        )


def _cancels(mean: np.ndarray, powers: np.ndarray) -> bool:
    return len(powers) > 1 and mean.var(dtype=np.float64) < powers.mean() / len(powers) / 2


def _drowns(mean: np.ndarray, powers: np.ndarray) -> bool:
    loudest = powers.max()
    return mean.var(dtype=np.float64) * _TEN_DB < loudest and loudest > _SIX_DB * np.median(powers)
