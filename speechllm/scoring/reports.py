"""Tables for people, and the files that icefall users look for after decoding.

The layout of `recogs-*`, `errs-*` and `wer-summary-*` is icefall's (`icefall/utils.py`, `zipformer/decode.py`), so that
scripts which read those read ours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from speechllm.files import replaced_file
from speechllm.scoring.counting import (
    UNITS,
    ErrorReport,
    Transcript,
    align,
    characters,
    count_errors,
    count_pairs,
    score,
    words,
)
from speechllm.scoring.significance import confidence_interval
from speechllm.scoring.translation import translation_scores

# What cannot be grouped, and what cannot be told.
UNKNOWN = "-"
# Nothing, on one side of an error, as icefall shows it.
_NOTHING = "*"
_DURATION_EDGES = (2, 5, 10, 20, 30)


def grouped(results: Sequence[Transcript], by: str) -> dict[str, list[int]]:
    """Which of the results are in each group, in order of the alphabet or of duration; `-` holds what has no group.

    Args:
        by: `language`, `speaker` or `duration` (below 2, 5, 10, 20, 30 seconds, and longer).
    """
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, result in enumerate(results):
        value = getattr(result, by)
        if value is None:
            groups[-1, UNKNOWN].append(index)
        elif by == "duration":
            groups[_duration_group(value)].append(index)
        else:
            groups[0, value].append(index)
    return {name: groups[order, name] for order, name in sorted(groups)}


def _duration_group(seconds: float) -> tuple[int, str]:
    place = bisect_right(_DURATION_EDGES, seconds)
    if place == len(_DURATION_EDGES):
        return place, f"{_DURATION_EDGES[-1]}+ s"
    return place, f"{(0, *_DURATION_EDGES)[place]}-{_DURATION_EDGES[place]} s"


def _rows(results: Sequence[Transcript], by: str) -> list[tuple[str, list[int]]]:
    """The groups, where any are known, and `all`."""
    groups = grouped(results, by)
    return [*(groups.items() if set(groups) != {UNKNOWN} else ()), ("all", list(range(len(results))))]


def error_table(results: Iterable[Transcript], by: str = "language", unit: str = "word") -> str:
    """Error rates by group and over all, with bounds of 95 % confidence; CER beside the others. `exact`: the share of
    utterances without any error.

    Args:
        by: see `grouped`; results without a group are under `-`, and only `all` is shown where none has one.
        unit: `word`, `char` or `mixed`.
    """
    results = list(results)
    split, plural, rate = UNITS[unit]
    reports = count_errors(results, split)
    with_cer = split is not characters
    by_character = count_errors(results, characters) if with_cer else reports
    rows = [
        [
            by,
            "utterances",
            plural,
            rate,
            *(["CER"] if with_cer else []),
            "ins",
            "del",
            "sub",
            "exact",
            f"{rate} 95% from",
            "to",
        ]
    ]
    for name, group in _rows(results, by):
        members, counted = [results[i] for i in group], [reports[i] for i in group]
        report = sum(counted, ErrorReport())
        cer = sum((by_character[i] for i in group), ErrorReport()).rate
        bounds = confidence_interval(members, counted) or (None, None)
        rows.append(
            [
                name,
                str(len(group)),
                str(report.ref_len),
                f"{report.rate:.2%}",
                *([f"{cer:.2%}"] if with_cer else []),
                str(report.insertions),
                str(report.deletions),
                str(report.substitutions),
                f"{sum(r.errors == 0 for r in counted) / len(group):.2%}",
                *(UNKNOWN if bound is None else f"{bound:.2%}" for bound in bounds),
            ]
        )
    return aligned(rows)


def translation_table(results: Sequence[Transcript], by: str = "language") -> str:
    """BLEU and chrF2 by group and over all, and sacrebleu's signatures; `-` for groups of several target languages.

    Raises:
        UserError: see `translation_scores`.
    """
    rows = [[by, "utterances", "BLEU", "chrF2"]]
    signatures: dict[str, None] = {}
    for name, group in _rows(results, by):
        scores = translation_scores([results[i] for i in group])
        shown = [UNKNOWN] * 2
        if scores is not None:
            shown = [f"{scores.bleu:.2f}", f"{scores.chrf:.2f}"]
            signatures |= {f"BLEU: {scores.bleu_signature}": None, f"chrF2: {scores.chrf_signature}": None}
        rows.append([name, str(len(group)), *shown])
    return aligned(rows) + "".join(f"{signature}\n" for signature in signatures)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as text, a line each row: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    lines = ("  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) for row in rows)
    return "".join(f"{line}\n" for line in lines)


def write_reports(
    folder: str | Path,
    test_set: str,
    suffix: str,
    results: Iterable[Transcript],
    setting: str,
    unit: str = "word",
    by: str = "language",
) -> ErrorReport:
    """Write the four files of one decoded test set and return its errors.

    `recogs-TEST_SET-SUFFIX.txt` (reference and hypothesis of each utterance, in words), `errs-...` (alignments and
    statistics), `wer-summary-...` (one line per decoding setting, the best first; lines of other settings are
    kept if their rate is of the same unit) and `wer-by-language-...`. Each is written whole or not at all; results
    are sorted by id, as icefall does.

    Args:
        folder: created where missing.
        suffix: says how it was decoded, such as `epoch-30-avg-5`.
        setting: the search and its parameters, such as `greedy_search` or `beam_size_4`.
        unit: of errors and rates: `word`, `char` or `mixed`.
        by: of the last file: `language`, `speaker` or `duration`.
    """
    folder = Path(folder)
    results = sorted(results, key=lambda result: result.id)
    name = f"{test_set}-{suffix}.txt"
    report = score(results, UNITS[unit].split)
    _write(folder / f"recogs-{name}", recogs_text(results))
    _write(folder / f"errs-{name}", errs_text(results, unit))
    _write(folder / f"wer-by-{by}-{name}", error_table(results, by, unit))
    summary = folder / f"wer-summary-{name}"
    heading, *others = summary.read_text(encoding="utf-8").splitlines() if summary.is_file() else [""]
    lines = dict(line.split("\t") for line in others) if heading == f"settings\t{UNITS[unit].rate}" else {}
    lines[setting] = f"{100 * report.rate:.2f}"
    body = "".join(f"{key}\t{value}\n" for key, value in sorted(lines.items(), key=lambda kv: float(kv[1])))
    _write(summary, f"settings\t{UNITS[unit].rate}\n{body}")
    return report


def recogs_text(results: Iterable[Transcript]) -> str:
    """The contents of a `recogs-*` file: words as Python lists, as icefall prints them."""
    return "".join(
        f"{result.id}:\tref={words(result.ref)}\n{result.id}:\thyp={words(result.hyp)}\n" for result in results
    )


def errs_text(results: Iterable[Transcript], unit: str = "word") -> str:
    """The contents of an `errs-*` file, as icefall's write_error_stats lays it out."""
    units = UNITS[unit].split
    aligned = [(result.id, align(units(result.ref), units(result.hyp))) for result in results]
    report = sum((count_pairs(pairs) for _, pairs in aligned), ErrorReport())
    substituted: Counter[tuple[str, str]] = Counter()
    deleted: Counter[str] = Counter()
    inserted: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for ref, hyp in (pair for _, pairs in aligned for pair in pairs):
        if ref is not None and hyp is not None:
            if ref != hyp:
                substituted[ref, hyp] += 1
            else:
                correct[ref] += 1
        elif ref is not None:
            deleted[ref] += 1
        elif hyp is not None:
            inserted[hyp] += 1
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
    """One utterance's alignment with neighboring errors joined: `THE (A->B C) END (X->*)`."""
    shown: list[str] = []
    refs: list[str] = []
    hyps: list[str] = []

    def flush() -> None:
        if refs or hyps:
            shown.append(f"({' '.join(refs) or _NOTHING}->{' '.join(hyps) or _NOTHING})")
            refs.clear()
            hyps.clear()

    for ref, hyp in pairs:
        if ref is not None and ref == hyp:
            flush()
            shown.append(ref)
        else:
            refs += [] if ref is None else [ref]
            hyps += [] if hyp is None else [hyp]
    flush()
    return " ".join(shown)


def _ranked(counts: Counter) -> list[tuple]:
    return sorted(((count, key) for key, count in counts.items()), reverse=True)


def _write(path: Path, text: str) -> None:
    with replaced_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
