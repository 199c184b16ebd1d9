"""Forced alignment finds words where they are said, in recordings of any length, and says them as they were given."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from speechllm.cli.main import main
from speechllm.errors import UserError
from speechllm.text.tokenizer import load_tokenizer
from speechllm.transcribe.align import Aligner
from speechllm.transcribe.inputs import audio_input
from speechllm.transcribe.segments import SegmentOptions
from tests.data.conftest import write_manifest
from tests.transcribe.conftest import RATE, TONES, Listener, melody, random_words


class Hears(nn.Module):
    """A CTC model of tones, each of which is a word of one phone; its frames have 40 ms."""

    frame_seconds, min_frames, feature_kind, device = 0.04, 4, "fbank", torch.device("cpu")

    def __init__(self, folder):
        super().__init__()
        (folder / "lexicon.txt").write_text("".join(f"{name} {name.upper()}\n" for name in TONES))
        self.ctc_tokenizer = load_tokenizer(folder)
        self.blank_id = self.ctc_tokenizer.vocab_size
        self.bins = {Listener._bin(TONES[name]): self.ctc_tokenizer.encode(name)[0] for name in TONES}
        self.ctc_head = nn.Identity()
        self.calls = 0

    def encode(self, features, lens):
        self.calls += 1
        scores = torch.zeros(len(features), features.shape[1] // 4, self.blank_id + 1)
        for row, frames in enumerate(features[:, : scores.shape[1] * 4 : 4]):
            for i, frame in enumerate(frames):
                heard = self.bins.get(int(frame.argmax())) if frame.max() > -3 else None
                scores[row, i, self.blank_id if heard is None else heard] = 10.0
        return scores, lens // 4

    def ctc_label_ids(self, text):
        return self.ctc_tokenizer.encode(text)


@pytest.fixture
def hears(tmp_path):
    return Hears(tmp_path)


def given(samples, text):
    return dataclasses.replace(audio_input(samples, "a"), text=text)


@pytest.mark.parametrize("max_seconds", [5.0, 30.0])
def test_words_are_where_they_are_said(hears, max_seconds):
    words = random_words(80, seed=3)
    samples = np.concatenate([np.zeros(3 * RATE, np.float32), melody(words, 0.3), np.zeros(4 * RATE, np.float32)])
    options = SegmentOptions(batch_seconds=2 * max_seconds, max_seconds=max_seconds)
    found = Aligner(hears, (), options).align(given(samples, "\n".join(words)))
    assert hears.calls > 1
    (segment,) = found.segments
    assert found.duration == pytest.approx(len(samples) / RATE)
    assert [word.text for word in segment.words] == words
    for i, word in enumerate(segment.words):
        start = 3 + 0.7 * i
        assert word.start == pytest.approx(start, abs=0.13) and word.end <= start + 0.8
        assert word.confidence > 0.5


def test_words_stand_as_they_are_given(hears):
    text = "\u2014 Do, re! \u2014 MI (fa)"
    aligner = Aligner(hears, ("lowercase", "remove_punctuation"))
    (segment,) = aligner.align(given(melody(["do", "re", "mi", "fa"], 0.2), text)).segments
    assert segment.text == text
    assert [word.text for word in segment.words] == ["\u2014", "Do,", "re! \u2014", "MI", "(fa)"]
    times = [time for word in segment.words for time in (word.start, word.end)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        (["do"], " \n", "has no text to align"),
        (["do"], "do re mi fa sol la ti " * 5, "does not go into 0.50 s of audio"),
        ([], "do", "nothing is said in it"),
        (["do"], "--", "leave nothing of its text"),
    ],
)
def test_what_cannot_be_aligned_says_why(hears, words, text, message):
    samples = melody(words, 0.1) if words else np.zeros(RATE, np.float32)
    with pytest.raises(UserError, match=message):
        Aligner(hears, ("remove_punctuation",)).align(given(samples, text))


def test_a_model_without_a_ctc_head_is_refused(hears):
    hears.ctc_head = None
    with pytest.raises(UserError, match="no CTC head"):
        Aligner(hears)


def test_words_that_a_model_has_no_pieces_for_are_named(hears):
    encode = hears.ctc_label_ids
    hears.ctc_label_ids = lambda text: encode(" ".join(word for word in text.split() if word != "mi"))
    with pytest.raises(UserError, match="cannot write 'mi'"):
        Aligner(hears).align(given(melody(["do", "mi"], 0.5), "do mi"))


def ran(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(["align", *map(str, arguments)])
    return caught.value.code


def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    samples = melody(["do", "re", "mi", "do", "re"], 0.5)
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    (tmp_path / "a.txt").write_text("One two,\nthree.\n")
    steps = ["--normalize", "lowercase", "remove_punctuation"]
    arguments = [tmp_path / "a.wav", tmp_path / "a.txt", "--model", tmp_path / "model", *steps]
    assert ran(*arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[4] for line in lines] == ["One", "two,", "three."] and {line[0] for line in lines} == {"a"}
    assert ran(*arguments, "--format", "srt") == 0
    assert "One two, three." in capsys.readouterr().out

    line = {"id": "x", "audio_filepath": "a.wav", "duration": len(samples) / RATE, "text": "one two"}
    manifest = write_manifest(
        tmp_path / "m.jsonl", [line, {**line, "id": "y", "text": "tres"}, {**line, "id": "z", "text": ""}]
    )
    to_files = [manifest, "--model", tmp_path / "model", "--format", "json", "--output", tmp_path / "out"]
    assert ran(*to_files) == 1
    assert "z: has no text to align" in capsys.readouterr().err
    (found,) = map(json.loads, (tmp_path / "out" / "y.json").read_text().splitlines())
    assert [word["word"] for word in found["segments"][0]["words"]] == ["tres"]
    assert ran(*to_files) == 1
    assert "2 of 3 were done before" in capsys.readouterr().err
    write_manifest(manifest, [{**line, "text": "one two three"}])
    assert ran(*to_files) == 0  # another text: made again
    assert "done before" not in capsys.readouterr().err

    assert ran(tmp_path / "a.wav", "--model", tmp_path / "model") == 1
    assert "name the text file after it" in capsys.readouterr().err
    assert ran(manifest, tmp_path / "a.txt", "--model", tmp_path / "model") == 1
    assert "leave" in capsys.readouterr().err
