"""Tar files in which the parts of an utterance follow each other, with one name and several suffixes, as WebDataset and
WeNet's shards have them: the audio, and its text as `.txt` or in a `.json`.

They are given as tar files, or as a list of them (WeNet's `data.list` of the type shard).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from speechllm.data.manifests.headers import Row, with_durations
from speechllm.data.manifests.lines import parse_line
from speechllm.data.manifests.rows import columns_of, fields_of
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, ShardError, SourceConfig, explain
from speechllm.data.manifests.tar import TAR, Member, read_member, scan_tar

_AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "wma", "amr", "webm")


def webdataset_objects(files: list[str], source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:NAME and NeMo line of every utterance, with where its audio is; that is read where nothing says how long it
    is."""
    for row in with_durations(row for file in files for row in _rows(file, source)):
        yield row.where, row.line


def _rows(file: str, source: SourceConfig) -> Iterator[Row]:
    try:
        for name, members in itertools.groupby(scan_tar(file), lambda member: _split(member["name"])[0]):
            where = f"{file}:{name}"
            try:
                yield _row(where, {_split(member["name"])[1]: member for member in members}, name, source)
            except LINE_ERRORS as error:
                yield Row(where, ManifestError(f"{where}: {explain(error)}"))
    except (ManifestError, OSError) as error:
        yield Row(file, ShardError(str(error)))


def _split(name: str) -> tuple[str, str]:
    """What the parts of an utterance have in common, and the suffix: a name may have dots, as WeNet has it."""
    stem, suffix = os.path.splitext(name)
    return stem.removeprefix("./"), suffix.removeprefix(".").lower()


def _row(where: str, parts: dict[str, Member], name: str, source: SourceConfig) -> Row:
    audio = next((parts[suffix] for suffix in parts if suffix in _AUDIO_SUFFIXES), None)
    if audio is None:
        raise ValueError(f"no audio ({', '.join(_AUDIO_SUFFIXES)}) among {', '.join(parts)}")
    if parts.keys().isdisjoint(("txt", "json")):
        raise ValueError(f"no text (txt, json) among {', '.join(parts)}")
    said = parse_line(read_member(parts["json"])) if "json" in parts else {}
    if "txt" in parts:
        said |= {"text": read_member(parts["txt"]).decode().strip()}
    fields = fields_of(said, columns_of(said, source, audio=""))
    line = {"id": name} | fields | {"audio_filepath": audio["name"], TAR: {"recording": audio}}
    return Row(where, line, read_member(audio) if fields.get("duration") is None else b"")
