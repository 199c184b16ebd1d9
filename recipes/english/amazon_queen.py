"""The spoken lines of *Flight of the Amazon Queen*, out of the one file in which the game is distributed.

The file (`queen.1c`, as ScummVM reads it: its `engines/queen` documents the formats by code) is an archive of

    *.SB         a recording each, as a bare MP3 stream
    *.DOG        a dialogue: what Joe, the player, can say, and what the other person answers
    *.CUT        a cut scene: sentences in the order of its objects
    QUEEN.JAS    the counts of the game's objects
    QUEEN2.JAS   its texts, a line each: what Joe says of what he looks at, and his stock replies

A sentence is spoken in pieces, one recording each, whose names follow from where the sentence stands. All integers are
big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speechllm.errors import UserError

_MP3 = 1
# Every file but the recordings and QUEEN2.JAS has a header, from whose end its offsets are counted.
_HEADER = 20
_ENTRY = struct.Struct(">12sBII")
_FIRST_ENTRY = 15
# Codes in a sentence whose piece has no recording, though it is counted.
_SILENT_CODES = ("GD", "GM")
_CODE_WITH_COORDINATES, _LEN_COORDINATES = "XY", 11
# Joe's stock replies, and where they stand among the texts: this far after descriptions, names and rooms.
_NUM_REPLIES, _REPLIES_AFTER = 40, 12


@dataclass(frozen=True)
class SpokenLine:
    """A recording (its name in the archive), the dialogue, cut scene or list that it is from, its text as written."""

    recording: str
    source: str
    text: str


class Archive:
    """The files in `queen.1c`, by name.

    Raises:
        UserError: the file is none, or its recordings are not MP3.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = path.read_bytes()
        if self._content[:4] != b"QTBL" or len(self._content) < _FIRST_ENTRY:
            raise UserError(f"{path}: no archive of Flight of the Amazon Queen (it does not start with QTBL)")
        if self._content[12] != _MP3:
            raise UserError(f"{path}: its recordings are compressed in way {self._content[12]}, not as MP3 (1)")
        (count,) = struct.unpack_from(">H", self._content, 13)
        self._places: dict[str, tuple[int, int]] = {}
        try:
            for index in range(count):
                name, _, start, size = _ENTRY.unpack_from(self._content, _FIRST_ENTRY + index * _ENTRY.size)
                self._places[name.split(b"\0")[0].decode("ascii")] = start, size
        except (struct.error, UnicodeDecodeError) as e:
            raise UserError(f"{path}: its table of {count} files is damaged at entry {index} ({e})") from e

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self, suffix: str) -> list[str]:
        """The names that end in `suffix`, sorted."""
        return sorted(name for name in self._places if name.endswith(suffix))

    def read(self, name: str) -> bytes:
        """What a file of the archive holds.

        Raises:
            UserError: no such file, or it goes beyond the end.
        """
        if name not in self._places:
            raise UserError(f"{self._path}: has no {name}")
        start, size = self._places[name]
        if start + size > len(self._content):
            raise UserError(f"{self._path}: ends before {name}, which has {size} bytes from {start}; is it complete?")
        return self._content[start : start + size]


def spoken_lines(archive: Archive) -> list[SpokenLine]:
    """All pieces of sentences that have a recording; one recording may be that of several.

    Raises:
        UserError: a file is missing or damaged.
    """
    lines = []

    def add(source: str, prefix: str, sentence: str) -> None:
        for number, text in pieces(sentence):
            recording = f"{prefix.replace(' ', '0')}{number:x}".upper() + ".SB"
            if recording in archive:
                lines.append(SpokenLine(recording, source, text))

    for names, sentences in ((archive.names(".DOG"), _dialogue), (archive.names(".CUT"), _cut_scene)):
        for name in names:
            try:
                for prefix, sentence in sentences(name, archive.read(name)[_HEADER:]):
                    add(name, prefix, sentence)
            except (struct.error, IndexError) as e:
                raise UserError(f"{name}: is damaged ({e})") from e
    for prefix, sentence in _descriptions(archive):
        add("QUEEN2.JAS", prefix, sentence)
    return lines


def pieces(sentence: str) -> Iterator[tuple[int, str]]:
    """The parts of a sentence that are recorded, and their numbers from 1.

    A code `*AB` ends a part and tells the game what to show; most have no more to them, `*XY` has coordinates after it.
    """
    number = start = place = 0
    while (place := sentence.find("*", place)) >= 0:
        code = sentence[place + 1 : place + 3]
        number += 1
        if code not in _SILENT_CODES:
            yield number, sentence[start:place]
        start = place = place + 3 + (_LEN_COORDINATES if code == _CODE_WITH_COORDINATES else 0)
    if start < len(sentence):
        yield number + 1, sentence[start:]


def _dialogue(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Each sentence of a .DOG file, and the prefix of its recordings."""
    levels, _, key, num_joe, num_person = struct.unpack_from(">5h", content)
    person, _, extra = struct.unpack_from(">3H", content, 22)
    first_entries = {"J": (32 + 96 * abs(levels), num_joe), "P": (person, num_person)}
    for who, (place, count) in first_entries.items():
        for index in range(count):
            (identity,) = struct.unpack_from(">H", content, place + 2)
            sentence, place = _string(content, place + 4, align=4)
            # What Joe says first has no number.
            middle = "SSSS" if (who, index, identity) == ("J", 0, 0) else f"{identity:4x}"
            if sentence not in ("", "0"):
                yield f"{key:2d}{middle}{who}", sentence
    place = extra
    for who in "PJ":  # how the dialogue ends
        sentence, place = _string(content, place, align=2)
        if sentence and not sentence.startswith("0"):
            yield f"{key:2d}XXXX{who}", sentence


def _cut_scene(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    (count,) = struct.unpack_from(">h", content, 2)
    (place,) = struct.unpack_from(">H", content, 8)
    _, place = _string(content, place, align=2)  # what brings the scene on
    for index in range(1, abs(count) + 1):
        sentence, place = _string(content, place, align=2)
        if sentence not in ("", "*") and not sentence.startswith("#"):
            yield f"{name.removesuffix('.CUT'):_<5}{index:02d}", sentence


def _descriptions(archive: Archive) -> Iterator[tuple[str, str]]:
    num_rooms, num_names, _, num_descriptions = struct.unpack_from(">4H", archive.read("QUEEN.JAS"), _HEADER)
    texts = [line.rstrip("\r") for line in archive.read("QUEEN2.JAS").decode("latin-1").split("\n")]
    first_reply = num_descriptions + num_names + num_rooms + _REPLIES_AFTER
    end = first_reply + _NUM_REPLIES
    if len(texts) < end:
        raise UserError(f"QUEEN2.JAS: has {len(texts)} lines, and Joe's replies would end at {end}")
    spoken = texts[first_reply:end] + texts[:num_descriptions]
    for number, sentence in enumerate(spoken, start=1):
        yield f"JOE{number:04d}", sentence


def _string(content: bytes, place: int, align: int) -> tuple[str, int]:
    """A string with its length in front, and where the next one starts: an empty one takes one byte."""
    length = content[place]
    end = place + 1 + length
    if end > len(content):
        raise IndexError(f"a string of {length} bytes at {place} goes beyond the end")
    return content[place + 1 : end].decode("latin-1"), -(-end // align) * align if length else end
