"""What is stored of a cut, samples or features, or one clear reason why it cannot be used.

The reasons: `no audio`, `unreadable audio`, `wrong duration`, `no such channel`, `non-finite samples`,
`implausible samples`; of precomputed features `unreadable features` and `wrong features`.
"""

from __future__ import annotations

import io
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse.audio.backend import info as audio_info
from lhotse.audio.backend import read_audio
from lhotse.augmentation import AudioTransform, Resample
from lhotse.augmentation.torchaudio import get_or_create_resampler
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples, perturb_num_samples
from torch import Tensor

from speechllm.data.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLE_RATE
from speechllm.data.manifest import HEADER_UNREAD, IS_SEGMENT
from speechllm.data.tar import TAR, with_tar_data

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


def load_precomputed(cut: Cut) -> Tensor:
    """The features that a cut's manifest points to, as `speechllm.data.features.fbank_extractor` makes them.

    Returns:
        (T, 80) float32.

    Raises:
        UtteranceError: there are none, they cannot be read, or they are not 80 finite values every 10 ms for as long as
            the cut lasts.
    """
    if not cut.has_features:
        raise UtteranceError("wrong features", f"cut {cut.id} has none")
    try:
        cut = with_tar_data(cut)
        features = cut.load_features()
    except MemoryError:
        raise
    except Exception as error:  # as with audio: every storage has its own
        raise UtteranceError("unreadable features", f"cut {cut.id}: {_first_line(error)}") from error
    if not math.isclose(cut.frame_shift, FRAME_SHIFT, rel_tol=1e-3):
        raise UtteranceError("wrong features", f"cut {cut.id}: a frame every {cut.frame_shift} s, not {FRAME_SHIFT} s")
    if features.ndim != 2 or features.shape[1] != NUM_MEL_BINS:
        raise UtteranceError("wrong features", f"cut {cut.id}: shape {features.shape}, not (T, {NUM_MEL_BINS})")
    if len(features) == 0 or abs(len(features) - cut.duration / FRAME_SHIFT) > DURATION_TOLERANCE / FRAME_SHIFT:
        raise UtteranceError("wrong features", f"cut {cut.id}: {len(features)} frames for {cut.duration:.3f} s")
    if not np.isfinite(features).all():
        raise UtteranceError("wrong features", f"cut {cut.id}: {np.count_nonzero(~np.isfinite(features))} not finite")
    return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))


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
    data = source.source
    if source.type == "command":
        data = subprocess.run(data, shell=True, check=True, stdout=subprocess.PIPE).stdout

    def stream() -> str | io.BytesIO:
        return io.BytesIO(data) if isinstance(data, bytes) else data

    try:
        file = soundfile.SoundFile(stream())
    except soundfile.LibsndfileError as error:
        try:
            header = audio_info(stream())
        except Exception:  # soundfile's explanation is better than those of all the others together
            raise UtteranceError("unreadable audio", f"{name}: {_why_unreadable(data, error)}") from error
        frames, rate = header.frames, header.samplerate
        start, count = _span(cut, frames, rate, name)
        audio, _ = read_audio(stream(), offset=start / rate, duration=count / rate)
        audio = np.atleast_2d(audio)
    else:
        with file:
            frames, rate = file.frames, file.samplerate
            start, count = _span(cut, frames, rate, name)
            if start > 0:
                file.seek(start)
            audio = file.read(count, dtype="float32", always_2d=True).T
    if audio.shape[1] < count - DURATION_TOLERANCE * rate:
        end = (start + audio.shape[1]) / rate
        raise UtteranceError("wrong duration", f"{name}: ends at {end:.3f} s, its header says {frames / rate:.3f} s")
    if (cut.custom or {}).get(HEADER_UNREAD):
        return audio, range(len(audio)), rate
    wanted = [cut.channel] if isinstance(cut.channel, int) else cut.channel
    rows = [row for row, channel in enumerate(source.channels[: len(audio)]) if channel in wanted]
    if len(rows) != len(wanted):
        raise UtteranceError("no such channel", f"{name}: {len(audio)} channels, the manifest says {wanted}")
    return audio[rows], [source.channels[row] for row in rows], rate


def _span(cut: DataCut, frames: int, rate: int, name: str) -> tuple[int, int]:
    """Where in a file of so many frames a cut begins, and how many of them it has."""
    actual = frames / rate
    if frames == 0:
        raise UtteranceError("wrong duration", f"{name}: no samples")
    custom = cut.custom or {}
    whole = not custom[IS_SEGMENT] if custom.get(HEADER_UNREAD) else cut.duration > cut.recording.duration - 0.001
    if whole:
        fits = math.isclose(cut.duration, actual, abs_tol=DURATION_TOLERANCE)
    else:
        fits = cut.start < actual and cut.end <= actual + DURATION_TOLERANCE
    if not fits:
        said = f"{cut.start:.3f} s to {cut.end:.3f} s"
        raise UtteranceError("wrong duration", f"{name}: the manifest says {said}, the file has {actual:.3f} s")
    if whole:
        return 0, frames
    start = compute_num_samples(cut.start, rate)
    return start, max(0, min(compute_num_samples(cut.duration, rate), frames - start))


def _why_unreadable(data: str | bytes, error: soundfile.LibsndfileError) -> str:
    if isinstance(data, str):
        if not Path(data).exists():
            return "no such file"
        if Path(data).is_dir():
            return "a directory, not a file"
    size = len(data) if isinstance(data, bytes) else Path(data).stat().st_size
    if size == 0:
        return "no data"
    return f"no audio that soundfile or lhotse could decode ({error.error_string})"


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
