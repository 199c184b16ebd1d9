"""The English corpus, of packages with a small game made here: no network, no packages."""

import gzip
import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RECIPE = Path(__file__).parents[2] / "recipes" / "english"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPE))
    import amazon_queen
    import english_text

    # as its modules are named there; the digits recipe has a prepare_corpus too
    sys.modules.pop("prepare_corpus", None)
    import prepare_corpus

    sys.modules.pop("prepare_corpus")

from speechllm.errors import UserError  # noqa: E402

DICTIONARY = "the of you a hello there joe go away no well done sloth it is locked hmm ten and he was"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionary") / "words.dict"
    path.write_text("".join(f"{word} X Y\n{word}(2) X\n" for word in DICTIONARY.split()))
    return english_text.EnglishText.load(path)


# ------------------------------------------------------------------------------------- a game of three dialogues


def string(text: str, align: int) -> bytes:
    """A string as the game's files have it, where the place of its end counts from a multiple of `align`."""
    return bytes([len(text)]) + text.encode("latin-1")


def strings(content: bytearray, texts: list[tuple[bytes, str]], align: int) -> None:
    """Append each text after its head; the next begins at a multiple of `align`, unless the text is empty."""
    for head, text in texts:
        content += head + string(text, align)
        if text:
            content += bytes(-len(content) % align)


def dialogue(key: int, joe: list[tuple[int, str]], person: list[tuple[int, str]], ends: list[str]) -> bytes:
    body = bytearray(32 + 96)
    strings(body, [(struct.pack(">HH", 0, identity), text) for identity, text in joe], 4)
    person_start = len(body)
    strings(body, [(struct.pack(">HH", 0, identity), text) for identity, text in person], 4)
    extra = len(body)
    strings(body, [(b"", text) for text in ends], 2)
    body[:10] = struct.pack(">5h", -1, 0, key, len(joe), len(person))
    body[22:28] = struct.pack(">3H", person_start, 0, extra)
    return bytes(20) + bytes(body)


def cut_scene(sentences: list[str]) -> bytes:
    body = bytearray(30)
    strings(body, [(b"", text) for text in ["enter", *sentences]], 2)
    body[2:4] = struct.pack(">h", -len(sentences))
    body[8:10] = struct.pack(">H", 30)
    return bytes(20) + bytes(body)


def descriptions(described: list[str], replies: dict[int, str]) -> dict[str, bytes]:
    lines = described + ["room", "name", *["-"] * 12, *(replies.get(i, "") for i in range(40))]
    return {
        "QUEEN.JAS": bytes(20) + struct.pack(">4H", 1, 1, 0, len(described)),
        "QUEEN2.JAS": "\r\n".join(lines).encode("latin-1"),
    }


def mp3(seconds: float, rate: int = 11025) -> bytes:
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="MP3")
    return file.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    place = 15 + 21 * len(files)
    table = b""
    for name, content in files.items():
        table += struct.pack(">12sBII", name.encode(), 0, place, len(content))
        place += len(content)
    return b"QTBL" + b"v1.00x" + bytes(2) + b"\x01" + struct.pack(">H", len(files)) + table + b"".join(files.values())


GAME = {
    "HENRY.DOG": dialogue(
        24, [(0, "Hello there*GDwell*AB"), (31, "Go away!")], [(8, "No*XY0123456789ayou"), (9, "0")], ["", "Well done"]
    ),
    "C1A.CUT": cut_scene(["The sloth.", "*", "#music", "It is locked"]),
    **descriptions(["A sloth", ""], {0: "It is locked."}),
}


def read_game(tmp_path: Path, recordings: list[str], files: dict[str, bytes] = GAME) -> amazon_queen.Archive:
    path = tmp_path / "queen.1c"
    path.write_bytes(archive(files | {f"{name}.SB": name.encode() for name in recordings}))
    return amazon_queen.Archive(path)


