#!/usr/bin/env python3
"""Convert a Whisper from CTranslate2's format (faster-whisper) to a Hugging Face folder.

    tools/convert_ctranslate2_whisper.py faster-whisper-tiny.en whisper-tiny.en

SOURCE is a folder with model.bin and, as far as there are any, config.json (what the decoder may not write), and
tokenizer.json. TARGET gets config.json, model.safetensors, preprocessor_config.json, generation_config.json and the
tokenizer: `model.encoder.path` takes it, and transformers' WhisperForConditionalGeneration does. Weights stay in the
precision they are in; those that are quantized become float32.

The format, of which CTranslate2 (https://github.com/OpenNMT/CTranslate2) writes version 6 today, all little-endian:

    u32 version; string name of the specification; u32 its revision
    u32 count of variables; each: string name, u8 rank, u32 x rank shape, u8 type, u32 bytes, data
    u32 count of aliases; each: string alias, string name of a variable

A string is u16 length and that many bytes, the last of them NUL. A quantized matrix has `NAME_scale` beside it: what it
was multiplied by, a row or all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechllm.errors import UserError
from speechllm.files import replaced_folder

VERSIONS = range(4, 7)
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
# Vocabularies of at least so many tokens are those of multilingual models.
MULTILINGUAL_VOCABULARY = 51865
FIRST_LANGUAGE = "<|en|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with model.bin")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace TARGET if it is there")
    args = parser.parse_args()
    if args.target.exists() and not args.force:
        sys.exit(f"error: {args.target} exists; --force replaces it")
    try:
        convert(args.source, args.target)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def convert(source: Path, target: Path) -> None:
    """Write a folder that transformers reads.

    Raises:
        FileNotFoundError: there is no model.bin.
        UserError: it is damaged, or no Whisper.
    """
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_variables(source / "model.bin")
    heads = {side: variables.pop(f"{side}/num_heads", None) for side in ("encoder", "decoder")}
    weights = dict(whisper_weights(variables, source / "model.bin"))
    config = whisper_config(weights, heads)
    dtype = weights["model.encoder.conv1.weight"].dtype
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in missing if name != "proj_out.weight"]  # is the embedding
    if missing or unexpected:
        raise UserError(f"{source / 'model.bin'}: no complete Whisper: missing {missing}, not known {unexpected}")
    model.tie_weights()
    tokenizer = load_tokenizer(source)
    model.generation_config = generation_config(read_json(source / "config.json"), config.vocab_size, tokenizer)
    with replaced_folder(target) as tmp:
        model.save_pretrained(tmp)
        WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(tmp)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
    print(f"wrote {target}: {sum(p.numel() for p in model.parameters()):,} parameters in {dtype}")
    if tokenizer is None:
        print(f"{source} has no tokenizer.json, so {target} has no tokenizer: copy that of the original model into it")


def read_variables(path: Path) -> dict[str, Tensor]:
    """The variables of a model.bin; quantized ones as float32.

    Raises:
        FileNotFoundError: no such file.
        UserError: not such a file, of another version, of another kind of model, or damaged.
    """
    content = bytearray(path.read_bytes())
    place = 0

    def integers(format: str) -> tuple[int, ...]:
        nonlocal place
        values = struct.unpack_from(f"<{format}", content, place)
        place += struct.calcsize(f"<{format}")
        return values

    def string() -> str:
        nonlocal place
        (length,) = integers("H")
        place += length
        return content[place - length : place].rstrip(b"\0").decode("utf-8")

    variables: dict[str, Tensor] = {}
    try:
        (version,) = integers("I")
        if version not in VERSIONS:
            raise UserError(f"{path}: is in version {version} of CTranslate2's format, or in none; known are 4 to 6")
        specification, _, count = string(), *integers("II")
        if specification != "WhisperSpec":
            raise UserError(f"{path}: is a model of the kind {specification}, and no Whisper (WhisperSpec)")
        for _ in range(count):
            name = string()
            shape = integers("I" * integers("B")[0])
            dtype, size = integers("BI")
            if dtype >= len(DTYPES) or math.prod(shape) * DTYPES[dtype].itemsize != size or place + size > len(content):
                raise UserError(f"{path}: {name} is damaged: type {dtype}, shape {shape}, {size} bytes at {place}")
            # cloned, as data are not aligned in the file
            data = torch.frombuffer(content, dtype=torch.uint8, count=size, offset=place).clone()
            variables[name] = data.view(DTYPES[dtype]).reshape(shape)
            place += size
    except (struct.error, UnicodeDecodeError) as e:
        raise UserError(f"{path}: is damaged after {len(variables)} variables, at byte {place} ({e})") from e
    for name in [name for name in variables if name.endswith("_scale")]:
        scale, quantized = variables.pop(name).float(), name.removesuffix("_scale")
        variables[quantized] = variables[quantized].float() / scale.reshape(-1, *[1] * (variables[quantized].dim() - 1))
    return variables


def whisper_weights(variables: dict[str, Tensor], path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Whisper under transformers' names.

    Args:
        path: that the variables are from, for errors.

    Raises:
        UserError: the keys of an attention have a bias, which Whisper's have not.
    """
    for name, x in variables.items():
        if x.dim() == 0:  # settings of the decoding engine, the same for every Whisper
            continue
        *module, last = name.split("/")
        leaf = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(last, last)
        match module:
            case [side, "embeddings"]:
                yield f"model.{side}.embed_tokens.{leaf}", x
            case [side, "position_encodings"]:
                yield f"model.{side}.embed_positions.{leaf}", x
            case [side, ("conv1" | "conv2" | "layer_norm") as part]:
                yield f"model.{side}.{part}.{leaf}", x
            case [side, layer, *inner]:
                for own, value in layer_weights(inner, leaf, x, f"{path}: {name}"):
                    yield f"model.{side}.layers.{layer.removeprefix('layer_')}.{own}", value
            case _:
                yield name, x  # is reported as not known


