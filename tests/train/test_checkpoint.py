"""Checkpoints: whole or not there, strict, averaged as by hand."""

import contextlib
import copy
import errno
import os
import random
import resource

import numpy as np
import pytest
import torch
from torch import nn

from speechllm.train.checkpoint import (
    RunningAverage,
    average_between,
    average_state_dicts,
    checkpoints_to_average,
    load_checkpoint,
    load_trained,
    newest_checkpoint,
    remove_old_checkpoints,
    rng_state,
    save_checkpoint,
    set_rng_state,
    trained_state_dict,
)
from speechllm.weights import CheckpointError, file_hash


def write(folder, name, step):
    save_checkpoint(folder / name, {"model": {"w": torch.full((2,), float(step))}, "step": step})


def test_newest_is_by_step(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    write(tmp_path, "checkpoint-90.pt", 90)
    write(tmp_path, "checkpoint-100.pt", 100)
    assert newest_checkpoint(tmp_path).name == "checkpoint-100.pt"
    write(tmp_path, "epoch-2.pt", 150)
    write(tmp_path, "best-valid-loss.pt", 170)
    assert newest_checkpoint(tmp_path).name == "epoch-2.pt"


def test_a_damaged_checkpoint_stops_and_names_the_next_older_one(tmp_path):
    for step in (100, 150, 200, 250):
        write(tmp_path, f"checkpoint-{step}.pt", step)
        os.utime(tmp_path / f"checkpoint-{step}.pt", (step, step))
    path = tmp_path / "checkpoint-200.pt"
    path.write_bytes(path.read_bytes()[:-50])
    os.utime(path, (200, 200))
    for read in (lambda: newest_checkpoint(tmp_path), lambda: load_checkpoint(path)):
        with pytest.raises(CheckpointError, match=r"checkpoint-200.pt: cannot be read .* older one is \S*-150.pt$"):
            read()
    path.unlink()
    assert newest_checkpoint(tmp_path).name == "checkpoint-250.pt"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_change_of_a_file_is_found(tmp_path):
    path = tmp_path / "checkpoint-1.pt"
    write(tmp_path, path.name, 1)
    whole, found = path.read_bytes(), 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            content = load_checkpoint(path)
        except CheckpointError as e:
            assert str(path) in str(e)
            found += 1
        else:  # between the records: padding and dates
            assert content["step"] == 1 and content["model"]["w"].tolist() == [1, 1]
    assert found
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="checkpoint-1.pt: cannot be read"):
            load_checkpoint(path)


@contextlib.contextmanager
def files_no_larger_than(size):
    """Writing fails in the middle of a larger file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 100_000, 250_000, 450_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "checkpoint-1.pt"
    write(tmp_path, path.name, 1)
    content = {"model": {f"w{i}": torch.randn(30_000) for i in range(4)}, "step": 2}
    reason = rf"checkpoint-1.pt: cannot be written: {os.strerror(errno.EFBIG)} \(\d+\.\d\d GB free there\)"
    with files_no_larger_than(size), pytest.raises(CheckpointError, match=reason):
        save_checkpoint(path, content)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 1
    save_checkpoint(path, content)
    assert load_checkpoint(path)["step"] == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write(tmp_path, "epoch-1.pt", 1)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="epoch-1.pt: cannot be written"):
        patch.setattr(os, call, fail)
        write(tmp_path, "epoch-1.pt", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-1.pt"]
    assert load_checkpoint(tmp_path / "epoch-1.pt")["step"] == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "exp").write_text("a file")
    with pytest.raises(CheckpointError, match=r"epoch-1.pt: cannot be written: .* GB free there"):
        write(tmp_path / "exp", "epoch-1.pt", 1)


def test_a_content_that_cannot_be_stored_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-1.pt"
    write(tmp_path, path.name, 1)
    with pytest.raises(TypeError, match="generator"):
        save_checkpoint(path, {"model": (i for i in range(3))})
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_load_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        load_checkpoint(tmp_path / "other.pt")


def test_old_batch_checkpoints_go(tmp_path):
    for step in (100, 200, 1000):
        write(tmp_path, f"checkpoint-{step}.pt", step)
        write(tmp_path, f"epoch-{step // 100}.pt", step)
    kept = ["best-valid-loss.pt", "best-valid-wer.pt", "checkpoint-1000.pt", "checkpoint-200.pt"]
    write(tmp_path, kept[0], 100)
    write(tmp_path, kept[1], 100)
    (tmp_path / "checkpoint-300.pt.tmp").write_bytes(b"half")
    for _ in range(2):
        remove_old_checkpoints(tmp_path, keep=2)
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == [*kept, "epoch-1.pt", "epoch-10.pt", "epoch-2.pt"]


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


class Tied(nn.Module):
    """A tensor with two names, an integer one, and a frozen part with two names."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.inner = nn.Linear(3, 3, bias=False)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.also_frozen = self.frozen

    def change(self):
        """As a training step would."""
        for p in self.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p))
        self.norm.running_var.uniform_()
        self.norm.num_batches_tracked += 1


def test_frozen_tensors_are_not_stored_under_any_name():
    model = Tied()
    state = trained_state_dict(model)
    assert {name.partition(".")[0] for name in state} == {"norm", "inner", "outer"}
    other = Tied()
    load_trained(other, state, "a.pt")
    assert torch.equal(other.outer.weight, model.inner.weight)
    assert not torch.equal(other.frozen.weight, model.frozen.weight)


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
    with pytest.raises(CheckpointError, match="number 2 .* does not fit number 1:\n  missing: w\n  unexpected: v"):
        average_state_dicts([{"w": torch.ones(1)}, {"v": torch.ones(1)}])


