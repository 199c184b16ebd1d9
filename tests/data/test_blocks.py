"""Blocks of a stream: the same as in one piece, one channel of several, and what is wrong with a file."""

import numpy as np
import pytest
import soundfile
from lhotse import Recording

from speechllm.data.audio import UtteranceError, cut_blocks, load_samples
from speechllm.data.blocks import mono_blocks, read_blocks
from speechllm.data.manifests.manifest import SourceConfig, read_manifest

from .conftest import write_manifest

RATE = 16000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Comes and goes."""
    time = np.arange(round(seconds * RATE)) / RATE
    return noise(seconds, seed) * (np.sin(2 * np.pi * 0.31 * time) > 0)


def mixed(channels: np.ndarray, split: int = 3000) -> tuple[np.ndarray, list]:
    """One channel of (channels, num_samples), and what is noted."""
    notes = []
    blocks = np.array_split(channels, max(1, channels.shape[1] // split), axis=1)
    return np.concatenate(list(mono_blocks(blocks, RATE, "a.wav", notes=notes))), notes


def decibels(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(samples.astype(np.float64) ** 2))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_opposite_phase_does_not_become_silence(share):
    left = speech(25.0)
    found, notes = mixed(np.stack([left, -share * left + 0.01 * noise(25.0, seed=1)]))
    assert decibels(found) > decibels(left) - 0.5
    assert [note.reason for note in notes] == ["channels chosen"]
    assert "a.wav: of 2 channels " in notes[0].details


@pytest.mark.parametrize("others", [0.0, 1e-3, 0.02])
@pytest.mark.parametrize("count", [6, 32])
def test_one_speaker_among_many_channels_is_as_loud_as_alone(count, others):
    channels = np.stack([others * noise(25.0, seed=i) for i in range(count)])
    channels[3] += speech(25.0, seed=99)
    channels[5, 12 * RATE : 18 * RATE] = speech(6.0, seed=98)  # another one, elsewhere
    found, notes = mixed(channels)
    assert decibels(found[: 10 * RATE]) > decibels(channels[3, : 10 * RATE]) - 1
    assert decibels(found[12 * RATE : 18 * RATE]) > decibels(channels[5, 12 * RATE : 18 * RATE]) - 7
    assert f"of {count} channels 3, 5 was taken" in notes[0].details


@pytest.mark.parametrize("kind", ["same", "unrelated", "one side", "unrelated 16", "silence"])
def test_else_it_is_the_mean(kind):
    count = 16 if kind == "unrelated 16" else 2
    channels = np.stack([speech(25.0) if kind == "same" else noise(25.0, seed=i) for i in range(count)])
    if kind == "one side":
        channels[1] = 0
    if kind == "silence":
        channels[:] = 0
    found, notes = mixed(channels)
    np.testing.assert_allclose(found, channels.mean(axis=0), atol=1e-7)
    assert notes == []


def test_how_a_stream_is_divided_has_no_influence_on_the_channels():
    rng = np.random.default_rng(0)
    channels = np.stack([speech(33.0, seed=1), -speech(33.0, seed=1)]) * rng.uniform(0.5, 1, (2, 1))
    whole, _ = mixed(channels, split=10**9)
    for split in (100, 7777, 16000 * 11):
        np.testing.assert_array_equal(mixed(channels, split)[0], whole)


def test_training_and_transcription_choose_the_same_channel(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([speech(12.0), -speech(12.0)], axis=1), RATE, subtype="FLOAT")
    notes = []
    samples = load_samples(Recording.from_file(path).to_cut(), notes=notes)
    np.testing.assert_array_equal(samples, np.concatenate(list(read_blocks(path, notes=notes))))
    np.testing.assert_array_equal(samples, speech(12.0))
    assert [note.reason for note in notes] == ["channels chosen"] * 2


@pytest.mark.parametrize(
    ("rate", "channels", "suffix"),
    [(8000, 1, "wav"), (44100, 2, "flac"), (44100, 2, "mp3"), (48000, 1, "ogg"), (11025, 2, "wav"), (16000, 1, "mp3")],
)
def test_blocks_are_what_is_read_in_one_piece(tmp_path, rate, channels, suffix):
    samples = 0.1 * np.random.default_rng(0).standard_normal((int(rate * 21.237), channels))
    path = tmp_path / f"a.{suffix}"
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for second in range(0, len(samples), rate):
            file.write(samples[second : second + rate])
    blocks = list(read_blocks(path))
    assert len(blocks) >= 2
    np.testing.assert_allclose(np.concatenate(blocks), load_samples(Recording.from_file(path).to_cut()), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_part_of_a_file(tmp_path, rate):
    samples = 0.1 * np.random.default_rng(1).standard_normal((rate * 5, 2))
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "part.wav", samples[rate : 3 * rate, 1], rate, subtype="FLOAT")
    part = np.concatenate(list(read_blocks(tmp_path / "a.wav", 1.0, 2.0, channel=1)))
    np.testing.assert_array_equal(part, np.concatenate(list(read_blocks(tmp_path / "part.wav"))))


@pytest.mark.parametrize("offset", [None, 1.5])
def test_lines_of_manifests(tmp_path, offset):
    samples = 0.1 * np.random.default_rng(1).standard_normal((RATE * 4, 2))
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    line = {"audio_filepath": "a.wav", "duration": 4.0 if offset is None else 2.0, "text": "a"}
    manifest = write_manifest(tmp_path / "m.jsonl", [line | ({} if offset is None else {"offset": offset})])
    for channel in (None, 1):
        (cut,) = read_manifest(SourceConfig(str(manifest), channel=channel))
        np.testing.assert_allclose(np.concatenate(list(cut_blocks(cut))), load_samples(cut), atol=1e-7)
    (mixed,) = (cut.pad(duration=5.0) for cut in [Recording.from_file(tmp_path / "a.wav").to_cut()])
    np.testing.assert_array_equal(np.concatenate(list(cut_blocks(mixed))), load_samples(mixed))


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    def reason(path, *args, **kwargs) -> str:
        with pytest.raises(UtteranceError, match=str(path)) as caught:
            list(read_blocks(path, *args, **kwargs))
        return caught.value.reason

    assert reason(tmp_path / "none.wav") == "missing file"
    assert reason(tmp_path) == "unreadable audio"
    for data in (b"", b"this is no audio" * 100):
        (tmp_path / "bad.wav").write_bytes(data)
        assert reason(tmp_path / "bad.wav") == "unreadable audio"
    good = tmp_path / "good.wav"
    soundfile.write(good, np.zeros(RATE), RATE)
    assert reason(good, channel=1) == "no such channel"
    assert reason(good, 0.0, 1.6) == "wrong duration"
    assert reason(good, 2.0) == "wrong duration"
    for value, expected in ((np.nan, "non-finite samples"), (1e6, "implausible samples")):
        soundfile.write(tmp_path / "odd.wav", np.full(RATE, value, dtype=np.float32), RATE, subtype="FLOAT")
        assert reason(tmp_path / "odd.wav") == expected
