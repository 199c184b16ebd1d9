"""Audio files that are decoded, by PyAV, which brings ffmpeg's libraries. What cannot be is left out, and noted.

Of MP3 without a Xing header, chained Ogg, concatenated MP3 and FLAC of unknown length, only decoding tells where the
end is. A part of a long file is decoded from a second before it, where the timestamps of the whole file are exact to
the sample (`_has_exact_timestamps`); else from the beginning, so that a part is always the same part.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from statistics import median
from typing import cast

import av
import numpy as np

from speechllm.data.audio_base import AudioFile, AudioNote, UtteranceError, cut_off, openable, undecodable
from speechllm.data.resample import resample_blocks

# Formats whose headers state the length; of others, ffmpeg estimates it.
_WITH_LENGTH = ("flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "asf")
# In these a jump of the timestamps means lost data; in others it may be silence that was not sent.
_WITHOUT_JUMPS = ("ogg", "flac")
# Playlists, descriptions of streams, and filters and scripts as inputs.
_OPENS_OTHERS = {"applehttp", "avisynth", "concat", "dash", "gxf", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp"}
_OPENS_OTHERS |= {"vapoursynth", "webm_dash_manifest", "image2", "image2pipe", "tty", "ffmetadata"}
# Tags of files that were written one after another; no audio, and no damage.
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")
# Timestamps of packets may be off by a block of Vorbis; what is further off is a gap, or the next link of a chain.
_JUMP_SECONDS = 0.1
# To decode so much is quicker than to look for a place to begin.
_SEEK_FROM_SECONDS = 30.0
# Decoders are given so much before a part: until then they depend on what was before.
_PREROLL_SECONDS = 1.0


@dataclass
class _Progress:
    """How far a stream is decoded: `seconds` are done; `places` could not be, the first at `first_place` seconds; the
    next frame is `expected` to have this time."""

    seconds: float = 0.0
    places: int = 0
    first_place: float = 0.0
    expected: float | None = None

    def add_damage(self) -> None:
        if self.places == 0:
            self.first_place = self.seconds
        self.places += 1


class AVFile(AudioFile):
    """Decoded by PyAV; see `open_audio`, also for the arguments."""

    frames: None = None

    def __init__(self, source: str | Path | bytes, name: str, track: int | None, notes: list[AudioNote]) -> None:
        self.name, self._source, self._notes, self._wanted = name, source, notes, track
        self._open()

    def _open(self) -> None:
        """At the beginning of the track. The first frame is decoded, for the container may say another rate than the
        decoder gives (HE-AAC)."""
        try:
            self._container = _container(self._source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise undecodable(self.name, getattr(error, "strerror", None) or str(error)) from error
        try:
            self._stream = _track(self._container, self._wanted, self.name)
            self._progress = _Progress()
            frames = _frames(self._container, self._stream, self._progress)
            first = next(frames, None)
            if first is None:
                raise undecodable(self.name, "none of its data")
        except BaseException:
            self._container.close()
            raise
        self._frames = itertools.chain([first], frames)
        self.rate, self.channels = first[0].sample_rate, len(first[1])

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        skip = start
        if start > _SEEK_FROM_SECONDS * self.rate and self._can_seek() and (place := self._seek(start)) is not None:
            skip = start - place
        is_whole = False
        try:
            for block in self._at_one_rate():
                dropped = min(skip, block.shape[1])
                skip -= dropped
                if block.shape[1] > dropped:
                    yield block[:, dropped:]
            is_whole = True
        finally:
            self._add_notes(is_whole)

    def _at_one_rate(self) -> Iterator[np.ndarray]:
        """A chained stream may change its rate, and its channels."""
        for (rate, _), run in itertools.groupby(self._frames, lambda item: (item[0].sample_rate, len(item[1]))):
            yield from resample_blocks(_joined((samples for _, samples in run), rate), rate, self.rate)

    def _can_seek(self) -> bool:
        if isinstance(self._source, bytes):
            return False
        stat = os.stat(self._source)
        return _has_exact_timestamps(str(self._source), self._stream.index, self.rate, stat.st_size, stat.st_mtime_ns)

    def _seek(self, start: int) -> int | None:
        """Go to some place before sample `start`, and return which; None where that goes wrong, at the beginning."""
        per_tick = self.rate * _tick(self._stream)
        half = _PREROLL_SECONDS / 2 * self.rate
        origin = _time_of_first(self._frames, half, per_tick)[0] or 0
        place = start - round(_PREROLL_SECONDS * self.rate)
        self._container.seek(int((origin + place) / per_tick), stream=self._stream)
        progress = _Progress(seconds=place / self.rate)
        frames = _frames(self._container, self._stream, progress)
        first, held = _time_of_first(frames, half, per_tick)
        if first is None or first - origin > start:
            self.close()
            self._open()
            return None
        progress.places = 0  # packets that depend on what was before them are no damage
        self._progress, self._frames = progress, itertools.chain(held, frames)
        return first - origin

    def _add_notes(self, is_whole: bool) -> None:
        progress = self._progress
        if progress.places:
            what = "1 place" if progress.places == 1 else f"{progress.places} places"
            details = f"{self.name}: {what} could not be decoded, the first at {progress.first_place:.3f} s"
            self._notes.append(AudioNote("damaged audio", details))
            return
        stated = self._stated_seconds() if is_whole else None
        if stated is not None and progress.seconds < stated - _JUMP_SECONDS:
            self._notes.append(cut_off(self.name, progress.seconds, stated))

    def _stated_seconds(self) -> float | None:
        """How long it is by its header, where that says so."""
        name = self._container.format.name
        if name == "mp3":
            frames = _mp3_frames(self._source)
            # up to three frames are what encoders add at both ends, and decoders leave out
            return frames and (frames - 3) * (1152 if self.rate >= 32000 else 576) / self.rate
        if name not in _WITH_LENGTH:
            return None
        if self._stream.duration is not None:
            return float(self._stream.duration * _tick(self._stream))
        if len(self._container.streams) > 1:  # that of the container is that of the longest
            return _seconds_of_tag(self._stream.metadata.get("DURATION", ""))
        return None if self._container.duration is None else self._container.duration / av.time_base

    def count_frames(self) -> int:
        # that of FLAC is a number of samples, not an estimate
        if self._container.format.name == "flac" and (stated := self._stated_seconds()):
            return round(stated * self.rate)
        return super().count_frames()

    def close(self) -> None:
        self._container.close()


def _container(source: str | Path | bytes) -> av.container.InputContainer:
    # a name with a colon is no URL
    name = openable(source) if isinstance(source, bytes) else f"file:{source}"
    options = {"protocol_whitelist": "file", "format_whitelist": _formats()}
    return av.open(name, "r", metadata_errors="ignore", options=options)


@cache
def _formats() -> str:
    """All of ffmpeg's formats but those that open what the file names: another file of this machine, which is then
    taken for the recording, or a device."""
    return ",".join(sorted(av.formats_available - _OPENS_OTHERS))


def _track(container: av.container.InputContainer, track: int | None, name: str) -> av.AudioStream:
    streams = container.streams.audio
    if not streams:
        raise undecodable(name, "no audio track")
    if track is None:
        return next((s for s in streams if s.disposition & av.stream.Disposition.default), streams[0])
    if track >= len(streams):
        raise UtteranceError("no such track", f"{name}: {track} is not among {list(range(len(streams)))}")
    return streams[track]


def _tick(stream: av.AudioStream) -> Fraction:
    """Seconds of a unit of its timestamps."""
    return stream.time_base or Fraction(1, av.time_base)


def _seconds_of_tag(text: str) -> float | None:
    """Of a tag of Matroska, such as 00:01:12.016000000."""
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text)
    return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) if found else None


def _frames(
    container: av.container.InputContainer, stream: av.AudioStream, progress: _Progress
) -> Iterator[tuple[av.AudioFrame, np.ndarray]]:
    """Each frame, and its (channels, num_samples) float32."""
    if stream.codec_context.name == "flac":  # else a damaged frame is noise
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    finds_jumps = container.format.name in _WITHOUT_JUMPS
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except av.FFmpegError:
            if packet is None or not bytes(packet).startswith(_TAGS):
                progress.add_damage()
            if packet is None:
                return
            continue
        for frame in frames:
            if finds_jumps and frame.pts is not None:
                at = float(frame.pts * _tick(stream))
                if progress.expected is not None and at > progress.expected + _JUMP_SECONDS:
                    progress.add_damage()
                progress.expected = at + frame.samples / frame.sample_rate
            progress.seconds += frame.samples / frame.sample_rate
            yield frame, _float_samples(frame)


def _time_of_first(
    frames: Iterator[tuple[av.AudioFrame, np.ndarray]], least: float, per_tick: Fraction
) -> tuple[int | None, list[tuple[av.AudioFrame, np.ndarray]]]:
    """The timestamp of the first sample, in samples, and the frames that tell: of more than `least` samples. One
    timestamp may be off, by a block of Vorbis or in the first frame; the one in the middle is not."""
    held, times, count = [], [], 0
    for frame, samples in frames:
        if frame.pts is None:
            break
        times.append(frame.pts * per_tick - count)
        held.append((frame, samples))
        count += samples.shape[1]
        if count > least:
            break
    return (round(median(times)) if times else None), held


def _float_samples(frame: av.AudioFrame) -> np.ndarray:
    """(channels, num_samples) float32 in [-1, 1]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    if samples.dtype.kind == "u":
        return ((samples - half) / half).astype(np.float32)
    return samples.astype(np.float32) / np.float32(half)


