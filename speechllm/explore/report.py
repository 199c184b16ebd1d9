"""Results, manifests and a second system as a page, and the data that it shows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from speechllm.data.manifests.manifest import LINE_ERRORS, SourceConfig, explain, to_cut
from speechllm.errors import UserError
from speechllm.explore.clips import AudioMode, make_clips
from speechllm.files import describe_write_error, replaced_file
from speechllm.scoring.command import comparison_text, read_results
from speechllm.scoring.counting import UNITS, ErrorReport, Transcript, align, count_pairs
from speechllm.scoring.reading import read_lines, read_objects
from speechllm.scoring.reports import UNKNOWN, grouped
from speechllm.scoring.significance import compare, confidence_interval, resampled_by
from speechllm.scoring.text_files import Line
from speechllm.text.normalize import check_steps, normalize_text

_PAGE = ("index.html", "page.css", "page.js")


@dataclass(frozen=True)
class ExploreOptions:
    """What a page is made of, besides the results.

    Attributes:
        manifests: audio, languages, speakers, durations, and references of results that hold none; these are of one
            set, or there is a manifest for each.
        compare_with: the results of a second system: as many, in the same order.
        unit: `word`, `char` or `mixed`.
        text_steps: of both sides (see `speechllm.text.normalize`).
        audio: see `speechllm.explore.clips.make_clips`.
        missing_as_empty: where there is no hypothesis, nothing was recognized.
    """

    manifests: Sequence[Path] = ()
    compare_with: Sequence[Path] = ()
    unit: str = "word"
    text_steps: Sequence[str] = ()
    audio: AudioMode = "link"
    missing_as_empty: bool = False


@dataclass(frozen=True)
class _Set:
    """The results of a test set, the first system's and the second's, with the JSON objects of each utterance; of a
    manifest alone `systems` is empty."""

    name: str
    results: list[Transcript]
    systems: list[list[Transcript]]
    found: list[dict[str, tuple[dict, SourceConfig]]]
    described: dict[str, tuple[dict, SourceConfig]]


def write_report(results: Sequence[Path], output: Path, options: ExploreOptions) -> str:
    """Write the page: `index.html` to open, its style and script, `data.js`, and `audio/` where audio is copied.

    Args:
        results: of one system. Files as `speechllm score` reads them, those of one test set each; folders with
            `recogs-*.txt`, each a test set; manifests alone, whose data is shown.
        output: the folder; what is there of an earlier page is replaced.

    Returns:
        What was found, in a line.

    Raises:
        UserError: files cannot be read or do not match, or the page cannot be written.
    """
    try:
        check_steps(options.text_steps)
    except ValueError as error:
        raise UserError(str(error)) from error
    sets = _read_sets(results, options)
    data = _page_data(sets, _system_names(results, options.compare_with), options)
    numbered = list(enumerate((part, result.id) for part in sets for result in part.results))
    cuts = ((number, cut) for number, (part, id) in numbered if (cut := _cut(part, id)) is not None)
    try:
        clips = dict(make_clips(cuts, output, options.audio))
        for number, clip in clips.items():
            data["utterances"][number]["audio"] = dataclasses.asdict(clip)
        _write(output / "data.js", f"globalThis.REPORT = JSON.parse({json.dumps(_json(data))});\n")
        for name in _PAGE:
            page = resources.files("speechllm.explore").joinpath("page").joinpath(name)
            _write(output / name, page.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(describe_write_error(output, error)) from error
    rates = "".join(f"; {data['rate']} {total}" for total in data["totals"])
    return f"{len(numbered)} utterances, {len(clips)} with audio{rates}"


def _read_sets(results: Sequence[Path], options: ExploreOptions) -> list[_Set]:
    files, others = _result_files(results), _result_files(options.compare_with)
    names = [_set_name(path) for path in files]
    if len(set(names)) < len(names):  # of several systems or epochs
        names = [f"{path.parent.name}/{name}" for path, name in zip(files, names, strict=True)]
    if others and len(others) != len(files):
        raise UserError(
            f"--compare: {len(others)} files for {len(files)} of results; name one for each, in their order"
        )
    seconds: Sequence[Path | None] = others or [None] * len(files)
    described = [read_objects(path) for path in options.manifests]
    sets = []
    for number, (name, path, other) in enumerate(zip(names, files, seconds, strict=True)):
        own = slice(number, number + 1) if len(files) == len(options.manifests) else slice(None)
        describing = {id: found for objects in described[own] for id, found in objects.items()}
        sets.append(_read_set(name, path, options.manifests[own], describing, other, options))
    if bare := [path for path, part in zip(files, sets, strict=True) if not part.systems]:
        if len(bare) < len(files):
            raise UserError(
                f"{bare[0]}: holds no references and hypotheses, as others do; say what it is of: --manifest"
            )
        if others:
            raise UserError(f"{bare[0]}: holds references only: there is nothing to compare --compare with")
    return sets


def _system_names(first: Sequence[Path], second: Sequence[Path]) -> list[str]:
    """What is given of each system, without the folders that all of it is in, where there are two."""
    shared = os.path.commonpath([os.path.abspath(path) for path in (*first, *second)]) if second else ""
    names = [[os.path.relpath(path, shared) if shared else str(path) for path in paths] for paths in (first, second)]
    return [", ".join(paths) for paths in names if paths]


def _result_files(paths: Sequence[Path]) -> list[Path]:
    """The paths, and in place of folders with them, all `recogs-*.txt`."""
    return [file for path in paths for file in sorted(path.glob("recogs-*.txt")) or [path]]


def _set_name(path: Path) -> str:
    name = path.name or path.resolve().name
    for ending in ("", *path.suffixes[::-1]):
        name = name.removesuffix(ending)
    return name.removeprefix("recogs-")


def _read_set(
    name: str,
    path: Path,
    manifests: Sequence[Path],
    described: dict[str, tuple[dict, SourceConfig]],
    other: Path | None,
    options: ExploreOptions,
) -> _Set:
    lines = read_lines(path)
    hyp: Path | None
    found = [read_objects(file) for file in (path, other) if file is not None]
    if any(line.predicted is not None for line in lines.values()):
        refs, hyp = [path], None
    elif manifests:
        refs, hyp = list(manifests), path
    else:
        if not lines:
            raise UserError(f"{path}: holds no utterances")
        return _Set(name, [_said(line, options.text_steps) for line in lines.values()], [], found, {})
    says = manifests if hyp is None else ()
    first, second = read_results(refs, hyp, options.text_steps, says, other, options.missing_as_empty)
    return _Set(name, first, [first, second] if second is not None else [first], found, described)


def _said(line: Line, text_steps: Sequence[str]) -> Transcript:
    text = normalize_text(line.text or "", text_steps, line.written_language)
    return Transcript(line.id, text, "", line.language, line.speaker, line.duration)


def _cut(part: _Set, id: str) -> Cut | None:
    """The audio of an utterance, as a manifest or the result says; None where neither does."""
    for objects in (part.described, *part.found):
        obj, source = objects.get(id, ({}, SourceConfig(part.name)))
        if "segments" in obj and isinstance(obj.get("audio"), str):  # what `speechllm transcribe` writes
            obj = {"id": id, "audio_filepath": obj["audio"], "duration": obj["duration"]}
        if "audio_filepath" in obj or "type" in obj:
            try:
                return to_cut(obj, source)
            except LINE_ERRORS as error:
                raise UserError(f"{source.path}: {id}: {explain(error)}") from error
    return None


def _page_data(sets: Sequence[_Set], names_of_systems: Sequence[str], options: ExploreOptions) -> dict[str, Any]:
    """What the page shows; `page.js` says nothing of it again."""
    split, plural, rate = UNITS[options.unit]
    names = [part.name for part in sets for _ in part.results]
    results = [result for part in sets for result in part.results]
    systems = [[r for system in found for r in system] for found in zip(*(part.systems for part in sets), strict=True)]
    aligned = [[align(split(r.ref), split(r.hyp)) for r in system] for system in systems]
    reports = [[count_pairs(pairs) for pairs in system] for system in aligned]
    objects = [(part.found, result.id) for part in sets for result in part.results]
    utterances = []
    for number, result in enumerate(results):
        found, id = objects[number]
        utterances.append(
            {
                "id": id,
                "set": names[number],
                "language": result.language,
                "speaker": result.speaker,
                "duration": result.duration,
                "ref": result.ref,
                "units": len(split(result.ref)),
                "characters": len(result.ref.replace(" ", "")),
                "systems": [
                    _recognized(aligned[i][number], reports[i][number], found[i].get(id, ({},))[0])
                    for i in range(len(systems))
                ],
            }
        )
    return {
        "rate": rate,
        "units": plural,
        "joined": "" if options.unit == "char" else " ",
        "systems": names_of_systems[: len(systems)],
        "totals": [str(sum(counted, ErrorReport())) for counted in reports],
        "comparison": _comparison(systems, names_of_systems, options) if len(systems) > 1 else None,
        "groups": _groups(results, names, reports),
        "utterances": utterances,
    }


def _recognized(pairs: list[tuple[str | None, str | None]], report: ErrorReport, obj: dict) -> dict[str, Any]:
    """One system's result of an utterance. Of pairs, those that are right are one text. Confidences, words and
    alternatives are those of `speechllm transcribe --format json`."""
    segments: list[dict] = obj["segments"] if isinstance(obj.get("segments"), list) else []
    words = [word for segment in segments for word in segment.get("words") or ()]
    return {
        "pairs": [ref if ref == hyp else [ref, hyp] for ref, hyp in pairs],
        "errors": [report.insertions, report.deletions, report.substitutions],
        "confidence": obj.get("confidence"),
        "words": [[word["word"], word["start"], word["end"], word["confidence"]] for word in words],
        "nbest": [[[h["text"], h["confidence"]] for h in s["nbest"]] for s in segments if s.get("nbest")],
        "notes": [s["fallback"] for s in segments if s.get("fallback")] + list(obj.get("warnings") or ()),
    }


def _groups(
    results: Sequence[Transcript], names: Sequence[str], reports: Sequence[Sequence[ErrorReport]]
) -> dict[str, list[dict[str, Any]]]:
    """The utterances of each group, by number, and the bounds of each system's error rate."""
    by_set: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        by_set.setdefault(name, []).append(number)
    found = {"set": by_set | {"all": list(range(len(results)))}}
    for by in ("language", "speaker", "duration"):
        if set(groups := grouped(results, by)) - {UNKNOWN}:
            found[by] = groups
    return {
        by: [
            {
                "name": name,
                "members": members,
                "bounds": [
                    confidence_interval([results[i] for i in members], [counted[i] for i in members])
                    for counted in reports
                ],
            }
            for name, members in groups.items()
        ]
        for by, groups in found.items()
    }


def _comparison(systems: Sequence[Sequence[Transcript]], names: Sequence[str], options: ExploreOptions) -> str:
    first, second = systems
    found = compare(first, second, UNITS[options.unit])
    return comparison_text(found, names[0], names[1], options.unit, resampled_by(first))


def _json(data: dict[str, Any]) -> str:
    """JSON without numbers that are not finite, which browsers do not read."""

    def valid(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: valid(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [valid(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(valid(data), separators=(",", ":"))


def _write(path: Path, text: str) -> None:
    with replaced_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
