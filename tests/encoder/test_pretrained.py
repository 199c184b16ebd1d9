import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechllm.encoder import ZipformerConfig, load_encoder, save_encoder
from speechllm.encoder.pretrained import mix_released
from speechllm.encoder.zipformer import Zipformer
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
        {"state_dict": prefixed("model."), "loops": {}},
        {"state_dict": {**prefixed("model.encoder."), "model.decoder.weight": torch.zeros(2)}},
        prefixed("_orig_mod.module."),
        prefixed("module._orig_mod."),
        {**WEIGHTS, 3: torch.zeros(2)},
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
        "lightning",
        "lightning_composite",
        "compiled",
        "distributed",
        "numbered",
    ],  # fmt: skip
)
def test_layouts(tmp_path, content):
    check(write(tmp_path, content))


# What Lightning writes beside the weights, and the metrics of Zipformer_Lightning's model among them.
LIGHTNING = {
    "epoch": 3, "global_step": 4000, "pytorch-lightning_version": "2.4.0", "loops": {"fit_loop": {"state_dict": {}}},
    "callbacks": {"ModelCheckpoint{'monitor': 'avg_valid_loss'}": {"best_model_path": "epoch=3-step=4000.ckpt"}},
    "optimizer_states": [{"state": {0: {"delta": torch.zeros(2)}}}], "lr_schedulers": [{"last_epoch": 3}],
}  # fmt: skip
TRANSDUCER_LIGHTNING = {
    "decoder.embedding.weight": torch.zeros(2, 2),
    "jointer.output_linear.weight": torch.zeros(3, 3),
    "avg_train_loss.mean_value": torch.zeros(()),
}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_zipformer_lightning(tmp_path, prefix):
    """Its sizes are in a HyperPyYAML file, which is a program; they are given as those of icefall's models."""
    weights = prefixed(prefix)
    del weights[f"{prefix}model_batch_count"]
    torch.save({**LIGHTNING, "state_dict": {**weights, **TRANSDUCER_LIGHTNING}}, tmp_path / "epoch=3-step=4000.ckpt")
    encoder = load_encoder(tmp_path / "epoch=3-step=4000.ckpt", ZipformerConfig.from_dict(CONFIG))
    assert all(torch.equal(encoder.state_dict()[k], v.float()) for k, v in WEIGHTS.items() if k != "model_batch_count")
    with pytest.raises(FileNotFoundError, match="epoch=3-step=4000.ckpt: give the file itself"):
        load_encoder(tmp_path, ZipformerConfig.from_dict(CONFIG))


def test_checkpoints_of_zhu_han_speechllm(tmp_path):
    """epoch-N-avg-M.pt: the encoder, where it was trained, beside an adapter of peft and the projector."""
    others = {
        "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 2),
        "encoder_projector.proj.1.weight": torch.zeros(2, 2),
        "prompt_embedding.weight": torch.zeros(4, 2),
    }
    weights = {k: v for k, v in prefixed("encoder.").items() if "batch_count" not in k}
    torch.save({"model": {**weights, **others}}, tmp_path / "epoch-10-avg-5.pt")
    sizes = ZipformerConfig.from_dict(CONFIG)
    encoder = load_encoder(tmp_path / "epoch-10-avg-5.pt", sizes)
    assert all(torch.equal(encoder.state_dict()[k], v.float()) for k, v in WEIGHTS.items() if k != "model_batch_count")
    torch.save({"model": others}, tmp_path / "frozen.pt")  # where it was not, nothing of it is in the file
    with pytest.raises(UserError, match="frozen.pt: the weights hold no Zipformer"):
        load_encoder(tmp_path / "frozen.pt", sizes)


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


def test_a_released_config_has_keys_of_the_framework_that_wrote_it(tmp_path):
    """As Auden and transformers' save_pretrained write it, alone and in a composite model."""
    written = {"architectures": ["ZipformerEncoderModel"], "torch_dtype": "float32", "transformers_version": "4.50.0",
               "auden_version": "0.1.0", "_name_or_path": "encoder", "id2label": {"0": "a"}}  # fmt: skip
    check(write(tmp_path / "alone", WEIGHTS, {**CONFIG, **written}, "model.safetensors"))
    config = {
        "model_type": "asr",
        "encoder_config": {**CONFIG, **written},
        "decoder_dim": 512,
        "use_ctc": True,
        **written,
    }
    check(write(tmp_path / "asr", {**prefixed("encoder."), **OTHERS}, config))
    with pytest.raises(UserError, match="config.json: .* unknown key encoder_dims, did you mean encoder_dim?"):
        load_encoder(write(tmp_path / "typo", WEIGHTS, {**CONFIG, **written, "encoder_dims": [1]}))


def test_shapes_of_a_released_encoder(tmp_path):
    """AudenAI/auden-encoder-tta-m10: with the keys that Auden leaves to its defaults absent, it has its shapes."""
    config = {
        "model_type": "zipformer", "num_encoder_layers": [2, 2, 4, 5, 4, 2],
        "encoder_dim": [192, 256, 512, 768, 512, 256], "feedforward_dim": [576, 768, 1536, 2304, 1536, 768],
        "architectures": ["ZipformerEncoderModel"], "auden_version": "0.1.0",
    }  # fmt: skip
    shapes = json.loads((GOLDEN.parent / "tta_m10_shapes.json").read_text())
    with torch.device("meta"):
        encoder = Zipformer(ZipformerConfig.from_dict(config))
    assert {name: list(t.shape) for name, t in encoder.state_dict().items()} == shapes


