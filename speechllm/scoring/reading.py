"""The files that `speechllm score` reads: what was said, what was recognized, or both."""

from __future__ import annotations

import ast
import codecs
import gzip
import itertools
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from speechllm.data.manifests.lines import numbered_lines
from speechllm.data.manifests.manifest import LINE_ERRORS, ManifestError, SourceConfig, describe, explain, iter_objects
from speechllm.data.manifests.nemo import is_nemo
from speechllm.data.manifests.source import string_of
from speechllm.errors import UserError
from speechllm.scoring.counting import Transcript, language_label, normalized_hotwords
from speechllm.scoring.text_files import (
    Line,
    assign_words,
    read_ctm,
    read_stm,
    read_subtitles,
    read_table,
    read_textgrid,
    read_trn,
)
from speechllm.text.normalize import normalize_text

_RECOGS_LINE = re.compile(r"([^\t]*):\t(ref|hyp)=(\[.*\])\s*")
# One of these is in all JSON lines that have a reference, if only an empty one.
_HOLDS_TEXT = frozenset(["text", "supervisions", "tracks"])
_LISTED = 5
# A word that begins the line of a .txt file, and is an id: digits and more than that, or many digits.
_ID = re.compile(r"(?=.*\d).*[^\d.,:/].*|\d{4,}")


# What `speechllm transcribe --output` writes, a file for each recording; of several the first of these is read.
_TRANSCRIBED = (".json", ".jsonl", ".ctm", ".TextGrid", ".tsv", ".vtt", ".srt", ".txt")
# What it notes of them beside them.
_INDEXES = ".transcribed*.jsonl"


def read_lines(path: Path) -> dict[str, Line]:
    """The utterances of a file by their ids, in its order.

    Its form is told by the suffix, or else by the first line: `recogs-*` files as icefall and recipes/decode.py write
    them; JSON (lines, an array, or one object) with `text` (NeMo manifests, where `pred_text` is what was recognized,
    lhotse cuts, what `speechllm transcribe` writes, or just `id` and `text`); NIST's `.trn`, `.ctm` and `.stm`;
    `.srt`, `.vtt` and `.TextGrid`; `.parquet` and `.arrow`; `.csv` and `.tsv` with a header; and Kaldi's `text`, an id
    and words. A directory is a manifest in Kaldi's or Shar's form, or holds a file for each recording as `speechllm
    transcribe` writes them.
    Without an `id`, that of a JSON line comes from its `audio_filepath`, as everywhere
    (`speechllm.data.manifests.nemo`).

    Raises:
        UserError: the file, or a line of it, cannot be read, or an id comes twice.
    """
    if path.is_dir() and (files := _transcribed_files(path)):
        return _by_id(
            (where, replace(line, id=path_id) if suffix != ".json" and line.words is None else line)
            for file, suffix in files
            for path_id in [file.relative_to(path).with_suffix("").as_posix()]
            for where, line in (_whole_text(file, path_id) if suffix == ".txt" else _lines_of(file))
        )
    return _by_id(_lines_of(path))


def read_all(paths: Sequence[Path]) -> dict[str, Line]:
    """The utterances of several files; see `read_lines`.

    Raises:
        UserError: as `read_lines`; an id is in two of them.
    """
    return _by_id((str(path), line) for path in paths for line in read_lines(path).values())


def read_pair(ref: Path, hyp: Path) -> tuple[dict[str, Line], dict[str, Line]]:
    """The utterances of two files that belong together; see `read_lines`.

    Plain texts have no ids. Two of them that have as many lines are compared line by line, unless their lines begin
    with ids as Kaldi's do: the same ones in both files, and in `.txt` files with digits and letters in each. What is
    one line, or one recording, in the other file is one text, whatever its lines. The words of a `.ctm` file go to the
    segments of an `.stm` file by their times.

    Raises:
        UserError: as `read_lines`.
    """
    ref_texts, hyp_texts = (all_lines(path) if _may_be_plain(path) else None for path in (ref, hyp))
    if ref_texts and hyp_texts is not None and not _is_kaldi((ref_texts, hyp_texts), (ref, hyp)):
        lengths = len(ref_texts), len(hyp_texts)
        if lengths[0] != lengths[1] and 1 in lengths:
            return _by_id(_whole_text(ref, ref.stem)), _by_id(_whole_text(hyp, ref.stem))
        if lengths[0] != lengths[1]:
            raise UserError(
                f"{ref} has {lengths[0]} lines, {hyp} {lengths[1]}: plain texts are compared line by line; give "
                "every line its id in front, the same in both files, or put one side into one line to compare all of it"
            )
        refs, hyps = (
            {f"line-{n}": Line(f"line-{n}", text) for n, (_, text) in enumerate(texts, 1)}
            for texts in (ref_texts, hyp_texts)
        )
        return refs, hyps
    refs, hyps = (read_lines(path) for path in (ref, hyp))
    if any(line.span for line in refs.values()):
        refs, hyps = _of_segments(refs, hyps, hyp)
    if hyp_texts is not None and len(refs) == 1 and not refs.keys() & hyps.keys():
        (id,) = refs
        hyps = _by_id(_whole_text(hyp, id))
    elif ref_texts and len(hyps) == 1 and not refs.keys() & hyps.keys():
        (id,) = hyps
        refs = _by_id(_whole_text(ref, id))
    if len(refs) == len(hyps) == 1 and {ref.suffix, hyp.suffix} & _ONE_RECORDING:  # named after their files
        (id,), (line,) = refs, hyps.values()
        hyps = {id: replace(line, id=id)}
    return refs, hyps


