"""Transcripts as other programs write them: NIST's trn, stm and ctm, subtitles, tables, and plain lines of text."""

from __future__ import annotations

import csv
import html
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from speechllm.errors import UserError

_TRN_LINE = re.compile(r"(.*)\(([^()\s]+)\)\s*")
_CUE_TIMES = re.compile(r"(?:\d+:)?\d+:\d+[.,]\d+\s+-->\s+(?:\d+:)?\d+:\d+[.,]\d+.*")
_MARKUP = re.compile(r"</?(?:i|b|u|s|font|c|v|lang|ruby|rt)(?:[.\s][^<>]*)?>|<[\d:.]+>|\{\\[^{}]*\}")
# Names of columns, the first that is there.
_ID_COLUMNS = (
    "id",
    "utt_id",
    "utterance_id",
    "uttid",
    "audio_filepath",
    "audio",
    "path",
    "file",
    "filename",
    "file_name",
)
_TEXT_COLUMNS = ("text", "reference", "ref", "sentence", "transcript", "transcription", "wrd", "words")
_PREDICTED_COLUMNS = ("pred_text", "hypothesis", "hyp", "prediction", "predicted", "recognized")


@dataclass(frozen=True)
class Span:
    """Where a text is said: the recording, its channel, and seconds."""

    recording: str
    channel: str
    start: float
    end: float


@dataclass(frozen=True)
class Line:
    """What a file says of an utterance.

    Attributes:
        predicted: what was recognized, where the file also has room for a reference.
        duration: in seconds.
        span: of a segment of a recording, in an stm file.
        words: each with when it is said, in a ctm file.
        hotwords: what the utterance's list of them is, in a manifest.
    """

    id: str
    text: str | None = None
    predicted: str | None = None
    language: str | None = None
    speaker: str | None = None
    duration: float | None = None
    span: Span | None = None
    words: tuple[tuple[Span, str], ...] | None = None
    hotwords: tuple[str, ...] | None = None

    @property
    def written_language(self) -> str | None:
        """Of the text: `language` is en>de of translations into German."""
        return None if self.language is None else self.language.rpartition(">")[2]


Numbered = Sequence[tuple[str, str]]  # FILE:LINE and the line


def read_trn(lines: Numbered) -> Iterator[tuple[str, Line]]:
    """NIST's transcripts: words, then the id in parentheses; `;;` begins a comment."""
    for where, text in lines:
        if not text.strip() or text.startswith(";;"):
            continue
        found = _TRN_LINE.fullmatch(text)
        if not found:
            raise UserError(f"{where}: expected words and an id in parentheses at the end, as trn files have it")
        words, id = found.groups()
        _refuse_alternatives(words, where)
        yield where, Line(id, words.strip())


def read_ctm(lines: Numbered) -> Iterator[tuple[str, Line]]:
    """NIST's times of words: recording, channel, start, duration, word, and perhaps a confidence; `;;` begins a
    comment. A recording of which there is one channel has its name for an id, others are `NAME-CHANNEL`."""
    words: dict[tuple[str, str], list[tuple[Span, str]]] = defaultdict(list)
    last_line = {}
    for where, text in lines:
        if not text.strip() or text.startswith(";;"):
            continue
        try:
            recording, channel, start, seconds, word = text.split()[:5]
            begin, end = float(start), float(start) + float(seconds)
            if not (math.isfinite(begin) and math.isfinite(end)):
                raise ValueError(f"times are not finite: {start} {seconds}")
            span = Span(recording, channel, begin, end)
        except ValueError as error:
            raise UserError(f"{where}: expected RECORDING CHANNEL START DURATION WORD, as ctm files have it") from error
        _refuse_alternatives(word, where)
        words[recording, channel].append((span, word))
        last_line[recording, channel] = where
    channels: dict[str, int] = defaultdict(int)
    for recording, _ in words:
        channels[recording] += 1
    for (recording, channel), said in words.items():
        said.sort(key=lambda item: item[0].start)
        id = recording if channels[recording] == 1 else f"{recording}-{channel}"
        yield last_line[recording, channel], Line(id, " ".join(word for _, word in said), words=tuple(said))


def read_stm(lines: Numbered) -> Iterator[tuple[str, Line]]:
    """NIST's segments: recording, channel, speaker, start, end, perhaps `<labels>`, and words; `;;` begins a comment.

    Their ids are `RECORDING-CHANNEL-START-END`, the times in hundredths of a second. The text
    IGNORE_TIME_SEGMENT_IN_SCORING is None: what is recognized there does not count.
    """
    for where, text in lines:
        if not text.strip() or text.startswith(";;"):
            continue
        try:
            recording, channel, speaker, start, end, *rest = text.split(maxsplit=5)
            span = Span(recording, channel, float(start), float(end))
        except ValueError as error:
            raise UserError(
                f"{where}: expected RECORDING CHANNEL SPEAKER START END WORDS, as stm files have it"
            ) from error
        words = re.sub(r"^<[^<>]*>\s*", "", rest[0].strip()) if rest else ""
        _refuse_alternatives(words, where)
        ignored = words.upper() == "IGNORE_TIME_SEGMENT_IN_SCORING"
        id = f"{recording}-{channel}-{round(100 * span.start):07d}-{round(100 * span.end):07d}"
        seconds = span.end - span.start
        yield where, Line(id, None if ignored else words, speaker=speaker, duration=seconds, span=span)


