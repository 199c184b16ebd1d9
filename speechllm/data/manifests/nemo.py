"""NeMo's manifests: JSON lines, and its tarred form, in which the audio is in tar shards.

The fields are those of NVIDIA NeMo's ASR and Canary data sets; the tarred form is what its script
`convert_to_tarred_audio_dataset.py` writes.
"""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from lhotse import AudioSource, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.serialization import open_best
from lhotse.supervision import AlignmentItem

from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifests.headers import audio_seconds, command_seconds
from speechllm.data.manifests.lines import (
    existing_files,
    expand_braces,
    is_skipped,
    open_lines,
    parse_line,
    parsed_lines,
)
from speechllm.data.manifests.source import (
    LINE_ERRORS,
    Entry,
    ManifestError,
    ShardError,
    SourceConfig,
    absolute,
    audio_path,
    duration_of,
    explain,
    field_at,
    hotwords_of,
    is_remote,
    is_url,
    seconds_of,
    string_of,
    words_of,
)
from speechllm.data.manifests.tar import TAR, forget_members, in_memory, read_member, scan_tar
from speechllm.data.manifests.task import what_to_write
from speechllm.prompt.label import WordTime
from speechllm.text.normalize import normalize_text

# Custom fields of cuts that come from NeMo lines: the header of the audio file has not been read yet; the line is of a
# part of the file.
HEADER_UNREAD = "header_unread"
IS_SEGMENT = "is_segment"

# Which channel of the file, or which of them to average: a number or a list; and one to choose only if the file has
# several, as it may have been cut out of them already.
CHANNEL = "channel"
CHANNEL_OF_SEVERAL = "channel_of_several"

# Instead of `audio_filepath`, in lines made from Kaldi directories: a command that writes the audio.
AUDIO_COMMAND = "audio_command"

# Fields of lines that are something else, and the way out.
_UNSERVED = {
    "conversations": "conversations of several turns (NeMo's multimodal_conversation) are not used: give a line with "
    "audio_filepath and text for each turn",
    "text_filepath": "texts in files of their own are not read: put them into the lines as text",
}


def is_nemo(line: dict) -> bool:
    """Whether the object of a line is NeMo's."""
    return "audio_filepath" in line or AUDIO_COMMAND in line or not _UNSERVED.keys().isdisjoint(line)


def describe_nemo(line: dict, source: SourceConfig) -> Entry:
    """What a line says; without a field `id`, the id is the audio path without extension, and the offset.

    The header of the audio is read only where the line has no duration: it is the whole file then, or the rest of it.

    Raises:
        KeyError, ValueError: a field is missing, has a wrong type or value, or is of a kind of line that is not used.
    """
    _check_served(line)
    path = line[AUDIO_COMMAND] if AUDIO_COMMAND in line else line["audio_filepath"]
    if not isinstance(path, str) or not path:
        raise ValueError(f"audio_filepath: expected a path, found {path!r}")
    offset = seconds_of(line, "offset") if line.get("offset") is not None else 0.0
    name = line.get("id")
    _channel(line, source)
    text = field_at(line, source.text_field or "text")
    language = field_at(line, source.lang_field) if source.lang_field else string_of(line, "source_lang", "lang")
    writing = what_to_write(line, text, language, source)
    words = _words(line, offset, source, writing.lang)
    return Entry(
        _derived_id(path, offset) if name is None else str(name),
        duration_of(line) if line.get("duration") is not None else _seconds_from(offset, line, source),
        writing.text,
        writing.lang,
        writing.task,
        writing.ast_text,
        writing.target_lang,
        words if writing.text or writing.ast_text else None,
        string_of(line, "previous"),
        hotwords_of(line),
    )


def _check_served(line: dict) -> None:
    """Whether it is a line that can be used.

    Raises:
        ValueError: it is of a kind of line that is not used.
    """
    for name, complaint in _UNSERVED.items():
        if line.get(name) is not None:
            raise ValueError(f"{name}: {complaint}")
    if isinstance(path := line.get("audio_filepath"), list):
        raise ValueError(f"audio_filepath: a list of {len(path)} files; give a line for each, or a MultiCut of lhotse")


def _words(line: dict, offset: float, source: SourceConfig, lang: str | None) -> tuple[WordTime, ...] | None:
    words = words_of(line.get("alignment"), offset)
    if words is None or not source.text:
        return words
    return tuple(word._replace(word=normalize_text(word.word, source.text, lang)) for word in words)


