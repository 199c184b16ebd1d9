"""Augmentation does what its configuration says, from the generator it is given."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from speechllm.config import ConfigError, from_dict, save_config
from speechllm.data.audio import load_samples
from speechllm.data.augment import codec
from speechllm.data.augment.augmenter import AugmentConfig, Augmenter
from speechllm.data.augment.codec import CODECS, telephone_band, transcode
from speechllm.data.augment.noise import SoundBank, babble
from speechllm.data.augment.reverb import reverberate, simulate_rir
from speechllm.data.augment.specaugment import SpecAugmentConfig, spec_augment, spec_augment_twice
from speechllm.data.manifests.manifest import DataError, ManifestError, SourceConfig, read_manifest

RATE = 16000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_samples(num_samples: int, seed: int = 1) -> np.ndarray:
    return 0.1 * rng(seed).standard_normal(num_samples).astype(np.float32)


def tones(frequencies: list[float], num_samples: int) -> np.ndarray:
    time = np.arange(num_samples) / RATE
    return sum(0.2 * np.sin(2 * np.pi * f * time) for f in frequencies).astype(np.float32)


def power_db(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(samples.astype(np.float64) ** 2))


def configure(text: str) -> AugmentConfig:
    return from_dict(AugmentConfig, yaml.safe_load(text))


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE) -> SourceConfig:
    """A manifest of one file."""
    soundfile.write(path, samples, rate, subtype="FLOAT")
    line = {"audio_filepath": path.name, "duration": len(samples) / rate, "text": ""}
    manifest = path.with_suffix(".jsonl")
    manifest.write_text(json.dumps(line) + "\n")
    return SourceConfig(str(manifest))


@pytest.fixture(autouse=True)
def one_thread():
    """As in a data loader's worker: the same bits everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def voices(corpus):
    return list(read_manifest(SourceConfig(str(corpus / "a.jsonl"))))


@pytest.fixture
def everything(corpus):
    """Every kind of augmentation with its defaults, always done."""
    sources = {"sources": [{"path": str(corpus / "noise.jsonl")}]}
    names = [field.name for field in fields(AugmentConfig)]
    tree = {name: {"probability": 1.0} | (sources if name == "noise" else {}) for name in names}
    return from_dict(AugmentConfig, tree)


def augmented(config: AugmentConfig, voices: list, samples: np.ndarray, seed: int) -> tuple:
    augmenter, generator = Augmenter(config, voices), rng(seed)
    speed = float(config.draw_speeds(1, generator)[0])
    samples = augmenter.samples(samples, generator)
    return speed, samples, augmenter.features(torch.from_numpy(samples[:8000].reshape(-1, 80)), generator, "fbank")


def test_length_and_type_are_kept_and_the_input_is_untouched(everything, voices):
    augmenter = Augmenter(everything, voices)
    for num_samples in (400, 401, 16001, 40000):
        samples = random_samples(num_samples)
        before = samples.copy()
        for seed in range(6):
            out = augmenter.samples(samples, rng(seed))
            assert out.shape == samples.shape and out.dtype == np.float32 and np.isfinite(out).all()
            assert not np.array_equal(out, samples)
        np.testing.assert_array_equal(samples, before)


def test_silence_stays_finite(everything, voices):
    augmenter = Augmenter(everything, voices)
    for seed in range(10):
        np.testing.assert_allclose(augmenter.samples(np.zeros(8000, np.float32), rng(seed)), 0, atol=1e-3)


def test_absent_and_improbable_sections_change_nothing(everything, voices):
    samples, features = random_samples(5000), torch.randn(50, 80)
    for section in fields(AugmentConfig):
        getattr(everything, section.name).probability = 0.0
    for config in (AugmentConfig(), everything):
        augmenter, generator = Augmenter(config, voices), rng()
        assert (config.draw_speeds(100, generator) == 1.0).all()
        assert augmenter.samples(samples, generator) is samples
        assert augmenter.features(features, generator, "fbank") is features
        assert not config.changes_waveform and config.fastest == 1.0


