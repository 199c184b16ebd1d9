"""The same transcripts in every form that `speechllm score` reads, and what is wrong by file and line."""

import gzip
import json

import pytest

from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.errors import UserError
from speechllm.scoring.command import score_files
from speechllm.scoring.reading import read_lines, read_pair
from speechllm.transcribe.formats import FORMATS, Recording, Segment

REFS = {"utt1": "hello big world", "utt2": "don't stop", "utt3": ""}
HYPS = {"utt1": "hello world", "utt2": "don't stop it", "utt3": ""}


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def texts(lines):
    return {id: line.text for id, line in lines.items()}


def trn(said):
    return ";; a comment\n" + "".join(f"{text} ({id})\n" for id, text in said.items())


def csv(said):
    return "id,text\n" + "".join(f'{id},"{text}"\n' for id, text in said.items())


def tsv(said):
    return "path\tsentence\tage\n" + "".join(f"clips/{id}.mp3\t{text}\t\n" for id, text in said.items())


def kaldi(said):
    return "".join(f"{id} {text}\n" for id, text in said.items())


def json_lines(said):
    return "".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in said.items())


def json_array(said):
    return json.dumps([{"id": id, "text": text} for id, text in said.items()], indent=1)


FORMS = {
    "a.trn": trn,
    "a.csv": csv,
    "a.tsv": tsv,
    "a.txt": kaldi,
    "text": kaldi,
    "a.jsonl": json_lines,
    "a.json": json_array,
}


@pytest.mark.parametrize("ref_form", FORMS)
@pytest.mark.parametrize("hyp_form", FORMS)
def test_any_form_against_any_other(ref_form, hyp_form, tmp_path):
    ref = write(tmp_path / "ref" / ref_form, FORMS[ref_form](REFS))
    hyp = write(tmp_path / "hyp" / hyp_form, FORMS[hyp_form](HYPS))
    refs, hyps = read_pair(ref, hyp)
    assert texts(refs) == REFS and texts(hyps) == HYPS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_and_ends_of_lines(encoding, newline, tmp_path):
    for form in ("a.trn", "a.csv", "a.txt"):
        path = write(tmp_path / form, FORMS[form](REFS | {"utt2": "été 你好"}).replace("\n", newline), encoding)
        assert texts(read_lines(path))["utt2"] == "été 你好"
    packed = tmp_path / "b.trn.gz"
    packed.write_bytes(gzip.compress(trn(REFS).encode()))
    assert texts(read_lines(packed)) == REFS


def test_plain_texts_are_compared_line_by_line(tmp_path):
    ref = write(tmp_path / "ref.txt", "the cat sat\n\nthe dog ran\nit is 3.5\n")
    hyp = write(tmp_path / "hyp.txt", "the cat\n\nthe dog ran off\nit is 3.5\n")
    assert score_files(ref, hyp).splitlines()[-2].split()[1:4] == ["4", "9", "22.22%"]
    for refs, hyps in (
        ("hello world\n", "hello word\n"),
        ("3 5 7\n7 1 1\n", "3 5 7\n7 1 1\n"),
        ("a b\nc d\n", "a b\nc\n"),
    ):
        read, _ = read_pair(write(tmp_path / "r.txt", refs), write(tmp_path / "h.txt", hyps))
        assert [line.text for line in read.values()] == refs.splitlines()
    with pytest.raises(UserError, match=r"ref.txt has 4 lines, .*short.txt 2: .*line by line; give .* id"):
        score_files(ref, write(tmp_path / "short.txt", "the cat\nthe dog\n"))


def test_both_sides_in_one_table(tmp_path):
    path = write(tmp_path / "both.csv", 'reference;hypothesis\n"a; b";a\nc;c\n')
    assert score_files(path).splitlines()[-2].split()[1:4] == ["2", "3", "66.67%"]


def recording(id, *segments):
    """Of (offset, duration, text)."""
    parts = []
    for offset, duration, text in segments:
        each = duration / max(1, len(text.split()))
        words = tuple(Word(w, i * each, (i + 1) * each, 0.9) for i, w in enumerate(text.split()))
        recognition = Recognition(text, [Hypothesis((1,), (-0.1,), -0.1, None)], texts=[text], words=words)
        parts.append(Segment(offset, duration, recognition))
    return Recording(id, f"{id}.wav", 10.0, parts)


@pytest.mark.parametrize("form", FORMATS)
def test_all_that_transcribe_writes(form, tmp_path):
    spoken = {"talk1": "so it begins <now> & here", "day/talk2": "the end"}
    found = {
        "talk1": recording("talk1", (0.5, 2.0, "so it begins"), (4.0, 1.0, "<now> & here")),
        "day/talk2": recording("day/talk2", (0.0, 1.0, "the end")),
    }
    for id, one in found.items():
        write(tmp_path / "out" / f"{id}.{form}", FORMATS[form](one))
    for name in (".transcribed.jsonl", ".transcribed.1.jsonl"):  # what is known of them
        write(tmp_path / "out" / name, '{"file": "talk1.txt", "audio": "talk1.wav"}\n')
    assert texts(read_lines(tmp_path / "out")) == spoken
    # one recording, whatever its name, against a plain text of any lines
    lines = "so it begins <now> & here\n" if form == "txt" else "so it\nbegins <now>\n& here\n"
    refs, hyps = read_pair(write(tmp_path / "reference.txt", lines), tmp_path / "out" / f"talk1.{form}")
    assert list(texts(refs).values()) == list(texts(hyps).values()) == [spoken["talk1"]]
    assert refs.keys() == hyps.keys()


