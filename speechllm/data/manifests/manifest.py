"""Manifests of every kind: lines to what planning needs of an utterance, or to lhotse cuts.

| kind | |
|---|---|
| nemo | JSON lines with `audio_filepath`, `duration`, ... (`nemo.py`); with `tar_path` NeMo's tarred form |
| lhotse | cuts, `.jsonl` or `.jsonl.gz` |
| shar | a directory of lhotse's Shar format (`shar.py`) |
| kaldi | a Kaldi data directory (`kaldi.py`) |

All are read one line at a time, and no audio file is opened, except by Kaldi directories that do not say how long their
recordings are. A line that cannot be understood is an error that names file and line.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.cut.data import DataCut
from lhotse.lazy import Dillable
from lhotse.serialization import deserialize_item

from speechllm.data.manifests.kaldi import kaldi_files, kaldi_objects
from speechllm.data.manifests.nemo import (
    HEADER_UNREAD,
    IS_SEGMENT,
    describe_nemo,
    is_nemo,
    nemo_cut,
    nemo_objects,
    stream_tarred,
    tarred_files,
    tarred_objects,
)
from speechllm.data.manifests.shar import shar_objects, shar_shards, stream_shar
from speechllm.data.manifests.source import (
    LINE_ERRORS,
    DataError,
    Entry,
    ManifestError,
    SourceConfig,
    duration_of,
    existing_files,
    explain,
    hotwords_of,
    is_remote,
    parse_line,
    string_of,
    task_of,
    words_of,
)
from speechllm.data.manifests.tar import TAR
from speechllm.prompt.label import WordTime

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
    "iter_objects",
    "manifest_files",
    "parse_line",
    "read_manifest",
    "stream_cuts",
    "to_cut",
]


def iter_objects(source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and JSON object of every line, or the error of that line; one at a time.

    An object is complete in itself and `source`: it can be stored as a line of its own.

    Raises:
        ManifestError: at once where the manifest is missing.
    """
    manifest_files(source)
    kind = _kind(source)
    if kind == "tarred":
        return tarred_objects(source)
    if kind == "shar":
        return shar_objects(source)
    if kind == "kaldi":
        return kaldi_objects(Path(source.path))
    return nemo_objects(existing_files(source.path))


def is_plain(source: SourceConfig) -> bool:
    """Whether the manifest is one uncompressed file whose lines can be read in place, by byte offset."""
    return _kind(source) == "lines" and Path(source.path).is_file() and not source.path.endswith(".gz")


def manifest_files(source: SourceConfig) -> list[Path]:
    """All files that a manifest consists of, those in which the audio is one by one aside.

    Raises:
        ManifestError: some are missing, or they are URLs.
    """
    if is_remote(source.path) or is_remote(source.tar_path or ""):
        raise ManifestError(f"{source.path}: URLs and commands can only be read as streams, not line by line")
    kind = _kind(source)
    if kind == "tarred":
        manifests, tars = tarred_files(source)
        return [Path(path) for path in (*manifests, *tars)]
    if kind == "shar":
        return [Path(path) for shard in shar_shards(source) for path in shard.values()]
    if kind == "kaldi":
        return kaldi_files(Path(source.path))
    return [Path(path) for path in existing_files(source.path)]


def _kind(source: SourceConfig) -> str:
    """lines, tarred, shar or kaldi."""
    if source.tar_path is not None:
        return "tarred"
    if source.kind in ("shar", "kaldi"):
        return source.kind
    if is_remote(source.path):
        return "shar"
    folder = Path(source.path)
    if not folder.is_dir():
        return "lines"
    if source.kind == "auto":
        if (folder / "wav.scp").is_file():
            return "kaldi"
        if any(folder.glob("cuts.*.jsonl*")):
            return "shar"
    raise ManifestError(
        f"{folder}: a directory, with neither a wav.scp as Kaldi's have, nor cuts.*.jsonl.gz as those of lhotse Shar"
    )


