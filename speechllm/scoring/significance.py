"""How far an error rate, or the difference between two systems, could be chance.

Confidence intervals are bootstrapped: Bisani & Ney, "Bootstrap estimates for confidence intervals in ASR performance
evaluation", ICASSP 2004. Two systems are compared on the same utterances by the matched pairs sentence segment word
error test (MAPSSWE) of Gillick & Cox, "Some statistical issues in the comparison of speech recognition algorithms",
ICASSP 1989, with segments as NIST cuts them (Pallett et al., "Tools for the analysis of benchmark speech recognition
tests", ICASSP 1990), on alignments of `align` instead of sclite's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechllm.scoring.counting import ErrorReport, Transcript, Unit, align, count_errors

REPLICATES = 10_000
# Fewer segments than this and their mean is not yet normal, which the matched pairs test needs.
FEW_SEGMENTS = 50
_SEED = 0
_CONFIDENCE = 0.95
# So many words that both systems have right end a segment.
_WORDS_BETWEEN_SEGMENTS = 2
# Numbers drawn at once, which limits memory.
_DRAWN_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class MatchedPairs:
    """Outcome of the matched pairs test; `statistic` is positive where the first system has more errors.

    `p_value` is two-sided; it and `statistic` are not a number where there is too little to tell.
    """

    segments: int
    statistic: float
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """A second system beside a first one. Rates and their differences are 0.03 for 3 percent.

    `interval`: of the difference, second minus first, 95 %; None for fewer than two utterances.
    `improvement`: the share of bootstrap replicates in which the second has fewer errors; ties count half.
    """

    first: ErrorReport
    second: ErrorReport
    interval: tuple[float, float] | None
    improvement: float
    test: MatchedPairs

    @property
    def difference(self) -> float:
        return self.second.rate - self.first.rate


def resampled_by(results: Sequence[Transcript]) -> str:
    """What the bootstrap draws of these: `speaker` where each is known and there are several, or else `utterance`.

    The errors of one speaker hang together; intervals that take them for independent are too narrow.
    """
    speakers = {result.speaker for result in results}
    return "speaker" if len(speakers) > 1 and None not in speakers else "utterance"


def confidence_interval(results: Sequence[Transcript], reports: Sequence[ErrorReport]) -> tuple[float, float] | None:
    """Bounds of the error rate with 95 % confidence, always the same for the same results.

    Args:
        results: drawn by speaker or by utterance, see `resampled_by`.
        reports: the errors of each.

    Returns:
        None where there is but one utterance, or none.
    """
    rates = _bootstrap(results, [reports])
    return None if rates is None else _bounds(rates[:, 0])


def compare(first: Sequence[Transcript], second: Sequence[Transcript], unit: Unit) -> Comparison:
    """Two systems on the same utterances, in the same order.

    Raises:
        ValueError: ids or references differ.
    """
    if [(r.id, r.ref) for r in first] != [(r.id, r.ref) for r in second]:
        raise ValueError("two systems are compared on the same ids and references, in the same order")
    reports = [count_errors(results, unit.split) for results in (first, second)]
    interval, improvement = None, math.nan
    rates = _bootstrap(first, reports)
    if rates is not None:
        before, after = rates.T
        # insertions against nothing but empty references make both infinite
        change = np.subtract(after, before, out=np.zeros_like(after), where=after != before)
        interval, improvement = _bounds(change), float(np.mean(change < 0) + np.mean(change == 0) / 2)
    before_all, after_all = (sum(counted, ErrorReport()) for counted in reports)
    return Comparison(before_all, after_all, interval, improvement, matched_pairs_test(first, second, unit))


def matched_pairs_test(first: Sequence[Transcript], second: Sequence[Transcript], unit: Unit) -> MatchedPairs:
    """MAPSSWE: is the mean difference of the errors in a segment zero?

    A segment is a stretch of an utterance with errors of either system, between stretches of at least two words that
    both have right. Segments are taken for independent, and for many (50 or more): their mean is then normal.
    """
    pairs = [
        pair
        for a, b in zip(first, second, strict=True)
        for pair in _segment_errors(unit.split(a.ref), unit.split(a.hyp), unit.split(b.hyp))
    ]
    count = len(pairs)
    differences = np.array([a - b for a, b in pairs], dtype=float)
    if not differences.any():
        return MatchedPairs(count, 0.0, 1.0)
    deviation = differences.std(ddof=1) if count > 1 else 0.0
    if deviation == 0:
        return MatchedPairs(count, math.nan, math.nan)
    statistic = float(differences.mean() / (deviation / math.sqrt(count)))
    return MatchedPairs(count, statistic, math.erfc(abs(statistic) / math.sqrt(2)))


def _segment_errors(ref: list[str], first: list[str], second: list[str]) -> list[tuple[int, int]]:
    """Errors of both systems in each segment of one utterance."""
    segments: list[tuple[int, int]] = []
    last = None
    for place, (a, b) in enumerate(zip(_errors_by_place(ref, first), _errors_by_place(ref, second), strict=True)):
        if a or b:
            if last is None or place // 2 - (last + 1) // 2 >= _WORDS_BETWEEN_SEGMENTS:
                segments.append((a, b))
            else:
                segments[-1] = (segments[-1][0] + a, segments[-1][1] + b)
            last = place
    return segments


def _errors_by_place(ref: list[str], hyp: list[str]) -> list[int]:
    """Errors in each of 2 U + 1 places: insertions before word i at 2 i, errors of word i itself at 2 i + 1."""
    errors = [0] * (2 * len(ref) + 1)
    i = 0
    for r, h in align(ref, hyp):
        if r is None:
            errors[2 * i] += 1
        else:
            errors[2 * i + 1] = int(r != h)
            i += 1
    return errors


def _bootstrap(results: Sequence[Transcript], systems: Sequence[Sequence[ErrorReport]]) -> np.ndarray | None:
    """Error rates (replicates, systems) of sets drawn with replacement; None where there is nothing to draw from.

    Drawn is how often each different combination of errors and lengths occurs (multinomial), not each utterance: the
    same distribution, with far fewer numbers.
    """
    if len(results) < 2:
        return None
    rows = np.array(
        [[report.ref_len, *(s.errors for s in both)] for report, *both in zip(systems[0], *systems, strict=True)]
    )
    if resampled_by(results) == "speaker":
        _, speaker = np.unique([result.speaker for result in results], return_inverse=True)
        sums = np.zeros((speaker.max() + 1, rows.shape[1]), dtype=rows.dtype)
        np.add.at(sums, speaker, rows)
        rows = sums
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(_SEED)
    at_once = max(1, _DRAWN_AT_ONCE // len(kinds))
    drawn = np.concatenate(
        [
            rng.multinomial(len(rows), counts / len(rows), size=min(at_once, REPLICATES - done)) @ kinds
            for done in range(0, REPLICATES, at_once)
        ]
    )
    ref_lens, errors = drawn[:, :1], drawn[:, 1:]
    return np.divide(errors, ref_lens, out=np.where(errors > 0, np.inf, 0.0), where=ref_lens > 0)


def _bounds(replicates: np.ndarray) -> tuple[float, float]:
    tail = (1 - _CONFIDENCE) / 2
    # some of them may be infinite: nothing is interpolated
    low, high = np.quantile(replicates, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)
