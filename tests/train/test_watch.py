"""Single steps of a run: their operations are counted once, some are traced; and where the numbers go."""

import gzip
import json

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speechllm.config import ConfigError
from speechllm.train import trackers
from speechllm.train.config import TrainConfig
from speechllm.train.trackers import Trackers, check_installed
from speechllm.train.watch import StepWatch


def test_the_second_step_is_counted_and_some_are_traced(tmp_path, caplog):
    caplog.set_level("INFO")
    watch = StepWatch(tmp_path, profile_steps=2, counts_flops=True)
    x = torch.randn(8, 16)
    for number in range(1, 9):
        with watch.step(number):
            for _ in range(number):
                x @ x.T
        assert watch.flops == (None if number == 1 else 2 * 2 * 8 * 16 * 8)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-4-5.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 4 + 5
    assert "trace of 2 steps" in caplog.text and "aten::mm" in caplog.text


def test_nothing_is_watched_unless_asked(tmp_path):
    watch = StepWatch(tmp_path, profile_steps=0, counts_flops=False)
    for number in range(1, 6):
        with watch.step(number):
            torch.ones(2, 2) @ torch.ones(2, 2)
    assert watch.flops is None and not list(tmp_path.iterdir())


def test_names_of_trackers():
    assert TrainConfig().trackers == ["tensorboard"]
    assert TrainConfig(tensorboard=False, report_to="tensorboard, wandb").trackers == ["wandb"]
    assert TrainConfig(report_to="none").trackers == []
    with pytest.raises(ValueError, match="report_to: 'wand' is none of tensorboard, wandb"):
        TrainConfig(report_to="wand")
    with pytest.raises(ConfigError, match="comet_ml is not installed: pip install comet-ml"):
        check_installed(["comet_ml"])


class Service:
    """As accelerate's trackers are."""

    def __init__(self, project, **options):
        self.made, self.calls = (project, options), []
        Service.last = self

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step):
        self.calls.append((values, step))

    def finish(self):
        self.calls.append("finish")


def test_numbers_go_to_tensorboard_and_to_services(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Service)
    exp_dir = tmp_path / "digits" / "exp"
    opened = Trackers(["tensorboard", "wandb"], exp_dir, 4, {"train": {"num_steps": 9, "rest": [1]}, "lr": 0.1})
    opened.scalars("train", {"loss": 2.5}, 5)
    opened.text("valid/examples", "one\ntwo", 5)
    opened.close()
    project, options = Service.last.made
    assert project == "speechllm" and options["name"] == "digits-exp" and options["resume"] == "allow"
    config = {"train.num_steps": 9, "train.rest": "[1]", "lr": 0.1}
    assert Service.last.calls == ["start", config, ({"train/loss": 2.5}, 5), "finish"]
    Trackers(["wandb"], exp_dir, 0, {})
    assert Service.last.made[1]["id"] == options["id"]  # the same run
    events = EventAccumulator(str(exp_dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 2.5)]


def test_every_tracker_that_is_named_is_one_of_accelerate():
    assert set(trackers.TRACKERS) <= set(map(str, LOGGER_TYPE_TO_CLASS))
