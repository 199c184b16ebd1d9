"""Files and folders that appear whole or not at all, whenever the program is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

# Of a name in a folder, in bytes, on the file systems in use.
MAX_NAME_BYTES = 255


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. It is flushed to the disk and takes the place of `path` when the
    block ends well, and is removed when it does not.

    The name is `NAME.RANDOM.tmp`, the end of a long NAME left out: processes that write the same file at the same time
    do not write into each other's.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = f".{secrets.token_hex(4)}.tmp"
    tmp = path.with_name(shortened(path.name, MAX_NAME_BYTES - len(ending)) + ending)
    try:
        yield tmp
        _set_usual_mode(tmp)
        _flush(tmp)
        os.replace(tmp, path)
        _flush(path.parent)  # a rename is on the disk only when its folder is
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; takes its place when the block ends well."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (tmp, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for file in tmp.rglob("*"):
            _set_usual_mode(file)
        if folder.exists():
            folder.rename(old)
            tmp.rename(folder)
            shutil.rmtree(old)
        else:
            tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def shortened(name: str, max_bytes: int) -> str:
    """The beginning of a file's name that has at most so many bytes, whole characters of it."""
    while len(os.fsencode(name)) > max_bytes:
        name = name[:-1]
    return name


def describe_write_error(path: str | Path, reason: Exception) -> str:
    """`PATH: cannot be written: REASON (SPACE free there)`."""
    folder = next(p for p in Path(path).absolute().parents if p.is_dir())
    reason = getattr(reason, "strerror", None) or reason
    return f"{path}: cannot be written: {reason} ({shutil.disk_usage(folder).free / 1e9:.2f} GB free there)"


def _set_usual_mode(path: Path) -> None:
    """The permissions of a new file or folder: safetensors makes files that only their owner can read.

    Programs stay programs; a link, perhaps to what is not there, has none of its own.
    """
    if path.is_symlink():
        return
    umask = os.umask(0)
    os.umask(umask)
    usual = 0o777 if path.is_dir() else 0o666 | path.stat().st_mode & 0o111
    path.chmod(usual & ~umask)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
