"""The text that the language model of the English recipe begins with, of small packages made here."""

import gzip
import json
import sys
import zlib
from pathlib import Path

import pytest
from rapidfuzz.distance import Levenshtein

from speechllm.errors import UserError
from speechllm.text.tokenizer import LexiconTokenizer, train_sentencepiece

RECIPE = Path(__file__).parents[2] / "recipes" / "english"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPE))
    sys.modules.pop("prepare_corpus", None)  # the digits recipe has one too
    import phones
    import prepare_text
    from english_text import EnglishText

    sys.modules.pop("prepare_corpus", None)

WORDS = (
    "the of you a take any one these cards she chose a good husband for your daughter bathe in fiery floods was well"
)

WORDNET = """choose
    v 1: pick out, select; "Take any one
         of these cards"; "Choose a good
         husband"; "She chose 2 of you" [syn: {choose}]
    2: "the xyzzy of these cards"; "well well"
"""
GCIDE = """Bathe \\Bath"er\\ (b[=a][th]"[~e]r), n.
   1. The "bath of a
   cow". "Bathe in
      fiery floods." --Shak.
"""
FORTUNES = """The one you chose was a good one.  Well!
\t\t-- Somebody, "A good book of cards"
%
take any
%
"""
NOVELS = (
    ["SENSE AND SENSIBILITY", "", "a good husband of your daughter"],
    ["EMMA", "by Jane Austen", "", "she chose for", "your daughter.", "", "well of these"],
)


def of_r(strings):
    """A vector of strings as R writes it: `serialize(strings, NULL)`."""
    content = b"X\n" + bytes.fromhex("00000003 00040201 00030500 00000005") + b"UTF-8"
    content += bytes.fromhex("00000010") + len(strings).to_bytes(4, "big")
    for string in map(str.encode, strings):
        content += bytes.fromhex("00040009") + len(string).to_bytes(4, "big") + string
    return content


def lazy_loaded(vectors):
    packed = [(len(vector).to_bytes(4, "big"), zlib.compress(vector)) for vector in map(of_r, vectors)]
    return b"".join(size + content for size, content in packed)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionary") / "words.dict"
    path.write_text("".join(f"{word} X\n" for word in [*WORDS.split(), "choose", "bath"]))
    return EnglishText.load(path)


@pytest.fixture
def made(text, tmp_path):
    """The texts of each of the two files."""
    packages, corpus = tmp_path / "packages", tmp_path / "corpus"
    for name in ("usr/share/games/fortunes", "usr/share/dictd", "usr/lib/R/site-library/janeaustenr/data"):
        (packages / name).mkdir(parents=True)
    (packages / "usr/share/dictd/wn.dict.dz").write_bytes(gzip.compress(WORDNET.encode()))
    (packages / "usr/share/dictd/gcide.dict.dz").write_bytes(gzip.compress(GCIDE.encode()))
    (packages / "usr/share/games/fortunes/cookie").write_text(FORTUNES)
    (packages / "usr/share/games/fortunes/cookie.dat").write_bytes(bytes([255, 0]))
    (packages / "usr/share/games/fortunes/perl").write_text("take any one of these")
    (packages / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").write_bytes(lazy_loaded(NOVELS))
    corpus.mkdir()
    transcripts = {"train": ["you", "take one"], "valid": ["of you"], "test": ["choose a good husband"], "other": []}
    for name, texts in transcripts.items():
        (corpus / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return prepare_text.collect_text(packages, corpus, text)


def test_sentences_of_each_package(made):
    """No test sentence, nothing with other words, no author, nothing too short."""
    assert made["train"] == [
        "you",
        "take one",
        "take any one of these cards",
        "bathe in fiery floods",
        "the one you chose was a good one",
        "she chose for your daughter",
    ]
    assert made["valid"] == ["of you"]


def test_what_is_no_vector_of_strings_is_refused():
    for content in (of_r(["a"])[:1] + b"?" + of_r(["a"])[2:], of_r(["a"]).replace(b"\0\0\0\x10", b"\0\0\0\x0d")):
        with pytest.raises(UserError, match="no vector of strings as R writes it"):
            prepare_text.strings_of_r(content)
    assert prepare_text.strings_of_r(of_r(["caf\u00e9", ""])) == ["caf\u00e9", ""]


def test_validation_is_a_share_of_all(text, tmp_path, made, monkeypatch):
    monkeypatch.setattr(prepare_text, "VALID_SHARE", 1)
    again = prepare_text.collect_text(tmp_path / "packages", tmp_path / "corpus", text)
    assert again["train"] == ["you", "take one"] and len(again["valid"]) == 5


def test_readings_have_the_words_and_what_may_be_heard_of_them(tmp_path):
    """As `speechllm tune` reads them: each level has all words, in order, and more phones wrong than the one before."""
    every = " ".join(sorted({phone for group in phones._SIMILAR for phone in group.split()}))
    (tmp_path / "lexicon.txt").write_text(f"hello HH AH L OW\nworld W ER L D\nall {every}\n")
    lexicon = LexiconTokenizer(tmp_path)
    words = ["hello", "world"] * 50
    prepare_text.write_readings({"train": [" ".join(words)], "valid": ["hello"]}, lexicon, tmp_path / "out")
    tokenizer = train_sentencepiece([" hello world"], tmp_path / "llm", 330, special_tokens=lexicon.tags)
    tags = {tokenizer.encode(tag)[-1]: i for i, tag in enumerate(lexicon.tags, start=1)}
    wrong = []
    for number, level in enumerate(prepare_text.LEVELS, start=1):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"train-{number}.jsonl").read_text().splitlines()]
        texts = [line["text"] for line in lines]
        assert "".join(texts).split() == words and all(text.startswith(" ") for text in texts)
        assert max(len(text.split()) for text in texts) <= level.most
        heard = [[tags.get(i) for i in tokenizer.encode(line["prompt"])] for line in lines]
        said = [lexicon.encode(text) for text in texts]
        distances = [Levenshtein.distance(x[:-1], y) / len(y) for x, y in zip(heard, said, strict=True)]
        wrong.append(sum(distances) / len(distances))
    assert 0 < wrong[0] < wrong[-1] < 0.35
    prepare_text.write_readings({"train": [" ".join(words)], "valid": ["hello"]}, lexicon, tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_pronunciations(tmp_path):
    (tmp_path / "words.dict").write_text("the DH AH\nof AH V\nyou Y UW\nyou(2) Y AH\nprimate P R AY M EY T\n")
    found = phones.pronunciations(tmp_path / "words.dict", EnglishText.load(tmp_path / "words.dict"))
    assert found["you"] == ["Y", "UW"] and found["primate's"] == ["P", "R", "AY", "M", "EY", "T", "Z"]
    assert found["zebu"] == ["Z", "EH", "B", "AH"], "by its letters"
    assert all(found[word] for word in EnglishText.load(tmp_path / "words.dict").dictionary)
