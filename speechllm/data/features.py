"""Log-mel features of one utterance, or of a padded batch on any device: those that icefall's released Zipformer
encoders expect (Kaldi's fbank through lhotse), and those of Whisper (arXiv 2212.04356, section 2.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import overload

import numpy as np
import torch
from lhotse import Fbank, FbankConfig
from torch import Tensor

SAMPLE_RATE = 16000
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01
_SHIFT = round(FRAME_SHIFT * SAMPLE_RATE)
# The kinds of features, and how many mel bins each has. All have a frame every 10 ms, `num_frames` of them; for several
# encoders, those of several kinds stand side by side: "fbank+whisper80".
MEL_BINS = {"fbank": NUM_MEL_BINS, "whisper80": 80, "whisper128": 128}
_WHISPER_WINDOW = 400  # samples
# Samples that the last frame may reach beyond the end of the utterance; they are those before the end, mirrored.
_OVERHANG = 200
# Kaldi's frames: samples of one, points of its Fourier transform; how many are computed at a time on the CPU.
_FRAME = 400
_FFT = 512
_BLOCK = 256
# Samples from the start of a frame's shift to the end of its window.
_REACH = 280


def kind_bins(kind: str) -> list[int]:
    """Bins of each of the kinds that stand side by side."""
    return [bins_of(one) for one in kind.split("+")]


def bins_of(kind: str) -> int:
    """Bins of a row of features of one kind: of `MEL_BINS`, or stored outputs of an encoder.

    The latter are called "encoder-IDENTITY-BINS", and computed by `speechllm.train.encoder_cache`.

    Raises:
        ValueError: there is no such kind.
    """
    if stored := re.fullmatch(r"encoder-[0-9a-f]+-(\d+)", kind):
        return int(stored[1])
    if kind not in MEL_BINS:
        raise ValueError(f"{kind}, known are {', '.join(MEL_BINS)}")
    return MEL_BINS[kind]


@cache
def fbank_extractor(device: str = "cpu") -> Fbank:
    """lhotse's extractor of these features; also to store them beforehand, as in
    `cuts.compute_and_store_features(fbank_extractor(), folder, storage_type=NumpyFilesWriter)`."""
    return Fbank(
        FbankConfig(
            sampling_rate=SAMPLE_RATE,
            num_filters=NUM_MEL_BINS,
            frame_shift=FRAME_SHIFT,
            dither=0.0,
            snip_edges=False,
            high_freq=-400.0,
            device=device,
        )
    )


@overload
def num_frames(num_samples: int) -> int: ...


@overload
def num_frames(num_samples: Tensor) -> Tensor: ...


def num_frames(num_samples: int | Tensor) -> int | Tensor:
    """Frames of so many samples: one every 10 ms, rounded to the nearest."""
    return (num_samples + _SHIFT // 2) // _SHIFT


def extract_features(samples: np.ndarray | Tensor, kind: str) -> Tensor:
    """Features of one utterance.

    Args:
        samples: (num_samples,) float32 in [-1, 1], 16 kHz mono; at least 25 ms.
        kind: of `MEL_BINS`, or several with + between.

    Returns:
        (num_frames(num_samples), MEL_BINS[kind]) float32, of several kinds side by side.
    """
    if "+" in kind:
        return torch.cat([extract_features(samples, one) for one in kind.split("+")], dim=1)
    if kind == "fbank":
        return fbank(samples)
    samples = torch.as_tensor(samples).reshape(1, -1)
    return whisper_padded(samples, torch.tensor([samples.shape[1]], device=samples.device), MEL_BINS[kind])[0][0]


def extract_features_padded(samples: Tensor, sample_lens: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Features of a batch, each row as `extract_features` makes it of the utterance alone, on the batch's device.

    Args:
        samples: (N, S) float32 in [-1, 1], 16 kHz mono; what lies beyond a length has no influence.
        sample_lens: (N,) int64, at least 400 (25 ms) and at most S each.
        kind: of `MEL_BINS`, or several with + between.

    Returns:
        features (N, num_frames(S), MEL_BINS[kind]) float32, of several kinds side by side, zero beyond feature_lens;
        and feature_lens (N,) int64.
    """
    if "+" in kind:
        parts = [extract_features_padded(samples, sample_lens, one) for one in kind.split("+")]
        return torch.cat([features for features, _ in parts], dim=2), parts[0][1]
    if kind == "fbank":
        return fbank_padded(samples, sample_lens)
    return whisper_padded(samples, sample_lens, MEL_BINS[kind])


