"""The table that compares recognizers: all results are normalized alike. The recognizers are stood in for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm.errors import UserError

RECIPE = Path(__file__).parents[2] / "recipes" / "english"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPE))
    import baselines
    from english_text import EnglishText


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionary") / "words.dict"
    path.write_text("the X\nof X\nyou X\n")
    return EnglishText.load(path)


@pytest.fixture
def data(tmp_path):
    """Two utterances in `test`, one in `other`; the sound is as long as the place of the utterance."""
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    for name, texts in {"test": ["i'm going to go", "nineteen forty seven"], "other": ["okay"]}.items():
        lines = []
        for i, said in enumerate(texts, start=1):
            soundfile.write(tmp_path / "data" / "corpus" / f"{name}-{i}.wav", np.zeros(i * 1000), 16000)
            lines.append({"audio_filepath": f"{name}-{i}.wav", "duration": i / 16, "text": said, "lang": "en"})
        (tmp_path / "data" / "corpus" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """Runs the program with a recognizer that writes by the length of the audio; what it printed."""

    def recognizer(utterances):
        for samples in utterances:
            assert samples.dtype == np.float32
            yield {1000: "I'm gonna go.", 2000: "In 1947!"}[len(samples)]

    def run(*args):
        monkeypatch.setattr(baselines, "pocketsphinx", recognizer)
        options = ["--data-dir", data, "--output-dir", tmp_path / "exp", "--systems", "pocketsphinx"]
        words = tmp_path / "words.dict"
        words.write_text("the X\nof X\nyou X\n")
        monkeypatch.setattr(sys, "argv", ["baselines.py", *map(str, [*options, "--dictionary", words, *args])])
        baselines.main()
        return capsys.readouterr().out

    return run


def rows(printed: str) -> dict[str, list[str]]:
    return {Path(line.split()[0]).name: line.split()[1:] for line in printed.splitlines()[1:]}


def test_table(run, tmp_path):
    found = rows(run())
    # one insertion in 7 words; "okay" is "i'm going to go" in the stand-in's ears
    assert found["recogs-test-pocketsphinx.txt"] == ["2", "7", "1", "0", "0", "14.29"]
    assert found["recogs-other-pocketsphinx.txt"] == ["1", "1", "3", "0", "1", "400.00"]
    assert (tmp_path / "exp" / "pocketsphinx" / "errs-test-pocketsphinx.txt").is_file()


def test_what_is_there_is_not_done_again(run, monkeypatch, tmp_path):
    first = run()
    monkeypatch.setattr(baselines, "recognize", None)
    assert run() == first


def test_results_of_other_recognizers(run, tmp_path):
    recogs = tmp_path / "recogs-test-mine.txt"
    recogs.write_text("a:\tref=['i', 'am', 'gonna']\na:\thyp=['i', 'am', 'going', 'to']\n")
    assert rows(run(recogs))["recogs-test-mine.txt"] == ["1", "4", "0", "0", "0", "0.00"]
    recogs.write_text("a:\tref=['i', 'am']\n")
    with pytest.raises(SystemExit, match="recogs-test-mine.txt: does not have reference and hypothesis"):
        run(recogs)


def test_mistakes(run, data):
    with pytest.raises(SystemExit, match="there is no kaldi; there are whisper, pocketsphinx"):
        run("--systems", "kaldi")
    with pytest.raises(UserError, match="encoder: no Whisper with decoder and tokenizer"):
        baselines.whisper(data / "encoder")
