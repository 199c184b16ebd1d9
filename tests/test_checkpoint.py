"""Checkpoints: whole or not there, strict, averaged as by hand."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from speechllm.checkpoint import (
    CheckpointError,
    average_state_dicts,
    checkpoints_to_average,
    file_hash,
    load_checkpoint,
    load_trained,
    newest_checkpoint,
    remove_old_checkpoints,
    rng_state,
    save_checkpoint,
    set_rng_state,
    trained_state_dict,
)


def write(folder, name, step):
    save_checkpoint(folder / name, {"model": {"w": torch.full((2,), float(step))}, "step": step})


def test_newest_is_by_step_and_passes_over_damage(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    write(tmp_path, "checkpoint-100.pt", 100)
    write(tmp_path, "epoch-2.pt", 150)
    write(tmp_path, "best-valid-loss.pt", 170)
    assert newest_checkpoint(tmp_path).name == "epoch-2.pt"
    data = (tmp_path / "epoch-2.pt").read_bytes()
    (tmp_path / "checkpoint-200.pt").write_bytes(data[: len(data) // 2])
    assert newest_checkpoint(tmp_path).name == "epoch-2.pt"
    assert "checkpoint-200.pt: cannot be read" in caplog.text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-1.pt"
    write(tmp_path, path.name, 1)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        save_checkpoint(path, {"model": (i for i in range(3))})  # a generator cannot be stored
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_load_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        load_checkpoint(tmp_path / "other.pt")


def test_old_checkpoints_go(tmp_path):
    for step in (100, 200, 1000):
        write(tmp_path, f"checkpoint-{step}.pt", step)
        write(tmp_path, f"epoch-{step // 100}.pt", step)
    write(tmp_path, "best-valid-loss.pt", 100)
    remove_old_checkpoints(tmp_path, keep=2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best-valid-loss.pt", "checkpoint-1000.pt", "checkpoint-200.pt", "epoch-10.pt", "epoch-2.pt"]


def test_only_what_is_trained_is_stored():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in trained_state_dict(model).items()}
    assert "0.weight" not in state and {"0.bias", "1.running_mean"} <= state.keys()
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    other[0].weight.requires_grad_(False)
    frozen = other[0].weight.clone()
    load_trained(other, state, "a.pt")
    assert torch.equal(other[0].bias, model[0].bias) and torch.equal(other[0].weight, frozen)


def test_another_shape_is_refused_whole():
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(CheckpointError) as error:
        load_trained(model, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3), "scale": torch.ones(1)}, "a.pt")
    assert "weight: (4, 2) in the file, (3, 2) in the model" in str(error.value)
    assert "unexpected: scale" in str(error.value)
    assert torch.equal(model.weight, before)


def test_average_equals_the_mean_by_hand():
    states = [
        {"w": torch.tensor([1.0, 2.0]), "h": torch.tensor([1.0]).bfloat16(), "n": torch.tensor(3)},
        {"w": torch.tensor([4.0, 8.0]), "h": torch.tensor([2.0]).bfloat16(), "n": torch.tensor(5)},
    ]
    mean = average_state_dicts(states)
    assert mean["w"].tolist() == [2.5, 5.0] and mean["h"].item() == 1.5 and mean["n"].item() == 5
    assert mean["h"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="other tensors"):
        average_state_dicts([{"w": torch.ones(1)}, {"v": torch.ones(1)}])


def test_which_are_averaged(tmp_path):
    for n in (1, 2, 3, 10):
        write(tmp_path, f"epoch-{n}.pt", n)
    names = [p.name for p in checkpoints_to_average(tmp_path, "epoch", 10, 3)]
    assert names == ["epoch-2.pt", "epoch-3.pt", "epoch-10.pt"]
    with pytest.raises(CheckpointError, match="no epoch-4.pt; there: epoch-1.pt, .*epoch-10.pt"):
        checkpoints_to_average(tmp_path, "epoch", 4, 1)
    with pytest.raises(CheckpointError, match="cannot average 3"):
        checkpoints_to_average(tmp_path, "epoch", 2, 3)


def test_random_state_survives_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"model": {}, "rng": rng_state()})
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    set_rng_state(load_checkpoint(tmp_path / "a.pt")["rng"])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


def test_hash_depends_on_content_and_names(tmp_path):
    (tmp_path / "a").write_text("x")
    one = file_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_hash(tmp_path) != one
    assert file_hash(tmp_path / "b") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
