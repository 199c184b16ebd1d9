import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechllm.encoder import ZipformerConfig, load_encoder, save_encoder
from speechllm.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "zipformer" / "three_stacks"
WEIGHTS = load_file(GOLDEN / "model.safetensors")
CONFIG = json.loads((GOLDEN / "config.json").read_text())


WHISPER = {
    "num_mel_bins": 80, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "max_source_positions": 1500,
}  # fmt: skip


def check(path):
    encoder = load_encoder(path)
    assert not encoder.training and encoder.config.encoder_dim == CONFIG["encoder_dim"]
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32
        if name != "model_batch_count":
            assert torch.equal(value, WEIGHTS[name].float()), name
    assert all(p.requires_grad for p in encoder.parameters())
    return encoder


def write(folder, content, config=CONFIG, name="pretrained.pt"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (save_file if name.endswith(".safetensors") else torch.save)(content, folder / name)
    return folder


def prefixed(prefix):
    return {prefix + k: v for k, v in WEIGHTS.items()}


OTHERS = {"joiner.output_linear.weight": torch.zeros(3, 3), "decoder.embedding.weight": torch.zeros(2, 2)}
# The heads of icefall's zipformer recipe, and what its train.py writes beside the model.
TRANSDUCER = {**OTHERS, "simple_am_proj.weight": torch.zeros(3, 3), "simple_lm_proj.bias": torch.zeros(3)}
CTC = {"ctc_output.1.weight": torch.zeros(3, 3), "ctc_output.1.bias": torch.zeros(3)}
ATTENTION = {"attention_decoder.decoder.layers.0.self_attn.in_proj.weight": torch.zeros(3, 3)}
TRAINING_STATE = {
    "optimizer": {"state": {0: {"delta": torch.zeros(2)}}, "param_groups": [{"lr": 0.045}]},
    "scheduler": {"base_lrs": [0.045], "epoch": 3},
    "grad_scaler": {"scale": 1.0},
    "sampler": None,
    "exp_dir": Path("zipformer/exp"),
    "batch_idx_train": 4000,
    "best_valid_loss": float("inf"),
    "env_info": {"icefall-git-date": None, "torch-cuda-available": True},
}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model": prefixed("module."), "optimizer": {"state": {}}},
        {"model": {**WEIGHTS, **TRANSDUCER}},
        {"model": {**WEIGHTS, **CTC}},
        {"model": {**WEIGHTS, **TRANSDUCER, **CTC, **ATTENTION}},
        {**TRAINING_STATE, "model": {**prefixed("module."), **TRANSDUCER}, "model_avg": WEIGHTS},
        {**prefixed("encoder."), **OTHERS},
        {**prefixed("module.speech_encoder."), "llm.weight": torch.zeros(2)},
        {"state_dict": {**prefixed("audio_encoder."), "encoder.weight": torch.zeros(2)}},
    ],
    ids=[
        "bare",
        "state_dict",
        "module",
        "transducer",
        "ctc",
        "attention",
        "checkpoint",
        "encoder",
        "speech_encoder",
        "audio_encoder",
    ],  # fmt: skip
)
def test_layouts(tmp_path, content):
    check(write(tmp_path, content))


def test_files_and_formats(tmp_path):
    check(GOLDEN)
    check(GOLDEN / "model.safetensors")
    half = {k: v.half() for k, v in WEIGHTS.items()}
    encoder = load_encoder(write(tmp_path, half, name="model.pt"))
    assert all(torch.equal(v, half[k].float()) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("name", ["encoder", "speech_encoder", "audio_encoder"])
def test_composite_config(tmp_path, name):
    config = {"model_type": "tta", f"{name}_config": CONFIG, "vocab_size": 500}
    check(write(tmp_path, prefixed(f"{name}."), config, "model.safetensors"))


def test_icefall_weights_have_no_batch_count(tmp_path):
    weights = {k: v for k, v in WEIGHTS.items() if k != "model_batch_count"}
    encoder = check(write(tmp_path, {"model": weights}))
    assert encoder.model_batch_count == 100000
    assert encoder.encoder_embed.dropout.value == pytest.approx(0.1)


def test_sizes_take_the_place_of_an_absent_config(tmp_path):
    """As icefall releases its models: exp/pretrained.pt, and in the README the options that it was trained with."""
    weights = {k: v for k, v in WEIGHTS.items() if k != "model_batch_count"}
    folder = write(tmp_path / "release", {"model": {**weights, **TRANSDUCER}})
    sizes = ZipformerConfig.from_dict(CONFIG)
    assert load_encoder(folder, sizes).config == sizes  # they say the same
    with pytest.raises(UserError, match=r"contradicts .*release/config.json \(num_heads: \[8, 8, 8\], there \["):
        load_encoder(folder, dataclasses.replace(sizes, num_heads=[8]))
    (folder / "config.json").unlink()
    for path in (folder, folder / "pretrained.pt"):
        encoder = load_encoder(path, sizes)
        assert encoder.config == sizes and encoder.model_batch_count == 100000
        with pytest.raises(FileNotFoundError, match=r"config.json: .*model.encoder.zipformer, whose keys .*icefall's"):
            load_encoder(path)
    with pytest.raises(ValueError, match="encoder_embed.out.weight: .* in the file, .* in the model"):
        load_encoder(folder, dataclasses.replace(sizes, subsampling_channels=[8, 32, 64]))
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper", **WHISPER}))
    with pytest.raises(UserError, match="is that of a Whisper, but model.encoder.zipformer gives"):
        load_encoder(folder, sizes)


class Pickled:
    """Something that only executing its pickle could read."""


def test_nothing_in_a_file_is_executed(tmp_path):
    with pytest.raises(UserError, match="would have to be executed .* icefall's zipformer/export.py"):
        load_encoder(write(tmp_path, {"model": WEIGHTS, "params": Pickled()}))


def test_one_error_names_everything_that_does_not_fit(tmp_path):
    weights = dict(WEIGHTS)
    del weights["encoder_embed.out.bias"]
    weights["encoder.extra"] = torch.zeros(1)
    weights["encoder_embed.out_norm.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as e:
        load_encoder(write(tmp_path, weights))
    for part in (
        "missing: encoder_embed.out.bias",
        "unexpected: encoder.extra",
        "out_norm.bias: (7,)",
    ):
        assert part in str(e.value)


def test_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no encoder weights"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="hold no Zipformer"):
        load_encoder(write(tmp_path / "llm", {"emb.weight": torch.zeros(2)}))
    (tmp_path / "alone").mkdir()
    shutil.copy(GOLDEN / "model.safetensors", tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_encoder(tmp_path / "alone")
    folder = write(tmp_path / "cut", WEIGHTS)
    data = (folder / "pretrained.pt").read_bytes()
    (folder / "pretrained.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is it complete"):
        load_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_encoder(folder)


def test_save_and_load(tmp_path):
    encoder = load_encoder(GOLDEN)
    encoder.set_batch_count(123)
    save_encoder(encoder, tmp_path / "out")
    again = check(tmp_path / "out")
    assert again.config == encoder.config and again.model_batch_count == 123
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
