"""What is stored of a cut, samples or features, or one clear reason why it cannot be used.

The reasons: `no audio`, `missing file`, `unreadable audio`, `wrong duration`, `damaged audio`, `no such channel`,
`non-finite samples`, `implausible samples`; of precomputed features `unreadable features` and `wrong features`.
"""

from __future__ import annotations

import math
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from lhotse import AudioSource, Recording, fastcopy
from lhotse.audio.backend import AudioBackend, get_current_audio_backend, set_current_audio_backend
from lhotse.audio.utils import AudioLoadingError
from lhotse.augmentation import AudioTransform, Resample
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples, perturb_num_samples
from torch import Tensor

from speechllm.data.audio_file import AudioFile, AudioNote, UtteranceError, open_audio
from speechllm.data.blocks import DURATION_TOLERANCE, mono_blocks, part_of, read_blocks
from speechllm.data.commands import command_output, url_content
from speechllm.data.features import FRAME_SHIFT, SAMPLE_RATE, bins_of
from speechllm.data.manifests.manifest import HEADER_UNREAD, IS_SEGMENT
from speechllm.data.manifests.nemo import CHANNEL, CHANNEL_OF_SEVERAL
from speechllm.data.manifests.source import DataError
from speechllm.data.manifests.tar import TAR, with_tar_data
from speechllm.data.resample import resample

# Stored features are made of the audio that a cut has, and may differ from it by a few frames.
_FEATURE_TOLERANCE = 0.1
# The names that lhotse's extractors give to fbank as Kaldi computes it.
_FBANKS = ("kaldi-fbank", "kaldifeat-fbank", "fbank")


def load_samples(
    cut: Cut,
    speed: float = 1.0,
    tolerance: float = DURATION_TOLERANCE,
    notes: list[AudioNote] | None = None,
) -> np.ndarray:
    """Read a cut: the part of the file that it covers, and no more of it where the format allows.

    Args:
        cut: from `read_manifest`; any sampling rate; of several channels the mean, or those that speak (see
            `speechllm.data.blocks`); of a file whose header is unread those of `chosen_channels`.
        speed: played so many times faster, pitch and all.
        tolerance: seconds by which the audio may be shorter or longer than its manifest says.
        notes: gets what is to be known of the audio: damage, channels that were chosen.

    Returns:
        (num_samples,) float32, 16 kHz, at least 25 ms.

    Raises:
        UtteranceError: the file is missing or unreadable, shorter or longer than its manifest says, does not have the
            channel, or has samples that are not finite numbers; it is damaged, so that it is not certain where a part
            of it is. The message names the file.
    """
    name = _name_of(cut)
    notes = [] if notes is None else notes
    try:
        cut = with_tar_data(cut)
        if not cut.has_recording:
            raise UtteranceError("no audio", f"{name}: the cut has no recording")
        if _is_plain(cut):
            samples, rate = _read_mono(cut, name, tolerance, notes)
        else:
            audio, rate = _read_composed(cut)
            samples = _joined(mono_blocks([audio], rate, name, notes=notes))
    except (UtteranceError, MemoryError, DataError):
        raise
    except Exception as error:  # each of lhotse's audio backends raises what it likes about a broken file
        raise UtteranceError("unreadable audio", f"{name}: {_first_line(error)}") from error
    # in this order: at odd sampling rates, the filter of a speed factor can have a gigabyte
    samples = _change_speed(resample(samples, rate, SAMPLE_RATE), speed)
    if len(samples) < 0.025 * SAMPLE_RATE:
        raise UtteranceError("wrong duration", f"{name}: {len(samples)} samples at 16 kHz are less than one frame")
    return np.ascontiguousarray(samples, dtype=np.float32)


def cut_blocks(cut: Cut, notes: list[AudioNote] | None = None) -> Iterator[np.ndarray]:
    """The audio of a cut as `speechllm.data.blocks.read_blocks` gives it, for transcription: all of a file, however
    long its manifest says that it is, and what can be decoded of a damaged one. A cut that is not simply a part of a
    file (in a tar shard, made by a command, of several files, with transforms) is one block.

    Raises:
        UtteranceError: as of `read_blocks` and `load_samples`.
    """
    name = _name_of(cut)
    is_part_of_file = (
        _is_plain(cut)
        and TAR not in (cut.custom or {})
        and cut.recording.sources[0].type == "file"
        and not cut.recording.transforms
    )
    if not is_part_of_file:
        yield load_samples(cut, notes=notes)
        return
    duration = None if _is_whole(cut) else cut.duration
    path = cut.recording.sources[0].source
    yield from read_blocks(path, cut.start, duration, name=name, choose=_choice(cut, name), notes=notes)


