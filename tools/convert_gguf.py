#!/usr/bin/env python3
"""Convert a language model from GGUF (llama.cpp) to a Hugging Face folder: Llama, Qwen and what transformers reads so.

    tools/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m-instruct
    tools/convert_gguf.py qwen2.5-0.5b-instruct-q8_0.gguf qwen2.5-0.5b-instruct --dtype float32

TARGET gets config.json, model.safetensors (or its shards), the tokenizer and generation_config.json, as of a model that
was never quantized: it can be trained, adapted and loaded like any other, as `model.llm.path`. What quantization has
lost stays lost. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from speechllm.errors import UserError
from speechllm.files import replaced_folder

MAGIC = b"GGUF"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help=".gguf file")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="precision to write (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace TARGET if it is there")
    args = parser.parse_args()
    if args.target.exists() and not args.force:
        sys.exit(f"error: {args.target} exists; --force replaces it")
    try:
        convert(args.source, args.target, getattr(torch, args.dtype))
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a folder that transformers reads.

    Raises:
        FileNotFoundError: no such file.
        UserError: it is no GGUF, transformers cannot read its kind of model, or values are not finite in `dtype`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed, with which transformers reads such files: pip install gguf")
    with source.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{source}: no GGUF file (it does not start with {MAGIC.decode()})")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as e:  # transformers raises many kinds for what it cannot read
        raise UserError(f"{source}: transformers cannot read it: {type(e).__name__}: {e}") from e
    # Into one that is not marked as quantized: transformers refuses to train or to save those that are.
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    config = type(model.config).from_dict(values)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.to(dtype)
    infinite = [name for name, x in plain.named_parameters() if not x.isfinite().all()]
    if infinite:
        raise UserError(f"{source}: not finite in {dtype}: {', '.join(infinite[:5])}; nothing is written")
    with replaced_folder(target) as tmp:
        plain.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
    count = sum(p.numel() for p in plain.parameters())
    print(f"wrote {target}: {type(plain).__name__}, {count:,} parameters in {dtype}, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
