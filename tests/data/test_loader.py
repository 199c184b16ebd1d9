"""Loaders: what is in a batch, that nothing is lost or doubled, resume, ranks, curriculum."""

import copy
import itertools
import json
import logging
import math
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Fbank, FbankConfig, NumpyFilesWriter, Recording, SupervisionSegment

from speechllm.data import (
    AugmentConfig,
    BabbleConfig,
    Batch,
    DataConfig,
    DataError,
    ManifestError,
    NoiseConfig,
    SourceConfig,
    SpecAugmentConfig,
    SpeedConfig,
    VolumeConfig,
    WaveformBatch,
    build_eval_loader,
    build_train_loader,
    fbank,
)
from speechllm.data.features import MEL_BINS, fbank_extractor, num_frames
from speechllm.data.sampling import curriculum_limit
from speechllm.prompt.interleave import StreamingConfig
from speechllm.prompt.label import LabelTemplate
from speechllm.prompt.request import Request
from tests.data.corpora import FORMS, KINDS, write_corpus, write_form, write_kind

from .conftest import write_manifest, write_tone
from .test_index import LetterLabels

NOISE = {"duration": 1.0, "text": ""}


def config(corpus, num_workers: int = 0, augmented: bool = True, **changes) -> DataConfig:
    augment = AugmentConfig(
        speed=SpeedConfig([0.9, 1.0, 1.1]),
        volume=VolumeConfig(),
        noise=NoiseConfig([SourceConfig(str(corpus / "noise.jsonl"))]),
        spec_augment=SpecAugmentConfig(time_mask_frames=10, time_warp_frames=8),
    )
    return DataConfig(
        train=[SourceConfig(str(corpus / "a.jsonl")), SourceConfig(str(corpus / "b.jsonl"), lang="es")],
        max_duration=6.0,
        num_buckets=4,
        num_workers=num_workers,
        augment=augment if augmented else AugmentConfig(),
        **changes,
    )


def same(a, b) -> bool:
    return (
        torch.equal(a.features, b.features)
        and torch.equal(a.feature_lens, b.feature_lens)
        and (a.texts, a.requests, a.durations) == (b.texts, b.requests, b.durations)
    )


def test_batches_hold_each_utterance_once(corpus):
    batches = list(build_train_loader(config(corpus, augmented=False), seed=1))
    ids = [id for batch in batches for id in batch.ids]
    assert sorted(ids) == sorted([f"a/{i}" for i in range(60)] + [f"b/{i}" for i in range(20)])
    extractor = Fbank(FbankConfig(num_filters=80, dither=0.0, snip_edges=False, high_freq=-400.0))
    for batch in batches:
        assert batch.features.dtype == torch.float32 and batch.feature_lens.dtype == torch.int64
        assert batch.features.shape == (len(batch), int(batch.feature_lens.max()), 80)
        assert batch.audio_seconds <= 6.0
        assert 0 <= batch.padding_share < 0.5
        for i, id in enumerate(batch.ids):
            length = batch.feature_lens[i]
            samples, _ = soundfile.read(corpus / f"{id}.wav", dtype="float32")
            torch.testing.assert_close(
                batch.features[i, :length],
                torch.from_numpy(extractor.extract(samples, 16000)),
                rtol=0,
                atol=2e-3,  # energies near the floor: rounding
            )
            assert (batch.features[i, length:] == 0).all()
            assert length == num_frames(len(samples))
            assert batch.durations[i] == len(samples) / 16000
            assert batch.texts[i] == id.replace("/", " ")
            assert batch.languages[i] == ("en" if id.startswith("a") else "es")


@pytest.mark.parametrize("stream", [False, True])
def test_batches_are_made_of_utterances_as_they_are_played(corpus, stream):
    settings = config(corpus)
    for source in settings.train:
        source.stream = stream
    batches = list(build_train_loader(settings, seed=1))
    # lhotse's sampler looks only at the utterances before the last of a batch: it may go over by what a bucket is wide
    limit = 6.6 if stream else 6.001
    assert max(len(batch) * max(batch.durations) for batch in batches) <= limit
    ratios = {
        round(seconds / soundfile.info(corpus / f"{id}.wav").duration, 1)
        for batch in batches
        for id, seconds in zip(batch.ids, batch.durations, strict=True)
    }
    assert ratios == {0.9, 1.0, 1.1}


