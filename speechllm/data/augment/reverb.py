"""Reverberation: simulated rooms, and the convolution with an impulse response."""

from __future__ import annotations

import numpy as np
import torch
from lhotse.augmentation.utils import convolve1d

from speechllm.data.features import SAMPLE_RATE

_SPEED_OF_SOUND = 343.0  # m/s


def simulate_rir(t60: float, distance: float, volume: float, rng: np.random.Generator) -> np.ndarray:
    """A random impulse response of a room, from the direct sound, which is sample 0, to `t60`.

    The statistics are those of the image sources of a shoebox room (Allen and Berkley, JASA 1979) at random places, as
    in Kuttruff, Room Acoustics, ch. 4: after t seconds 4 pi c^3 t^2 / `volume` of them arrive per second, each with the
    amplitude of its way's length, and decay with the room: few and strong echoes first, dense noise later. Their signs
    are random, in place of a filter against the rumble that echoes of one sign would make.

    Args:
        t60: seconds in which the reverberation decays by 60 dB.
        distance: metres from the speaker to the microphone.
        volume: of the room, cubic metres.

    Returns:
        (t60 * 16000,) float32; the direct sound is 1.
    """
    way = distance + _SPEED_OF_SOUND / SAMPLE_RATE * np.arange(max(1, round(t60 * SAMPLE_RATE)))
    echoes = rng.poisson(4 * np.pi * _SPEED_OF_SOUND * way**2 / (volume * SAMPLE_RATE))
    signed = 2 * rng.binomial(echoes, 0.5) - echoes
    rir = signed * distance / way * 10 ** (-3 * way / (_SPEED_OF_SOUND * t60))
    rir[0] = 1.0
    return rir.astype(np.float32)


def reverberate(samples: np.ndarray, rir: np.ndarray) -> np.ndarray:
    """(num_samples,) float32 as heard through the impulse response `rir` (any length): as many samples of the same
    energy. The strongest sample of `rir` is taken for the direct sound and does not shift the speech in time."""
    direct = int(np.abs(rir).argmax())
    wet = convolve1d(torch.from_numpy(samples), torch.from_numpy(rir)).numpy()[direct : direct + len(samples)]
    energy, wet_energy = (np.sum(np.square(x), dtype=np.float64) for x in (samples, wet))
    return wet * np.float32(np.sqrt(energy / wet_energy)) if wet_energy > 0 else samples