def _of_segments(
    refs: dict[str, Line], hyps: dict[str, Line], hyp_path: Path
) -> tuple[dict[str, Line], dict[str, Line]]:
    """Segments of recordings with the words that were recognized in them, or whole recordings where there are no times
    of words. What is said in segments that do not count is left out."""
    counted = {id: line for id, line in refs.items() if line.text is not None}
    if all(line.words for line in hyps.values()):
        found, unknown = assign_words(refs.values(), hyps.values())
        if unknown:
            names = listed([line.id for line in unknown])
            raise UserError(f"{hyp_path}: {len(unknown)} recordings that the references have no segment of: {names}")
        return counted, {id: found[id] for id in counted}
    if hyps.keys() & refs.keys():
        return counted, {id: line for id, line in hyps.items() if id in counted or id not in refs}
    of_recording: dict[str, list[str]] = defaultdict(list)
    segments = [(line.span, line.text) for line in refs.values() if line.span is not None]
    for span, text in sorted(segments, key=lambda segment: segment[0].start):
        if text is None:
            raise UserError(
                f"{hyp_path}: has no times of words, and in {span.recording} from {span.start} s on "
                "nothing is to be scored: a ctm file is needed"
            )
        of_recording[span.recording].append(text)
    return {id: Line(id, " ".join(texts)) for id, texts in of_recording.items()}, hyps


def all_lines(path: Path) -> list[tuple[str, str]]:
    """FILE:LINE and the text of each line, blank ones too; unpacked if packed by gzip.

    Raises:
        UserError: the file cannot be read, or is neither UTF-8 nor UTF-16 with its mark.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8: {error}") from error
    lines = re.split("\r\n|\n", text)  # and nothing else: a text may have other white space
    if not lines[-1]:
        lines.pop()
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]


def _lines_of(path: Path) -> Iterator[tuple[str, Line]]:
    if _json_form(path) is not None:
        return _json_lines(path)
    kind = _suffix(path)
    lines = all_lines(path)
    if kind in _READERS:
        return _READERS[kind](lines)
    if kind in (".csv", ".tsv"):
        header = lines[0][1] if lines else ""
        delimiter = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
        return read_table(lines, path.stem, delimiter)
    if kind in (".srt", ".vtt"):
        return read_subtitles(lines, path.stem)
    if kind == ".textgrid":
        return read_textgrid(lines, path.stem)
    lines = [(where, text) for where, text in lines if text.strip()]
    if lines and _RECOGS_LINE.fullmatch(lines[0][1]):
        return iter(_recogs(lines).items())
    return ((where, Line(id, " ".join(rest))) for where, text in lines for id, *rest in [text.split(maxsplit=1)])


_READERS: dict[str, Callable[[Sequence[tuple[str, str]]], Iterator[tuple[str, Line]]]] = {
    ".trn": read_trn,
    ".ctm": read_ctm,
    ".stm": read_stm,
}
# Told by their suffix; all others by their first line.
_TEXT_KINDS = {*_READERS, ".csv", ".tsv", ".srt", ".vtt", ".textgrid"}
# Files of one recording, which have no other name for it than their own.
_ONE_RECORDING = {".srt", ".vtt", ".tsv", ".TextGrid", ".txt", ".json"}


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _first_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Of a file that may be long, and of which the rest is read as something else."""
    for where, line in numbered_lines(str(path)):
        yield where, line.decode(errors="replace").removeprefix("\ufeff")


