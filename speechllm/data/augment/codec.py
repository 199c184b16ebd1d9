"""What telephones and lossy codecs do to speech."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import torch
from lhotse.augmentation.utils import next_fast_len

from speechllm.data.features import SAMPLE_RATE
from speechllm.data.resample import resample

# name: container and encoding of libsndfile, sampling rate (G.711 and GSM 06.10 exist at 8 kHz alone)
_FORMATS = {
    "mulaw": ("WAV", "ULAW", 8000),
    "alaw": ("WAV", "ALAW", 8000),
    "gsm": ("WAV", "GSM610", 8000),
    "mp3": ("MP3", "MPEG_LAYER_III", SAMPLE_RATE),
    "vorbis": ("OGG", "VORBIS", SAMPLE_RATE),
}
CODECS = tuple(_FORMATS)
_WITH_COMPRESSION_LEVEL = ("mp3", "vorbis")
# libsndfile's highest; it refuses 1.0 for MP3.
_MAX_COMPRESSION_LEVEL = 0.99
_FULL_SCALE = 0.99  # beyond 1, G.711 wraps around in libsndfile
_TELEPHONE_BAND = (300.0, 3400.0)
_BAND_EDGE = 200.0


def check_codec(name: str) -> None:
    """Whether a codec can be used here.

    Raises:
        ValueError: there is no such codec, or the installed libsndfile cannot write it.
    """
    if name not in _FORMATS:
        raise ValueError(f"codec {name!r} is none of {', '.join(CODECS)}")
    container, encoding, _ = _FORMATS[name]
    if not soundfile.check_format(container, encoding):
        raise ValueError(
            f"codec {name!r}: the installed libsndfile {soundfile.__libsndfile_version__} cannot write it; "
            "leave it out, or install a newer one (1.1 knows MP3)"
        )


def transcode(samples: np.ndarray, codec: str, rng: np.random.Generator) -> np.ndarray:
    """Encode and decode (num_samples,) float32 at 16 kHz, in memory; as many samples come back, not shifted in time.

    MP3 and Vorbis compress more or less at random. What is louder than the codec's full scale is scaled down for it,
    and back.
    """
    container, encoding, rate = _FORMATS[codec]
    settings = {"samplerate": rate, "channels": 1, "format": container, "subtype": encoding}
    if codec in _WITH_COMPRESSION_LEVEL:
        settings["compression_level"] = rng.uniform(0.0, _MAX_COMPRESSION_LEVEL)
    coded = resample(samples, SAMPLE_RATE, rate)
    scale = np.float32(max(1.0, np.abs(coded).max() / _FULL_SCALE))
    coded = coded / scale
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", **settings) as encoder:
        for start in range(0, len(coded), rate):  # libsndfile 1.2 crashes on minutes of Vorbis in one call
            encoder.write(coded[start : start + rate])
    file.seek(0)
    decoded = soundfile.read(file, dtype="float32")[0]
    decoded = resample(decoded * scale, rate, SAMPLE_RATE)[: len(samples)]
    return np.pad(decoded, (0, len(samples) - len(decoded)))


def telephone_band(samples: np.ndarray) -> np.ndarray:
    """(num_samples,) float32 at 16 kHz with the band of telephones alone: half the amplitude at 300 and at 3400 Hz,
    nothing 100 Hz further out; hence what 8 kHz sampling can carry. Not shifted in time."""
    size = next_fast_len(len(samples) + SAMPLE_RATE // 50)  # room for the filter's ringing, or it would wrap around
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    low, high = _TELEPHONE_BAND
    distance = np.minimum(frequencies - low, high - frequencies)  # into the band, in Hz
    response = 0.5 + 0.5 * np.sin(np.pi * np.clip(distance / _BAND_EDGE, -0.5, 0.5))
    spectrum = torch.fft.rfft(torch.from_numpy(samples), size) * torch.from_numpy(response.astype(np.float32))
    return torch.fft.irfft(spectrum, size)[: len(samples)].numpy()
