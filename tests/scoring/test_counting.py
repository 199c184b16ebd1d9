"""Counting: against hand-made alignments, jiwer, and alignment with sclite's costs."""

import math
import random
import subprocess
import sys
from itertools import pairwise

import jiwer
import kaldialign
import pytest
import torch

from speechllm.data import Batch
from speechllm.decode.result import Word
from speechllm.prompt.label import WordTime
from speechllm.prompt.request import Request
from speechllm.scoring import (
    ErrorReport,
    Transcript,
    align,
    characters,
    exact_match,
    language_accuracy,
    mixed,
    score,
    transcripts,
    word_time_error,
)
from speechllm.scoring.counting import count_pairs

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
        labels=["Hello, you", "你好！", "x", "Straße"],
        requests=[
            Request("a", language="en"),
            Request("b", language="en", target_language="zh"),
            Request("c", target_language="zh"),
            Request("d", language="de"),
        ],
        durations=[1.0, 2.0, 3.0, 4.0],
        features=torch.zeros(4, 1, 80),
        feature_lens=torch.ones(4, dtype=torch.long),
    )
    found = transcripts(batch, ["hello  You!", "你 好", "", None], ["lowercase", "remove_punctuation", "split_chinese"])
    assert found == [
        Transcript("a", "hello you", "hello you", "en", duration=1.0),
        Transcript("b", "你 好", "你 好", "en>zh", duration=2.0),
        Transcript("c", "x", "", "->zh", duration=3.0),
    ]
    assert score(found).errors == 1
    assert transcripts(batch, [" Hello,\tyou"] * 4, [])[0] == Transcript(
        "a", "Hello, you", "Hello, you", "en", duration=1.0
    )
    with pytest.raises(ValueError, match="zip"):
        transcripts(batch, ["one"], [])


def test_exact_matches_and_identified_languages():
    results = [
        Transcript("a", "one two", "one  two", "en", found_language="en"),
        Transcript("b", "one", "two", "en>es", found_language="en"),
        Transcript("c", "x", "", "es", found_language="en"),
        Transcript("d", "", "", "es"),
    ]
    assert exact_match(results) == 2 / 4 and language_accuracy(results) == 2 / 3
    assert exact_match([]) == 0 and language_accuracy(results[3:]) is None


def test_times_of_the_words_that_were_recognized_rightly():
    def batch(words):
        ids = ["a", "b"]
        requests = [Request(id, language="en") for id in ids]
        return Batch(ids, ids, requests, [3.0] * 2, torch.zeros(2, 1, 80), torch.ones(2), words=words)

    said = (WordTime("<sil>", 0.0, 0.2), WordTime("One", 0.2, 0.5), WordTime("two", 0.9, 1.2), WordTime("six", 1.5, 2))
    found = [Word("oh", 0.0, 0.2, 1.0), Word("one", 0.3, 0.5, 1.0), Word("six,", 1.5, 2.5, 1.0)]
    steps = ["lowercase", "remove_punctuation"]

    def error(words, found_words):
        return word_time_error(transcripts(batch(words), ["", ""], steps, found_words=found_words))

    assert error([said, None], [found, found]) == pytest.approx((0.1 + 0 + 0 + 0.5) / 4)
    assert error([said, said], [found, None]) == pytest.approx((0.1 + 0 + 0 + 0.5) / 4)
    assert error([said, said], [found[:1], None]) is None and error(None, [found, found]) is None


def test_a_star_is_a_word():
    assert align(["*", "a"], ["a"]) == [("*", None), ("a", "a")]


def random_results(rng, count=200, alphabet="abcdä你"):
    texts = [" ".join(rng.choices(alphabet, k=rng.randrange(1, 9))) for _ in range(count)]
    return [Transcript(str(i), ref, hyp) for i, (ref, hyp) in enumerate(pairwise(texts))]


@pytest.mark.parametrize("seed", range(5))
def test_totals_are_those_of_jiwer(seed):
    results = random_results(random.Random(seed))
    refs, hyps = [r.ref for r in results], [r.hyp for r in results]
    theirs = jiwer.process_words(refs, hyps)
    ours = score(results)
    assert ours.rate == pytest.approx(theirs.wer)
    assert ours.errors == theirs.insertions + theirs.deletions + theirs.substitutions
    assert ours.insertions - ours.deletions == theirs.insertions - theirs.deletions
    unspaced = [[text.replace(" ", "") for text in texts] for texts in (refs, hyps)]
    assert score(results, characters).rate == pytest.approx(jiwer.cer(*unspaced))