def load_precomputed(cut: Cut, kind: str) -> Tensor:
    """The features that a cut's manifest points to, as `speechllm.data.features.extract_features` makes them.

    Args:
        kind: that is needed.

    Returns:
        (T, bins_of(kind)) float32.

    Raises:
        UtteranceError: there are none, or of another kind; they cannot be read; they are not so many finite values
            every 10 ms for as long as the cut lasts.
    """
    if not cut.has_features:
        raise UtteranceError("wrong features", f"cut {cut.id} has none")
    if (stored := stored_kind(cut)) != kind:
        raise UtteranceError(
            "wrong features",
            f"cut {cut.id}: stored are {stored}, the model needs {kind}: compute them with data.features_on: worker, "
            "or store those of one kind with speechllm data convert --features KIND",
        )
    try:
        cut = with_tar_data(cut)
        features = cut.load_features()
    except MemoryError:
        raise
    except Exception as error:  # as with audio: every storage has its own
        raise UtteranceError("unreadable features", f"cut {cut.id}: {_first_line(error)}") from error
    if not math.isclose(cut.frame_shift, FRAME_SHIFT, rel_tol=1e-3):
        raise UtteranceError("wrong features", f"cut {cut.id}: a frame every {cut.frame_shift} s, not {FRAME_SHIFT} s")
    if features.ndim != 2 or features.shape[1] != bins_of(kind):
        raise UtteranceError("wrong features", f"cut {cut.id}: shape {features.shape}, not (T, {bins_of(kind)})")
    if len(features) == 0 or abs(len(features) - cut.duration / FRAME_SHIFT) > _FEATURE_TOLERANCE / FRAME_SHIFT:
        raise UtteranceError("wrong features", f"cut {cut.id}: {len(features)} frames for {cut.duration:.3f} s")
    if not np.isfinite(features).all():
        raise UtteranceError("wrong features", f"cut {cut.id}: {np.count_nonzero(~np.isfinite(features))} not finite")
    return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))


def stored_kind(cut: Cut) -> str:
    """The kind (see `bins_of`) of a cut's stored features.

    Raises:
        UtteranceError: they are of another kind (MFCC, spectrograms, ...), or of audio with another sampling rate.
    """
    kind = "fbank" if cut.features_type in _FBANKS else str(cut.features_type)
    try:
        bins_of(kind)
    except ValueError as error:
        raise UtteranceError("wrong features", f"cut {cut.id}: stored are {error}") from error
    rates = {part.features.sampling_rate for part in _data_cuts(cut) if part.has_features}
    if rates - {SAMPLE_RATE}:
        listed = ", ".join(f"{rate} Hz" for rate in sorted(rates))
        raise UtteranceError("wrong features", f"cut {cut.id}: stored are those of audio of {listed}, not 16000 Hz")
    return kind


def _name_of(cut: Cut) -> str:
    """The file that a cut is read from, as far as there is one."""
    member = (cut.custom or {}).get(TAR, {}).get("recording")
    if member is not None:
        return f"{member['path']}/{member['name']}"
    if isinstance(cut, DataCut) and cut.has_recording and isinstance(cut.recording.sources[0].source, str):
        return cut.recording.sources[0].source
    return f"cut {cut.id}"


def _is_plain(cut: Cut) -> bool:
    """Whether a cut is a part of one file as it is."""
    if not isinstance(cut, DataCut) or len(cut.recording.sources) != 1:
        return False
    recording = cut.recording
    # all is resampled here
    return recording.sources[0].type in ("file", "memory", "command", "url") and all(
        _is_resampling(transform) and recording.sampling_rate >= SAMPLE_RATE for transform in recording.transforms or []
    )


def _is_resampling(transform: AudioTransform | dict) -> bool:
    return isinstance(transform, Resample) or (isinstance(transform, dict) and transform["name"] == Resample.__name__)


def load_channels(cut: Cut) -> tuple[np.ndarray, int]:
    """(channels, num_samples) float32 of a cut at its own rate, and that rate; as lhotse puts together what it consists
    of, its files read as all others are.

    Raises:
        UtteranceError: they cannot be read, or not as long as the cut says.
    """
    name = _name_of(cut)
    try:
        return _read_composed(with_tar_data(cut))
    except (UtteranceError, MemoryError, DataError):
        raise
    except Exception as error:  # lhotse raises what it likes about a broken file
        raise UtteranceError("unreadable audio", f"{name}: {_first_line(error)}") from error


def _read_composed(cut: Cut) -> tuple[np.ndarray, int]:
    """The same, also for cuts of several files or with transforms."""
    cut = cut.drop_features()  # whose sampling rate would count, where there are any
    with _LHOTSE:
        before = get_current_audio_backend()
        set_current_audio_backend(_Backend())
        try:
            return cut.load_audio(), cut.sampling_rate
        finally:  # which lhotse's own context manager has not
            set_current_audio_backend(before)


