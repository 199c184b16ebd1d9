"""What the commands in Kaldi's wav.scp write, and what is at URLs: read once for a recording, however many segments it
has.

The output is kept in a folder of the run, in $TMPDIR, which its worker processes share, and which is removed at its
end. It takes as much room as the recordings have that are cut into segments. Where less than a gigabyte would be left,
a command is run whenever its output is needed.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

from speechllm.data.manifests.remote import fetch
from speechllm.files import replaced_file

_FOLDER = "SPEECHLLM_COMMAND_OUTPUT"  # an environment variable, so that worker processes find it however they start
_LEAST_FREE = 1 << 30


def share_command_output() -> None:
    """To be called before worker processes are started that are to share what commands write."""
    if _FOLDER not in os.environ:
        folder, owner = tempfile.mkdtemp(prefix="speechllm-commands-"), os.getpid()
        os.environ[_FOLDER] = folder

        def remove() -> None:
            if os.getpid() == owner:  # and not a process that was forked
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)


def command_output(command: str, keep: bool) -> str | bytes:
    """The path of a file with what a shell command writes, or its content.

    Args:
        keep: it is needed again.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be run, or fails.
    """

    def write(output: BinaryIO) -> None:
        subprocess.run(command, shell=True, check=True, stdout=output)

    kept = _kept(command, write, keep)
    return kept or subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE).stdout


def url_content(url: str, keep: bool) -> str | bytes:
    """The path of a file with what is at a URL, or its content.

    Args:
        keep: it is needed again.

    Raises:
        OSError, DataError: see `speechllm.data.manifests.remote.fetch`.
    """
    kept = _kept(url, lambda output: output.write(fetch(url)), keep)
    return kept or fetch(url)


def _kept(name: str, write: Callable[[BinaryIO], object], keep: bool) -> str | None:
    """The path of the file that belongs to a name, which is written to `keep` it if it is not there; else None, also
    where there is no room."""
    share_command_output()
    file = Path(os.environ[_FOLDER]) / hashlib.sha256(name.encode()).hexdigest()
    if not file.exists():
        if not keep or not _has_room(file.parent):
            return None
        with open(f"{file}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                with replaced_file(file) as tmp, open(tmp, "wb") as output:
                    write(output)
    return str(file)


def _has_room(folder: Path) -> bool:
    has_room = shutil.disk_usage(folder).free > _LEAST_FREE
    if not has_room:
        _warn_once(str(folder))
    return has_room


@cache
def _warn_once(folder: str) -> None:
    logging.warning(
        "%s: less than a gigabyte is free, so commands of wav.scp are run, and URLs read, for each segment; set TMPDIR",
        folder,
    )
