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
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet, fastcopy
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut
from lhotse.cut.data import DataCut
from lhotse.lazy import Dillable
from lhotse.serialization import deserialize_item
from lhotse.supervision import SupervisionSegment

from speechllm.data.manifests.kaldi import kaldi_files, kaldi_objects, texts_without_audio
from speechllm.data.manifests.lines import existing_files, is_compressed, is_skipped, parse_line, used_lines
from speechllm.data.manifests.nemo import (
    HEADER_UNREAD,
    IS_SEGMENT,
    describe_nemo,
    is_nemo,
    nemo_cut,
    stream_tarred_shard,
    tar_shards,
    tarred_files,
    tarred_objects,
    tarred_shard_objects,
    with_full_path,
)
from speechllm.data.manifests.shar import shar_objects, shar_shard_objects, shar_shards, stream_shar_shard
from speechllm.data.manifests.source import (
    LINE_ERRORS,
    DataError,
    Entry,
    ManifestError,
    ShardError,
    SourceConfig,
    audio_path,
    duration_of,
    explain,
    hotwords_of,
    is_remote,
    string_of,
)
from speechllm.data.manifests.supervisions import (
    Part,
    Said,
    Understood,
    bounds,
    data_cuts,
    in_order,
    part_of_json,
    parts_of,
    translation_of_all,
    understand,
)
from speechllm.data.manifests.tar import TAR
from speechllm.data.manifests.task import TRANSLATIONS, Writing, what_to_write
from speechllm.text.languages import same_language

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
        if source.text_field is not None or source.lang_field is not None:
            raise ManifestError(f"{source.path}: text_field and lang_field are not for Kaldi directories")
        return kaldi_objects(Path(source.path))
    return _line_objects(existing_files(source.path))


def _line_objects(files: list[str]) -> Iterator[tuple[str, dict | ManifestError]]:
    for path in files:
        for where, found in used_lines(path):
            if len(files) > 1 and not isinstance(found, ManifestError):  # they may lie in several folders
                folder = os.path.dirname(path)
                found = with_full_path(found, folder) if is_nemo(found) else _with_paths(found, folder)
            yield where, found


