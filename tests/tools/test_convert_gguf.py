"""Small Llama and Qwen models, written here as GGUF, come out as folders that train."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf")
PROGRAM = Path(__file__).parents[2] / "tools" / "convert_gguf.py"
WIDTH, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyzĠ", "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    return run


def write(path: Path, architecture: str, quantized: bool) -> dict[str, np.ndarray]:
    """Writes a model with random weights, its matrices in Q8_0 where `quantized`; the weights as they are read."""
    rng = np.random.default_rng(0)
    head = WIDTH // HEADS
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (WIDTH, WIDTH),
            "attn_k.weight": (KV_HEADS * head, WIDTH),
            "attn_v.weight": (KV_HEADS * head, WIDTH),
            "attn_output.weight": (WIDTH, WIDTH),
            "ffn_norm.weight": (WIDTH,),
            "ffn_gate.weight": (FFN, WIDTH),
            "ffn_up.weight": (FFN, WIDTH),
            "ffn_down.weight": (WIDTH, FFN),
        }
        if architecture == "qwen2":
            layer |= {"attn_q.bias": (WIDTH,), "attn_k.bias": (KV_HEADS * head,), "attn_v.bias": (KV_HEADS * head,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    weights = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape).astype(np.float32) * 0.1
        if quantized and len(shape) == 2:
            packed = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            x = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, x)
        weights[name] = x
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize(("architecture", "quantized"), [("llama", True), ("qwen2", True), ("qwen2", False)])
def test_a_plain_folder(convert, tmp_path, architecture, quantized):
    weights = write(tmp_path / "small.gguf", architecture, quantized)
    printed = convert(tmp_path / "small.gguf", tmp_path / "hf", "--dtype", "float32")
    assert f"{'Llama' if architecture == 'llama' else 'Qwen2'}ForCausalLM" in printed
    assert "quantization_config" not in (tmp_path / "hf" / "config.json").read_text()
    assert [path.name for path in (tmp_path / "hf").glob("*.*t*r*s")] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.float32
    ours = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj.weight,
        "blk.1.attn_v.weight": model.model.layers[1].self_attn.v_proj.weight,
    }
    for name, x in ours.items():
        np.testing.assert_array_equal(x.detach().numpy(), weights[name])
    # llama.cpp has the rotated halves of each head's rows of queries and keys interleaved, in Llama
    q = weights["blk.0.attn_q.weight"]
    if architecture == "llama":
        q = q.reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)
    np.testing.assert_array_equal(model.model.layers[0].self_attn.q_proj.weight.detach().numpy(), q)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("the the the", add_special_tokens=False).input_ids
    assert [TOKENS[i] for i in ids] == ["the", "Ġthe", "Ġthe"] and tokenizer.decode(ids) == "the the the"
    assert tokenizer.eos_token == "<|im_end|>"

    ids = torch.tensor([ids])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "again")


def test_precision(convert, tmp_path):
    weights = write(tmp_path / "small.gguf", "llama", quantized=False)
    assert "torch.bfloat16" in convert(tmp_path / "small.gguf", tmp_path / "hf")
    embedding = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").model.embed_tokens.weight
    assert torch.equal(embedding, torch.from_numpy(weights["token_embd.weight"]).bfloat16())


def test_mistakes(convert, tmp_path):
    (tmp_path / "none.gguf").write_bytes(b"RIFF, and more")
    with pytest.raises(SystemExit, match="none.gguf: no GGUF file"):
        convert(tmp_path / "none.gguf", tmp_path / "hf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(SystemExit, match="short.gguf: transformers cannot read it"):
        convert(tmp_path / "short.gguf", tmp_path / "hf")
    with pytest.raises(SystemExit, match="No such file"):
        convert(tmp_path / "absent.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
