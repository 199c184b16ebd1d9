"""Lists of hotwords: drawn again and again in the shares that are asked for, the same for the same numbers."""

import dataclasses

import numpy as np
import pytest

from speechllm.config import from_dict
from speechllm.data import DataConfig, SourceConfig
from speechllm.data.hotwords import HotwordDrawer, HotwordsConfig
from speechllm.data.loader import build_eval_loader, build_train_loader
from speechllm.data.manifests.source import DataError
from speechllm.prompt.request import Request
from speechllm.train.config import Experiment
from tests.data.conftest import write_manifest, write_tone

TEXT = "call anna and bob the builder now"
OTHERS = ["play some jazz", "anna went home", "\u6253\u7535\u8bdd\u7ed9\u5f20\u4e09"]


def drawer(**settings):
    return HotwordDrawer(HotwordsConfig(**settings), lambda rng: OTHERS[rng.integers(len(OTHERS))])


def is_said(phrase):
    return f" {phrase} " in f" {TEXT} "


def test_shares_of_empty_absent_and_said():
    draw = drawer(empty=0.3, absent=0.2, max_others=4)
    rng = np.random.default_rng(0)
    lists = [draw.draw(TEXT, rng) for _ in range(3000)]
    said = [any(map(is_said, phrases)) for phrases in lists]
    assert np.mean(said) == pytest.approx(0.5, abs=0.03)
    # one in five lists of distractors alone has none
    assert np.mean([not phrases for phrases in lists]) == pytest.approx(0.3 + 0.2 / 5, abs=0.03)
    assert all(len(set(phrases)) == len(phrases) for phrases in lists)
    assert max(map(len, lists)) <= 3 + 4
    found = {phrase for phrases in lists for phrase in phrases}
    assert {"jazz", "bob the", "\u5f20\u4e09"} <= found
    assert "anna" in found
    apart = drawer(empty=0, absent=1)
    assert not any(is_said(phrase) for _ in range(300) for phrase in apart.draw(TEXT, rng))


def test_a_file_says_what_is_a_hotword(tmp_path):
    (tmp_path / "names.txt").write_text("anna\nbob the builder\n\ncarl\ndora\n")
    draw = drawer(empty=0, absent=0, file=str(tmp_path / "names.txt"), max_others=2)
    rng = np.random.default_rng(0)
    found = {phrase for _ in range(200) for phrase in draw.draw(TEXT, rng)}
    assert found == {"anna", "bob the builder", "carl", "dora"}
    assert {phrase for _ in range(50) for phrase in draw.draw("nobody", rng)} == {
        "anna",
        "bob the builder",
        "carl",
        "dora",
    }


def test_a_list_of_the_manifest_stays(tmp_path):
    request = Request("a", hotwords=("given",))
    assert drawer().with_hotwords(request, TEXT, np.random.default_rng(0)) is request


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    with pytest.raises(DataError, match="streams of data"):
        HotwordDrawer(HotwordsConfig())
    HotwordDrawer(HotwordsConfig(max_others=0))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no phrase in it"):
        drawer(file=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="together at most 1"):
        HotwordsConfig(empty=0.6, absent=0.5)


def test_loaders_draw_them_in_training_and_only_then(tmp_path):
    lines = []
    for i, text in enumerate([TEXT, *OTHERS[:2]] * 4):
        write_tone(tmp_path / f"{i}.wav", 0.5, i)
        lines.append({"audio_filepath": f"{i}.wav", "duration": 0.5, "text": text})
    lines[0]["hotwords"] = ["of the line"]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    config = DataConfig(train=[source], hotwords=HotwordsConfig(empty=0, absent=0), num_workers=0, max_duration=2.0)

    def lists(config, epoch):
        loader = build_train_loader(config, seed=1)
        loader.set_epoch(epoch)
        return {request.id: request.hotwords for batch in loader for request in batch.requests}

    first = lists(config, 1)
    assert first["0"] == ("of the line",) and all(first[str(i)] for i in range(1, 12))
    assert lists(config, 1) == first == lists(dataclasses.replace(config, num_workers=1), 1)
    assert lists(config, 2) != first
    assert set(lists(dataclasses.replace(config, hotwords=None), 1).values()) == {None, ("of the line",)}
    evaluated = {r.id: r.hotwords for batch in build_eval_loader(config, [source]) for r in batch.requests}
    assert evaluated.pop("0") == ("of the line",) and set(evaluated.values()) == {()}


def test_a_prompt_without_the_slot_is_refused():
    model = {"tokenizer": "rwkv", "encoder": {"path": "/encoder"}, "llm": {"path": "/llm.pth"}}
    slot = {"prompt": {"asr": "hotwords: {hotwords}\n{audio}"}}
    from_dict(Experiment, {"model": model | slot, "data": {"hotwords": {}}})
    with pytest.raises(ValueError, match=r"model.prompt has no \{hotwords\}"):
        from_dict(Experiment, {"model": model, "data": {"hotwords": {}}})