def layer_weights(module: list[str], leaf: str, x: Tensor, where: str) -> Iterator[tuple[str, Tensor]]:
    """One variable of a layer; CTranslate2 has the projections of queries, keys and values in one matrix."""
    norms = {"self_attention": "self_attn", "attention": "encoder_attn", "ffn": "final"}
    projections = {
        ("self_attention", "linear_0"): ("q_proj", "k_proj", "v_proj"),
        ("self_attention", "linear_1"): ("out_proj",),
        ("attention", "linear_0"): ("q_proj",),
        ("attention", "linear_1"): ("k_proj", "v_proj"),
        ("attention", "linear_2"): ("out_proj",),
    }
    match module:
        case [part, "layer_norm"] if part in norms:
            yield f"{norms[part]}_layer_norm.{leaf}", x
        case ["ffn", ("linear_0" | "linear_1") as linear]:
            yield f"{'fc1' if linear == 'linear_0' else 'fc2'}.{leaf}", x
        case [part, linear] if (part, linear) in projections:
            names = projections[part, linear]
            for name, own in zip(names, x.chunk(len(names)), strict=True):
                if (name, leaf) != ("k_proj", "bias"):
                    yield f"{norms[part]}.{name}.{leaf}", own.contiguous()
                elif own.any():
                    raise UserError(f"{where}: has a bias for the keys of attention, which no Whisper has")
        case _:
            yield "/".join([*module, leaf]), x


def whisper_config(weights: dict[str, Tensor], heads: dict[str, Tensor | None]) -> Any:
    """The WhisperConfig of these weights.

    Args:
        heads: of the attentions of each side; 64 channels each where it is None, as in all released models.
    """
    from transformers import WhisperConfig

    def size(name: str, dim: int) -> int:
        if name not in weights:
            raise UserError(f"no complete Whisper: {name} is missing")
        return weights[name].shape[dim]

    def num_layers(side: str) -> int:
        return len({name.split(".")[3] for name in weights if name.startswith(f"model.{side}.layers.")})

    d_model = size("model.encoder.conv1.weight", 0)
    vocab_size = size("model.decoder.embed_tokens.weight", 0)
    end = 50256 + (vocab_size >= MULTILINGUAL_VOCABULARY)
    num_heads = {side: int(count) if count is not None else d_model // 64 for side, count in heads.items()}
    return WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=size("model.encoder.conv1.weight", 1),
        d_model=d_model,
        encoder_layers=num_layers("encoder"),
        decoder_layers=num_layers("decoder"),
        encoder_attention_heads=num_heads["encoder"],
        decoder_attention_heads=num_heads["decoder"],
        encoder_ffn_dim=size("model.encoder.layers.0.fc1.weight", 0),
        decoder_ffn_dim=size("model.decoder.layers.0.fc1.weight", 0),
        max_source_positions=size("model.encoder.embed_positions.weight", 0),
        max_target_positions=size("model.decoder.embed_positions.weight", 0),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=end + 1,
        architectures=["WhisperForConditionalGeneration"],
    )


def generation_config(settings: dict[str, Any], vocab_size: int, tokenizer: Any) -> Any:
    """What transformers' `generate` asks for: tokens that are not to be written, and the ids of special ones.

    Args:
        settings: CTranslate2's config.json.
        tokenizer: None where there is none: then what depends on it is left out.
    """
    from transformers import GenerationConfig

    multilingual = vocab_size >= MULTILINGUAL_VOCABULARY
    end = 50256 + multilingual
    values = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": end + 1,
        "is_multilingual": multilingual,
        "max_length": 448,
        "return_timestamps": False,
        "suppress_tokens": settings.get("suppress_ids"),
        "begin_suppress_tokens": settings.get("suppress_ids_begin"),
        "alignment_heads": settings.get("alignment_heads"),
    }
    if tokenizer is not None:
        special = tokenizer.get_added_vocab()
        values["no_timestamps_token_id"] = special["<|notimestamps|>"]
        values["prev_sot_token_id"] = special["<|startofprev|>"]
        if multilingual:
            first, last = special[FIRST_LANGUAGE], special["<|translate|>"]
            values["lang_to_id"] = {name: i for name, i in special.items() if first <= i < last}
            values["task_to_id"] = {task: special[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return GenerationConfig(**{name: value for name, value in values.items() if value is not None})


def load_tokenizer(source: Path) -> Any:
    """transformers' tokenizer of a folder's tokenizer.json, None without one."""
    from transformers import WhisperTokenizerFast

    path = source / "tokenizer.json"
    if not path.is_file():
        return None
    end = "<|endoftext|>"
    return WhisperTokenizerFast.from_pretrained(source, bos_token=end, eos_token=end, unk_token=end, pad_token=end)


def read_json(path: Path) -> dict[str, Any]:
    """What a file says.

    Raises:
        UserError: it is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e


if __name__ == "__main__":
    main()