def test_where_sentences_and_recordings_belong_together(tmp_path):
    expected = {
        "24SSSSJ2": ("HENRY.DOG", "well"),
        "24001FJ1": ("HENRY.DOG", "Go away!"),
        "240008P1": ("HENRY.DOG", "No"),
        "240008P2": ("HENRY.DOG", "you"),
        "24XXXXJ1": ("HENRY.DOG", "Well done"),
        "C1A__011": ("C1A.CUT", "The sloth."),
        "C1A__041": ("C1A.CUT", "It is locked"),
        "JOE00011": ("QUEEN2.JAS", "It is locked."),
        "JOE00411": ("QUEEN2.JAS", "A sloth"),
    }
    # the piece before *GD is not spoken, whatever the archive has
    game = read_game(tmp_path, [*expected, "24SSSSJ1", "240009P1", "C1A__021"])
    found = {line.recording.removesuffix(".SB"): (line.source, line.text) for line in amazon_queen.spoken_lines(game)}
    assert found == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("one", [(1, "one")]),
        ("*ABone*CDtwo", [(1, ""), (2, "one"), (3, "two")]),
        ("one*GMtwo*XY12345678901", [(2, "two")]),
        ("one*AB", [(1, "one")]),
        ("", []),
    ],
)
def test_pieces(sentence, expected):
    assert list(amazon_queen.pieces(sentence)) == expected


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"RIFF" + content[4:], "does not start with QTBL"),
        (lambda content: content[:12] + b"\x02" + content[13:], "compressed in way 2, not as MP3"),
        (lambda content: content[:40], "damaged at entry 1"),
        (lambda content: content[:-4], "ends before .*; is it complete"),
    ],
)
def test_damaged_archives(tmp_path, damage, said):
    path = tmp_path / "queen.1c"
    path.write_bytes(damage(archive(GAME)))
    with pytest.raises(UserError, match=f"queen.1c: .*{said}"):
        amazon_queen.spoken_lines(amazon_queen.Archive(path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("HENRY.DOG", GAME["HENRY.DOG"][:-3], "HENRY.DOG: is damaged"),
        ("C1A.CUT", bytes(22), "C1A.CUT: is damaged"),
        ("QUEEN2.JAS", b"a\r\nb", "QUEEN2.JAS: has 2 lines, and Joe's replies would end at 56"),
    ],
)
def test_damaged_files(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        amazon_queen.spoken_lines(read_game(tmp_path, [], GAME | {name: content}))


# -------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Hello -- there,  JOE!", "hello there joe"),
        (
            "Dr. Floda paid $1,500 in 1947",
            "doctor floda paid one thousand five hundred dollars in nineteen forty seven",
        ),
        ("the 1930's, the 1900s & 2010s", "the nineteen thirties the nineteen hundreds and twenty tens"),
        ("50% of 2.5, 3rd of 12,000", "fifty percent of two point five third of twelve thousand"),
        ("Mr. O’Brien's goin' 'home'", "mister o'brien's goin home"),
        ("St. Louis, main st.", "saint louis main st"),
        ("Nooooo! Hmmmm, wwwell", "no hmm well"),
        ("the grey theatre is ok", "the gray theater is okay"),
        ("...!?", ""),
    ],
)
def test_text_as_it_is_said(text, written, said):
    assert text.normalize(written) == said
    assert text.normalize(said) == said


def test_scoring_takes_both_forms(text):
    assert text.for_scoring("I'm gonna go") == text.for_scoring("I'm going to go") == "i'm going to go"
    assert text.normalize("gonna") == "gonna"


def test_unknown_words_and_sounds(text):
    assert text.unknown_words("the lederhosen of xyzzy") == ["xyzzy"]
    assert text.is_sounds_only("hmm ah") and not text.is_sounds_only("hmm the")


def test_no_dictionary(tmp_path):
    (tmp_path / "words.dict").write_text("xyz X\n")
    with pytest.raises(UserError, match="words.dict: no dictionary of English"):
        english_text.EnglishText.load(tmp_path / "words.dict")


# ------------------------------------------------------------------------------------------------------ corpus


@pytest.mark.parametrize(
    ("seconds", "level", "words", "reason"),
    [
        (1.0, 0.3, "hello there joe", None),
        (0.2, 0.3, "hello", "too short"),
        (1.0, 0.001, "hello", "silent"),
        (0.4, 0.3, "hello there joe go away", "too little audio for the text"),
        (3.0, 0.3, "no", "too much audio for the text"),
        (1.4, 0.3, "no", None),  # a second of silence around a word is usual
    ],
)
def test_audio_and_text_fit_together(seconds, level, words, reason):
    wave = level * np.sin(2 * np.pi * 200 * np.arange(int(seconds * 16000)) / 16000)
    assert prepare_corpus.wrong_audio((wave * 2**15).astype(np.int16), words) == reason


