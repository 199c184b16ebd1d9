"""The spoken lines of *Beneath a Steel Sky*, out of the two files in which the game is distributed.

`sky.dnr` lists what is in `sky.dsk` (ScummVM's `engines/sky` documents both by code). Files have numbers for names:

    50000 to 59493   a recording each, 8-bit PCM of 11,025 Hz after a header of 22 bytes, most compressed by RNC ProPack
    60600 to 60607   the texts of a section of the game in English, compressed with one Huffman code for all

The number of a recording says which text of which section is spoken. The Huffman code is in the program, which is not
distributed with the game; `CODES` was found by aligning texts with what a recognizer heard. All integers are
little-endian.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speechllm.errors import UserError

SAMPLE_RATE = 11025
_ENTRY_SIZE = 8
# A place with this bit counts in steps of 16 bytes.
_LONG_PLACE, _STEP = 1 << 23, 16
_SIZE = (1 << 22) - 1
_HEADER = 22

_FIRST_RECORDING, _END_OF_RECORDINGS = 50000, 59494
# The recordings of section n are numbered from _SECTIONS[n] on, in the order of its texts.
_SECTIONS = (0, 600, 1100, 2430, 3380, 4530, 5080, 5230)
_FIRST_TEXTS = 60600

# The characters of the texts and their codes; END ends a text. Digits and signs that are not spoken are missing.
_END = "\0"
_CODE_TABLE = """
    END 100000   SPACE 000
    .   01100        !   1101100      ?   1110010      ,   1110101      '   11101000     `   111111100001
    -   111101001    :   1111110011   0   11111100100  4   111111110011
    a   0011         b   1110011      c   110001       d   101010       e   0010         f   11101001
    g   110011       h   1100001      i   01101        j   111110010    k   111100001    l   101000
    m   10010        n   01011        o   01000        p   1101010      q   11110010     r   0111
    s   01001        t   01010        u   10001        v   11100001     w   11110011     x   11111101100
    y   1101101      z   111110000
    A   10011        B   1110111      C   1101001      D   110010       E   100001       F   11110001
    G   1110110      H   1110001      I   101001       J   11110110     K   111101000    L   1101000
    M   110111       N   101100       O   1100000      P   11100000     Q   1111101000   R   101011
    S   101101       T   10111        U   1101011      V   111100000    W   11110101     X   11111101101
    Y   111110001    Z   1111101100
