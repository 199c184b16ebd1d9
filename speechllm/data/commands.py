"""What the commands in Kaldi's wav.scp write: run once for a recording, however many segments it has.

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
from functools import cache
from pathlib import Path

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
    share_command_output()
    file = Path(os.environ[_FOLDER]) / hashlib.sha256(command.encode()).hexdigest()
    if file.exists():
        return str(file)
    if keep and _has_room(file.parent):
        with open(f"{file}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                with replaced_file(file) as tmp, open(tmp, "wb") as output:
                    subprocess.run(command, shell=True, check=True, stdout=output)
        return str(file)
    return subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE).stdout


def _has_room(folder: Path) -> bool:
    has_room = shutil.disk_usage(folder).free > _LEAST_FREE
    if not has_room:
        _warn_once(str(folder))
    return has_room


@cache
def _warn_once(folder: str) -> None:
    logging.warning(
        "%s: less than a gigabyte is free, so commands of wav.scp are run once for each segment; set TMPDIR", folder
    )
