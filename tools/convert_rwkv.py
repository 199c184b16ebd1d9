#!/usr/bin/env python3
"""Convert RWKV-7 weights, adapters and tuned states between the forms that programs of RWKV have.

    tools/convert_rwkv.py rwkv7-g1-0.1b-20250307-ctx4096.pth rwkv7-g1-0.1b    # for transformers with fla
    tools/convert_rwkv.py rwkv7-g1-0.1b rwkv7-g1-0.1b.pth                     # for rwkv, RWKV-LM, RWKV-Runner
    tools/convert_rwkv.py rwkv7-g1-0.1b.pth float32.pth --dtype float32       # the same form in another precision

    tools/convert_rwkv.py exp/iter-2200-avg-5 tuned.pth                       # of a model that was trained here

    tools/convert_rwkv.py rwkv-0.pth adapter --alpha 32                       # an adapter of RWKV-PEFT, for peft
    tools/convert_rwkv.py adapter rwkv-0.pth                                  # and back, for RWKV-PEFT
    tools/convert_rwkv.py state.safetensors state.pth                         # a tuned state for RWKV-PEFT, and back
    tools/convert_rwkv.py base.pth merged.pth --adapter rwkv-0.pth --alpha 32 # adapter or state, merged into its base

A folder of a model is in the naming of flash-linear-attention (config.json, model.safetensors or its shards). Without
--dtype every weight stays as it is, bit for bit. Of a model of speech (a folder with config.yaml) the language model is
taken, with its adapter merged into it: rwkv.cpp, web-rwkv, llama.cpp and others convert the .pth to their own forms.
Tokenizer files are not converted: copy them into the folder. A PiSSA of RWKV-PEFT needs its init_pissa.pth beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from speechllm.errors import UserError
from speechllm.llm.adapters import convert_adapter, load_adapter, merged_state_dict
from speechllm.model.build import load_model
from speechllm.rwkv7 import RWKV7, load_rwkv7, save_rwkv7
from speechllm.rwkv7.state import RWKV7State
from speechllm.weights import read_rwkv_pth

ADAPTER_FILES = ("adapter_config.json", "initial_state.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="model, adapter or tuned state to read: a file or a folder")
    parser.add_argument(
        "target",
        type=Path,
        help="what to write: a name ending in .pth, for a tuned state also .safetensors, or a folder",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the model to write (default: SOURCE's)",
    )
    parser.add_argument("--adapter", type=Path, help="adapter or tuned state to merge into the model SOURCE")
    parser.add_argument(
        "--alpha", type=float, help="RWKV-PEFT's lora_alpha of a LoRA in a .pth file, which does not hold it"
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite TARGET; of a model's folder, only weights and config.json"
    )
    args = parser.parse_args()
    if args.target.exists() and not args.force:
        sys.exit(f"error: {args.target} exists; --force overwrites it")
    try:
        kind = kind_of(args.source)
        suffixes = {".pt", ".bin", ".ckpt"} | (set() if kind == "state" else {".safetensors"})
        if args.target.suffix in suffixes:
            parser.error(f"TARGET: {args.target.suffix} files are not written: give a name ending in .pth, or a folder")
        for option, of_kind in (("dtype", "model"), ("adapter", "model")):
            if getattr(args, option) is not None and kind != of_kind:
                parser.error(f"--{option}: is for models; SOURCE is a tuned state or an adapter")
        if kind == "state" and args.alpha is not None:
            parser.error("--alpha: is for a LoRA; SOURCE is a tuned state, which has no scale")
        if kind == "model":
            convert(args.source, args.target, args.dtype and getattr(torch, args.dtype), args.adapter, args.alpha)
        elif kind == "state":
            convert_state(args.source, args.target)
        else:
            alpha = convert_adapter(args.source, args.target, args.alpha)
            print(f"wrote {args.target}" + ("" if alpha is None else f": a LoRA that counts with alpha {alpha:g}"))
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def kind_of(source: Path) -> str:
    """Whether SOURCE is a "model", an "adapter", or a "state"."""
    if source.is_dir():
        names = [name for name in ADAPTER_FILES if (source / name).is_file()]
        return {(): "model", ADAPTER_FILES[:1]: "adapter"}.get(tuple(names), "state")
    if source.suffix == ".safetensors":
        return "state"
    if not source.is_file():
        return "model"  # whose reader says what is expected
    names = read_rwkv_pth(source)
    if "emb.weight" in names:
        return "model"
    if any(name.endswith(".time_state") for name in names):
        return "state"
    is_adapter = any(part in name for name in names for part in ("lora_", "disha", "bone", "miss_block"))
    return "adapter" if is_adapter else "model"


def convert(
    source: Path, target: Path, dtype: torch.dtype | None, adapter: Path | None = None, alpha: float | None = None
) -> None:
    if alpha is not None and adapter is None:
        raise UserError("--alpha: is for a LoRA, which --adapter merges into a model")
    model = of_speech_model(source, dtype) if (source / "config.yaml").is_file() else load_rwkv7(source, dtype)
    print(f"read {source}: {describe(model)}")
    if adapter is not None:
        model = merged(model, adapter, alpha)
        print(f"merged {adapter}")
    infinite = [name for name, x in model.named_parameters() if not x.isfinite().all()]
    if infinite:
        what = "the source" if dtype is None else dtype
        raise UserError(f"{source}: not finite in {what}: {', '.join(infinite[:5])}; nothing is written")
    save_rwkv7(model, target)
    written = target if target.suffix == ".pth" else target / "model.safetensors"
    print(f"wrote {target}: {written.stat().st_size / 1e6:.1f} MB in {model.emb.weight.dtype}")


def of_speech_model(folder: Path, dtype: torch.dtype | None) -> RWKV7:
    """The language model of a folder that `save_pretrained` wrote, adapter and all, in float32 unless `dtype` says
    otherwise.

    Raises:
        UserError: it has another language model, or none.
    """
    llm = load_model(folder).llm
    if not isinstance(llm, RWKV7):
        raise UserError(f"{folder}: the language model is {'none' if llm is None else llm.name}, not RWKV-7")
    return plain_model(llm.float(), dtype)


def plain_model(model: RWKV7, dtype: torch.dtype | None) -> RWKV7:
    """The model without what it was tuned with, which is merged into it; rounded once, its tuned state not at all."""
    plain = model.untuned()
    plain.load_state_dict(merged_state_dict(model), assign=True)
    state = plain.initial_state(1) if plain.initial_wkv is not None else None
    plain.initial_wkv = None  # stays in float32
    plain = plain.to(dtype)
    if state is not None:
        plain.add_initial_state(state)
    return plain


def merged(model: RWKV7, adapter: Path, alpha: float | None) -> RWKV7:
    """The model that computes what `model` does with an adapter, or from a tuned state, in its precision.

    The sum is taken in float32, and rounded once.
    """
    dtype = model.emb.weight.dtype
    load_adapter(model.float(), adapter, alpha=alpha)
    return plain_model(model, dtype)


def convert_state(source: Path, target: Path) -> None:
    state = RWKV7State.load(source / ADAPTER_FILES[1] if source.is_dir() else source)
    if target.suffix not in {".pth", ".safetensors"}:
        target.mkdir(parents=True, exist_ok=True)
        target = target / ADAPTER_FILES[1]
    state.save(target)
    layers, _, heads, size, _ = state.wkv.shape
    print(f"wrote {target}: a tuned state of {layers} layers, {heads} heads of {size}")


def describe(model: RWKV7) -> str:
    config = model.config
    ranks = ", ".join(f"{name} {rank}" for name, rank in config.lora_ranks.items())
    return (
        f"{config.n_layer} layers, width {config.n_embd}, heads of {config.head_size}, channel mix {config.ffn_size}, "
        f"vocabulary {config.vocab_size}, ranks: {ranks}; {sum(p.numel() for p in model.parameters()):,} parameters"
    )


if __name__ == "__main__":
    main()