def test_same_generator_same_result_in_every_process(everything, voices, corpus, tmp_path):
    samples = random_samples(20000)
    here = [augmented(everything, voices, samples, seed) for seed in range(5)]
    again = [augmented(everything, voices, samples, seed) for seed in reversed(range(5))][::-1]
    program = f"""
import torch, yaml
from tests.data.augment.test_augmenter import augmented, random_samples
from speechllm.config import from_dict
from speechllm.data.augment.augmenter import AugmentConfig
from speechllm.data.manifests.manifest import SourceConfig, read_manifest
torch.set_num_threads(1)
config = from_dict(AugmentConfig, yaml.safe_load(open({str(tmp_path / "config.yaml")!r})))
voices = list(read_manifest(SourceConfig({str(corpus / "a.jsonl")!r})))
torch.save([augmented(config, voices, random_samples(20000), seed) for seed in range(5)], {str(tmp_path / "out.pt")!r})
"""
    save_config(everything, tmp_path / "config.yaml")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
    there = torch.load(tmp_path / "out.pt", weights_only=False)
    for a, b, c in zip(here, again, there, strict=True):
        assert a[0] == b[0] == c[0]
        for i in (1, 2):
            np.testing.assert_array_equal(a[i], b[i])
            np.testing.assert_array_equal(a[i], c[i])
    assert not np.array_equal(here[0][1], here[1][1])


def test_probability_is_kept(corpus):
    config = configure("speed: {factors: [0.9], probability: 0.3}\nvolume: {probability: 0.3, low: 0.5, high: 0.6}")
    augmenter, generator, samples = Augmenter(config), rng(), np.ones(400, np.float32)
    assert np.mean(config.draw_speeds(1000, generator) != 1.0) == pytest.approx(0.3, abs=0.05)
    gains = [augmenter.samples(samples, generator)[0] for _ in range(1000)]
    changed = [gain for gain in gains if gain != 1.0]
    assert len(changed) / len(gains) == pytest.approx(0.3, abs=0.05)
    assert 0.5 <= min(changed) < 0.51 and 0.59 < max(changed) <= 0.6
    assert config.changes_waveform and config.fastest == 1.0
    assert configure("speed: {}").fastest == 1.1


def test_noise_and_babble_have_the_asked_snr(corpus, voices):
    noise = f"noise: {{sources: [{{path: {corpus / 'noise.jsonl'}}}], probability: 1, snr_low: 6, snr_high: 6}}"
    for text in (noise, "babble: {probability: 1, snr_low: 6, snr_high: 6}"):
        augmenter = Augmenter(configure(text), voices)
        for num_samples in (8000, 16000, 40000):  # shorter, as long as, and longer than the noise
            clean = random_samples(num_samples)
            added = augmenter.samples(clean, rng(2)) - clean
            assert power_db(clean) - power_db(added) == pytest.approx(6.0, abs=0.01)


def test_babble_has_voices_of_equal_power(tmp_path):
    cuts = []
    for i, (frequency, gain) in enumerate(((500, 0.01), (1000, 1.0), (2000, 0.1))):
        source = write_audio(tmp_path / f"{i}.wav", gain * tones([frequency], RATE))
        cuts += read_manifest(source)
    mixed = babble(SoundBank(cuts), 50, RATE, rng())
    spectrum = np.abs(np.fft.rfft(mixed))
    peaks = spectrum[[500, 1000, 2000]]
    assert np.sum(peaks**2) == pytest.approx(np.sum(spectrum**2), rel=1e-3)
    assert peaks.min() > 0.05 * peaks.max()  # at the files' own powers it would be 0.01, or a tenth of that
    silent = read_manifest(write_audio(tmp_path / "silent.wav", np.zeros(RATE, np.float32)))
    assert not babble(SoundBank(list(silent)), 3, 4000, rng()).any()