def test_split_is_by_source_without_sentences_in_common():
    utterances = [
        prepare_corpus.Utterance(f"{source:02d}-{i}", 1.0, words, f"{source:02d}")
        for source in range(50)
        for i, words in enumerate(["hello there", f"it is number {source % 5}", f"only {source} says it"])
    ]
    sets = prepare_corpus.split(utterances)
    sources = {name: {utterance.source for utterance in sets[name]} for name in sets}
    assert sources["test"] == {"10", "30"} and sources["valid"] == {"04", "44"}
    assert sources["train"] == {f"{i:02d}" for i in range(50)} - sources["test"] - sources["valid"]
    sentences = {name: {u.text for u in sets[name] if len(u.text.split()) > 2} for name in sets}
    assert not sentences["test"] & sentences["train"] and not sentences["valid"] & sentences["train"]
    assert "it is number 0" in sentences["test"] and "it is number 3" in sentences["train"]
    assert len(sets["valid"]) == 4  # "it is number 4" is in training
    assert all(any(u.text == "hello there" for u in sets[name]) for name in sets)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """The packages as dpkg-deb unpacks them, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("packages")
    recordings = {"24001FJ1": mp3(1.0), "240008P1": mp3(0.1), "C1A__011": mp3(1.2), "JOE00011": b"no audio"}
    files = {
        "queen/usr/share/scummvm/queen.1c": archive(GAME | {f"{k}.SB": v for k, v in recordings.items()}),
        "core/usr/share/doc/core-sounds-en.txt.gz": gzip.compress(
            b"; sounds\n\nready: Ready *\nspy-agent: Joe\nbeep: [a beep]\ndigits/10: ten\nabsent: No\n"
        ),
        "sphinx/test/data/librivox/transcription": b"<s> and he was </s> (book-1)\n",
        "sphinx/test/data/cards/cards.transcription": b"<s> ten of xyzzy  </s> (001)\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
    for name in ("librivox/book-1.wav", "cards/001.wav"):
        soundfile.write(folder / "sphinx/test/data" / name, wave, 16000)
    sounds = folder / "core-g722/usr/share/asterisk/sounds/en_US_f_Allison"
    (sounds / "digits").mkdir(parents=True)
    for name in ("ready", "spy-agent", "beep", "digits/10"):
        (sounds / f"{name}.g722").write_bytes(bytes(np.random.default_rng(0).integers(256, size=6400, dtype=np.uint8)))
    return folder


def read(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_corpus_of_packages(packages, text, tmp_path):
    sets = prepare_corpus.build_corpus(packages, tmp_path / "corpus", text)
    lines = {name: read(tmp_path / "corpus", name) for name in ("train", "valid", "test", "other", "left_out")}
    assert {name: len(sets[name]) for name in sets} == {name: len(lines[name]) for name in sets}
    texts = {name: {line["audio_filepath"]: line["text"] for line in lines[name]} for name in sets}
    assert texts == {
        "train": {
            "audio/queen/24001fj1.flac": "go away",
            "audio/queen/c1a__011.flac": "the sloth",
            "audio/asterisk/digits-10.flac": "ten",
            # "star" is not in this test's dictionary, so that `ready` is left out
        },
        "valid": {},
        "test": {},
        "other": {"audio/librivox/book-1.flac": "and he was", "audio/cards/001.flac": "ten of xyzzy"},
    }
    assert {line["name"]: line["why"] for line in lines["left_out"]} == {
        "queen/240008p1": "too short",
        "queen/joe00011": "too short",
        "asterisk/ready": "unknown words",
        "asterisk/beep": "no words",
    }
    for line in [line for name in sets for line in lines[name]]:
        samples, rate = soundfile.read(tmp_path / "corpus" / line["audio_filepath"])
        assert rate == 16000 and samples.ndim == 1 and len(samples) / rate == pytest.approx(line["duration"], abs=1e-4)
        assert line["lang"] == "en" and 0.1 < np.abs(samples).max() <= 1


def test_packages_that_are_missing(packages, text, tmp_path):
    (tmp_path / "queen.1c").write_bytes((packages / "queen/usr/share/scummvm/queen.1c").read_bytes())
    with pytest.raises(UserError, match="has no core-sounds-en.txt"):
        prepare_corpus.build_corpus(tmp_path, tmp_path / "corpus", text)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(
        UserError, match="queen.1c: has the SHA-256 .* the package queen 1\\? Remove it and fetch it again"
    ):
        prepare_corpus.check_hash(tmp_path / "queen.1c", prepare_corpus.QUEEN_SHA256, "queen 1")
