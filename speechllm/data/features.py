"""Log-mel filterbank features, as icefall's released Zipformer encoders expect them (Kaldi's fbank through
lhotse)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from lhotse import Fbank, FbankConfig
from torch import Tensor

SAMPLE_RATE = 16000
NUM_MEL_BINS = 80
FRAME_SHIFT = 0.01


@cache
def _extractor() -> Fbank:
    return Fbank(
        FbankConfig(
            sampling_rate=SAMPLE_RATE,
            num_filters=NUM_MEL_BINS,
            frame_shift=FRAME_SHIFT,
            dither=0.0,
            snip_edges=False,
            high_freq=-400.0,
        )
    )


def num_frames(num_samples: int) -> int:
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
        return _extractor().extract(torch.as_tensor(samples).reshape(1, -1), SAMPLE_RATE)