def test_of_a_long_recording_a_piece_is_read(tmp_path, monkeypatch):
    seconds = 90
    ramp = np.arange(seconds * 8000, dtype=np.float32) / (seconds * 8000)
    source = write_audio(tmp_path / "long.wav", ramp, rate=8000)
    bank = SoundBank.from_sources([source], "noise")
    read = []

    def reading(cut):
        samples = load_samples(cut)
        read.append(len(samples))
        return samples

    monkeypatch.setattr("speechllm.data.augment.noise.load_samples", reading)
    starts = []
    for seed in range(30):
        piece = bank.draw(5 * RATE, rng(seed))
        assert len(piece) == 5 * RATE
        assert piece[-1000] - piece[1000] == pytest.approx((5 - 2000 / RATE) / seconds, rel=1e-3)
        starts.append(piece[1000] * seconds)
    assert min(starts) < 10 and max(starts) > 75 and max(read) <= 5 * RATE + 2
    assert len(bank.draw(100 * RATE, rng())) == 100 * RATE


def test_weights_of_sources(corpus, tmp_path):
    names = (("one", 1.0, 1), ("two", 3.0, 3))
    sources = []
    for i, (name, weight, lines) in enumerate(names):
        source = write_audio(tmp_path / f"{name}.wav", np.full(800, i, np.float32))
        Path(source.path).write_text(Path(source.path).read_text() * lines)
        sources.append(SourceConfig(source.path, weight=weight))

    def share_of_second(sources: list[SourceConfig]) -> float:
        bank, generator = SoundBank.from_sources(sources, "noise"), rng()
        return np.mean([bank.draw(10, generator)[0] for _ in range(1000)])

    assert share_of_second(sources) == pytest.approx(0.75, abs=0.05)
    sources[0].weight = 9.0
    assert share_of_second(sources) == pytest.approx(0.25, abs=0.05)
    for source in sources:
        source.weight = None
    assert share_of_second(sources) == pytest.approx(0.75, abs=0.05)  # three of four sounds


def test_unreadable_sounds_are_left_out(corpus, tmp_path, caplog):
    source = write_audio(tmp_path / "broken.wav", random_samples(800))
    (tmp_path / "broken.wav").write_text("this is not audio")
    config = configure(f"noise: {{sources: [{{path: {source.path}}}], probability: 1}}\nbabble: {{probability: 1}}")
    samples = random_samples(4000)
    broken = list(read_manifest(source))
    with pytest.raises(DataError, match=r"broken.*: no noise in it: none of its 1 can be read"):
        Augmenter(config, broken)
    config = configure("babble: {probability: 1}")
    np.testing.assert_array_equal(Augmenter(config, broken).samples(samples, rng()), samples)
    assert "left out of the augmentation" in caplog.text


@pytest.mark.parametrize("section", ["noise", "reverb"])
def test_a_bad_line_of_sounds_is_left_out_and_a_manifest_of_them_is_an_error(section, tmp_path, caplog):
    source = Path(write_audio(tmp_path / "good.wav", random_samples(800)).path)
    good = source.read_text()
    missing = good.replace("good.wav", "missing.wav")
    config = configure(f"{section}: {{sources: [{{path: {source}}}], probability: 1}}")
    source.write_text("{\n" + good.replace('"duration"', '"lasts"').replace("good.wav", "gone.wav") + missing + good)
    made = Augmenter(config).samples(random_samples(4000), rng())
    assert len(made) == 4000 and f"{source}:1 is left out of the augmentation: invalid JSON" in caplog.text
    for content, message in (("", ""), ('{"x\n', f": {source}:1: invalid JSON"), (missing, ": none of its 1")):
        source.write_text(content)
        with pytest.raises(DataError, match=f"no (noise|impulse response) in it{message}"):
            Augmenter(config)


def test_unit_impulse_is_the_identity(tmp_path):
    samples = random_samples(10000)
    for delay in (0, 1, 700):
        for gain in (1.0, -0.3):
            rir = np.zeros(2000, np.float32)
            rir[delay] = gain
            np.testing.assert_allclose(reverberate(samples, rir), np.sign(gain) * samples, atol=1e-6)
    source = write_audio(tmp_path / "rir.wav", np.stack([rir, np.roll(rir, 300)], axis=1))
    augmenter = Augmenter(configure(f"reverb: {{probability: 1, sources: [{{path: {source.path}}}]}}"))
    np.testing.assert_allclose(augmenter.samples(samples, rng()), -samples, atol=1e-6)  # the first channel


