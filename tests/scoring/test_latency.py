import pytest

from speechllm.decode.result import StreamedWord, streamed_text
from speechllm.prompt.label import WordTime
from speechllm.scoring.latency import Delays, percentile, whole_words


def written(text, at, joined=False):
    return StreamedWord(text, at - 0.5, at - 0.2, 0.9, at, joined=joined)


def test_delays_of_the_words_that_are_right():
    said = [WordTime("one", 0.1, 0.4), WordTime("two", 0.5, 0.9), WordTime("three", 1.0, 1.5)]
    delays = Delays()
    # two is wrong, four was not said
    delays.add(
        said, [written("One", 0.8), written("too", 1.4), written("three", 2.1), written("four", 2.1)], ["lowercase"]
    )
    assert delays.words == pytest.approx([0.4, 0.6]) and delays.first == pytest.approx([0.4])
    delays.add(said, [written("two", 1.0)])
    assert delays.words == pytest.approx([0.4, 0.6, 0.1]) and len(delays.first) == 1
    delays.add(said, [])
    delays.add([], [written("one", 1.0)])
    assert len(delays.words) == 3
    assert percentile(delays.words, 50) == pytest.approx(0.4) and percentile([], 50) is None


def test_a_word_in_parts_is_written_with_its_last_one():
    words = [written("twen", 1.0), written("ty", 2.0, joined=True), written("one", 2.0)]
    assert [(word.text, word.written) for word in whole_words(words)] == [("twenty", 2.0), ("one", 2.0)]
    assert streamed_text(words) == "twenty one"
    characters = [written("你", 1.0), written("好", 2.0, joined=True)]
    assert whole_words(characters) == characters
    assert streamed_text(characters) == "你好"
