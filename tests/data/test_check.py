"""`speechllm data check`: what it counts, what it finds, where, and with which exit status."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from lhotse import CutSet, Mfcc, NumpyFilesWriter, Recording, Spectrogram

from speechllm.cli.main import main
from speechllm.config import ConfigError, to_dict
from speechllm.data import SourceConfig
from speechllm.data.check import PROBLEMS_SHOWN, CheckOptions, check_manifests
from speechllm.data.features import fbank_extractor
from speechllm.text.tokenizer import load_tokenizer
from speechllm.train.config import load_experiment

from .conftest import write_manifest, write_tone
from .corpora import KINDS, write_corpus, write_kind


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", *map(str, arguments)])
    return caught.value.code


def found(report) -> set[tuple[str, str]]:
    """(kind, FILE:LINE without the folder) of every problem."""
    return {(p.kind, p.location.rsplit("/", 1)[-1]) for problems in report.problems.values() for p in problems}


@pytest.mark.parametrize("audio", ["none", "header", "full"])
def test_a_good_corpus_is_counted_and_has_no_problem(corpus, audio, tokenizer_dir):
    paths = [corpus / "a.jsonl", corpus / "b.jsonl"]
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    seconds = [line["duration"] for line in lines]
    tokenizer = load_tokenizer(tokenizer_dir)
    options = CheckOptions(audio=audio, tokenizer=tokenizer, jobs=2)
    report = check_manifests([SourceConfig(str(path)) for path in paths], options)
    assert not report.problem_counts
    assert [(s.lines, s.utterances) for s in report.sources] == [(60, 60), (20, 20)]
    assert report.seconds == pytest.approx(sum(seconds))
    assert report.languages == {"en": 60, "unknown": 20}
    assert report.tasks == {"asr": 80}
    rates = [len(tokenizer.encode(line["text"])) / line["duration"] for line in lines]
    for distribution, expected in ((report.durations, seconds), (report.tokens_per_second, rates)):
        assert list(distribution.values) == pytest.approx(expected, rel=1e-6)
        assert distribution.percentiles()[99] == pytest.approx(np.percentile(expected, 99), rel=1e-6)
        for (value, location), i in ((distribution.lowest[0], np.argmin), (distribution.highest[-1], np.argmax)):
            assert value == expected[i(expected)]
            manifest, line = (corpus / "a.jsonl", i(expected) + 1) if i(expected) < 60 else (paths[1], i(expected) - 59)
            assert location == f"{manifest}:{line}"
    result = report.to_dict()
    assert sum(bar["utterances"] for bar in result["duration"]["histogram"]) == 80
    tokens = sum(len(tokenizer.encode(line["text"])) for line in lines)
    assert result["tokens_per_second"]["mean"] == pytest.approx(tokens / sum(seconds))


@pytest.fixture
def broken(tmp_path):
    """A manifest with a good first line, and one line with each problem; (kind, FILE:LINE) of those that show without
    the audio, with its header, and only in the samples."""
    for name, seconds in (("good", 1.0), ("longer", 2.0), ("shorter", 0.4), ("cut", 1.0)):
        write_tone(tmp_path / f"{name}.wav", seconds, seed=1)
    flac = tmp_path / "cut.flac"
    soundfile.write(flac, *soundfile.read(tmp_path / "cut.wav"))
    flac.write_bytes(flac.read_bytes()[: flac.stat().st_size * 3 // 4])  # its header still says 1 s
    (tmp_path / "words.wav").write_text("I am not audio\n" * 100)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")

    def line(path: str, **fields) -> bytes:
        return json.dumps({"audio_filepath": path, "duration": 1.0, "text": "x"} | fields).encode()

    rows = [
        (line("good.wav"), None, None),
        (line("good.wav", id="2")[:-1], "bad line", "none"),
        (b'{"audio_filepath": "\xff.wav"}', "bad line", "none"),
        (line("good.wav", id="4", duration=-1), "bad line", "none"),
        (line("good.wav"), "duplicate id", "none"),
        (line("good.wav", id="6", text=" "), "empty text", "none"),
        (line("good.wav", id="7", duration=0.05, offset=0.1), "duration out of range", "none"),
        (line("missing.wav"), "missing file", "header"),
        (line("words.wav"), "unreadable audio", "header"),
        (line("longer.wav"), "wrong duration", "header"),
        (line("shorter.wav"), "wrong duration", "header"),
        (line("good.wav", id="12", offset=5.0), "wrong duration", "header"),
        (line("cut.flac", id="13"), "damaged audio", "full"),
        (line("nan.wav"), "non-finite samples", "full"),
        (line("good.wav", id="1/ast", task="ast", ast_text="y", target_lang="de"), None, None),
    ]
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(row[0] for row in rows))
    problems = {
        audio: {(kind, f"m.jsonl:{i}") for i, (_, kind, seen) in enumerate(rows, 1) if seen == audio}
        for audio in ("none", "header", "full")
    }
    problems["header"] |= problems["none"]
    problems["full"] |= problems["header"]
    return path, problems


@pytest.mark.parametrize("audio", ["none", "header", "full"])
def test_every_problem_is_found_with_file_and_line(broken, audio):
    path, problems = broken
    report = check_manifests([SourceConfig(str(path))], CheckOptions(audio=audio, min_seconds=0.1, jobs=3))
    assert found(report) == problems[audio]
    assert sum(report.problem_counts.values()) == report.sources[0].problems == len(problems[audio])
    assert (report.sources[0].lines, report.sources[0].utterances) == (15, 12)
    text = str(report)
    assert all(f"{path.parent}/{location}: " in text for _, location in problems[audio])
    assert f"is also that of {path}:1" in text


def test_all_kinds_of_cuts_are_checked_against_the_headers(corpus, tmp_path):
    good = [Recording.from_file(path).to_cut() for path in sorted((corpus / "b").glob("*.wav"))[:4]]
    write_tone(tmp_path / "changed.wav", 1.0, seed=1)
    changed = Recording.from_file(tmp_path / "changed.wav").to_cut()
    write_tone(tmp_path / "changed.wav", 2.0, seed=1)
    gone = Recording.from_file(corpus / "b/4.wav").to_cut()
    gone.recording.sources[0].source = str(tmp_path / "gone.wav")
    cuts = [good[0].append(good[1]), good[2], changed, good[3].append(gone)]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    report = check_manifests([SourceConfig(str(tmp_path / "cuts.jsonl.gz"))], CheckOptions())
    assert found(report) == {
        *(("empty text", f"cuts.jsonl.gz:{i}") for i in range(1, 5)),
        ("wrong duration", "cuts.jsonl.gz:3"),
        ("missing file", "cuts.jsonl.gz:4"),
    }


def test_long_lists_are_cut_short_in_the_text_and_whole_in_json(tmp_path, capsys):
    count = PROBLEMS_SHOWN + 15
    lines = [{"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "x"} for i in range(count)]
    path = write_manifest(tmp_path / "m.jsonl", lines)
    assert status(path, "--json", tmp_path / "report.json") == 1
    output = capsys.readouterr().out
    assert f"missing file: {count}" in output and "and 15 more" in output
    assert output.count(f"{path}:") == PROBLEMS_SHOWN + 12  # and the extremes of durations and characters
    report = json.loads((tmp_path / "report.json").read_text())
    assert [p["location"] for p in report["problems"]] == [f"{path}:{i}" for i in range(1, count + 1)]
    assert status(path, "--audio", "none") == 0


def test_a_missing_manifest_is_a_problem_and_the_others_are_read(corpus, tmp_path, capsys):
    assert status(tmp_path / "none.jsonl", corpus / "b.jsonl") == 1
    output = capsys.readouterr().out
    assert "unreadable manifest: 1" in output
    assert f"{corpus / 'b.jsonl'}" in output


def test_a_manifest_that_is_cut_short_is_a_problem(tmp_path):
    lines = [json.dumps({"audio_filepath": f"{i}.wav", "duration": 1.0, "text": str(i)}) for i in range(5000)]
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "m.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    report = check_manifests([SourceConfig(str(tmp_path / "m.jsonl.gz"))], CheckOptions(audio="none"))
    assert report.problem_counts == {"unreadable manifest": 1}
    assert 0 < report.sources[0].utterances < 5000


@pytest.fixture
def experiment(corpus, model_config, tmp_path):
    """A whole configuration, whose validation set is its test set too."""
    data = {"train": [{"path": f"{corpus}/a.jsonl"}], "valid": [{"path": f"{corpus}/b.jsonl"}]}
    data["test"] = {"again": data["valid"]}
    tree = {"model": to_dict(model_config), "data": data, "stages": {"first": {"optim.lr": 1e-4}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "x.yaml"


def test_a_configuration_is_checked_whole(corpus, experiment, tmp_path, capsys):
    path = experiment
    assert status("--config", path) == 0
    assert capsys.readouterr().out.count("b.jsonl\n") == 1
    assert status("--config", path, "--data.max_seconds", "1.5") == 1
    assert "duration out of range" in capsys.readouterr().out
    assert status("--config", path, "--data.augment.noise.sources", f"[{{path: {corpus}/noise.jsonl}}]") == 0
    assert "noise.jsonl" in capsys.readouterr().out
    assert status("--config", path, "--data.augment.reverb.sources", f"[{{path: {tmp_path}/none.jsonl}}]") == 1
    assert status("--sounds", corpus / "noise.jsonl") == 0
    assert status(corpus / "noise.jsonl") == 1
    capsys.readouterr()
    assert status("--config", path, "--data.train", f"[{{path: {tmp_path}/none.jsonl}}]") == 1
    assert "none.jsonl" in capsys.readouterr().out
    assert status("--config", path, "--data.trian=[]") == 1
    assert "did you mean data.train?" in capsys.readouterr().err
    for name, purpose in (("train", "train"), ("valid", "evaluation")):
        assert status("--config", path, f"--data.{name}=[]") == 1
        assert capsys.readouterr().err == f"error: data: no {purpose} sources are configured\n"
    for wrong in ("model.ctc_wieght", "optim.lrr", "stages.first"):
        assert status("--config", path, f"--{wrong}", "0.5") == 1
        error = capsys.readouterr().err
        with pytest.raises(ConfigError) as refused:
            load_experiment(path, [f"--{wrong}", "0.5"])
        assert error == f"error: {refused.value}\n" and wrong in error
    assert status() == 1
    assert status("--data.train", "[]", corpus / "a.jsonl") == 2


def write_sets(folder, model_config, **sets) -> Path:
    """A configuration with NeMo lines for each set; those of `test` are one test set."""
    for name, lines in sets.items():
        write_manifest(folder / f"{name}.jsonl", lines)
    data = {name: [{"path": f"{folder}/{name}.jsonl"}] for name in sets}
    data["test"] = {"t": data.pop("test")} if "test" in data else {}
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump({"model": to_dict(model_config), "data": data}))
    return path


def test_what_training_and_evaluation_share_is_reported(model_config, tmp_path, capsys):
    for i in range(6):
        write_tone(tmp_path / f"wav/{i}.wav", 2.0, seed=i)
    (tmp_path / "link.wav").symlink_to(tmp_path / "wav/5.wav")

    def line(i, **fields):
        return {"audio_filepath": f"wav/{i}.wav", "duration": 2.0, "text": "x"} | fields

    train = [line(0, id="a"), line(1), line(2, id="c"), line(3, offset=0.0, duration=1.0, id="d")]
    valid = [line(4, id="a"), line(5)]
    test = [
        line(1, offset=0.5, duration=1.0),
        line(3, offset=1.0, duration=1.0, id="e"),
        line(5) | {"audio_filepath": "link.wav"},
    ]
    path = write_sets(tmp_path, model_config, train=train, valid=valid, test=test)
    assert status("--config", path) == 1
    out = capsys.readouterr().out
    assert "problems: 3\n" in out
    assert f"valid.jsonl:1: id 'a' is also that of {tmp_path}/train.jsonl:1" in out
    assert f"wav/1.wav is also in {tmp_path}/train.jsonl:2" in out and "same audio in train and test t: 1" in out
    assert f"wav/5.wav is also in {tmp_path}/valid.jsonl:2" in out and "same audio in valid and test t: 1" in out
    # the sources of one set may share, and so may manifests given by themselves
    assert status(tmp_path / "train.jsonl", tmp_path / "valid.jsonl") == 0
    capsys.readouterr()
    settings = f"[{{path: {tmp_path}/train.jsonl}}]"
    assert status("--config", path, "--data.valid", settings) == 1
    assert "same audio in train and valid: 4" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_shared_audio_is_found_in_every_kind(kind, tmp_path):
    lines = write_corpus(tmp_path)
    source = write_kind(kind, tmp_path, lines)
    again = SourceConfig(**vars(source) | {"lang": "de"})
    report = check_manifests({"train": [source], "valid": [again]}, CheckOptions(audio="none"))
    assert report.problem_counts["same audio in train and valid"] == 7
    assert report.problem_counts["same id in train and valid"] == 7
    assert [summary.problems for summary in report.sources] == [1, 15]  # an empty text each


def test_utterances_that_the_encoder_cannot_hear_are_reported(corpus, experiment, tmp_path, capsys):
    write_tone(tmp_path / "x.wav", 0.08, seed=1)
    path = write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "x.wav", "duration": 0.08, "text": "x"}])
    changes = ("--data.train", f"[{{path: {path}}}]", "--data.min_seconds", "0.01")
    assert status("--config", experiment, *changes) == 1
    assert f"{path}:1: 0.08 s are 8 frames, and the encoder needs 9" in capsys.readouterr().out
    assert status(path) == 0


def test_unknown_languages_are_reported_once(corpus, tmp_path, capsys):
    languages = ["English", "klingon", "cmn", "klingon", "yue"]
    lines = [
        {"audio_filepath": str(corpus / "b/0.wav"), "duration": 0.3, "text": "x", "lang": lang, "id": str(i)}
        for i, lang in enumerate(languages)
    ]
    path = write_manifest(tmp_path / "m.jsonl", lines)
    report = check_manifests([SourceConfig(str(path))], CheckOptions())
    assert report.languages == {"klingon": 2, "en": 1, "zh": 1, "yue": 1}
    (problem,) = report.problems["unknown language"]
    assert problem.location == f"{path}:2" and problem.details.startswith("'klingon' (2 times) is no code or name")
    for stated in ({"lang": "klingon"}, {"languages": {"klingon": "klingon"}}):
        assert not check_manifests([SourceConfig(str(path), **stated)], CheckOptions()).problem_counts
    assert status(path) == 1
    assert status(path, "--lang", "klingon") == 0


@pytest.mark.parametrize("audio", ["header", "full"])
def test_stored_features_of_another_kind_are_reported(corpus, tmp_path, audio):
    cuts = CutSet.from_cuts([Recording.from_file(corpus / "b/0.wav").to_cut()])
    for name, extractor in (("mfcc", Mfcc()), ("spectrogram", Spectrogram()), ("fbank", fbank_extractor())):
        stored = cuts.compute_and_store_features(extractor, tmp_path / name, storage_type=NumpyFilesWriter)
        stored.drop_recordings().to_file(tmp_path / f"{name}.jsonl")
        report = check_manifests([SourceConfig(str(tmp_path / f"{name}.jsonl"))], CheckOptions(audio=audio))
        problems = [p.details for p in report.problems.get("wrong features", ())]
        assert bool(problems) == (name != "fbank") and all(f"stored are kaldi-{name}" in p for p in problems)


def test_audio_is_the_same_in_every_form_of_manifest(tmp_path):
    """A NeMo line of a file that a lhotse cut of the training data has too; other channels are other audio."""
    lines = write_corpus(tmp_path)
    cuts, nemo = write_kind("lhotse", tmp_path, lines), write_kind("nemo", tmp_path, lines)
    report = check_manifests({"train": [cuts], "valid": [nemo]}, CheckOptions(audio="none"))
    assert report.problem_counts["same audio in train and valid"] == 7
    write_tone(tmp_path / "call.wav", 1.0, seed=1, channels=2)
    call = Recording.from_file(tmp_path / "call.wav").to_cut()
    for name, cut in zip(("a", "b"), call.to_mono(), strict=True):
        CutSet.from_cuts([cut]).to_file(tmp_path / f"{name}.jsonl")
    first, second = (SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in "ab")
    options = CheckOptions(audio="none", sounds=True)
    assert not check_manifests({"train": [first], "valid": [second]}, options).problem_counts
    again = check_manifests({"train": [first], "test": [replace(first, lang="en")]}, options)
    assert again.problem_counts.keys() == {"same audio in train and test", "same id in train and test"}