def fbank(samples: np.ndarray | Tensor) -> Tensor:
    """Features of one utterance.

    Args:
        samples: (num_samples,) float32 in [-1, 1], 16 kHz mono; at least 25 ms.

    On the CPU a block of frames is done at a time, so that what one operation writes the next finds in the cache; it is
    what `plain_fbank` computes, three times as fast.

    Returns:
        (num_frames(num_samples), 80) float32, natural logarithm of mel energies.
    """
    samples = torch.as_tensor(samples).reshape(-1)
    if samples.device.type != "cpu" or samples.dtype != torch.float32:
        return plain_fbank(samples)
    window, filters = _fbank_constants()
    frames = num_frames(len(samples))
    left, right = (_FRAME - _SHIFT) // 2, (frames - 1) * _SHIFT + _FRAME - (_FRAME - _SHIFT) // 2 - len(samples)
    features = torch.empty(frames, NUM_MEL_BINS)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        padded = torch.cat([samples[:left].flip(0), samples, samples[-right:].flip(0)])
        framed = padded.unfold(0, _FRAME, _SHIFT)
        centered, windowed = torch.empty(_BLOCK, _FRAME), torch.zeros(_BLOCK, _FFT)
        for start in range(0, frames, _BLOCK):
            block = framed[start : start + _BLOCK]
            x, y = centered[: len(block)], windowed[: len(block)]
            torch.sub(block, block.mean(1, keepdim=True), out=x)
            # the first sample of a frame has the weight 0 in the window
            torch.sub(x[:, 1:], x[:, :-1], alpha=0.97, out=y[:, 1:_FRAME])
            y[:, :_FRAME] *= window
            spectrum = torch.view_as_real(torch.fft.rfft(y)).flatten(1)
            torch.mm(spectrum.square_(), filters, out=features[start : start + _BLOCK])
        return features.clamp_(min=torch.finfo(torch.float32).eps).log_()


@cache
def _fbank_constants() -> tuple[Tensor, Tensor]:
    """The window (400,), and mel filters (514, 80) for the squares of real and imaginary parts, one after the other."""
    extractor = fbank_extractor().extractor
    return extractor.wav2win._window.detach(), extractor._fb.detach().repeat_interleave(2, dim=0)


def plain_fbank(samples: Tensor) -> Tensor:
    """`fbank` by lhotse's extractor, on any device."""
    with torch.no_grad():
        return fbank_extractor(str(samples.device)).extract(samples.reshape(1, -1), SAMPLE_RATE)


