"""Output formats: golden lines, and what a reader of each format gets back."""

import html
import itertools
import json
import math
import os
import random
import re

import pytest

from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.text.words import word_spans
from speechllm.transcribe.formats import FORMATS, Recording, Segment, _columns


def hypothesis(*log_probs, stopped="end"):
    return Hypothesis(tuple(range(len(log_probs) - 1)), log_probs, sum(log_probs), stopped)


def recognition(text, words=None, **more):
    return Recognition(text, (hypothesis(-0.1, -0.3),), (text,), words=words, **more)


def evenly(text, seconds=0.4, start=0.0):
    """A word each so many seconds, of nine tenths of them."""
    return tuple(
        Word(word, start + i * seconds, start + (i + 0.9) * seconds, 0.5) for i, word in enumerate(text.split())
    )


HELLO = recognition("hello world", (Word("hello", 0.2, 0.48, 0.9), Word("world", 0.6, 1.0, 0.75)))
SILENCE = Recognition("", (), (), words=())
RECORDING = Recording(
    "a talk",
    "talks/a talk.wav",
    3661.5,
    [Segment(0.0, 2.0, SILENCE), Segment(2.0, 1.5, HELLO), Segment(3600.04, 2.0, recognition("no  times\there"))],
)


def write(format, recording=RECORDING):
    return FORMATS[format](recording)


def test_txt():
    assert write("txt") == "hello world\nno times here\n"


def test_tsv():
    assert write("tsv") == "start\tend\ttext\n2000\t3500\thello world\n3600040\t3602040\tno times here\n"


def test_ctm():
    assert write("ctm").splitlines() == [
        "a_talk 1 2.200 0.280 hello 0.9000",
        "a_talk 1 2.600 0.400 world 0.7500",
        ";; a_talk 3600.040: no word times, 3 words spread evenly",
        "a_talk 1 3600.040 0.667 no 0.8187",
        "a_talk 1 3600.707 0.667 times 0.8187",
        "a_talk 1 3601.373 0.667 here 0.8187",
    ]


def test_srt():
    assert write("srt") == (
        "1\n00:00:02,200 --> 00:00:03,200\nhello world\n\n2\n01:00:00,040 --> 01:00:02,040\nno times here\n"
    )


def test_json():
    line = write("json")
    assert line.count("\n") == 1
    record = json.loads(line)
    segments = record.pop("segments")
    assert record == {
        "id": "a talk",
        "audio": "talks/a talk.wav",
        "duration": 3661.5,
        "text": "hello world no times here",
        "confidence": round(math.exp(-0.2), 4),
    }
    silence, hello, plain = segments
    assert silence == {"start": 0.0, "end": 2.0, "text": "", "confidence": None, "stopped": None, "words": []}
    assert hello["words"][0] == {"word": "hello", "start": 2.2, "end": 2.48, "confidence": 0.9}
    assert plain == {"start": 3600.04, "end": 3602.04, "text": "no times here", "confidence": 0.8187, "stopped": "end"}


def test_json_has_alternatives_and_what_the_guards_did():
    nbest = (hypothesis(-0.1, -0.3, stopped="loop"), hypothesis(-1.0, -2.0))
    found = Recognition("\u00e4", nbest, ("a a", "b"), fallback="ctc", ctc_text="\u00e4")
    (segment,) = json.loads(write("json", Recording("x", "x.wav", 1.0, [Segment(0, 1.0, found)])))["segments"]
    assert (segment["text"], segment["fallback"], segment["ctc_text"]) == ("\u00e4", "ctc", "\u00e4")
    assert segment["stopped"] == "loop"
    assert segment["nbest"] == [
        {"text": "a a", "score": -0.4, "confidence": 0.8187, "stopped": "loop"},
        {"text": "b", "score": -3.0, "confidence": 0.2231, "stopped": "end"},
    ]
    assert "\u00e4" in write("json", Recording("x", "x.wav", 1.0, [Segment(0, 1.0, found)]))


