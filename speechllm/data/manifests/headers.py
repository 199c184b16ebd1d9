"""How long recordings are, by their files, for manifests that do not say it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from speechllm.data.ahead import map_ahead
from speechllm.data.audio_file import UtteranceError, open_audio
from speechllm.data.commands import command_output
from speechllm.data.manifests.remote import NoConnection, fetch
from speechllm.data.manifests.source import ManifestError, is_url

_MOST_THREADS = 8


def audio_seconds(audio: str | bytes, name: str | None = None) -> float:
    """Seconds of a file, or of the contents of one.

    Args:
        name: for messages; None for the path.

    Raises:
        ValueError: it cannot be opened as audio.
    """
    name = name or ("the audio" if isinstance(audio, bytes) else audio)
    try:
        return _seconds(audio, name)
    except UtteranceError as error:
        raise ValueError(f"missing field 'duration', and {error}") from error


def _seconds(audio: str | bytes, name: str) -> float:
    if isinstance(audio, str) and is_url(audio):
        try:
            audio = fetch(audio)
        except NoConnection:  # for which no utterance must be left out
            raise
        except OSError as error:
            raise UtteranceError("unreadable audio", str(error)) from error
    with open_audio(audio, name) as file:
        return file.count_frames() / file.rate


def command_seconds(command: str) -> float:
    """Seconds of what a command writes.

    Raises:
        ValueError: it fails, or writes no audio.
    """
    try:
        output = command_output(command, keep=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(str(error)) from error
    return audio_seconds(output, command)


class Row(NamedTuple):
    """What a form that says no durations has of an utterance: FILE:LINE, its NeMo line or what is wrong with it, and
    its audio, a path or contents."""

    where: str
    line: dict | ManifestError
    audio: str | bytes = b""


def with_durations(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows in their order, each with a `duration`, by its audio where it says none; several are read at once."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        yield from map_ahead(pool, _with_duration, rows, 4 * threads)


def _with_duration(row: Row) -> Row:
    if isinstance(row.line, ManifestError) or row.line.get("duration") is not None:
        return row
    try:
        seconds = _seconds(row.audio, str(row.line["audio_filepath"]))
    except UtteranceError as error:
        return row._replace(line=ManifestError(f"{row.where}: {error}"))
    return row._replace(line=row.line | {"duration": seconds})
