"""The work of `speechllm score`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from speechllm.errors import UserError
from speechllm.scoring.counting import UNITS, Transcript, normalized_hotwords
from speechllm.scoring.hotwords import hotword_report
from speechllm.scoring.reading import all_lines, listed, matched, read_all, read_lines, read_pair, with_manifest
from speechllm.scoring.reports import error_table, translation_table, write_reports
from speechllm.scoring.significance import FEW_SEGMENTS, REPLICATES, Comparison, compare, resampled_by
from speechllm.scoring.text_files import Line
from speechllm.text.normalize import check_steps, normalize_text


def score_files(
    ref: Path,
    hyp: Path | None = None,
    *,
    unit: str = "word",
    text_steps: Sequence[str] = (),
    by: str | None = None,
    manifest: Path | None = None,
    compare_with: Path | None = None,
    bleu: bool = False,
    missing_as_empty: bool = False,
    output: Path | None = None,
    hotwords: Path | None = None,
) -> str:
    """Score a file of hypotheses against one of references: the tables to print.

    Args:
        ref, hyp: see `read_lines`; `hyp` is None where `ref` holds both.
        unit: `word`, `char` or `mixed`.
        text_steps: of both sides (see `speechllm.text.normalize`).
        by: `language`, `speaker` or `duration`; None: by language, if any is known.
        manifest: says languages, speakers and durations, where `ref` does not.
        compare_with: the hypotheses of another system.
        bleu: BLEU and chrF as well.
        missing_as_empty: see `matched`.
        output: folder for the files of `write_reports`.
        hotwords: phrases, one a line, the same for all utterances; None: those of the manifest, if it has any.

    Raises:
        UserError: files cannot be read or do not match; steps are unknown; what `by` asks for is not known.
    """
    manifests = [] if manifest is None else [manifest]
    results, second = read_results([ref], hyp, text_steps, manifests, compare_with, missing_as_empty)
    if by is not None and all(getattr(result, by) is None for result in results):
        raise UserError(f"{manifest or ref}: says no {by} of any utterance; name a manifest that does with --manifest")
    by = by or "language"
    drawn_by = resampled_by(results)
    within_one = ", within one by utterance" if drawn_by == "speaker" else ""
    text = f"{error_table(results, by, unit)}95%: bootstrap, drawn by {drawn_by}{within_one}\n"
    if hotwords is not None:
        phrases = [line.strip() for _, line in all_lines(hotwords) if line.strip()]
        results = [
            replace(result, hotwords=normalized_hotwords(phrases, text_steps, result.language)) for result in results
        ]
    if (report := hotword_report(results, UNITS[unit].split)) is not None:
        text += f"\n{report.text(UNITS[unit])}"
    if bleu:
        text += f"\n{translation_table(results, by)}"
    if compare_with is not None and second is not None:
        comparison = compare(results, second, UNITS[unit])
        text += f"\n{comparison_text(comparison, hyp or ref, compare_with, unit, drawn_by)}"
    if output is not None:
        names = [path.stem.removeprefix("recogs-") for path in (ref, hyp) if path is not None]
        write_reports(output, "-".join(names), unit, results, str(hyp or ref), unit, by)
    return text


def read_results(
    refs: Sequence[Path],
    hyp: Path | None = None,
    text_steps: Sequence[str] = (),
    manifests: Sequence[Path] = (),
    compare_with: Path | None = None,
    missing_as_empty: bool = False,
) -> tuple[list[Transcript], list[Transcript] | None]:
    """References with what was recognized instead, and with what another system has recognized, if one is named.

    Args:
        refs: files of references, with one `hyp`; or one file that holds both.
        manifests: say languages, speakers and durations, where `refs` do not.
        hyp, text_steps, compare_with, missing_as_empty: see `score_files`.

    Raises:
        UserError: files cannot be read or do not match; steps are unknown.
    """
    try:
        check_steps(text_steps)
    except ValueError as error:
        raise UserError(str(error)) from error
    ref = refs[0]

    def pair(other: Path) -> tuple[dict[str, Line], dict[str, Line]]:
        return read_pair(ref, other) if len(refs) == 1 else (read_all(refs), read_lines(other))

    if hyp is None:
        lines = hyps = read_lines(ref)
    else:
        lines, hyps = pair(hyp)
    results = matched(lines, hyps, (ref, hyp or ref), text_steps, missing_as_empty)
    if manifests:
        results = with_manifest(results, manifests, text_steps)
    if compare_with is None:
        return results, None
    compared, others = pair(compare_with)
    if compared.keys() != lines.keys():
        raise UserError(f"{compare_with}: of another form than {hyp or ref}: give both in the same form")
    if hyp is None:
        _check_same_references(lines, others, (ref, compare_with), text_steps)
    second = matched(lines, others, (ref, compare_with), text_steps, missing_as_empty)
    return results, [replace(result, hyp=other.hyp) for result, other in zip(results, second, strict=True)]


def _check_same_references(
    refs: dict[str, Line], others: dict[str, Line], names: tuple[Path, Path], text_steps: Sequence[str]
) -> None:
    """Of two files that hold both sides: other references would be another test set, or other text steps.

    Raises:
        UserError: some differ.
    """
    differing = [
        id
        for id, line in others.items()
        if None not in (line.predicted, line.text)
        and id in refs
        and normalize_text(line.text or "", text_steps) != normalize_text(refs[id].text or "", text_steps)
    ]
    if differing:
        raise UserError(
            f"{names[1]}: other references than in {names[0]} for {len(differing)} utterances "
            f"(where they were normalized otherwise, --normalize may help): {listed(differing)}"
        )


def comparison_text(comparison: Comparison, first: Path | str, second: Path | str, unit: str, drawn_by: str) -> str:
    """Both error rates, their difference, and whether it could be chance.

    Args:
        first, second: names of the systems.
        drawn_by: see `resampled_by`.
    """
    rate, test = UNITS[unit].rate, comparison.test
    lines = [
        f"first   {rate} {comparison.first}  {first}",
        f"second  {rate} {comparison.second}  {second}",
        f"difference  {comparison.difference:+.2%}",
    ]
    if comparison.interval is not None:
        low, high = comparison.interval
        lines[-1] += f", 95% from {low:+.2%} to {high:+.2%}"
        lines.append(
            f"the second is better in {comparison.improvement:.1%} of {REPLICATES} bootstrap replicates, "
            f"drawn by {drawn_by} (Bisani & Ney 2004)"
        )
    if math.isnan(test.p_value):
        outcome = "too few to tell"
    else:
        outcome = f"W = {test.statistic:.2f}, p = {test.p_value:.3g}"
        if test.segments < FEW_SEGMENTS:
            outcome += f" (only a rough guide below {FEW_SEGMENTS} segments)"
    lines.append(f"matched pairs (MAPSSWE, Gillick & Cox 1989): {test.segments} segments, {outcome}")
    return "".join(f"{line}\n" for line in lines)
