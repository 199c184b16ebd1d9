"""Averaging as a user asks for it, against means by hand."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from speechllm.config import to_dict
from speechllm.encoder import Zipformer, save_encoder
from speechllm.llm.adapters import TuneConfig, load_adapter
from speechllm.model.config import LLMSection
from speechllm.model.speech_llm import SpeechLLM
from speechllm.rwkv7 import load_rwkv7, save_rwkv7
from speechllm.train.checkpoint import RunningAverage, save_checkpoint, trained_state_dict
from speechllm.weights import file_hash

PROGRAM = Path(__file__).parents[2] / "tools" / "average_ckpt.py"


@pytest.fixture
def average(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    return run


class Run:
    """A training run of 12 steps, of noise: a batch checkpoint every 2 steps, an epoch of 4, every step averaged."""

    def __init__(self, model: SpeechLLM, exp_dir: Path) -> None:
        self.model, self.exp_dir, self.history = model, exp_dir, []
        base_weights = {}
        if path := model.config.llm.path:
            base_weights["llm"] = {"path": path, "sha256": file_hash(path)}
        running_average = RunningAverage(model, period=1)
        for step in range(1, 13):
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(0.1 * torch.randn_like(p))
            running_average.update(step)
            content = {
                "model": trained_state_dict(model),
                "model_avg": running_average.state_dict(),
                "step": step,
                "base_weights": base_weights,
                "config": {"model": to_dict(model.config)},
            }
            self.history.append({name: t.clone() for name, t in content["model"].items()})
            if step % 2 == 0:
                save_checkpoint(exp_dir / f"checkpoint-{step}.pt", content)
            if step % 4 == 0:
                save_checkpoint(exp_dir / f"epoch-{step // 4}.pt", content)

    def mean(self, *steps: int) -> dict[str, torch.Tensor]:
        states = [self.history[step - 1] for step in steps]
        return {
            name: torch.stack([s[name].double() for s in states]).mean(0).to(t.dtype) for name, t in states[-1].items()
        }


@pytest.fixture
def exp(model, tmp_path):
    return Run(model, tmp_path / "exp")


@pytest.fixture
def tuned(model, model_config, tmp_path):
    """A run that trains a LoRA on a frozen language model."""
    for name, p in model.llm.named_parameters():
        if name.endswith(("output.weight", "value.weight")):  # zero in an untrained model
            nn.init.normal_(p, std=0.2)
    save_rwkv7(model.llm, tmp_path / "llm.pth")
    llm = LLMSection(path=str(tmp_path / "llm.pth"), tune=TuneConfig("lora", rank=2))
    return Run(SpeechLLM.from_config(dataclasses.replace(model_config, llm=llm)), tmp_path / "exp")


def files(output: str) -> list[str]:
    return [line.split()[0].rpartition("/")[2] for line in output.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize(
    "args, folder, taken, steps",
    [
        ("--epoch 3 --avg 2", "epoch-3-avg-2", ["epoch-2.pt", "epoch-3.pt"], [8, 12]),
        ("--epoch 2", "epoch-2-avg-1", ["epoch-2.pt"], [8]),
        ("--iter 10 --avg 3", "iter-10-avg-3", [f"checkpoint-{n}.pt" for n in (6, 8, 10)], [6, 8, 10]),
        (
            "--epoch 3 --avg 2 --use-averaged-model",
            "epoch-3-avg-2-use-averaged-model",
            ["epoch-1.pt", "epoch-3.pt"],
            range(5, 13),
        ),
        (
            "--iter 10 --avg 2 --use-averaged-model",
            "iter-10-avg-2-use-averaged-model",
            ["checkpoint-6.pt", "checkpoint-10.pt"],
            range(7, 11),
        ),
    ],
)
def test_the_model_is_the_mean_by_hand(exp, average, args, folder, taken, steps):
    output = average("--exp-dir", exp.exp_dir, *args.split())
    assert files(output) == taken
    assert output.endswith(f"wrote {exp.exp_dir / folder}\n")
    weights = SpeechLLM.from_pretrained(exp.exp_dir / folder).state_dict()
    mean = exp.mean(*steps)
    assert weights.keys() == mean.keys()
    for name, t in mean.items():
        assert weights[name].dtype == t.dtype
        torch.testing.assert_close(weights[name], t, rtol=1e-6, atol=1e-6)


def test_files_in_any_order(exp, average, tmp_path):
    paths = [exp.exp_dir / name for name in ("checkpoint-10.pt", "epoch-1.pt")]
    assert files(average("--output", tmp_path / "mine", *paths)) == ["checkpoint-10.pt", "epoch-1.pt"]
    weights = SpeechLLM.from_pretrained(tmp_path / "mine").state_dict()
    for name, t in exp.mean(4, 10).items():
        torch.testing.assert_close(weights[name], t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("args, steps", [("--iter 8 --avg 2", (6, 8)), ("--iter 8 --use-averaged-model", (7, 8))])
def test_adapters_are_averaged_as_adapters(tuned, average, tmp_path, args, steps):
    """The mean of the factors, which is not the mean of their products; the frozen base is as it was."""
    folder = Path(average("--exp-dir", tuned.exp_dir, *args.split()).split()[-1])
    mean = tuned.mean(*steps)
    factors = {name: t for name, t in mean.items() if ".lora_" in name}
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(stored) == len(factors) > 0
    for name, t in factors.items():
        peft_name = name.replace("llm.", "base_model.model.", 1).replace(".default.", ".")
        torch.testing.assert_close(stored[peft_name], t, rtol=1e-6, atol=1e-6)
    weights = SpeechLLM.from_pretrained(folder)
    ids = torch.arange(12).view(1, 12)
    adapted = load_adapter(load_rwkv7(tmp_path / "llm.pth"), folder / "adapter")
    torch.testing.assert_close(weights.llm(ids)[0], adapted(ids)[0], rtol=1e-4, atol=1e-4)
    base = load_rwkv7(tmp_path / "llm.pth").state_dict()
    frozen = [name for name in base if ".lora_" not in name and name.split(".")[-2] in ("emb", "ln_out", "head")]
    assert frozen and all(torch.equal(weights.llm.state_dict()[name], base[name]) for name in frozen)


def test_a_share_of_the_released_encoder(exp, average, tmp_path):
    """Of each of its weights, and of nothing else."""
    zipformer = exp.model.encoder.config
    released = Zipformer(zipformer)
    save_encoder(released, tmp_path / "released")
    mixed = ["--released-share", 0.25, "--released", tmp_path / "released", "--output", tmp_path / "mixed"]
    average("--exp-dir", exp.exp_dir, "--iter", 4, *mixed)
    mean, theirs = exp.mean(4), dict(released.named_parameters())
    found = SpeechLLM.from_pretrained(tmp_path / "mixed").state_dict()
    for name, t in mean.items():
        of_encoder = theirs.get(name.removeprefix("encoder.")) if name.startswith("encoder.") else None
        expected = t if of_encoder is None else 0.75 * t + 0.25 * of_encoder
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(SystemExit, match="--released-share: the run began with no released encoder: name one by"):
        average("--exp-dir", exp.exp_dir, "--iter", 4, "--released-share", 0.25)


def test_other_base_weights(tuned, average, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "llm.pth")
    with pytest.raises(SystemExit, match=r"error: \S*llm.pth: not the llm that \S*epoch-2.pt was trained on"):
        average("--exp-dir", tuned.exp_dir, "--epoch", 2)
    path = tuned.exp_dir / "epoch-1.pt"
    content = torch.load(path)
    content["base_weights"]["llm"]["sha256"] = "0"
    torch.save(content, path)
    with pytest.raises(SystemExit, match=r"error: \S*epoch-1.pt: was trained on other base weights than \S*epoch-2.pt"):
        average("--exp-dir", tuned.exp_dir, "--epoch", 2, "--avg", 2)
    assert not [p for p in tuned.exp_dir.iterdir() if p.suffix != ".pt"]


def test_what_cannot_be_averaged(exp, average, tmp_path):
    with pytest.raises(SystemExit, match=r"error: \S*exp: no epoch-4.pt; there: epoch-1.pt, epoch-2.pt, epoch-3.pt$"):
        average("--exp-dir", exp.exp_dir, "--epoch", 4)
    path = exp.exp_dir / "epoch-2.pt"
    content = torch.load(path)
    content["config"]["model"]["llm"] = None
    torch.save(content, path)
    with pytest.raises(SystemExit, match="error: --no-merge: there is no language model"):
        average("--exp-dir", exp.exp_dir, "--epoch", 2, "--avg", 1, "--no-merge")
    del content["model_avg"]
    torch.save(content, path)
    with pytest.raises(SystemExit, match=r"error: \S*epoch-2.pt: holds no running average"):
        average("--exp-dir", exp.exp_dir, "--epoch", 3, "--use-averaged-model")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"error: \S*epoch-2.pt: cannot be read"):
        average("--exp-dir", exp.exp_dir, "--epoch", 3, "--avg", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: \S*file/model: cannot be written: .* GB free there"):
        average("--exp-dir", exp.exp_dir, "--epoch", 3, "--output", tmp_path / "file" / "model")


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "give --exp-dir with --epoch or --iter, or FILES with --output"),
        ("--exp-dir exp", "give --exp-dir with"),
        ("--epoch 1", "give --exp-dir with"),
        ("--exp-dir exp --epoch 1 --iter 1", "not allowed with"),
        ("a.pt", "FILES need --output"),
        ("a.pt --output b --avg 2", "FILES go with --output alone"),
        ("a.pt b.pt --output c --use-averaged-model", "FILES go with --output alone"),
        ("a.pt --output b --released-share 1.5", "--released-share: from 0 to 1, got 1.5"),
        ("a.pt --output b --released c", "--released goes with --released-share"),
    ],
)
def test_arguments_that_do_not_go_together(average, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        average(*args.split())
    assert message in capsys.readouterr().err
