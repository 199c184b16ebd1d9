"""Manifests of every kind (`kinds.py`): lines to what planning needs of an utterance, or to lhotse cuts.

All are read one line at a time, and no audio file is opened, except where nothing says how long the recordings are. A
line that cannot be understood is an error that names file and line.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.lazy import Dillable
from lhotse.serialization import deserialize_item

from speechllm.data.manifests.cuts import describe_cut, entry_of, settled_cut
from speechllm.data.manifests.kaldi import kaldi_files, kaldi_objects, texts_without_audio
from speechllm.data.manifests.kinds import ROW_FILES, kind_of, row_files, table_files, tar_files
from speechllm.data.manifests.lines import existing_files, is_compressed, is_skipped, parse_line, used_lines
from speechllm.data.manifests.messages import message_objects
from speechllm.data.manifests.nemo import (
    HEADER_UNREAD,
    IS_SEGMENT,
    describe_nemo,
    is_nemo,
    nemo_cut,
    tarred_files,
    tarred_objects,
    with_full_path,
)
from speechllm.data.manifests.parquet import row_objects
from speechllm.data.manifests.remote import NoConnection, local_copy
from speechllm.data.manifests.shar import shar_objects, shar_shards
from speechllm.data.manifests.source import (
    LINE_ERRORS,
    DataError,
    Entry,
    ManifestError,
    SourceConfig,
    audio_path,
    duration_of,
    explain,
    is_remote,
    is_url,
    is_url_of_shar,
)
from speechllm.data.manifests.supervisions import (
    part_of_json,
)
from speechllm.data.manifests.tables import durations_beside, table_objects
from speechllm.data.manifests.tar import TAR
from speechllm.data.manifests.webdataset import webdataset_objects

__all__ = [
    "HEADER_UNREAD",
    "IS_SEGMENT",
    "LINE_ERRORS",
    "DataError",
    "Entry",
    "ManifestError",
    "SourceConfig",
    "describe",
    "describe_cut",
    "explain",
    "is_plain",
    "is_skipped",
    "iter_objects",
    "lost_texts",
    "manifest_files",
    "parse_line",
    "read_manifest",
    "to_cut",
]


def iter_objects(source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and JSON object of every line, or the error of that line; one at a time.

    An object is complete in itself and `source`: it can be stored as a line of its own.

    Raises:
        ManifestError: at once where the manifest is missing.
    """
    manifest_files(source)
    kind = kind_of(source)
    if kind == "tarred":
        return tarred_objects(source)
    if kind == "shar":
        return shar_objects(source)
    if kind == "kaldi":
        if source.text_field is not None or source.lang_field is not None:
            raise ManifestError(f"{source.path}: text_field and lang_field are not for Kaldi directories")
        return kaldi_objects(Path(source.path))
    if kind in ROW_FILES:
        return row_objects(row_files(source, kind), source)
    if kind == "webdataset":
        return webdataset_objects(tar_files(source), source)
    if kind == "messages":
        return message_objects(table_files(source), source)
    if kind == "table":
        return table_objects(table_files(source), source)
    return _line_objects(existing_files(source.path), source)


