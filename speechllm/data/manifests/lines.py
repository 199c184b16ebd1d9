"""Files of JSON lines: patterns of them, lines with their numbers, and what a file is that is none."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

from lhotse.serialization import open_best

from speechllm.data.manifests.remote import local_copy
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, explain, is_remote, is_url

if TYPE_CHECKING:
    from typing_extensions import Buffer

_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How files begin that people take for manifests, what they are, and the way out.
_OTHER_FORMATS = (
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with zstd -d, or compress it with gzip"),
    (b"BZh", "compressed with bzip2", "unpack it with bunzip2, or compress it with gzip"),
    (b"\xfd7zXZ\0", "compressed with xz", "unpack it with unxz, or compress it with gzip"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it with lz4 -d, or compress it with gzip"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save it as JSON lines"),
    (b"PAR1", "a Parquet file", "call it .parquet, or say kind: parquet"),
    (b"ARROW1", "an Arrow file", "call it .arrow, or say kind: arrow"),
    (b"SQLite format 3", "an SQLite database", "write its rows as JSON lines"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    *((magic, "an audio file", "give a manifest of it") for magic in (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM")),
)
_HEAD_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 16


def expand_braces(pattern: str) -> list[str]:
    """`a_{0..2}.tar` or `a_{x,y}.tar` as bash expands them, all combinations; `_OP_` and `_CL_` are braces too, as in
    NeMo. What can be neither stays as it is."""
    pattern = pattern.replace("_OP_", "{").replace("_CL_", "}")
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = names.split(",")
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def expanded(path: str) -> list[str]:
    """The files that a path stands for: a pattern with braces or `*`, or a file whose own name has these."""
    if os.path.exists(path):
        return [path]
    found = []
    for pattern in expand_braces(path):
        has_magic = glob.has_magic(pattern) and not is_remote(pattern)
        found += sorted(glob.glob(pattern)) if has_magic else [pattern]
    return found


def existing(path: str) -> list[str]:
    """As `expanded`.

    Raises:
        ManifestError: one is missing, or there are none.
    """
    files = expanded(path)
    missing = next((file for file in files if not (is_remote(file) or os.path.isfile(file))), None if files else path)
    if missing is not None:
        raise ManifestError(f"{missing}: no such manifest file")
    return files


def existing_files(path: str) -> list[str]:
    """The files of JSON lines that a path stands for (`expanded`).

    Raises:
        ManifestError: one of them does not exist, or is no such file; the message says what it is.
    """
    files = existing(path)
    for file in files:
        if not is_remote(file):
            _check_format(file)
    return files


def is_compressed(path: str) -> bool:
    """Whether a file is compressed with gzip, by its name or by what it begins with."""
    if path.endswith(".gz"):
        return True
    with open(path, "rb") as file:
        return file.read(2) == _GZIP


def open_lines(path: str) -> BinaryIO:
    """A file, or a copy of one at a URL, unpacked if it is compressed with gzip; or what lhotse reads from a command.

    A file is open only while a block of it is read: of thousands of manifests that are read side by side, none takes
    one of the 1,024 descriptors that a process usually has.
    """
    if is_url(path):
        path = str(local_copy(path))
    elif is_remote(path):
        return open_best(path, "rb")
    file = cast(BinaryIO, io.BufferedReader(_Reopened(path), _BLOCK_BYTES))
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_compressed(path) else file


class _Reopened(io.RawIOBase):
    """A file that is opened for each reading; an `OSError` if it is not the same file any more."""

    def __init__(self, path: str) -> None:
        self._path, self._position = path, 0
        self._identity: tuple[int, int, int, int] | None = None
        self.readinto(bytearray(0))  # opens it, or says why not

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (os.path.getsize(self._path) if start is None else start)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        with open(self._path, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._identity not in (None, identity):
                raise OSError(f"{self._path} has changed while it was read")
            self._identity = identity
            file.seek(self._position)
            count = file.readinto(buffer)
        self._position += count
        return count


def check_is_text(path: str) -> bytes:
    """How a file begins, unpacked; nothing of one that cannot be read: whoever reads it says what is wrong with it.

    Raises:
        ManifestError: it is no text; the message says what it is.
    """
    try:
        with open_lines(path) as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return b""
    for magic, what, way_out in _OTHER_FORMATS:
        if head.startswith(magic):
            raise _not_lines(path, what, way_out)
    if head[257:262] == b"ustar":
        raise _not_lines(path, "a tar file", "give the manifest of what is in it, and the tar file as tar_path")
    if b"\0" in head:
        raise _not_lines(path, "binary, or UTF-16 text", "save it as UTF-8: iconv -f UTF-16LE -t UTF-8")
    return head


def _check_format(path: str) -> None:
    head = check_is_text(path)
    lines = [line.strip() for line in io.BytesIO(head.removeprefix(_BYTE_ORDER_MARK)) if not line.isspace()]
    if not lines:
        return
    has_objects = any(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    if lines[0].startswith(b"[") and not has_objects:
        raise _not_lines(path, "a JSON array", "write one object a line: jq -c '.[]'")
    if lines[0] == b"{" and not has_objects:
        raise _not_lines(path, "one JSON document over several lines", "write one object a line: jq -c .")
    if not any(line.startswith((b"{", b"[")) for line in lines):
        for separator, name in ((b"\t", "a table with tabs (TSV)"), (b",", "a table with commas (CSV)")):
            if all(separator in line for line in lines[:2]):
                raise _not_lines(path, name, "call it .tsv or .csv, or say kind: table")


def _not_lines(path: str, what: str, way_out: str) -> ManifestError:
    return ManifestError(f"{path}: {what}, not a manifest of JSON lines; {way_out}")


def numbered_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """FILE:LINE and the line, of all that are not blank; one at a time, unpacked if the file is compressed with gzip,
    without a byte order mark.

    Raises:
        ManifestError: the file cannot be read, or not to its end.
    """
    number = 0
    try:
        with open_lines(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line and not line.isspace():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged gzip file
        raise ManifestError(f"{path}: cannot be read after line {number}: {error}") from error


def parse_line(line: bytes) -> dict:
    """The JSON object of one line.

    Raises:
        ValueError: it is not JSON, not UTF-8, or not an object.
    """
    obj = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode())
    if not isinstance(obj, dict):
        raise ValueError(f"expected a JSON object, found {type(obj).__name__}")
    if b"\\ud" in line or b"\\uD" in line:  # an escaped half of a surrogate pair is JSON, and no text
        json.dumps(obj, ensure_ascii=False).encode()
    return obj


def is_skipped(obj: dict) -> bool:
    """Whether a line says that it is not to be used: NeMo's `_skipme`, of the line or in `custom` of a cut.

    Raises:
        ValueError: it says so neither way.
    """
    custom = obj.get("custom")
    value = obj.get("_skipme", custom.get("_skipme") if isinstance(custom, dict) else None)
    if value is not None and not isinstance(value, (bool, int)):
        raise ValueError(f"_skipme: expected true or false, found {value!r}")
    return bool(value)


def parsed_lines(path: str) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and its object, or what is wrong with the line; those that are skipped included."""
    for where, line in numbered_lines(path):
        try:
            yield where, parse_line(line)
        except LINE_ERRORS as error:
            yield where, ManifestError(f"{where}: {explain(error)}")


def used_lines(path: str) -> Iterator[tuple[str, dict | ManifestError]]:
    """As `parsed_lines`, without those that say that they are to be skipped."""
    for where, found in parsed_lines(path):
        if not isinstance(found, ManifestError):
            try:
                if is_skipped(found):
                    continue
            except ValueError as error:
                found = ManifestError(f"{where}: {error}")
        yield where, found