@pytest.mark.parametrize(
    "format, expected", [("txt", ""), ("ctm", ""), ("srt", ""), ("vtt", "WEBVTT\n"), ("tsv", "start\tend\ttext\n")]
)
def test_nothing_said_is_nothing_written(format, expected):
    assert write(format, Recording("x", "x.wav", 2.0, [Segment(0, 2.0, SILENCE)])) == expected
    assert write(format, Recording("x", "x.wav", 2.0, [])) == expected


def read_srt(text):
    """(start, end, lines) of each cue, as a player reads them; the numbers must count from 1."""
    cues = []
    for number, block in enumerate(text.split("\n\n"), start=1):
        first, times, *lines = block.strip().split("\n")
        assert int(first) == number
        assert re.fullmatch(r"\d\d:[0-5]\d:[0-5]\d,\d{3} --> \d\d:[0-5]\d:[0-5]\d,\d{3}", times)
        start, end = (
            sum(float(part) * unit for part, unit in zip(time.replace(",", ".").split(":"), (3600, 60, 1), strict=True))
            for time in times.split(" --> ")
        )
        cues.append((start, end, lines))
    return cues


def srt_of(text, words, offset=100.0, duration=900.0):
    return read_srt(write("srt", Recording("x", "x.wav", 1e4, [Segment(offset, duration, recognition(text, words))])))


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.4, 2.0])
def test_cues_hold_the_text_and_the_limits(seconds):
    text = " ".join(["a", "considerable", "number", "of", "words"] * 30)
    cues = srt_of(text, evenly(text, seconds))
    assert " ".join(line for _, _, lines in cues for line in lines) == text
    for start, end, lines in cues:
        assert len(lines) <= 2 and max(map(len, lines)) <= 42
        assert 0 < end - start <= 7.0 + 1e-6
    times = [time for start, end, _ in cues for time in (start, end)]
    assert times == sorted(times)
    assert times[0] == 100.0
    if seconds <= 0.1:  # as full as they may be
        assert all(len(" ".join(lines)) > 42 for _, _, lines in cues[:-1])


def test_a_pause_ends_a_cue():
    words = evenly("one two") + evenly("three", start=3.0)
    assert [lines for _, _, lines in srt_of("one two three", words)] == [["one two"], ["three"]]


def test_short_cues_are_shown_until_the_next_one():
    words = (Word("one", 0.0, 0.1, 1.0), Word("two", 1.5, 1.6, 1.0))
    assert [(start, end) for start, end, _ in srt_of("one two", words)] == [(100.0, 101.0), (101.5, 102.5)]


def test_chinese_has_no_spaces_and_wide_columns():
    text = "\u4f60\u597d" * 19 + " hello"
    characters = [*text[:38], "hello"]
    words = tuple(Word(c, 0.1 * i, 0.1 * i + 0.1, 1.0) for i, c in enumerate(characters))
    ((_, _, lines),) = srt_of(text, words)
    assert lines == [text[:21], text[21:]]
    # The same without times.
    assert srt_of(text, None, duration=7.0)[0][2] == lines


def test_a_word_longer_than_a_line_is_broken():
    text = f"one {'a' * 50} two"
    assert [lines for _, _, lines in srt_of(text, evenly(text))] == [["one", "a" * 42], ["a" * 8 + " two"]]


