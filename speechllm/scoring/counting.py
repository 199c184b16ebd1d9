"""Errors of transcripts, in words, characters, or both; the alignment is kaldialign's, in parts by rapidfuzz if long.

Alignments have the fewest errors: insertions, deletions and substitutions cost 1 each, as in icefall and jiwer. How
many of the errors are substitutions may differ where several alignments have as few. sclite aligns with costs of 3, 3
and 4, to keep what does not belong together apart; its totals are mostly the same, and never smaller.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import kaldialign
from rapidfuzz.distance import Levenshtein

from speechllm.decode.result import Word
from speechllm.prompt.label import WordTime
from speechllm.prompt.request import Request
from speechllm.text.normalize import normalize_text

if TYPE_CHECKING:
    from speechllm.data import Batch
    from speechllm.data.dataset import WaveformBatch

# What stands in for nothing in alignments: no unit is empty.
_NOTHING = ""
# Of a reference and a hypothesis, in one call of kaldialign: 100 MB.
_PAIRS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Transcript:
    """A reference and what was recognized instead.

    The others are None where unknown. `language` (`en`, or `en>zh` for a translation), `speaker` and `duration` (in
    seconds) group the results. `found_language`: of the speech, as the model has identified it. `words`: when the words
    of the reference are said; `found_words`: when those recognized are, as was found. `hotwords`: the list that the
    model was given.
    """

    id: str
    ref: str
    hyp: str
    language: str | None = None
    speaker: str | None = None
    duration: float | None = None
    found_language: str | None = None
    words: tuple[WordTime, ...] | None = None
    found_words: tuple[WordTime, ...] | None = None
    hotwords: tuple[str, ...] | None = None


def transcripts(
    batch: Batch | WaveformBatch,
    hyps: Sequence[str | None],
    text_steps: Sequence[str],
    found_languages: Sequence[str | None] | None = None,
    found_words: Sequence[Sequence[Word] | None] | None = None,
) -> list[Transcript]:
    """The references of a batch and what was recognized, both normalized alike.

    Args:
        hyps: N texts; the utterances of those that are None are left out.
        text_steps: the configuration's `data.text` (see `speechllm.text.normalize`).
        found_languages: N languages, of a model that identifies them.
        found_words: of N utterances, where they have times.
    """
    unknown = [None] * len(batch)
    columns = (
        batch.requests,
        batch.texts,
        hyps,
        batch.durations,
        found_languages or unknown,
        batch.words or unknown,
        found_words or unknown,
    )
    return [
        Transcript(
            request.id,
            normalize_text(ref, text_steps, request.target_language or request.language),
            normalize_text(hyp, text_steps, request.target_language or request.language),
            language_label(request),
            duration=duration,
            found_language=found_language,
            words=_said(words, text_steps),
            found_words=_said(found and [WordTime(word.text, word.start, word.end) for word in found], text_steps),
            hotwords=normalized_hotwords(request.hotwords, text_steps, request.target_language or request.language),
        )
        for request, ref, hyp, duration, found_language, words, found in zip(*columns, strict=True)
        if hyp is not None
    ]


def normalized_hotwords(
    hotwords: Sequence[str] | None, text_steps: Sequence[str], language: str | None
) -> tuple[str, ...] | None:
    """Hotwords in the form of the texts that they are in."""
    return None if hotwords is None else tuple(normalize_text(phrase, text_steps, language) for phrase in hotwords)


def _said(words: Sequence[WordTime] | None, text_steps: Sequence[str]) -> tuple[WordTime, ...] | None:
    """The words normalized; those of which nothing is left are silence."""
    if words is None:
        return None
    normalized = ((normalize_text(word, text_steps), start, end) for word, start, end in words)
    return tuple(WordTime(*word) for word in normalized if word[0])


def language_label(request: Request) -> str | None:
    """The `language` of a transcript: that of the speech, or `en>zh` where it is translated."""
    if request.target_language is None:
        return request.language
    return f"{request.language or '-'}>{request.target_language}"


@dataclass(frozen=True)
class ErrorReport:
    """Errors against a number of reference words or characters; reports of parts add up."""

    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    correct: int = 0

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def ref_len(self) -> int:
        return self.deletions + self.substitutions + self.correct

    @property
    def rate(self) -> float:
        """Errors over reference length, 0.03 for 3 percent; infinite for insertions against nothing."""
        if self.ref_len == 0:
            return math.inf if self.errors else 0.0
        return self.errors / self.ref_len

    def __add__(self, other: ErrorReport) -> ErrorReport:
        return ErrorReport(
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.substitutions + other.substitutions,
            self.correct + other.correct,
        )

    def __str__(self) -> str:
        """As icefall logs it: `2.31% [12 / 520, 3 ins, 4 del, 5 sub ]`."""
        return (
            f"{self.rate:.2%} [{self.errors} / {self.ref_len}, {self.insertions} ins, "
            f"{self.deletions} del, {self.substitutions} sub ]"
        )


def normalize(text: str) -> str:
    """The least that makes equal texts equal: composed Unicode (NFC), single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text: str) -> list[str]:
    """The words of a normalized text, for the word error rate (WER)."""
    return normalize(text).split()