def test_epochs_differ_and_repeat(corpus):
    loader = build_train_loader(config(corpus), seed=1)
    first = list(loader)
    assert all(same(a, b) for a, b in zip(first, loader, strict=True))
    loader.set_epoch(2)
    assert [b.ids for b in loader] != [b.ids for b in first]
    other = build_train_loader(config(corpus), seed=2)
    assert [b.ids for b in other] != [b.ids for b in first]


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 0), (0, 2), (2, 0)])
def test_resume_is_exact(corpus, workers_before, workers_after):
    whole = build_train_loader(config(corpus), seed=3)
    whole.set_epoch(4)
    expected = list(whole)
    loader = build_train_loader(config(corpus, workers_before), seed=3)
    loader.set_epoch(4)
    state = None
    for given, batch in enumerate(loader, start=1):
        assert same(batch, expected[given - 1])
        if given == 5:
            state = copy.deepcopy(loader.state_dict())
            break
    torch.manual_seed(5)
    before = torch.get_rng_state()
    resumed = build_train_loader(config(corpus, workers_after), seed=3)
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    rest = list(resumed)
    assert len(rest) == len(expected) - 5
    assert all(same(a, b) for a, b in zip(rest, expected[5:], strict=True))
    # the training loop's random numbers are its own
    assert torch.equal(before, torch.get_rng_state())
    # the state after the last batch has nothing left; the next epoch is whole
    resumed.load_state_dict(resumed.state_dict())
    assert list(resumed) == []
    resumed.set_epoch(5)
    assert sum(len(batch) for batch in resumed) == 80


@pytest.mark.parametrize("change", ["max_duration", "world size", "more data", "moved", "seed"])
def test_other_settings_begin_the_epoch_anew_and_say_so(corpus, tmp_path, caplog, change):
    settings, changed, count, seed, world_size = config(corpus), config(corpus), 80, 3, 1
    for source in (*settings.train, *changed.train):
        source.stream = change == "world size"  # what is left of an indexed corpus is shared out
    loader = build_train_loader(settings, seed=3)
    loader.set_epoch(2)
    next(iter(loader))
    if change == "max_duration":
        changed.max_duration, word = 4.0, "max_duration was 6.0, is 4.0"
    elif change == "world size":
        world_size, word = 2, "world_size was 1, is 2"
    elif change == "seed":
        seed, word = 4, "seed was 3, is 4"
    elif change == "more data":
        extra = write_manifest(tmp_path / "more.jsonl", [json.loads((corpus / "b.jsonl").read_text().splitlines()[0])])
        changed.train.append(SourceConfig(str(extra)))
        (tmp_path / "b").symlink_to(corpus / "b")
        count, word = 81, "other lines in the manifests, other train sources"
    else:
        shutil.copytree(corpus, tmp_path / "moved")
        changed, word = config(tmp_path / "moved"), "other augment.noise.sources, other train sources"
    found = []
    for rank in range(world_size):
        other = build_train_loader(changed, seed=seed, rank=rank, world_size=world_size)
        other.load_state_dict(loader.state_dict())
        other.set_epoch(2)
        found += [id for batch in other for id in batch.ids]
        assert other.epoch == 2
    assert len(found) == count
    assert f"epoch 2 begins anew: its 1 batches so far were made with other data settings ({word})" in caplog.text
    caplog.clear()
    list(loader)
    other.load_state_dict(loader.state_dict())  # after a whole epoch settings may change
    assert list(other) == [] and all(record.levelno < logging.WARNING for record in caplog.records)


def test_what_is_left_of_an_epoch_is_shared_out_to_another_number_of_ranks(corpus, caplog):
    """Again and again, and resumed with the same number in between: nothing is doubled or played otherwise, and no more
    is lost than the ranks cannot share out, which are fewer utterances than there are ranks."""

    def given(batches):
        return [(id, s) for batch in batches for id, s in zip(batch.ids, batch.durations, strict=True)]

    whole = given(build_train_loader(config(corpus), seed=3))
    found, state = [], None
    for world_size, count in ((2, 2), (2, 1), (3, 1), (1, 5), (2, None)):
        states = []
        for rank in range(world_size):
            loader = build_train_loader(config(corpus), seed=3, rank=rank, world_size=world_size)
            if state is not None:
                loader.load_state_dict(state)
            found += given(itertools.islice(loader, count))
            states.append(copy.deepcopy(loader.state_dict()))
        assert len({(s["epoch"], s["batches"], s["finished"]) for s in states}) == 1
        state = states[0]
    assert state["finished"] and "anew" not in caplog.text
    assert len(whole) == 80 and set(found) <= set(whole)
    assert len(found) == len(set(found)) >= 80 - 1 - 2 - 1
    loader = build_train_loader(config(corpus), seed=3, world_size=5)
    loader.load_state_dict(state)
    assert list(loader) == []
    loader.set_epoch(2)
    assert list(loader)


