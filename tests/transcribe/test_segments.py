"""Long audio and many inputs: each word once, batches that are full, results in order."""

from itertools import pairwise

import numpy as np
import pytest

from speechllm.prompt.request import Request
from speechllm.transcribe.formats import Recording
from speechllm.transcribe.inputs import audio_input
from speechllm.transcribe.segments import SegmentOptions, transcribe_inputs
from tests.transcribe.conftest import RATE, Listener, melody, random_words


def result_of(samples: np.ndarray, recognize: Listener, max_seconds: float = 30.0) -> Recording:
    ((_, found),) = transcribe_inputs([audio_input(samples, "a")], recognize, SegmentOptions(max_seconds=max_seconds))
    return found


def words_of(recording: Recording) -> list[str]:
    return " ".join(segment.text for segment in recording.segments).split()


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_long_audio_has_each_word_once(seed, pause, timestamps):
    words = random_words(80, seed)
    found = result_of(melody(words, pause), Listener(timestamps), 7.0)
    assert len(found.segments) > 4
    assert words_of(found) == words
    assert found.duration == pytest.approx(len(words) * (0.4 + pause))
    for before, after in pairwise(found.segments):
        assert before.offset + before.duration <= after.offset + 1e-6
    if timestamps:
        timed = [word for segment in found.segments for word in segment.words]
        assert [word.text for word in timed] == words
        starts = [i * (0.4 + pause) for i in range(len(words))]
        assert np.abs(np.array([word.start for word in timed]) - starts).max() < 0.35  # a word that was cut: its rest


def test_silence_is_not_recognized():
    listener = Listener()
    found = result_of(np.zeros(RATE * 70, dtype=np.float32), listener)
    assert (found.segments, found.duration, listener.batches) == ([], 70.0, [])


def test_batches_are_full_of_segments_of_similar_length_and_results_in_order():
    rng = np.random.default_rng(0)
    texts = [random_words(int(rng.integers(1, 12)), i) for i in range(60)]
    listener = Listener()
    inputs = [audio_input(melody(words, 0.2), str(i), Request(language=f"l{i}")) for i, words in enumerate(texts)]
    found = list(transcribe_inputs(iter(inputs), listener, SegmentOptions(batch_seconds=20.0)))
    assert [words_of(recording) for _, recording in found] == texts
    assert [recording.id for _, recording in found] == [str(i) for i in range(60)]
    assert sorted(request.language for batch in listener.batches for request in batch.requests) == sorted(
        f"l{i}" for i in range(60)
    )
    padded = [batch.features.shape[0] * batch.features.shape[1] for batch in listener.batches]
    assert max(padded) <= 2000 + 60
    assert sum(padded) < 1.15 * sum(int(batch.feature_lens.sum()) for batch in listener.batches)


def test_a_batch_does_not_wait_for_all_inputs():
    opened = []

    def inputs():
        for i in range(100):
            opened.append(i)
            yield audio_input(melody(["do"] * 5, 0.1), str(i))

    results = transcribe_inputs(inputs(), Listener(), SegmentOptions(batch_seconds=10.0))
    assert next(results)[0].id == "0"
    assert len(opened) < 25
