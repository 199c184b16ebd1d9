"""The text that the language model of the English recipe begins with, of small packages made here."""

import gzip
import json
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "english"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPE))
    sys.modules.pop("prepare_corpus", None)  # the digits recipe has one too
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


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionary") / "words.dict"
    path.write_text("".join(f"{word} X\n" for word in [*WORDS.split(), "choose", "bath"]))
    return EnglishText.load(path)


@pytest.fixture
def made(text, tmp_path):
    """The documents of each of the two files."""
    packages, corpus = tmp_path / "packages", tmp_path / "corpus"
    for name in ("usr/share/games/fortunes", "usr/share/dictd"):
        (packages / name).mkdir(parents=True)
    (packages / "usr/share/dictd/wn.dict.dz").write_bytes(gzip.compress(WORDNET.encode()))
    (packages / "usr/share/dictd/gcide.dict.dz").write_bytes(gzip.compress(GCIDE.encode()))
    (packages / "usr/share/games/fortunes/cookie").write_text(FORTUNES)
    (packages / "usr/share/games/fortunes/cookie.dat").write_bytes(bytes([255, 0]))
    (packages / "usr/share/games/fortunes/perl").write_text("take any one of these")
    corpus.mkdir()
    transcripts = {"train": ["you", "take one"], "valid": ["of you"], "test": ["choose a good husband"], "other": []}
    for name, texts in transcripts.items():
        (corpus / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare_text.write_text(packages, corpus, tmp_path / "text", text)
    lines = {name: (tmp_path / "text" / f"{name}.txt").read_text().splitlines() for name in ("train", "valid")}
    assert all(line.startswith(" ") for line in lines["train"] + lines["valid"])  # as labels do
    return {name: [line[1:] for line in found] for name, found in lines.items()}


def test_sentences_of_each_package(made):
    """No test sentence, nothing with other words, no author, nothing too short."""
    assert made["train"] == [
        "you",
        "take one",
        "take any one of these cards",
        "bathe in fiery floods",
        "the one you chose was a good one",
    ]
    assert made["valid"] == ["of you"]


def test_validation_is_a_share_of_all(text, tmp_path, made, monkeypatch):
    monkeypatch.setattr(prepare_text, "VALID_SHARE", 1)
    prepare_text.write_text(tmp_path / "packages", tmp_path / "corpus", tmp_path / "again", text)
    assert (tmp_path / "again" / "train.txt").read_text() == " you\n take one\n"
    assert len((tmp_path / "again" / "valid.txt").read_text().splitlines()) == 4
