"""Audio in blocks, and where it is cut."""

from itertools import pairwise

import av
import numpy as np
import pytest
import soundfile
from lhotse import Recording

from speechllm.data.audio import UtteranceError, load_samples
from speechllm.data.manifests.manifest import SourceConfig, read_manifest
from speechllm.transcribe.pauses import cut_blocks, read_blocks, split_at_pauses
from tests.data.conftest import write_manifest

RATE = 16000


def bursts(seconds: float, seed: int, noise: float = 1e-3, longest_pause: float = 1.0) -> np.ndarray:
    """Noise that comes and goes as syllables and phrases do, in quiet noise."""
    rng = np.random.default_rng(seed)
    parts = []
    while sum(map(len, parts)) < seconds * RATE:
        phrase = rng.standard_normal(int(rng.uniform(0.3, 6.0) * RATE)) * 0.1
        syllables = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(len(phrase)) / RATE)
        parts += [phrase * syllables, np.zeros(int(rng.uniform(0.25, longest_pause) * RATE))]
    samples = np.concatenate(parts)[: int(seconds * RATE)]
    return (samples + noise * rng.standard_normal(len(samples))).astype(np.float32)


def in_blocks(samples: np.ndarray, seed: int) -> list[np.ndarray]:
    """At random places, some in the same."""
    places = np.random.default_rng(seed).integers(0, len(samples), 30)
    return np.split(samples, np.sort(np.append(places, places[:3])))


def ends(segment) -> float:
    return segment.start + len(segment.samples) / RATE


@pytest.mark.parametrize("seed", range(4))
def test_the_division_into_blocks_has_no_influence(seed):
    samples = bursts(70.0, seed, longest_pause=4.0)
    samples[20 * RATE : 30 * RATE] = 0
    whole = list(split_at_pauses([samples], 10.0))
    assert len(whole) > 6
    for divided in (in_blocks(samples, seed), np.array_split(samples, 2000)):
        pieces = list(split_at_pauses(divided, 10.0))
        assert [(s.start, s.overlap) for s in pieces] == [(s.start, s.overlap) for s in whole]
        assert all(np.array_equal(a.samples, b.samples) for a, b in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_the_audio_in_order_and_what_is_left_out_is_quiet(seed):
    samples = bursts(90.0, seed, longest_pause=5.0)
    segments = list(split_at_pauses(in_blocks(samples, seed), 12.0))
    covered = np.zeros(len(samples), dtype=bool)
    for segment in segments:
        place = round(segment.start * RATE)
        assert np.array_equal(segment.samples, samples[place : place + len(segment.samples)])
        assert len(segment.samples) <= 12.0 * RATE
        covered[place : place + len(segment.samples)] = True
    for before, after in pairwise(segments):
        assert max(0.0, ends(before) - after.start) == pytest.approx(after.overlap)
    assert not covered.all()
    assert np.abs(samples[~covered]).max() < 0.01


def test_cuts_are_in_pauses_where_there_are_any():
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(60 * RATE)).astype(np.float32)
    pauses = [(s * RATE, s * RATE + RATE // 4) for s in (8, 17, 25, 34, 43, 52)]
    for start, end in pauses:
        samples[start:end] *= 1e-3
    segments = list(split_at_pauses([samples], 10.0))
    cuts = [round(segment.start * RATE) for segment in segments[1:]]
    assert [segment.overlap for segment in segments] == [0.0] * len(segments)
    assert len(cuts) == 6
    assert all(start <= cut <= end for cut, (start, end) in zip(cuts, pauses, strict=True))


def test_without_a_pause_segments_overlap():
    time = np.arange(40 * RATE) / RATE
    segments = list(split_at_pauses([(0.1 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)], 10.0))
    assert segments[0].overlap == 0.0
    assert [segment.overlap for segment in segments[1:]] == [2.0] * (len(segments) - 1)
    assert ends(segments[-1]) == 40.0


def test_short_audio_is_one_segment_as_it_is():
    samples = bursts(9.0, 5, longest_pause=4.0)
    samples[: 3 * RATE] = 0
    samples = np.append(samples, np.float32(0.5))  # not a whole number of frames
    (segment,) = split_at_pauses(in_blocks(samples, 0), 10.0)
    assert np.array_equal(segment.samples, samples)
    assert (segment.start, segment.overlap) == (0.0, 0.0)


@pytest.mark.parametrize("seconds", [0, 0.01, 3, 100])
@pytest.mark.parametrize("level", [0.0, 1e-4])
def test_silence_gives_no_segment(seconds, level):
    noise = level * np.random.default_rng(0).standard_normal(int(seconds * RATE))
    offset = 0.02  # a direct current is no sound
    assert list(split_at_pauses([(noise + offset).astype(np.float32)], 10.0)) == []


def test_quiet_noise_beside_speech_is_silence_but_quiet_speech_is_not():
    speech = bursts(30.0, 1, noise=1e-3)
    noise = (3e-3 * np.random.default_rng(1).standard_normal(40 * RATE)).astype(np.float32)
    segments = list(split_at_pauses([speech, noise, speech], 10.0))
    assert not any(segment.start > 31.0 and ends(segment) < 69.0 for segment in segments)
    segments = list(split_at_pauses([speech, 0.03 * bursts(30.0, 2, noise=1e-3), speech], 10.0))
    assert sum(max(0.0, min(ends(s), 60.0) - max(s.start, 30.0)) for s in segments) > 25.0


def test_a_click_is_no_speech():
    samples = np.zeros(60 * RATE, dtype=np.float32)
    samples[30 * RATE : 30 * RATE + 200] = 0.5
    assert list(split_at_pauses([samples], 10.0)) == []


def test_too_short_a_limit_is_an_error():
    with pytest.raises(ValueError, match="at least 5"):
        next(split_at_pauses([], 4.0))


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


def test_pyav_reads_what_soundfile_does_not(tmp_path):
    path, rate = tmp_path / "a.m4a", 44100
    tone = np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)[None].astype(np.float32) * 0.3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    samples = np.concatenate(list(read_blocks(path)))
    assert abs(len(samples) / RATE - 3.0) < 0.1
    spectrum = np.abs(np.fft.rfft(samples[:RATE] * np.hanning(RATE)))
    assert spectrum.argmax() == 440
    part = np.concatenate(list(read_blocks(path, 1.0, 0.5)))
    assert len(part) == RATE // 2
    np.testing.assert_allclose(part[50:-50], samples[RATE + 50 : RATE * 3 // 2 - 50], atol=1e-4)


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
    assert reason(good, 0.0, 2.0) == "wrong duration"
    assert reason(good, 2.0) == "wrong duration"
    for value, expected in ((np.nan, "non-finite samples"), (1e6, "implausible samples")):
        soundfile.write(tmp_path / "odd.wav", np.full(RATE, value, dtype=np.float32), RATE, subtype="FLOAT")
        assert reason(tmp_path / "odd.wav") == expected
    noise = np.random.default_rng(0).standard_normal(RATE * 30) * 0.1
    soundfile.write(tmp_path / "cut.flac", noise, RATE)
    data = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    assert reason(tmp_path / "cut.flac") in ("unreadable audio", "wrong duration")