def _seconds_from(offset: float, line: dict, source: SourceConfig) -> float:
    """Seconds from `offset` to the end of the file."""
    if AUDIO_COMMAND in line:
        seconds = command_seconds(line[AUDIO_COMMAND])
    elif TAR in line:
        seconds = audio_seconds(read_member(line[TAR]["recording"]))
    else:
        seconds = audio_seconds(_audio_source(line, source).source)
    return _rest(seconds, offset)


def _rest(seconds: float, offset: float) -> float:
    if offset >= seconds:
        raise ValueError(f"offset: {offset:g} s is beyond the {seconds:.3f} s of the file")
    return seconds - offset


def _channel(line: dict, source: SourceConfig) -> int | list[int] | None:
    """Which channels to average; None for all.

    Raises:
        ValueError: the line says something else.
    """
    name = next((name for name in ("channel", "channel_selector") if line.get(name) is not None), None)
    if name is None:
        return source.channel
    value = line[name]
    if value == "average":
        return None
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{name}: expected the number of a channel, a list of them, or average, found {value!r}")
    return numbers if isinstance(value, list) else value


def nemo_cut(line: dict, source: SourceConfig) -> MonoCut:
    """The cut of one line, without touching the audio file.

    The recording is declared as 16 kHz mono up to the end of the segment, and marked as such; the reader replaces it by
    what the file's header says.

    Raises:
        KeyError, ValueError: a field is missing, or has a wrong type or value.
    """
    entry = describe_nemo(line, source)
    is_segment = line.get("offset") is not None
    offset = seconds_of(line, "offset") if is_segment else 0.0
    num_samples = max(1, round((offset + entry.duration) * SAMPLE_RATE))
    recording = Recording(
        id=entry.id,
        sources=[_audio_source(line, source)],
        sampling_rate=SAMPLE_RATE,
        num_samples=num_samples,
        duration=num_samples / SAMPLE_RATE,
    )
    stated = {
        # a translation is said to be one even where it is empty: the text would be taken for it
        "task": entry.task if entry.task == "ast" or entry.target_lang or entry.ast_text else None,
        "ast_text": entry.ast_text if entry.task == "ast" else entry.ast_text or None,
        "target_lang": entry.target_lang,
        "previous": entry.previous,
        "hotwords": None if entry.hotwords is None else list(entry.hotwords),
    }
    supervision = SupervisionSegment(
        id=entry.id,
        recording_id=entry.id,
        start=0.0,
        duration=entry.duration,
        text=entry.text,
        language=entry.lang,
        speaker=string_of(line, "speaker"),
        custom={name: value for name, value in stated.items() if value is not None} or None,
        alignment=_alignment(line, entry),
    )
    custom: dict[str, Any] = {HEADER_UNREAD: True, IS_SEGMENT: is_segment}
    for name, value in ((CHANNEL, _channel(line, source)), (CHANNEL_OF_SEVERAL, line.get(CHANNEL_OF_SEVERAL))):
        if value is not None:
            custom[name] = value
    if TAR in line:
        custom[TAR] = line[TAR]
    return MonoCut(entry.id, offset, entry.duration, 0, supervisions=[supervision], recording=recording, custom=custom)


def _alignment(line: dict, entry: Entry) -> dict[str, list[AlignmentItem]] | None:
    if line.get("alignment") is None:
        return None
    alignment = {kind: [AlignmentItem.deserialize(item) for item in items] for kind, items in line["alignment"].items()}
    if entry.words is not None:
        items = zip(alignment["word"], entry.words, strict=True)
        alignment["word"] = [item._replace(symbol=word.word) for item, word in items]
    return alignment


def _derived_id(path: str, offset: float) -> str:
    stem, dot, extension = path.rpartition(".")
    name = stem if dot and "/" not in extension else path
    return f"{name}@{offset:.10g}" if offset else name


def _audio_source(line: dict, source: SourceConfig) -> AudioSource:
    if AUDIO_COMMAND in line:
        return AudioSource(type="command", channels=[0], source=line[AUDIO_COMMAND])
    if TAR in line:  # a name to be shown; the data come from elsewhere
        path = os.path.join(line[TAR]["recording"]["path"], line["audio_filepath"])
    else:
        path = audio_path(line["audio_filepath"], os.path.dirname(source.path))
    return AudioSource(type="url" if is_url(path) else "file", channels=[0], source=path)


