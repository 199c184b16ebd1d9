"""Log-mel filterbank features, as icefall's released Zipformer encoders expect them (Kaldi's fbank through
lhotse): of one utterance, or of a padded batch on any device."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from lhotse import Fbank, FbankConfig
from torch import Tensor

SAMPLE_RATE = 16000
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01
# Samples that the last frame may reach beyond the end of the utterance; they are those before the end, mirrored.
_OVERHANG = 200


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


def num_frames(num_samples: int | Tensor) -> int | Tensor:
    """Frames that `fbank` makes of so many samples: one every 10 ms, rounded to the nearest."""
    shift = round(FRAME_SHIFT * SAMPLE_RATE)
    return (num_samples + shift // 2) // shift


def fbank(samples: np.ndarray | Tensor) -> Tensor:
    """Features of one utterance.

    Args:
        samples: (num_samples,) float32 in [-1, 1], 16 kHz mono; at least 25 ms.

    Returns:
        (num_frames(num_samples), 80) float32, natural logarithm of mel energies.
    """
    with torch.no_grad():
        return fbank_extractor().extract(torch.as_tensor(samples).reshape(1, -1), SAMPLE_RATE)


def fbank_padded(samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a batch, each row as `fbank` makes it of the utterance alone, on the batch's device.

    Args:
        samples: (N, S) float32 in [-1, 1], 16 kHz mono; what lies beyond a length has no influence.
        sample_lens: (N,) int64, at least 400 (25 ms) and at most S each.

    Returns:
        features (N, num_frames(S), 80) float32, zero beyond feature_lens, and feature_lens (N,) int64.
    """
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
