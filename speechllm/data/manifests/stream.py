"""Manifests as streams: one pass in the order of the files, shards of tar and Parquet files in random order.

Only streams may be URLs or commands, whose tar files are read once, from the beginning to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from lhotse.cut import Cut

from speechllm.data.manifests.cuts import settled_cut
from speechllm.data.manifests.headers import with_durations
from speechllm.data.manifests.kinds import ROW_FILES, kind_of, row_files, tar_files
from speechllm.data.manifests.lines import is_compressed
from speechllm.data.manifests.manifest import cut_or_error, manifest_cuts
from speechllm.data.manifests.nemo import stream_tarred_shard, tar_shards, tarred_shard_objects
from speechllm.data.manifests.parquet import table_rows
from speechllm.data.manifests.shar import shar_shard_objects, shar_shards, stream_shar_shard
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, ShardError, SourceConfig, explain, is_remote
from speechllm.data.manifests.tar import TAR, in_memory
from speechllm.data.manifests.webdataset import webdataset_objects


def has_shards(source: SourceConfig) -> bool:
    """Whether it consists of shards, which a stream reads in random order."""
    return kind_of(source) in ("tarred", "shar", "webdataset", *ROW_FILES)


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
        yield from islice(manifest_cuts(source), rank, None, world_size)
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
    kind = kind_of(source)
    if kind in ROW_FILES:
        return [], [partial(_cuts_of_rows, file, source) for file in row_files(source, kind)]
    if kind == "webdataset":
        objects = partial(webdataset_objects, source=source)
        return [], [partial(_cuts_in_place, objects, [file], source) for file in tar_files(source)]
    if kind == "tarred":
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
            if not isinstance(found, ManifestError):
                yield cut_or_error(found, where, source)
            elif not is_broken:
                yield found
    except ManifestError as error:
        yield ShardError(str(error))


def _cuts_in_memory(
    stream: Callable[[], Iterator[tuple[str, Cut | ManifestError]]], source: SourceConfig | None
) -> Iterator[Cut | ManifestError]:
    """The cuts of a stream, as `describe_cut` reads them.

    Args:
        source: what it says is still to be filled in; None if not.
    """
    for where, found in stream():
        yield found if source is None else _settled_or_error(where, found, source)


def _cuts_of_rows(file: str, source: SourceConfig) -> Iterator[Cut | ManifestError]:
    """The cuts of a Parquet or Arrow file, with the audio that is in it in memory."""
    for where, line, audio in with_durations(table_rows(file, source, with_audio=True)):
        found = line if isinstance(line, ManifestError) else cut_or_error(line, where, source)
        if isinstance(found, Cut) and isinstance(audio, bytes) and TAR in (found.custom or {}):
            found.recording = in_memory(found.recording, audio)
            del found.custom[TAR]
        yield found


def _settled_or_error(where: str, found: Cut | ManifestError, source: SourceConfig) -> Cut | ManifestError:
    if isinstance(found, ManifestError):
        return found
    try:
        return settled_cut(found, source)
    except LINE_ERRORS as error:
        return ManifestError(f"{where}: cut {found.id}: {explain(error)}")