def test_other_encoders_are_named(tmp_path):
    with pytest.raises(UserError, match="model_type: 'wenet-transformer'; encoders are 'zipformer'"):
        load_encoder(write(tmp_path, WEIGHTS, {"model_type": "wenet-transformer", "output_size": 512}))
    with pytest.raises(UserError, match="model_type: 'wenet-transformer'"):
        config = {"model_type": "asr", "encoder_config": {"model_type": "wenet-transformer", "output_size": 512}}
        load_encoder(write(tmp_path, WEIGHTS, config))
    with pytest.raises(UserError, match="config.json: is not a JSON object"):
        load_encoder(write(tmp_path, WEIGHTS, [1]))


def test_an_encoder_in_a_folder_of_a_composite_model(tmp_path):
    """As Auden saves it where the composite model's own file leaves it out."""
    write(tmp_path, {"llm.weight": torch.zeros(2)}, {"model_type": "lalm", "audio_encoder_config": CONFIG}, "model.pt")
    write(tmp_path / "audio_encoder", WEIGHTS, name="model.safetensors")
    check(tmp_path)


class Joined(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 610000000\n"


def test_files_that_hold_no_tensors_are_named(tmp_path):
    """TorchScript, torch.export and ONNX, as icefall and sherpa release them, whatever their names."""
    torch.jit.script(Joined()).save(tmp_path / "jit_script.pt")
    torch.export.save(torch.export.export(Joined(), (torch.zeros(2),)), tmp_path / "exported.pt2")
    (tmp_path / "encoder.int8.onnx").write_bytes(ONNX)
    (tmp_path / "model.bin").write_bytes(ONNX)
    (tmp_path / "encoder.ncnn.param").write_text("7767517\n")
    (tmp_path / "encoder.ncnn.bin").write_bytes(bytes(64))
    (tmp_path / "pointer.pt").write_bytes(LFS)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    kinds = {
        "jit_script.pt": "is a TorchScript model .*exp/pretrained.pt.*/export.py without --jit",
        "exported.pt2": "is a program exported by torch.export",
        "encoder.int8.onnx": "is an ONNX model",
        "model.bin": "is an ONNX model",
        "model.gguf": "is a GGUF file",
        "encoder.ncnn.bin": "is an ncnn model",
        "pointer.pt": "is a Git LFS pointer.*git lfs pull",
    }
    for name, message in kinds.items():
        with pytest.raises(UserError, match=f"{name}: {message}"):
            load_encoder(tmp_path / name)
    with pytest.raises(
        FileNotFoundError, match=r"no encoder weights; .* encoder.int8.onnx \(an ONNX model\).*pretrained"
    ):
        load_encoder(tmp_path)
    (tmp_path / "pretrained.pt").write_bytes((tmp_path / "jit_script.pt").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="pretrained.pt: is a TorchScript model"):
        load_encoder(tmp_path)


def test_the_folder_of_an_icefall_release_says_where_its_weights_are(tmp_path):
    write(tmp_path / "exp", {"model": WEIGHTS})
    with pytest.raises(FileNotFoundError, match="it holds exp/pretrained.pt: give the file itself"):
        load_encoder(tmp_path)


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


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), "text", None])
def test_a_file_without_names_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=f"pretrained.pt: holds a {type(content).__name__}; expected a state dict"):
        load_encoder(write(tmp_path, content))


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("feature_dim", "80", "a whole number"),
        ("feature_dim", 80.0, "a whole number"),
        ("pos_dim", [48], "a whole number"),
        ("output_downsampling_factor", None, "a whole number"),
        ("dropout", "(0.0, 0.3), (20000.0, 0.1)", "null or a number"),
        ("dropout", {}, "null or a number"),
        ("warmup_batches", "4000", "a number"),
        ("warmup_batches", None, "a number"),
        ("causal", "false", "true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, key, value, allowed):
    with pytest.raises(UserError) as error:
        load_encoder(write(tmp_path, WEIGHTS, {**CONFIG, key: value}))
    assert f"config.json: Zipformer configuration: {key} is {value!r}, but must be {allowed}" in str(error.value)


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


def test_a_share_of_what_was_released():
    torch.manual_seed(0)
    encoder, released = load_encoder(GOLDEN), load_encoder(GOLDEN)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p))
    trained = {name: p.clone() for name, p in encoder.named_parameters()}
    mix_released(encoder, GOLDEN, 0.25)
    theirs = dict(released.named_parameters())
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(p, 0.75 * trained[name] + 0.25 * theirs[name])
    mix_released(encoder, GOLDEN, 1.0)
    assert all(torch.equal(p, theirs[name]) for name, p in encoder.named_parameters())
    larger = dataclasses.replace(encoder.config, feedforward_dim=tuple(2 * n for n in encoder.config.feedforward_dim))
    with pytest.raises(UserError, match="an encoder of another kind or size than the trained one"):
        mix_released(Zipformer(larger), GOLDEN, 0.25)
