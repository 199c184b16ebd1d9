"""Audio files of every format as blocks of samples at their own rate. The true end counts, not what the header says.

Uncompressed files (WAV, AIFF, ...) are read by soundfile: their headers are exact, and a part is read by itself. All
others are decoded by PyAV (`audio_av.py`), which is imported when there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from speechllm.data.audio_base import (
    BLOCK_SECONDS,
    AudioFile,
    AudioNote,
    UtteranceError,
    cut_off,
    openable,
    undecodable,
)

__all__ = ["BLOCK_SECONDS", "AudioFile", "AudioNote", "UtteranceError", "open_audio"]

# What soundfile reads best, by the first bytes: RIFF and its 64-bit and big-endian forms, AIFF, AU, CAF, W64, SPHERE.
_UNCOMPRESSED = (b"RIFF", b"RF64", b"RIFX", b"FORM", b".snd", b"caff", b"riff", b"NIST")
# But not MP3 in WAV (format tags 0x50 and 0x55), of which libsndfile's decoder loses more where it is damaged.
_MP3_IN_WAV = re.compile(rb"RIFF.{4}WAVE.*?fmt .{4}[\x50\x55]\0", re.DOTALL)
_HEAD_BYTES = 4096
# How soundfile's report on the header says that the file was cut off: in WAV, AIFF, AU and W64.
_CUT_OFF = re.compile(r"^ *(?:data|SSND|Data Size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
# A WAV header that was written before the length was known has such a one, and is not a file that was cut off.
_LENGTH_UNKNOWN = 0x7FFF0000


@contextmanager
def open_audio(
    source: str | Path | bytes, name: str, *, track: int | None = None, notes: list[AudioNote] | None = None
) -> Iterator[AudioFile]:
    """Open a file, or its contents.

    Args:
        name: for messages.
        track: of several audio tracks, from 0; None for the default one.
        notes: gets what is to be known of the audio.

    Raises:
        UtteranceError: it is missing, has no audio, or nothing can decode it.
    """
    notes = [] if notes is None else notes
    head = _head(source, name)
    is_uncompressed = head.startswith(_UNCOMPRESSED) and not _MP3_IN_WAV.match(head)
    openers = (_SoundFile, _av_file) if is_uncompressed else (_av_file, _SoundFile)
    try:
        file = openers[0](source, name, track, notes)
    except UtteranceError as error:
        if error.reason == "no such track":
            raise
        try:
            file = openers[1](source, name, track, notes)
        except UtteranceError:
            raise error from None
    try:
        yield file
    finally:
        file.close()


def _head(source: str | Path | bytes, name: str) -> bytes:
    """The first bytes."""
    if isinstance(source, bytes):
        head = source[:_HEAD_BYTES]
    else:
        path = Path(source)
        if not path.exists():
            raise UtteranceError("missing file", name)
        if path.is_dir():
            raise UtteranceError("unreadable audio", f"{name}: a directory, not a file")
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError as error:
            raise UtteranceError("unreadable audio", f"{name}: {error.strerror}") from error
    if not head:
        raise UtteranceError("unreadable audio", f"{name}: no data")
    return head


def _av_file(source: str | Path | bytes, name: str, track: int | None, notes: list[AudioNote]) -> AudioFile:
    # imported here: the libraries of ffmpeg take a quarter of a second to load, and WAV files need none of them
    from speechllm.data.audio_av import AVFile

    return AVFile(source, name, track, notes)


class _SoundFile(AudioFile):
    """Read by soundfile."""

    frames: int

    def __init__(self, source: str | Path | bytes, name: str, track: int | None, notes: list[AudioNote]) -> None:
        if track:
            raise UtteranceError("no such track", f"{name}: {track}: it has one")
        try:
            self._file = soundfile.SoundFile(openable(source))
        except soundfile.LibsndfileError as error:
            raise undecodable(name, error.error_string) from error
        if self._file.frames == 0:
            self._file.close()
            raise UtteranceError("wrong duration", f"{name}: no samples")
        self.name, self._notes = name, notes
        self.rate, self.channels, self.frames = self._file.samplerate, self._file.channels, self._file.frames
        said = _CUT_OFF.search(self._file.extra_info)
        self._stated = None
        if said and int(said[2]) < int(said[1]) < _LENGTH_UNKNOWN:
            self._stated = self.frames * int(said[1]) / int(said[2]) / self.rate

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        place = min(start, self.frames)
        if place:
            self._file.seek(place)
        size = round(BLOCK_SECONDS * self.rate)
        try:
            while len(block := self._file.read(size, dtype="float32", always_2d=True)):
                place += len(block)
                yield block.T
        except soundfile.LibsndfileError as error:
            at = place / self.rate
            if place == start:
                raise UtteranceError("unreadable audio", f"{self.name}: at {at:.3f} s: {error.error_string}") from error
            details = f"{self.name}: cannot be decoded after {at:.3f} s: {error.error_string}"
            self._notes.append(AudioNote("damaged audio", details))
        if self._stated is not None:
            self._notes.append(cut_off(self.name, place / self.rate, self._stated))

    def close(self) -> None:
        self._file.close()
