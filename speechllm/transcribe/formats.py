"""What was recognized in one recording, as the text of a file.

    txt    the text, a segment a line
    json   one object, in one line: text, times, confidences, alternatives
    tsv    start and end in milliseconds and text, a segment a line, as openai/whisper writes it
    srt    subtitles (SubRip)
    vtt    subtitles (WebVTT, https://www.w3.org/TR/webvtt1)
    ctm    a word a line: name, channel, start, duration, word, confidence, as NIST's sclite reads it
    TextGrid  intervals of segments and words, as Praat and the Montreal Forced Aligner have them

All times are seconds, or what a format has for them, from the start of the recording. Texts end with a newline, or are
empty where there is nothing to say.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.text.words import word_spans

# A cue of subtitles: what can be read at a glance, and while it is shown.
_LINE_COLUMNS = 42
_CUE_LINES = 2
_CUE_SECONDS = 7.0
_SHORTEST_CUE_SECONDS = 1.0
# Where the next cue begins too soon for that. No player shows a cue of no length.
_LEAST_CUE_SECONDS = 0.1
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Segment:
    """A part of a recording: where it begins and how long it is, in seconds, and what was recognized in it."""

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
      warnings: what is to be known of the audio, such as that a part of it could not be decoded.
    """

    id: str
    audio: str
    duration: float
    segments: Sequence[Segment]
    warnings: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The texts of all segments."""
        return " ".join(segment.text for segment in _spoken(self))

    @property
    def language(self) -> str | None:
        """That of most of the speech, by its duration; None if the model does not say it."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for segment in _spoken(self):
            if segment.recognition.language is not None:
                seconds[segment.recognition.language] += segment.duration
        return max(seconds, key=lambda language: seconds[language], default=None)


def format_txt(recording: Recording) -> str:
    """The text of each segment that has one, a line each."""
    return "".join(f"{segment.text}\n" for segment in _spoken(recording))


def format_json(recording: Recording) -> str:
    r"""One JSON object in one line.

    `id`, `audio`, `duration`, `text`, `confidence` (null where nothing was recognized), `language` (if the model says
    it), `warnings` about the audio (if there are any) and `segments`, each of which has `start`, `end`, `text`,
    `confidence`, `stopped` (see `Hypothesis`) and, where there are any, `language`, `fallback`, `ctc_text`, `words` and
    (more than one hypothesis) `nbest`.

    Numbers that are not finite are null, and what is not valid Unicode, such as a byte of a file's name that is not
    UTF-8, is written as `\udcXX`: any reader of JSON takes it.
    """
    best = [segment.recognition.nbest[0] for segment in recording.segments if segment.recognition.nbest]
    record = {
        "id": recording.id,
        "audio": recording.audio,
        "duration": round(recording.duration, 3),
        "text": recording.text,
        "confidence": _confidence(best),
        **({} if recording.language is None else {"language": recording.language}),
        **({"warnings": list(recording.warnings)} if recording.warnings else {}),
        "segments": [_segment_record(segment) for segment in recording.segments],
    }
    return json.dumps(_valid(record), ensure_ascii=False, allow_nan=False) + "\n"


def format_tsv(recording: Recording) -> str:
    """`start`, `end`, `text`: milliseconds, and a header, for each segment that has a text."""
    lines = ["start\tend\ttext\n"]
    for segment in _spoken(recording):
        start, end = (round(1000 * seconds) for seconds in (segment.offset, segment.offset + segment.duration))
        lines.append(f"{start}\t{end}\t{segment.text}\n")
    return "".join(lines)


def format_srt(recording: Recording) -> str:
    """Numbered cues of SubRip.

    From words with times: at most 2 lines of 42 columns (wide characters have two) and 7 seconds, none over a pause of
    more than a second; a cue is shown for a second at least if the next one leaves it the time. The time of a segment
    without word times is shared out evenly over its text, and its cues last about equally long.
    """
    blocks = []
    for number, (start, end, lines) in enumerate(_shown(recording), start=1):
        # SubRip has no rules; players read tags such as <i> and, some of them, entities.
        lines = [_ENTITY.sub("&amp;", line).replace("<", "&lt;").replace("-->", "--&gt;") for line in lines]
        times = f"{_clock(start, ',')} --> {_clock(end, ',')}"
        blocks.append("\n".join([str(number), times, *lines, ""]))
    return "\n".join(blocks)


