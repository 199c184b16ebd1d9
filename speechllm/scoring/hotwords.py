"""Errors on hotwords and on the rest, and hotwords that are written though they are not said.

B-WER is the error rate on words of an utterance's list, U-WER that on all others; an inserted word counts for B-WER if
it is of the list: Le et al., "Contextualized streaming end-to-end speech recognition with trie-based deep biasing and
shallow fusion", arXiv 2104.02194.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from speechllm.scoring.counting import ErrorReport, Transcript, Unit, align, count_pairs, words


@dataclass(frozen=True)
class HotwordReport:
    """What a list of hotwords does to the errors of utterances that have one.

    Attributes:
        listed, others: errors on words of the list and on all others.
        absent: phrases, summed over the utterances, that are in the list and not said; `written` of them are
            recognized all the same.
        silent: utterances in which nothing is said; in `written_in_silence` of them a phrase of the list is recognized.
    """

    listed: ErrorReport
    others: ErrorReport
    absent: int
    written: int
    silent: int
    written_in_silence: int

    def text(self, unit: Unit) -> str:
        """Lines to print."""
        return (
            f"hotwords   B-{unit.rate} {self.listed}\n"
            f"the others U-{unit.rate} {self.others}\n"
            f"hotwords written that are not said: {self.written} of {self.absent}; "
            f"in silence: in {self.written_in_silence} of {self.silent} utterances\n"
        )


def hotword_report(results: Iterable[Transcript], split: Callable[[str], list[str]] = words) -> HotwordReport | None:
    """The report of those utterances that have a list, even an empty one; None if none has.

    Args:
        split: a text into units, see `counting.UNITS`.
    """
    listed: list[tuple[str | None, str | None]] = []
    others: list[tuple[str | None, str | None]] = []
    found = [result for result in results if result.hotwords is not None]
    absent = written = silent = written_in_silence = 0
    for result in found:
        ref, hyp = split(result.ref), split(result.hyp)
        phrases = [tuple(split(phrase)) for phrase in result.hotwords or ()]
        units = {unit for phrase in phrases for unit in phrase}
        for pair in align(ref, hyp):
            (listed if (pair[1] if pair[0] is None else pair[0]) in units else others).append(pair)
        not_said = [phrase for phrase in phrases if phrase and not _holds(ref, phrase)]
        wrong = sum(_holds(hyp, phrase) for phrase in not_said)
        absent, written = absent + len(not_said), written + wrong
        silent, written_in_silence = silent + (not ref), written_in_silence + (not ref and wrong > 0)
    if not found:
        return None
    return HotwordReport(count_pairs(listed), count_pairs(others), absent, written, silent, written_in_silence)


def _holds(units: list[str], phrase: tuple[str, ...]) -> bool:
    return any(tuple(units[i : i + len(phrase)]) == phrase for i in range(len(units) - len(phrase) + 1))