def test_reverberation_keeps_energy_and_timing():
    samples = np.zeros(3 * RATE, np.float32)
    samples[RATE : RATE + 100] = random_samples(100)
    augmenter = Augmenter(configure("reverb: {probability: 1}"))
    for seed in range(10):
        wet = augmenter.samples(samples, rng(seed))
        assert power_db(wet) == pytest.approx(power_db(samples), abs=0.01)
        assert np.abs(wet[:RATE]).max() < 1e-6 < np.abs(wet[RATE]) and wet[RATE + 200 :].any()


def test_simulated_rooms_have_the_acoustics_asked_for():
    t60, distance, volume = 0.5, 1.0, 100.0
    rirs = np.stack([simulate_rir(t60, distance, volume, rng(seed)) for seed in range(50)])
    assert rirs.shape == (50, 8000) and (rirs[:, 0] == 1).all()
    energy = np.mean(rirs[:, 1:].astype(np.float64) ** 2, axis=0)
    decay = np.cumsum(energy[::-1])[::-1]  # Schroeder's backward integration
    level = 10 * np.log10(decay[[800, 4000]] / decay[0])
    assert (level[0] - level[1]) * t60 * RATE / 3200 == pytest.approx(60, rel=0.1)
    # at the critical distance, 0.057 sqrt(V / T60) metres, direct and diffuse sound are equally strong
    critical = 0.057 * np.sqrt(volume / t60)
    diffuse = np.mean([np.sum(simulate_rir(t60, critical, volume, rng(s))[1:].astype(float) ** 2) for s in range(50)])
    assert 0.7 < diffuse < 1.1


def test_telephone_keeps_its_band_alone():
    inside, outside = tones([500, 1000, 3200], RATE), tones([60, 150, 3800, 5000, 7000], RATE)
    heard = telephone_band(inside + outside)
    np.testing.assert_allclose(heard[1600:-1600], inside[1600:-1600], atol=0.01)
    assert power_db(telephone_band(outside)[1600:-1600]) < power_db(outside) - 40


@pytest.mark.parametrize("name", CODECS)
def test_codecs_keep_speech_in_its_place(name):
    time = np.arange(2 * RATE) / RATE
    sweep = (0.3 * np.sin(2 * np.pi * (300 * time + 400 * time**2))).astype(np.float32)  # 300 to 1900 Hz
    for seed in range(5):
        for num_samples in (400, 5001, 2 * RATE):
            out = transcode(sweep[:num_samples], name, rng(seed))
            assert out.shape == (num_samples,) and out.dtype == np.float32
            assert not np.array_equal(out, sweep[:num_samples])
            if num_samples > 400:  # of 25 ms, GSM has heard but one frame
                assert np.corrcoef(out, sweep[:num_samples])[0, 1] > 0.9
    for gain in (3.3, 10):  # just to full scale, and beyond
        np.testing.assert_allclose(transcode(gain * sweep, name, rng(0)), gain * sweep, atol=0.45 * gain)


def test_minutes_of_vorbis_do_not_crash():
    samples = np.tile(random_samples(60 * RATE), 5)
    assert transcode(samples, "vorbis", rng()).shape == samples.shape


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


def test_kinds_of_features_side_by_side_have_masks_of_their_own():
    fbank, whisper = torch.randn(2, 200, 80, generator=torch.Generator().manual_seed(0))
    config = SpecAugmentConfig(probability=1.0, freq_masks=1, freq_mask_bins=20, time_masks=2)
    features = torch.cat([fbank - 8.0, whisper], dim=1)
    changed_bins = []
    for seed in range(20):
        out = spec_augment(features, config, rng(seed), "fbank+whisper80")
        masked = (out != features).split(80, dim=1)
        assert torch.equal(masked[0].all(dim=1), masked[1].all(dim=1))
        changed_bins.append([part.all(dim=0).sum().item() for part in masked])
        for part, of, before in zip(out.split(80, dim=1), masked, features.split(80, dim=1), strict=True):
            torch.testing.assert_close(part[of].unique(), before.mean()[None])
    one, other = zip(*changed_bins, strict=True)
    assert max(one) <= 20 and max(other) <= 20 and max(map(sum, changed_bins)) > 20 and one != other


