"""Weights: official files, Hugging Face folders, what is refused, memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7, save_rwkv7

GOLDEN = Path(__file__).parents[1] / "golden" / "rwkv7"
OFFICIAL = GOLDEN / "small" / "model.pth"
HF = GOLDEN / "hf"  # shards and configuration as rwkv7-hf and transformers wrote them


@pytest.fixture
def weights():
    return torch.load(OFFICIAL, weights_only=True)


@pytest.fixture
def hf(tmp_path):
    """A folder to change: the golden one in one file."""
    folder = tmp_path / "hf"
    save_rwkv7(load_rwkv7(HF, dtype=None), folder)
    return folder


def save(weights, tmp_path):
    torch.save(weights, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    weights = {name: x.clone() for name, x in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors")


def assert_same(a: RWKV7, b: RWKV7):
    assert a.config == b.config
    for name, x in a.state_dict().items():
        y = b.state_dict()[name]
        assert x.dtype == y.dtype and torch.equal(x, y), name


def random_model(config, dtype=torch.float32):
    """No parameter is constant, so that any two that are swapped or transposed are told apart."""
    model = RWKV7(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.to(dtype)


def test_sizes_come_from_the_tensors():
    model = load_rwkv7(OFFICIAL)
    ranks = {"decay": 32, "a": 32, "v": 16, "gate": 48}
    assert model.config == RWKV7Config(3, 128, 160, head_size=64, ffn_size=512, lora_ranks=ranks)
    assert not model.training and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert load_rwkv7(OFFICIAL, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_the_unused_values_of_block_0_may_be_absent_or_there(weights, tmp_path):
    for i in range(3):
        weights.pop(f"blocks.0.att.v{i}", None)
    without = load_rwkv7(save(weights, tmp_path))
    for i in range(3):
        weights[f"blocks.0.att.v{i}"] = torch.zeros(1)
    assert_same(load_rwkv7(save(weights, tmp_path)), without)


def test_a_model_of_one_layer(tmp_path):
    model = random_model(RWKV7Config(1, 32, 11, head_size=16))
    assert load_rwkv7(save(model.state_dict(), tmp_path)).config == model.config
    save_rwkv7(model, tmp_path / "hf")
    change_config(tmp_path / "hf", v_low_rank_dim=7)  # of a layer that is not there
    assert_same(load_rwkv7(tmp_path / "hf"), model)


@pytest.mark.parametrize("file", ["model.pth", "folder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [16, 64])
def test_round_trip_is_exact(tmp_path, file, dtype, head_size):
    ranks = {"decay": 5, "a": 6, "v": 7, "gate": 64}
    model = random_model(RWKV7Config(3, 64, 11, head_size, ffn_size=80, lora_ranks=ranks), dtype)
    save_rwkv7(model, tmp_path / "first" / file)
    again = load_rwkv7(tmp_path / "first" / file, dtype=None)
    assert_same(again, model)
    assert all(p.is_contiguous() for p in again.parameters())
    for other in ("second.pth", "second"):
        save_rwkv7(again, tmp_path / other)
        assert_same(load_rwkv7(tmp_path / other, dtype=None), model)


def test_hugging_face_golden():
    model = load_rwkv7(HF)
    golden = load_file(HF / "io.safetensors")
    logits, _ = model(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() <= 1e-4
    ranks = {"decay": 8, "a": 10, "v": 6, "gate": 12}
    assert model.config == RWKV7Config(2, 64, 40, head_size=64, ffn_size=96, lora_ranks=ranks)


def test_a_saved_folder_has_the_names_shapes_and_keys_of_the_golden_one(hf):
    golden = {name: x for shard in HF.glob("model-*") for name, x in load_file(shard).items()}
    saved = load_file(hf / "model.safetensors")
    assert saved.keys() == golden.keys()
    for name, x in golden.items():
        assert saved[name].dtype == x.dtype and torch.equal(saved[name], x), name
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (hf, HF))
    assert config["architectures"] == expected["architectures"] and config["torch_dtype"] == expected["dtype"]
    for key in ("model_type", "hidden_size", "num_hidden_layers", "head_dim", "num_heads", "value_dim", "vocab_size",
                "intermediate_size", "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim",
                "norm_eps", "norm_bias", "tie_word_embeddings"):  # fmt: skip
        assert config[key] == expected[key], key


def test_mixed_precision_is_kept_by_the_type_that_holds_it_all(hf):
    """rwkv7-hf may keep w0 in float32."""
    name = "model.layers.1.attn.w_lora.lora.2.bias"
    change_weights(hf, lambda w: w.update({name: w[name].float() + 2**-20}))
    model = load_rwkv7(hf, dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[1].att.w0.flatten(), load_file(hf / "model.safetensors")[name])


def test_values_layer_0_has_no_use_for_are_passed_over_in_folders_too(hf):
    expected = load_rwkv7(hf)
    change_weights(hf, lambda w: w.update({"model.layers.0.attn.v_lora.lora.2.bias": torch.zeros(64)}))
    assert_same(load_rwkv7(hf), expected)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("blocks.2.att.x_g"), "missing: blocks.2.att.x_g"),
    (lambda w: w.update({"blocks.1.att.q1": torch.zeros(1)}), "unexpected: blocks.1.att.q1"),
    (lambda w: w.update({"head.weight": torch.zeros(9, 128)}), r"head.weight: \(9, 128\) in the file, \(160,"),
    (lambda w: w.update({"head.weight": torch.zeros(9, dtype=torch.int8)}), r"head.weight \(torch.int8\)"),
    (lambda w: w.pop("blocks.0.att.r_k"), r"not an RWKV-7 \(x070\) checkpoint.*r_k"),
    (lambda w: w.update({"blocks.0.att.r_k": torch.zeros(128)}), "not matrices: blocks.0.att.r_k"),
    (lambda w: w.update({"blocks.0.att.r_k": torch.zeros(2, 48)}), "48 does not divide n_embd"),
    (lambda w: w.update({"blocks.0.att.time_decay": torch.zeros(1)}), "RWKV-4, 5 or 6"),
    (lambda w: w.update({"blocks.0.att.time_first": torch.zeros(1)}), "RWKV-4 "),
    (lambda w: w.update({"blocks.0.att.time_faaaa": torch.zeros(1)}), "RWKV-5"),
    (lambda w: w.update({"blocks.0.att.time_maa_x": torch.zeros(1)}), "RWKV-6"),
    (lambda w: w.update({"blocks.1.ffn.s_emb.weight": torch.zeros(1)}), r"RWKV-7a.*\(blocks.1.ffn.s_emb.weight\)"),
    (lambda w: w.update({f"blocks.0.{x}.weight": torch.zeros(1) for x in ("ffn.s_emb", "qkv.k_emb")}), "RWKV-7b"),
    (lambda w: w.update({f"blocks.0.{x}.weight": torch.zeros(1) for x in ("ffn.enn", "qkv.ennk")}), "RWKV-8 "),
    (lambda w: w.update({"blocks.0.rosa.rosa_qkv.emb": torch.zeros(1)}), r"RWKV-8 \(ROSA\)"),
])  # fmt: skip
def test_what_does_not_fit_is_named(weights, tmp_path, change, message):
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_rwkv7(save(weights, tmp_path))


@pytest.mark.parametrize("values", [
    {"model_type": "rwkv6"},
    {"model_type": "rwkv"},
    {"vocab_size": 41},
    {"hidden_size": 128},
    {"num_hidden_layers": 3},
    {"head_dim": 32},
    {"intermediate_size": 256},
    {"v_low_rank_dim": 8},
    {"gate_low_rank_dim": 8},
    {"value_dim": 128},
    {"value_dim": [64, 128]},
    {"hidden_act": "relu"},
    {"norm_first": False},
    {"norm_bias": False},
    {"norm_eps": 1e-6},
    {"group_norm_eps": 1e-5},
    {"attn": {"layers": [1], "num_heads": 1}},
    {"attention_hidden_size": 128},
    {"tie_word_embeddings": True},
    {"quantization_config": {"bits": 4}},
])  # fmt: skip
def test_a_configuration_that_cannot_be_represented_is_named(hf, values):
    ((key, value),) = values.items()
    change_config(hf, **values)
    with pytest.raises(ValueError) as e:
        load_rwkv7(hf)
    assert "config.json" in str(e.value) and f"{key}: {value!r}" in str(e.value)


def test_a_configuration_may_leave_defaults_out_and_have_other_keys(hf):
    """fla writes a num_heads of 32 when it converts an official file, and reads head_dim."""
    expected = load_rwkv7(hf)
    values = {"num_heads": 32, "fuse_norm": True, "intermediate_size": None, "value_dim": 64, "group_norm_eps": None}
    change_config(hf, **values)
    assert_same(load_rwkv7(hf), expected)
    (hf / "config.json").write_text('{"model_type": "rwkv7"}')
    assert_same(load_rwkv7(hf), expected)


def test_other_heads_than_fla_normalizes_alike(tmp_path):
    save_rwkv7(random_model(RWKV7Config(2, 64, 11, head_size=32)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("group_norm_eps") == 64e-5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="group_norm_eps: 0.00032, .*: 0.00064"):
        load_rwkv7(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("model.layers.1.attn.x_g"), "missing: blocks.1.att.x_g"),
    (lambda w: w.update({"model.layers.1.attn.q": torch.zeros(1)}), "unexpected: model.layers.1.attn.q"),
    (lambda w: w.update({"model.layers.0.attn.x_x": torch.zeros(6, 64)}), "layers.0.attn.x_x: .*early flash-linear"),
    (lambda w: w.pop("lm_head.weight"), "missing: head.weight"),
    (lambda w: w.update({"model.layers.0.attn.g_lora.lora.2.weight": torch.zeros(12, 64)}), r"g2: \(64, 12\) in the"),
])  # fmt: skip
def test_what_does_not_fit_in_a_folder_is_named(hf, change, message):
    change_weights(hf, change)
    with pytest.raises(ValueError, match=message):
        load_rwkv7(hf)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rwkv7(tmp_path / "model.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="text.pth: not a PyTorch checkpoint"):
        load_rwkv7(tmp_path / "text.pth")
    (tmp_path / "cut.pth").write_bytes(OFFICIAL.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.pth: not a PyTorch checkpoint, or a truncated one"):
        load_rwkv7(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        load_rwkv7(save({"model": {}}, tmp_path))


def test_folders_that_are_no_checkpoint(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(HF, folder)
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model-00002.*truncated"):
        load_rwkv7(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002.*index.json names it"):
        load_rwkv7(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json: weight_map"):
        load_rwkv7(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load_rwkv7(folder)
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "model_type: None")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            load_rwkv7(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_rwkv7(folder)


def test_saving_leaves_other_files_and_nothing_half_written(hf, monkeypatch):
    (hf / "tokenizer.json").write_text("{}")
    expected = load_rwkv7(hf)
    other = random_model(RWKV7Config(1, 64, 11))
    monkeypatch.setattr("speechllm.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    for path in (hf, hf / "new.pth"):
        with pytest.raises(OSError, match="disk"):
            save_rwkv7(other, path)
    assert sorted(p.name for p in hf.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same(load_rwkv7(hf), expected)


def test_a_save_killed_between_the_two_files_is_noticed(hf, monkeypatch):
    monkeypatch.setattr(
        "speechllm.rwkv7.checkpoint.json.dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("kill"))
    )
    with pytest.raises(OSError, match="kill"):
        save_rwkv7(random_model(RWKV7Config(1, 64, 11)), hf)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="vocab_size: 40, supported with these weights: 11"):
        load_rwkv7(hf)


def test_a_model_with_other_parameters_is_not_saved(tmp_path):
    model = RWKV7(RWKV7Config(1, 64, 11))
    model.blocks[0].att.key.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="merge adapters first.*key.adapter.weight"):
        save_rwkv7(model, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


# Prints, for each file given, by how many MB memory of its own and the peak of all memory have grown since the start.
MEASURE = """
import sys, torch
from speechllm.rwkv7 import load_rwkv7
def megabytes(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1]) / 1024
load_rwkv7(sys.argv[1])  # what PyTorch imports at first use
own, total = megabytes("RssAnon"), megabytes("VmRSS")
for dtype in (torch.bfloat16, torch.float32):
    for path in sys.argv[2:]:
        model = load_rwkv7(path, dtype)
        print(megabytes("RssAnon") - own, megabytes("VmHWM") - total)
        del model
