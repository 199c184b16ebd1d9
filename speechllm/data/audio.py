"""What is stored of a cut, samples or features, or one clear reason why it cannot be used.

The reasons: `no audio`, `missing file`, `unreadable audio`, `wrong duration`, `no such channel`, `non-finite samples`,
`implausible samples`; of precomputed features `unreadable features` and `wrong features`.
"""

from __future__ import annotations

import io
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import AudioSource, Recording, fastcopy
from lhotse.audio.backend import info as audio_info
from lhotse.audio.backend import read_audio
from lhotse.augmentation import AudioTransform, Resample
from lhotse.augmentation.torchaudio import get_or_create_resampler
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples, perturb_num_samples
from torch import Tensor

from speechllm.data.features import FRAME_SHIFT, SAMPLE_RATE, bins_of
from speechllm.data.manifests.manifest import HEADER_UNREAD, IS_SEGMENT
from speechllm.data.manifests.tar import TAR, with_tar_data

# Manifests round durations, and compressed formats end a little later than they say.
DURATION_TOLERANCE = 0.1
# Floating-point files may go beyond full scale, 1; what is far beyond is no audio, or was scaled wrongly.
_LOUDEST = 1000.0


class UtteranceError(Exception):
    """One utterance cannot be used. `reason` is one of a few words to count by, the message has the
    details."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(f"{reason}: {details}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return UtteranceError, (self.reason, str(self).removeprefix(f"{self.reason}: "))


def load_samples(cut: Cut, speed: float = 1.0) -> np.ndarray:
    """Read a cut: the part of the file that it covers, and no more of it where the format allows.

    Args:
        cut: from `read_manifest`; any sampling rate; channels are averaged, unless the cut's custom field `channel` has
            the number of one.
        speed: played so many times faster, pitch and all.

    Returns:
        (num_samples,) float32, 16 kHz, at least 25 ms.

    Raises:
        UtteranceError: the file is missing or unreadable, shorter or longer than its manifest says, does not have the
            channel, or has samples that are not finite numbers; the message names the file.
    """
    name = _name_of(cut)
    try:
        cut = with_tar_data(cut)
        if not cut.has_recording:
            raise UtteranceError("no audio", f"{name}: the cut has no recording")
        audio, channels, rate = _read_plain(cut, name) if _is_plain(cut) else _read_composed(cut)
    except (UtteranceError, MemoryError):
        raise
    except Exception as error:  # each of lhotse's audio backends raises what it likes about a broken file
        raise UtteranceError("unreadable audio", f"{name}: {_first_line(error)}") from error
    samples = _mono(audio, channels, (cut.custom or {}).get("channel"), name)
    if not np.isfinite(samples).all():
        bad = np.count_nonzero(~np.isfinite(samples))
        raise UtteranceError("non-finite samples", f"{name}: {bad} of {len(samples)} samples")
    if (loudest := np.abs(samples).max(initial=0.0)) > _LOUDEST:
        raise UtteranceError("implausible samples", f"{name}: up to {loudest:.3g}, where 1 is full scale")
    # in this order: at odd sampling rates, the filter of a speed factor can have a gigabyte
    samples = _change_speed(_resampled(samples, rate, SAMPLE_RATE), speed)
    if len(samples) < 0.025 * SAMPLE_RATE:
        raise UtteranceError("wrong duration", f"{name}: {len(samples)} samples at 16 kHz are less than one frame")
    return np.ascontiguousarray(samples, dtype=np.float32)


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
    if len(features) == 0 or abs(len(features) - cut.duration / FRAME_SHIFT) > DURATION_TOLERANCE / FRAME_SHIFT:
        raise UtteranceError("wrong features", f"cut {cut.id}: {len(features)} frames for {cut.duration:.3f} s")
    if not np.isfinite(features).all():
        raise UtteranceError("wrong features", f"cut {cut.id}: {np.count_nonzero(~np.isfinite(features))} not finite")
    return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))


def stored_kind(cut: Cut) -> str:
    """The kind (see `bins_of`) of a cut's stored features; those of lhotse's other extractors are taken for fbank.

    Raises:
        UtteranceError: they are Whisper's, but not as they are made here.
    """
    kind = cut.features_type
    if kind is None or not kind.startswith(("whisper", "encoder-")):
        return "fbank"
    try:
        bins_of(kind)
    except ValueError as error:
        raise UtteranceError("wrong features", f"cut {cut.id}: stored are {error}") from error
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
    """Whether a cut is a part of one file as it is: what soundfile can read in one go."""
    if not isinstance(cut, DataCut) or len(cut.recording.sources) != 1:
        return False
    recording = cut.recording
    # all is resampled here; and lhotse's resampling of a whole recording needs torchaudio or scipy
    return recording.sources[0].type in ("file", "memory", "command") and all(
        _is_resampling(transform) and recording.sampling_rate >= SAMPLE_RATE for transform in recording.transforms or []
    )


def _is_resampling(transform: AudioTransform | dict) -> bool:
    return isinstance(transform, Resample) or (isinstance(transform, dict) and transform["name"] == Resample.__name__)


def _read_composed(cut: Cut) -> tuple[np.ndarray, Sequence[int], int]:
    """(channels, num_samples) of a cut of several files or with transforms, its channels, and its sampling rate."""
    cut = cut.drop_features()  # whose sampling rate would count, where there are any
    audio = cut.load_audio()
    return audio, range(len(audio)), cut.sampling_rate


def _read_plain(cut: DataCut, name: str) -> tuple[np.ndarray, Sequence[int], int]:
    """The same of a cut of one file. Header and samples are read in one opening."""
    source = cut.recording.sources[0]
    with _opened(source, name) as (header, read):
        start, count = _span(cut, header, name)
        audio = read(start, count)
    rate = header.rate
    if audio.shape[1] < count - DURATION_TOLERANCE * rate:
        end = (start + audio.shape[1]) / rate
        raise UtteranceError("wrong duration", f"{name}: ends at {end:.3f} s, its header says {header.seconds:.3f} s")
    if (cut.custom or {}).get(HEADER_UNREAD):
        return audio, range(len(audio)), rate
    wanted = [cut.channel] if isinstance(cut.channel, int) else cut.channel
    rows = [row for row, channel in enumerate(source.channels[: len(audio)]) if channel in wanted]
    if len(rows) != len(wanted):
        raise UtteranceError("no such channel", f"{name}: {len(audio)} channels, the manifest says {wanted}")
    return audio[rows], [source.channels[row] for row in rows], rate


@dataclass(frozen=True)
class _Header:
    frames: int
    rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


@contextmanager
def _opened(source: AudioSource, name: str) -> Iterator[tuple[_Header, Callable[[int, int], np.ndarray]]]:
    """The header of a file, in memory or made by a command too, and what reads (channels, num_samples) of it from a
    first sample on. soundfile opens it, or what else lhotse has.

    Raises:
        UtteranceError: there is none, or nothing can open it.
    """
    data = source.source
    if source.type == "command":
        data = subprocess.run(data, shell=True, check=True, stdout=subprocess.PIPE).stdout
    elif source.type not in ("file", "memory"):
        raise UtteranceError("no audio", f"{name}: it is elsewhere ({source.type}); give the directory that it is in")

    def stream() -> str | io.BytesIO:
        return io.BytesIO(data) if isinstance(data, bytes) else data

    try:
        file = soundfile.SoundFile(stream())
    except soundfile.LibsndfileError as error:
        try:
            info = audio_info(stream())
        except Exception:  # soundfile's explanation is better than those of all the others together
            raise _unreadable(data, name, error) from error

        def read_slowly(start: int, count: int) -> np.ndarray:
            rate = info.samplerate
            return np.atleast_2d(read_audio(stream(), offset=start / rate, duration=count / rate)[0])

        yield _Header(info.frames, info.samplerate, info.channels), read_slowly
        return

    def read(start: int, count: int) -> np.ndarray:
        if start > 0:
            file.seek(start)
        return file.read(count, dtype="float32", always_2d=True).T

    with file:
        yield _Header(file.frames, file.samplerate, file.channels), read


def _span(cut: DataCut, header: _Header, name: str) -> tuple[int, int]:
    """Where in a file a cut begins, and how many samples it has."""
    if header.frames == 0:
        raise UtteranceError("wrong duration", f"{name}: no samples")
    custom, actual = cut.custom or {}, header.seconds
    whole = not custom[IS_SEGMENT] if custom.get(HEADER_UNREAD) else cut.duration > cut.recording.duration - 0.001
    if whole:
        fits = math.isclose(cut.duration, actual, abs_tol=DURATION_TOLERANCE)
    else:
        fits = cut.start < actual and cut.end <= actual + DURATION_TOLERANCE
    if not fits:
        said = f"{cut.start:.3f} s to {cut.end:.3f} s"
        raise UtteranceError("wrong duration", f"{name}: the manifest says {said}, the file has {actual:.3f} s")
    if whole:
        return 0, header.frames
    start = compute_num_samples(cut.start, header.rate)
    return start, max(0, min(compute_num_samples(cut.duration, header.rate), header.frames - start))


def read_header(cut: Cut) -> Cut:
    """The cut with its recording as the audio file's header has it; the samples are not read.

    Where the audio is made by a command, that is run for a cut whose header is unread; audio in tar files is in memory
    afterwards. A cut that only has features stays what it is.

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
            return _with_header(cut, name)
        for part in parts:
            # the duration of a recording that has transforms, such as a change of speed, is not that of its file
            if part.has_recording and not part.recording.transforms:
                for source in part.recording.sources:
                    if source.type != "command":  # to run it is to decode all of it
                        with _opened(source, name) as (header, _):
                            _span(part, header, name)
    except (OSError, subprocess.SubprocessError) as error:
        raise UtteranceError("unreadable audio", f"{name}: {_first_line(error)}") from error
    return cut


