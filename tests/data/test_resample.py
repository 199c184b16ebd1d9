"""One resampling for all: torchaudio's, whole or in blocks, at any rate."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchaudio
from lhotse.augmentation.torchaudio import get_or_create_resampler

from speechllm.data.resample import ResampledStream, resample, resample_blocks

RATES = [8000, 11025, 12000, 14400, 22050, 24000, 32000, 44100, 48000, 96000, 192000]


def tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=count).astype(np.float32)


@pytest.mark.parametrize("rate", RATES)
def test_equals_torchaudio_and_what_lhotse_gives(rate):
    samples = noise(rate // 3 + 7)
    found = resample(samples, rate, 16000)
    expected = torchaudio.functional.resample(torch.from_numpy(samples), rate, 16000).numpy()
    assert found.dtype == np.float32 and len(found) == math.ceil(len(samples) * 16000 / rate)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # its filter is computed in float32
    # cuts whose manifest asks for resampling are resampled by lhotse
    lhotse = get_or_create_resampler(rate, 16000)(torch.from_numpy(samples)).numpy()
    np.testing.assert_allclose(found, lhotse, atol=1e-4)


@pytest.mark.parametrize("rate", [*RATES, 22254, 44101])
def test_a_tone_stays_the_tone(rate):
    found = resample(tone(rate), rate, 16000)
    expected = tone(16000)
    inside = slice(200, 15800)  # the filter has no samples beyond the ends
    assert np.abs(found[inside] - expected[inside]).max() < 0.01


@pytest.mark.parametrize("rate", [11127, 16001, 44101, 44056, 192001])
def test_odd_rates_need_no_filter_of_gigabytes(rate):
    samples = noise(3 * rate)
    found = resample(samples, rate, 16000)
    assert abs(len(found) - 48000) <= 48000 / 16000 + 1


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 44101, 48000])
@pytest.mark.parametrize("block", [1, 999, 20_000, 300_000])
def test_blocks_give_what_the_whole_gives(rate, block):
    samples = noise(5 * rate + 11 if block > 1 else 300)
    blocks = (samples[start : start + block] for start in range(0, len(samples), block))
    found = list(resample_blocks(blocks, rate, 16000))
    np.testing.assert_allclose(np.concatenate(found), resample(samples, rate, 16000), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100, 48000])
def test_live_samples_come_at_once(rate):
    samples = noise(2 * rate + 7)
    stream, found = ResampledStream(rate, 16000), []
    for start in range(0, len(samples), rate // 50):
        found += [x for x in [stream.accept(samples[start : start + rate // 50])] if x is not None]
        late = min(start + rate // 50, len(samples)) / rate - sum(map(len, found)) / 16000
        assert late < 0.03
    found += [x for x in [stream.finish()] if x is not None]
    np.testing.assert_allclose(np.concatenate(found), resample(samples, rate, 16000), atol=1e-6)


def test_blocks_come_as_they_are_ready():
    taken = 0

    def blocks():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield noise(4410)

    next(resample_blocks(blocks(), 44100, 16000))
    assert taken < 15


def test_channels_are_kept_and_float64_becomes_float32():
    samples = noise(8000).astype(np.float64).reshape(2, 4000)
    found = resample(samples, 8000, 16000)
    assert found.dtype == np.float32 and found.shape == (2, 8000)
    np.testing.assert_allclose(found[1], resample(samples[1], 8000, 16000), atol=1e-6)
    assert resample(found, 16000, 16000) is found
    streamed = np.concatenate(list(resample_blocks([samples], 8000, 16000)), axis=-1)
    np.testing.assert_allclose(streamed, found, atol=1e-6)


def test_a_torchaudio_of_another_torch_gives_one_clear_sentence(tmp_path):
    broken = tmp_path / "torchaudio"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import numpy, speechllm\n"  # without torchaudio
        "from speechllm.data.resample import resample\n"
        "from speechllm.errors import UserError\n"
        "try:\n    resample(numpy.zeros(100, 'float32'), 8000, 16000)\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("torchaudio does not import with torch 2.") and "undefined symbol: _ZN3c10" in line
    assert "pip install torch==" in line
