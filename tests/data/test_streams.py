"""Streams through lhotse: the same limits, mixing and messages."""

import logging
from collections import Counter

import pytest

from speechllm.data import DataConfig, DataError, SourceConfig, build_train_loader

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


def test_weights_repeat_sources(corpus):
    loader = build_train_loader(config(corpus, weights=(1.0, 3.0), epoch_cuts=400), seed=1)
    counts = Counter(id[0] for id in ids(loader))
    assert sum(counts.values()) == 400
    assert 0.65 < counts["b"] / 400 < 0.85
    loader.set_epoch(2)
    assert ids(loader) != ids(build_train_loader(config(corpus, weights=(1.0, 3.0), epoch_cuts=400), seed=1))
    with pytest.raises(ValueError, match="epoch_cuts"):
        config(corpus, weights=(1.0, 1.0))


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
