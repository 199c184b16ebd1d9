"""The files that `speechllm score` reads: what was said, what was recognised, or both."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from speechllm.data.manifests.lines import numbered_lines
from speechllm.data.manifests.manifest import LINE_ERRORS, ManifestError, SourceConfig, describe, explain, iter_objects
from speechllm.data.manifests.nemo import is_nemo
from speechllm.data.manifests.source import string_of
from speechllm.errors import UserError
from speechllm.scoring.counting import Transcript, language_label
from speechllm.text.normalize import normalize_text

_RECOGS_LINE = re.compile(r"([^\t]*):\t(ref|hyp)=(\[.*\])\s*")
# One of these is in all JSON lines that have a reference, if only an empty one.
_HOLDS_TEXT = frozenset(["text", "supervisions", "tracks"])
_LISTED = 5


@dataclass(frozen=True)
class Line:
    """What a file says of an utterance. `predicted`: what was recognised, where the file also has room for a reference;
    `duration` in seconds."""

    id: str
    text: str | None = None
    predicted: str | None = None
    language: str | None = None
    speaker: str | None = None
    duration: float | None = None

    @property
    def written_language(self) -> str | None:
        """Of the text: `language` is en>de of translations into German."""
        return None if self.language is None else self.language.rpartition(">")[2]


def read_lines(path: Path) -> dict[str, Line]:
    """The utterances of a file by their ids, in its order.

    Of four kinds, told apart by the first line: `recogs-*` files as icefall and recipes/decode.py write them; JSON
    lines with `text` (NeMo manifests, where `pred_text` is what was recognised, lhotse cuts, or just `id` and `text`);
    and Kaldi's `text`, an id and words. A directory is a manifest in Kaldi's or Shar's form. Without an `id`, that of
    a JSON line comes from its `audio_filepath`, as everywhere (`speechllm.data.manifests.nemo`).

    Raises:
        UserError: the file, or a line of it, cannot be read, or an id comes twice.
    """
    _, first = next(numbered_lines(str(path)), ("", b"")) if path.is_file() else ("", b"")
    if not path.is_file() or first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return _by_id(_json_lines(path))
    texts = list(_decoded(path))
    if texts and _RECOGS_LINE.fullmatch(texts[0][1]):
        return _recogs(texts)
    return _by_id((where, Line(id, " ".join(rest))) for where, text in texts for id, *rest in [text.split(maxsplit=1)])


def matched(
    refs: dict[str, Line],
    hyps: dict[str, Line],
    names: tuple[Path, Path],
    text_steps: Sequence[str],
    missing_as_empty: bool,
) -> list[Transcript]:
    """References with the hypotheses of the same id, normalised alike, in the order of the references.

    Args:
        refs, hyps: of `read_lines`; may be the same.
        names: the files that they are from, for errors.
        text_steps: see `speechllm.text.normalize`.
        missing_as_empty: where there is no hypothesis, nothing was recognised.

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
    unrecognised = [id for id in refs if id not in found]
    if unrecognised and not missing_as_empty:
        complaints.append(
            f"{hyp_name}: no hypothesis for {len(unrecognised)} of the {len(refs)} utterances of {ref_name} "
            f"(with --missing-as-empty all of their words are deletions): {listed(unrecognised)}"
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
            normalize_text(line.text, text_steps, line.written_language),
            normalize_text(found.get(id, ""), text_steps, line.written_language),
            line.language,
            line.speaker,
            line.duration,
        )
        for id, line in refs.items()
    ]


def with_manifest(results: Iterable[Transcript], path: Path) -> list[Transcript]:
    """The results with language, speaker and duration as a manifest says.

    Raises:
        UserError: it cannot be read, or does not have all of their ids.
    """
    lines, results = read_lines(path), list(results)
    if unknown := [result.id for result in results if result.id not in lines]:
        raise UserError(f"{path}: does not have {len(unknown)} of the {len(results)} utterances: {listed(unknown)}")
    return [
        replace(result, language=line.language, speaker=line.speaker, duration=line.duration)
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


def _decoded(path: Path) -> Iterator[tuple[str, str]]:
    for where, line in numbered_lines(str(path)):
        try:
            yield where, line.decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8: {error}") from error


def _recogs(texts: Iterable[tuple[str, str]]) -> dict[str, Line]:
    sides: dict[str, dict[str, str]] = {}
    for where, text in texts:
        try:
            id, side, listed = _RECOGS_LINE.fullmatch(text).groups()
            words = " ".join(ast.literal_eval(listed))
        except (AttributeError, SyntaxError, TypeError, ValueError) as error:
            raise UserError(f"{where}: expected ID:<tab>ref=['a', 'word'] or ID:<tab>hyp=[...]") from error
        if side in sides.setdefault(id, {}):
            raise UserError(f"{where}: {side} of the id {id} is there for the second time")
        sides[id][side] = words
    return {id: Line(id, found.get("ref"), found.get("hyp")) for id, found in sides.items()}


def _json_lines(path: Path) -> Iterator[tuple[str, Line]]:
    source = SourceConfig(str(path))
    for where, obj in iter_objects(source):
        if isinstance(obj, ManifestError):
            raise obj
        try:
            yield where, _json_line(obj, source)
        except LINE_ERRORS as error:
            raise UserError(f"{where}: {explain(error)}") from error


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
        entry.target if entry.target or not _HOLDS_TEXT.isdisjoint(obj) else None,
        string_of(obj, "pred_text"),
        language_label(entry.lang, entry.target_lang if entry.task == "ast" else None),
        next(filter(None, speakers), None),
        entry.duration if complete is obj or "duration" in obj else None,
    )
