"""Indexes: they say what the manifest says, are made once, and follow changes."""

import errno
import gzip
import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from speechllm.data import DataConfig, DataError, build_train_loader
from speechllm.data import index as index_module
from speechllm.data.index import Corpus, LinesFile, open_index
from speechllm.data.manifests.manifest import ManifestError, SourceConfig, describe_cut, read_manifest
from speechllm.prompt.label import LabelTemplate

from .conftest import write_manifest


class LetterLabels:
    """A token for every letter."""

    frame_seconds = 0.04
    seconds_per_position = 0.08
    label_template = LabelTemplate()

    def label_lengths(self, texts):
        return [len(text) for text in texts]

    def label_identity(self):
        return "letters"


def lines(n: int = 50) -> list[dict]:
    return [
        {"audio_filepath": f"{i}.wav", "duration": 1 + i / 8, "text": f" Wórd {'x' * i}", "lang": "en"}
        for i in range(n)
    ]


@pytest.fixture
def source(tmp_path) -> SourceConfig:
    return SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines())))


def test_the_index_is_what_the_lines_say(source, tmp_path):
    index = open_index(source, ["lowercase"], LetterLabels(), tmp_path / "index")
    assert len(index) == 50 and index.bad_lines.count == 0
    assert index.durations.tolist() == [1 + i / 8 for i in range(50)]
    assert index.characters.tolist() == [4 + i for i in range(50)]
    assert index.tokens.tolist() == [4] + [5 + i for i in range(1, 50)]
    assert index.hours == pytest.approx(sum(line["duration"] for line in lines()) / 3600)
    expected = list(read_manifest(source))
    for i in (7, 0, 49):
        assert describe_cut(index.cut(i)) == describe_cut(expected[i])
        assert index.cut(i).recording.sources[0].source == expected[i].recording.sources[0].source
    assert open_index(source, folder=tmp_path / "index").tokens is None


@pytest.mark.parametrize("packed", ["m.jsonl.gz", "cuts.jsonl.gz"])
def test_what_cannot_be_read_by_offset_is_unpacked(packed, corpus, tmp_path):
    if packed == "cuts.jsonl.gz":
        read_manifest(corpus / "a.jsonl").to_eager().to_file(tmp_path / packed)
    else:
        with gzip.open(tmp_path / packed, "wt", encoding="utf-8") as file:
            for line in (corpus / "a.jsonl").read_text().splitlines():
                entry = json.loads(line)
                entry["audio_filepath"] = str(corpus / entry["audio_filepath"])
                file.write(json.dumps(entry) + "\n")
    source = SourceConfig(str(tmp_path / packed))
    index = open_index(source, folder=tmp_path / "index")
    assert [index.cut(i).id.split("/")[-1] for i in range(len(index))] == [
        cut.id.split("/")[-1] for cut in read_manifest(corpus / "a.jsonl")
    ]


def test_made_once_and_again_when_something_changes(source, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    built = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda *args: (built.append(1), build(*args)))
    first = open_index(source, folder=folder).fingerprint
    open_index(source, folder=folder)
    open_index(SourceConfig(source.path, weight=3.0), folder=folder)
    assert len(built) == 1
    open_index(source, ["lowercase"], folder=folder)
    open_index(source, labels=LetterLabels(), folder=folder)
    open_index(SourceConfig(source.path, task="ast"), folder=folder)
    assert len(built) == 4
    write_manifest(tmp_path / "m.jsonl", lines(51))
    assert open_index(source, folder=folder).fingerprint != first
    assert len(built) == 5


def _open(source, folder, results):
    results.put(open_index(source, folder=folder).fingerprint)


def test_two_processes_at_once(source, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(source, tmp_path / "index", results)) for _ in range(3)]
    for process in processes:
        process.start()
    fingerprints = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(fingerprints) == 1
    assert {
        name.rsplit(".", 1)[-1] for name in os.listdir(tmp_path / "index") if not (tmp_path / "index" / name).is_dir()
    } == {"lock"}


