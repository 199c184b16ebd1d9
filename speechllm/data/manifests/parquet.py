"""Parquet and Arrow files with an utterance in each row, as Hugging Face datasets has them on the Hub and on disk.

The audio is in the rows (`audio` with `bytes` and `path`, or its contents alone), or in files that the rows name. It
stays there: the lines of the index say where. In an Arrow file, which is not compressed, that is a place in the file as
in a tar file, and pyarrow is not needed to read it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechllm.data.manifests.headers import Row, with_durations
from speechllm.data.manifests.row_groups import group_batches, import_pyarrow, open_parquet
from speechllm.data.manifests.rows import AudioFinder, Columns, columns_of, fields_of, name_without_suffix
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, ShardError, SourceConfig, explain
from speechllm.data.manifests.tar import TAR, Member, RowMember, read_member
from speechllm.errors import UserError

_ARROW_FILE = b"ARROW1"
# To read one row, half of its group is read on average.
_LARGE_GROUP_BYTES = 256 << 20


@dataclass(frozen=True)
class _Table:
    """A file that is being read: its columns, and what finds the audio that is elsewhere."""

    path: str
    columns: Columns
    is_struct: bool
    reads_audio: bool
    finder: AudioFinder


def row_objects(files: list[str], source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:row NUMBER and NeMo line of every row, with where its audio is; that is read where no column `duration` says
    how long it is."""
    for row in with_durations(row for file in files for row in table_rows(file, source)):
        yield row.where, row.line


def table_rows(path: str, source: SourceConfig, with_audio: bool = False) -> Iterator[Row]:
    """The rows of a file, with the contents of their audio `with_audio`, or where nothing says how long it is."""
    pyarrow = import_pyarrow(path)
    try:
        if ".parquet" in os.path.basename(path):
            yield from _parquet_rows(path, source, with_audio)
        else:
            yield from _arrow_rows(path, source, with_audio)
    except (UserError, MemoryError):
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        yield Row(path, ShardError(f"{path}: cannot be read to its end: {first}"))


def _table(path: str, schema: Any, source: SourceConfig, with_audio: bool) -> _Table:
    """What the columns of a file are.

    Raises:
        ManifestError: none has the audio, or the text.
    """
    types = import_pyarrow(path).types
    structs = [field.name for field in schema if types.is_struct(field.type) and _has_bytes(field.type)]
    try:
        columns = columns_of(schema.names, source, structs[0] if len(structs) == 1 else None)
        kind = schema.field(columns.audio).type
        is_text = types.is_string(kind) or types.is_large_string(kind)
        is_binary = types.is_binary(kind) or types.is_large_binary(kind)
        if not (columns.audio in structs or is_text or is_binary):
            raise ValueError(f"{columns.audio}: expected paths, or the contents of audio files, found {kind}")
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from error
    reads_audio = with_audio or "duration" not in columns.fields
    return _Table(path, columns, columns.audio in structs, reads_audio, AudioFinder(os.path.dirname(path)))


def _has_bytes(kind: Any) -> bool:
    names = {kind.field(i).name for i in range(kind.num_fields)}
    return names >= {"bytes", "path"}


def _parquet_rows(path: str, source: SourceConfig, with_audio: bool) -> Iterator[Row]:
    file = open_parquet(path)
    table = _table(path, file.schema_arrow, source, with_audio)
    audio, *others = table.columns.names
    if not with_audio:  # else they are read in order
        _warn_of_large_groups(path, file.metadata)
    wanted = [audio if table.reads_audio or not table.is_struct else f"{audio}.path", *others]
    number = 0
    for group in range(file.num_row_groups):
        place = 0
        for batch in group_batches(file, group, wanted):
            for row in batch.to_pylist():
                contents, name = _contents(row[audio])
                member = RowMember(path=path, name="", row_group=group, row=place, column=audio)
                is_inside = contents is not None or (table.is_struct and not table.reads_audio)
                yield _row(table, number, row, name, member if is_inside else None, contents)
                number, place = number + 1, place + 1


