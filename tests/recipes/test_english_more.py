"""More English speech, of a game, stamps and a synthesizer made here: no network, no packages."""

import json
import struct
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPE = Path(__file__).parents[2] / "recipes" / "english"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPE))
    sys.modules.pop("prepare_corpus", None)  # the digits recipe has one too
    import prepare_more
    import steel_sky
    from english_text import EnglishText

    sys.modules.pop("prepare_corpus", None)

from speechllm.errors import UserError  # noqa: E402

RATE = steel_sky.SAMPLE_RATE
DICTIONARY = "the of you a robot is here wake up hello frog well said"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionary") / "words.dict"
    path.write_text("".join(f"{word} X Y\n" for word in DICTIONARY.split()))
    return EnglishText.load(path)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = {"train": ["you said hello"], "valid": ["wake up you"], "test": ["robot wake up", "hello"], "other": []}
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


# ---------------------------------------------------------------------------------------- compression


class BitWriter:
    """Places a word where its first bit falls due, as the reader takes it."""

    def __init__(self) -> None:
        self.content, self.free, self.word = bytearray(), 0, 0

    def bits(self, value: int, count: int) -> None:
        for position in range(count):
            if not self.free:
                self.word, self.free = len(self.content), 16
                self.content += bytes(2)
            bit = 16 - self.free
            self.content[self.word + bit // 8] |= (value >> position & 1) << bit % 8
            self.free -= 1


def pack_rnc(content: bytes, steps: list[tuple[int, int, int]]) -> bytes:
    """RNC of steps (literals, distance, length), the last one of literals only; all codes are 4 bits long."""
    writer, place = BitWriter(), 0

    def number(value: int) -> None:
        symbol = value.bit_length()
        writer.bits(int(f"{symbol:04b}"[::-1], 2), 4)
        if symbol > 1:
            writer.bits(value - (1 << (symbol - 1)), symbol - 1)

    writer.bits(0, 2)
    for _ in range(3):
        writer.bits(16, 5)
        for _ in range(16):
            writer.bits(4, 4)
    writer.bits(len(steps), 16)
    for index, (literals, distance, length) in enumerate(steps):
        number(literals)
        writer.content += content[place : place + literals]
        place += literals
        if index + 1 < len(steps):
            number(distance - 1)
            number(length - 2)
            place += length
    packed = bytes(writer.content)
    return struct.pack(">4sIIHHBB", b"RNC\x01", len(content), len(packed), 0, 0, 0, 1) + packed


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b"", [(0, 0, 0)]),
        (b"literals only", [(13, 0, 0)]),
        (b"abcabcabcabX", [(3, 3, 8), (1, 0, 0)]),  # a match that reaches into itself
        (b"a" * 400, [(1, 1, 399), (0, 0, 0)]),
        (b"hello, hello there, hello", [(7, 7, 5), (8, 20, 5), (0, 0, 0)]),
    ],
)
def test_unpacking_gives_what_was_packed(content, steps):
    packed = pack_rnc(content, steps)
    assert steel_sky.unpack_rnc(packed) == content
    assert steel_sky.unpack_rnc(packed + b"next file") == content


@pytest.mark.parametrize("damage", [lambda c: c[:20], lambda c: c[:-1], lambda c: c[:7] + b"\x63" + c[8:]])
def test_damaged_recordings(damage, tmp_path):
    game = write_game(tmp_path, {50000: bytes(22) + damage(pack_rnc(bytes(9), [(9, 0, 0)]))})
    with pytest.raises(UserError, match="sky.dsk: file 50000 is damaged"):
        game.recording(50000)


# ---------------------------------------------------------------------------------------- a small game


def section(texts: list[str]) -> bytes:
    """A section of texts; a length of 64 bits or more counts in 16 bits."""
    code_of = {character: code for code, character in steel_sky.CODES.items()}
    lengths, bits = bytearray(), ""
    for text in texts:
        one = "".join(code_of[character] for character in f"{text}\0")
        unit = 2 if len(one) < 64 else 16
        one += "0" * (-len(one) % unit)
        lengths.append(len(one) // unit + (128 if unit == 16 else 0))
        bits += one
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))
    return struct.pack("<HH", 6, 6 + len(lengths)) + bytes(2) + bytes(lengths) + packed


def write_game(folder: Path, files: dict[int, bytes]) -> steel_sky.Archive:
    index, data = struct.pack("<I", len(files)), bytearray()
    for number, content in files.items():
        place = len(data)
        if number % 2:  # a place in steps of 16 bytes
            data += bytes(-place % 16)
            place = 1 << 23 | len(data) // 16
        data += content
        # the highest bits of the size are flags
        index += (
            struct.pack("<H", number) + place.to_bytes(3, "little") + (len(content) | 1 << 23).to_bytes(3, "little")
        )
    (folder / "sky.dnr").write_bytes(index)
    (folder / "sky.dsk").write_bytes(data)
    return steel_sky.Archive(folder / "sky.dnr", folder / "sky.dsk")


def tone(seconds: float) -> bytes:
    return bytes((128 + 60 * np.sin(np.arange(int(seconds * RATE)) / 9)).astype(np.uint8))


TEXTS = ["Hello, you!", "The ROBOT is here... well said.", "Robot! Wake up.", "Xyzzy", "?", "Unheard"]


