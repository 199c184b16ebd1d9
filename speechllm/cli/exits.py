"""How a program ends: its exit status, and what it says when something that a person can mend is wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

INTERRUPTED = 128 + signal.SIGINT
READER_HAS_GONE = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


def run_to_exit(run: Callable[[], int | None]) -> None:
    """Run a program and exit with its status; errors of the library and of the system are told in one line.

    Ctrl-C ends it quietly with the status 130, a SIGTERM with 143, and 141 when the reader of its standard output has
    gone, as after `| head`: those that a shell gives to a program that these signals have killed. What is half-written
    then is removed.
    """
    from speechllm.errors import UserError

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    if hasattr(sys.stdout, "reconfigure"):  # names of files as they are, whatever the bytes and the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        status = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        status = READER_HAS_GONE
    except (UserError, FileNotFoundError) as error:
        status = _told(str(error))
    except OSError as error:
        _discard_output()
        status = _told(f"{error.filename or 'standard output'}: {error.strerror or error}")
    sys.exit(status)


def _told(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _terminate(number: int, frame: object) -> None:
    sys.exit(TERMINATED)


def _discard_output() -> None:
    """Python writes what is left in its buffer when it ends, and would fail once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file, as in a test
        sys.stdout = None
