#!/usr/bin/env python3
"""Convert RWKV-7 weights between official .pth files and Hugging Face folders.

    tools/convert_rwkv.py rwkv7-g1-0.1b-20250307-ctx4096.pth rwkv7-g1-0.1b    # for transformers with fla
    tools/convert_rwkv.py rwkv7-g1-0.1b rwkv7-g1-0.1b.pth                     # for rwkv, RWKV-LM, RWKV-Runner
    tools/convert_rwkv.py rwkv7-g1-0.1b.pth float32.pth --dtype float32       # the same form in another precision

A folder is in the naming of flash-linear-attention (config.json, model.safetensors or its shards). Without --dtype
every weight stays as it is, bit for bit. Tokenizer files are not converted: copy them into the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from speechllm.errors import UserError
from speechllm.rwkv7 import RWKV7, load_rwkv7, save_rwkv7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="official .pth file or Hugging Face folder to read")
    parser.add_argument("target", type=Path, help="what to write: a name ending in .pth, or else a folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="precision to write (default: that of SOURCE)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the weights and config.json of TARGET")
    args = parser.parse_args()
    if args.target.suffix in {".pt", ".bin", ".ckpt", ".safetensors"}:
        parser.error(f"TARGET: {args.target.suffix} files are not written: give a name ending in .pth, or a folder")
    if args.target.exists() and not args.force:
        sys.exit(f"error: {args.target} exists; --force overwrites it")
    try:
        convert(args.source, args.target, args.dtype and getattr(torch, args.dtype))
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def convert(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    model = load_rwkv7(source, dtype)
    print(f"read {source}: {describe(model)}")
    infinite = [name for name, x in model.named_parameters() if not x.isfinite().all()]
    if infinite:
        what = "the source" if dtype is None else dtype
        raise UserError(f"{source}: not finite in {what}: {', '.join(infinite[:5])}; nothing is written")
    save_rwkv7(model, target)
    written = target if target.suffix == ".pth" else target / "model.safetensors"
    print(f"wrote {target}: {written.stat().st_size / 1e6:.1f} MB in {model.emb.weight.dtype}")


def describe(model: RWKV7) -> str:
    config = model.config
    ranks = ", ".join(f"{name} {rank}" for name, rank in config.lora_ranks.items())
    return (
        f"{config.n_layer} layers, width {config.n_embd}, heads of {config.head_size}, channel mix {config.ffn_size}, "
        f"vocabulary {config.vocab_size}, ranks: {ranks}; {sum(p.numel() for p in model.parameters()):,} parameters"
    )


if __name__ == "__main__":
    main()
