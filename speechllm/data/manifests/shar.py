"""lhotse Shar directories: shards of cuts with their audio and features in tar files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

from speechllm.data.manifests.lines import expand_braces, is_skipped, parse_line, parsed_lines
from speechllm.data.manifests.source import LINE_ERRORS, ManifestError, ShardError, SourceConfig, explain, is_remote
from speechllm.data.manifests.tar import TAR, Member, read_member, scan_tar

# Those of the fields of a Shar directory that are of use here.
_FIELDS = ("recording", "features")


def shar_shards(source: SourceConfig) -> list[dict[str, str]]:
    """The files of each shard by field, as in {"cuts": ..., "recording": ..., "features": ...}.

    Raises:
        ManifestError: there are none, or a field has not as many files as there are shards.
    """
    if is_remote(source.path):
        return [{"cuts": path, "recording": _recording_beside(path)} for path in expand_braces(source.path)]
    folder = Path(source.path)
    extensions = {"cuts": (".jsonl",)} | dict.fromkeys(_FIELDS, (".tar", ".jsonl"))
    files = {
        field: sorted(str(path) for path in folder.glob(f"{field}.*") if any(part in path.name for part in parts))
        for field, parts in extensions.items()
    }
    count = len(files["cuts"])
    if count == 0:
        raise ManifestError(f"{folder}: no cuts.*.jsonl.gz; a Shar directory must have them")
    for field in _FIELDS:
        if len(files[field]) not in (0, count):
            raise ManifestError(f"{folder}: {count} shards of cuts, but {len(files[field])} of {field}")
    return [{field: paths[i] for field, paths in files.items() if paths} for i in range(count)]


def _recording_beside(cuts: str) -> str:
    start, name, end = cuts.rpartition("cuts.")
    number, extension, _ = end.partition(".jsonl")
    if not name or not extension:
        raise ManifestError(f"{cuts}: expected the pattern of the cuts of a Shar directory, .../cuts.{{0..9}}.jsonl.gz")
    return f"{start}recording.{number}.tar"


def shar_objects(source: SourceConfig) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and object of every cut, with what its tar files say of its audio and features, and where they are."""
    for shard in shar_shards(source):
        yield from shar_shard_objects(shard)


def shar_shard_objects(shard: dict[str, str]) -> Iterator[tuple[str, dict | ManifestError]]:
    """Those of one shard."""
    data = {field: _field_data(field, path) for field, path in shard.items() if field != "cuts"}
    for where, cut in parsed_lines(shard["cuts"]):
        found = {field: next(items, None) for field, items in data.items()}
        if isinstance(cut, ManifestError):
            yield where, cut
            continue
        try:
            if not is_skipped(cut):
                yield where, _with_data(cut, found, shard)
        except ShardError as error:
            yield where, error
        except LINE_ERRORS as error:
            yield where, ManifestError(f"{where}: {explain(error)}")
    for name, _, _ in chain(*data.values()):
        where = f"{shard['cuts']}:{name}"
        yield where, ManifestError(f"{where}: the shard has data of this cut, and ends before it")


def _field_data(field: str, path: str) -> Iterator[tuple[str, dict | ManifestError | None, Member | None]]:
    """Id of the cut, manifest and place of its data (None: it has none), in the order of the cuts."""
    if ".jsonl" in Path(path).name:
        for where, line in parsed_lines(path):
            if isinstance(line, ManifestError):
                yield where, line, None
            else:
                yield str(line.get("cut_id")), line.get(field), None
        return
    try:
        members = _scanned(path)
        for member in members:
            sidecar = next(members, None)
            name, _, extension = member["name"].rpartition(".")
            if sidecar is None:
                yield name, ManifestError(f"{path}: nothing after {member['name']} describes it"), None
            elif extension == "nodata":
                yield name, None, None
            else:
                try:
                    yield name, parse_line(read_member(sidecar)), member
                except LINE_ERRORS as error:
                    yield name, ManifestError(f"{path}: {sidecar['name']}: {explain(error)}"), None
    except (ManifestError, OSError) as error:
        yield path, ShardError(str(error)), None


def _scanned(path: str) -> Iterator[Member]:
    """The members of a tar file, which is not open meanwhile: a shard has about a thousand."""
    members: list[Member] = []
    error = None
    try:
        members.extend(scan_tar(path))
    except ManifestError as found:
        error = found
    yield from members
    if error is not None:
        raise error


def _with_data(cut: dict, found: dict[str, tuple | None], shard: dict[str, str]) -> dict:
    if cut.get("type") == "MixedCut":
        raise ValueError("a MixedCut cannot have its audio in a Shar directory")
    members = {}
    for field, data in found.items():
        if data is None:
            raise ValueError(f"{shard[field]} ends before this cut")
        name, manifest, member = data
        if isinstance(manifest, ManifestError):
            raise manifest
        if name != cut.get("id"):
            raise ValueError(f"cut {cut.get('id')!r}, but {shard[field]} has {name!r} in its place")
        if manifest is not None:
            cut = cut | {field: manifest}
        if member is not None:
            members[field] = member
    return cut | {TAR: members} if members else cut


def stream_shar_shard(shard: dict[str, str]) -> Iterator[tuple[str, Cut | ManifestError]]:
    """Shard and cut, with audio and features in memory: read once from beginning to end, as URLs and commands need it.
    What cannot be read ends the shard."""
    where = shard["cuts"]
    try:
        for cut in CutSet.from_shar(fields={field: [path] for field, path in shard.items()}):
            if not is_skipped({"custom": cut.custom}):
                yield where, cut
    except MemoryError:
        raise
    except Exception as error:  # of lhotse's readers each has its own, those of commands Exception itself
        yield where, ShardError(f"{where}: the rest of the shard is left out: {explain(error)}")
