import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from speechllm.rwkv7 import load_rwkv7

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