def game_files() -> dict[int, bytes]:
    recordings = [tone(0.8), tone(1.6), tone(1.0), tone(0.7), tone(0.5)]
    files = {50000 + index: bytes(22) + samples for index, samples in enumerate(recordings)}
    files[50001] = bytes(22) + pack_rnc(recordings[1], [(len(recordings[1]), 0, 0)])
    files[50601] = bytes(22) + tone(0.9)  # the second text of the next section
    files[50699] = bytes(22) + tone(0.9)  # beyond the texts
    files[59500] = b"no recording"
    sections = [TEXTS, ["No", "A frog."], *[["?"]] * 6]
    return files | {60600 + index: section(texts) for index, texts in enumerate(sections)}


def test_codes_can_be_told_apart():
    codes = list(steel_sky.CODES)
    assert not any(a != b and b.startswith(a) for a, b in product(codes, codes))
    assert {"\0", " ", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"} <= set(steel_sky.CODES.values())


def test_texts_survive_their_compression():
    texts = [
        "",
        "a",
        "Hello, you!",
        "Never mind the `robot': it's WAY too long for steps of two bits - 40.",
    ]
    assert list(steel_sky.texts(section(texts))) == texts


def test_a_text_with_an_unknown_code():
    content = bytearray(section(["aaaaaaaaaa", "frog"]))
    content[8:10] = b"\xff\xff"
    assert list(steel_sky.texts(bytes(content))) == [None, "frog"]
    with pytest.raises(ValueError, match="text 1 ends at bit"):
        list(steel_sky.texts(bytes(content[:-2])))


def test_which_recording_says_which_text(tmp_path):
    game = write_game(tmp_path, game_files())
    lines = {line.recording: (line.section, line.text) for line in steel_sky.spoken_lines(game)}
    assert lines == {50000 + index: (0, text) for index, text in enumerate(TEXTS[:5])} | {50601: (1, "A frog.")}
    assert game.recording(50001) == tone(1.6) and game.recording(50002) == tone(1.0)


def test_a_game_that_is_incomplete(tmp_path):
    game = write_game(tmp_path, game_files())
    with pytest.raises(UserError, match="sky.dsk: has no file 7"):
        game.read(7)
    (tmp_path / "sky.dsk").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"sky.dsk: ends before file 50000, 8842 bytes from 0"):
        steel_sky.Archive(tmp_path / "sky.dnr", tmp_path / "sky.dsk").read(50000)
    (tmp_path / "sky.dnr").write_bytes(bytes([9, 0, 0, 0, 1]))
    with pytest.raises(UserError, match="sky.dnr: 5 bytes are no table of 9 files"):
        steel_sky.Archive(tmp_path / "sky.dnr", tmp_path / "sky.dsk")


def test_recordings_of_the_game(tmp_path, corpus, text, monkeypatch):
    write_game(tmp_path, game_files())
    with pytest.raises(UserError, match="package beneath-a-steel-sky 0.0372-8"):
        next(prepare_more.steel_sky_recordings(tmp_path))
    monkeypatch.setattr(prepare_more, "check_hash", lambda *_: None)
    output = tmp_path / "steel_sky"
    made = prepare_more.build("steel-sky", prepare_more.steel_sky_recordings(tmp_path), corpus, output, text)
    assert read(output / "train_steel_sky.jsonl") == [asdict(line) for line in made]
    assert {line.audio_filepath: (line.text, line.source) for line in made} == {
        "audio/steel_sky/50000.flac": ("hello you", "steel-sky-0"),
        "audio/steel_sky/50001.flac": ("the robot is here well said", "steel-sky-0"),
        "audio/steel_sky/50601.flac": ("a frog", "steel-sky-1"),
    }
    assert {line["name"]: line["why"] for line in read(output / "left_out_steel_sky.jsonl")} == {
        "steel_sky/50002": "a sentence of valid, test or other",
        "steel_sky/50003": "unknown words",
        "steel_sky/50004": "no words",
    }
    samples, rate = soundfile.read(output / made[1].audio_filepath)
    assert rate == 16000 and len(samples) / rate == pytest.approx(1.6, abs=1e-3) == made[1].duration
    assert abs(samples.mean()) < 0.01 and 0.4 < np.abs(samples).max() < 0.55  # unsigned samples, around 128


# ---------------------------------------------------------------------------------------- stamps


def test_stamps(tmp_path, corpus, text):
    stamps = tmp_path / "packages" / "usr/share/tuxpaint/stamps"
    for name in ("animals/frog", "animals/zebra", "animals/chimp", "robot"):
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        for language in ("", "_fr"):
            soundfile.write(stamps / f"{name}_desc{language}.ogg", 0.1 * np.sin(np.arange(22050) / 9), 22050)
    (stamps / "animals/frog.txt").write_text("A frog.\nfr.utf8=Une grenouille.\n", encoding="utf-8")
    (stamps / "animals/zebra.txt").write_text("A zebra.\n")
    (stamps / "animals/chimp.txt").write_text("Hello.\n")
    recordings = prepare_more.tuxpaint_recordings(tmp_path / "packages")
    (made,) = prepare_more.build("tuxpaint", recordings, corpus, tmp_path / "tuxpaint", text)
    assert (made.audio_filepath, made.text) == ("audio/tuxpaint/animals-frog.flac", "frog")
    assert {line["name"]: line["why"] for line in read(tmp_path / "tuxpaint/left_out_tuxpaint.jsonl")} == {
        "tuxpaint/animals-zebra": "unknown words",
        "tuxpaint/animals-chimp": "other words than the text",
        "tuxpaint/robot": "no words",
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
