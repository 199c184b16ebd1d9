"""Streams through lhotse: the same limits, mixing and messages."""

import logging
import os
import resource
from collections import Counter
from dataclasses import replace

import pytest

from speechllm.data import DataConfig, DataError, SourceConfig, build_train_loader
from speechllm.data.manifests.source import ManifestError
from speechllm.data.manifests.tar import scan_tar
from tests.data.corpora import write_corpus, write_kind

from .test_index import LetterLabels


def config(corpus, weights=(None, None), **changes) -> DataConfig:
    sources = [
        SourceConfig(str(corpus / f"{name}.jsonl"), weight=weight, stream=True)
        for name, weight in zip("ab", weights, strict=True)
    ]
    return DataConfig(train=sources, **{"max_duration": 6.0, "num_buckets": 4, "num_workers": 0, **changes})


def ids(loader) -> list[str]:
    return [id for batch in loader for id in batch.ids]


def test_each_once_and_a_dry_source_says_so(corpus, caplog):
    caplog.set_level(logging.INFO)
    assert sorted(ids(build_train_loader(config(corpus), seed=1))) == sorted(
        [f"a/{i}" for i in range(60)] + [f"b/{i}" for i in range(20)]
    )
    assert "b.jsonl has run dry after 20 utterances; the others go on" in caplog.text


def test_weights_repeat_shards(corpus, tmp_path):
    lines = [line for line in write_corpus(tmp_path) if line["text"]]
    sources = [replace(write_kind(kind, tmp_path, lines), stream=True) for kind in ("tarred", "shar")]
    sources = [replace(source, weight=weight) for source, weight in zip(sources, (1.0, 3.0), strict=True)]
    settings = DataConfig(train=sources, max_duration=4.0, num_buckets=2, num_workers=0, epoch_cuts=100)
    loader = build_train_loader(settings, seed=1)
    counts = Counter(batch.ids[row] for batch in loader for row in range(len(batch)))
    assert sum(counts.values()) == 100 and len(counts) == len(lines)
    loader.set_epoch(2)
    assert ids(loader) != ids(build_train_loader(settings, seed=1))
    with pytest.raises(ValueError, match="epoch_cuts"):
        config(corpus, weights=(1.0, 1.0))
    with pytest.raises(DataError, match="a stream with a weight needs tar shards"):
        list(build_train_loader(config(corpus, weights=(1.0, 1.0), epoch_cuts=10), seed=1))


def test_mostly_bad_lines_stop_the_run(corpus, tmp_path, caplog):
    good = (corpus / "a.jsonl").read_bytes().replace(b'"a/', b'"' + str(corpus).encode() + b"/a/").splitlines()
    path = tmp_path / "m.jsonl"
    source = SourceConfig(str(path), stream=True)
    path.write_bytes(b"\n".join([*good, b"nonsense"]))
    loader = build_train_loader(DataConfig(train=[source], num_workers=0), seed=1)
    assert len(ids(loader)) == len(ids(loader)) == 60
    assert caplog.text.count("m.jsonl:61: invalid JSON") == 1
    path.write_bytes(b"\n".join([*good[:2], *[b"nonsense"] * 3]))
    with pytest.raises(DataError, match="3 of 5 lines cannot be used"):
        list(build_train_loader(DataConfig(train=[source], num_workers=0), seed=1))


def test_limits_hold(corpus, caplog):
    caplog.set_level(logging.INFO)
    settings = config(corpus, max_positions=120, max_seconds=1.0, max_duration=1000.0)
    batches = list(build_train_loader(settings, seed=1, labels=LetterLabels()))
    for batch in batches:
        positions = [-(-d // 0.08) + len(text) + 1 for d, text in zip(batch.durations, batch.texts, strict=True)]
        assert len(batch) * max(positions) <= 120
        assert max(batch.durations) <= 1.0
    assert "longer than 1 s" in caplog.text
    with pytest.raises(DataError, match="within the limits .*80 shorter than 20 s"):
        list(build_train_loader(config(corpus, min_seconds=20.0), seed=1))


def test_ranks_and_resume(corpus):
    ranks = [list(build_train_loader(config(corpus), seed=1, rank=r, world_size=2)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert not {i for b in ranks[0] for i in b.ids} & {i for b in ranks[1] for i in b.ids}
    loader = build_train_loader(config(corpus), seed=1)
    batches = iter(loader)
    given = [next(batches).ids for _ in range(3)]
    resumed = build_train_loader(config(corpus), seed=1)
    resumed.load_state_dict(loader.state_dict())
    assert given + [b.ids for b in resumed] == [b.ids for b in build_train_loader(config(corpus), seed=1)]


@pytest.mark.parametrize("kind", ["tarred", "shar"])
def test_a_rank_that_cannot_read_its_shard_goes_on(kind, tmp_path, caplog, monkeypatch):
    lines = [line for line in write_corpus(tmp_path, 9) if line["text"]]
    source = replace(write_kind(kind, tmp_path, lines), stream=True, weight=1.0)
    settings = DataConfig(train=[source], max_duration=2.0, num_buckets=1, num_workers=0, epoch_cuts=40)
    scan, broken = scan_tar, sorted(tmp_path.rglob("*0.tar"))[0]

    def scan_here(path):
        if path == str(broken):
            raise ManifestError(f"{path}: Input/output error")
        return scan(path)

    for module in ("nemo", "shar"):
        monkeypatch.setattr(f"speechllm.data.manifests.{module}.scan_tar", scan_here)
    there = [ids(build_train_loader(settings, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert f"left out: {broken}: Input/output error" in caplog.text
    monkeypatch.undo()
    whole = [ids(build_train_loader(settings, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert {len(found) for found in there + whole} == {20}  # as many, though of other shards


def test_more_streams_than_files_that_may_be_open(tmp_path):
    lines = write_corpus(tmp_path, 3)
    sources = []
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "wav").symlink_to(tmp_path / "wav")
        kind = ("nemo", "nemo.gz", "shar", "tarred, one manifest")[number % 4]
        sources.append(replace(write_kind(kind, folder, [line for line in lines if line["text"]]), stream=True))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = build_train_loader(DataConfig(train=sources, num_workers=0, num_buckets=1), seed=1)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
        assert len(ids(loader)) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