def test_an_epoch_of_which_nothing_is_left_ends(corpus):
    """All of its batches are given, and nobody has asked for more."""
    loader = build_train_loader(config(corpus), seed=3)
    batches = len(list(loader))
    loader = build_train_loader(config(corpus), seed=3)
    list(zip(range(batches), loader, strict=False))
    assert loader.batches == batches and not loader.state_dict()["finished"]
    other = build_train_loader(config(corpus), seed=3, world_size=2)
    other.load_state_dict(loader.state_dict())
    assert list(other) == [] and other.state_dict()["finished"]


def test_ranks_share_the_epoch(corpus):
    ranks = [list(build_train_loader(config(corpus), seed=1, rank=r, world_size=2)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    ids = [{id for batch in batches for id in batch.ids} for batches in ranks]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 80
    evals = [build_eval_loader(config(corpus), config(corpus).train, rank=r, world_size=2) for r in range(2)]
    assert len({id for loader in evals for batch in loader for id in batch.ids}) == 80


def test_eval_is_sorted_whole_and_stable(corpus):
    loader = build_eval_loader(config(corpus), config(corpus).train)
    batches = list(loader)
    durations = [duration for batch in batches for duration in batch.durations]
    assert len(durations) == 80 and durations == sorted(durations)
    assert all(same(a, b) for a, b in zip(batches, loader, strict=True))
    assert all(len(b) * max(b.durations) <= 6.0 + 1e-6 for b in batches)
    # breaking off and starting over gives everything again
    next(iter(loader))
    assert sum(len(batch) for batch in loader) == 80


def test_weights_draw_in_proportion(corpus, caplog):
    caplog.set_level(logging.INFO)
    settings = config(corpus, augmented=False)
    for source, weight in zip(settings.train, (1.0, 3.0), strict=True):
        source.weight = weight
    loader = build_train_loader(settings, seed=7)
    ids = [id for batch in loader for id in batch.ids]
    assert len(ids) == 80 and sum(id.startswith("b") for id in ids) == 60
    assert "60 times" in caplog.text and "b.jsonl, each 3.00 times" in caplog.text
    with pytest.raises(ValueError, match="weight to all sources or to none"):
        replace(settings, train=[SourceConfig("a", weight=1.0), SourceConfig("b")])


def test_repeated_utterances_are_augmented_anew(corpus):
    settings = replace(config(corpus), train=[SourceConfig(str(corpus / "b.jsonl"))], epoch_cuts=40)
    rows = {}
    for batch in build_train_loader(settings, seed=1):
        for row, (id, length) in enumerate(zip(batch.ids, batch.feature_lens.tolist(), strict=True)):
            rows.setdefault(id, []).append(batch.features[row, :length])
    assert [len(copies) for copies in rows.values()] == [2] * 20
    assert sum(len(a) != len(b) or not torch.equal(a, b) for a, b in rows.values()) > 15


@pytest.mark.parametrize(("num_workers", "kind"), [(0, "fbank"), (1, "fbank"), (0, "whisper128")])
def test_features_on_the_device_are_those_of_the_worker(corpus, num_workers, kind):
    in_worker = list(build_train_loader(config(corpus), seed=1, feature_kind=kind))
    settings = replace(config(corpus), features_on="device", num_workers=num_workers)
    on_device = build_train_loader(settings, seed=1, feature_kind=kind)
    for expected, batch in zip(in_worker, on_device, strict=True):
        assert isinstance(batch, WaveformBatch) and len(batch) == len(expected)
        assert len(pickle.dumps(batch)) < 1.1 * batch.samples.nbytes + 2000 * len(batch)  # no noise travels along
        got = batch.to("cpu")
        assert isinstance(got, Batch) and got.features.shape[2] == MEL_BINS[kind]
        torch.testing.assert_close(got.features, expected.features, rtol=0, atol=1e-3)
        assert torch.equal(got.feature_lens, expected.feature_lens)
        assert (got.ids, got.texts, got.durations) == (expected.ids, expected.texts, expected.durations)


@pytest.mark.parametrize("features_on", ["worker", "device"])
def test_two_views_of_each_utterance(corpus, features_on):
    """The second views lie behind all the first; both are masked, and the same whichever process makes them."""
    one_view = list(build_train_loader(config(corpus, augmented=False), seed=1))
    cfg = replace(
        config(corpus, augmented=False, features_on=features_on),
        augment=AugmentConfig(spec_augment=SpecAugmentConfig(1.0, time_masks=5, time_mask_frames=10)),
    )
    batches = [batch.to("cpu") for batch in build_train_loader(cfg, seed=1, two_views=True)]
    in_workers = build_train_loader(replace(cfg, num_workers=2), seed=1, two_views=True)
    for batch, plain, again in zip(batches, one_view, in_workers, strict=True):
        assert same(batch, again.to("cpu")) and batch.ids == plain.ids
        assert torch.equal(batch.feature_lens, plain.feature_lens.repeat(2))
        assert batch.padding_share == pytest.approx(plain.padding_share)
        for i, n in enumerate(plain.feature_lens.tolist()):
            first, second = batch.features[i], batch.features[i + len(plain)]
            assert not torch.equal(first, second) and not first[n:].any() and not second[n:].any()
            for view in (first[:n], second[:n]):
                kept = torch.isclose(view, plain.features[i, :n], atol=1e-4)
                assert kept.any() and not kept.all()


def test_two_views_need_masks_to_differ_in(corpus):
    for augment in (AugmentConfig(), AugmentConfig(spec_augment=SpecAugmentConfig(probability=0.0))):
        with pytest.raises(DataError, match="data.augment.spec_augment: two views of an utterance would be the same"):
            build_train_loader(replace(config(corpus), augment=augment), seed=1, two_views=True)


def test_precomputed_features_are_those_of_the_worker(corpus, tmp_path):
    plain = DataConfig(train=[SourceConfig(str(corpus / "a.jsonl"))], max_duration=6.0, num_workers=0)
    cuts = [Recording.from_file(path).to_cut() for path in sorted((corpus / "a").glob("*.wav"))]
    for cut in cuts:
        cut.id = f"a/{cut.id}"
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, cut.duration, text="x")]
    with NumpyFilesWriter(tmp_path / "features") as storage:
        CutSet.from_cuts(cut.compute_and_store_features(fbank_extractor(), storage) for cut in cuts).to_file(
            tmp_path / "cuts.jsonl"
        )
    stored = replace(plain, train=[SourceConfig(str(tmp_path / "cuts.jsonl"))], features_on="precomputed")
    expected = {
        id: (row[:n], d)
        for b in build_train_loader(plain, seed=1)
        for id, row, n, d in zip(b.ids, b.features, b.feature_lens, b.durations, strict=True)
    }
    count = 0
    for batch in build_train_loader(stored, seed=1):
        for id, row, length in zip(batch.ids, batch.features, batch.feature_lens, strict=True):
            torch.testing.assert_close(row[:length], expected[id][0], rtol=0, atol=2e-3)
            count += 1
    assert count == 60
    with pytest.raises(ValueError, match="can only have augment.spec_augment"):
        replace(stored, augment=AugmentConfig(volume=VolumeConfig()))


