"""The samples of a cut, or one clear reason why there are none."""

from __future__ import annotations

import math

import numpy as np
import torch
from lhotse import AudioSource, Recording
from lhotse.audio.backend import info as audio_info
from lhotse.augmentation.torchaudio import get_or_create_resampler
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.utils import fastcopy

from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifest import HEADER_UNREAD, IS_SEGMENT

# Manifests round durations, and compressed formats end a little later than they say.
DURATION_TOLERANCE = 0.1


class UtteranceError(Exception):
    """One utterance cannot be used. `reason` is one of a few words to count by, the message has the
    details."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(f"{reason}: {details}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return UtteranceError, (self.reason, str(self).removeprefix(f"{self.reason}: "))


def load_samples(cut: Cut, speed: float = 1.0) -> np.ndarray:
    """Read a cut from disk.

    Args:
        cut: from `read_manifest`; any sample rate; channels are averaged.
        speed: played so many times faster, pitch and all.

    Returns:
        (num_samples,) float32, 16 kHz, at least 25 ms.

    Raises:
        UtteranceError: the file is missing or unreadable, shorter or longer than its manifest says, or has
            samples that are not finite numbers.
    """
    try:
        if (cut.custom or {}).get(HEADER_UNREAD):
            cut = _with_header(cut)
        if not cut.has_recording:
            raise UtteranceError("no audio", "the cut has no recording")
        cut = cut.drop_features()
        if speed != 1.0:
            cut = cut.perturb_speed(speed)
        audio = cut.load_audio()
    except (UtteranceError, MemoryError):
        raise
    except Exception as error:  # each of lhotse's audio backends raises what it likes about a broken file
        raise UtteranceError("unreadable audio", _first_line(error)) from error
    samples = audio.mean(axis=0) if audio.shape[0] > 1 else audio[0]
    if not np.isfinite(samples).all():
        raise UtteranceError("non-finite samples", f"{np.count_nonzero(~np.isfinite(samples))} samples")
    if cut.sampling_rate != SAMPLE_RATE:
        resampler = get_or_create_resampler(cut.sampling_rate, SAMPLE_RATE)
        samples = resampler(torch.from_numpy(samples)).numpy()
    if len(samples) < 0.025 * SAMPLE_RATE:
        raise UtteranceError("wrong duration", f"{len(samples)} samples are less than one frame")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _with_header(cut: MonoCut) -> Cut:
    """The cut of a NeMo line with the recording as the file's header has it."""
    source = cut.recording.sources[0].source
    info = audio_info(source)
    actual = info.frames / info.samplerate
    if info.frames == 0:
        raise UtteranceError("wrong duration", f"{source} has no samples")
    if cut.custom[IS_SEGMENT]:
        fits = cut.end <= actual + DURATION_TOLERANCE and cut.start < actual
    else:
        fits = math.isclose(cut.duration, actual, abs_tol=DURATION_TOLERANCE)
    if not fits:
        raise UtteranceError(
            "wrong duration",
            f"the manifest says {cut.start:.3f} s to {cut.end:.3f} s, {source} has {actual:.3f} s",
        )
    channels = list(range(info.channels))
    recording = Recording(
        id=cut.recording.id,
        sources=[AudioSource(type="file", channels=channels, source=source)],
        sampling_rate=info.samplerate,
        num_samples=info.frames,
        duration=actual,
        channel_ids=channels,
    )
    duration = min(cut.duration, actual - cut.start) if cut.custom[IS_SEGMENT] else actual
    if len(channels) == 1:
        return fastcopy(cut, recording=recording, duration=duration)
    return MultiCut(
        id=cut.id, start=cut.start, duration=duration, channel=channels, recording=recording, supervisions=[]
    )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
