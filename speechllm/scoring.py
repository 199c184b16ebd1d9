"""Word and character error rates, and the files that icefall users look for after decoding.

The layout of `recogs-*`, `errs-*` and `wer-summary-*` is icefall's (`icefall/utils.py`,
`zipformer/decode.py`), so that scripts which read those read ours; the alignment is kaldialign's.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import kaldialign

from speechllm.files import replaced_file
from speechllm.text import normalize_text

if TYPE_CHECKING:
    from speechllm.data import Batch

# What stands in for nothing in alignments; the files show it as icefall's "*", which may also be a word.
_NOTHING = "\0"
_SHOWN = "*"


@dataclass(frozen=True)
class Transcript:
    """A reference and what was recognised instead.

    `language` groups the results: `en`, or `en>zh` for a translation; None where unknown.
    """

    id: str
    ref: str
    hyp: str
    language: str | None = None


def transcripts(batch: Batch, hyps: Sequence[str | None], text_steps: Sequence[str]) -> list[Transcript]:
    """The references of a batch and what was recognised, both normalised alike.

    Args:
        hyps: N texts; the utterances of those that are None are left out.
        text_steps: the configuration's `data.text` (see `speechllm.text`).
    """
    return [
        Transcript(
            id,
            normalize_text(ref, text_steps),
            normalize_text(hyp, text_steps),
            language if target is None else f"{language or '-'}>{target}",
        )
        for id, ref, hyp, language, target in zip(
            batch.ids, batch.texts, hyps, batch.languages, batch.target_languages, strict=True
        )
        if hyp is not None
    ]


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
    """The words of a normalised text, for the word error rate."""
    return normalize(text).split()


def characters(text: str) -> list[str]:
    """The characters of a normalised text without its spaces, for the character error rate."""
    return list(normalize(text).replace(" ", ""))


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Pairs of reference and hypothesis units with the fewest errors; None for the missing side."""
    pairs = kaldialign.align(list(ref), list(hyp), _NOTHING)
    return [(r if r != _NOTHING else None, h if h != _NOTHING else None) for r, h in pairs]


def score(results: Iterable[Transcript], units: Callable[[str], list[str]] = words) -> ErrorReport:
    """Count errors over all results.

    Args:
        results: references may be empty; what is recognised for them counts as insertions.
        units: `words` for the word error rate, `characters` for the character error rate.
    """
    report = ErrorReport()
    for result in results:
        report += _count(align(units(result.ref), units(result.hyp)))
    return report


def _count(pairs: list[tuple[str | None, str | None]]) -> ErrorReport:
    insertions = sum(ref is None for ref, _ in pairs)
    deletions = sum(hyp is None for _, hyp in pairs)
    correct = sum(ref == hyp for ref, hyp in pairs)
    return ErrorReport(insertions, deletions, len(pairs) - insertions - deletions - correct, correct)


