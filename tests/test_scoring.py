"""Scoring: counts against hand-made alignments, and the files as icefall lays them out."""

import math
import random
from itertools import pairwise

import pytest
import torch

from speechllm.data import Batch
from speechllm.scoring import (
    ErrorReport,
    Transcript,
    align,
    characters,
    errs_text,
    language_table,
    score,
    transcripts,
    write_reports,
)

RESULTS = [
    Transcript("b", "the association of edison", "the association of addison", "en"),
    Transcript("a", "for the first day sir i think", "for the first day i think", "en"),
    Transcript("c", "", "uno dos", "es"),
    Transcript("d", "tres  cuatro", "tres cuatro", "es"),
]


def test_counts():
    report = score(RESULTS)
    assert (report.insertions, report.deletions, report.substitutions) == (2, 1, 1)
    assert (report.errors, report.ref_len, report.correct) == (4, 13, 11)
    assert report.rate == pytest.approx(4 / 13)
    assert str(report) == "30.77% [4 / 13, 2 ins, 1 del, 1 sub ]"
    assert score(RESULTS[:1], characters).errors == 2  # edison -> addison
    assert score([RESULTS[2]]).rate == math.inf
    assert score([]).rate == 0.0


def test_parts_add_up_and_lengths_hold():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd*", k=rng.randrange(8))) for _ in range(100)]
    results = [Transcript(str(i), ref, hyp) for i, (ref, hyp) in enumerate(pairwise(texts))]
    whole = score(results)
    assert whole == sum((score([r]) for r in results), ErrorReport())
    assert whole.ref_len == sum(len(r.ref.split()) for r in results)
    assert whole.correct + whole.substitutions + whole.insertions == sum(len(r.hyp.split()) for r in results)
    assert score([Transcript("x", t, t) for t in texts]).errors == 0


def test_equal_texts_in_other_unicode_form_are_equal():
    assert score([Transcript("x", "z\u00e9ro", "ze\u0301ro")]).errors == 0


def test_transcripts_of_a_batch():
    batch = Batch(
        texts=["Hello, you", "你好！", "x", "Straße"],
        languages=["en", "en", None, "de"],
        target_languages=[None, "zh", "zh", None],
        ids=["a", "b", "c", "d"],
        durations=[1.0] * 4,
        features=torch.zeros(4, 1, 80),
        feature_lens=torch.ones(4, dtype=torch.long),
    )
    found = transcripts(batch, ["hello  You!", "你 好", "", None], ["lowercase", "remove_punctuation", "split_chinese"])
    assert found == [
        Transcript("a", "hello you", "hello you", "en"),
        Transcript("b", "你 好", "你 好", "en>zh"),
        Transcript("c", "x", "", "->zh"),
    ]
    assert score(found).errors == 1
    assert transcripts(batch, [" Hello,\tyou"] * 4, [])[0] == Transcript("a", "Hello, you", "Hello, you", "en")
    with pytest.raises(ValueError, match="zip"):
        transcripts(batch, ["one"], [])


def test_a_star_is_a_word():
    assert align(["*", "a"], ["a"]) == [("*", None), ("a", "a")]


def test_errs_file_is_icefalls():
    """The layout of icefall.utils.write_error_stats, written out by hand for these results."""
    assert errs_text(sorted(RESULTS[:3], key=lambda r: r.id)).splitlines() == [
        "%WER = 36.36",
        "Errors: 2 insertions, 1 deletions, 1 substitutions, over 11 reference words (9 correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, "
        "PER-WORD STATS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
        "a:\tfor the first day (sir->*) i think",
        "b:\tthe association of (edison->addison)",
        "c:\t(*->uno dos)",
        "",
        "SUBSTITUTIONS: count ref -> hyp",
        "1   edison -> addison",
        "",
        "DELETIONS: count ref",
        "1   sir",
        "",
        "INSERTIONS: count hyp",
        "1   uno",
        "1   dos",
        "",
        "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp",
        "uno   0 1 0 1",
        "sir   0 1 1 0",
        "edison   0 1 1 0",
        "dos   0 1 0 1",
        "addison   0 1 0 1",
        "think   1 0 1 1",
        "the   2 0 2 2",
        "of   1 0 1 1",
        "i   1 0 1 1",
        "for   1 0 1 1",
        "first   1 0 1 1",
        "day   1 0 1 1",
        "association   1 0 1 1",
    ]


def test_files(tmp_path):
    report = write_reports(tmp_path / "greedy", "test", "epoch-3-avg-2", RESULTS, "greedy_search")
    write_reports(tmp_path / "greedy", "test", "epoch-3-avg-2", RESULTS[3:], "beam_size_4")
    folder = tmp_path / "greedy"
    assert report == score(RESULTS)
    assert sorted(p.name for p in folder.iterdir()) == [
        "errs-test-epoch-3-avg-2.txt",
        "recogs-test-epoch-3-avg-2.txt",
        "wer-by-language-test-epoch-3-avg-2.txt",
        "wer-summary-test-epoch-3-avg-2.txt",
    ]
    summary = (folder / "wer-summary-test-epoch-3-avg-2.txt").read_text()
    assert summary == "settings\tWER\nbeam_size_4\t0.00\ngreedy_search\t30.77\n"
    recogs = (folder / "recogs-test-epoch-3-avg-2.txt").read_text()
    assert recogs == "d:\tref=['tres', 'cuatro']\nd:\thyp=['tres', 'cuatro']\n"


def test_language_table():
    lines = [line.split() for line in language_table(RESULTS).splitlines()]
    assert [line[0] for line in lines] == ["language", "en", "es", "all"]
    assert lines[1][1:4] == ["2", "11", "18.18%"]
    assert lines[2][1:4] == ["2", "2", "100.00%"]
    assert lines[3][1:4] == ["4", "13", "30.77%"]