# lhotse has one backend for all threads.
_LHOTSE = threading.Lock()


class _Backend(AudioBackend):
    """`open_audio` for lhotse."""

    def read_audio(
        self,
        path_or_fd: str | Path | BinaryIO,
        offset: float = 0.0,
        duration: float | None = None,
        force_opus_sampling_rate: int | None = None,
    ) -> tuple[np.ndarray, int]:
        source: str | Path | bytes
        if isinstance(path_or_fd, str | Path):
            source, name = path_or_fd, str(path_or_fd)
        else:
            source, name = path_or_fd.read(), "audio in memory"
        try:
            with open_audio(source, name) as file:
                start = compute_num_samples(offset, file.rate) if offset else 0
                count = None if duration is None else compute_num_samples(duration, file.rate)
                audio, rate = np.concatenate(list(part_of(file, start, count)), axis=1), file.rate
        except UtteranceError as error:  # lhotse makes another of each exception, with one argument
            raise AudioLoadingError(str(error)) from error
        if force_opus_sampling_rate is not None and name.endswith(".opus"):  # as the manifest has it
            audio, rate = resample(audio, rate, force_opus_sampling_rate), force_opus_sampling_rate
        return audio, rate


def _read_mono(cut: DataCut, name: str, tolerance: float, notes: list[AudioNote]) -> tuple[np.ndarray, int]:
    """(num_samples,) of a cut of one file, and its sampling rate."""
    found: list[AudioNote] = []
    with open_audio(_data_of(cut.recording.sources[0], name, not _is_whole(cut)), name, notes=found) as file:
        blocks = _blocks_of(cut, file, tolerance)
        samples = _joined(mono_blocks(blocks, file.rate, name, _choice(cut, name), found))
        _check_length(cut, len(samples), file.rate, tolerance, name)
    damage = next((note for note in found if note.reason == "damaged audio"), None)
    if damage is not None and not _is_whole(cut):
        raise UtteranceError("damaged audio", f"{damage.details}; where its parts begin is uncertain")
    notes += found
    return samples, file.rate


def _joined(blocks: Iterator[np.ndarray]) -> np.ndarray:
    found = list(blocks)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)


def _choice(cut: DataCut, name: str) -> Callable[[int], list[int]]:
    """What gives the rows of a file's channels that a cut has, for so many channels."""
    custom, (source,) = cut.custom or {}, cut.recording.sources
    if custom.get(HEADER_UNREAD):
        return lambda count: chosen_channels(custom, range(count), name)
    wanted = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)

    def rows(count: int) -> list[int]:
        there = source.channels[:count]
        if not set(wanted) <= set(there):
            raise UtteranceError("no such channel", f"{name}: {count} channels, the manifest says {wanted}")
        return [there.index(channel) for channel in chosen_channels(custom, wanted, name)]

    return rows


def _data_of(source: AudioSource, name: str, is_part: bool) -> str | bytes:
    """A path, or what is in memory or made by a command; `is_part`: of which only a part is needed, and other parts
    will be.

    Raises:
        UtteranceError: it is neither.
    """
    if source.type == "command":
        return command_output(source.source, keep=is_part)
    if source.type == "url":
        return url_content(source.source, keep=is_part)
    if source.type not in ("file", "memory"):
        raise UtteranceError("no audio", f"{name}: it is elsewhere ({source.type}); give the directory that it is in")
    return source.source


def _is_whole(cut: DataCut) -> bool:
    """Whether a cut is all of its file."""
    custom = cut.custom or {}
    if custom.get(HEADER_UNREAD):
        return not custom[IS_SEGMENT]
    return cut.duration > cut.recording.duration - 0.001


def _blocks_of(cut: DataCut, file: AudioFile, tolerance: float) -> Iterator[np.ndarray]:
    """(channels, num_samples) blocks of a cut; of a whole file not much more than its manifest says."""
    rate = file.rate
    if file.frames is not None:
        _check_length(cut, file.frames, rate, tolerance, file.name, of_file=True)
    if _is_whole(cut):
        # a file that is too long is not read to its end
        start, left = 0, math.ceil((cut.duration + tolerance) * rate) + rate
    else:
        start, left = compute_num_samples(cut.start, rate), compute_num_samples(cut.duration, rate)
    yield from part_of(file, start, left)


def _check_length(cut: DataCut, found: int, rate: int, tolerance: float, name: str, of_file: bool = False) -> None:
    """Whether audio is about as long as its manifest says.

    Args:
        found: samples that were read of the cut, or those `of_file`.
    """
    seconds = found / rate
    if found == 0 and (of_file or _is_whole(cut)):
        raise UtteranceError("wrong duration", f"{name}: no samples")
    if _is_whole(cut):
        fits = abs(cut.duration - seconds) <= tolerance
    elif of_file:
        fits = cut.start < seconds and cut.end <= seconds + tolerance
    else:
        fits = found > 0 and cut.duration <= seconds + tolerance
        seconds += cut.start
    if not fits:
        said = f"{cut.start:.3f} s to {cut.end:.3f} s"
        more = "at least " if not of_file and seconds > cut.end else ""
        raise UtteranceError("wrong duration", f"{name}: the manifest says {said}, the file has {more}{seconds:.3f} s")


