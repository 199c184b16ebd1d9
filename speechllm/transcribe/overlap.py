"""Words that two segments have in common, where the cut between them was not at a pause."""

from __future__ import annotations

from dataclasses import replace
from difflib import SequenceMatcher

from speechllm.decode.result import Recognition
from speechllm.text.words import word_spans
from speechllm.transcribe.formats import Segment


def without_overlap(before: Segment, after: Segment) -> tuple[Segment, Segment]:
    """Two segments that both hold the end of the first, without the words that both have.

    Of the words that the end of the first and the beginning of the second have in common, the longest run is where the
    two are joined: what the first has behind it, and the second before it, was cut off in the middle and is dropped. A
    run is too short when more than twice as many words would be dropped. Without a run, words with times are taken from
    the side of the middle of the overlap that they are on; without times all words stay.

    The words of the overlap are known by their times, else by their share of the segment. Only `text` and `words` of
    the recognitions are changed. The segments meet in the middle of the overlap.
    """
    overlap = min(before.offset + before.duration - after.offset, after.duration)
    middle = after.offset + overlap / 2
    first, second = _Words(before), _Words(after)
    tail, head = first.since(after.offset), second.until(after.offset + overlap)
    place, other, length = _longest_run(first.keys[tail:], second.keys[:head])
    dropped = len(first.keys) - tail - place - length + other
    if length and dropped <= 2 * length:
        kept, left_out = tail + place + length, other + length
    elif first.times and second.times:
        kept = sum(time < middle for time in first.times)
        left_out = sum(time < middle for time in second.times)
    else:
        kept, left_out = len(first.keys), 0
    return (
        replace(before, duration=middle - before.offset, recognition=first.part(0, kept)),
        replace(
            after,
            offset=middle,
            duration=after.duration - overlap / 2,
            recognition=second.part(left_out, len(second.keys), shift=-overlap / 2),
        ),
    )


class _Words:
    """The words of a segment's text, to be compared: case and punctuation do not count.

    `times`: the middle of each word, from the start of the recording; None without times, or when they are of another
    text.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._text = segment.recognition.text
        self._spans = word_spans(self._text)
        words = [self._text[start:end] for start, end in self._spans]
        self.keys = ["".join(filter(str.isalnum, word.casefold())) or word for word in words]
        timed = segment.words or ()
        has_times = segment.words is not None and [word.text for word in timed] == words
        self.times = [(word.start + word.end) / 2 for word in timed] if has_times else None

    def since(self, seconds: float) -> int:
        """The number of the first word that may be said after this time."""
        if self.times is not None:
            return sum(time < seconds for time in self.times)
        return max(0, len(self.keys) - self._most_in(self._segment.offset + self._segment.duration - seconds))

    def until(self, seconds: float) -> int:
        """The number of words that may be said before this time."""
        if self.times is not None:
            return sum(time < seconds for time in self.times)
        return min(len(self.keys), self._most_in(seconds - self._segment.offset))

    def _most_in(self, seconds: float) -> int:
        """Half as many again as at the segment's rate, and one."""
        return 1 + int(1.5 * len(self.keys) * seconds / self._segment.duration)

    def part(self, first: int, end: int, shift: float = 0.0) -> Recognition:
        """With the words [first, end) alone, their times moved by `shift` seconds."""
        recognition = self._segment.recognition
        text = self._text[self._spans[first][0] : self._spans[end - 1][1]] if first < end else ""
        words = recognition.words
        if words is not None:
            words = words[first:end] if self.times is not None else None
        if words is not None:
            words = tuple(replace(word, start=word.start + shift, end=word.end + shift) for word in words)
        return replace(recognition, text=text, words=words)


def _longest_run(first: list[str], second: list[str]) -> tuple[int, int, int]:
    """Where the longest common run of words begins in both, and its length."""
    return SequenceMatcher(None, first, second, autojunk=False).find_longest_match()