def lost_texts(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """FILE:LINE of texts that no audio belongs to, and what is wrong; only Kaldi directories can have such."""
    if _kind(source) == "kaldi":
        yield from texts_without_audio(Path(source.path))


def is_plain(source: SourceConfig) -> bool:
    """Whether the manifest is one uncompressed file whose lines can be read in place, by byte offset."""
    return _kind(source) == "lines" and Path(source.path).is_file() and not is_compressed(source.path)


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
    return _entry(obj["id"], duration_of(obj), [part_of_json(obj)], source)


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
    return _settled(cut, source)


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


def describe_cut(cut: Cut) -> Entry:
    """What a cut of `to_cut` says of its utterance: the texts of its supervisions in the order of their times; language
    and what the prompt needs are those of the first supervision that has them, or the cut's own custom fields. Cuts
    that are mixed of several have no word times.

    Raises:
        ValueError: it cannot be told what is said, or a custom field has a wrong type or value.
    """
    entry = _entry(cut.id, duration_of({"duration": cut.duration}), parts_of(cut), None)
    return entry if isinstance(cut, DataCut) else dataclasses.replace(entry, words=None)


def _entry(name: str, duration: float, parts: Sequence[Part], source: SourceConfig | None) -> Entry:
    found = [understand(part, source) for part in parts]
    said = sorted(itertools.chain(*(part.said for part in found)), key=lambda one: bounds(one.supervision))
    fields: dict = {}
    for custom in [*(one.supervision.custom for one in said), *(part.custom for part in parts)]:
        fields = (custom or {}) | fields
    if said:
        inside = in_order(said)
        writing = _together(said, inside, parts)
    else:
        inside, writing = [], _without_supervisions(fields, source)
    words = [one.supervision.words for one in inside]
    all_words = [word for of_one in words for word in of_one or ()]
    return Entry(
        name,
        duration,
        writing.text,
        writing.lang,
        writing.task,
        writing.ast_text,
        writing.target_lang,
        None if None in words or not words else tuple(all_words),
        string_of(fields, "previous"),
        hotwords_of(fields),
    )


def _without_supervisions(fields: dict, source: SourceConfig | None) -> Writing:
    return what_to_write(fields, None, string_of(fields, "source_lang", "lang"), source)


def _together(said: Sequence[Said], inside: Sequence[Said], parts: Sequence[Part]) -> Writing:
    """What is to be written of a whole cut.

    Args:
        said: all of its supervisions by time.
        inside: those that have something to write.

    Raises:
        ValueError: they are to be written in several ways.
    """
    writings = [one.writing for one in inside or said]
    ways = {(w.task, w.target_lang) for w in writings}
    if len(ways) > 1 and any(task == "ast" for task, _ in ways):
        listed = ", ".join(f"{task} into {target or 'no language'}" for task, target in sorted(ways, key=str))
        raise ValueError(f"supervisions of several tasks: {listed}")
    spoken = list(dict.fromkeys(one.writing.lang for one in inside if one.writing.lang))
    if not all(same_language(spoken[0], lang) for lang in spoken):
        raise ValueError(
            f"supervisions of several languages ({', '.join(spoken)}), and a prompt has room for one: make a cut of "
            "each with lhotse's cut.trim_to_supervisions(), or name them alike with `languages` of the source"
        )
    custom = {name: value for part in parts for name, value in part.custom.items()}
    return Writing(
        " ".join(one.writing.text for one in inside if one.writing.text),
        next((w.lang for w in writings if w.lang), None),
        writings[0].task,
        translation_of_all(inside, custom),
        next((w.target_lang for w in writings if w.target_lang), None),
    )


def _settled(cut: Cut, source: SourceConfig) -> Cut:
    """The cut so that `describe_cut` says of it what it says to `source`, with the channels that are to be averaged.
    Changes the cut.

    Raises:
        ValueError: see `describe_cut`.
    """
    parts, cuts = parts_of(cut), data_cuts(cut)
    _entry(cut.id, duration_of({"duration": cut.duration}), parts, source)  # for its errors
    settled = {}
    found = [understand(part, source) for part in parts]
    for part, data_cut, understood in zip(parts, cuts, found, strict=True):
        data_cut.supervisions = [_settled_supervision(data_cut, part, one) for one in understood.said]
        settled[id(data_cut)] = _on_channels(data_cut, part, understood)
    if cuts and not any(understood.said for understood in found):
        fields: dict = {}
        for part in parts:
            fields = part.custom | fields
        writing = _without_supervisions(fields, source)
        stated = _stated(writing) | {"lang": writing.lang, "source_lang": writing.lang}
        stated["asr_text"] = writing.text or None
        first = settled[id(cuts[0])]
        first.custom = (first.custom or {}) | {name: value for name, value in stated.items() if value is not None}
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            track.cut = settled.get(id(track.cut), track.cut)
        return cut
    return settled.get(id(cut), cut)


def _settled_supervision(cut: DataCut, part: Part, one: Said) -> SupervisionSegment:
    original, supervision, writing = cut.supervisions[one.supervision.number], one.supervision, one.writing
    stated = _stated(writing)
    of_cut, of_supervision = (
        any(custom.get(name) is not None for name in TRANSLATIONS) for custom in (part.custom, supervision.custom)
    )
    if of_cut and not of_supervision:  # one for all supervisions of the cut
        cut.custom = (cut.custom or {}) | {"ast_text": stated.pop("ast_text", writing.ast_text)}
    if (supervision.custom | part.custom).get("source_lang") is not None:
        stated["source_lang"] = writing.lang
    custom = (original.custom or {}) | {name: value for name, value in stated.items() if value is not None}
    alignment = original.alignment
    if alignment is not None and supervision.words is not None:
        items = zip(alignment["word"], supervision.words, strict=True)
        alignment = alignment | {"word": [item._replace(symbol=word.word) for item, word in items]}
    text = None if original.text is None and not writing.text else writing.text
    return fastcopy(original, text=text, language=writing.lang, custom=custom or None, alignment=alignment)


def _stated(writing: Writing) -> dict[str, str | None]:
    """The custom fields that say what is to be written; none of a plain transcript."""
    if writing.task == "asr" and writing.target_lang is None and not writing.ast_text:
        return {}
    stated: dict[str, str | None] = {"task": writing.task, "target_lang": writing.target_lang}
    # of a translation even where it is empty: the text would be taken for it
    return stated | {"ast_text": writing.ast_text if writing.task == "ast" else writing.ast_text or None}


def _on_channels(cut: DataCut, part: Part, understood: Understood) -> DataCut:
    """The cut of these of its channels alone."""
    if understood.channels == part.channels:
        return cut
    channels = sorted(understood.channels)
    channel = channels[0] if len(channels) == 1 else channels
    return (MonoCut if len(channels) == 1 else MultiCut)(
        cut.id,
        cut.start,
        cut.duration,
        channel,
        [fastcopy(supervision, channel=channel) for supervision in cut.supervisions],
        recording=cut.recording,
        custom=cut.custom,
    )


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


def stream_cuts(
    source: SourceConfig, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Cut | ManifestError]:
    """One pass through a source in the order of its files; shards of tar files come in an order that follows from
    `seed` and `epoch`. Audio in tar files is read when the cut is used; that of URLs, commands and compressed tar files
    is in memory. In place of a line that cannot be used comes what is wrong with it.

    Args:
        rank, world_size: each rank has as many shards, all its own; of the shards that are left, and of sources without
            shards, every `world_size`-th cut.

    Raises:
        ManifestError: files are missing.
    """
    if not has_shards(source):
        yield from islice(_cuts(source), rank, None, world_size)
        return
    errors, shards = _shard_streams(source)
    yield from errors
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    shared_out = len(order) // world_size * world_size
    for i in order[:shared_out][rank::world_size]:
        yield from shards[i]()
    for i in order[shared_out:]:
        yield from islice(shards[i](), rank, None, world_size)


def _shard_streams(
    source: SourceConfig,
) -> tuple[list[ManifestError], list[Callable[[], Iterator[Cut | ManifestError]]]]:
    """Lines that belong to no shard, and what opens the stream of each shard."""
    if _kind(source) == "tarred":
        found = tar_shards(source)
        streams: list[Callable[[], Iterator[Cut | ManifestError]]] = [
            partial(_cuts_in_place, tarred_shard_objects, shard, source)
            if _can_be_read_in_place(shard.tar)
            else partial(_cuts_in_memory, partial(stream_tarred_shard, shard, source), None)
            for shard in found.shards
        ]
        return [error for _, error in found.errors], streams
    return [], [
        partial(_cuts_in_place, shar_shard_objects, shard, source)
        if all(_can_be_read_in_place(path) for field, path in shard.items() if field != "cuts")
        else partial(_cuts_in_memory, partial(stream_shar_shard, shard), source)
        for shard in shar_shards(source)
    ]


def _can_be_read_in_place(path: str) -> bool:
    """Whether the members of a tar file, or the lines of what stands for one, can be read at any time."""
    return not is_remote(path) and (".jsonl" in path or not is_compressed(path))


def _cuts_in_place(
    objects: Callable[[Any], Iterator[tuple[str, dict | ManifestError]]], shard: Any, source: SourceConfig
) -> Iterator[Cut | ManifestError]:
    """The cuts of a shard. One that cannot be read to its end is one error, not one for each line that is left."""
    is_broken = False
    try:
        for where, found in objects(shard):
            if isinstance(found, ShardError) and not is_broken:
                is_broken = True
                yield found
            if isinstance(found, ManifestError):
                if not is_broken:
                    yield found
                continue
            try:
                cut = to_cut(found, source)
            except LINE_ERRORS as error:
                yield ManifestError(f"{where}: {explain(error)}")
            else:
                yield cut
    except ManifestError as error:
        yield ShardError(str(error))


def _cuts_in_memory(
    stream: Callable[[], Iterator[tuple[str, Cut | ManifestError]]], source: SourceConfig | None
) -> Iterator[Cut | ManifestError]:
    """
    Args:
        source: what it says is still to be filled in; None if not.
    """
    for where, found in stream():
        yield found if source is None else _settled_or_error(where, found, source)


def _settled_or_error(where: str, found: Cut | ManifestError, source: SourceConfig) -> Cut | ManifestError:
    if isinstance(found, ManifestError):
        return found
    try:
        return _settled(found, source)
    except LINE_ERRORS as error:
        return ManifestError(f"{where}: cut {found.id}: {explain(error)}")