def test_weighted_mean():
    states = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}]
    assert average_state_dicts(states, [-0.25, 1.25])["w"].tolist() == [6.0]
    with pytest.raises(CheckpointError, match="nothing to average"):
        average_state_dicts([])


def trained(num_steps, period, seed=0):
    """A model after `num_steps` steps, its running average, the trained state after each step."""
    torch.manual_seed(seed)
    model = Tied()
    average = RunningAverage(model, period)
    history = []
    for step in range(1, num_steps + 1):
        model.change()
        average.update(step)
        history.append({name: t.clone() for name, t in trained_state_dict(model).items()})
    return model, average, history


@pytest.mark.parametrize("num_steps", [12, 14])
@pytest.mark.parametrize("period", [1, 4])
def test_running_average_is_the_mean_of_every_period(num_steps, period):
    _, average, history = trained(num_steps, period)
    seen = history[period - 1 :: period]
    mean = average.state_dict()["model"]
    assert mean.keys() == history[0].keys() and average.state_dict()["step"] == len(seen) * period
    for name, t in mean.items():
        if t.is_floating_point():
            assert t.dtype == torch.float64
            torch.testing.assert_close(t, torch.stack([s[name].double() for s in seen]).mean(0), rtol=1e-13, atol=1e-13)
        else:
            assert t.dtype == torch.int64 and t == seen[-1][name]
    assert mean["inner.weight"] is mean["outer.weight"]


@pytest.mark.parametrize("start, end", [(0, 12), (4, 12), (8, 12), (9, 15), (7, 8)])
def test_difference_of_running_averages_is_the_mean_over_the_steps_between(start, end):
    states = []
    for num_steps in (start, end):
        _, average, history = trained(num_steps, period=4)
        states.append(average.state_dict())
    between = [s for step, s in enumerate(history, start=1) if step % 4 == 0 and start // 4 < step // 4]
    mean = average_between(*states)
    for name, t in mean.items():
        if t.is_floating_point():
            expected = torch.stack([s[name].double() for s in between]).mean(0)
            torch.testing.assert_close(t, expected, rtol=1e-12, atol=1e-12)
        else:
            assert t == between[-1][name]


def test_nothing_between_two_running_averages():
    early, late = (trained(n, period=4)[1].state_dict() for n in (5, 7))
    with pytest.raises(CheckpointError, match="nothing between them"):
        average_between(early, late)


def test_running_average_resumes_exactly(tmp_path):
    model, average, _ = trained(10, period=4)
    save_checkpoint(tmp_path / "a.pt", {"model": trained_state_dict(model), "model_avg": average.state_dict()})
    other = copy.deepcopy(model)
    resumed = RunningAverage(other, 4)
    resumed.load_state_dict(load_checkpoint(tmp_path / "a.pt")["model_avg"])
    for m, a in ((model, average), (other, resumed)):
        torch.manual_seed(1)
        for step in range(11, 20):
            m.change()
            a.update(step)
    assert resumed.step == average.step == 16
    for name, t in average.state_dict()["model"].items():
        assert torch.equal(resumed.state_dict()["model"][name], t), name
    assert resumed.average["inner.weight"] is resumed.average["outer.weight"]
    before = load_checkpoint(tmp_path / "a.pt")["model_avg"]["model"]  # the file is as it was
    assert not torch.equal(before["inner.weight"], resumed.average["inner.weight"])


def test_running_average_of_another_model():
    with pytest.raises(ValueError, match="period must be at least 1"):
        RunningAverage(Tied(), 0)
    with pytest.raises(CheckpointError, match="running average .* does not fit what is trained:\n  missing: weight"):
        RunningAverage(nn.Linear(1, 1), 1).load_state_dict(RunningAverage(Tied(), 1).state_dict())


def test_which_are_averaged(tmp_path):
    for n in (1, 2, 3, 4, 10):
        write(tmp_path, f"epoch-{n}.pt", n)
        write(tmp_path, f"checkpoint-{n}00.pt", n)

    def names(*args, **kwargs):
        return [int(p.stem.partition("-")[2]) for p in checkpoints_to_average(tmp_path, *args, **kwargs)]

    assert names("epoch", 4, 3) == [2, 3, 4]
    assert names("checkpoint", 1000, 3) == [300, 400, 1000]
    assert names("epoch", 4, 3, use_averaged_model=True) == [1, 4]
    assert names("checkpoint", 1000, 3, use_averaged_model=True) == [200, 1000]
    (tmp_path / "epoch-2.pt").unlink()
    assert names("epoch", 4, 3, use_averaged_model=True) == [1, 4]
    there = "; there: epoch-1.pt, epoch-3.pt, epoch-4.pt, epoch-10.pt$"
    for args, missing in (
        (("epoch", 4, 3), "epoch-2.pt"),
        (("epoch", 3, 1, True), "epoch-2.pt"),
        (("epoch", 5, 1), "epoch-5.pt"),
        (("epoch", 4, 4, True), "epoch-0.pt"),
    ):
        with pytest.raises(CheckpointError, match=f"no {missing}{there}"):
            names(*args)
    with pytest.raises(CheckpointError, match="no checkpoint-500.pt; there: checkpoint-100.pt, .*checkpoint-1000.pt$"):
        names("checkpoint", 500, 1)
    with pytest.raises(CheckpointError, match="average 3 checkpoints up to checkpoint-300.pt: 4 are needed; there: "):
        names("checkpoint", 300, 3, use_averaged_model=True)
    assert names("checkpoint", 300, 3) == [100, 200, 300]
    with pytest.raises(CheckpointError, match="cannot average 0"):
        names("epoch", 1, 0)
    with pytest.raises(CheckpointError, match="no epoch-1.pt; there: none"):
        checkpoints_to_average(tmp_path / "none", "epoch", 1, 1)


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