def format_vtt(recording: Recording) -> str:
    """Cues of WebVTT, those of `format_srt`."""
    blocks = ["WEBVTT\n"]
    for start, end, lines in _shown(recording):
        blocks.append("\n".join([f"{_clock(start, '.')} --> {_clock(end, '.')}", *map(_escaped, lines), ""]))
    return "\n".join(blocks)


def format_ctm(recording: Recording) -> str:
    """`id 1 start duration word confidence` for each word.

    White space in the id becomes `_`. The words of a segment without times are spread evenly over it, with the
    confidence of its text, after a comment line that says so: a scorer would otherwise count them as not recognized.
    """
    name = "_".join(recording.id.split())
    lines = []
    for segment in _spoken(recording):
        words: Sequence[Word] = segment.words or ()
        if not words:
            words = _spread(segment)
            lines.append(f";; {name} {segment.offset:.3f}: no word times, {len(words)} words spread evenly\n")
        for word in words:
            duration = word.end - word.start
            confidence = word.confidence if math.isfinite(word.confidence) else 0.0
            lines.append(f"{name} 1 {word.start:.3f} {duration:.3f} {word.text} {confidence:.4f}\n")
    return "".join(lines)


def format_textgrid(recording: Recording) -> str:
    """Praat's long text form: a tier of segments and, where there are word times, one of words.

    Intervals follow one another without a gap, as Praat wants them; what is between texts is empty. Words that would
    overlap begin where the one before ends.
    """
    segments = [(s.offset, s.offset + s.duration, s.text) for s in _spoken(recording)]
    words = [(word.start, word.end, word.text) for s in _spoken(recording) for word in s.words or ()]
    said = {"segments": segments} | ({"words": words} if words else {})
    end = max(_intervals(texts, round(1000 * recording.duration))[-1][1] for texts in said.values())
    tiers = [(name, _intervals(texts, end)) for name, texts in said.items()]
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {end / 1000:.3f}",
        "tiers? <exists>",
        f"size = {len(tiers)}",
        "item []:",
    ]
    for number, (name, intervals) in enumerate(tiers, start=1):
        lines += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f'        name = "{name}"',
            "        xmin = 0",
            f"        xmax = {end / 1000:.3f}",
            f"        intervals: size = {len(intervals)}",
        ]
        for place, (start, until, text) in enumerate(intervals, start=1):
            quoted = text.replace('"', '""')
            lines += [
                f"        intervals [{place}]:",
                f"            xmin = {start / 1000:.3f}",
                f"            xmax = {until / 1000:.3f}",
                f'            text = "{quoted}"',
            ]
    return "".join(f"{line}\n" for line in lines)


def _intervals(said: Sequence[tuple[float, float, str]], end: int) -> list[tuple[int, int, str]]:
    """Texts with their times, and empty ones between them, up to `end`, in milliseconds."""
    intervals: list[tuple[int, int, str]] = []
    last = 0
    for seconds, until, text in said:
        start = max(round(1000 * seconds), last)
        if start > last:
            intervals.append((last, start, ""))
        last = max(round(1000 * until), start + 1)  # Praat reads no interval without a length
        intervals.append((start, last, text))
    if end > last or not intervals:
        intervals.append((last, max(end, 1), ""))
    return intervals


FORMATS: dict[str, Callable[[Recording], str]] = {
    "txt": format_txt,
    "json": format_json,
    "tsv": format_tsv,
    "srt": format_srt,
    "vtt": format_vtt,
    "ctm": format_ctm,
    "TextGrid": format_textgrid,
}


