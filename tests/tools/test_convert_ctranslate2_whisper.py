"""A small Whisper, written here in CTranslate2's format, comes out as the one it was."""

import json
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from speechllm.encoder import load_encoder

PROGRAM = Path(__file__).parents[2] / "tools" / "convert_ctranslate2_whisper.py"
# As many tokens as the multilingual one, so that what depends on languages is converted too.
VOCAB = 51865
TYPES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=32,
        max_source_positions=1500,
        max_target_positions=20,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for name, x in model.named_parameters():
        if "embed_positions" not in name:
            torch.nn.init.normal_(x, std=0.2)
    return model


def variables_of(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Its weights under CTranslate2's names, in its way of stacking."""
    config, weights = model.config, model.state_dict()
    found = {"encoder/num_heads": config.encoder_attention_heads, "decoder/num_heads": config.decoder_attention_heads}
    found = {name: torch.tensor(value, dtype=torch.int16) for name, value in found.items()}
    found["decoder/embeddings/weight"] = weights["model.decoder.embed_tokens.weight"]

    def linear(name: str, *parts: str) -> None:
        found[f"{name}/weight"] = torch.cat([weights[f"{part}.weight"] for part in parts])
        sizes = [len(weights[f"{part}.weight"]) for part in parts]
        biases = [weights.get(f"{part}.bias", torch.zeros(size)) for part, size in zip(parts, sizes, strict=True)]
        found[f"{name}/bias"] = torch.cat(biases)

    def norm(name: str, own: str) -> None:
        found[f"{name}/gamma"], found[f"{name}/beta"] = weights[f"{own}.weight"], weights[f"{own}.bias"]

    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        found[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(layers):
            to, own = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            linear(f"{to}/self_attention/linear_0", *(f"{own}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{to}/self_attention/linear_1", f"{own}.self_attn.out_proj")
            norm(f"{to}/self_attention/layer_norm", f"{own}.self_attn_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{own}.fc1")
            linear(f"{to}/ffn/linear_1", f"{own}.fc2")
            norm(f"{to}/ffn/layer_norm", f"{own}.final_layer_norm")
            if side == "decoder":
                linear(f"{to}/attention/linear_0", f"{own}.encoder_attn.q_proj")
                linear(f"{to}/attention/linear_1", *(f"{own}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{to}/attention/linear_2", f"{own}.encoder_attn.out_proj")
                norm(f"{to}/attention/layer_norm", f"{own}.encoder_attn_layer_norm")
    for name in ("conv1", "conv2"):
        for leaf in ("weight", "bias"):
            found[f"encoder/{name}/{leaf}"] = weights[f"model.encoder.{name}.{leaf}"]
    return found


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def write(folder: Path, variables: dict[str, torch.Tensor], version: int = 6, kind: str = "WhisperSpec") -> Path:
    content = struct.pack("<I", version) + string(kind) + struct.pack("<II", 3, len(variables))
    for name, x in variables.items():
        data = x.contiguous().numpy().tobytes()
        content += string(name) + struct.pack(f"<B{x.dim()}I", x.dim(), *x.shape)
        content += struct.pack("<BI", TYPES[x.dtype], len(data)) + data
    content += struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    return folder


def test_the_same_model(convert, whisper, tmp_path):
    source = write(tmp_path / "ct2", variables_of(whisper))
    printed = convert(source, tmp_path / "hf")
    assert f"{sum(p.numel() for p in whisper.parameters()):,} parameters in torch.float32" in printed
    assert "has no tokenizer.json" in printed
    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    for name, x in whisper.state_dict().items():
        assert torch.equal(converted.state_dict()[name], x), name
    assert converted.config.decoder_attention_heads == 4 and converted.config.decoder_start_token_id == 50258
    features, ids = torch.randn(2, 80, 3000), torch.tensor([[50258, 1, 2], [50258, 3, 4]])
    with torch.no_grad():
        logits = [model(features, decoder_input_ids=ids).logits for model in (whisper, converted)]
    torch.testing.assert_close(*logits)
    encoder = load_encoder(tmp_path / "hf")
    assert torch.equal(encoder.layers[1].fc1.weight, whisper.model.encoder.layers[1].fc1.weight)
    assert not list((tmp_path / "hf").glob("*.bin"))


def test_half_precision_and_quantized_matrices(convert, whisper, tmp_path):
    variables = {name: x.half() if x.is_floating_point() else x for name, x in variables_of(whisper).items()}
    convert(write(tmp_path / "half", variables), tmp_path / "half-hf")
    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "half-hf", dtype="auto")
    assert converted.dtype == torch.float16
    assert torch.equal(converted.model.encoder.conv2.weight, whisper.model.encoder.conv2.weight.half())

    variables = variables_of(whisper)
    for name in [name for name in variables if "linear" in name and name.endswith("weight")]:
        scale = 127 / variables[name].abs().amax(1)
        variables[f"{name}_scale"] = scale
        variables[name] = (variables[name] * scale[:, None]).round().to(torch.int8)
    scale = torch.tensor(1000.0)
    embeddings = variables["decoder/embeddings/weight"]
    variables |= {
        "decoder/embeddings/weight": (embeddings * scale).round().to(torch.int16),
        "decoder/embeddings/weight_scale": scale,
    }
    convert(write(tmp_path / "int8", variables), tmp_path / "int8-hf")
    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "int8-hf", dtype="auto")
    assert converted.dtype == torch.float32
    for name, x in whisper.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], x, rtol=0, atol=float(x.abs().max()) / 127)


