import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from speechllm import SpeechLLM
from speechllm.llm.adapters import TuneConfig
from speechllm.model.config import LLMSection
from speechllm.model.encoder_model import EncoderModel
from speechllm.rwkv7 import load_rwkv7, save_rwkv7

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "rwkv7" / "small" / "model.pth"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["convert_rwkv.py", *map(str, args)])
        runpy.run_path(str(REPOSITORY / "tools" / "convert_rwkv.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_to_a_folder_and_back(convert, tmp_path):
    printed = convert(GOLDEN, tmp_path / "hf")
    assert re.search(
        r"3 layers, width 128, heads of 64, channel mix 512, vocabulary 160, ranks: decay 32, a 32, v 16, gate 48",
        printed,
    )
    count = sum(p.numel() for p in load_rwkv7(GOLDEN).parameters())
    assert f"{count:,} parameters" in printed and f"wrote {tmp_path / 'hf'}" in printed
    convert(tmp_path / "hf", tmp_path / "back.pth")
    original, back = (torch.load(path, weights_only=True) for path in (GOLDEN, tmp_path / "back.pth"))
    assert original.keys() - back.keys() <= {f"blocks.0.att.v{i}" for i in range(3)}
    for name, x in back.items():
        assert x.dtype == original[name].dtype and torch.equal(x, original[name]), name


def test_precision(convert, tmp_path):
    assert "torch.bfloat16" in convert(GOLDEN, tmp_path / "hf", "--dtype", "bfloat16")
    expected = load_rwkv7(GOLDEN, torch.bfloat16).state_dict()
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "hf" / "config.json").read_text()
    for name, x in load_rwkv7(tmp_path / "hf", dtype=None).state_dict().items():
        assert x.dtype == torch.bfloat16 and torch.equal(x, expected[name]), name


def test_overwrites_only_when_told(convert, tmp_path):
    target = tmp_path / "there.pth"
    target.write_text("precious")
    with pytest.raises(SystemExit, match="there.pth exists; --force"):
        convert(GOLDEN, target)
    assert target.read_text() == "precious"
    convert(GOLDEN, target, "--force")
    assert load_rwkv7(target).config == load_rwkv7(GOLDEN).config


def test_nothing_is_written_on_errors(convert, tmp_path, capsys):
    weights = torch.load(GOLDEN, weights_only=True)
    weights["head.weight"][0, 0] = 1e6
    torch.save(weights, tmp_path / "large.pth")
    with pytest.raises(SystemExit, match="large.pth: not finite in torch.float16: head.weight"):
        convert(tmp_path / "large.pth", tmp_path / "hf", "--dtype", "float16")
    with pytest.raises(SystemExit, match="absent.pth: no such file"):
        convert(tmp_path / "absent.pth", tmp_path / "hf")
    with pytest.raises(SystemExit):
        convert(GOLDEN, tmp_path / "x.safetensors")
    assert "give a name ending in .pth, or a folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["large.pth"]


MATRICES = [f"blocks.{i}.att.{name}" for i in range(3) for name in ("receptance", "output")]


def adapter_files(folder):
    """A LoRA, MiSS and a tuned state of RWKV-PEFT, as small as can be; the weights that the LoRA makes with alpha 8."""
    weights = load_rwkv7(GOLDEN).state_dict()
    torch.manual_seed(0)
    lora = {f"{m}.lora_{part}": torch.randn(*(2, 128) if part == "A" else (128, 2)) for m in MATRICES for part in "AB"}
    torch.save(lora, folder / "lora.pth")
    torch.save({f"{m}.disha": torch.randn(2, 128) for m in MATRICES}, folder / "miss.pth")
    torch.save({f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}, folder / "state.pth")
    return {m: weights[f"{m}.weight"] + 4 * lora[f"{m}.lora_B"] @ lora[f"{m}.lora_A"] for m in MATRICES}


def test_adapters_of_rwkv_peft(convert, tmp_path):
    expected = adapter_files(tmp_path)
    assert "counts with alpha 8" in convert(tmp_path / "lora.pth", tmp_path / "lora", "--alpha", "8")
    assert "counts with alpha 8" in convert(tmp_path / "lora", tmp_path / "back.pth")
    convert(tmp_path / "miss.pth", tmp_path / "miss")
    convert(tmp_path / "miss", tmp_path / "miss-back.pth")
    for one, other in (("lora", "back"), ("miss", "miss-back")):
        a, b = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
    for adapter, alpha in ((tmp_path / "lora.pth", ("--alpha", "8")), (tmp_path / "lora", ())):
        target = tmp_path / "merged.pth"
        convert(GOLDEN, target, "--adapter", adapter, *alpha, "--dtype", "float32", "--force")
        merged = load_rwkv7(target).state_dict()
        for name, weight in load_rwkv7(GOLDEN).state_dict().items():
            torch.testing.assert_close(merged[name], expected.get(name.removesuffix(".weight"), weight))


def test_tuned_states_of_rwkv_peft(convert, tmp_path):
    adapter_files(tmp_path)
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    assert "a tuned state of 3 layers, 2 heads of 64" in convert(tmp_path / "state.pth", tmp_path / "state.safetensors")
    convert(tmp_path / "state.pth", tmp_path / "folder")  # for llm.adapter
    for i, source in enumerate(("state.safetensors", "folder")):
        convert(tmp_path / source, tmp_path / f"{i}.pth")
        back = torch.load(tmp_path / f"{i}.pth", weights_only=True)
        assert back.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in back.items())
    printed = convert(GOLDEN, tmp_path / "merged.pth", "--adapter", tmp_path / "state.pth", "--dtype", "bfloat16")
    assert "torch.bfloat16" in printed
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert merged["head.weight"].dtype == torch.bfloat16  # and the state in float32
    assert all(torch.equal(x, merged[name]) for name, x in state.items())
    convert(tmp_path / "merged.pth", tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == merged.keys()


def test_errors_about_adapters_write_nothing(convert, tmp_path, capsys):
    adapter_files(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in (
        ((tmp_path / "lora.pth", tmp_path / "lora"), "scale of a LoRA is not in its file"),
        ((tmp_path / "lora.pth", tmp_path / "x.pth", "--alpha", "8"), "is RWKV-PEFT's already"),
        ((tmp_path / "miss.pth", tmp_path / "x", "--alpha", "8"), "this is MiSS, which has no scale"),
        ((GOLDEN, tmp_path / "x", "--adapter", tmp_path / "state.pth"), "a Hugging Face folder has no place"),
        ((GOLDEN, tmp_path / "x", "--alpha", "8"), "--alpha: is for a LoRA"),
        ((tmp_path / "lora.pth", tmp_path / "x", "--alpha", "0"), "alpha: 0, but it must be positive"),
        ((tmp_path / "lora.pth", tmp_path / "x", "--alpha", "nan"), "alpha: nan, but it must be positive"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(*arguments)
    for arguments, message in (
        ((tmp_path / "state.pth", tmp_path / "x", "--dtype", "bfloat16"), "--dtype: is for models"),
        ((tmp_path / "state.pth", tmp_path / "x", "--alpha", "8"), "--alpha: is for a LoRA; SOURCE is a tuned state"),
        ((tmp_path / "miss.pth", tmp_path / "x.safetensors"), "files are not written"),
    ):
        with pytest.raises(SystemExit):
            convert(*arguments)
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("how", ["whole", "merged", "apart", "state"])
def test_the_language_model_of_a_trained_model(convert, model, model_config, tmp_path, how):
    """As official weights, it computes what it does with its adapter; a tuned state is in the file, too."""
    torch.manual_seed(0)
    save_rwkv7(model.llm, tmp_path / "base.pth")
    if how != "whole":
        tune = TuneConfig(method="state") if how == "state" else TuneConfig(method="lora", rank=2)
        section = LLMSection(path=str(tmp_path / "base.pth"), tune=tune)
        model = SpeechLLM.from_config(dataclasses.replace(model_config, llm=section))
        for parameter in model.llm.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(tmp_path / "model", merged=how != "apart")
    convert(tmp_path / "model", tmp_path / "out.pth")
    ids = torch.randint(0, 200, (2, 9))
    expected, _ = model.llm(input_ids=ids, state=model.llm.initial_state(2) if how == "state" else None)
    exported = load_rwkv7(tmp_path / "out.pth")
    assert (exported.initial_wkv is not None) == (how == "state")
    logits, _ = exported(input_ids=ids, state=exported.initial_state(2) if how == "state" else None)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_rwkv7_is_refused(convert, model_config, tmp_path):
    EncoderModel.from_config(dataclasses.replace(model_config, llm=None)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="the language model is none, not RWKV-7"):
        convert(tmp_path / "model", tmp_path / "out.pth")
