"""GGUF files as llama.cpp's converter writes them, of tiny models."""

import json
from pathlib import Path

import gguf
from torch import nn

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # types of tokens


def write_gguf(path: Path, causal_lm: nn.Module, tokenizer_folder: Path, kind: str = "F32") -> None:
    """Write a Llama, Qwen 2 or Qwen 3 with a tokenizer of `tests.hf_tokenizers`; `kind`: a type of GGML."""
    config, arch = causal_lm.config, causal_lm.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}  # transformers 5, 4.57
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer_folder, config.vocab_size, arch)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, weight in causal_lm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # llama.cpp rotates neighbors, not halves
            n = heads if "q_proj" in name else kv_heads
            weight = weight.view(n, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
        data = weight.detach().float().numpy()
        type_of = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")),
            gguf.quants.quantize(data, type_of),
            raw_dtype=type_of,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, arch: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    eos = eos["content"] if isinstance(eos, dict) else eos
    ids = dict(content["model"]["vocab"])
    kinds = dict.fromkeys(ids, _NORMAL)
    kinds |= {piece: _BYTE for piece in ids if piece.startswith("<0x")}
    for token in content["added_tokens"]:
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = _CONTROL if token["special"] else _USER_DEFINED
    tokens = sorted(ids, key=ids.__getitem__)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    writer.add_tokenizer_model("llama" if arch == "llama" else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, 5) for token in tokens])
    if arch == "llama":
        rank = {pair.replace(" ", ""): -float(i) for i, pair in enumerate(merges)}
        writer.add_token_scores([rank.get(token, -1e4) for token in tokens])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
    else:
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(merges)
    writer.add_eos_token_id(ids[eos])
