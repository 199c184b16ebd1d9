"""Augmentation does what its configuration says, from the generator it is given."""

import numpy as np
import pytest
import torch

from speechllm.data import AugmentConfig, ManifestError, SourceConfig, SpecAugmentConfig
from speechllm.data.augment import Augmenter, NoiseBank, spec_augment


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_spec_augment_masks_within_bounds():
    config = SpecAugmentConfig(probability=1.0, time_mask_frames=20, max_time_fraction=0.2)
    masked_frames = 0
    for seed in range(50):
        features = torch.randn(200, 80, generator=torch.Generator().manual_seed(seed))
        out = spec_augment(features, config, rng(seed))
        changed = out != features
        full_rows = changed.all(dim=1).sum().item()
        masked_frames += full_rows
        assert full_rows <= 0.2 * 200
        assert changed.all(dim=0).sum() <= 2 * 27
        assert torch.equal(out, spec_augment(features, config, rng(seed)))
        torch.testing.assert_close(out[changed].unique(), features.mean()[None])
    assert masked_frames > 0
    assert spec_augment(features, SpecAugmentConfig(probability=0.0), rng()) is features


def test_spec_augment_takes_any_length():
    config = SpecAugmentConfig(probability=1.0, time_warp_frames=5)
    for frames in (1, 3, 6, 11, 12, 13, 50):
        out = spec_augment(torch.randn(frames, 80), config, rng(frames))
        assert out.shape == (frames, 80) and out.isfinite().all()
    none = SpecAugmentConfig(probability=1.0, freq_masks=0, time_masks=0)
    features = torch.randn(20, 80)
    assert torch.equal(spec_augment(features, none, rng()), features)


def test_noise_has_the_asked_snr(corpus):
    config = AugmentConfig(
        noise=[SourceConfig(str(corpus / "noise.jsonl"))],
        noise_probability=1.0,
        noise_snr_low=6.0,
        noise_snr_high=6.0,
    )
    augmenter = Augmenter(config)
    for num_samples in (8000, 16000, 40000):  # shorter, as long as, and longer than the noise
        clean = rng(1).standard_normal(num_samples).astype(np.float32)
        noisy = augmenter.samples(clean, rng(2))
        added = noisy - clean
        assert noisy.dtype == np.float32 and noisy.shape == clean.shape
        assert 10 * np.log10(np.mean(clean**2) / np.mean(added**2)) == pytest.approx(6.0, abs=0.01)


def test_volume_and_speed_follow_their_ranges():
    augmenter = Augmenter(AugmentConfig(speed=[0.9, 1.1], volume_probability=1.0, volume_low=0.5, volume_high=0.6))
    generator = rng()
    gains = [augmenter.samples(np.ones(10, np.float32), generator)[0] for _ in range(50)]
    assert 0.5 <= min(gains) < max(gains) <= 0.6
    assert {augmenter.speed(generator) for _ in range(50)} == {0.9, 1.1}
    nothing = Augmenter(AugmentConfig())
    samples = np.ones(10, np.float32)
    assert nothing.samples(samples, generator) is samples and nothing.speed(generator) == 1.0


def test_configuration_errors(corpus, tmp_path):
    for changes in (
        {"speed": [3.0]},
        {"volume_low": 0.0},
        {"noise_snr_low": 30.0},
        {"noise_probability": 2.0},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            AugmentConfig(**changes)
    with pytest.raises(ValueError, match="time_masks"):
        SpecAugmentConfig(time_masks=-1)
    with pytest.raises(ManifestError, match="no such manifest"):
        NoiseBank([SourceConfig(str(tmp_path / "none.jsonl"))])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no noise in"):
        NoiseBank([SourceConfig(str(tmp_path / "empty.jsonl"))])
