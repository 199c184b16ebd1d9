"""What was recognised in one recording, as the text of a file.

    txt    the text, a segment a line
    json   one object, in one line: text, times, confidences, alternatives
    tsv    start and end in milliseconds and text, a segment a line, as openai/whisper writes it
    srt    subtitles (SubRip)
    ctm    a word a line: name, channel, start, duration, word, confidence, as NIST's sclite reads it

All times are seconds, or what a format has for them, from the start of the recording. Texts end with a newline, or are
empty where there is nothing to say.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.decode.timestamps import word_spans

# A cue of subtitles: what can be read at a glance, and while it is shown.
_LINE_COLUMNS = 42
_CUE_LINES = 2
_CUE_SECONDS = 6.0
_SHORTEST_CUE_SECONDS = 1.0
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Segment:
    """A part of a recording: where it begins and how long it is, in seconds, and what was recognised in it."""

    offset: float
    duration: float
    recognition: Recognition

    @property
    def text(self) -> str:
        return " ".join(self.recognition.text.split())

    @property
    def words(self) -> tuple[Word, ...] | None:
        """With times from the start of the recording; None without times."""
        if self.recognition.words is None:
            return None
        return tuple(
            Word(word.text, word.start + self.offset, word.end + self.offset, word.confidence)
            for word in self.recognition.words
        )


@dataclass(frozen=True)
class Recording:
    """A recording with its segments, in the order of time; it may have none.

    Attributes:
      id: a name for it, such as the file's without its suffix.
      audio: the file it is in.
      duration: in seconds.
    """

    id: str
    audio: str
    duration: float
    segments: Sequence[Segment]

    @property
    def text(self) -> str:
        """The texts of all segments."""
        return " ".join(segment.text for segment in _spoken(self))

    @property
    def language(self) -> str | None:
        """That of most of the speech, by its duration; None if the model does not say it."""
        seconds: Counter[str] = Counter()
        for segment in _spoken(self):
            if segment.recognition.language is not None:
                seconds[segment.recognition.language] += segment.duration
        return max(seconds, key=seconds.get, default=None)


def format_txt(recording: Recording) -> str:
    """The text of each segment that has one, a line each."""
    return "".join(f"{segment.text}\n" for segment in _spoken(recording))


def format_json(recording: Recording) -> str:
    """One JSON object in one line.

    `id`, `audio`, `duration`, `text`, `confidence` (null where nothing was recognised), `language` (if the model says
    it) and `segments`, each of which has `start`, `end`, `text`, `confidence`, `stopped` (see `Hypothesis`) and, where
    there are any, `language`, `fallback`, `ctc_text`, `words` and (more than one hypothesis) `nbest`.
    """
    best = [segment.recognition.nbest[0] for segment in recording.segments if segment.recognition.nbest]
    record = {
        "id": recording.id,
        "audio": recording.audio,
        "duration": round(recording.duration, 3),
        "text": recording.text,
        "confidence": _confidence(best),
        **({} if recording.language is None else {"language": recording.language}),
        "segments": [_segment_record(segment) for segment in recording.segments],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def format_tsv(recording: Recording) -> str:
    """`start`, `end`, `text`: milliseconds, and a header, for each segment that has a text."""
    lines = ["start\tend\ttext\n"]
    for segment in _spoken(recording):
        start, end = (round(1000 * seconds) for seconds in (segment.offset, segment.offset + segment.duration))
        lines.append(f"{start}\t{end}\t{segment.text}\n")
    return "".join(lines)


def format_srt(recording: Recording) -> str:
    """Numbered cues of SubRip.

    From words with times: at most 2 lines of 42 columns (wide characters have two) and 6 seconds, none over a pause of
    more than a second; a cue is shown for a second at least if the next one leaves it the time. A segment without times
    is one cue.
    """
    cues = [cue for segment in _spoken(recording) for cue in _cues(segment)]
    blocks = []
    for i, (start, end, lines) in enumerate(cues):
        end = max(end, start + _SHORTEST_CUE_SECONDS)
        if i + 1 < len(cues):
            end = min(end, max(start, cues[i + 1][0]))
        blocks.append("\n".join([str(i + 1), f"{_srt_time(start)} --> {_srt_time(end)}", *lines, ""]))
    return "\n".join(blocks)


def format_ctm(recording: Recording) -> str:
    """`id 1 start duration word confidence` for each word.

    White space in the id becomes `_`. The words of a segment without times are spread evenly over it, with the
    confidence of its text, behind a comment line that says so: a scorer would otherwise count them as not recognised.
    """
    name = "_".join(recording.id.split())
    lines = []
    for segment in _spoken(recording):
        words = segment.words
        if not words:
            words = _spread(segment)
            lines.append(f";; {name} {segment.offset:.3f}: no word times, {len(words)} words spread evenly\n")
        for word in words:
            duration = word.end - word.start
            lines.append(f"{name} 1 {word.start:.3f} {duration:.3f} {word.text} {word.confidence:.4f}\n")
    return "".join(lines)


FORMATS: dict[str, Callable[[Recording], str]] = {
    "txt": format_txt,
    "json": format_json,
    "tsv": format_tsv,
    "srt": format_srt,
    "ctm": format_ctm,
}


def _spoken(recording: Recording) -> list[Segment]:
    return [segment for segment in recording.segments if segment.text]


def _confidence(hypotheses: Sequence[Hypothesis]) -> float | None:
    """The geometric mean of the probabilities of all their tokens."""
    log_probs = [log_prob for hypothesis in hypotheses for log_prob in hypothesis.log_probs]
    return round(math.exp(sum(log_probs) / len(log_probs)), 4) if log_probs else None


def _segment_record(segment: Segment) -> dict:
    found = segment.recognition
    record: dict = {
        "start": round(segment.offset, 3),
        "end": round(segment.offset + segment.duration, 3),
        "text": segment.text,
        "confidence": _confidence(found.nbest[:1]),
        "stopped": found.nbest[0].stopped if found.nbest else None,
    }
    if found.language is not None:
        record["language"] = found.language
    if found.fallback is not None:
        record["fallback"] = found.fallback
    if found.ctc_text is not None:
        record["ctc_text"] = found.ctc_text
    if segment.words is not None:
        record["words"] = [
            {
                "word": word.text,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in segment.words
        ]
    if len(found.nbest) > 1:
        record["nbest"] = [
            {
                "text": text,
                "score": round(hypothesis.score, 4),
                "confidence": _confidence([hypothesis]),
                "stopped": hypothesis.stopped,
            }
            for text, hypothesis in zip(found.texts, found.nbest, strict=True)
        ]
    return record


def _spread(segment: Segment) -> list[Word]:
    confidence = _confidence(segment.recognition.nbest[:1]) or 0.0
    spans = word_spans(segment.text)
    seconds = segment.duration / len(spans)
    return [
        Word(segment.text[start:end], segment.offset + i * seconds, segment.offset + (i + 1) * seconds, confidence)
        for i, (start, end) in enumerate(spans)
    ]


def _cues(segment: Segment) -> Iterator[tuple[float, float, list[str]]]:
    """Start, end and lines."""
    if not segment.words:
        words = [segment.text[start:end] for start, end in word_spans(segment.text)]
        yield segment.offset, segment.offset + segment.duration, _lines(words, _spaces(words, segment.text))
        return
    spaces = _spaces([word.text for word in segment.words], segment.text)
    first = 0
    for i in range(1, len(segment.words) + 1):
        cue = segment.words[first:i]
        if i < len(segment.words):
            word = segment.words[i]
            texts = [word.text for word in segment.words[first : i + 1]]
            if (
                word.start - cue[-1].end <= _PAUSE_SECONDS
                and word.end - cue[0].start <= _CUE_SECONDS
                and len(_lines(texts, spaces[first : i + 1])) <= _CUE_LINES
            ):
                continue
        yield cue[0].start, cue[-1].end, _lines([word.text for word in cue], spaces[first:i])
        first = i


def _spaces(words: Sequence[str], text: str) -> list[str]:
    """What stands in front of each word in `text`: a space, or nothing as between Chinese characters."""
    spaces, end = [], 0
    for word in words:
        start = text.find(word, end)
        spaces.append("" if start == end else " ")
        end = start + len(word) if start >= 0 else end
    return spaces


def _lines(words: Sequence[str], spaces: Sequence[str]) -> list[str]:
    """As many words in a line as its columns allow; a longer word has a line to itself."""
    lines: list[str] = []
    for word, space in zip(words, spaces, strict=True):
        if lines and _columns(lines[-1] + space + word) <= _LINE_COLUMNS:
            lines[-1] += space + word
        else:
            lines.append(word)
    return lines


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _srt_time(seconds: float) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"