def test_bad_lines_are_counted_and_named(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    good = [json.dumps(line).encode() for line in lines(4)]
    path.write_bytes(b"\n".join([good[0], good[1], b'{"audio_filepath": ', b"", b'{"a": "\xff"}', good[2], good[3]]))
    index = open_index(SourceConfig(str(path)), folder=tmp_path / "index")
    assert len(index) == 4 and index.bad_lines.count == 2
    assert "m.jsonl:3: invalid JSON" in caplog.text and "m.jsonl:5: " in caplog.text
    assert [index.cut(i).id for i in range(4)] == ["0", "1", "2", "3"]
    caplog.clear()
    open_index(SourceConfig(str(path)), folder=tmp_path / "index")  # from the disk: said again
    assert "m.jsonl:3: invalid JSON" in caplog.text
    path.write_text("nonsense\n")
    with pytest.raises(ManifestError, match=r"m\.jsonl:1: .*no good one"):
        open_index(SourceConfig(str(path)), folder=tmp_path / "index")


def test_a_manifest_that_changes_during_the_run(source, tmp_path):
    index = open_index(source, folder=tmp_path / "index")
    before = index.cut(3)
    replacement = tmp_path / "new.jsonl"
    write_manifest(replacement, lines()[::-1])
    replacement.rename(tmp_path / "m.jsonl")  # the run keeps the file that it began with
    assert index.cut(3) == before
    again = open_index(source, folder=tmp_path / "index")
    assert again.fingerprint != index.fingerprint  # the same durations and lengths, but not in this order
    time.sleep(0.01)
    write_manifest(tmp_path / "m.jsonl", lines()[::-1])  # written over with the same
    assert again.cut(3) == pickle.loads(pickle.dumps(again)).cut(3)
    time.sleep(0.01)
    write_manifest(tmp_path / "m.jsonl", lines())  # written over with something else
    for changed in (again, pickle.loads(pickle.dumps(again))):
        with pytest.raises(DataError, match=r"m\.jsonl has changed during the run"):
            changed.cut(3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_when_a_manifest_is_written_over(corpus, tmp_path, workers):
    manifest = tmp_path / "m.jsonl"
    lines = (corpus / "b.jsonl").read_text().replace('"b/', f'"{corpus}/b/')
    manifest.write_text(lines)
    config = DataConfig(train=[SourceConfig(str(manifest))], max_duration=2.0, num_workers=workers)
    config.index_dir = str(tmp_path / "index")
    loader = build_train_loader(config, seed=1)
    batches = iter(loader)
    next(batches)
    manifest.write_text(lines)
    os.utime(manifest, ns=(1, 1))
    next(batches)
    manifest.write_text(lines.replace("b 1", "c 1"))
    with pytest.raises(DataError, match=r"m\.jsonl has changed during the run"):
        list(batches)


def test_a_complete_index_in_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    fingerprint = open_index(source, folder=tmp_path / "index").fingerprint
    for lock in (tmp_path / "index").glob("*.lock"):
        lock.unlink()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("speechllm.data.index._locked", refuse)
    assert open_index(source, folder=tmp_path / "index").fingerprint == fingerprint
    with pytest.raises(DataError, match="cannot be written .*set data.index_dir"):
        open_index(SourceConfig(source.path, lang="fr"), folder=tmp_path / "index")


def test_more_sources_than_a_process_may_have_open(tmp_path, monkeypatch):
    monkeypatch.setattr(LinesFile, "_MOST_OPEN", 3)
    sources = [SourceConfig(str(write_manifest(tmp_path / f"{i}.jsonl", lines(2)))) for i in range(10)]
    corpus = Corpus([open_index(source, folder=tmp_path / "index") for source in sources])
    before = len(os.listdir("/proc/self/fd"))
    for number in (*range(20), *range(19, -1, -1)):
        assert corpus[number].id == str(number % 2)
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_manifest_that_cannot_be_read_to_its_end(corpus, tmp_path):
    whole = gzip.compress((corpus / "a.jsonl").read_bytes())
    for content in (whole[: len(whole) // 2], b"no gzip at all"):
        (tmp_path / "m.jsonl.gz").write_bytes(content)
        with pytest.raises(ManifestError, match=r"m\.jsonl\.gz: cannot be read after line"):
            open_index(SourceConfig(str(tmp_path / "m.jsonl.gz")), folder=tmp_path / "index")


def test_kaldi_paths_are_of_the_folder_that_the_command_runs_in(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/wav.scp").write_text("u here.wav\n")
    (tmp_path / "data/utt2dur").write_text("u 1.0\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        index = open_index(SourceConfig(str(tmp_path / "data")), folder=tmp_path / "index")
        assert index.cut(0).recording.sources[0].source == str(tmp_path / name / "here.wav")


def test_corpora_are_numbered_through_and_travel_to_workers(source, tmp_path):
    other = SourceConfig(str(write_manifest(tmp_path / "other.jsonl", lines(5))), lang="de")
    corpus = Corpus([open_index(s, folder=tmp_path / "index") for s in (source, other)])
    packed = pickle.dumps(corpus)
    assert len(packed) < 3000  # arrays stay on the disk
    for same in (corpus, pickle.loads(packed)):
        assert len(same) == 55
        assert [same[i].id for i in (0, 49, 50, 54)] == ["0", "49", "0", "4"]
        assert same[50].duration == np.float32(1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_language_is_warned_of_once(corpus, tmp_path, caplog, stream):
    lines = [
        {"audio_filepath": str(corpus / "b/0.wav"), "duration": 0.3, "text": "x", "lang": lang, "id": str(i)}
        for i, lang in enumerate(("English", "klingon", "cmn", "klingon"))
    ]
    path = str(write_manifest(tmp_path / "m.jsonl", lines))
    config = DataConfig(train=[SourceConfig(path, stream=stream)], num_workers=0)
    loader = build_train_loader(config, seed=1)
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        assert sorted(tag for batch in loader for tag in batch.languages) == ["en", "klingon", "klingon", "zh"]
    assert caplog.text.count("the language 'klingon'") == 1
    caplog.clear()
    config = DataConfig(train=[SourceConfig(path, stream=stream, languages={"klingon": "tlh"})], num_workers=0)
    assert "tlh" in [tag for batch in build_train_loader(config, seed=1) for tag in batch.languages]
    assert "klingon" not in caplog.text