TEXTS = [
    " ".join(["a", "considerable", "number", "of", "words"] * 20),
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002" * 20,
    "\u0f56\u0f7c\u0f51\u0f0b\u0f66\u0f90\u0f51\u0f0b" * 40,  # Tibetan: no spaces, no word ends
    "x" * 500,
    "e\u0301" * 60 + " and more",
    "one",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("duration", [0.3, 3.0, 29.9, 600.0])
@pytest.mark.parametrize("timed", ["no", "evenly", "at once"])
def test_cues_keep_to_the_limits_whatever_the_times(text, duration, timed):
    spans = word_spans(text)
    share = duration / len(spans) if timed == "evenly" else 0.0
    words = tuple(Word(text[a:b], i * share, (i + 1) * share, 1.0) for i, (a, b) in enumerate(spans))
    cues = srt_of(text, None if timed == "no" else words, duration=duration)
    assert "".join("".join(line.split()) for _, _, lines in cues for line in lines) == "".join(text.split())
    for (start, end, lines), (after, *_) in zip(cues, [*cues[1:], (math.inf,)], strict=True):
        assert 0 < end - start <= 7.0 + 2e-3 and end <= after
        assert len(lines) <= 2 and max(map(_columns, lines)) <= 42


def test_a_text_without_word_times_is_shared_out_evenly():
    text = " ".join(["word"] * 60)
    cues = srt_of(text, None, duration=30.0)
    assert [round(start) for start, *_ in cues] == [100, 106, 112, 118, 124]


MARKUP = "a --> b <i>c</i> &amp; AT&T &lt;"


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_text_is_no_markup(format):
    text = write(format, Recording("x", "x.wav", 9.0, [Segment(1.0, 5.0, recognition(MARKUP))]))
    assert text.count("-->") == 1 and "<" not in text
    assert html.unescape(text.splitlines()[-1]) == MARKUP


def test_vtt():
    assert write("vtt") == (
        "WEBVTT\n\n00:00:02.200 --> 00:00:03.200\nhello world\n\n01:00:00.040 --> 01:00:02.040\nno times here\n"
    )


def test_json_is_valid_whatever_the_numbers_and_names():
    name = os.fsdecode(b"caf\xe9")
    nan = recognition("a", (Word("a", 0.0, 0.1, math.nan),))
    bad = Recognition("b", (Hypothesis((1,), (math.nan,), -math.inf, "end"),) * 2, ("b", "\ud800"))
    line = write("json", Recording(name, f"{name}.wav", 2.0, [Segment(0, 1.0, nan), Segment(1.0, 1.0, bad)]))
    line.encode()

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(line, parse_constant=refuse)
    assert record["id"] == "caf\\udce9" and record["confidence"] is None
    one, two = record["segments"]
    assert one["words"][0]["confidence"] is None
    assert two["nbest"][1] == {"text": "\\ud800", "score": None, "confidence": None, "stopped": "end"}
    assert "nan" not in write("ctm", Recording("x", "x.wav", 2.0, [Segment(0, 1.0, nan), Segment(1.0, 1.0, bad)]))


def parsed_textgrid(text):
    """Tiers as {name: [(start, end, text)]}, and the end."""
    tiers = {}
    for tier in text.split('class = "IntervalTier"')[1:]:
        intervals = re.findall(r'xmin = ([\d.]+)\s+xmax = ([\d.]+)\s+text = "((?:[^"]|"")*)"', tier)
        name = re.search(r'name = "(\w+)"', tier)[1]
        tiers[name] = [(float(start), float(end), said.replace('""', '"')) for start, end, said in intervals]
        assert len(intervals) == int(re.search(r"intervals: size = (\d+)", tier)[1])
    return tiers, float(re.search(r"xmax = ([\d.]+)", text)[1])


@pytest.mark.parametrize("seed", range(5))
def test_intervals_of_a_textgrid_follow_one_another(seed):
    rng = random.Random(seed)
    starts = sorted(rng.uniform(0, 9) for _ in range(20))
    words = [Word(f'w"{i}', start, start + rng.choice([0.0, 0.2, 2.0]), 0.5) for i, start in enumerate(starts)]
    text = " ".join(word.text for word in words)
    found = Recognition(text, (Hypothesis((1,), (-1.0,), 0.0, "end"),), (text,), words=tuple(words))
    tiers, end = parsed_textgrid(FORMATS["TextGrid"](Recording("a", "a.wav", 10.0, [Segment(0.0, 9.5, found)])))
    assert [said for *_, said in tiers["words"] if said] == [word.text for word in words]
    assert [said for *_, said in tiers["segments"] if said] == [text]
    for intervals in tiers.values():
        assert intervals[0][0] == 0 and intervals[-1][1] == end >= 10.0
        assert all(start < until for start, until, _ in intervals)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(intervals))


def test_a_textgrid_of_silence_is_one_empty_interval():
    tiers, end = parsed_textgrid(FORMATS["TextGrid"](Recording("a", "a.wav", 2.5, [])))
    assert tiers == {"segments": [(0.0, 2.5, "")]} and end == 2.5