def test_text_is_normalized_and_tasks_have_their_targets(tmp_path):
    write_tone(tmp_path / "x.wav", 1.0, seed=1)
    lines = [
        {"text": "Hello, World"},
        {"text": "Hello", "ast_text": "Hallo,\u3000Welt", "target_lang": "de", "task": "ast"},
        {"text": "again", "ast_text": "nochmals", "target_lang": "de"},
    ]
    lines = [{"audio_filepath": "x.wav", "duration": 1.0, "lang": "en", "id": str(i)} | x for i, x in enumerate(lines)]
    path = str(write_manifest(tmp_path / "m.jsonl", lines))
    sources = [SourceConfig(path), SourceConfig(path, task="ast", target_lang="de")]
    settings = DataConfig(train=sources, num_workers=0, text=["lowercase", "remove_punctuation"])
    seen = [
        row
        for batch in build_train_loader(settings, seed=1)
        for row in zip(batch.ids, batch.texts, batch.languages, batch.target_languages, strict=True)
    ]
    assert sorted(seen) == sorted(
        [
            ("0", "hello world", "en", None),
            ("1", "hallo welt", "en", "de"),
            ("1", "hallo welt", "en", "de"),
            ("2", "again", "en", None),
            ("2", "nochmals", "en", "de"),
        ],
        key=lambda row: (row[0], row[1]),
    )
    with pytest.raises(ValueError, match="lowercas"):
        DataConfig(text=["lowercas"])


