"""Reading: the same samples from every form of a cut, no more of a file than needed, speed and sampling rates."""

import io
import struct
import tarfile

import numpy as np
import pytest
import soundfile
from lhotse import (
    AudioSource,
    CutSet,
    Fbank,
    FbankConfig,
    LogSpectrogram,
    Mfcc,
    MfccConfig,
    MonoCut,
    MultiCut,
    NumpyFilesWriter,
    Recording,
    Spectrogram,
)
from lhotse.utils import fastcopy

from speechllm.data.audio import UtteranceError, load_precomputed, load_samples
from speechllm.data.features import fbank_extractor
from speechllm.data.manifests.manifest import read_manifest
from speechllm.data.manifests.tar import TAR, scan_tar

from .conftest import write_manifest, write_tone


def nemo_cut(path, duration, **fields):
    line = {"audio_filepath": path.name, "duration": duration, "text": "x", **fields}
    (cut,) = read_manifest(write_manifest(path.with_suffix(".jsonl"), [line]))
    return cut


def lhotse_cut(path, start=0.0, duration=None):
    cut = Recording.from_file(path).to_cut()
    return cut.truncate(offset=start, duration=duration) if duration else cut


def noise(seconds, rate=16000, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


@pytest.fixture
def stereo(tmp_path):
    """The path of two seconds of 16 kHz, and (2, 32000) of it."""
    channels = np.stack([noise(2.0, seed=1), noise(2.0, seed=2)])
    soundfile.write(tmp_path / "stereo.wav", channels.T, 16000, subtype="FLOAT")
    return tmp_path / "stereo.wav", channels


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_segment_is_that_part_of_the_whole(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(6.0), 16000)
    whole, _ = soundfile.read(path, dtype="float32")
    close = dict(rtol=0, atol=0 if suffix in ("wav", "flac") else 1e-4)  # soundfile's decoders of the others differ
    np.testing.assert_allclose(load_samples(nemo_cut(path, 6.0)), whole, **close)
    np.testing.assert_allclose(load_samples(lhotse_cut(path)), whole, **close)
    part = whole[round(2.125 * 16000) : round(3.625 * 16000)]
    np.testing.assert_allclose(load_samples(nemo_cut(path, 1.5, offset=2.125)), part, **close)
    np.testing.assert_allclose(load_samples(lhotse_cut(path, 2.125, 1.5)), part, **close)


@pytest.mark.parametrize("from_nemo", [True, False])
def test_memory_and_commands_read_as_files_do(tmp_path, from_nemo):
    path = tmp_path / "a b.wav"
    write_tone(path, 3.0, seed=1)
    cut = nemo_cut(path, 1.0, offset=0.5) if from_nemo else lhotse_cut(path, 0.5, 1.0)
    expected = load_samples(cut)
    assert len(expected) == 16000
    for kind, source in (("memory", path.read_bytes()), ("command", f"cat '{path}'")):
        sources = [AudioSource(kind, [0], source)]
        same = fastcopy(cut, recording=fastcopy(cut.recording, sources=sources))
        assert np.array_equal(load_samples(same), expected)
        # a shell's pipe has no seek, and neither has its header the length
        assert len(load_samples(same, speed=1.25)) == 12800


@pytest.mark.parametrize("from_nemo", [True, False])
def test_members_of_tar_files_read_as_files_do(tmp_path, from_nemo):
    path = tmp_path / "a.flac"
    write_tone(path, 3.0, seed=1)
    cut = nemo_cut(path, 1.0, offset=0.5) if from_nemo else lhotse_cut(path, 0.5, 1.0)
    expected = load_samples(cut)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, "b/a.flac")
    (member,) = scan_tar(str(tmp_path / "a.tar"))
    same = fastcopy(cut, custom={**(cut.custom or {}), TAR: {"recording": member}})
    path.unlink()
    assert np.array_equal(load_samples(same), expected)
    (tmp_path / "a.tar").write_bytes(bytes((tmp_path / "a.tar").stat().st_size))
    with pytest.raises(UtteranceError, match=r"unreadable audio: .*a\.tar/b/a\.flac: no audio that"):
        load_samples(same)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UtteranceError, match=r"unreadable audio: .*a\.tar/b/a\.flac: FileNotFoundError"):
        load_samples(same)


@pytest.mark.parametrize("speed", [0.9, 1.1, 0.97, 1.25])
def test_speed_is_as_lhotse_has_it(tmp_path, speed):
    path = tmp_path / "a.wav"
    for num_samples in range(15990, 16010):
        soundfile.write(path, noise(num_samples / 16000), 16000, subtype="FLOAT")
        expected = lhotse_cut(path).perturb_speed(speed)
        for cut in (lhotse_cut(path), nemo_cut(path, 1.0)):
            samples = load_samples(cut, speed)
            assert samples.dtype == np.float32 and len(samples) == expected.num_samples
            assert np.abs(samples - expected.load_audio()[0]).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
@pytest.mark.parametrize("speed", [1.0, 0.9])
def test_a_tone_stays_a_tone_at_every_sampling_rate(tmp_path, rate, speed):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.sin(2 * np.pi * 500 * np.arange(2 * rate) / rate) / 2, rate, subtype="FLOAT")
    expected = np.sin(2 * np.pi * 500 * speed * np.arange(round(32000 / speed)) / 16000) / 2
    for cut in (lhotse_cut(path), nemo_cut(path, 2.0), lhotse_cut(path).resample(16000)):
        samples = load_samples(cut, speed)
        assert len(samples) == len(expected)
        inside = slice(200, -200)  # beyond the ends is silence
        assert np.abs(samples[inside] - expected[inside]).max() < 2e-3