def test_two_views_are_warped_alike_and_masked_each_by_itself():
    features = torch.randn(200, 80, generator=torch.Generator().manual_seed(0))
    config = SpecAugmentConfig(probability=1.0, time_mask_frames=20, time_warp_frames=10)
    warped = SpecAugmentConfig(probability=1.0, freq_masks=0, time_masks=0, time_warp_frames=10)
    one, two = spec_augment_twice(features, config, rng(3))
    plain, plain_too = spec_augment_twice(features, warped, rng(3))
    assert torch.equal(plain, plain_too) and not torch.equal(plain, features)
    for view in (one, two):
        kept = view == plain
        assert 0.3 < kept.float().mean() < 1
        torch.testing.assert_close(view[~kept].unique(), plain.mean()[None])
    assert not torch.equal(one, two)
    again = spec_augment_twice(features, config, rng(3))
    assert torch.equal(one, again[0]) and torch.equal(two, again[1])


def test_spec_augment_takes_any_length():
    config = SpecAugmentConfig(probability=1.0, time_warp_frames=5)
    for frames in (1, 3, 6, 11, 12, 13, 50):
        out = spec_augment(torch.randn(frames, 80), config, rng(frames))
        assert out.shape == (frames, 80) and out.isfinite().all()
    none = SpecAugmentConfig(probability=1.0, freq_masks=0, time_masks=0)
    features = torch.randn(20, 80)
    assert torch.equal(spec_augment(features, none, rng()), features)


def test_wrong_configurations_say_what_is_wrong(monkeypatch):
    for section, settings, message in (
        ("speed", {"factors": [3.0]}, "factors: need some, between 0.5 and 2.0"),
        ("speed", {"factors": []}, "factors: need some"),
        ("speed", {"probability": 2.0}, "probability must be at least 0 and at most 1, got 2.0"),
        ("volume", {"low": 0.0}, "low 0.0 and high 2.0"),
        ("reverb", {"t60_low": 0.0}, "t60_low 0.0 and t60_high 0.8: need 0 < low <= high"),
        ("reverb", {"t60_high": 100}, "t60_high must be at most 10, got 100.0; no room"),
        ("noise", {"sources": []}, "sources: noise needs manifests"),
        ("noise", {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "weight to all of them or to none"),
        ("noise", {"sources": [{"path": "a"}], "snr_low": 30}, "snr_low 30.0 and snr_high 20.0: need low <= high"),
        ("babble", {"voices_low": 0}, "voices_low 0 and voices_high 7: need 0 < low <= high"),
        ("codec", {"codecs": ["g729"]}, "codec 'g729' is none of mulaw"),
        ("codec", {"codecs": []}, "need some of mulaw"),
        ("telephone", {"probability": -1}, "probability must be .*, got -1.0"),
        ("spec_augment", {"time_masks": -1}, "time_masks must be at least 0, got -1"),
        ("reverberation", {}, "did you mean reverb"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            from_dict(AugmentConfig, {section: settings})
        assert section in str(error.value)
    monkeypatch.setattr(codec.soundfile, "check_format", lambda container, encoding: container != "MP3")
    with pytest.raises(ConfigError, match=r"codec 'mp3': the installed libsndfile [\d.]+ cannot write it"):
        from_dict(AugmentConfig, {"codec": {"codecs": ["mulaw", "mp3"]}})


def test_missing_sounds_are_errors_at_once(tmp_path):
    with pytest.raises(DataError, match="no training utterances to take voices from"):
        Augmenter(configure("babble: {}"))
    for section, what in (("noise", "noise"), ("reverb", "impulse response")):
        missing = {section: {"sources": [{"path": str(tmp_path / "none.jsonl")}]}}
        with pytest.raises(ManifestError, match="none.jsonl"):
            Augmenter(from_dict(AugmentConfig, missing))
        (tmp_path / "empty.jsonl").write_text("")
        empty = {section: {"sources": [{"path": str(tmp_path / "empty.jsonl")}]}}
        with pytest.raises(DataError, match=f"empty.jsonl.*no {what}"):
            Augmenter(from_dict(AugmentConfig, empty))