@pytest.mark.parametrize("features_on", ["worker", "device"])
def test_batches_have_what_prompts_need(tmp_path, features_on):
    write_tone(tmp_path / "x.wav", 1.0, seed=1)
    said = [{}, {"previous": ""}, {"previous": "before", "hotwords": ["New York", "x"]}, {"hotwords": "a, b"}]
    lines = [{"audio_filepath": "x.wav", "duration": 1.0, "text": "t", "id": str(i)} | x for i, x in enumerate(said)]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    settings = DataConfig(train=[source], num_workers=0, features_on=features_on)

    def requests(loader, epoch=1):
        loader.set_epoch(epoch)
        return {request.id: request for batch in loader for request in batch.to("cpu").requests}

    evaluated = requests(build_eval_loader(settings, [source]))
    expected = [(None, None), ("", None), ("before", ("New York", "x")), (None, ("a, b",))]
    assert evaluated == {str(i): Request(str(i), *values) for i, values in enumerate(expected)}
    loader = build_train_loader(settings, seed=1)
    first, second = requests(loader), requests(loader, epoch=2)
    assert {id: replace(request, draw=0.0) for id, request in first.items()} == evaluated
    draws = [request.draw for found in (first, second) for request in found.values()]
    assert len(set(draws)) == 8 and all(0 < draw < 1 for draw in draws)
    assert requests(loader) == first  # nothing but seed, epoch and utterance decides
    assert requests(build_train_loader(settings, seed=2)) != first


def test_what_the_language_model_sees_is_limited(corpus):
    settings = config(corpus, augmented=False, max_positions=120, max_cuts=None)
    settings = replace(settings, max_duration=1000.0)
    for batch in build_train_loader(settings, seed=1, labels=LetterLabels()):
        positions = [math.ceil(d / 0.08) + len(t) + 1 for d, t in zip(batch.durations, batch.texts, strict=True)]
        assert len(batch) * max(positions) <= 120
    slow = replace(settings, augment=AugmentConfig(speed=SpeedConfig([0.5])), max_positions=26)
    for batch in build_train_loader(slow, seed=1, labels=LetterLabels()):
        assert all(math.ceil(d / 0.08) + len(t) + 1 <= 26 for d, t in zip(batch.durations, batch.texts, strict=True))
    with pytest.raises(DataError, match="fewer utterances than the run has processes"):
        list(build_train_loader(replace(settings, min_seconds=1.77), 1, world_size=8, labels=LetterLabels()))
    with pytest.raises(DataError, match="tokenizer"):
        build_train_loader(settings, seed=1)