def test_tokenizer_and_what_is_not_to_be_written(convert, whisper, tmp_path):
    source = write(tmp_path / "ct2", variables_of(whisper))
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = "<|endoftext|> <|startoftranscript|> <|en|> <|de|> <|translate|> <|transcribe|> <|startofprev|>"
    tokenizer.add_special_tokens([*special.split(), "<|notimestamps|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [220], "alignment_heads": [[0, 1]]}
    (source / "config.json").write_text(json.dumps(settings))
    assert "no tokenizer" not in convert(source, tmp_path / "hf")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [1, 2] and generation["begin_suppress_tokens"] == [220]
    assert generation["alignment_heads"] == [[0, 1]] and generation["is_multilingual"]
    assert generation["lang_to_id"] == {"<|en|>": 6, "<|de|>": 7}
    assert generation["task_to_id"] == {"transcribe": 9, "translate": 8}
    assert generation["no_timestamps_token_id"] == 11
    processor = WhisperProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer("ab", add_special_tokens=False).input_ids == [2]
    assert processor(np.zeros(16000), sampling_rate=16000, return_tensors="pt").input_features.shape == (1, 80, 3000)


def missing(variables):
    del variables["encoder/layer_0/ffn/linear_0/bias"]


def unknown(variables):
    variables["encoder/layer_0/gate/weight"] = torch.ones(2, 2)


def biased_keys(variables):
    variables["encoder/layer_0/self_attention/linear_0/bias"] = torch.ones(48)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (missing, "missing .*encoder.layers.0.fc1.bias"),
        (unknown, "not known .*gate"),
        (biased_keys, "encoder/layer_0/self_attention/linear_0/bias: has a bias for the keys"),
    ],
)
def test_other_models(convert, whisper, tmp_path, change, said):
    variables = variables_of(whisper)
    change(variables)
    with pytest.raises(SystemExit, match=f"model.bin: .*{said}"):
        convert(write(tmp_path / "ct2", variables), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_files_that_are_none(convert, whisper, tmp_path):
    variables = variables_of(whisper)
    with pytest.raises(SystemExit, match="kind TransformerSpec, and no Whisper"):
        convert(write(tmp_path / "other", variables, kind="TransformerSpec"), tmp_path / "hf")
    with pytest.raises(SystemExit, match="version 3 of CTranslate2's format"):
        convert(write(tmp_path / "old", variables, version=3), tmp_path / "hf")
    short = write(tmp_path / "short", variables) / "model.bin"
    short.write_bytes(short.read_bytes()[:-30000])
    with pytest.raises(SystemExit, match="is damaged"):
        convert(tmp_path / "short", tmp_path / "hf")
    with pytest.raises(SystemExit, match="No such file"):
        convert(tmp_path / "absent", tmp_path / "hf")
    (tmp_path / "hf").mkdir()
    with pytest.raises(SystemExit, match="hf exists; --force"):
        convert(tmp_path / "other", tmp_path / "hf")