"""
CODES = {
    code: {"END": _END, "SPACE": " "}.get(character, character)
    for character, code in re.findall(r"(\S+) +([01]+)\b", _CODE_TABLE)
}
_LONGEST_CODE = max(map(len, CODES))


@dataclass(frozen=True)
class SpokenLine:
    """A recording, by its number; the section of the game; its text as written, None if it has an unknown code."""

    recording: int
    section: int
    text: str | None


class Archive:
    """The files in `sky.dsk`, by number.

    Args:
        index: `sky.dnr`. data: `sky.dsk`.

    Raises:
        UserError: the index is damaged.
    """

    def __init__(self, index: Path, data: Path) -> None:
        self._path = data
        content = index.read_bytes()
        count = int.from_bytes(content[:4], "little")
        if len(content) != 4 + count * _ENTRY_SIZE:
            raise UserError(f"{index}: {len(content)} bytes are no table of {count} files; is it complete?")
        self._places: dict[int, tuple[int, int]] = {}
        for start in range(4, len(content), _ENTRY_SIZE):
            entry = content[start : start + _ENTRY_SIZE]
            number, place, size = (int.from_bytes(part, "little") for part in (entry[:2], entry[2:5], entry[5:]))
            steps = _STEP if place & _LONG_PLACE else 1
            self._places[number] = (place & ~_LONG_PLACE) * steps, size & _SIZE
        self._content = data.read_bytes()

    def numbers(self) -> list[int]:
        """The numbers of all files, ascending."""
        return sorted(self._places)

    def read(self, number: int) -> bytes:
        """What is stored as this file, compressed or not.

        Raises:
            UserError: no such file, or it goes beyond the end.
        """
        if number not in self._places:
            raise UserError(f"{self._path}: has no file {number}")
        place, size = self._places[number]
        if place + size > len(self._content):
            raise UserError(f"{self._path}: ends before file {number}, {size} bytes from {place}; is it complete?")
        return self._content[place : place + size]

    def recording(self, number: int) -> bytes:
        """Unsigned 8-bit samples of `SAMPLE_RATE`.

        Raises:
            UserError: no such file, or it is damaged.
        """
        content = self.read(number)[_HEADER:]
        try:
            return unpack_rnc(content) if content.startswith(_RNC) else content
        except (ValueError, IndexError, struct.error) as e:
            raise UserError(f"{self._path}: file {number} is damaged ({e})") from e


def spoken_lines(archive: Archive) -> list[SpokenLine]:
    """The recordings that have a text, in the order of their numbers.

    Raises:
        UserError: a file is missing or damaged.
    """
    sections = []
    for section in range(len(_SECTIONS)):
        try:
            sections.append(list(texts(archive.read(_FIRST_TEXTS + section))))
        except (struct.error, ValueError) as e:
            raise UserError(f"the texts of section {section} (file {_FIRST_TEXTS + section}) are damaged: {e}") from e
    lines = []
    for number in archive.numbers():
        if _FIRST_RECORDING <= number < _END_OF_RECORDINGS:
            section = bisect_right(_SECTIONS, number - _FIRST_RECORDING) - 1
            index = number - _FIRST_RECORDING - _SECTIONS[section]
            if index < len(sections[section]):
                lines.append(SpokenLine(number, section, sections[section][index]))
    return lines


# ------------------------------------------------------------------------------------------------- texts


def texts(content: bytes) -> Iterator[str | None]:
    """The texts of a section; None for one with an unknown code.

    The section starts with the places of two tables: how long each text is, and the texts themselves. A length counts
    in 2 bits; where its highest bit is set, the others count in 16 bits.

    Raises:
        ValueError: a text goes beyond the end.
    """
    lengths, packed = struct.unpack_from("<HH", content)
    bits = "".join(f"{byte:08b}" for byte in content[packed:])
    place = 0
    for index, length in enumerate(content[lengths:packed]):
        end = place + (2 * length if length < 128 else 16 * (length - 128))
        if end > len(bits):
            raise ValueError(f"text {index} ends at bit {end} of {len(bits)}")
        yield _decode(bits[place:end])
        place = end


def _decode(bits: str) -> str | None:
    decoded, start = [], 0
    for end in range(1, len(bits) + 1):
        character = CODES.get(bits[start:end])
        if character == _END:
            return "".join(decoded)
        if character is not None:
            decoded.append(character)
            start = end
        elif end - start > _LONGEST_CODE:
            return None
    return None


# ------------------------------------------------------------------------------------------------- RNC ProPack

_RNC = b"RNC\x01"
_RNC_HEADER = struct.Struct(">4sIIHHBB")


def unpack_rnc(content: bytes) -> bytes:
    """Unpack method 1 of Rob Northen's ProPack: literals and matches whose lengths and distances are Huffman-coded.

    Bits are taken from little-endian words of 16 bits, the lowest first; literals are whole bytes between the words.

    Raises:
        ValueError, IndexError, struct.error: the content is damaged.
    """
    _, size, packed_size, _, _, _, num_chunks = _RNC_HEADER.unpack_from(content)
    if _RNC_HEADER.size + packed_size > len(content):
        raise ValueError(f"{packed_size} packed bytes announced, {len(content) - _RNC_HEADER.size} there")
    source = _Bits(content, _RNC_HEADER.size)
    unpacked = bytearray()
    source.read(2)  # whether it is locked, and with a key; the game uses neither
    for _ in range(num_chunks):
        literals, distances, lengths = (_read_codes(source) for _ in range(3))
        for remaining in range(source.read(16), 0, -1):
            unpacked += source.bytes(_read_number(source, literals))
            if remaining == 1:
                break
            distance = _read_number(source, distances) + 1
            length = _read_number(source, lengths) + 2
            if distance > len(unpacked):
                raise ValueError(f"a match {distance} bytes back, after {len(unpacked)} bytes")
            # a match may reach into itself: it repeats then
            found = unpacked[-distance:][:length]
            unpacked += (found * (length // len(found) + 1))[:length]
    if len(unpacked) != size:
        raise ValueError(f"{len(unpacked)} bytes, not {size}")
    return bytes(unpacked)


class _Bits:
    """A word is taken when the first of its bits is asked for, so that bytes may follow the words taken so far."""

    def __init__(self, content: bytes, place: int) -> None:
        self._content, self._place = content, place
        self._word = self._count = 0

    def read(self, count: int) -> int:
        while self._count < count:
            low, high = self._content[self._place], self._content[self._place + 1 : self._place + 2]
            self._word |= (low | int.from_bytes(high, "little") << 8) << self._count
            self._place += 2
            self._count += 16
        value = self._word & ((1 << count) - 1)
        self._word >>= count
        self._count -= count
        return value

    def bytes(self, count: int) -> bytes:
        self._place += count
        return self._content[self._place - count : self._place]


def _read_codes(source: _Bits) -> dict[tuple[int, int], int]:
    """A canonical Huffman code, from the lengths of its words: (length, the word as its bits come) -> symbol."""
    lengths = [source.read(4) for _ in range(source.read(5))]
    codes, word = {}, 0
    for length in range(1, 16):
        for symbol, its_length in enumerate(lengths):
            if its_length == length:
                codes[length, int(f"{word:0{length}b}"[::-1], 2)] = symbol
                word += 1
        word <<= 1
    return codes


def _read_number(source: _Bits, codes: dict[tuple[int, int], int]) -> int:
    """A symbol is a number's length in bits; the highest bit is always 1 and not stored."""
    word = 0
    for length in range(1, 16):
        word |= source.read(1) << (length - 1)
        symbol = codes.get((length, word))
        if symbol is not None:
            return symbol if symbol < 2 else 1 << (symbol - 1) | source.read(symbol - 1)
    raise ValueError("bits that are no code")