def characters(text: str) -> list[str]:
    """The characters of a normalized text without its spaces, for the character error rate (CER)."""
    return list(normalize(text).replace(" ", ""))


def mixed(text: str) -> list[str]:
    """Chinese characters, and words of all that is not Chinese, for the mixed error rate (MER) of code-switched speech.

    As of SEAME: Vu et al., "A first speech recognition system for Mandarin-English code-switch conversational speech",
    ICASSP 2012.
    """
    return normalize_text(text, ("nfc", "split_chinese")).split()


class Unit(NamedTuple):
    """What is counted: how a text is split into it, its name, and the name of the error rate."""

    split: Callable[[str], list[str]]
    plural: str
    rate: str


UNITS = {
    "word": Unit(words, "words", "WER"),
    "char": Unit(characters, "characters", "CER"),
    "mixed": Unit(mixed, "tokens", "MER"),
}


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Pairs of reference and hypothesis units with the fewest errors; None for the missing side.

    Memory is linear in the lengths: long texts are cut in the middle of what was recognized rightly.
    """
    pairs: list[tuple[str | None, str | None]] = []
    ref_start = hyp_start = 0
    for ref_end, hyp_end in [*_cuts(ref, hyp), (len(ref), len(hyp))]:
        parts = (list(ref[ref_start:ref_end]), list(hyp[hyp_start:hyp_end]))
        pairs += [(r or None, h or None) for r, h in kaldialign.align(*parts, _NOTHING)]
        ref_start, hyp_start = ref_end, hyp_end
    return pairs


def _cuts(ref: Sequence[str], hyp: Sequence[str]) -> list[tuple[int, int]]:
    """Where to cut two long texts, so that the alignments of the parts have the fewest errors of the whole.

    kaldialign keeps a table of all pairs of units, about 100 bytes each. rapidfuzz needs no more than the lengths, but
    of alignments with as few errors it chooses others. Each cut is on its path, at the middle of the longest run of
    equal units in a stretch: there the paths of both meet, or all but always.
    """
    if len(ref) * len(hyp) <= _PAIRS_AT_ONCE:
        return []
    stretch = math.isqrt(_PAIRS_AT_ONCE) // 2  # two of them and their cut fit into a part
    cuts: list[tuple[int, int]] = []
    longest, next_start = 0, 0
    for run in Levenshtein.opcodes(ref, hyp):
        for offset in range(0, max(run.src_end - run.src_start, run.dest_end - run.dest_start), stretch):
            ref_end = min(run.src_start + offset + stretch, run.src_end)
            hyp_end = min(run.dest_start + offset + stretch, run.dest_end)
            place = (min(run.src_start + offset, ref_end), min(run.dest_start + offset, hyp_end))
            length = 0
            if run.tag == "equal":
                length = ref_end - place[0]
                place = (place[0] + length // 2, place[1] + length // 2)
            if sum(place) >= next_start:
                cuts.append(place)
                longest, next_start = length, sum(place) + stretch
            elif length > longest and cuts:
                cuts[-1], longest = place, length
    return cuts


def score(results: Iterable[Transcript], units: Callable[[str], list[str]] = words) -> ErrorReport:
    """Count errors over all results.

    Args:
        results: references may be empty; what is recognized for them counts as insertions.
        units: `words` for the word error rate, `characters` for the character error rate, `mixed` for the mixed one.
    """
    return sum(count_errors(results, units), ErrorReport())


def exact_match(results: Sequence[Transcript]) -> float:
    """The share of results without any error, as `words` sees them; 0 to 1. One less it is the sentence error rate."""
    return sum(words(result.ref) == words(result.hyp) for result in results) / max(1, len(results))


def language_accuracy(results: Iterable[Transcript]) -> float | None:
    """The share of results whose language was identified rightly, 0 to 1; None where no language is known and found."""
    rights = [
        result.found_language == result.language.partition(">")[0]
        for result in results
        if result.found_language is not None and result.language is not None
    ]
    return sum(rights) / len(rights) if rights else None


def word_time_error(results: Iterable[Transcript]) -> float | None:
    """By how many seconds the times of words are off, the mean over the starts and the ends of all that were recognized
    rightly; None where there are none with times."""
    off = []
    for result in results:
        refs, hyps = iter(result.words or ()), iter(result.found_words or ())
        for ref, hyp in align([w.word for w in result.words or ()], [w.word for w in result.found_words or ()]):
            said, found = next(refs) if ref else None, next(hyps) if hyp else None
            if said is not None and found is not None and ref == hyp:
                off += [abs(said.start - found.start), abs(said.end - found.end)]
    return sum(off) / len(off) if off else None


def count_errors(results: Iterable[Transcript], units: Callable[[str], list[str]] = words) -> list[ErrorReport]:
    """The errors of each result; see `score`."""
    return [count_pairs(align(units(result.ref), units(result.hyp))) for result in results]


def count_pairs(pairs: Sequence[tuple[str | None, str | None]]) -> ErrorReport:
    """The errors of an alignment, as `align` gives it."""
    insertions = sum(ref is None for ref, _ in pairs)
    deletions = sum(hyp is None for _, hyp in pairs)
    correct = sum(ref == hyp for ref, hyp in pairs)
    return ErrorReport(insertions, deletions, len(pairs) - insertions - deletions - correct, correct)
