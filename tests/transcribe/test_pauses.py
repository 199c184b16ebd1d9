"""Where long audio is cut."""

from itertools import pairwise

import numpy as np
import pytest

from speechllm.transcribe.pauses import split_at_pauses

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
