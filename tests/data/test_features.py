"""Features in the worker, on a device in batch, and precomputed: all the same."""

import numpy as np
import pytest
import torch
from lhotse import MonoCut, NumpyFilesWriter, Recording
from lhotse.utils import fastcopy
from transformers import WhisperFeatureExtractor

from speechllm.data.audio import UtteranceError, load_precomputed, load_samples
from speechllm.data.features import (
    MEL_BINS,
    FbankStream,
    extract_features,
    extract_features_padded,
    fbank,
    fbank_extractor,
    fbank_padded,
    num_frames,
    plain_fbank,
    plain_fbank_padded,
)

from .conftest import write_tone


def padded(utterances, garbage=0.0):
    lens = torch.tensor([len(samples) for samples in utterances])
    samples = torch.full((len(utterances), int(lens.max())), garbage)
    for row, utterance in zip(samples, utterances, strict=True):
        row[: len(utterance)] = utterance
    return samples, lens


def assert_same_energies(features, expected):
    """Of energies near the floor, at -15.9, float32's rounding is a part: lhotse's are as far from those in float64."""
    torch.testing.assert_close(features, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(features.exp(), expected.exp(), atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", MEL_BINS)
@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
def test_a_batch_has_the_features_of_each_utterance_alone(garbage, kind):
    generator = torch.Generator().manual_seed(1)
    # every remainder of a frame shift, from the shortest utterance on
    utterances = [0.1 * torch.randn(400 + 7 * i, generator=generator) for i in range(170)]
    features, feature_lens = extract_features_padded(*padded(utterances, garbage), kind)
    shape = (170, num_frames(len(utterances[-1])), MEL_BINS[kind])
    assert features.shape == shape and features.dtype == torch.float32
    assert feature_lens.dtype == torch.int64
    for row, length, utterance in zip(features, feature_lens.tolist(), utterances, strict=True):
        alone = extract_features(utterance, kind)
        assert length == len(alone) == num_frames(len(utterance))
        torch.testing.assert_close(row[:length], alone, rtol=0, atol=1e-5)
        assert (row[length:] == 0).all()


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("numpy_frontend", [False, True])
def test_whisper_features_are_those_of_transformers(bins, numpy_frontend):
    """Of speech-like noise, silence, a click at the very end, and noise too even for the floor to be reached."""
    extractor = WhisperFeatureExtractor(feature_size=bins)
    rng = np.random.default_rng(0)
    loud = (0.2 * rng.standard_normal(16000) * np.sin(np.arange(16000) / 900) ** 8).astype(np.float32)
    click = np.zeros(8000, np.float32)
    click[-1] = 1.0
    even = rng.standard_normal(4800).astype(np.float32)
    for samples in (loud, loud[:5333], np.zeros(4000, np.float32), click, even):
        n = num_frames(len(samples))
        waveform = np.pad(samples, (0, 480000 - len(samples)))
        compute = extractor._np_extract_fbank_features if numpy_frontend else extractor._torch_extract_fbank_features
        expected = compute(waveform[None], "cpu")[0].T if numpy_frontend else compute(waveform, "cpu").T
        features = extract_features(samples, f"whisper{bins}")
        assert features.shape == (n, bins)
        torch.testing.assert_close(features, torch.tensor(expected[:n], dtype=torch.float32), rtol=0, atol=2e-4)


_AT_EVERY_CUT = [0, 1, 279, 400, 401, 559, 560, 1000]


@pytest.mark.parametrize(
    ("step", "lengths"),
    [(1, _AT_EVERY_CUT), *[(step, [*_AT_EVERY_CUT, 7839, 7840, 7841, 20000]) for step in (112, 16000, None)]],
)
def test_features_of_a_stream_are_those_of_the_whole(step, lengths):
    """A sample, 7 ms or a second at a time, or as it comes; frames come as early as can be."""
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        samples = 0.1 * torch.randn(length, generator=generator) + 0.05
        stream, pieces, at = FbankStream(), [], 0
        while at < length:
            size = step or int(torch.randint(1, 900, (1,), generator=generator))
            pieces.append(stream.accept(samples[at : at + size].numpy()))
            at = min(at + size, length)
            # a window of 25 ms around the middle of each shift of 10 ms
            assert stream.num_frames == max(0, (at + 120 - 400) // 160 + 1) and len(stream.tail) < 440
            stream = FbankStream.from_tensors(stream.tensors())
        pieces.append(stream.finish())
        features = torch.cat(pieces) if pieces else torch.empty(0, 80)
        expected = fbank(samples) if length >= 400 else torch.empty(0, 80)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_samples", [400, 479, 480, 16000, 256 * 160, 70001])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_the_fast_fbank_is_the_plain_one(num_samples, offset):
    """Across blocks of frames; with a constant offset, with silence, and loud."""
    generator = torch.Generator().manual_seed(num_samples)
    samples = torch.randn(num_samples, generator=generator) * torch.linspace(0, 0.5, num_samples) + offset
    fast, plain = fbank(samples), plain_fbank(samples)
    assert fast.shape == plain.shape == (num_frames(num_samples), 80)
    assert_same_energies(fast, plain)
    assert fbank(torch.zeros(16000)).unique().tolist() == plain_fbank(torch.zeros(16000)).unique().tolist()


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
def test_the_fast_fbank_of_a_batch_is_the_plain_one(garbage):
    generator = torch.Generator().manual_seed(1)
    samples, lens = padded([0.1 * torch.randn(400 + 97 * i, generator=generator) for i in range(20)], garbage)
    (fast, fast_lens), (plain, plain_lens) = fbank_padded(samples, lens), plain_fbank_padded(samples, lens)
    assert torch.equal(fast_lens, plain_lens)
    assert_same_energies(fast, plain)


def test_rows_may_all_be_shorter_than_the_batch():
    utterance = 0.1 * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    samples = torch.cat([utterance, torch.ones(3000)])[None]
    features, feature_lens = fbank_padded(samples, torch.tensor([5000]))
    assert features.shape == (1, 50, 80) and feature_lens.tolist() == [31]
    torch.testing.assert_close(features[0, :31], fbank(utterance), rtol=0, atol=1e-5)


def test_autocast_does_not_reach_the_features():
    samples, lens = padded([0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = fbank_padded(samples, lens)
    assert torch.equal(features, fbank_padded(samples, lens)[0])


@pytest.fixture
def cut(tmp_path):
    write_tone(tmp_path / "a.wav", 1.237, seed=1)
    return Recording.from_file(tmp_path / "a.wav").to_cut()


@pytest.mark.parametrize("in_memory", [False, True])
def test_precomputed_features_are_those_of_the_worker(cut, tmp_path, in_memory):
    cut = cut.compute_and_store_features(fbank_extractor(), NumpyFilesWriter(tmp_path / "fbank"))
    if in_memory:
        cut = cut.move_to_memory(load_audio=False)
    features = load_precomputed(cut, "fbank")
    assert features.dtype == torch.float32
    assert_same_energies(features, fbank(load_samples(cut)))
    part = load_precomputed(cut.truncate(offset=0.4, duration=0.5), "fbank")
    assert torch.equal(part, features[40:90])


def with_features(cut: MonoCut, array: np.ndarray, tmp_path, **changes) -> MonoCut:
    """The cut with `array` in the place of its features."""
    cut = cut.compute_and_store_features(fbank_extractor(), NumpyFilesWriter(tmp_path / "fbank"))
    (path,) = (tmp_path / "fbank").rglob("*.npy")
    np.save(path, array)
    return fastcopy(cut, features=fastcopy(cut.features, **changes))


@pytest.mark.parametrize(
    ("array", "changes", "reason"),
    [
        (np.zeros((124, 40), np.float32), {"num_features": 40}, "wrong features: .*40"),
        (np.zeros((124, 40), np.float32), {}, "wrong features: .*40"),
        (np.zeros((62, 80), np.float32), {"frame_shift": 0.02, "num_frames": 62}, "wrong features: .*every 0.02 s"),
        (np.zeros((80, 80), np.float32), {}, "wrong features: .*80 frames for 1.237 s"),
        (np.full((124, 80), np.nan, np.float32), {}, "wrong features: .*9920 not finite"),
    ],
)
def test_wrong_features_are_named(cut, tmp_path, array, changes, reason):
    with pytest.raises(UtteranceError, match=reason):
        load_precomputed(with_features(cut, array, tmp_path, **changes), "fbank")


@pytest.mark.parametrize("stored", ["fbank", "whisper80", "whisper128"])
def test_stored_features_of_another_kind_are_named(cut, tmp_path, stored):
    array = np.zeros((124, MEL_BINS[stored]), np.float32)
    cut = with_features(cut, array, tmp_path, type=stored, num_features=MEL_BINS[stored])
    for kind in MEL_BINS:
        if kind == stored:
            assert load_precomputed(cut, kind).shape == (124, MEL_BINS[stored])
        else:
            with pytest.raises(UtteranceError, match=f"stored are {stored}, the model needs {kind}: .*--features"):
                load_precomputed(cut, kind)
    with pytest.raises(UtteranceError, match="stored are whisper-fbank, known are fbank, whisper80"):
        load_precomputed(fastcopy(cut, features=fastcopy(cut.features, type="whisper-fbank")), "whisper80")


def test_absent_and_unreadable_features(cut, tmp_path):
    with pytest.raises(UtteranceError, match="wrong features: cut .* has none"):
        load_precomputed(cut, "fbank")
    broken = with_features(cut, np.zeros((124, 80)), tmp_path)
    (path,) = (tmp_path / "fbank").rglob("*.npy")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UtteranceError, match="unreadable features"):
        load_precomputed(broken, "fbank")
    path.unlink()
    with pytest.raises(UtteranceError, match="unreadable features"):
        load_precomputed(broken, "fbank")
