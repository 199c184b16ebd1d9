"""An index of a manifest: where each line is, how long its audio and its label are.

The plan of an epoch's batches (`plan.py`) is made from these few numbers, and a worker reads a line when its turn has
come, at its byte offset. So a run starts, and resumes in the middle of an epoch, in seconds at millions of lines. The
index is made once and kept on disk; it is made anew when the manifest, the text normalization or the tokenizer change.
What cannot be read by byte offset (compressed lines, tables, Parquet, Kaldi and Shar directories, tar shards) is
written out as plain lines beside the index, with the durations that were read from the audio; audio stays where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from lhotse.cut import Cut
from tqdm import tqdm

from speechllm.data.audio_file import UtteranceError
from speechllm.data.manifests.kinds import kind_of
from speechllm.data.manifests.manifest import (
    LINE_ERRORS,
    DataError,
    Entry,
    ManifestError,
    SourceConfig,
    describe,
    explain,
    is_plain,
    is_skipped,
    iter_objects,
    manifest_files,
    parse_line,
    to_cut,
)
from speechllm.data.manifests.remote import NoConnection, cache_folder
from speechllm.data.manifests.source import planned_label, target_text
from speechllm.files import replaced_folder
from speechllm.prompt.label import LabelTemplate

# Part of the name of every index: those of another layout are not found.
_LAYOUT = 4
_MAX_MESSAGES = 1000
_LABELS_AT_ONCE = 10000


class Labels(Protocol):
    """What the data side asks of the model about labels; `SpeechLLM` and `EncoderModel` have it."""

    @property
    def frame_seconds(self) -> float: ...

    @property
    def seconds_per_position(self) -> float: ...

    @property
    def label_template(self) -> LabelTemplate: ...

    def label_lengths(self, labels: Sequence[str]) -> list[int]:
        """Tokens of each label, end of text aside."""

    def label_identity(self) -> str:
        """Differs where the label of a text, or its tokens, would."""


@dataclass(frozen=True)
class BadLines:
    """Lines that cannot be used: how many, and what is wrong with the first of them, with file and line."""

    count: int
    messages: list[str]


class Index:
    """The usable lines of one source, numbered from 0.

    `durations` (n,) float32 seconds, `characters` (n,) int32 of the normalized target without spaces, `tokens` (n,)
    int32 or None; `bad_lines`; `unknown_languages`, how often each tag of a language that nobody knows is said;
    `fingerprint` of the lines' content.
    """

    def __init__(self, folder: Path, source: SourceConfig) -> None:
        self.source = source
        self._folder = folder
        content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.bad_lines = BadLines(**content["bad_lines"])
        self.unknown_languages: dict[str, int] = content["unknown_languages"]
        self.hours, self.fingerprint = content["hours"], content["fingerprint"]
        self._lines = folder / "lines.jsonl"
        if not self._lines.is_file():
            self._lines = Path(source.path)
        self._file = LinesFile(self._lines, content["lines"])
        self._offsets, self._sizes, self.durations, self.characters = (
            np.load(folder / f"{name}.npy") for name in ("offsets", "sizes", "durations", "characters")
        )
        self.tokens = np.load(folder / "tokens.npy") if (folder / "tokens.npy").is_file() else None

    def __reduce__(self) -> tuple:
        return Index, (self._folder, self.source)

    def __len__(self) -> int:
        return len(self.durations)

    def cut(self, number: int) -> Cut:
        """The cut of the `number`-th line.

        Raises:
            UtteranceError: the line cannot be made a cut.
            DataError: the file has other content than when the index was made.
        """
        offset = int(self._offsets[number])
        line = self._file.read(offset, int(self._sizes[number]))
        try:
            return to_cut(parse_line(line), self.source)
        except LINE_ERRORS as error:
            details = f"{self._lines} at byte {offset}: {explain(error)}"
            raise UtteranceError("bad manifest line", details) from error


class LinesFile:
    """A file to read from at random, which must not change. The most used are kept open, among all of a process: a file
    that takes the place of an open one does not change what is read. Where one was touched or copied, its content is
    compared.

    Args:
        state: of the file as it must be; see `state_of`.
    """

    _MOST_OPEN = 256
    _open: WeakKeyDictionary[LinesFile, BinaryIO] = WeakKeyDictionary()  # the one that was used last comes last

    def __init__(self, path: Path, state: dict[str, int]) -> None:
        self._path, self._checksum = path, state["checksum"]
        self._seen = (state["size"], state["time"])
        self._opened()

    @staticmethod
    def state_of(path: Path) -> dict[str, int]:
        """Size, time and checksum of a file, as plain values."""
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            return {"size": stat.st_size, "time": stat.st_mtime_ns, "checksum": _checksum(file)}

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes that begin at `offset`.

        Raises:
            DataError: it is missing, or has other content.
        """
        try:
            file = self._opened()
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != self._seen:
                if stat.st_size != self._seen[0] or _checksum(file) != self._checksum:
                    raise DataError(
                        f"{self._path} has changed during the run, or since its index was made: put it back as it was, "
                        "or start again with what it is now; training goes on from its last checkpoint"
                    )
                self._seen = (stat.st_size, stat.st_mtime_ns)
            # without a file position: processes that share the descriptor do not disturb each other
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read any more: {error.strerror}") from error

    def _opened(self) -> BinaryIO:
        file = self._open.pop(self, None)
        if file is None:
            while len(self._open) >= self._MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        self._open[self] = file
        return file


def _checksum(file: BinaryIO) -> int:
    checksum, place = 0, 0
    while block := os.pread(file.fileno(), 1 << 20, place):
        checksum = zlib.crc32(block, checksum)
        place += len(block)
    return checksum


