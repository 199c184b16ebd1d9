"""Tables with an utterance in each row, and their audio in files.

| | |
|---|---|
| Common Voice | `validated.tsv`, the audio in `clips`; durations from `clip_durations.tsv`, where that is |
| audio folders of Hugging Face | `metadata.csv` or `metadata.jsonl`, with `file_name` and `transcription` or `text` |
| LJSpeech | `metadata.csv` without a header: name, text and normalized text between `|`, the audio in `wavs` |
| WeNet, west | JSON lines with `wav`, `txt` and mostly `key` |
| FunASR | JSON lines with `source`, `target` and mostly `key` |
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from speechllm.data.manifests.headers import Row, with_durations
from speechllm.data.manifests.lines import numbered_lines, used_lines
from speechllm.data.manifests.rows import AUDIO_COLUMNS, AudioFinder, columns_of, fields_of, name_without_suffix
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, SourceConfig, explain, seconds_of

_DURATIONS = "clip_durations.tsv"
_LJSPEECH = ("file_name", "text", "normalized_text")
_DELIMITERS = ("\t", ",", "|", ";")


def table_objects(files: list[str], source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and NeMo line of every row; the audio is opened where nothing says how long it is."""
    for row in with_durations(row for file in files for row in _table_rows(file, source)):
        yield row.where, row.line


def _table_rows(file: str, source: SourceConfig) -> Iterator[Row]:
    finder = AudioFinder(os.path.dirname(file))
    milliseconds = _clip_durations(Path(file).with_name(_DURATIONS))
    is_json = next(numbered_lines(file), ("", b""))[1].lstrip().startswith(b"{")
    for where, row in used_lines(file) if is_json else _delimited_rows(file, source):
        if isinstance(row, ManifestError):
            yield Row(where, row)
            continue
        try:
            line = _line(row, source, finder)
            if (known := milliseconds.get(str(row.get("path")))) is not None:
                line["duration"] = line.get("duration") or known / 1000
            yield Row(where, line, line["audio_filepath"])
        except LINE_ERRORS as error:
            yield Row(where, ManifestError(f"{where}: {explain(error)}"))


def _line(row: dict[str, Any], source: SourceConfig, finder: AudioFinder) -> dict[str, Any]:
    columns = columns_of(row, source)
    name = row[columns.audio]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{columns.audio}: expected a path, found {name!r}")
    line = {"id": name_without_suffix(name)} | fields_of(row, columns) | {"audio_filepath": finder.path(name)}
    if columns.audio == "wav" and row.get("start") is not None and row.get("end") is not None:  # a part, in WeNet
        start, end = seconds_of(row, "start"), seconds_of(row, "end")
        line |= {"offset": start, "duration": round(end - start, 6)}
    return line


def _delimited_rows(file: str, source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """The rows of a file with tabs, commas or `|`, by the names in its header.

    Raises:
        ManifestError: there is no header that names the audio and the text.
    """
    lines = _Lines(file)
    first = next(lines, "")
    delimiter = "\t" if ".tsv" in Path(file).name else max(_DELIMITERS, key=first.count)
    # where tabs or | are between them, quotes are a part of the text
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter in (",", ";") else csv.QUOTE_NONE
    header = next(csv.reader([first], delimiter=delimiter, quoting=quoting), [])
    if delimiter == "|" and not set(header) & set(AUDIO_COLUMNS):
        header, lines = list(_LJSPEECH[: len(header)]), _Lines(file)
    try:
        columns_of(header, source)
    except ValueError as error:
        raise ManifestError(f"{file}:1: {error}") from error
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield lines.where, ManifestError(f"{lines.where}: {error}")
            continue
        yield lines.where, _named(header, values, lines.where)


def _named(header: list[str], values: list[str], where: str) -> dict[str, str] | ManifestError:
    if len(values) != len(header):
        return ManifestError(f"{where}: {len(values)} columns, and the header has {len(header)}")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return ManifestError(f"{where}: not UTF-8")
    return dict(zip(header, values, strict=True))


class _Lines:
    """The lines of a file as texts, and where the last one was; what is no UTF-8 is escaped."""

    def __init__(self, file: str) -> None:
        self.where = f"{file}:1"
        self._lines = numbered_lines(file)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.where, line = next(self._lines)
        return line.decode(errors="surrogateescape")


def durations_beside(files: list[str]) -> list[Path]:
    """The files with durations of Common Voice that belong to tables."""
    paths = {Path(file).with_name(_DURATIONS) for file in files}
    return sorted(path for path in paths if path.is_file())


def _clip_durations(file: Path) -> dict[str, float]:
    """Milliseconds by the name of the clip, as Common Voice has them since its version 14."""
    durations: dict[str, float] = {}
    if file.is_file():
        for _, line in numbered_lines(str(file)):
            name, _, milliseconds = line.decode(errors="replace").rstrip().partition("\t")
            if milliseconds.replace(".", "", 1).isdigit():  # the header is not
                durations[name] = float(milliseconds)
    return durations
