"""Manifests of any kind to lhotse cuts or a lhotse Shar directory: `speechllm data convert`."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lhotse import AudioSource, Features, NumpyFilesWriter, Recording, fastcopy
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.cut.data import DataCut
from lhotse.shar.utils import to_shar_placeholder
from lhotse.shar.writers import ArrayTarWriter, AudioTarWriter, JsonlShardWriter
from lhotse.supervision import AlignmentItem
from tqdm import tqdm

from speechllm.data.audio import load_channels, load_samples, read_header, recordings
from speechllm.data.audio_file import UtteranceError
from speechllm.data.features import FRAME_SHIFT, SAMPLE_RATE, bins_of, extract_features
from speechllm.data.manifests.manifest import (
    LINE_ERRORS,
    ManifestError,
    SourceConfig,
    explain,
    iter_objects,
    to_cut,
)
from speechllm.data.manifests.supervisions import inside_supervisions
from speechllm.data.manifests.tar import TAR
from speechllm.errors import UserError
from speechllm.files import replaced_file, replaced_folder

Alignment = dict[str, list[AlignmentItem]]
AudioFormat = Literal["wav", "flac", "original"]


@dataclass
class Conversion:
    """What was written, and how many utterances were left out, by reason; each of them was logged."""

    utterances: int = 0
    seconds: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)


def convert_to_cuts(
    source: SourceConfig,
    output: Path,
    features: str | None = None,
    extract: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Conversion:
    """Write lhotse cuts with recordings as the headers of the audio files have them; the audio stays where it is.

    Args:
        output: `.jsonl` or `.jsonl.gz`, a file that does not exist yet.
        features: of this kind (see `MEL_BINS`) are computed too, and stored in the folder `output` without its suffix,
            and `.features`.
        extract: makes them of samples (num_samples,), (T, bins_of(features)); `extract_features` by default.

    Raises:
        ManifestError: there is no such manifest.
        UserError: the output exists, or has another suffix; the audio is inside of other files; nothing can be used.
    """
    if _stem(output) == output.name.removesuffix(".gz"):
        raise UserError(f"{output}: the name of a file of cuts must end in .jsonl or .jsonl.gz")
    _check_new(output)
    if features is not None:
        _check_new(_storage_of(output))
        extract = extract or partial(_extract, kind=features)
    return _write_cuts(source, _objects(source), output, features, extract)


def convert_to_cuts_in_parts(
    source: SourceConfig,
    output: Path,
    features: str,
    extract: Callable[[np.ndarray], np.ndarray],
    part_size: int = 200,
) -> None:
    """The same, with features that take long: a conversion that was stopped goes on after the last whole part.

    Args:
        output: `.jsonl`, a file that does not exist yet; the features are beside it, in a folder with `.parts` instead.
        features, extract: see `convert_to_cuts`.
        part_size: lines of the manifest.

    Raises:
        ManifestError, UserError: as `convert_to_cuts`.
    """
    _check_new(output)
    folder = output.with_name(f"{_stem(output)}.parts")
    objects = iter(_objects(source))
    parts: list[Path] = []
    left_out: Counter[str] = Counter()
    while lines := list(islice(objects, part_size)):
        parts.append(folder / f"{len(parts):05d}.jsonl")
        if not parts[-1].is_file():
            left_out += _write_cuts(source, lines, parts[-1], features, extract, is_part=True).left_out
    cuts = b"".join(part.read_bytes() for part in parts)
    _check_used(source, Conversion(cuts.count(b"\n"), left_out=left_out))
    with replaced_file(output) as tmp:
        tmp.write_bytes(cuts)


def _write_cuts(
    source: SourceConfig,
    objects: Iterable[tuple[str, Any]],
    output: Path,
    features: str | None,
    extract: Callable[[np.ndarray], np.ndarray] | None,
    is_part: bool = False,
) -> Conversion:
    """The cuts of some lines of a manifest, perhaps none of a part; their features if there is an `extract`."""
    storage = _storage_of(output)
    with ExitStack() as stack:
        tmp = stack.enter_context(replaced_file(output))
        writer = NumpyFilesWriter(stack.enter_context(replaced_folder(storage))) if extract is not None else None
        opener = gzip.open if output.suffix == ".gz" else open
        file = stack.enter_context(opener(tmp, "wb"))
        numbers = itertools.count()

        def write(cut: Cut) -> Cut:
            if TAR in (cut.custom or {}):
                raise UserError(
                    f"{source.path}: its audio is inside of tar, Parquet or Arrow files, where lhotse cuts cannot "
                    "point to; use --to shar"
                )
            cut = read_header(cut)
            for recording in recordings(cut):
                for part in recording.sources:
                    if part.type == "file":
                        part.source = os.path.abspath(part.source)
            if writer is not None and features is not None and extract is not None:
                cut = _with_stored_features(cut, next(numbers), writer, storage, features, extract)
            file.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
            return cut

        result = _convert(source, objects, write)
        if not is_part:
            _check_used(source, result)
        return result


def convert_to_shar(
    source: SourceConfig,
    output: Path,
    *,
    shard_size: int = 1000,
    audio_format: AudioFormat = "flac",
    features: str | None = None,
) -> Conversion:
    """Write a Shar directory: cuts, their audio, and features of the kind `features`, in shards to be read in order.

    Only the part of a recording that a cut has is stored, with its sampling rate and channels, in 16 bits: exact for
    16-bit audio.

    Args:
        output: a folder that does not exist yet.
        audio_format: original keeps each file's own format; the audio is decoded and encoded again.

    Raises:
        ManifestError: there is no such manifest.
        UserError: the output exists; nothing can be used.
    """
    _check_new(output)
    with replaced_folder(output) as folder, ExitStack() as stack:
        cut_writer = stack.enter_context(JsonlShardWriter(f"{folder}/cuts.%06d.jsonl.gz", shard_size))
        audio_writer = stack.enter_context(AudioTarWriter(f"{folder}/recording.%06d.tar", shard_size, audio_format))
        if features is not None:
            feature_writer = stack.enter_context(ArrayTarWriter(f"{folder}/features.%06d.tar", shard_size, "numpy"))

        def write(cut: Cut) -> Cut:
            if str(Path(f"{cut.id}.tar").with_suffix("")) != cut.id:
                raise UtteranceError("unfit id", "in Shar it is a path in tar files: no '//', './' or '/' last")
            # All that can fail comes first: an utterance must not be in one file of a shard and missing in another.
            cut = read_header(cut)
            samples = load_samples(cut)
            matrix = None if features is None else extract_features(samples, features).numpy()
            stored, audio = _shar_cut(cut)
            file_format = _format_of(cut) if audio_format == "original" else audio_format
            try:
                audio_writer.write(cut.id, audio, stored.sampling_rate, stored.recording, file_format)
            except (ValueError, RuntimeError) as error:
                raise UtteranceError("audio cannot be written", f"as {file_format}: {error}") from error
            if matrix is not None and features is not None:
                stored.features = to_shar_placeholder(_describe_features(stored, matrix, features, "", ""))
                feature_writer.write(cut.id, matrix, stored.features)
            cut_writer.write(stored)
            return stored

        result = _convert(source, _objects(source), write)
        _check_used(source, result)
        return result


def _objects(source: SourceConfig) -> Iterable[tuple[str, Any]]:
    """Where each line is and what it says (see `iter_objects`), with a bar of progress."""
    return tqdm(iter_objects(source), desc=source.path, unit=" lines", disable=None)


def _convert(source: SourceConfig, objects: Iterable[tuple[str, Any]], write: Callable[[Cut], Cut]) -> Conversion:
    result = Conversion()

    def leave_out(location: str, error: UtteranceError) -> None:
        result.left_out[error.reason] += 1
        logging.warning("left out %s: %s", location, error)

    for location, obj in objects:
        try:
            if isinstance(obj, ManifestError):
                raise obj
            cut = to_cut(obj, source)
        except LINE_ERRORS as error:
            details = explain(error).removeprefix(f"{location}: ")
            leave_out(location, UtteranceError("bad manifest line", details))
            continue
        try:
            written = write(cut)
        except UtteranceError as error:
            leave_out(location, error)
            continue
        result.utterances += 1
        result.seconds += written.duration
    return result


def _check_used(source: SourceConfig, result: Conversion) -> None:
    if not result.utterances:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.left_out.most_common())
        raise UserError(f"{source.path}: no utterance can be used: {reasons or 'the manifest is empty'}")


def _stem(output: Path) -> str:
    """The name of a file of cuts without its suffix."""
    return output.name.removesuffix(".gz").removesuffix(".jsonl")


def _storage_of(output: Path) -> Path:
    """The folder for the features of a file of cuts."""
    return output.absolute().with_name(f"{_stem(output)}.features")


def _extract(samples: np.ndarray, kind: str) -> np.ndarray:
    return extract_features(samples, kind).numpy()


def _with_stored_features(
    cut: Cut,
    number: int,
    writer: NumpyFilesWriter,
    folder: Path,
    kind: str,
    extract: Callable[[np.ndarray], np.ndarray],
) -> Cut:
    if not isinstance(cut, DataCut):
        raise UtteranceError("no place for features", f"a {type(cut).__name__} has none of its own; use --to shar")
    matrix = extract(load_samples(cut))
    # the number tells utterances of one id apart; the writer takes the first characters for folders of even size
    key = writer.write(f"{zlib.crc32(str(number).encode()):08x}-{number}", matrix)
    return fastcopy(cut, features=_describe_features(cut, matrix, kind, str(folder), key))


def _describe_features(cut: Cut, matrix: np.ndarray, kind: str, path: str, key: str) -> Features:
    return Features(
        type=kind,
        num_frames=len(matrix),
        num_features=bins_of(kind),
        frame_shift=FRAME_SHIFT,
        # that of the features: from the recording's, lhotse would get another number of frames than there are
        sampling_rate=SAMPLE_RATE,
        start=cut.start,
        duration=cut.duration,
        storage_type=NumpyFilesWriter.name,
        storage_path=path,
        storage_key=key,
        recording_id=cut.recording.id,
        channels=cut.channel,
    )


def _shar_cut(cut: Cut) -> tuple[Cut, np.ndarray]:
    """The cut with a recording of its own that is as long as itself, and its audio, (channels, num_samples) int16."""
    audio, rate = load_channels(cut)
    # by hand, for soundfile writes 32767/32768 of what it has read
    audio = np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)
    channels, num_samples = audio.shape
    duration = num_samples / rate
    recording = Recording(
        id=cut.id,
        sources=[AudioSource(type="shar", channels=list(range(channels)), source="")],
        sampling_rate=rate,
        num_samples=num_samples,
        duration=duration,
    )
    channel = 0 if channels == 1 else list(range(channels))
    supervisions = []
    for supervision in inside_supervisions(cut):
        alignment = _alignment_from(supervision.alignment, cut)
        supervision = fastcopy(supervision, recording_id=cut.id, channel=channel, alignment=alignment)
        supervisions.append(supervision.trim(duration))  # the audio may end a little before the manifest says
    custom = cut.custom if isinstance(cut, DataCut) else None
    kind = MonoCut if channels == 1 else MultiCut
    return kind(cut.id, 0.0, duration, channel, supervisions, recording=recording, custom=custom), audio


def _alignment_from(alignment: Alignment | None, cut: Cut) -> Alignment | None:
    """With times from where the cut begins, as that is where its recording begins then."""
    if alignment is None or not isinstance(cut, DataCut):
        return None
    return {kind: [item._replace(start=item.start - cut.start) for item in items] for kind, items in alignment.items()}


def _format_of(cut: Cut) -> str:
    formats = {part.format for recording in recordings(cut) for part in recording.sources}
    if len(formats) != 1:
        raise UtteranceError("audio cannot be written", f"its parts have several formats: {', '.join(sorted(formats))}")
    return formats.pop()


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another name")