class FbankStream:
    """Features of samples that come piece by piece: those of `fbank` of all of them, however they are cut.

    A frame is given out as soon as all its samples are there, 12.5 ms after its middle; only the last ones, which reach
    beyond the end, wait for `finish`. Fewer than 440 samples are kept.

    Attributes:
        num_samples: how many have come.
        num_frames: how many have been given out.
        tail: the samples that later frames need, (at most 439,) float32.
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self.num_frames = 0
        self.tail = torch.empty(0)

    def accept(self, samples: np.ndarray | Tensor) -> Tensor:
        """The frames that are complete with these samples: (n,) float32 in [-1, 1], 16 kHz -> (T, 80)."""
        self.tail = torch.cat([self.tail, torch.as_tensor(samples, dtype=torch.float32)])
        self.num_samples += len(samples)
        return self._frames((self.num_samples - _REACH) // _SHIFT + 1)

    def finish(self) -> Tensor:
        """The frames that reach beyond the end: (T, 80), none if all is less than 25 ms. Nothing may come after."""
        return self._frames(num_frames(self.num_samples) if self.num_samples >= 400 else 0)

    def _frames(self, end: int) -> Tensor:
        """Those up to `end`; what they alone need is forgotten."""
        if end <= self.num_frames:
            return torch.empty(0, NUM_MEL_BINS)
        # The extractor mirrors samples at both ends of what it is given: all but the first of them get a frame more on
        # the left, whose features count for nothing.
        extra = min(self.num_frames, 1)
        features = fbank(self.tail)[extra : extra + end - self.num_frames]
        self.tail = self.tail[(end - 1 - self.num_frames + extra) * _SHIFT :]
        self.num_frames = end
        return features

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` goes on from."""
        return {"tail": self.tail, "counts": torch.tensor([self.num_samples, self.num_frames])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FbankStream:
        stream = cls()
        stream.tail = tensors["tail"]
        stream.num_samples, stream.num_frames = tensors["counts"].tolist()
        return stream


def fbank_padded(samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a batch, each row as `fbank` makes it of the utterance alone, on the batch's device.

    Args:
        samples: (N, S) float32 in [-1, 1], 16 kHz mono; what lies beyond a length has no influence.
        sample_lens: (N,) int64, at least 400 (25 ms) and at most S each.

    Returns:
        features (N, num_frames(S), 80) float32, zero beyond feature_lens, and feature_lens (N,) int64.
    """
    if samples.device.type != "cpu":
        return plain_fbank_padded(samples, sample_lens)
    features = torch.zeros(len(samples), num_frames(samples.shape[1]), NUM_MEL_BINS)
    for row, out, length in zip(samples, features, sample_lens.tolist(), strict=True):
        out[: num_frames(length)] = fbank(row[:length])
    return features, num_frames(sample_lens)


def plain_fbank_padded(samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
    """`fbank_padded` by lhotse's extractor, all rows at once, on any device."""
    device = samples.device
    # half precision of an autocast around this would spoil the logarithms
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        ends = sample_lens[:, None]
        places = torch.arange(samples.shape[1] + _OVERHANG, device=device)
        mirrored = (2 * ends - 1 - places).clamp(min=0)
        samples = samples.gather(1, torch.where(places < ends, places, mirrored))
        features = fbank_extractor(str(device)).extractor(samples)[:, : num_frames(samples.shape[1] - _OVERHANG)]
        feature_lens = num_frames(sample_lens)
        beyond = torch.arange(features.shape[1], device=device) >= feature_lens[:, None]
        return features.masked_fill(beyond[:, :, None], 0.0), feature_lens


def whisper_padded(samples: Tensor, sample_lens: Tensor, mel_bins: int) -> tuple[Tensor, Tensor]:
    """Whisper's features of a batch, as those of the utterance with silence after it; see `extract_features_padded`.

    Energies of an utterance are at most 8 powers of ten below its loudest: (max(log10(energy), loudest - 8) + 4) / 4.
    """
    device = samples.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        frames = num_frames(samples.shape[1])
        inside = torch.arange(samples.shape[1], device=device) < sample_lens[:, None]
        # With silence for two windows, the mirrored samples at the end are silent, and no frame with sound is missing.
        samples = torch.nn.functional.pad(samples.masked_fill(~inside, 0.0), (0, 2 * _WHISPER_WINDOW))
        window = torch.hann_window(_WHISPER_WINDOW, device=device)
        spectrum = torch.stft(samples, _WHISPER_WINDOW, _SHIFT, window=window, return_complex=True)  # (N, 201, T)
        power = spectrum.real.square() + spectrum.imag.square()
        log_energies = (_whisper_mel_filters(mel_bins, str(device)) @ power).clamp(min=1e-10).log10()
        loudest = log_energies.amax((1, 2), keepdim=True)
        features = ((torch.maximum(log_energies, loudest - 8.0) + 4.0) / 4.0).transpose(1, 2)[:, :frames]
        feature_lens = num_frames(sample_lens)
        beyond = torch.arange(frames, device=device) >= feature_lens[:, None]
        return features.masked_fill(beyond[:, :, None], 0.0).contiguous(), feature_lens


@cache
def _whisper_mel_filters(mel_bins: int, device: str) -> Tensor:
    """(mel_bins, 201)"""
    from transformers.audio_utils import mel_filter_bank  # slow, and not everyone's

    filters = mel_filter_bank(
        num_frequency_bins=_WHISPER_WINDOW // 2 + 1,
        num_mel_filters=mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T.astype(np.float32)).to(device)
