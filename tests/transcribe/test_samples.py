"""Samples in memory: read as a file of them is, or refused with a reason."""

import numpy as np
import pytest
import soundfile
import torch

from speechllm.data.audio_file import UtteranceError
from speechllm.data.blocks import read_blocks
from speechllm.transcribe.samples import sample_blocks

TONE = (0.3 * np.sin(np.arange(8000) / 8)).astype(np.float32)


def heard(audio, rate=16000):
    return np.concatenate(list(sample_blocks(audio, rate, "x")))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_what_their_file_is(tmp_path, rate, channels):
    samples = np.stack([TONE, 0.5 * TONE][:channels], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    expected = np.concatenate(list(read_blocks(tmp_path / "a.wav")))
    for given in (samples, samples.T, torch.from_numpy(samples), samples.astype(np.float64), samples.astype(">f4")):
        np.testing.assert_allclose(heard(given, rate), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("audio", "tolerance"),
    [
        (np.round(TONE * 2**15).astype(np.int16), 1e-4),
        (np.round(TONE.astype(np.float64) * 2**31).astype(np.int32), 1e-6),
        (np.round(TONE * 128 + 128).astype(np.uint8), 1e-2),
        (torch.from_numpy(TONE).to(torch.bfloat16), 2e-3),
        (TONE.astype(np.float16), 1e-3),
        (TONE.tolist(), 1e-6),
        (torch.from_numpy(TONE).requires_grad_(), 0),
    ],
)
def test_all_types_of_samples_are_scaled_alike(audio, tolerance):
    np.testing.assert_allclose(heard(audio), TONE, atol=tolerance)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16000, "no samples"),
        (np.zeros((2, 0), np.float32), 16000, "no samples"),
        (np.float32(0.1), 16000, r"wrong shape: x: \(\)"),
        (np.zeros((1, 2, 9), np.float32), 16000, "wrong shape"),
        (np.zeros((9, 9), np.float32), 16000, "which side"),
        (np.zeros((100, 200), np.float32), 16000, "which side"),
        (np.where(np.arange(8000) == 7, np.nan, TONE), 16000, "non-finite samples: x: 1 of"),
        (np.full(8000, np.inf), 16000, "non-finite"),
        (TONE * 32768, 16000, "implausible samples"),
        (np.zeros(9, np.int64), 16000, "samples of type int64"),
        (np.zeros(9, bool), 16000, "samples of type bool"),
        (np.zeros(9, np.complex64), 16000, "samples of type complex64"),
        (None, 16000, "NoneType"),
        ([[0.0, 1.0], [0.0]], 16000, "wrong shape"),
        (TONE, 0, "wrong sampling rate"),
        (TONE, -16000, "wrong sampling rate"),
        (TONE, 16000.5, "wrong sampling rate"),
        (TONE, None, "wrong sampling rate"),
    ],
)
def test_what_is_no_audio_is_refused(audio, rate, message):
    with pytest.raises(UtteranceError, match=message):
        heard(audio, rate)