@pytest.mark.parametrize("seed", range(5))
def test_totals_are_never_more_than_with_the_costs_of_sclite(seed):
    agreeing = 0
    for result in (results := random_results(random.Random(seed))):
        sclite = kaldialign.edit_distance(result.ref.split(), result.hyp.split(), sclite_mode=True)["total"]
        assert score([result]).errors <= sclite
        agreeing += score([result]).errors == sclite
    assert agreeing > 0.9 * len(results)


def test_sclite_may_count_more():
    """It rather inserts and deletes three words than to substitute five, when two are right then."""
    ref, hyp = "x y z p q", "p q u v w"
    assert score([Transcript("a", ref, hyp)]) == ErrorReport(substitutions=5)
    assert kaldialign.edit_distance(ref.split(), hyp.split(), sclite_mode=True)["total"] == 6


def test_swapped_sides_swap_insertions_and_deletions():
    for result in random_results(random.Random(0)):
        there, back = score([result]), score([Transcript("x", result.hyp, result.ref)])
        assert there.errors == back.errors
        assert there.insertions - there.deletions == back.deletions - back.insertions


def test_mixed_units_are_chinese_characters_and_other_words():
    assert mixed("我們 meeting了 ok") == ["我", "們", "meeting", "了", "ok"]
    result = Transcript("x", "我 們去 meeting", "我們去 meetings")
    assert score([result], mixed) == ErrorReport(substitutions=1, correct=3)
    english = [Transcript("x", "one two", "one too")]
    assert score(english, mixed) == score(english)


def spoken_and_recognized(count: int, rate: float) -> tuple[list[str], list[str]]:
    """Words as frequent as in speech, and the same with so many errors."""
    rng = random.Random(count)
    vocabulary = [f"w{int(rng.paretovariate(0.6))}" for _ in range(2000)]
    ref = rng.choices(vocabulary, k=count)
    kinds = rng.choices("=-~+", [1 - rate, rate / 3, rate / 3, rate / 3], k=count)
    hyp = {"=": lambda w: [w], "-": lambda w: [], "~": lambda w: [f"x{w}"], "+": lambda w: [w, "uh"]}
    return ref, [word for kind, w in zip(kinds, ref, strict=True) for word in hyp[kind](w)]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3])
def test_long_texts_have_the_counts_of_kaldialign(rate):
    ref, hyp = spoken_and_recognized(2500, rate)  # more than is aligned at once
    whole = [(r or None, h or None) for r, h in kaldialign.align(ref, hyp, "")]
    found = align(ref, hyp)
    assert count_pairs(found) == count_pairs(whole)
    assert [r for r, _ in found if r is not None] == ref and [h for _, h in found if h is not None] == hyp


@pytest.mark.parametrize("ref, hyp", [
    ("a" * 3000, "b" * 2000), ("ab" * 1000, "ba" * 900), ("abc" * 700, ""), ("x", "abcx" * 600),
])  # fmt: skip
def test_long_texts_have_the_fewest_errors(ref, hyp, monkeypatch):
    monkeypatch.setattr("speechllm.scoring.counting._PAIRS_AT_ONCE", 10_000)
    found = align(ref, hyp)
    assert count_pairs(found).errors == kaldialign.edit_distance(list(ref), list(hyp))["total"]
    assert "".join(r or "" for r, _ in found) == ref and "".join(h or "" for _, h in found) == hyp


def test_an_hour_in_one_line_needs_little_memory():
    program = (
        "import random, resource\n"
        "from speechllm.scoring import Transcript, characters, score\n"
        "from tests.scoring.test_counting import spoken_and_recognized\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "ref, hyp = map(' '.join, spoken_and_recognized(10_000, 0.2))\n"
        "before = used()\n"
        "score([Transcript('a', ref, hyp)]), score([Transcript('a', ref, hyp)], characters)\n"
        "print(used() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150  # MB; 9,400 in one table
