"""B-WER and U-WER divide the errors; hotwords that are not said are counted where they are written."""

import json
import random

import pytest

from speechllm.scoring import Transcript, score
from speechllm.scoring.command import score_files
from speechllm.scoring.hotwords import hotword_report


def given(ref, hyp, *hotwords):
    return Transcript("a", ref, hyp, hotwords=hotwords)


def test_each_error_is_of_the_list_or_of_the_rest():
    report = hotword_report([given("call anna now", "call hannah right now", "anna", "right turn")])
    assert (report.listed.substitutions, report.listed.insertions, report.listed.ref_len) == (1, 1, 1)
    assert (report.others.errors, report.others.ref_len) == (0, 2)
    assert (report.absent, report.written) == (1, 0)  # "right" alone is not the phrase


@pytest.mark.parametrize("seed", range(5))
def test_both_parts_together_are_all_errors(seed):
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(["a", "b", "c", "d", "e", "f"], k=rng.randrange(8)))  # noqa: E731
    results = [given(text(), text(), "a", "b c") for _ in range(50)]
    report = hotword_report(results)
    assert report.listed + report.others == score(results)


def test_what_is_written_in_silence_is_counted():
    report = hotword_report([given("", "anna", "anna", "bob"), given("", "", "anna"), given("bob", "bob anna", "anna")])
    assert (report.written, report.absent) == (2, 4)
    assert (report.written_in_silence, report.silent) == (1, 2)


def test_utterances_without_a_list_do_not_count():
    assert hotword_report([Transcript("a", "one", "two")]) is None
    assert hotword_report([Transcript("a", "one", "two"), given("one", "one")]).others.ref_len == 1


def test_score_reads_hotwords_of_the_manifest_and_of_a_file(tmp_path):
    line = {"id": "a", "audio_filepath": "a.wav", "duration": 1.0, "text": "call anna", "pred_text": "call hannah"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    assert "B-WER" not in score_files(tmp_path / "a.jsonl")
    (tmp_path / "hotwords.txt").write_text("Anna\n\nBob\n")
    text = score_files(tmp_path / "a.jsonl", hotwords=tmp_path / "hotwords.txt", text_steps=["lowercase"])
    assert "B-WER 100.00% [1 / 1, 0 ins, 0 del, 1 sub ]" in text and "not said: 0 of 1;" in text
    (tmp_path / "a.jsonl").write_text(json.dumps(line | {"hotwords": ["ANNA"]}) + "\n")
    assert "B-WER 100.00%" in score_files(tmp_path / "a.jsonl", text_steps=["lowercase"])