def read_subtitles(lines: Numbered, id: str) -> Iterator[tuple[str, Line]]:
    """SubRip or WebVTT: the text of all cues is that of one recording."""
    said: list[str] = []
    cues, in_cue = 0, False
    for _, text in lines:
        if not text.strip():
            in_cue = False
        elif _CUE_TIMES.fullmatch(text.strip()):
            cues, in_cue = cues + 1, True
        elif in_cue:
            said.append(_MARKUP.sub("", text).strip())
    if not cues and any(text.strip() and not text.startswith("WEBVTT") for _, text in lines):
        raise UserError(f"{lines[0][0]}: no times of a cue follow, such as 00:00:01,000 --> 00:00:02,500")
    yield id, Line(id, html.unescape(" ".join(said)))


def read_textgrid(lines: Numbered, id: str) -> Iterator[tuple[str, Line]]:
    """Praat's long text form: the text of the first tier is that of one recording."""
    said: list[str] = []
    tiers = 0
    for where, text in lines:
        name, _, value = (part.strip() for part in text.partition("="))
        tiers += name == "class"
        if name != "text" or tiers > 1:
            continue
        if len(value) < 2 or not (value.startswith('"') and value.endswith('"')):
            raise UserError(f'{where}: expected text = "..." in one line')
        said.append(value[1:-1].replace('""', '"'))
    if not tiers:
        raise UserError(
            f"{lines[0][0] if lines else id}: no tier follows; TextGrids are read in Praat's long text form"
        )
    yield id, Line(id, " ".join(text for text in said if text))


def read_table(lines: Numbered, id: str, delimiter: str) -> Iterator[tuple[str, Line]]:
    """A table with a header that names its columns: an id (or the path of the audio, whose name without suffix then is
    the id), what was said, what was recognized. Rows without ids are `line-2`, and so on; openai/whisper's tables of
    `start`, `end`, `text` are one recording."""
    lines = [(where, text) for where, text in lines if text.strip()]
    rows = csv.reader((text + "\n" for _, text in lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        id_column, text_column, predicted_column = (
            next((header.index(name) for name in names if name in header), None)
            for names in (_ID_COLUMNS, _TEXT_COLUMNS, _PREDICTED_COLUMNS)
        )
        if text_column is None and predicted_column is None:
            raise UserError(
                f"{lines[0][0] if lines else id}: no column of texts among {', '.join(header) or 'none'}; the header "
                f"needs one of {', '.join(_TEXT_COLUMNS)}, or of what was recognized, {', '.join(_PREDICTED_COLUMNS)}"
            )
        is_whisper = header == ["start", "end", "text"]
        said: list[str] = []
        for row in rows:
            where, _ = lines[rows.line_num - 1]
            if len(row) != len(header):
                raise UserError(f"{where}: {len(row)} columns, the header has {len(header)}")
            text, predicted = (None if column is None else row[column] for column in (text_column, predicted_column))
            if is_whisper:
                said.append(text or "")
                continue
            row_id = f"line-{rows.line_num}" if id_column is None else row[id_column]
            if id_column is not None and header[id_column] not in ("id", "utt_id", "utterance_id", "uttid"):
                row_id = PurePath(row_id).stem
            yield where, Line(row_id, text, predicted)
    except csv.Error as error:
        where = lines[min(rows.line_num, len(lines)) - 1][0]
        raise UserError(f"{where}: not a table of columns with {delimiter!r} between them: {error}") from error
    if is_whisper:
        yield id, Line(id, " ".join(said))


def assign_words(segments: Iterable[Line], recordings: Iterable[Line]) -> tuple[dict[str, Line], list[Line]]:
    """The words of recordings with times, given to the segments in which they are said: each to that which has its
    middle, or else to the nearest of its recording and channel.

    Args:
        segments: of `read_stm`; recordings: of `read_ctm`.

    Returns:
        What was recognized in each segment, by its id; recordings that no segment is of.
    """
    of_channel: dict[tuple[str, str], list[tuple[Span, str]]] = defaultdict(list)
    texts: dict[str, list[str]] = {}
    for line in segments:
        texts[line.id] = []
        if line.span is not None:
            of_channel[line.span.recording, line.span.channel].append((line.span, line.id))
    unknown = []
    for recording in recordings:
        for span, word in recording.words or ():
            candidates = of_channel.get((span.recording, span.channel))
            if candidates is None:
                unknown.append(recording)
                break
            middle = (span.start + span.end) / 2
            _, nearest = min(candidates, key=lambda item: max(item[0].start - middle, middle - item[0].end, 0.0))
            texts[nearest].append(word)
    return {id: Line(id, " ".join(words)) for id, words in texts.items()}, unknown


def _refuse_alternatives(words: str, where: str) -> None:
    if "{" in words.split() or "<ALT" in words:
        raise UserError(
            f"{where}: alternatives ({{ one / other }}) are sclite's alone; choose one of them before scoring"
        )