def _joined(parts: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks of a second or a little more."""
    held: list[np.ndarray] = []
    count = 0
    for part in parts:
        held.append(part)
        count += part.shape[1]
        if count >= rate:
            yield np.concatenate(held, axis=1)
            held, count = [], 0
    if held:
        yield np.concatenate(held, axis=1)


@lru_cache(maxsize=100_000)
def _has_exact_timestamps(path: str, track: int, rate: int, size: int, changed: int) -> bool:
    """Whether each packet begins where the one before ends, in whole samples: not so where several files were chained
    or something is lost, nor where a container rounds to milliseconds. Nothing is decoded.

    Args:
        size, changed: of the file, so that what was found of another is not taken for it.
    """
    with _container(path) as container:
        stream = cast(av.AudioStream, container.streams[track])
        per_tick = float(rate * _tick(stream))
        most = _JUMP_SECONDS * rate / per_tick if per_tick <= 1 else 0
        lengths, expected = set(), None
        try:
            for packet in container.demux(stream):
                begin, length = packet.pts, packet.duration or 0
                if packet.size == 0:
                    continue
                if begin is None or (expected is not None and abs(begin - expected) > most):
                    return False
                expected = begin + length
                lengths.add(length)
        except av.FFmpegError:
            return False
    return all(math.isclose(length * per_tick, round(length * per_tick), rel_tol=1e-9) for length in lengths)


def _mp3_frames(source: str | Path | bytes) -> int | None:
    """How many frames an MP3 file has, if its first one says so: the Xing tag, which LAME calls Info at a constant rate
    (http://gabriel.mp3-tech.org/mp3infotag.html)."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:  # its size has 7 bits a byte
            file.seek(10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        tag = re.search(rb"(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f](.{4})", file.read(2048), re.DOTALL)
    return int.from_bytes(tag[1], "big") if tag else None
