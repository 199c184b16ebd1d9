from pathlib import Path

import pytest
import torch

from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7, save_rwkv7

GOLDEN = Path(__file__).parents[1] / "golden" / "rwkv7" / "small" / "model.pth"


@pytest.fixture
def weights():
    return torch.load(GOLDEN, weights_only=True)


def save(weights, tmp_path):
    torch.save(weights, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_sizes_come_from_the_tensors():
    model = load_rwkv7(GOLDEN)
    ranks = {"decay": 32, "a": 32, "v": 16, "gate": 48}
    assert model.config == RWKV7Config(3, 128, 160, head_size=64, ffn_size=512, lora_ranks=ranks)
    assert not model.training and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert load_rwkv7(GOLDEN, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_the_unused_values_of_block_0_may_be_absent(weights, tmp_path):
    for i in range(3):
        del weights[f"blocks.0.att.v{i}"]
    load_rwkv7(save(weights, tmp_path))


def test_a_model_of_one_layer(tmp_path):
    model = RWKV7(RWKV7Config(1, 32, 11, head_size=16))
    assert load_rwkv7(save(model.state_dict(), tmp_path)).config == model.config


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("blocks.2.att.x_g"), "missing: blocks.2.att.x_g"),
    (lambda w: w.update({"blocks.1.att.q1": torch.zeros(1)}), "unexpected: blocks.1.att.q1"),
    (lambda w: w.update({"head.weight": torch.zeros(9, 128)}), r"head.weight: \(9, 128\) in the file, \(160,"),
    (lambda w: w.pop("blocks.0.att.r_k"), r"not an RWKV-7 \(x070\) checkpoint.*r_k"),
    (lambda w: w.update({"blocks.0.att.time_maa_x": torch.zeros(1)}), "RWKV-6"),
    (lambda w: w.update({"blocks.0.att.time_faaaa": torch.zeros(1)}), "RWKV-5"),
    (lambda w: w.update({"blocks.0.ffn.s_emb.weight": torch.zeros(1)}), "RWKV-7a"),
])  # fmt: skip
def test_what_does_not_fit_is_named(weights, tmp_path, change, message):
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_rwkv7(save(weights, tmp_path))


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rwkv7(tmp_path / "model.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="text.pth: not a PyTorch checkpoint"):
        load_rwkv7(tmp_path / "text.pth")
    (tmp_path / "cut.pth").write_bytes(GOLDEN.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.pth: not a PyTorch checkpoint, or a truncated one"):
        load_rwkv7(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        load_rwkv7(save({"model": {}}, tmp_path))


def test_own_folder(tmp_path):
    model = load_rwkv7(GOLDEN)
    save_rwkv7(model, tmp_path / "lm")
    again = load_rwkv7(tmp_path / "lm")
    assert again.config == model.config
    for name, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    assert sorted(p.name for p in (tmp_path / "lm").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "lm" / "config.json").write_text('{"n_layers": 3}')
    with pytest.raises(ValueError, match="config.json.*n_layers"):
        load_rwkv7(tmp_path / "lm")
    (tmp_path / "lm" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_rwkv7(tmp_path / "lm")