def _line_objects(files: list[str], source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    for path in files:
        for where, found in used_lines(path):
            if path != source.path and not isinstance(found, ManifestError):  # of a pattern, maybe in several folders
                folder = os.path.dirname(path)
                found = with_full_path(found, folder) if is_nemo(found) else _with_paths(found, folder)
            yield where, found


def lost_texts(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """FILE:LINE of texts that no audio belongs to, and what is wrong; only Kaldi directories can have such."""
    if kind_of(source) == "kaldi":
        yield from texts_without_audio(Path(source.path))


def is_plain(source: SourceConfig) -> bool:
    """Whether the manifest is one uncompressed file whose lines can be read in place, by byte offset."""
    return kind_of(source) == "lines" and Path(source.path).is_file() and not is_compressed(source.path)


def manifest_files(source: SourceConfig) -> list[Path]:
    """All files that a manifest consists of, those in which the audio is one by one aside; copies of those at URLs.

    Raises:
        ManifestError: some are missing, or they are commands, or URLs of tar files.
    """
    if is_url_of_shar(source.path) or is_remote(source.tar_path or ""):
        raise ManifestError(f"{source.path}: URLs and commands can only be read as streams, not line by line")
    kind = kind_of(source)
    if kind == "tarred":
        manifests, tars = tarred_files(source)
        return [Path(path) for path in (*manifests, *tars)]
    if kind == "shar":
        return [Path(path) for shard in shar_shards(source) for path in shard.values()]
    if kind == "kaldi":
        return kaldi_files(Path(source.path))
    if kind in ROW_FILES:
        return [Path(path) for path in row_files(source, kind)]
    if kind == "webdataset":
        return [Path(path) for path in tar_files(source)]
    files = existing_files(source.path) if kind == "lines" else table_files(source)
    here = [local_copy(path) if is_url(path) else Path(path) for path in files]
    return here + (durations_beside(files) if kind == "table" else [])


def describe(obj: dict, source: SourceConfig) -> Entry:
    """What an object of `iter_objects` says of its utterance. Equal to `describe_cut(to_cut(obj, source))`, and fast.

    Raises:
        ValueError, KeyError, TypeError, AssertionError: (`LINE_ERRORS`) the object makes no sense.
    """
    if _is_nemo(obj, source):
        return describe_nemo(obj, source)
    if obj["type"] not in ("MonoCut", "MultiCut", "Cut"):
        return describe_cut(to_cut(obj, source))
    return entry_of(obj["id"], duration_of(obj), [part_of_json(obj)], source)


def to_cut(obj: dict, source: SourceConfig) -> Cut:
    """The cut of an object of `iter_objects`; no audio file is opened.

    Of NeMo and Kaldi lines the recording is not known before it is read: the custom field `header_unread` says so.
    Audio in tar files is read from there (`speechllm.data.manifests.tar.with_tar_data`).

    Raises:
        ValueError, KeyError, TypeError, AssertionError: (`LINE_ERRORS`) the object makes no sense.
    """
    if _is_nemo(obj, source):
        try:
            return nemo_cut(obj, source)
        except NoConnection as error:  # one line of many, which an index, that is made once, must not lack: `describe`
            raise ValueError(str(error)) from error
    members = obj.get(TAR)
    folder = source.path if os.path.isdir(source.path) else os.path.dirname(source.path)
    obj = _with_paths({name: value for name, value in obj.items() if name != TAR}, folder)
    try:
        cut = deserialize_item(obj)
    except AttributeError as error:
        raise ValueError(f"not a lhotse cut: {error}") from error
    if not isinstance(cut, Cut):
        raise ValueError(f"a {type(cut).__name__}, where a cut is needed; make cuts of it with lhotse")
    if members is not None:
        cut.custom = (cut.custom or {}) | {TAR: members}
    return settled_cut(cut, source)


def _with_paths(obj: dict, folder: str) -> dict:
    """A copy of a lhotse cut in which relative paths are resolved, see `audio_path`."""
    obj = copy.deepcopy(obj)  # lhotse, too, takes it apart
    tracks = obj.get("tracks")
    cuts = [track.get("cut") for track in tracks if isinstance(track, dict)] if isinstance(tracks, list) else [obj]
    for cut in cuts:
        if not isinstance(cut, dict):
            continue
        recording, features = cut.get("recording"), cut.get("features")
        sources = recording.get("sources") if isinstance(recording, dict) else None
        for part in sources if isinstance(sources, list) else ():
            if isinstance(part, dict) and part.get("type") == "file" and isinstance(part.get("source"), str):
                part["source"] = audio_path(part["source"], folder)
        if isinstance(features, dict):
            path = features.get("storage_path")
            if isinstance(path, str) and path and not is_remote(path):
                features["storage_path"] = audio_path(path, folder)
    return obj


def _is_nemo(obj: dict, source: SourceConfig) -> bool:
    if is_nemo(obj) and source.kind != "lhotse":
        return True
    if source.kind == "nemo":
        raise ValueError("not a NeMo line (no 'audio_filepath')")
    if "type" not in obj:
        raise ValueError("neither a NeMo line (no 'audio_filepath') nor a lhotse cut (no 'type')")
    return False


class LazyManifest(Dillable):
    """Iterates over the cuts of a manifest, reading one line at a time; may be iterated again and again."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Cut]:
        for found in manifest_cuts(self.source):
            if isinstance(found, ManifestError):
                raise found
            yield found


def manifest_cuts(source: SourceConfig) -> Iterator[Cut | ManifestError]:
    """The cuts of a manifest; in place of a line that cannot be used, what is wrong with it."""
    for where, found in iter_objects(source):
        yield found if isinstance(found, ManifestError) else cut_or_error(found, where, source)


def cut_or_error(fields: dict, where: str, source: SourceConfig) -> Cut | ManifestError:
    """`to_cut`, or what is wrong with the line; `where` is its file and number."""
    try:
        return to_cut(fields, source)
    except LINE_ERRORS as error:
        return ManifestError(f"{where}: {explain(error)}")


def read_manifest(source: SourceConfig | str | Path) -> CutSet:
    """A lazy CutSet of a manifest, or of the one at a path.

    Raises:
        ManifestError: at once where a file is missing; while iterating for a line that cannot be used.
    """
    if not isinstance(source, SourceConfig):
        source = SourceConfig(str(source))
    manifest_files(source)
    return CutSet(LazyManifest(source))