def with_full_path(line: dict, folder: str) -> dict:
    """The line of one of several manifests, which may lie in several folders, with the whole path of its audio; the id
    stays what it would be from the path as it is given."""
    path, offset = line.get("audio_filepath"), line.get("offset") or 0.0
    if not isinstance(path, str) or not isinstance(offset, (int, float)):
        return line  # an error when it is described
    name = _derived_id(path, offset) if line.get("id") is None else line["id"]
    return line | {"id": name, "audio_filepath": absolute(audio_path(path, folder))}


@dataclass
class TarShard:
    """A tar file and the lines of its audio: those of a manifest of its own, or of `places` (number and byte offset) in
    one manifest for all."""

    tar: str
    manifest: str
    places: tuple[array, array] | None = None

    def lines(self) -> Iterator[tuple[str, dict | ManifestError]]:
        if self.places is None:
            yield from parsed_lines(self.manifest)
            return
        with open_lines(self.manifest) as file:
            for number, offset in zip(*self.places, strict=True):
                file.seek(offset)
                yield f"{self.manifest}:{number}", parse_line(file.readline())


@dataclass
class TarShards:
    """The shards of a source; `errors`: lines of one manifest for all that say no shard, as (FILE:LINE, error)."""

    shards: list[TarShard] = field(default_factory=list)
    errors: list[tuple[str, ManifestError]] = field(default_factory=list)


def tarred_files(source: SourceConfig) -> tuple[list[str], list[str]]:
    """The manifests and the tar files of a tarred source.

    Raises:
        ManifestError: some are missing, or there are not as many of both.
    """
    manifests, tars = existing_files(source.path), expand_braces(source.tar_path or "")
    for tar in tars:
        if not is_remote(tar) and not Path(tar).is_file():
            raise ManifestError(f"{tar}: no such tar file")
    if len(manifests) not in (1, len(tars)):
        raise ManifestError(
            f"{source.path}: {len(manifests)} manifests, and {len(tars)} tar files in {source.tar_path}: there must be "
            "a manifest beside each tar file, or one for all whose lines have shard_id"
        )
    return manifests, tars


def tar_shards(source: SourceConfig) -> TarShards:
    """The shards of a tarred source, and which lines of the manifests belong to each."""
    manifests, tars = tarred_files(source)
    if len(manifests) == len(tars):
        return TarShards([TarShard(*pair) for pair in zip(tars, manifests, strict=True)])
    (manifest,) = manifests
    if is_remote(manifest):
        raise ManifestError(f"{manifest}: one manifest for all tar files must be a file here; copy it")
    places = [(array("q"), array("q")) for _ in tars]
    result = TarShards([TarShard(tar, manifest, of_tar) for tar, of_tar in zip(tars, places, strict=True)])
    by_number = {_shard_number(tar): of_tar for tar, of_tar in zip(tars, places, strict=True)}
    if None in by_number or len(by_number) < len(tars):
        raise ManifestError(f"{source.tar_path}: the names must end in the numbers of the shards, as in audio_0.tar")
    with open_lines(manifest) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    shard_id = parse_line(line)["shard_id"]
                    if shard_id not in by_number:
                        raise ValueError(f"shard_id: {shard_id!r} is not among the {len(tars)} tar files")
                    numbers, offsets = by_number[shard_id]
                    numbers.append(number)
                    offsets.append(offset)
                except LINE_ERRORS as error:
                    where = f"{manifest}:{number}"
                    result.errors.append((where, ManifestError(f"{where}: {explain(error)}")))
            offset += len(line)
    return result


def _shard_number(tar: str) -> int | None:
    match = re.search(r"(\d+)\.tar\b[^/]*$", tar)
    return int(match[1]) if match else None


