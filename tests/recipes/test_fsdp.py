"""Training with the language model sharded over two processes, as a user runs it."""

import sys

import pytest
import torch

from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.checkpoint import load_checkpoint, load_share, share_path
from tests.llm.tiny_llms import TRANSFORMERS
from tests.programs import run, run_in_processes
from tests.recipes.test_train import command

pytestmark = pytest.mark.slow

SETTINGS = ["--optim.lr", "1e-2", "--train.average_period", "2"]


@pytest.fixture(scope="module")
def sharded(experiment, tmp_path_factory):
    """The folder of a sharded run that was never stopped."""
    exp_dir = tmp_path_factory.mktemp("fsdp")
    run_in_processes(2, *command(experiment, exp_dir, *SETTINGS, "--train.fsdp", "true"))
    return exp_dir


def test_it_learns_what_whole_models_learn(experiment, sharded, tmp_path):
    run_in_processes(2, *command(experiment, tmp_path, *SETTINGS))
    whole, shares = (load_checkpoint(folder / "checkpoint-12.pt") for folder in (tmp_path, sharded))
    for part in ("model", "model_avg"):
        tensors, others = (c[part]["model"] if part == "model_avg" else c[part] for c in (whole, shares))
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            # Keys' biases have no gradient but rounding, which Adam makes a tenth of a step of.
            torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    torch.testing.assert_close(shares["total"], whole["total"], rtol=1e-4, atol=0)
    assert shares["best"] == pytest.approx(whole["best"], rel=1e-3)


def test_a_language_model_of_transformers_learns_what_a_whole_one_learns(experiment, tmp_path):
    llm = ["--model.llm.rwkv7", "null", "--model.llm.transformers", str(TRANSFORMERS["qwen3"] | {"vocab_size": 300})]
    for name, options in (("whole", []), ("shares", ["--train.fsdp", "true"])):
        run_in_processes(2, *command(experiment, tmp_path / name, *SETTINGS, *llm, *options))
    whole, shares = (load_checkpoint(tmp_path / name / "checkpoint-12.pt") for name in ("whole", "shares"))
    assert (
        "llm.causal_lm.lm_head.weight" in shares["sharded"]["names"] and shares["model"].keys() == whole["model"].keys()
    )
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(shares["model"][name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_every_process_has_half_of_the_language_model(sharded):
    for rank in (0, 1):
        content = load_share(sharded / "checkpoint-12.pt", rank, 2)
        whole = load_checkpoint(sharded / "checkpoint-12.pt")["model"]
        names = content["sharded"]["names"]
        assert names and all(name.startswith("llm.") for name in names)
        assert content["model"]["llm.emb.weight"].shape == (150, 32) and whole["llm.emb.weight"].shape == (300, 32)
        assert len(content["optimizer"]["state"]) > len(content["sharded"]["optimizer"]) > 0
    share = torch.load(share_path(sharded / "checkpoint-12.pt", 1), weights_only=True)
    assert set(share["model"]) == set(names)
    # those of removed checkpoints are removed with them
    assert not list(sharded.glob("checkpoint-6*.pt"))


def test_it_resumes_exactly(experiment, sharded, tmp_path):
    run_in_processes(2, *command(experiment, tmp_path, *SETTINGS, "--train.fsdp", "true", "--train.num_epochs", "1"))
    assert not (tmp_path / "checkpoint-12.pt").exists()
    result = run_in_processes(2, *command(experiment, tmp_path, *SETTINGS, "--train.fsdp", "true"))
    assert "resuming from" in result.stderr
    for rank in (0, 1):
        expected, resumed = (load_share(d / "checkpoint-12.pt", rank, 2) for d in (sharded, tmp_path))
        for name, tensor in expected["model"].items():
            assert torch.equal(resumed["model"][name], tensor), name
        for number, state in expected["optimizer"]["state"].items():
            for name, tensor in state.items():
                assert torch.equal(resumed["optimizer"]["state"][number][name], tensor), (number, name)
        for name, tensor in expected["model_avg"]["model"].items():
            assert torch.equal(resumed["model_avg"]["model"][name], tensor), name


@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_can_go_on(sharded, processes):
    """What they read is all of it, once, the optimizer's state too."""
    path = sharded / "checkpoint-12.pt"
    whole, shares = load_checkpoint(path), [load_share(path, rank, processes) for rank in range(processes)]
    names, numbers = whole["sharded"]["names"], whole["sharded"]["optimizer"]
    for name in names:
        for content in (lambda c: c["model"], lambda c: c["model_avg"]["model"]):
            assert torch.equal(torch.cat([content(share)[name] for share in shares]), content(whole)[name]), name
    written = [load_share(path, rank, 2)["optimizer"]["state"] for rank in (0, 1)]
    for number in numbers:
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = torch.cat([state[number][moment] for state in written])
            assert torch.equal(torch.cat([s["optimizer"]["state"][number][moment] for s in shares]), expected)
        assert {int(share["optimizer"]["state"][number]["step"]) for share in shares} == {12}


@pytest.mark.parametrize("options", [[], ["--use-averaged-model"]])
def test_it_is_averaged(sharded, tmp_path, options):
    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(sharded), "--iter", "12", "--avg", "2",
        "--output", str(tmp_path / "avg"), *options)  # fmt: skip
    model = SpeechLLM.from_pretrained(tmp_path / "avg")
    if not options:
        states = [load_checkpoint(sharded / f"checkpoint-{n}.pt")["model"] for n in (10, 12)]
        mean = sum(s["llm.head.weight"].double() for s in states) / 2
        torch.testing.assert_close(model.llm.head.weight.detach().double(), mean, rtol=0, atol=1e-7)


def test_a_lost_share_is_named(sharded, tmp_path):
    (tmp_path / "checkpoint-12.pt").write_bytes((sharded / "checkpoint-12.pt").read_bytes())
    result = run(sys.executable, "tools/average_ckpt.py", "--output", str(tmp_path / "avg"),
                 str(tmp_path / "checkpoint-12.pt"), check=False)  # fmt: skip
    assert result.returncode == 1 and "checkpoint-12.rank-1.pt: no such checkpoint" in result.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "one process only"),
        (["--optim.name", "scaled_adam"], "scaled_adam looks at whole tensors"),
        (["--use-fp16"], "use bf16"),
    ],
)
def test_what_cannot_be_sharded_is_an_error(experiment, tmp_path, settings, said):
    result = run(*command(experiment, tmp_path, "--train.fsdp", "true", *settings), check=False)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr
