"""Rows of Parquet files, in order and one by one. A file is never read as a whole.

A row group is what Parquet lets one read by itself: a row in it is found by reading the group from its beginning on.
Hugging Face datasets writes 100 utterances to a group.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from speechllm.data.manifests.remote import fetch
from speechllm.data.manifests.rows import AudioFinder
from speechllm.data.manifests.source import DataError, is_url

_BATCH_ROWS = 16
_MOST_OPEN = 4
_BATCHES_KEPT = 8


def import_pyarrow(path: str) -> ModuleType:
    """The module pyarrow, which reads `path`.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet and Arrow files need pyarrow: pip install 'speechllm[parquet]'") from error
    return pyarrow


def open_parquet(path: str) -> Any:
    """The `pyarrow.parquet.ParquetFile`."""
    return import_pyarrow(path).parquet.ParquetFile(path, memory_map=True)


def group_batches(file: Any, group: int, columns: Sequence[str]) -> Iterator[Any]:
    """The rows of a group of a file, some at a time, as `pyarrow.RecordBatch`."""
    wanted = {"batch_size": _BATCH_ROWS, "row_groups": [group], "columns": list(columns)}
    return file.iter_batches(**wanted, use_threads=False)  # workers are processes already


class _Group:
    """A row group that is being read: the batch it has come to, and a few before."""

    def __init__(self, path: str, group: int, column: str) -> None:
        self._batches = enumerate(group_batches(open_parquet(path), group, [column]))
        self._kept: deque[tuple[int, Any]] = deque(maxlen=_BATCHES_KEPT)

    def row(self, number: int) -> Any:
        """What is in a row; None if it has gone by, or there is none."""
        wanted, place = divmod(number, _BATCH_ROWS)
        for found, batch in itertools.chain(self._kept, self._read()):
            if found == wanted:
                return batch.column(0)[place] if place < len(batch) else None
            if found > wanted:
                return None
        return None

    def _read(self) -> Iterator[tuple[int, Any]]:
        for numbered in self._batches:
            self._kept.append(numbered)
            yield numbered


# The row groups that were read last: those who read in order, several threads at once too, read each group once.
_groups: OrderedDict[tuple[str, int, str], _Group] = OrderedDict()
_lock = threading.Lock()


def read_row(path: str, group: int, number: int, column: str) -> bytes:
    """The audio in a row.

    Args:
        number: of the row in its group.
        column: with the contents of audio files, or with `bytes` and `path` as in Hugging Face datasets.

    Raises:
        OSError: it cannot be read; the file has changed.
    """
    key = (path, group, column)
    pyarrow = import_pyarrow(path)
    with _lock:
        try:
            opened = _groups.pop(key, None)
            row = opened.row(number) if opened is not None else None
            if opened is None or row is None:
                opened = _Group(path, group, column)
                row = opened.row(number)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise OSError(f"{path}: row {number} of row group {group} cannot be read: {error}") from error
        _groups[key] = opened
        while len(_groups) > _MOST_OPEN:
            _groups.popitem(last=False)
    if row is None:
        raise OSError(f"{path}: has no row {number} in row group {group}: it has changed")
    audio = row.as_py()
    if isinstance(audio, dict):
        audio = audio["bytes"] if audio.get("bytes") is not None else audio.get("path")
    if isinstance(audio, str):  # a file, as of a few rows among others
        file = AudioFinder(os.path.dirname(path)).path(audio)
        return fetch(file) if is_url(file) else Path(file).read_bytes()
    if not isinstance(audio, bytes):
        raise OSError(f"{path}: row {number} of row group {group} has no audio")
    return audio