def recordings(cut: Cut) -> list[Recording]:
    """Those that a cut consists of: one, several of a `MixedCut`, or none."""
    return [part.recording for part in _data_cuts(cut) if part.has_recording]


def _data_cuts(cut: Cut) -> list[DataCut]:
    cuts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    return [part for part in cuts if isinstance(part, DataCut)]  # the others are padding


def _with_header(cut: DataCut, name: str) -> DataCut:
    (source,) = cut.recording.sources
    with _opened(source, name) as (header, _):
        _span(cut, header, name)
    channels = list(range(header.channels))
    recording = Recording(
        id=cut.recording.id,
        sources=[fastcopy(source, channels=channels)],
        sampling_rate=header.rate,
        num_samples=header.frames,
        duration=header.seconds,
    )
    duration = min(cut.duration, header.seconds - cut.start) if cut.custom[IS_SEGMENT] else header.seconds
    channel = 0 if len(channels) == 1 else channels
    supervisions = [fastcopy(s, duration=duration, channel=channel) for s in cut.supervisions]
    custom = {name: value for name, value in cut.custom.items() if name not in (HEADER_UNREAD, IS_SEGMENT)}
    kind = MonoCut if len(channels) == 1 else MultiCut
    return kind(cut.id, cut.start, duration, channel, supervisions, recording=recording, custom=custom)