def test_the_largest_batches_are_known_beforehand(corpus):
    settings = config(corpus, augmented=False)
    loader = build_train_loader(settings, seed=1, rank=1, world_size=2)
    largest = [batch.features.shape[0] * batch.features.shape[1] for batch in loader.largest_batches()]
    assert 1 <= len(largest) <= 3 and loader.batches == 0
    ranks = [build_train_loader(settings, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert max(largest) == max(b.features.shape[0] * b.features.shape[1] for loader in ranks for b in loader)
    growing = replace(settings, curriculum_seconds=0.6, curriculum_epochs=3, curriculum_hold_epochs=2)
    seconds = [max(batch.durations) for batch in build_train_loader(growing, seed=1).largest_batches()]
    assert max(seconds) > 1.7  # those of the last epoch of growth
    evaluation = build_eval_loader(settings, settings.train)
    assert max(max(batch.durations) for batch in evaluation.largest_batches()) > 1.7


@pytest.mark.parametrize("features_on", ["worker", "device"])
def test_all_kinds_of_manifests_train_together_and_resume(tmp_path, features_on):
    lines = [line for line in write_corpus(tmp_path) if line["text"]]
    sources = [write_kind(kind, tmp_path, lines) for kind in KINDS]
    sources += [write_form(form, tmp_path, lines) for form in FORMS]
    settings = DataConfig(
        train=sources,
        max_duration=4.0,
        num_buckets=2,
        num_workers=2,
        features_on=features_on,
        augment=AugmentConfig(speed=SpeedConfig(), babble=BabbleConfig(probability=1.0)),
    )
    loader = build_train_loader(settings, seed=1)
    states, batches = [], []
    for batch in loader:
        states.append(copy.deepcopy(loader.state_dict()))
        batches.append(batch.to("cpu"))
    assert sum(map(len, batches)) == len(sources) * len(lines) and not loader.skipped
    middle = len(batches) // 2
    resumed = build_train_loader(replace(settings, num_workers=0), seed=1)
    resumed.load_state_dict(states[middle])
    rest = [batch.to("cpu") for batch in resumed]
    assert all(same(a, b) for a, b in zip(rest, batches[middle + 1 :], strict=True))


def test_babble_takes_voices_of_the_corpus(corpus):
    settings = replace(config(corpus), augment=AugmentConfig(babble=BabbleConfig(probability=1.0)))
    first = list(build_train_loader(settings, seed=1))
    assert sum(len(batch) for batch in first) == 80
    assert all(same(a, b) for a, b in zip(first, build_train_loader(settings, seed=1), strict=True))


def test_bad_lines_are_left_out_until_they_are_most(corpus, tmp_path, caplog):
    good = (corpus / "a.jsonl").read_bytes().replace(b'"a/', b'"' + str(corpus).encode() + b"/a/").splitlines()
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join([*good[:2], b'{"audio_filepath": ', b'{"text": "\xff"}', *good[2:]]))
    loader = build_train_loader(replace(config(corpus), train=[SourceConfig(str(path))]), seed=1)
    assert sum(len(batch) for batch in loader) == 60
    assert "m.jsonl:3: invalid JSON" in caplog.text and "m.jsonl:4: not UTF-8" in caplog.text
    path.write_bytes(b"\n".join([*good[:2], *[b"nonsense"] * 3]))
    with pytest.raises(DataError, match="3 of 5 lines cannot be used, such as .*m.jsonl:3"):
        build_train_loader(replace(config(corpus), train=[SourceConfig(str(path))]), seed=1)


def test_curriculum(corpus):
    assert [curriculum_limit(e, 1.0, 4, 9.0) for e in (-1, 0, 1, 2, 3, 4, 8)] == [1.0, 1.0, 3.0, 5.0, 7.0, 9.0, 9.0]
    settings = config(
        corpus, augmented=False, curriculum_seconds=0.8, curriculum_epochs=2, max_seconds=1.6, min_seconds=0.5
    )
    loader = build_train_loader(settings, seed=1)
    for epoch, limit in ((1, 0.8), (2, 1.2), (3, 1.6), (4, 1.6)):
        loader.set_epoch(epoch)
        durations = [duration for batch in loader for duration in batch.durations]
        assert min(durations) >= 0.5
        assert limit - 0.1 < max(durations) <= limit


def test_max_cuts_and_limits_leave_a_message(corpus):
    assert max(len(b) for b in build_train_loader(config(corpus, max_cuts=2), seed=1)) == 2
    with pytest.raises(ValueError, match="within the limits: 80 shorter than 20 s"):
        list(build_train_loader(config(corpus, min_seconds=20.0), seed=1))
    for changes in (
        {"max_duration": 0.0},
        {"min_seconds": 40.0},
        {"curriculum_seconds": 1.0},
        {"max_cuts": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            DataConfig(**changes)
    with pytest.raises(ValueError, match="no train sources"):
        build_train_loader(DataConfig(), seed=1)
    with pytest.raises(ManifestError, match="no such manifest"):
        build_train_loader(DataConfig(train=[SourceConfig("nowhere.jsonl")]), seed=1)


def test_other_rates_channels_and_segments(tmp_path):
    write_tone(tmp_path / "wide.wav", 1.0, seed=1, rate=44100, channels=2)
    write_tone(tmp_path / "phone.wav", 1.0, seed=1, rate=8000)
    write_tone(tmp_path / "long.wav", 5.0, seed=1)
    lines = [
        {"audio_filepath": "wide.wav", "duration": 1.0, "text": "a"},
        {"audio_filepath": "phone.wav", "duration": 1.0, "text": "b"},
        {"audio_filepath": "long.wav", "duration": 1.0, "offset": 3.5, "text": "c"},
    ]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    augment = AugmentConfig(speed=SpeedConfig([1.25]))
    for loader, frames in (
        (build_eval_loader(DataConfig(num_workers=0), [source]), 100),
        (build_train_loader(DataConfig(train=[source], num_workers=0, augment=augment), seed=1), 80),
    ):
        (batch,) = loader
        assert batch.feature_lens.tolist() == [frames] * 3
        assert batch.features.isfinite().all()
        if frames == 100:
            samples, _ = soundfile.read(tmp_path / "long.wav", start=56000, frames=16000, dtype="float32")
            row = batch.features[batch.texts.index("c")]
            torch.testing.assert_close(row, fbank(np.array(samples)))


def test_lhotse_cuts_work_too(corpus, tmp_path):
    cuts = [Recording.from_file(path).to_cut() for path in sorted((corpus / "b").glob("*.wav"))]
    # one of a kind that only lhotse has: two recordings in a row
    cuts[0] = cuts[0].append(cuts[1])
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    loader = build_eval_loader(DataConfig(num_workers=0), [SourceConfig(str(tmp_path / "cuts.jsonl.gz"))])
    assert sum(len(batch) for batch in loader) == 20


class TimedLabels(LetterLabels):
    label_template = LabelTemplate("<|{lang}|>{timed_text}")


@pytest.mark.parametrize("limits", [{}, {"max_tokens_per_second": 1000.0}])
@pytest.mark.parametrize("stream", [False, True])
def test_labels_are_made_where_the_line_has_all_that_they_need(corpus, tmp_path, limits, stream, caplog):
    lines = [json.loads(line) for line in (corpus / "a.jsonl").read_text().splitlines()][:9]
    for i, line in enumerate(lines):
        line["audio_filepath"] = str(corpus / line["audio_filepath"])
        line |= {"id": f"u{i}", "alignment": {"word": [["", 0.0, 0.16], ["A", 0.16, 0.08], [str(i), 0.24, 0.032]]}}
    del lines[0]["lang"]
    del lines[1]["alignment"]
    lines[2]["alignment"]["word"].pop()
    lines[8]["alignment"]["word"][-1][1] = 60.0
    lines[3] |= {"task": "ast", "ast_text": "Ja", "target_lang": "de"}
    path = write_manifest(tmp_path / "m.jsonl", lines)
    augment = AugmentConfig(speed=SpeedConfig(factors=[0.5]))
    settings = DataConfig(
        train=[SourceConfig(str(path), stream=stream)], text=["lowercase"], num_workers=0, augment=augment, **limits
    )
    loaders = [(build_train_loader(settings, 1, labels=TimedLabels()), "<0.32>a<0.48><0.48> {}<0.56>")]
    if not stream:
        evaluated = build_eval_loader(settings, settings.train, labels=TimedLabels())
        loaders.append((evaluated, "<0.16>a<0.24><0.24> {}<0.24>"))
    for loader, times in loaders:
        caplog.clear()
        labels = {i: label for batch in loader for i, label in zip(batch.ids, batch.labels, strict=True)}
        assert labels == {"u3": "<|en|>ja"} | {f"u{i}": f"<|en|>{times.format(i)}" for i in range(4, 8)}
        assert loader.skipped == {
            "no language": 1,
            "no word times": 1,
            "word times of another text": 1,
            "word times outside": 1,
        }
        assert "u0" in caplog.text and "give `lang`" in caplog.text and "give `alignment`" in caplog.text
    plain = list(build_train_loader(replace(settings, max_tokens_per_second=None), 1))
    assert sum(map(len, plain)) == 9 and all(batch.labels == batch.texts for batch in plain)
    words = {i: said for batch in plain for i, said in zip(batch.ids, batch.words, strict=True)}
    assert words["u1"] is None and words["u3"] is None  # a translation has other words
    assert [word for word, _, _ in words["u4"]] == ["", "A", "4"] and words["u4"][2].start == pytest.approx(0.24)


class StreamedLabels(LetterLabels):
    """Of a model that is trained on streams."""

    streaming = StreamingConfig([0.16, 0.32], offline_share=0.4)

    def __init__(self, ctc_head: object = None) -> None:
        self.ctc_head = ctc_head


@pytest.fixture
def timed(corpus, tmp_path):
    """A manifest with word times, the first line without, the last with those of other words."""
    lines = [json.loads(line) for line in (corpus / "a.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"audio_filepath": str(corpus / line["audio_filepath"]), "id": f"u{i}"}
        line["alignment"] = {"word": [["", 0.0, 0.1], ["A", 0.1, 0.1], [str(i), 0.2, 0.1]]}
    del lines[0]["alignment"]
    lines[-1]["alignment"]["word"].pop()
    return SourceConfig(str(write_manifest(tmp_path / "timed.jsonl", lines)), lang="en")


@pytest.mark.parametrize("stream", [False, True])
def test_streams_have_chunks_that_follow_from_the_batch_and_words_as_they_are_played(timed, stream):
    augment = AugmentConfig(speed=SpeedConfig([0.5]))
    settings = DataConfig(
        train=[replace(timed, stream=stream)], text=["lowercase"], max_duration=8.0, num_workers=0, augment=augment
    )
    loader = build_train_loader(settings, 1, labels=StreamedLabels(ctc_head="one"))
    batches = list(loader)
    assert {batch.chunk_seconds for batch in batches} == {None, 0.16, 0.32}
    assert loader.skipped == {"word times of another text": 1}
    words = {i: said for batch in batches for i, said in zip(batch.ids, batch.words, strict=True)}
    assert words["u0"] is None and len(words) == 59
    assert words["u4"] == (("a", pytest.approx(0.2), pytest.approx(0.4)), ("4", pytest.approx(0.4), pytest.approx(0.6)))
    assert batches[0].inputs[-2:] == (batches[0].words, batches[0].chunk_seconds)
    loader = build_train_loader(settings, 1, labels=StreamedLabels())
    list(loader)
    assert loader.skipped == {"word times of another text": 1, "no word times": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_resume_with_the_same_chunks(timed, workers):
    settings = DataConfig(train=[timed], text=["lowercase"], max_duration=8.0, num_workers=workers)
    loader = build_train_loader(settings, 1, labels=StreamedLabels("one"))
    whole = [batch.chunk_seconds for batch in loader]
    assert len(whole) > 8
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed = build_train_loader(settings, 1, labels=StreamedLabels("one"))
    resumed.load_state_dict(loader.state_dict())
    assert [batch.chunk_seconds for batch in resumed] == whole[5:]
    ranks = [build_train_loader(settings, 1, rank, 2, StreamedLabels("one")) for rank in range(2)]
    chunks = [[batch.chunk_seconds for batch in rank] for rank in ranks]
    assert chunks[0] == chunks[1]  # the processes compute alike in each step


def test_the_positions_of_streams_are_limited(timed):
    settings = DataConfig(
        train=[timed], text=["lowercase"], max_duration=1000.0, max_positions=120, num_buckets=4, num_workers=0
    )
    labels = StreamedLabels("one")
    loader = build_train_loader(settings, 1, labels=labels)
    fullest = 0
    for batch in loader:
        each = [
            math.ceil(seconds / 0.08) + math.floor(seconds / 0.16) + len(text) + 1
            for seconds, text in zip(batch.durations, batch.texts, strict=True)
        ]
        fullest = max(fullest, len(batch) * max(each))
    assert 100 < fullest <= 120
    assert {batch.chunk_seconds for batch in loader.largest_batches()} == {0.16, None}
    evaluated = build_eval_loader(settings, [timed], labels=labels)
    assert {batch.chunk_seconds for batch in evaluated} == {None}


def test_the_content_of_augmentation_sources_belongs_to_the_place_in_an_epoch(corpus, tmp_path, caplog):
    noise = write_manifest(tmp_path / "noise.jsonl", [NOISE | {"audio_filepath": str(corpus / "noise/0.wav")}])
    augment = AugmentConfig(noise=NoiseConfig([SourceConfig(str(noise))]))
    settings = DataConfig(train=[SourceConfig(str(corpus / "b.jsonl"))], num_workers=0, augment=augment, max_duration=5)
    loader = build_train_loader(settings, seed=1)
    next(iter(loader))
    state = loader.state_dict()
    build_train_loader(settings, seed=1).load_state_dict(state)
    assert "begins anew" not in caplog.text
    write_manifest(noise, [NOISE | {"audio_filepath": str(corpus / "b/0.wav"), "duration": 0.3}])
    build_train_loader(settings, seed=1).load_state_dict(state)
    assert "epoch 1 begins anew" in caplog.text and "manifests of noise" in caplog.text


def test_a_state_of_an_earlier_version_goes_on(corpus, tmp_path, caplog):
    """It has no fingerprints of noise, and not all keys of today's sources."""
    augment = AugmentConfig(noise=NoiseConfig([SourceConfig(str(corpus / "noise.jsonl"))]))
    settings = DataConfig(train=[SourceConfig(str(corpus / "b.jsonl"))], num_workers=0, augment=augment, max_duration=5)
    loader = build_train_loader(settings, seed=1)
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    del state["identity"]["sounds"]
    for source in (*state["identity"]["train"], *state["identity"]["augment"]["noise"]["sources"]):
        for key in ("text_field", "lang_field", "text", "languages"):
            del source[key]
    build_train_loader(settings, seed=1).load_state_dict(state)
    assert "begins anew" not in caplog.text
    state["identity"]["train"][0]["lang"] = "de"
    build_train_loader(settings, seed=1).load_state_dict(state)
    assert "epoch 1 begins anew" in caplog.text and "other train sources" in caplog.text


def test_utterances_that_the_encoder_cannot_hear_are_left_out(tmp_path, model):
    lines = []
    for i, seconds in enumerate((0.08, 0.5)):
        write_tone(tmp_path / f"{i}.wav", seconds, seed=i)
        lines.append({"audio_filepath": f"{i}.wav", "duration": seconds, "text": "two", "lang": "en", "id": str(i)})
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    for features_on in ("worker", "device"):
        settings = DataConfig(train=[source], num_workers=0, min_seconds=0.01, features_on=features_on)
        for loader in (
            build_train_loader(settings, seed=1, labels=model),
            build_eval_loader(settings, [source], labels=model),
        ):
            assert [batch.ids for batch in loader] == [["1"]]
            assert loader.skipped == {"too short for the encoder": 1}