def _whole_text(path: Path, id: str) -> Iterator[tuple[str, Line]]:
    yield str(path), Line(id, " ".join(text.strip() for _, text in all_lines(path)))


def _transcribed_files(folder: Path) -> list[tuple[Path, str]]:
    """The files of recordings in a folder and those below, and their suffix; none of Kaldi's or Shar's directories."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.match(_INDEXES))
    if any(path.name == "text" or path.name.startswith("cuts.") for path in files):
        return []
    found = next((suffix for suffix in _TRANSCRIBED if any(path.suffix == suffix for path in files)), None)
    return [(path, found) for path in files if found is not None and path.suffix == found]


def _may_be_plain(path: Path) -> bool:
    """Whether a file holds nothing but lines of text, with ids or without."""
    if not path.is_file() or _suffix(path) in _TEXT_KINDS:
        return False
    first = next((text for _, text in _first_lines(path)), "")
    return not first.lstrip().startswith(("{", "[{")) and first.strip() != "[" and not _RECOGS_LINE.fullmatch(first)


def _is_kaldi(texts: Sequence[Sequence[tuple[str, str]]], paths: tuple[Path, Path]) -> bool:
    """Whether the lines of two files begin with ids; see `read_pair`."""
    refs, hyps = ([text.split(maxsplit=1)[0] for _, text in lines if text.strip()] for lines in texts)
    shared = set(refs) & set(hyps)
    if not refs or not hyps or 2 * len(shared) < min(len(refs), len(hyps)) or len(set(refs)) < 0.9 * len(refs):
        return False
    return all(_suffix(path) != ".txt" for path in paths) or all(map(_ID.fullmatch, shared))


def matched(
    refs: dict[str, Line],
    hyps: dict[str, Line],
    names: tuple[Path, Path],
    text_steps: Sequence[str],
    missing_as_empty: bool,
) -> list[Transcript]:
    """References with the hypotheses of the same id, normalized alike, in the order of the references.

    Args:
        refs, hyps: of `read_lines`; may be the same.
        names: the files that they are from, for errors.
        text_steps: see `speechllm.text.normalize`.
        missing_as_empty: where there is no hypothesis, nothing was recognized.

    Raises:
        UserError: a reference has no hypothesis, or the other way round.
    """
    ref_name, hyp_name = names
    if not refs:
        raise UserError(f"{ref_name}: holds no utterances")
    has_predictions = any(line.predicted is not None for line in hyps.values())
    if refs is hyps and not has_predictions:
        raise UserError(f"{ref_name}: holds references only (neither hyp= nor pred_text); name the hypotheses after it")
    found = {
        id: text for id, line in hyps.items() if (text := line.predicted if has_predictions else line.text) is not None
    }
    complaints = []
    unrecognized = [id for id in refs if id not in found]
    if unrecognized and not missing_as_empty:
        complaints.append(
            f"{hyp_name}: no hypothesis for {len(unrecognized)} of the {len(refs)} utterances of {ref_name} "
            f"(with --missing-as-empty all of their words are deletions): {listed(unrecognized)}"
        )
    if unknown := [id for id in found if id not in refs]:
        complaints.append(f"{hyp_name}: {len(unknown)} utterances that {ref_name} does not have: {listed(unknown)}")
    if without := [id for id, line in refs.items() if line.text is None]:
        complaints.append(f"{ref_name}: {len(without)} utterances without a reference: {listed(without)}")
    if complaints:
        raise UserError("\n".join(complaints))
    return [
        Transcript(
            id,
            normalize_text(line.text or "", text_steps, line.written_language),
            normalize_text(found.get(id, ""), text_steps, line.written_language),
            line.language,
            line.speaker,
            line.duration,
            hotwords=normalized_hotwords(line.hotwords, text_steps, line.written_language),
        )
        for id, line in refs.items()
    ]


def with_manifest(
    results: Iterable[Transcript], paths: Sequence[Path], text_steps: Sequence[str] = ()
) -> list[Transcript]:
    """The results with language, speaker, duration and hotwords as manifests say.

    Args:
        text_steps: of the hotwords.

    Raises:
        UserError: they cannot be read, or do not have all of the ids.
    """
    lines, results = read_all(paths), list(results)
    if unknown := [result.id for result in results if result.id not in lines]:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: does not have {len(unknown)} of the {len(results)} utterances: {listed(unknown)}")
    return [
        replace(
            result,
            language=line.language,
            speaker=line.speaker,
            duration=line.duration,
            hotwords=normalized_hotwords(line.hotwords, text_steps, line.written_language),
        )
        for result in results
        for line in [lines[result.id]]
    ]


def listed(ids: Sequence[str]) -> str:
    """The first ids, for errors."""
    return ", ".join(ids[:_LISTED]) + (f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else "")


def _by_id(lines: Iterable[tuple[str, Line]]) -> dict[str, Line]:
    found: dict[str, Line] = {}
    for where, line in lines:
        if line.id in found:
            raise UserError(f"{where}: the id {line.id} is there for the second time")
        found[line.id] = line
    return found


def _recogs(texts: Iterable[tuple[str, str]]) -> dict[str, Line]:
    sides: dict[str, dict[str, str]] = {}
    for where, text in texts:
        try:
            id, side, listed = cast(re.Match, _RECOGS_LINE.fullmatch(text)).groups()
            words = " ".join(ast.literal_eval(listed))
        except (AttributeError, SyntaxError, TypeError, ValueError) as error:
            raise UserError(f"{where}: expected ID:<tab>ref=['a', 'word'] or ID:<tab>hyp=[...]") from error
        if side in sides.setdefault(id, {}):
            raise UserError(f"{where}: {side} of the id {id} is there for the second time")
        sides[id][side] = words
    return {id: Line(id, found.get("ref"), found.get("hyp")) for id, found in sides.items()}


def read_objects(path: Path) -> dict[str, tuple[dict, SourceConfig]]:
    """The JSON objects of the utterances by their ids, as they are, and where they are from; none of a file of another
    form. `to_cut` makes cuts of those that are lines of a manifest.

    Raises:
        UserError: as `read_lines`.
    """
    files = [file for file, _ in _transcribed_files(path)] if path.is_dir() else []
    return {
        _json_line(obj, source).id: (obj, source)
        for file in files or [path]
        if _json_form(file) is not None
        for _, obj, source in _json_objects(file)
    }


def _json_form(path: Path) -> str | None:
    """`lines` (a manifest in a folder, too), `array` (or one object, over any number of lines), or None: no JSON."""
    if path.is_dir() or not path.is_file() or _suffix(path) in (".parquet", ".arrow"):
        return "lines"
    if _suffix(path) in _TEXT_KINDS:
        return None
    first, second = ([text.strip() for _, text in itertools.islice(_first_lines(path), 2)] + ["", ""])[:2]
    if first.startswith("[") or first == "{" or (first.startswith("{") and _suffix(path) == ".json" and not second):
        return "array"
    return "lines" if first.startswith("{") else None


def _json_lines(path: Path) -> Iterator[tuple[str, Line]]:
    for where, obj, source in _json_objects(path):
        try:
            yield where, _json_line(obj, source)
        except LINE_ERRORS as error:
            raise UserError(f"{where}: {explain(error)}") from error


def _json_objects(path: Path) -> Iterator[tuple[str, dict, SourceConfig]]:
    source = SourceConfig(str(path))
    if _json_form(path) == "array":
        yield from _array_objects(path, source)
        return
    for where, obj in iter_objects(source):
        if isinstance(obj, ManifestError):
            raise obj
        yield where, obj, source


def _array_objects(path: Path, source: SourceConfig) -> Iterator[tuple[str, dict, SourceConfig]]:
    try:
        found = json.loads("\n".join(text for _, text in all_lines(path)))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    for number, obj in enumerate(found if isinstance(found, list) else [found], 1):
        where = f"{path}: object {number}"
        if not isinstance(obj, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(obj).__name__}")
        if isinstance(found, dict):  # of one recording, as openai/whisper writes it
            obj = {"id": path.stem, **obj}
        yield where, obj, source


def _json_line(obj: dict, source: SourceConfig) -> Line:
    obj = {name: value for name, value in obj.items() if name != "duration" or value is not None}
    complete = obj
    if "type" not in obj:
        if obj.get("id") is None and not is_nemo(obj):
            raise ValueError("neither an id nor an audio_filepath")
        # transcripts without audio need neither path nor duration
        complete = {"audio_filepath": str(obj.get("id")), "duration": 1.0} | obj
    entry = describe(complete, source)
    speakers = (string_of(part, "speaker") for part in itertools.chain([obj], obj.get("supervisions") or []))
    return Line(
        entry.id,
        entry.target if entry.target or any(obj.get(name) is not None for name in _HOLDS_TEXT) else None,
        string_of(obj, "pred_text"),
        language_label(entry.request),
        next(filter(None, speakers), None),
        entry.duration if complete is obj or "duration" in obj else None,
        hotwords=entry.hotwords,
    )