def tarred_objects(source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and object of every line, with where its audio is in the tar shard; shard by shard."""
    shards = tar_shards(source)
    yield from shards.errors
    for shard in shards.shards:
        yield from tarred_shard_objects(shard)


def tarred_shard_objects(shard: TarShard) -> Iterator[tuple[str, dict | ManifestError]]:
    """Those of one shard."""
    members = {}
    try:
        for member in scan_tar(shard.tar):
            members[member["name"].removeprefix("./")] = member
    except ManifestError as error:
        yield shard.tar, ShardError(str(error))
    used = set()
    for where, line in shard.lines():
        if isinstance(line, ManifestError):
            yield where, line
            continue
        name = next((name for name in (*_member_names(line), _whole_file(line)) if name in members), None)
        if name is None:
            yield from _no_member(where, line, shard)
            continue
        used.add(name)
        try:
            if not is_skipped(line):
                yield where, line | {TAR: {"recording": members[name]}}
        except ValueError as error:
            yield where, ManifestError(f"{where}: {error}")
    for name in (name for name in members if name not in used):
        yield _no_line(name, shard)


def _member_names(line: dict) -> list[str]:
    """The names that the audio of a line may have in the tar file: its own, or flattened as NeMo does it."""
    path = line.get("audio_filepath")
    if not isinstance(path, str):
        return []
    stem, extension = os.path.splitext(path)
    return list(dict.fromkeys([path.removeprefix("./"), stem.replace("/", "_").replace(".", "_") + extension]))


def _whole_file(line: dict) -> str | None:
    """The member of which a line is a further part: NeMo calls these NAME-sub1, NAME-sub2 and so on."""
    match = re.fullmatch(r"(.*)-sub\d+(\.\w+)?", str(line.get("audio_filepath")))
    return match and match[1] + (match[2] or "")


def _no_member(where: str, line: dict, shard: TarShard) -> Iterator[tuple[str, ManifestError]]:
    """What is wrong with a line whose audio is not in the tar file; nothing if it is to be skipped."""
    try:
        if is_skipped(line):
            return
        _check_served(line)
    except ValueError as error:
        yield where, ManifestError(f"{where}: {error}")
        return
    path = line.get("audio_filepath")
    yield where, ManifestError(f"{where}: audio_filepath: {path!r} is not in {shard.tar}")


def _no_line(name: str, shard: TarShard) -> tuple[str, ManifestError]:
    where = f"{shard.tar}:{name}"
    return where, ManifestError(f"{where}: no line of {shard.manifest} is about it")


def stream_tarred_shard(shard: TarShard, source: SourceConfig) -> Iterator[tuple[str, MonoCut | ManifestError]]:
    """FILE:LINE and cut of every line of a shard, with its audio in memory: read once from beginning to end, as URLs,
    commands and compressed files need it."""
    missing: dict[str, dict] = {}
    by_name: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    for where, line in _readable(shard.manifest, shard.lines):
        if isinstance(line, ManifestError):
            yield where, line
            continue
        missing[where] = line
        for name in _member_names(line):
            by_name.setdefault(name, []).append(where)
        if (whole := _whole_file(line)) is not None:
            parts.setdefault(whole, []).append(where)

    # The data of lines that are perhaps parts of a member, until it is known that they have no member of their own.
    waiting: list[tuple[str, bytes]] = []
    for name, data in _readable(shard.tar, lambda: _members(shard.tar)):
        if isinstance(data, ManifestError):
            yield name, data
            return  # where the rest of the audio is missing, all the lines that are left are not worth a word
        own = [where for where in by_name.get(name, ()) if where in missing]
        for where in own:
            yield from _cut_in_memory(where, missing.pop(where), source, data)
        waiting += ((where, data) for where in parts.get(name, ()))
        if not own and name not in parts:
            yield _no_line(name, shard)
    for where, data in waiting:
        if where in missing:
            yield from _cut_in_memory(where, missing.pop(where), source, data)
    for where, line in missing.items():
        yield from _no_member(where, line, shard)


def _cut_in_memory(
    where: str, line: dict, source: SourceConfig, data: bytes
) -> Iterator[tuple[str, MonoCut | ManifestError]]:
    """The one cut, or none of a line that is to be skipped."""
    try:
        if is_skipped(line):
            return
        if line.get("duration") is None:
            offset = seconds_of(line, "offset") if line.get("offset") is not None else 0.0
            line = line | {"duration": _rest(audio_seconds(data), offset)}
        cut = nemo_cut(line, source)
    except LINE_ERRORS as error:
        yield where, ManifestError(f"{where}: {explain(error)}")
        return
    cut.recording = in_memory(cut.recording, data)
    yield where, cut


def _members(tar_path: str) -> Iterator[tuple[str, bytes]]:
    with open_best(tar_path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        while (member := tar.next()) is not None:
            forget_members(tar)
            if member.isfile():
                yield member.name.removeprefix("./"), cast(IO[bytes], tar.extractfile(member)).read()


def _readable(path: str, read: Callable[[], Iterator[tuple]]) -> Iterator[tuple]:
    """What `read` yields, and at last why it could not go on, if so."""
    try:
        yield from read()
    except MemoryError:
        raise
    except Exception as error:  # of lhotse's ways to open URLs and commands each has its own
        yield path, ShardError(f"{path}: cannot be read to its end ({error})")