def read_header(cut: Cut, tolerance: float = DURATION_TOLERANCE) -> Cut:
    """The cut with its recording as the audio file has it. Files whose header does not say for certain how long they
    are (all compressed ones but FLAC) are decoded for that; of others the samples are not read.

    Where the audio is made by a command, that is run for a cut whose header is unread; audio in tar files is in memory
    afterwards. A cut that only has features stays what it is.

    Args:
        tolerance: seconds by which the audio may be shorter or longer than the manifest says.

    Raises:
        UtteranceError: the file is missing or unreadable, or shorter or longer than the manifest says.
    """
    name = _name_of(cut)
    try:
        cut = with_tar_data(cut)
        parts = _data_cuts(cut)
        if not any(part.has_recording or part.has_features for part in parts):
            raise UtteranceError("no audio", f"{name}: the cut has no recording")
        if isinstance(cut, DataCut) and (cut.custom or {}).get(HEADER_UNREAD):
            return _with_header(cut, name, tolerance)
        for part in parts:
            # the duration of a recording that has transforms, such as a change of speed, is not that of its file
            if part.has_recording and not part.recording.transforms:
                for source in part.recording.sources:
                    if source.type != "command":  # to run it is to decode all of it
                        _read_length(part, source, name, tolerance)
    except (OSError, subprocess.SubprocessError) as error:
        raise UtteranceError("unreadable audio", f"{name}: {_first_line(error)}") from error
    return cut


def _read_length(cut: DataCut, source: AudioSource, name: str, tolerance: float) -> tuple[int, int, int]:
    """Samples, rate and channels of a file that a cut fits into."""
    with open_audio(_data_of(source, name, not _is_whole(cut)), name) as file:
        frames = file.count_frames()
        _check_length(cut, frames, file.rate, tolerance, name, of_file=True)
        return frames, file.rate, file.channels


def recordings(cut: Cut) -> list[Recording]:
    """Those that a cut consists of: one, several of a `MixedCut`, or none."""
    return [part.recording for part in _data_cuts(cut) if part.has_recording]


def _data_cuts(cut: Cut) -> list[DataCut]:
    cuts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    return [part for part in cuts if isinstance(part, DataCut)]  # the others are padding


def _with_header(cut: DataCut, name: str, tolerance: float) -> DataCut:
    (source,) = cut.recording.sources
    frames, rate, num_channels = _read_length(cut, source, name, tolerance)
    channels = list(range(num_channels))
    chosen = chosen_channels(cut.custom, channels, name)
    recording = Recording(
        id=cut.recording.id,
        sources=[fastcopy(source, channels=channels)],
        sampling_rate=rate,
        num_samples=frames,
        duration=frames / rate,
    )
    duration = min(cut.duration, frames / rate - cut.start) if cut.custom[IS_SEGMENT] else frames / rate
    channel = chosen[0] if len(chosen) == 1 else chosen
    supervisions = [fastcopy(s, duration=duration, channel=channel) for s in cut.supervisions]
    settled = (HEADER_UNREAD, IS_SEGMENT, CHANNEL, CHANNEL_OF_SEVERAL)
    custom = {name: value for name, value in cut.custom.items() if name not in settled}
    kind = MonoCut if len(chosen) == 1 else MultiCut
    return kind(cut.id, cut.start, duration, channel, supervisions, recording=recording, custom=custom)


def chosen_channels(custom: dict | None, channels: Sequence[int], name: str) -> list[int]:
    """Which of the channels that there are to take, by the custom fields of a cut: `channel`, a number or a list of
    them; or `channel_of_several`, a number that counts only where there are several; without either all.

    Raises:
        UtteranceError: one of them is not there.
    """
    custom = custom or {}
    wanted = custom.get(CHANNEL)
    if wanted is None and len(channels) > 1:
        wanted = custom.get(CHANNEL_OF_SEVERAL)
    if wanted is None:
        return list(channels)
    chosen = [wanted] if isinstance(wanted, int) else list(wanted)
    for channel in chosen:
        if channel not in channels:
            raise UtteranceError("no such channel", f"{name}: {channel} is not among {list(channels)}")
    return chosen


def _change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """16 kHz samples, as many as lhotse's `perturb_speed` gives."""
    if speed == 1.0:
        return samples
    return resample(samples, round(speed * SAMPLE_RATE), SAMPLE_RATE)[: perturb_num_samples(len(samples), speed)]


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
