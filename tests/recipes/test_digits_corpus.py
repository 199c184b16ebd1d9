"""The digits corpus, made of synthetic "recordings": no network, no packages."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

SCRIPT = Path(__file__).parents[2] / "recipes/digits/prepare_corpus.py"
spec = importlib.util.spec_from_file_location("prepare_corpus", SCRIPT)
prepare_corpus = importlib.util.module_from_spec(spec)
sys.modules["prepare_corpus"] = prepare_corpus
spec.loader.exec_module(prepare_corpus)

SMALL = ["--strings-per-language", "35", "--valid-per-language", "6", "--test-per-language", "12"]
SMALL += ["--noise-seconds", "30"]


def write_voice(folder: Path, rate: int = 16000) -> None:
    """Ten tones of 0.2 s between silences of 0.15 s."""
    (folder / "digits").mkdir(parents=True)
    for digit in range(10):
        time = np.arange(int(0.2 * rate)) / rate
        tone = 0.3 * np.sin(2 * np.pi * (300 + 100 * digit) * time)
        silence = np.zeros(int(0.15 * rate))
        soundfile.write(folder / "digits" / f"{digit}.wav", np.concatenate([silence, tone, silence]), rate)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for lang in ("en", "es", "fr", "it"):
        write_voice(folder / lang)
    # a package as dpkg-deb unpacks it, and a second speaker at another rate
    write_voice(folder / "pkg/usr/share/asterisk/sounds/ru_RU_f_IvrvoiceRU")
    write_voice(folder / "other/es", rate=8000)
    return folder


@pytest.fixture(scope="module")
def corpus(sounds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert prepare_corpus.main(["--sounds-dir", str(sounds), "--output-dir", str(folder), *SMALL]) == 0
    return folder


def read(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def digits_of(line: dict) -> str:
    words = prepare_corpus.WORDS[line["lang"]].split()
    return "".join(str(words.index(word)) for word in line["text"].split())


def test_manifests_describe_the_audio(corpus):
    names = {path.stem for path in corpus.glob("*.jsonl")}
    langs = ["en", "es", "fr", "it", "ru"]
    expected = {f"{split}-{lang}" for split in ("train", "valid", "test") for lang in langs}
    seen, unseen = prepare_corpus.PAIRS, prepare_corpus.UNSEEN_PAIRS
    translated = {f"{split}-ast-{a}-{b}" for split in ("train", "valid", "test") for a, b in seen}
    translated |= {f"test-ast-{a}-{b}" for a, b in unseen}
    assert names == expected | translated | {"test_other-es", "noise"}
    assert len({*seen, *unseen}) == 15 and all(a != b for a, b in seen + unseen)
    for name in names:
        for line in read(corpus, name):
            info = soundfile.info(corpus / line["audio_filepath"])
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
            assert info.frames / 16000 == line["duration"]
            assert np.abs(soundfile.read(corpus / line["audio_filepath"])[0]).max() < 0.999
    line = read(corpus, "train-fr")[6]
    assert len(line["text"].split()) == 7
    # seven tones of 0.2 s with margins, pauses, and silence at the ends, not the 0.5 s of the files
    assert 7 * 0.2 < line["duration"] < 7 * 0.29 + 6 * 0.35 + 0.6


def test_words_are_where_the_tones_are(corpus):
    for line in read(corpus, "test-es"):
        samples, rate = soundfile.read(corpus / line["audio_filepath"])
        is_loud = np.convolve(np.abs(samples), np.ones(160) / 160, "same") > 0.005
        said = np.zeros(len(samples), dtype=bool)
        for _, start, duration in line["alignment"]["word"]:
            said[round(start * rate) : round((start + duration) * rate)] = True
        assert [word for word, *_ in line["alignment"]["word"]] == line["text"].split()
        assert is_loud[said].mean() > 0.6 and not is_loud[~said].any()


def test_translations_say_the_same_digits(corpus):
    for split, a, b in [("train", "en", "es"), ("valid", "ru", "en"), ("test", "en", "it")]:
        lines, sources = read(corpus, f"{split}-ast-{a}-{b}"), read(corpus, f"{split}-{a}")
        for line, source in zip(lines, sources, strict=True):
            assert (line["task"], line["lang"], line["target_lang"]) == ("ast", a, b)
            assert line.items() > source.items()
            assert digits_of({"text": line["ast_text"], "lang": b}) == digits_of(source)
    ids = [line["id"] for pair in ("es", "fr") for line in read(corpus, f"test-ast-en-{pair}")]
    assert len(set(ids)) == len(ids)


def test_held_out_strings_are_in_no_training_set(corpus):
    train, held_out = set(), set()
    for lang in prepare_corpus.WORDS:
        train |= {digits_of(line) for line in read(corpus, f"train-{lang}")}
        test = [digits_of(line) for line in read(corpus, f"test-{lang}")]
        valid = [digits_of(line) for line in read(corpus, f"valid-{lang}")]
        assert len({*test, *valid}) == len(test) + len(valid) == 18
        assert all(2 <= len(string) <= 7 for string in test + valid)
        held_out |= {*test, *valid}
    assert not train & held_out
    # the other speaker says the same strings
    assert [digits_of(line) for line in read(corpus, "test_other-es")] == test


def test_default_sizes_hold_out_strings_too():
    settings = prepare_corpus.CorpusSettings()
    valid, test = prepare_corpus.held_out_strings(settings)
    for lang in prepare_corpus.WORDS:
        train = prepare_corpus.training_strings(settings, lang, {*valid, *test})
        assert not {*train} & {*valid, *test}
        counts = np.bincount([len(string) for string in train])[1:]
        assert len(counts) == 7 and counts.max() - counts.min() <= 1
        assert {*"0123456789"} <= {*train}


def test_same_seed_same_corpus_and_finished_is_kept(corpus, sounds, tmp_path, capsys):
    again = tmp_path / "again"
    arguments = ["--sounds-dir", str(sounds), "--output-dir", str(again), *SMALL]
    assert prepare_corpus.main(arguments) == 0
    files = [path.relative_to(corpus) for path in sorted(corpus.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(again) for path in sorted(again.rglob("*")) if path.is_file()]
    assert all((corpus / file).read_bytes() == (again / file).read_bytes() for file in files)
    before = (again / "corpus.json").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare_corpus.main(arguments) == 0
    assert "kept" in capsys.readouterr().out
    assert (again / "corpus.json").stat().st_mtime_ns == before
    assert prepare_corpus.main([*arguments, "--seed", "1"]) == 0
    assert (again / "train-en.jsonl").read_bytes() != (corpus / "train-en.jsonl").read_bytes()


def fails(capsys, output: Path, *arguments: str) -> str:
    """The two lines of the error; nothing may be left behind."""
    before = sorted(output.parent.iterdir())
    assert prepare_corpus.main(["--output-dir", str(output), *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("prepare_corpus: error: ")
    assert sorted(output.parent.iterdir()) == before
    return "\n".join(lines)


def test_missing_recordings(sounds, tmp_path, capsys):
    write_voice(tmp_path / "sounds/en")
    output = tmp_path / "digits"
    message = fails(capsys, output, "--sounds-dir", str(tmp_path / "sounds"))
    assert "no recordings of 'es'" in message and "es/digits/0.*" in message
    (tmp_path / "sounds/en/digits/7.wav").unlink()
    message = fails(capsys, output, "--sounds-dir", str(tmp_path / "sounds"))
    assert "no recording of 7" in message and "Add 7.wav" in message
    for lang in ("es", "fr", "it", "ru"):
        write_voice(tmp_path / "sounds" / lang)
    (tmp_path / "sounds/en/digits/7.wav").write_text("this is no audio")
    assert "cannot decode" in fails(capsys, output, "--sounds-dir", str(tmp_path / "sounds"))
    assert "no such folder" in fails(capsys, output, "--sounds-dir", str(tmp_path / "nowhere"))


def test_foreign_output_folder_is_left_alone(sounds, tmp_path, capsys):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    assert "not a digits corpus" in fails(capsys, output, "--sounds-dir", str(sounds))
    assert (output / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("E: Unable to locate package asterisk-core-sounds-en-g722", "apt-get update"),
        ("E: Failed to fetch http://x  Temporary failure resolving 'deb.debian.org'", "Check the network"),
        ("E: disk on fire", "disk on fire"),
    ],
)
def test_download_failures(stderr, expected, tmp_path, capsys, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("apt-get", "dpkg-deb"):
        (tools / tool).write_text(f'#!/bin/sh\necho "{stderr}" >&2\nexit 100\n')
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert expected in fails(capsys, tmp_path / "data")


def test_no_package_tools(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = fails(capsys, tmp_path / "data")
    assert "apt-get is not installed" in message and "--sounds-dir" in message