"""


def test_memory(tmp_path):
    """At the file's own type nothing is copied; at another there is never more than the copy, the file's pages
    (which the system takes back at will) and one tensor."""
    config = RWKV7Config(8, 512, 16384, lora_ranks={"decay": 8, "a": 8, "v": 8, "gate": 8})
    with torch.device("meta"):
        model = RWKV7(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name in ("model.pth", "hf"):
        save_rwkv7(model, tmp_path / name)
    size = (tmp_path / "model.pth").stat().st_size / 2**20
    largest = 4 * model.emb.weight.numel() / 2**20
    del model
    command = [sys.executable, "-c", MEASURE, OFFICIAL, tmp_path / "model.pth", tmp_path / "hf"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4 and size > 75
    for i, line in enumerate(lines):
        own, peak = map(float, line.split())
        if i < 2:
            assert own < 0.1 * size and peak < 0.25 * size, line
        else:
            assert 1.9 * size < own < 2.1 * size and peak < 3 * size + largest + 10, line


def test_the_language_model_in_a_model_of_speech(tmp_path):
    """rwkv_asr's pytorch_model.bin, and the llm_state_dict.pt that it begins with."""
    weights = torch.load(OFFICIAL, weights_only=True)
    expected = load_rwkv7(OFFICIAL).state_dict()
    others = {"projector1.weight": torch.zeros(2), "audio_lm_model.blocks.0.ln1.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "llm_state_dict.pt")
    torch.save({f"llm.{name}": x for name, x in weights.items()} | others, tmp_path / "pytorch_model.bin")
    for name in ("llm_state_dict.pt", "pytorch_model.bin"):
        loaded = load_rwkv7(tmp_path / name).state_dict()
        assert all(torch.equal(x, expected[key]) for key, x in loaded.items())