def test_subtitles_of_others(tmp_path):
    vtt = (
        "WEBVTT - a talk\n\nNOTE made by hand\n\nintro\n00:01.000 --> 00:02.000 align:start\n<v Ann>Hello <i>you</i>\n"
    )
    vtt += "and you\n\n00:00:02.500 --> 00:00:03.000\nR&amp;D\n"
    assert texts(read_lines(write(tmp_path / "a.vtt", vtt))) == {"a": "Hello you and you R&D"}
    srt = "1\r\n00:00:01,000 --> 00:00:02,000\r\n12 men\r\n\r\n2\r\n00:00:02,000 --> 00:00:03,000\r\n3\r\n"
    assert texts(read_lines(write(tmp_path / "b.srt", srt))) == {"b": "12 men 3"}


STM = """;; segments
talk 1 ann 0.0 2.0 <o,f0,female> hello big world
talk 1 bob 2.0 4.0 <o,f0,male> don't stop
talk 1 none 4.0 6.0 IGNORE_TIME_SEGMENT_IN_SCORING
talk 2 cid 0.0 6.0 <o,f0,male> another channel
"""
CTM = """;; words
talk 1 0.2 0.5 hello 0.9
talk 1 2.1 0.2 don't
talk 1 1.0 0.5 world 0.8
talk 1 2.5 0.2 stop 1.0
talk 1 3.0 0.4 it 1.0
talk 1 4.5 0.4 nonsense 1.0
talk 2 9.0 1.0 channel 1.0
"""


def test_words_go_to_segments_by_their_times(tmp_path):
    stm, ctm = write(tmp_path / "ref.stm", STM), write(tmp_path / "hyp.ctm", CTM)
    refs, hyps = read_pair(stm, ctm)
    assert [line.text for line in refs.values()] == ["hello big world", "don't stop", "another channel"]
    assert [hyps[id].text for id in refs] == ["hello world", "don't stop it", "channel"]
    assert [line.speaker for line in refs.values()] == ["ann", "bob", "cid"]
    text = score_files(stm, ctm, by="speaker")
    assert text.splitlines()[-2].split()[1:4] == ["3", "7", "42.86%"]
    with pytest.raises(UserError, match=r"hyp.ctm: 1 recordings that the references have no segment of: other"):
        score_files(stm, write(tmp_path / "hyp.ctm", CTM + "other 1 0.0 1.0 word\n"))
    whole = "".join(line for line in STM.splitlines(True) if "IGNORE" not in line and " 2 cid" not in line)
    whole = write(tmp_path / "whole.stm", whole)
    assert score_files(whole, write(tmp_path / "talk.txt", "hello big world\ndon't stop\n")).count("0.00%")


def test_ctm_against_texts(tmp_path):
    ctm = write(tmp_path / "hyp.ctm", "utt1 A 0.0 0.5 hello\nutt1 A 1.0 0.5 world\nutt2 A 0.0 1.0 stop\n")
    _, hyps = read_pair(write(tmp_path / "ref.trn", trn(REFS)), ctm)
    assert texts(hyps) == {"utt1": "hello world", "utt2": "stop"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.trn", "words (u1)\nno id\n", r"a.trn:2: expected words and an id in parentheses"),
        ("a.trn", "a (u1)\nb (u1)\n", r"a.trn:2: the id u1 is there for the second time"),
        ("a.trn", "{ uh / @ } yes (u1)\n", r"a.trn:1: alternatives"),
        ("a.ctm", "u1 1 0.0 0.5 a\nu1 1 x 0.5 b\n", r"a.ctm:2: expected RECORDING CHANNEL START DURATION WORD"),
        ("a.ctm", "u1 1 0.0 0.5 a\nu1 1 nan 0.5 b\n", r"a.ctm:2: expected RECORDING"),
        ("a.ctm", "u1 1 0.0\n", r"a.ctm:1: expected RECORDING"),
        ("a.stm", "u1 1 ann 0.0\n", r"a.stm:1: expected RECORDING CHANNEL SPEAKER START END"),
        ("a.srt", "hello\nworld\n", r"a.srt:1: no times of a cue"),
        ("a.csv", "name,age\nann,3\n", r"a.csv:1: no column of texts among name, age; .*text, reference"),
        ("a.csv", "id,text\na,b\nc,d,e\n", r"a.csv:3: 3 columns, the header has 2"),
        ("a.csv", 'id,text\na,"b\n', r"a.csv:2: not a table"),
        ("a.json", '[{"id": "a", "text": "x"}, 3]', r"a.json: object 2: expected a JSON object"),
        ("a.json", '[{"id": "a"', r"a.json: not JSON"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(name, text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_lines(write(tmp_path / name, text))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.trn").write_bytes(b"a (u1)\n\xff\xfe\xfa (u2)\n")
    with pytest.raises(UserError, match=r"a.trn:2: not UTF-8"):
        read_lines(tmp_path / "a.trn")
