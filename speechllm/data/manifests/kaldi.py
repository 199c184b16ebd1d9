"""Kaldi data directories (https://kaldi-asr.org/doc/data_prep.html) as NeMo lines.

`wav.scp` is needed; `text`, `segments`, `utt2spk`, `utt2lang`, `utt2dur`, `reco2dur` and `reco2file_and_channel` are
used where they are. Paths are relative to the current directory, as in Kaldi.

A fifth column of `segments` is the number of a channel, from 0; without it `reco2file_and_channel` says the channel, A
or B, or a number from 1 (from 0, where the file has a 0). As the commands of many a `wav.scp` cut the channel out
already, it is chosen only where there are several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from speechllm.data.manifests.headers import audio_seconds, command_seconds
from speechllm.data.manifests.lines import numbered_lines
from speechllm.data.manifests.nemo import AUDIO_COMMAND, CHANNEL_OF_SEVERAL
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, absolute, explain

_CHANNELS = "reco2file_and_channel"
_TABLES = ("wav.scp", "text", "utt2spk", "utt2lang", "utt2dur", "reco2dur", _CHANNELS)

Tables = dict[str, dict[bytes, bytes]]


def kaldi_files(folder: Path) -> list[Path]:
    """The files of a data directory that are read.

    Raises:
        ManifestError: there is no wav.scp.
    """
    if not (folder / "wav.scp").is_file():
        raise ManifestError(f"{folder / 'wav.scp'}: no such file; a Kaldi data directory must have it")
    return [path for name in (*_TABLES, "segments") if (path := _path(folder, name)).is_file()]


def _path(folder: Path, name: str) -> Path:
    """Where a table is: FunASR calls the texts text.txt."""
    path = folder / name
    return folder / "text.txt" if name == "text" and not path.is_file() else path


def kaldi_objects(folder: Path) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and NeMo line of every utterance, in the order of `segments`, or of `wav.scp` where there is none.

    The tables are held in memory. Where no file says how long a recording is, the header of its audio does.
    """
    tables: Tables = {}
    for name in _TABLES:
        tables[name] = {}
        if (path := _path(folder, name)).is_file():
            yield from _read_table(path, tables[name])
    tables[_CHANNELS] = _channels_from_zero(tables[_CHANNELS])
    has_segments = (folder / "segments").is_file()
    waiting = set(tables["wav.scp"])
    for where, line in numbered_lines(str(folder / ("segments" if has_segments else "wav.scp"))):
        try:
            if has_segments:
                yield where, _segment(line, tables)
            elif (recording := line.split(maxsplit=1)[0]) in waiting:
                waiting.remove(recording)
                yield where, _whole_recording(recording, tables)
        except (*LINE_ERRORS, OSError) as error:
            yield where, ManifestError(f"{where}: {explain(error)}")


def texts_without_audio(folder: Path) -> Iterator[tuple[str, str]]:
    """FILE:LINE and complaint about each line of `text` that no audio belongs to, by `segments` or `wav.scp`."""
    table = folder / ("segments" if (folder / "segments").is_file() else "wav.scp")
    if (texts := _path(folder, "text")).is_file():
        utterances = {line.split(maxsplit=1)[0] for _, line in numbered_lines(str(table))}
        for where, line in numbered_lines(str(texts)):
            if (name := line.split(maxsplit=1)[0]) not in utterances:
                yield where, f"{name.decode(errors='replace')} has a text, and no audio in {table.name}"


def _read_table(path: Path, table: dict[bytes, bytes]) -> Iterator[tuple[str, ManifestError]]:
    """Fills `table`, and yields the lines whose key it has already."""
    for where, line in numbered_lines(str(path)):
        key, *rest = line.strip().split(maxsplit=1)
        if key in table:
            name = key.decode(errors="replace")
            yield where, ManifestError(f"{where}: {name} is in {path.name} twice; the first line is used")
        else:
            table[key] = rest[0] if rest else b""


def _whole_recording(name: bytes, tables: Tables) -> dict:
    duration = tables["utt2dur"].get(name)
    seconds = _recording_seconds(name, tables) if duration is None else _seconds(duration, "utt2dur")
    return _utterance(name, name, seconds, tables)


def _segment(line: bytes, tables: Tables) -> dict:
    fields = line.split()
    if len(fields) not in (4, 5):
        raise ValueError(f"expected utterance, recording, start and end, found {len(fields)} fields")
    name, recording = fields[:2]
    if recording not in tables["wav.scp"]:
        raise ValueError(f"recording {_shown(recording)} is not in wav.scp")
    start = _seconds(fields[2], "start")
    to_its_end = fields[3].startswith(b"-1")
    end = _recording_seconds(recording, tables) if to_its_end else _seconds(fields[3], "end")
    if end <= start:
        raise ValueError(f"the segment begins at {start} s and ends at {end} s")
    utterance = _utterance(name, recording, round(end - start, 6), tables) | {"offset": start}
    if len(fields) == 5:
        utterance[CHANNEL_OF_SEVERAL] = _channel_number(fields[4], "segments")
    return utterance


def _channel_number(value: bytes, name: str) -> int:
    if not value.isdigit():
        raise ValueError(f"{name}: expected a channel, found {_shown(value)!r}")
    return int(value)


def _channels_from_zero(table: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """The numbers of the channels in `reco2file_and_channel`: the last field of each line."""
    names = {recording: (value.split() or [b""])[-1].upper() for recording, value in table.items()}
    first = 0 if b"0" in names.values() else 1
    for recording, name in names.items():
        if name.isdigit():
            names[recording] = b"%d" % (int(name) - first)
        elif len(name) == 1 and name.isalpha():
            names[recording] = b"%d" % (ord(name) - ord("A"))
    return names


def _utterance(name: bytes, recording: bytes, seconds: float, tables: Tables) -> dict:
    line = {"id": _text(name, "the id"), **_audio(recording, tables), "duration": seconds}
    line["text"] = _text(tables["text"].get(name, b""), f"text of {line['id']}")
    if recording in tables[_CHANNELS]:
        line[CHANNEL_OF_SEVERAL] = _channel_number(tables[_CHANNELS][recording], _CHANNELS)
    for field, table in (("speaker", "utt2spk"), ("lang", "utt2lang")):
        if name in tables[table]:
            line[field] = _text(tables[table][name], f"{table} of {line['id']}")
    return line


def _audio(recording: bytes, tables: Tables) -> dict[str, str]:
    where = _text(tables["wav.scp"][recording], "wav.scp")
    if where.endswith("|"):
        return {AUDIO_COMMAND: where[:-1].strip()}
    if not where:
        raise ValueError(f"wav.scp has no audio of {_shown(recording)}")
    if re.search(r"\.ark:\d+$", where):
        raise ValueError(f"wav.scp: {where} is inside a Kaldi archive; unpack it with wav-copy")
    return {"audio_filepath": absolute(where)}


def _recording_seconds(recording: bytes, tables: Tables) -> float:
    duration = tables["reco2dur"].get(recording)
    if duration is not None:
        return _seconds(duration, "reco2dur")
    audio = _audio(recording, tables)
    if AUDIO_COMMAND in audio:
        return command_seconds(audio[AUDIO_COMMAND])
    return audio_seconds(audio["audio_filepath"])


def _seconds(value: bytes, name: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name}: expected seconds, found {_shown(value)!r}")
    return seconds


def _text(value: bytes, name: str) -> str:
    """Bytes of a table as text.

    Args:
        name: what it is, for the error: the line is often that of another file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return value.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: {error}") from error


def _shown(value: bytes) -> str:
    return value.decode(errors="replace").strip()
