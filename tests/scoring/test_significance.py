"""Significance: intervals that cover, tests that find what is there and nothing else."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from speechllm.scoring import UNITS, Transcript, compare, confidence_interval, count_errors, matched_pairs_test, score
from speechllm.scoring.significance import _segment_errors

WORD = UNITS["word"]


def system(rng, refs, error_rate):
    """What a system that has each word wrong independently makes of these."""
    return [
        Transcript(str(i), ref, " ".join("x" if rng.random() < error_rate else word for word in ref.split()))
        for i, ref in enumerate(refs)
    ]


def references(count, words=10):
    return [" ".join(f"w{i}" for i in range(words))] * count


def test_interval_has_the_width_of_theory_and_covers_the_rate():
    results = system(random.Random(0), references(1000), 0.1)
    rate = score(results).rate
    low, high = confidence_interval(results, count_errors(results))
    assert low < rate < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.1 * 0.9 / 10_000), rel=0.1)
    assert (low, high) == confidence_interval(results, count_errors(results))


def test_intervals_cover_the_true_rate_in_nineteen_of_twenty_sets():
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        results = system(rng, references(100), 0.2)
        low, high = confidence_interval(results, count_errors(results))
        covered += low <= 0.2 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_speakers_are_drawn_as_a_whole():
    """Half of the speakers are always wrong: as many independent utterances would say more than they do."""
    refs = references(200)
    speakers = [system(random.Random(0), refs[:20], i % 2) for i in range(10)]
    apart = [t for part in speakers for t in part]
    together = [replace(t, speaker=f"s{i}") for i, part in enumerate(speakers) for t in part]
    widths = [np.ptp(confidence_interval(results, count_errors(results))) for results in (apart, together)]
    assert widths[1] > 3 * widths[0]


def test_too_little_to_tell():
    one = [Transcript("a", "x", "y")]
    assert confidence_interval(one, count_errors(one)) is None
    assert confidence_interval([], []) is None
    silence = [Transcript("a", "", "y"), Transcript("b", "", "")]
    assert confidence_interval(silence, count_errors(silence)) == (0.0, math.inf)
    found = compare(one, [replace(one[0], hyp="x")], WORD)
    assert found.interval is None and math.isnan(found.improvement) and math.isnan(found.test.p_value)


@pytest.mark.parametrize(
    "first, second, segments",
    [
        ("XbcdeY", "abcdef", [(1, 0), (1, 0)]),
        ("Xbcdef", "abYdef", [(1, 1)]),
        ("Xbcdef", "abcYef", [(1, 0), (0, 1)]),
        ("Xbcdef", "abIcdef", [(1, 1)]),
        ("Xbcdef", "abcIdef", [(1, 0), (0, 1)]),
        ("abIcdef", "abcdef", [(1, 0)]),
        ("abcdef", "abcdef", []),
    ],
)
def test_segments_end_with_two_words_that_both_have_right(first, second, segments):
    assert _segment_errors(list("abcdef"), list(first), list(second)) == segments


def test_insertions_against_nothing_are_a_segment():
    assert _segment_errors([], ["i", "i"], []) == [(2, 0)]


def test_segments_hold_all_errors():
    rng = random.Random(0)
    for _ in range(200):
        ref, a, b = (rng.choices("abc", k=rng.randrange(9)) for _ in range(3))
        totals = [score([Transcript("x", " ".join(ref), " ".join(hyp))]).errors for hyp in (a, b)]
        assert [sum(segment[i] for segment in _segment_errors(ref, a, b)) for i in (0, 1)] == totals


def test_p_values_of_equal_systems_are_uniform():
    rng = random.Random(0)
    values = []
    for _ in range(200):
        refs = references(100)
        values.append(matched_pairs_test(system(rng, refs, 0.1), system(rng, refs, 0.1), WORD).p_value)
    deciles, _ = np.histogram(values, bins=10, range=(0, 1))
    assert deciles.min() >= 8 and deciles.max() <= 36  # 20 of each are expected, with a deviation of 4.2
    assert 0.4 < np.mean(values) < 0.6


def test_a_better_system_is_found_from_either_side():
    rng = random.Random(0)
    worse, better = (system(rng, references(300), rate) for rate in (0.15, 0.1))
    there, back = compare(worse, better, WORD), compare(better, worse, WORD)
    assert there.test.p_value < 0.001 and there.test.statistic > 0
    assert there.difference < there.interval[1] < 0 and there.improvement > 0.999
    assert (back.difference, back.test.statistic) == (-there.difference, -there.test.statistic)
    assert back.test.p_value == there.test.p_value
    assert back.improvement == pytest.approx(1 - there.improvement)


def test_a_system_and_itself():
    results = system(random.Random(0), references(50), 0.1)
    found = compare(results, results, WORD)
    assert (found.difference, found.interval, found.improvement) == (0.0, (0.0, 0.0), 0.5)
    assert found.test.p_value == 1.0


def test_other_utterances_are_no_pairs():
    results = system(random.Random(0), references(2), 0.1)
    with pytest.raises(ValueError, match="same ids"):
        compare(results, results[::-1], WORD)
