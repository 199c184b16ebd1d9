"""What is at a URL (https, s3 and what else smart_open knows): the contents of audio files, copies of manifests.

Credentials and servers of S3 are those that boto3 finds (`AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from lhotse.serialization import open_best

from speechllm.data.manifests.source import DataError, ManifestError
from speechllm.files import replaced_file

_TRIES = 3
_WAIT_SECONDS = 1.0
_TIMEOUT_SECONDS = 30.0
# What a server answers that says nothing of what is asked for: it has too much to do, or is not reached behind another.
_BUSY = (429, 502, 503, 504)
# What the exceptions of requests, urllib3 and botocore are called that say that a server was not reached.
_CONNECTION = ("Connect", "Timeout", "NameResolution", "Protocol", "IncompleteRead")


class NoConnection(OSError):
    """A server cannot be reached, or is too busy, which says nothing about the utterance."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/speechllm` or `~/.cache/speechllm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speechllm"


def fetch(url: str) -> bytes:
    """The contents of a URL. Where a connection breaks, or the server is too busy, it is tried again.

    Raises:
        DataError: what opens it is not installed, and the message has the command; nothing opens such URLs.
        NoConnection: the server cannot be reached.
        OSError: it refuses.
    """
    for left in reversed(range(_TRIES)):
        try:
            with _opened(url) as file:
                return file.read()
        except NotImplementedError as error:  # of smart_open, which knows others
            raise DataError(f"{url}: {_first_line(error)}") from error
        except ImportError as error:  # smart_open, or what it needs for this scheme
            raise DataError(f"{url}: URLs need smart_open: pip install 'speechllm[remote]' ({error})") from error
        except Exception as error:  # each of its libraries has its own
            if not any(map(_is_passing, _causes(error))):
                raise OSError(f"{url}: {_first_line(error)}") from error
            if not left:
                reason = f"no connection to {urlsplit(url).netloc}, or it is busy; is there a network?"
                raise NoConnection(f"{url}: {reason} ({_first_line(error)})") from error
        time.sleep(_WAIT_SECONDS)
    raise AssertionError("the last try returns or raises")


def _opened(url: str) -> BinaryIO:
    scheme = urlsplit(url).scheme
    if scheme == "ais":  # AIStore, by its own library
        return open_best(url, "rb")
    import smart_open

    thread = 0 if scheme == "s3" else threading.get_ident()
    return smart_open.open(url, "rb", compression="disable", transport_params=_client(scheme, os.getpid(), thread))


@lru_cache(maxsize=64)
def _client(scheme: str, process: int, thread: int) -> dict[str, Any]:
    """What keeps connections open: of a process, and of one thread where others must not use them."""
    if scheme == "s3":
        from boto3.session import Session

        return {"client": Session().client("s3")}
    if scheme in ("http", "https"):
        import requests

        return {"session": requests.Session(), "timeout": _TIMEOUT_SECONDS}
    return {}


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _is_passing(error: BaseException) -> bool:
    """Whether another try may go better."""
    response = getattr(error, "response", None)  # of requests; botocore tries again itself
    return getattr(response, "status_code", None) in _BUSY or any(name in type(error).__name__ for name in _CONNECTION)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


@cache
def local_copy(url: str) -> Path:
    """A manifest at a URL as a file here, downloaded anew by each process that starts; the file stays as it was where
    its content is the same, so that an index of it stays. Without a network the last copy is taken, with a warning.

    Raises:
        ManifestError: there is no copy, and none can be made.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{os.path.basename(url)[-60:]}"
    path = cache_folder() / "manifests" / name
    try:
        content = fetch(url)
    except NoConnection as error:
        if not path.is_file():
            raise ManifestError(str(error)) from error
        logging.warning("%s; what was read last time is taken", error)
        return path
    except OSError as error:
        raise ManifestError(str(error)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file() or path.read_bytes() != content:
            with replaced_file(path) as tmp:
                tmp.write_bytes(content)
    return path