def language_table(results: Iterable[Transcript]) -> str:
    """A table for people: utterances, WER and CER by language and over all.

    Languages are in alphabetical order; results without a language are under `-`.
    """
    results = list(results)
    groups = {lang: [r for r in results if (r.language or "-") == lang] for lang in _languages(results)}
    rows = [("language", "utterances", "words", "WER", "CER", "ins", "del", "sub")]
    for lang, group in [*groups.items(), ("all", results)]:
        report = score(group)
        rows.append(
            (
                lang,
                str(len(group)),
                str(report.ref_len),
                f"{report.rate:.2%}",
                f"{score(group, characters).rate:.2%}",
                str(report.insertions),
                str(report.deletions),
                str(report.substitutions),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(
            [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        + "\n"
        for row in rows
    )


def _languages(results: list[Transcript]) -> list[str]:
    return sorted({result.language or "-" for result in results})


def write_reports(
    folder: str | Path, test_set: str, suffix: str, results: Iterable[Transcript], setting: str
) -> ErrorReport:
    """Write the four files of one decoded test set and return its word errors.

    `recogs-TEST_SET-SUFFIX.txt` (reference and hypothesis of each utterance), `errs-...` (alignments and
    statistics), `wer-summary-...` (one line per decoding setting, the best first; lines of other settings are
    kept) and `wer-by-language-...`. Each is written whole or not at all; results are sorted by id, as icefall
    does.

    Args:
        folder: created where missing.
        suffix: says how it was decoded, such as `epoch-30-avg-5`.
        setting: the search and its parameters, such as `greedy_search` or `beam_size_4`.
    """
    folder = Path(folder)
    results = sorted(results, key=lambda result: result.id)
    name = f"{test_set}-{suffix}.txt"
    report = score(results)
    _write(folder / f"recogs-{name}", recogs_text(results))
    _write(folder / f"errs-{name}", errs_text(results))
    _write(folder / f"wer-by-language-{name}", language_table(results))
    summary = folder / f"wer-summary-{name}"
    lines = dict(line.split("\t") for line in _lines(summary)[1:])
    lines[setting] = f"{100 * report.rate:.2f}"
    body = "".join(f"{key}\t{value}\n" for key, value in sorted(lines.items(), key=lambda kv: float(kv[1])))
    _write(summary, "settings\tWER\n" + body)
    return report


def recogs_text(results: Iterable[Transcript]) -> str:
    """The contents of a `recogs-*` file: words as Python lists, as icefall prints them."""
    return "".join(
        f"{result.id}:\tref={words(result.ref)}\n{result.id}:\thyp={words(result.hyp)}\n" for result in results
    )


def errs_text(results: Iterable[Transcript], units: Callable[[str], list[str]] = words) -> str:
    """The contents of an `errs-*` file, as icefall's write_error_stats lays it out."""
    aligned = [(result.id, align(units(result.ref), units(result.hyp))) for result in results]
    report = sum((_count(pairs) for _, pairs in aligned), ErrorReport())
    substituted: Counter[tuple[str, str]] = Counter()
    deleted: Counter[str] = Counter()
    inserted: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for ref, hyp in (pair for _, pairs in aligned for pair in pairs):
        if ref is None:
            inserted[hyp] += 1
        elif hyp is None:
            deleted[ref] += 1
        elif ref != hyp:
            substituted[ref, hyp] += 1
        else:
            correct[ref] += 1
    lines = [
        f"%WER = {100 * report.rate:.2f}",
        f"Errors: {report.insertions} insertions, {report.deletions} deletions, {report.substitutions} "
        f"substitutions, over {report.ref_len} reference words ({report.correct} correct)",
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, "
        "PER-WORD STATS:",
        "",
        "PER-UTT DETAILS: corr or (ref->hyp)  ",
    ]
    lines += [f"{id}:\t{_details(pairs)}" for id, pairs in aligned]
    lines += ["", "SUBSTITUTIONS: count ref -> hyp"]
    lines += [f"{count}   {ref} -> {hyp}" for count, (ref, hyp) in _ranked(substituted)]
    lines += ["", "DELETIONS: count ref"]
    lines += [f"{count}   {ref}" for count, ref in _ranked(deleted)]
    lines += ["", "INSERTIONS: count hyp"]
    lines += [f"{count}   {hyp}" for count, hyp in _ranked(inserted)]
    lines += ["", "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp"]
    as_ref: Counter[str] = Counter()
    as_hyp: Counter[str] = Counter()
    for (ref, hyp), count in substituted.items():
        as_ref[ref] += count
        as_hyp[hyp] += count
    # a word's errors are those it was part of on either side
    errors = {
        word: as_ref[word] + as_hyp[word] + inserted[word] + deleted[word]
        for word in {*correct, *as_ref, *as_hyp, *inserted, *deleted}
    }
    for word, count in sorted(errors.items(), key=lambda item: (item[1], item[0]), reverse=True):
        in_ref = correct[word] + as_ref[word] + deleted[word]
        in_hyp = correct[word] + as_hyp[word] + inserted[word]
        lines.append(f"{word}   {correct[word]} {count} {in_ref} {in_hyp}")
    return "\n".join(lines) + "\n"


def _details(pairs: list[tuple[str | None, str | None]]) -> str:
    """One utterance's alignment with neighbouring errors joined: `THE (A->B C) END (X->*)`."""
    shown: list[str] = []
    refs: list[str] = []
    hyps: list[str] = []

    def flush() -> None:
        if refs or hyps:
            shown.append(f"({' '.join(refs) or _SHOWN}->{' '.join(hyps) or _SHOWN})")
            refs.clear()
            hyps.clear()

    for ref, hyp in pairs:
        if ref == hyp:
            flush()
            shown.append(ref)
        else:
            refs += [] if ref is None else [ref]
            hyps += [] if hyp is None else [hyp]
    flush()
    return " ".join(shown)


def _ranked(counts: Counter) -> list[tuple]:
    return sorted(((count, key) for key, count in counts.items()), reverse=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _write(path: Path, text: str) -> None:
    with replaced_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
