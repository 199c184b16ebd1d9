"""Audio of any length: read in blocks, and cut into segments at pauses. Memory does not grow with the length.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse.augmentation.torchaudio import get_or_create_resampler
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples

from speechllm.data.audio import DURATION_TOLERANCE, UtteranceError, chosen_channels, load_samples
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifests.nemo import CHANNEL, CHANNEL_OF_SEVERAL, HEADER_UNREAD, IS_SEGMENT
from speechllm.data.manifests.tar import TAR

_BLOCK_SECONDS = 10.0
# Floating-point files may go beyond full scale, 1; what is far beyond is no audio, or was scaled wrongly.
_LOUDEST = 1000.0
# A resampling filter reaches a few milliseconds to both sides at the rates of speech.
_FILTER_SECONDS = 0.02

_FRAME = SAMPLE_RATE // 100  # samples
_FRAMES_PER_SECOND = 100
_LOWEST_LEVEL, _HIGHEST_LEVEL = -100, 60
_SILENCE = -70.0
_SOUND_RANGE = 40.0
_LOUD_SHARE = 0.05
_NOISE_PERCENTILE = 10
_NOISE_MARGIN = 6.0
_QUIETER = 15.0
_PADDING = 30  # frames kept before and after sound
_LEAST_SOUND = 10
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
    blocks, loudness = iter(blocks), _Loudness()
    buffer = np.zeros(0, dtype=np.float32)
    start = shared = 0  # frames before the buffer; frames at its beginning that the last segment has too
    while True:
        buffer, is_rest = _filled(buffer, blocks, max_frames * _FRAME)
        levels = _levels(buffer[: max_frames * _FRAME])
        loudness.add(start, levels)
        loud = loudness.level()
        sound = levels > _threshold(levels, loud)
        first = int(sound.argmax()) if sound.any() else len(levels)
        if is_rest and (start == 0 or first == len(levels)):
            end = after = len(levels)
        elif first > _PADDING:
            end = after = first - _PADDING
        elif (silence := _long_silence(sound, first)) is not None:
            end = after = silence + _PADDING
        elif is_rest:
            end = after = len(levels)
        else:
            end, after = _cut(levels, loud)
        if emitted := np.count_nonzero(sound[:end]) >= _LEAST_SOUND:
            samples = buffer if is_rest and end == len(levels) else buffer[: end * _FRAME]
            overlap = shared / _FRAMES_PER_SECOND
            yield AudioSegment(samples.copy(), start / _FRAMES_PER_SECOND, overlap)
        if is_rest and after == len(levels):
            return
        # What was left out in front may have been shared.
        shared = end - after if emitted else max(0, shared - after)
        start += after
        buffer = buffer[after * _FRAME :]


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


def _levels(samples: np.ndarray) -> np.ndarray:
    """(num_frames,) dB; a last frame that is not complete is none."""
    frames = samples[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME)
    return 10 * np.log10(frames.var(axis=1, dtype=np.float64) + 10.0 ** (_LOWEST_LEVEL / 10))


class _Loudness:
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
        counts = self._counts[int(_SILENCE) - _LOWEST_LEVEL :]
        louder = counts[::-1].cumsum()
        return _HIGHEST_LEVEL - float(np.argmax(louder >= _LOUD_SHARE * louder[-1])) if louder[-1] else _SILENCE


def _threshold(levels: np.ndarray, loud: float) -> float:
    """The level above which a frame is sound."""
    noise = float(np.percentile(levels, _NOISE_PERCENTILE)) if len(levels) else _SILENCE
    return max(_SILENCE, loud - _SOUND_RANGE, min(noise + _NOISE_MARGIN, loud - _QUIETER))


def _long_silence(sound: np.ndarray, first: int) -> int | None:
    """The frame in which the first long silence behind frame `first` begins."""
    places = np.flatnonzero(np.append(sound[first:], True)) + first
    gaps = np.diff(places)
    long = np.flatnonzero(gaps > _LONG_SILENCE)
    return int(places[long[0]]) + 1 if len(long) else None


def _cut(levels: np.ndarray, loud: float) -> tuple[int, int]:
    """Where to end a segment and where to begin the next one, in frames."""
    power = 10 ** (levels / 10)
    window = slice(len(levels) // 2 - _PAUSE // 2, len(levels) - _OVERLAP + _PAUSE // 2)
    means = np.convolve(power[window], np.full(_PAUSE, 1 / _PAUSE), mode="valid")
    quietest = int(means.argmin())
    cut = window.start + quietest + _PAUSE // 2
    speech = float(np.percentile(levels, 100 * (1 - _LOUD_SHARE)))
    is_pause = 10 * math.log10(means[quietest]) <= max(_threshold(levels, loud), speech - _QUIETER)
    return (cut, cut) if is_pause else (cut + _OVERLAP, cut - _OVERLAP)


def read_blocks(
    path: str | Path,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | Sequence[int] | None = None,
    channel_of_several: int | None = None,
) -> Iterator[np.ndarray]:
    """An audio file of any sampling rate, in blocks; what soundfile cannot decode PyAV does, where it is installed.

    All blocks together are what `load_samples` gives of the file.

    Args:
        start, duration: seconds; without a duration, to the end.
        channel: which one to take of several, or which ones to average; None averages all.
        channel_of_several: which one to take if there are several.

    Yields:
        (num_samples,) float32, 16 kHz.

    Raises:
        UtteranceError: the file is missing or unreadable, ends before it should, does not have the channel, or has
            samples that are not finite numbers; the message names it.
    """
    path, name = Path(path), str(path)
    if not path.exists():
        raise UtteranceError("missing file", name)
    if path.is_dir():
        raise UtteranceError("unreadable audio", f"{name}: a directory, not a file")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        if path.stat().st_size == 0:
            raise UtteranceError("unreadable audio", f"{name}: no data") from error
        rate, blocks = _av_blocks(path, error.error_string)
        skipped = start
    else:
        rate, blocks = file.samplerate, _soundfile_blocks(file, start, name)
        skipped = 0.0
    blocks = _span(blocks, rate, skipped, duration, name)
    channels = {CHANNEL: channel, CHANNEL_OF_SEVERAL: channel_of_several}
    yield from _resampled((_checked_mono(block, channels, name) for block in blocks), rate)


def cut_blocks(cut: Cut) -> Iterator[np.ndarray]:
    """The audio of a cut of a manifest as `read_blocks` gives it. One that is not simply a part of a file (in a tar
    shard, made by a command, of several files, with transforms) is one block.

    Raises:
        UtteranceError: as of `read_blocks` and `load_samples`.
    """
    custom = cut.custom or {}
    is_part_of_file = (
        isinstance(cut, DataCut)
        and isinstance(cut.channel, int)
        and TAR not in custom
        and [source.type for source in cut.recording.sources] == ["file"]
        and not cut.recording.transforms
    )
    if not is_part_of_file:
        yield load_samples(cut)
        return
    (source,) = cut.recording.sources
    if custom.get(HEADER_UNREAD):
        duration = cut.duration if custom[IS_SEGMENT] else None
        yield from read_blocks(source.source, cut.start, duration, custom.get(CHANNEL), custom.get(CHANNEL_OF_SEVERAL))
    else:
        channel = source.channels.index(cut.channel)
        yield from read_blocks(source.source, cut.start, cut.duration, channel)


def _soundfile_blocks(file: soundfile.SoundFile, start: float, name: str) -> Iterator[np.ndarray]:
    """(channels, num_samples) from `start` seconds on."""
    with file:
        place = min(compute_num_samples(start, file.samplerate) if start else 0, file.frames)
        try:
            if place:
                file.seek(place)
            size = round(_BLOCK_SECONDS * file.samplerate)
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                yield block.T
                place += len(block)
        except soundfile.LibsndfileError as error:
            at = place / file.samplerate
            raise UtteranceError("unreadable audio", f"{name}: after {at:.3f} s: {error.error_string}") from error
        if place < file.frames - DURATION_TOLERANCE * file.samplerate:
            ends, said = (frames / file.samplerate for frames in (place, file.frames))
            raise UtteranceError("wrong duration", f"{name}: ends at {ends:.3f} s, its header says {said:.3f} s")


def _av_blocks(path: Path, why: str) -> tuple[int, Iterator[np.ndarray]]:
    """The sampling rate of the first audio track, and (channels, num_samples) from its beginning on."""
    try:
        import av
    except ImportError as error:
        raise UtteranceError(
            "unreadable audio", f"{path}: soundfile cannot decode it ({why}); PyAV may (pip install av)"
        ) from error

    def unreadable(error: av.error.FFmpegError) -> UtteranceError:
        return UtteranceError("unreadable audio", f"{path}: {error.strerror} (PyAV), {why} (soundfile)")

    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise unreadable(error) from error
    if not container.streams.audio:
        container.close()
        raise UtteranceError("unreadable audio", f"{path}: no audio track")
    stream = container.streams.audio[0]

    def blocks() -> Iterator[np.ndarray]:
        # A decoder may give another rate than the container says (HE-AAC), and change it on the way.
        to_float = av.AudioResampler(format="fltp", rate=stream.rate)
        with container:
            try:
                for frame in container.decode(stream):
                    yield from (part.to_ndarray() for part in to_float.resample(frame))
                yield from (part.to_ndarray() for part in to_float.resample(None))
            except av.error.FFmpegError as error:
                raise unreadable(error) from error

    return stream.rate, blocks()


def _span(
    blocks: Iterator[np.ndarray], rate: int, start: float, duration: float | None, name: str
) -> Iterator[np.ndarray]:
    """The part of (channels, num_samples) blocks that begins after `start` seconds."""
    skip = compute_num_samples(start, rate) if start else 0
    left = math.inf if duration is None else compute_num_samples(duration, rate)
    wanted, read = left, 0
    for block in blocks:
        skipped = min(skip, block.shape[1])
        skip -= skipped
        block = block[:, skipped : skipped + int(min(left, block.shape[1]))]
        left -= block.shape[1]
        read += block.shape[1]
        if block.shape[1]:
            yield block
        if left == 0:
            return
    if read == 0:
        raise UtteranceError("wrong duration", f"{name}: no samples{' there' if start or duration else ''}")
    if math.isfinite(wanted) and left > DURATION_TOLERANCE * rate:
        said, found = wanted / rate, read / rate
        raise UtteranceError("wrong duration", f"{name}: {said:.3f} s are asked for, it ends after {found:.3f} s")


def _checked_mono(block: np.ndarray, channels: dict, name: str) -> np.ndarray:
    """The mean of the chosen channels of (channels, num_samples)."""
    samples = block[chosen_channels(channels, range(len(block)), name)].mean(axis=0)
    if not np.isfinite(samples).all():
        raise UtteranceError("non-finite samples", name)
    if (loudest := np.abs(samples).max()) > _LOUDEST:
        raise UtteranceError("implausible samples", f"{name}: up to {loudest:.3g}, where 1 is full scale")
    return samples


def _resampled(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """16 kHz blocks; the same as of all in one: each is resampled with what is before and after it."""
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    resampler = get_or_create_resampler(rate, SAMPLE_RATE)
    divisor = math.gcd(rate, SAMPLE_RATE)
    period, new_period = rate // divisor, SAMPLE_RATE // divisor
    margin = (math.ceil(_FILTER_SECONDS * rate / period) + 1) * period

    def resampled(samples: np.ndarray, begin: int, end: int | None) -> np.ndarray:
        found = resampler(torch.from_numpy(np.ascontiguousarray(samples))).numpy()
        return found[begin // period * new_period : None if end is None else end // period * new_period]

    parts: list[np.ndarray] = []
    held = context = 0  # samples in parts, and how many of them were resampled before
    for block in blocks:
        parts.append(block)
        held += len(block)
        if held < context + 2 * margin + _BLOCK_SECONDS * rate:
            continue
        samples = np.concatenate(parts)
        end = (held - margin) // period * period
        yield resampled(samples[: end + margin], context, end)
        parts, held, context = [samples[end - margin :]], held - end + margin, margin
    if parts:
        yield resampled(np.concatenate(parts), context, None)