def _warn_of_large_groups(path: str, metadata: Any) -> None:
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if sizes and max(sizes) > _LARGE_GROUP_BYTES:
        logging.warning(
            "%s: has row groups of %d MB, of which half is read for each utterance that is drawn; write the file with "
            "row_group_size=100, read it with stream: true, or store it with speechllm data convert --to shar",
            path,
            max(sizes) >> 20,
        )


def _contents(audio: Any) -> tuple[bytes | None, str | None]:
    """The contents, and the name or path, of the audio of a row."""
    if isinstance(audio, dict):
        return audio.get("bytes"), audio.get("path")
    return (audio, None) if isinstance(audio, bytes) else (None, audio)


def _arrow_rows(path: str, source: SourceConfig, with_audio: bool) -> Iterator[Row]:
    pyarrow = import_pyarrow(path)
    file = pyarrow.memory_map(path).read_buffer()
    stream = pyarrow.BufferReader(file)
    if file[: len(_ARROW_FILE)].to_pybytes() == _ARROW_FILE:
        reader = pyarrow.ipc.open_file(stream)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = reader = pyarrow.ipc.open_stream(stream)
    table = _table(path, reader.schema, source, with_audio)
    audio, *others = table.columns.names
    number = 0
    for batch in batches:
        names, places = _names_and_places(batch.column(audio), table, file)
        for row, name, place in zip(batch.select(others).to_pylist(), names, places, strict=True):
            member = None if place is None else Member(path=path, name="", offset=place[0], size=place[1])
            yield _row(table, number, row, name, member, None)
            number += 1


def _names_and_places(column: Any, table: _Table, file: Any) -> tuple[list[str | None], list[tuple[int, int] | None]]:
    """The names of the audio in the rows of a column, and in which bytes of the file it is, if it is there.

    Raises:
        ManifestError: the file is compressed.
    """
    types = import_pyarrow(table.path).types
    nothing: list[Any] = [None] * len(column)
    if types.is_string(column.type) or types.is_large_string(column.type):
        return column.to_pylist(), nothing
    contents, names = column, nothing
    if table.is_struct:
        parts = dict(zip((field.name for field in column.type), column.flatten(), strict=True))  # null where all is
        contents, names = parts["bytes"], parts["path"].to_pylist()
    offset_type = np.int64 if types.is_large_binary(contents.type) else np.int32
    _, offsets, data = contents.buffers()
    if data is None:
        return names, nothing
    begin = data.address - file.address
    if not 0 <= begin <= file.size:
        raise ManifestError(f"{table.path}: is compressed; write it without compression, or as Parquet")
    bounds = np.frombuffer(offsets, dtype=offset_type)[contents.offset :][: len(contents) + 1].astype(np.int64) + begin
    valid = contents.is_valid().to_pylist()
    places = zip(bounds[:-1].tolist(), np.diff(bounds).tolist(), strict=True)
    return names, [place if there else None for place, there in zip(places, valid, strict=True)]


def _row(
    table: _Table,
    number: int,
    row: dict[str, Any],
    name: str | None,
    member: Member | RowMember | None,
    contents: bytes | None,
) -> Row:
    """A row of a file.

    Args:
        number: of the row in the file, from 0.
        name: of the audio, or the path of a file with it.
        member: where the audio is, if it is in the row.
        contents: of the audio, as far as they have been read.
    """
    where = f"{table.path}:row {number + 1}"
    try:
        line = fields_of(row, table.columns)
        if member is None:
            if not name:
                raise ValueError(f"{table.columns.audio}: neither audio nor a path")
            audio: str | bytes = table.finder.path(name)
            line = {"id": name_without_suffix(name)} | line | {"audio_filepath": audio}
        else:
            file = os.path.basename(name or table.path)
            if not isinstance(line.get("id"), str):  # numbers are often those of sentences that several people read
                line["id"] = name_without_suffix(file) + (f"-{number}" if name is None else "")
            member["name"] = f"row {number + 1}" if name is None else f"row {number + 1}, {file}"
            line |= {"audio_filepath": file, TAR: {"recording": member}}
            is_needed = table.reads_audio or line.get("duration") is None
            audio = read_member(member) if contents is None and is_needed else contents or b""
        return Row(where, line, audio)
    except LINE_ERRORS as error:
        return Row(where, ManifestError(f"{where}: {explain(error)}"))