def describe(obj: dict, source: SourceConfig) -> Entry:
    """What an object of `iter_objects` says of its utterance. Equal to `describe_cut(to_cut(obj, source))`, and fast.

    Raises:
        ValueError, KeyError, TypeError, AssertionError: (`LINE_ERRORS`) the object makes no sense.
    """
    if _is_nemo(obj, source):
        return describe_nemo(obj, source)
    if obj["type"] not in ("MonoCut", "MultiCut", "Cut"):
        return describe_cut(to_cut(obj, source))
    supervisions = obj.get("supervisions") or []
    return _entry(
        obj["id"],
        duration_of(obj),
        [string_of(s, "text") for s in supervisions],
        [string_of(s, "language") for s in supervisions],
        [*(s.get("custom") for s in supervisions), obj.get("custom")],
        [words_of(s.get("alignment"), obj["start"]) for s in supervisions],
        source,
    )


def to_cut(obj: dict, source: SourceConfig) -> Cut:
    """The cut of an object of `iter_objects`; no audio file is opened.

    Of NeMo and Kaldi lines the recording is not known before it is read: the custom field `header_unread` says so.
    Audio in tar files is read from there (`speechllm.data.manifests.tar.with_tar_data`).

    Raises:
        ValueError, KeyError, TypeError, AssertionError: (`LINE_ERRORS`) the object makes no sense.
    """
    if _is_nemo(obj, source):
        return nemo_cut(obj, source)
    members = obj.get(TAR)
    obj = copy.deepcopy({name: value for name, value in obj.items() if name != TAR})  # lhotse takes it apart
    try:
        cut = deserialize_item(obj)
    except AttributeError as error:
        raise ValueError(f"not a lhotse cut: {error}") from error
    if not isinstance(cut, Cut):
        raise ValueError(f"a {type(cut).__name__}, where a cut is needed; make cuts of it with lhotse")
    if members is not None:
        cut.custom = (cut.custom or {}) | {TAR: members}
    return _with_defaults(cut, source)


def _is_nemo(obj: dict, source: SourceConfig) -> bool:
    if is_nemo(obj) and source.kind != "lhotse":
        return True
    if source.kind == "nemo":
        raise ValueError("not a NeMo line (no 'audio_filepath')")
    if "type" not in obj:
        raise ValueError("neither a NeMo line (no 'audio_filepath') nor a lhotse cut (no 'type')")
    return False


def describe_cut(cut: Cut) -> Entry:
    """What a cut says of its utterance: the texts of its supervisions in order; languages, task, translation and what
    the prompt needs are those of the first supervision that has them, or the cut's own custom fields. Cuts that are
    mixed of several have no word times.

    Raises:
        ValueError: a custom field has a wrong type or value.
    """
    has_times = isinstance(cut, DataCut)
    return _entry(
        cut.id,
        duration_of({"duration": cut.duration}),
        [s.text for s in cut.supervisions],
        [s.language for s in cut.supervisions],
        _customs(cut),
        [words_of(s.alignment, cut.start) if has_times else None for s in cut.supervisions],
        None,
    )


def _entry(
    name: str,
    duration: float,
    texts: list[str | None],
    languages: list[str | None],
    customs: list[dict | None],
    words: list[tuple[WordTime, ...] | None],
    source: SourceConfig | None,
) -> Entry:
    fields: dict = {}
    for custom in customs:
        fields = (custom or {}) | fields
    task = task_of(fields) or (source and source.task) or "asr"
    ast_text = string_of(fields, "ast_text", "answer") if task == "ast" else string_of(fields, "ast_text")
    return Entry(
        name,
        duration,
        " ".join(text.strip() for text in texts if text and text.strip()),
        next(filter(None, languages), None) or string_of(fields, "lang", "source_lang") or (source and source.lang),
        task,
        (ast_text or "").strip(),
        string_of(fields, "target_lang") or (source and source.target_lang),
        None if None in words or not words else tuple(itertools.chain(*words)),
        string_of(fields, "previous"),
        hotwords_of(fields),
    )