def test_channels_are_averaged_or_chosen(stereo):
    path, channels = stereo
    cuts = [nemo_cut(path, 2.0), nemo_cut(path, 1.0, offset=0.5), lhotse_cut(path)]
    assert isinstance(cuts[2], MultiCut)
    for cut in cuts:
        part = channels[:, 8000:24000] if cut.start else channels
        assert np.allclose(load_samples(cut), part.mean(axis=0), atol=1e-7)
        for channel in (0, 1):
            chosen = fastcopy(cut, custom={**(cut.custom or {}), "channel": channel})
            assert np.array_equal(load_samples(chosen), part[channel])
        absent = fastcopy(cut, custom={**(cut.custom or {}), "channel": 2})
        with pytest.raises(UtteranceError, match=r"no such channel: .*stereo\.wav: 2 is not among \[0, 1\]"):
            load_samples(absent)


def test_a_mono_cut_is_the_channel_that_its_manifest_says(stereo):
    path, channels = stereo
    cut = MonoCut("b", 0.5, 1.0, channel=1, recording=Recording.from_file(path))
    assert np.array_equal(load_samples(cut), channels[1, 8000:24000])
    soundfile.write(path, channels[0], 16000)
    with pytest.raises(UtteranceError, match=r"no such channel: .*stereo\.wav: 1 channels"):
        load_samples(cut)


def test_cuts_of_several_files_and_transforms_are_left_to_lhotse(tmp_path):
    for seed, name in enumerate("ab"):
        soundfile.write(tmp_path / f"{name}.wav", noise(1.0, seed=seed), 16000, subtype="FLOAT")
    a, b = (lhotse_cut(tmp_path / f"{name}.wav") for name in "ab")
    both = np.concatenate([noise(1.0, seed=0), noise(1.0, seed=1), np.zeros(8000)])
    assert np.allclose(load_samples(a.append(b).pad(duration=2.5)), both, atol=1e-6)
    assert np.allclose(load_samples(a.perturb_volume(0.5)), noise(1.0, seed=0) / 2, atol=1e-6)
    assert np.array_equal(load_samples(a.perturb_speed(1.1)), load_samples(a, speed=1.1))
    with pytest.raises(UtteranceError, match="no audio"):
        load_samples(fastcopy(a, recording=None))


class CountingFile(io.FileIO):
    opened = 0
    read_bytes = 0

    def __init__(self, path):
        super().__init__(path)
        CountingFile.opened += 1

    def readinto(self, buffer):
        count = super().readinto(buffer)
        CountingFile.read_bytes += count
        return count


@pytest.fixture
def counted(monkeypatch):
    """Counts how often soundfile opens files, and how much of them it reads."""
    real = soundfile.SoundFile
    monkeypatch.setattr(CountingFile, "opened", 0)
    monkeypatch.setattr(CountingFile, "read_bytes", 0)
    monkeypatch.setattr(
        soundfile, "SoundFile", lambda file, *write: real(file, *write) if write else real(CountingFile(file))
    )
    return CountingFile


def test_a_segment_of_three_hours_is_read_alone(tmp_path, counted):
    path = tmp_path / "long.wav"
    size = 3 * 3600 * 16000 * 2
    samples = (noise(20.0) * 32768).astype(np.int16)
    with path.open("wb") as file:  # with a hole in it, so that it takes no room
        file.write(
            struct.pack(
                "<4sI8sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVEfmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", size
            )
        )
        file.seek(44 + 10000 * 16000 * 2)
        file.write(samples.tobytes())
        file.truncate(44 + size)
    expected = samples / np.float32(32768)
    assert np.array_equal(load_samples(nemo_cut(path, 20.0, offset=10000.0)), expected)
    assert counted.read_bytes < 2 * samples.nbytes and counted.opened == 1


def test_stored_features_say_what_they_are(tmp_path):
    write_tone(tmp_path / "16k.wav", 0.5, seed=1)
    write_tone(tmp_path / "8k.wav", 0.5, seed=1, rate=8000)
    narrow = Fbank(FbankConfig(sampling_rate=8000, num_filters=80))
    for name, extractor, message in (
        ("16k", fbank_extractor(), None),
        ("16k", Mfcc(MfccConfig(num_filters=80, num_ceps=80)), "stored are kaldi-mfcc"),
        ("16k", Spectrogram(), "stored are kaldi-spectrogram"),
        ("16k", LogSpectrogram(), "stored are kaldi-log-spectrogram"),
        ("8k", narrow, "stored are those of audio of 8000 Hz"),
    ):
        cuts = CutSet.from_cuts([Recording.from_file(tmp_path / f"{name}.wav").to_cut()])
        (cut,) = cuts.compute_and_store_features(extractor, tmp_path / "f", storage_type=NumpyFilesWriter)
        for stored in (cut, cut.pad(duration=0.6) if message else cut):
            if message is None:
                assert load_precomputed(stored, "fbank").shape == (50, 80)
            else:
                with pytest.raises(UtteranceError, match=f"wrong features: .*{message}"):
                    load_precomputed(stored, "fbank")