# What a player may read as one character.
_ENTITY = re.compile(r"&(?=#?\w+;)")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _valid(value: Any) -> Any:
    """The same without numbers that are not finite, and with valid Unicode only."""
    if isinstance(value, dict):
        return {name: _valid(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_valid(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spoken(recording: Recording) -> list[Segment]:
    return [segment for segment in recording.segments if segment.text]


def _confidence(hypotheses: Sequence[Hypothesis]) -> float | None:
    """The geometric mean of the probabilities of all their tokens."""
    log_probs = [log_prob for hypothesis in hypotheses for log_prob in hypothesis.log_probs]
    confidence = math.exp(sum(log_probs) / len(log_probs)) if log_probs else math.nan
    return round(confidence, 4) if math.isfinite(confidence) else None


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
    """The words of a segment without word times, each with the same share of the time."""
    confidence = _confidence(segment.recognition.nbest[:1]) or 0.0
    spans = word_spans(segment.text)
    seconds = segment.duration / len(spans)
    return [
        Word(segment.text[start:end], segment.offset + i * seconds, segment.offset + (i + 1) * seconds, confidence)
        for i, (start, end) in enumerate(spans)
    ]


class _Piece(NamedTuple):
    """A word, or a part of one that is longer than a line, when it is said, and what stands before it: a space, or
    nothing, as between Chinese characters."""

    text: str
    start: float
    end: float
    space: str


# Start and end in seconds, lines.
_Cue = tuple[float, float, list[str]]


def _shown(recording: Recording) -> list[_Cue]:
    """The cues of a recording as they are shown: none has no length, none begins before the one before has ended."""
    cues = [cue for segment in _spoken(recording) for cue in _cues(segment)]
    shown: list[_Cue] = []
    for i, (start, end, lines) in enumerate(cues):
        start = max(start, shown[-1][1] if shown else 0.0)
        end = max(min(end, start + _CUE_SECONDS), start + _SHORTEST_CUE_SECONDS)
        if i + 1 < len(cues):
            end = min(end, cues[i + 1][0])
        shown.append((start, max(end, start + _LEAST_CUE_SECONDS), lines))
    return shown


def _cues(segment: Segment) -> Iterator[_Cue]:
    groups = _evenly(segment) if not segment.words else _at_pauses(list(_pieces(segment.words, segment.text)))
    for group in groups:
        yield group[0].start, group[-1].end, _lines(group)


def _at_pauses(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """As many pieces together as a cue holds, none over a pause."""
    group: list[_Piece] = []
    for piece in pieces:
        if group and (piece.start - group[-1].end > _PAUSE_SECONDS or not _fits([*group, piece])):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _evenly(segment: Segment) -> list[list[_Piece]]:
    """The text of a segment without word times, in as few cues of about the same length as hold it."""
    pieces = list(_pieces(_spread(segment), segment.text))
    fewest = math.ceil(segment.duration / _CUE_SECONDS)
    for count in range(max(1, fewest), len(pieces)):
        groups: dict[int, list[_Piece]] = defaultdict(list)
        for piece in pieces:
            share = ((piece.start + piece.end) / 2 - segment.offset) / segment.duration
            groups[min(int(share * count), count - 1)].append(piece)
        if all(map(_fits, groups.values())):
            return list(groups.values())
    return [[piece] for piece in pieces]


def _fits(pieces: Sequence[_Piece]) -> bool:
    return len(_lines(pieces)) <= _CUE_LINES and pieces[-1].end - pieces[0].start <= _CUE_SECONDS


def _pieces(words: Sequence[Word], text: str) -> Iterator[_Piece]:
    end = 0
    for word in words:
        start = text.find(word.text, end)
        space = "" if start == end else " "
        end = start + len(word.text) if start >= 0 else end
        parts = _broken(word.text)
        seconds = (word.end - word.start) / len(parts)
        for i, part in enumerate(parts):
            begin = word.start + i * seconds
            yield _Piece(part, begin, begin + seconds, "" if i else space)


def _broken(word: str) -> list[str]:
    """Parts of a word that have room in a line."""
    parts, columns = [""], 0
    for character in word:
        columns += _columns(character)
        if columns > _LINE_COLUMNS:
            parts.append("")
            columns = _columns(character)
        parts[-1] += character
    return parts


def _lines(pieces: Sequence[_Piece]) -> list[str]:
    """As many pieces in a line as its columns allow."""
    lines: list[str] = []
    for piece in pieces:
        if lines and _columns(lines[-1] + piece.space + piece.text) <= _LINE_COLUMNS:
            lines[-1] += piece.space + piece.text
        else:
            lines.append(piece.text)
    return lines


def _columns(text: str) -> int:
    """Of characters of one width: East Asian ones have two, what is written over another has none."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
