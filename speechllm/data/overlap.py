"""Utterances that training and evaluation share: the same ids, or the same audio."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import numpy as np

from speechllm.data.manifests.manifest import LINE_ERRORS, Entry, ManifestError, SourceConfig, describe, iter_objects
from speechllm.data.manifests.nemo import AUDIO_COMMAND
from speechllm.data.manifests.source import audio_path
from speechllm.data.manifests.tar import TAR

# So many seconds of the same recording make two utterances the same audio; neighbors may touch.
_SHARED_SECONDS = 0.1


@dataclass(frozen=True)
class Stretch:
    """A stretch of a recording, in seconds; `recording` tells it from all others."""

    recording: str
    start: float
    end: float


def stretches_of(obj: dict, entry: Entry, source: SourceConfig) -> list[Stretch]:
    """The audio of an object of `iter_objects`."""
    if "tracks" in obj:
        cuts = [track["cut"] for track in obj["tracks"] if isinstance(track.get("cut"), dict)]
        return [stretch for cut in cuts if "recording" in cut for stretch in stretches_of(cut, entry, source)]
    is_cut = "type" in obj
    start = obj.get("start" if is_cut else "offset") or 0.0
    end = start + (obj["duration"] if is_cut else entry.duration)
    recorded: list = []
    if is_cut:
        sources = (obj.get("recording") or {}).get("sources") or []
        names = [part["source"] for part in sources if isinstance(part.get("source"), str)]
        recorded = [channel for part in sources for channel in part.get("channels") or []]
    else:
        names = [obj[AUDIO_COMMAND] if AUDIO_COMMAND in obj else obj["audio_filepath"]]
    # one channel of several is not the audio of another
    channel = obj.get("channel", source.channel)
    is_part = channel is not None and channel != recorded and (not is_cut or len(recorded) > 1)
    suffix = f"#{channel}" if is_part else ""
    if TAR in obj and "recording" in obj[TAR]:
        # in a tar file of Shar each cut has its audio by itself: where it was in a recording is not known
        member = obj[TAR]["recording"]
        return [Stretch(f"{_real(member['path'])}/{member['name']}{suffix}", start, end)]
    folder = source.path if os.path.isdir(source.path) else os.path.dirname(source.path)
    paths = names if AUDIO_COMMAND in obj else [_real(audio_path(name, folder)) for name in names]
    return [Stretch(path + suffix, start, end) for path in paths]


def _real(path: str) -> str:
    path = os.path.join(_real_folder(os.path.dirname(path)), os.path.basename(path))
    return os.path.realpath(path) if os.path.islink(path) else path


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def stated_id(obj: dict) -> str | None:
    """The id that an object of `iter_objects` says; not one that is made of its path, which may be another file's from
    another folder."""
    name = obj.get("id")
    return None if name is None else str(name)


@dataclass
class Keys:
    """Hashes of the ids and of the recordings of a manifest: 16 bytes an utterance."""

    ids: array = field(default_factory=lambda: array("q"))
    recordings: array = field(default_factory=lambda: array("q"))

    def add(self, obj: dict, entry: Entry, source: SourceConfig) -> None:
        if (name := stated_id(obj)) is not None:
            self.ids.append(hash(name))
        self.recordings.extend(hash(stretch.recording) for stretch in stretches_of(obj, entry, source))


def shared_utterances(
    sets: Mapping[str, Sequence[SourceConfig]], keys: Mapping[int, Keys]
) -> Iterator[tuple[str, str, str, SourceConfig]]:
    """Kind, FILE:LINE and details of every utterance that two sets share, and its manifest, that of the later set. A
    manifest that stands both in valid and in test is decoded on purpose.

    Args:
        sets: manifests by name of the set, `train` first.
        keys: of each manifest by its `id()`. Those that share something are read once more.
    """
    for one, other in combinations(sets, 2):
        ones, others = list(sets[one]), list(sets[other])
        if "train" not in (one, other):
            ones, others = [s for s in ones if s not in others], [s for s in others if s not in ones]
        ids = _common([keys[id(s)].ids for s in ones], [keys[id(s)].ids for s in others])
        recordings = _common([keys[id(s)].recordings for s in ones], [keys[id(s)].recordings for s in others])
        if not ids and not recordings:
            continue
        by_id: dict[str, str] = {}
        by_recording: dict[str, list[tuple[Stretch, str]]] = {}
        for location, obj, entry, source in _again(ones):
            if (name := stated_id(obj)) is not None and hash(name) in ids:
                by_id.setdefault(name, location)
            for stretch in stretches_of(obj, entry, source):
                if hash(stretch.recording) in recordings:
                    by_recording.setdefault(stretch.recording, []).append((stretch, location))
        for location, obj, entry, source in _again(others):
            if (name := stated_id(obj)) in by_id:
                details = f"id {name!r} is also that of {by_id[name]}"
                yield f"same id in {one} and {other}", location, details, source
            for stretch in stretches_of(obj, entry, source):
                same = (at for known, at in by_recording.get(stretch.recording, ()) if _overlap(stretch, known))
                if (first := next(same, None)) is not None:
                    details = f"{stretch.start:.2f} to {stretch.end:.2f} s of {stretch.recording} is also in {first}"
                    yield f"same audio in {one} and {other}", location, details, source


def _overlap(one: Stretch, other: Stretch) -> bool:
    shared = min(one.end, other.end) - max(one.start, other.start)
    return shared > min(_SHARED_SECONDS, (one.end - one.start) / 2)


def _common(ones: Sequence[array], others: Sequence[array]) -> set[int]:
    first, second = (
        np.concatenate([np.frombuffer(keys, dtype=np.int64) for keys in group if keys] or [np.empty(0, np.int64)])
        for group in (ones, others)
    )
    return set(np.intersect1d(first, second).tolist())


def _again(sources: Sequence[SourceConfig]) -> Iterator[tuple[str, dict, Entry, SourceConfig]]:
    """The usable lines, where the others are reported already."""
    for source in sources:
        try:
            for location, obj in iter_objects(source):
                if not isinstance(obj, ManifestError):
                    try:
                        entry = describe(obj, source)
                    except LINE_ERRORS:
                        continue
                    yield location, obj, entry, source
        except (ManifestError, OSError):
            continue
