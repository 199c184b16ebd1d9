"""A run that goes on with another number of processes, sharded or not, learns what it would have learned."""

import pytest
import torch
import yaml

from speechllm.config import from_dict
from speechllm.encoder import save_encoder
from speechllm.model.config import ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.checkpoint import load_checkpoint
from tests.programs import run_in_processes
from tests.recipes.test_train import command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(experiment, tmp_path_factory):
    """A step is a whole epoch, so that it has the same utterances whatever their order and however they are shared."""
    torch.manual_seed(0)
    encoder = SpeechLLM.from_config(from_dict(ModelConfig, yaml.safe_load(experiment.read_text())["model"])).encoder
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(encoder, folder)
    return [
        "--model.encoder.path", str(folder), "--model.encoder.zipformer", "null", "--model.encoder.freeze", "true",
        "--data.augment", "{}", "--data.max_cuts", "1", "--data.num_workers", "0", "--train.log_every_n", "1",
        "--train.valid_every_n", "4", "--optim.lr", "1e-2", "--train.average_period", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(experiment, settings, tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("undisturbed")
    train(experiment, exp_dir, settings, processes=1, steps=4)
    return load_checkpoint(exp_dir / "checkpoint-4.pt")


def train(experiment, exp_dir, settings, processes, steps, fsdp=False):
    options = [*settings, "--train.accumulate", str(24 // processes), "--train.num_steps", str(steps)]
    options += ["--train.fsdp", "true"] if fsdp else []
    return run_in_processes(processes, *command(experiment, exp_dir, *options)).stderr


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_then_one_then_two(experiment, settings, undisturbed, tmp_path, fsdp):
    """Weights, their average, the optimizer's state and the place in the data go on; a process alone is not sharded."""
    train(experiment, tmp_path, settings, 2, 2, fsdp)
    assert "resuming from" in train(experiment, tmp_path, settings, 1, 3)
    log = train(experiment, tmp_path, settings, 2, 4, fsdp)
    assert f"resuming from {tmp_path / 'checkpoint-3.pt'}" in log and "anew" not in log
    found = load_checkpoint(tmp_path / "checkpoint-4.pt")
    assert (found["sharded"] is not None) == fsdp
    torch.testing.assert_close(found["total"], undisturbed["total"], rtol=1e-4, atol=0)
    for tensors, expected in (
        (found["model"], undisturbed["model"]),
        (found["model_avg"]["model"], undisturbed["model_avg"]["model"]),
    ):
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
