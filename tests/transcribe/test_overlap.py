"""Segments that hold the same words at the cut between them."""

import pytest

from speechllm.decode.result import Recognition, Word
from speechllm.transcribe.formats import Segment
from speechllm.transcribe.overlap import without_overlap


def said(text: str, offset: float, duration: float, times: list[float] | None = None) -> Segment:
    words = None if times is None else tuple(Word(w, t, t + 0.1, 1.0) for w, t in zip(text.split(), times, strict=True))
    return Segment(offset, duration, Recognition(text, (), (), words=words))


@pytest.mark.parametrize(
    ("before", "after", "joined"),
    [
        (
            "we went to the old market and bo",
            "arket and bought some bread",
            "we went to the old market and bought some bread",
        ),
        ("one two three", "two three four", "one two three four"),
        ("One two, three", "Two three. Four", "One two, three Four"),
        ("a b c d", "e f g h", "a b c d e f g h"),
        ("", "one two", "one two"),
        ("one two", "", "one two"),
        ("今天天气很好我们", "很好我们去公园吧", "今天天气很好我们去公园吧"),
        # a single word in common, far from both ends, is no overlap
        ("it is the end of all", "now a cat of his is here", "it is the end of all now a cat of his is here"),
    ],
)
def test_the_words_of_an_overlap_come_once(before, after, joined):
    first, second = without_overlap(said(before, 0.0, 4.0), said(after, 2.0, 4.0))
    separator = " " if joined.isascii() else ""
    assert separator.join(filter(None, (first.text, second.text))) == joined
    assert (first.offset, first.duration, second.offset, second.duration) == (0.0, 3.0, 3.0, 3.0)


def test_words_with_times_are_taken_from_their_side_of_the_middle():
    before = said("a b x y", 10.0, 4.0, [0.0, 1.5, 2.5, 3.5])
    after = said("p q c d", 12.0, 4.0, [0.2, 1.5, 2.5, 3.5])
    first, second = without_overlap(before, after)
    assert (first.text, second.text) == ("a b x", "q c d")
    assert [word.start for word in first.words] == [10.0, 11.5, 12.5]
    assert [word.start for word in second.words] == [13.5, 14.5, 15.5]
