"""Training on one GPU as a user runs it; what the CPU can do as well runs there too."""

import re
import sys

import pytest

from speechllm.train.checkpoint import load_checkpoint
from speechllm.train.monitor import Averages
from tests.programs import ENV, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def train(experiment, exp_dir, device, *settings, launcher=()):
    """recipes/train.py for its 12 steps; its log."""
    env = dict(ENV) if device == "cpu" else {k: v for k, v in ENV.items() if k != "ACCELERATE_USE_CPU"}
    options = ["--config", str(experiment), "--exp-dir", str(exp_dir), *settings]
    # what hangs on a rented GPU is a failure, not the end of the check
    result = run(sys.executable, *launcher, "recipes/train.py", *options, env=env, timeout=150)
    assert f"device: {device}" in result.stderr
    return result.stderr


def mean_loss(exp_dir):
    """Of a token, over all steps."""
    return Averages(load_checkpoint(exp_dir / "checkpoint-12.pt")["total"]).items()["loss"]


@pytest.mark.cuda
def test_half_precision_learns_what_float32_learns(experiment, tmp_path):
    """In bf16 with the kernels of fla, where they are installed."""
    # heads of 64, as in released models: Triton need not tune the kernels to others, which takes minutes
    llm = ["--model.llm.rwkv7", "{n_layer: 2, n_embd: 64, head_size: 64, vocab_size: 300}"]
    for precision, backend in (("null", "chunked"), ("bf16", "auto"), ("fp16", "chunked")):
        settings = [*llm, "--train.mixed_precision", precision, "--model.llm.wkv_backend", backend]
        log = train(experiment, tmp_path / precision, "cuda", *settings)
        # fp16's scale of the loss may begin too high: it skips steps until it is right
        assert precision == "fp16" or "step skipped" not in log
    expected = mean_loss(tmp_path / "null")
    assert mean_loss(tmp_path / "bf16") == pytest.approx(expected, rel=0.03)
    assert mean_loss(tmp_path / "fp16") == pytest.approx(expected, rel=0.1)


@pytest.mark.cuda
def test_the_largest_batch_that_fits_is_found(experiment, tmp_path):
    log = train(experiment, tmp_path, "cuda", "--max-duration", "auto")
    found = re.search(r"--max-duration auto: (\d+) s", log)
    assert found and int(found[1]) >= 1 and "done: 12 steps" in log


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_fsdp_in_a_process_group_of_one_learns_what_a_whole_model_learns(experiment, tmp_path, device):
    one = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    train(experiment, tmp_path / "whole", device)
    train(experiment, tmp_path / "shared", device, "--train.fsdp", "true", launcher=one)
    whole, shared = (load_checkpoint(tmp_path / name / "checkpoint-12.pt") for name in ("whole", "shared"))
    assert "llm.head.weight" in shared["sharded"]["names"]
    assert whole["model"].keys() == shared["model"].keys()
    assert mean_loss(tmp_path / "shared") == pytest.approx(mean_loss(tmp_path / "whole"), rel=2e-3)