def _unreadable(data: str | bytes, name: str, error: soundfile.LibsndfileError) -> UtteranceError:
    if isinstance(data, str):
        if not Path(data).exists():
            return UtteranceError("missing file", name)
        if Path(data).is_dir():
            return UtteranceError("unreadable audio", f"{name}: a directory, not a file")
    size = len(data) if isinstance(data, bytes) else Path(data).stat().st_size
    why = f"no audio that soundfile or lhotse could decode ({error.error_string})" if size else "no data"
    return UtteranceError("unreadable audio", f"{name}: {why}")


def _mono(audio: np.ndarray, channels: Sequence[int], wanted: int | None, name: str) -> np.ndarray:
    """One channel of (channels, num_samples), or the mean of all."""
    if wanted is not None:
        if wanted not in channels:
            raise UtteranceError("no such channel", f"{name}: {wanted} is not among {list(channels)}")
        return audio[channels.index(wanted)]
    return audio.mean(axis=0) if len(audio) > 1 else audio[0]


def _resampled(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    if rate == new_rate:
        return samples
    return get_or_create_resampler(rate, new_rate)(torch.from_numpy(np.ascontiguousarray(samples))).numpy()


def _change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """16 kHz samples, as many as lhotse's `perturb_speed` gives."""
    if speed == 1.0:
        return samples
    return _resampled(samples, round(speed * SAMPLE_RATE), SAMPLE_RATE)[: perturb_num_samples(len(samples), speed)]


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