class Corpus:
    """Several indexes, numbered through."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = list(indexes)
        self.starts = np.cumsum([0] + [len(index) for index in indexes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> Cut:
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.indexes[which].cut(number - int(self.starts[which]))


def default_index_dir() -> Path:
    """`$XDG_CACHE_HOME/speechllm` or `~/.cache/speechllm`."""
    return cache_folder()


def open_index(
    source: SourceConfig, text_steps: Sequence[str] = (), labels: Labels | None = None, folder: Path | None = None
) -> Index:
    """The index of `source`, made where there is none yet.

    Args:
        text_steps: normalization of the targets (`speechllm.text.normalize`).
        labels: counts tokens; without it `Index.tokens` is None.
        folder: where indexes are kept; None for `default_index_dir()`.

    Raises:
        ManifestError: no such manifest, or none of its lines can be used.
        DataError: the folder cannot be written.
    """
    folder = folder or default_index_dir()
    files = [(str(path.resolve()), *_size_and_time(path)) for path in manifest_files(source)]
    settings = asdict(source) | {"weight": None, "stream": False}
    # paths in a Kaldi directory are against the current one
    here = os.getcwd() if kind_of(source) == "kaldi" else None
    identity = [_LAYOUT, files, settings, here, list(text_steps), labels.label_identity() if labels else None]
    name = f"{Path(source.path).name[:60]}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]}"
    try:
        if not (folder / name).is_dir():  # a folder of this name is complete, and need not be writable
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{name}.lock"):
                if not (folder / name).is_dir():
                    _build(folder / name, source, text_steps, labels)
    except NoConnection as error:
        raise DataError(f"{source.path}: no index can be made of it: {error}") from error
    except OSError as error:
        raise DataError(
            f"{folder}: the index of {source.path} cannot be written ({error}); set data.index_dir"
        ) from error
    index = Index(folder / name, source)
    for message in index.bad_lines.messages:
        logging.warning("bad manifest line: %s", message)
    for tag, count in index.unknown_languages.items():
        logging.warning(
            "%s: the language %r (%d times) is no code or name of ISO 639; say what it is in the source's `languages`",
            source.path, tag, count,
        )  # fmt: skip
    if not len(index):
        first = index.bad_lines.messages[:1] or [f"{source.path}: the manifest is empty"]
        raise ManifestError(f"{first[0]} ({index.bad_lines.count} bad lines, no good one)")
    return index


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: the others wait, and then find the index made."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, source: SourceConfig, text_steps: Sequence[str], labels: Labels | None) -> None:
    offsets, sizes, durations, characters, tokens = array("q"), array("i"), array("f"), array("i"), array("i")
    written: list[str] = []
    bad_count, checksum = 0, 0
    messages: list[str] = []
    languages: Counter[str | None] = Counter()

    def count_tokens() -> None:
        if labels is not None:
            tokens.extend(labels.label_lengths(written))
        written.clear()

    with replaced_folder(folder) as tmp:
        progress = tqdm(desc=f"indexing {Path(source.path).name}", unit=" lines", disable=None, mininterval=1)
        with contextlib.closing(progress):
            for offset, line, entry in _placed_entries(source, tmp / "lines.jsonl"):
                progress.update()
                checksum = zlib.crc32(line, checksum)
                if isinstance(entry, ManifestError):
                    bad_count += 1
                    messages += [str(entry)] if len(messages) < _MAX_MESSAGES else []
                    continue
                languages.update((entry.lang, entry.target_lang))
                target = target_text(entry, text_steps)
                offsets.append(offset)
                sizes.append(len(line))
                durations.append(entry.duration)
                characters.append(len(target) - target.count(" "))
                if labels is not None:
                    written.append(planned_label(entry, labels.label_template, text_steps))
                if len(written) == _LABELS_AT_ONCE:
                    count_tokens()
            count_tokens()
        lines = tmp / "lines.jsonl"
        arrays = dict[str, array](offsets=offsets, sizes=sizes, durations=durations, characters=characters)
        if labels is not None:
            arrays["tokens"] = tokens
        for name, values in arrays.items():
            np.save(tmp / f"{name}.npy", np.frombuffer(values, dtype=values.typecode) if values else np.array(values))
        content = {
            "manifest": str(Path(source.path).absolute()),
            "fingerprint": f"{checksum:08x}",
            "lines": LinesFile.state_of(lines if lines.is_file() else Path(source.path)),
            "hours": float(np.sum(durations, dtype=np.float64)) / 3600,
            "bad_lines": {"count": bad_count, "messages": messages},
            "unknown_languages": {tag: n for tag, n in languages.items() if not source.is_known_language(tag)},
        }
        (tmp / "index.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _placed_entries(source: SourceConfig, unpacked: Path) -> Iterator[tuple[int, bytes, Entry | ManifestError]]:
    """(byte offset, line, entry) of every line, where it can be read by offset: the manifest, or `unpacked`."""
    if is_plain(source):
        offset = 0
        with open(source.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and (entry := _understood(f"{source.path}:{number}", line, source)) is not None:
                    yield offset, line, entry
                offset += len(line)
        return
    with open(unpacked, "wb") as file:
        for where, found in iter_objects(source):
            if isinstance(found, ManifestError):
                yield 0, b"", found
                continue
            line = json.dumps(found, ensure_ascii=False).encode() + b"\n"
            if (entry := _understood(where, found, source)) is not None:
                yield file.tell(), line, entry
                file.write(line)


def _understood(where: str, line: bytes | dict, source: SourceConfig) -> Entry | ManifestError | None:
    """What a line says; None if it says that it is to be skipped."""
    try:
        obj = parse_line(line) if isinstance(line, bytes) else line
        return None if is_skipped(obj) else describe(obj, source)
    except LINE_ERRORS as error:
        return ManifestError(f"{where}: {explain(error)}")