def _data_cuts(cut: Cut) -> list[DataCut]:
    """The cuts that a cut consists of, padding and silence aside."""
    parts = [track.cut for track in cut.tracks if not track.mute] if isinstance(cut, MixedCut) else [cut]
    return [part for part in parts if not isinstance(part, PaddingCut)]


def _customs(cut: Cut) -> list[dict | None]:
    """The custom fields, those that count most first."""
    return [*(s.custom for s in cut.supervisions), *(part.custom for part in _data_cuts(cut))]


def _with_defaults(cut: Cut, source: SourceConfig) -> Cut:
    """Fills in what `source` says of all its utterances, where the cut does not. Changes the cut."""
    entry, parts = describe_cut(cut), _data_cuts(cut)
    if not parts:
        return cut
    stated = {}
    if entry.lang is None and source.lang is not None:
        supervisions = [supervision for part in parts for supervision in part.supervisions]
        for supervision in supervisions:
            supervision.language = source.lang
        if not supervisions:
            stated["lang"] = source.lang
    if entry.target_lang is None and source.target_lang is not None:
        stated["target_lang"] = source.target_lang
    if source.task is not None and not any(custom and task_of(custom) for custom in _customs(cut)):
        stated["task"] = source.task
    if stated:
        parts[0].custom = (parts[0].custom or {}) | stated
    if source.channel is not None and isinstance(cut, DataCut):
        cut.custom = (cut.custom or {}) | {"channel": source.channel}
    return cut


class LazyManifest(Dillable):
    """Iterates over the cuts of a manifest, reading one line at a time; may be iterated again and again."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Cut]:
        for found in _cuts(self.source):
            if isinstance(found, ManifestError):
                raise found
            yield found


def _cuts(source: SourceConfig) -> Iterator[Cut | ManifestError]:
    for where, found in iter_objects(source):
        if isinstance(found, ManifestError):
            yield found
            continue
        try:
            cut = to_cut(found, source)
        except LINE_ERRORS as error:
            yield ManifestError(f"{where}: {explain(error)}")
        else:
            yield cut


def read_manifest(source: SourceConfig | str | Path) -> CutSet:
    """A lazy CutSet of a manifest, or of the one at a path.

    Raises:
        ManifestError: at once where a file is missing; while iterating for a line that cannot be used.
    """
    if not isinstance(source, SourceConfig):
        source = SourceConfig(str(source))
    manifest_files(source)
    return CutSet(LazyManifest(source))


def has_shards(source: SourceConfig) -> bool:
    """Whether it consists of tar shards, which a stream reads in random order."""
    return _kind(source) in ("tarred", "shar")


def stream_cuts(source: SourceConfig, seed: int, epoch: int) -> Iterator[Cut | ManifestError]:
    """One pass through a source in the order of its files; shards of tar files come in an order that follows from
    `seed` and `epoch`, with their audio in memory. In place of a line that cannot be used comes what is wrong with it.

    Raises:
        ManifestError: files are missing.
    """
    rng = np.random.default_rng([seed, epoch])
    kind = _kind(source)
    if kind == "tarred":
        yield from (found for _, found in stream_tarred(source, rng))
    elif kind == "shar":
        yield from (_with_defaults_or_error(where, found, source) for where, found in stream_shar(source, rng))
    else:
        yield from _cuts(source)


def _with_defaults_or_error(where: str, found: Cut | ManifestError, source: SourceConfig) -> Cut | ManifestError:
    if isinstance(found, ManifestError):
        return found
    try:
        return _with_defaults(found, source)
    except LINE_ERRORS as error:
        return ManifestError(f"{where}: cut {found.id}: {explain(error)}")
