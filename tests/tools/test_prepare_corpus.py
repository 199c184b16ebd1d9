"""Corpora as distributed become lhotse cuts."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

PROGRAM = Path(__file__).parents[2] / "tools" / "prepare_corpus.py"
TEXTS = {"1-2-0000": "HELLO WORLD", "1-2-0001": "A SHORT ONE", "1-3-0000": "GOOD BYE"}


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr()

    return run


def write_librispeech(corpus_dir, part):
    for utterance, text in TEXTS.items():
        speaker, chapter, _ = utterance.split("-")
        folder = corpus_dir / part / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{utterance}.flac", 0.1 * np.ones(1600 * len(text)), 16000)
        with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as file:
            file.write(f"{utterance} {text}\n")


def write_aishell(corpus_dir, utterances):
    data = corpus_dir / "data_aishell"
    for part in ("train", "dev", "test"):
        (data / "wav" / part / "S0001").mkdir(parents=True)
        for utterance in utterances:
            soundfile.write(data / "wav" / part / "S0001" / f"{part}{utterance}.wav", np.zeros(1600), 16000)
    (data / "transcript").mkdir()
    lines = "".join(f"{part}{i} 再 见\n" for part in ("train", "dev", "test") for i in utterances)
    (data / "transcript" / "aishell_transcript_v0.8.txt").write_text(lines, encoding="utf-8")


def test_librispeech(prepare, tmp_path):
    write_librispeech(tmp_path / "LibriSpeech", "dev-clean")
    output = prepare("manifests", "librispeech", tmp_path / "LibriSpeech", tmp_path / "out", "--parts", "dev-clean")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["librispeech_cuts_dev-clean.jsonl.gz"]
    assert "3 utterances" in output.out
    cuts = list(CutSet.from_file(tmp_path / "out" / "librispeech_cuts_dev-clean.jsonl.gz"))
    assert {cut.id: cut.supervisions[0].text for cut in cuts} == TEXTS
    assert [cut.id for cut in cuts] == sorted(TEXTS)
    for cut in cuts:
        assert cut.supervisions[0].language == "en" and Path(cut.recording.sources[0].source).is_absolute()
        assert cut.load_audio().shape == (1, 1600 * len(TEXTS[cut.id]))


def test_the_same_corpus_gives_the_same_bytes(prepare, tmp_path):
    write_aishell(tmp_path, range(5))
    for name in ("one", "two"):
        prepare("manifests", "aishell", tmp_path, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 3
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_what_is_wrong_with_a_corpus(prepare, tmp_path):
    def said(*args):
        with pytest.raises(SystemExit) as stopped:
            prepare("manifests", *args, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(stopped.value)

    corpus_dir = tmp_path / "corpus"
    assert "aishell_transcript_v0.8.txt: no such file" in said("aishell", corpus_dir)
    assert "no dev-clean, dev-other" in said("librispeech", corpus_dir)
    write_aishell(corpus_dir, range(2))
    wav = corpus_dir / "data_aishell" / "wav"
    (wav / "train" / "S0001" / "train1.wav").write_text("no audio")
    assert "lhotse cannot prepare it" in (message := said("aishell", corpus_dir)) and "train1.wav" in message
    for file in (wav / "train" / "S0001").iterdir():
        file.unlink()
    assert "No recordings left" in said("aishell", corpus_dir)
    (wav / "train" / "S0001").rmdir()
    (wav / "train").rmdir()
    assert "no train in it" in said("aishell", corpus_dir)
    (wav / "S0002.tar.gz").touch()
    assert "unpack each *.tar.gz" in said("aishell", corpus_dir)


def test_unknown_parts(prepare, capsys):
    with pytest.raises(SystemExit):
        prepare("download", "librispeech", "corpora", "--parts", "dev-clena")
    assert "--parts dev-clena: librispeech has dev-clean" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ConnectionError("network is down"), EOFError("archive cut short")])
def test_a_download_that_fails(prepare, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("lhotse.recipes.download_librispeech", fail)
    with pytest.raises(SystemExit) as stopped:
        prepare("download", "librispeech", tmp_path, "--parts", "dev-clean")
    assert str(error) in str(stopped.value) and "--corpus-dir" in str(stopped.value)
