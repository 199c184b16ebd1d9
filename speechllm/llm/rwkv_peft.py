"""Adapter files of RWKV-PEFT (https://github.com/JL-er/RWKV-PEFT): read as, and written from, adapters of ``peft``.

A file, `rwkv-EPOCH.pth`, is a state dict with the names of the model:

| method | per matrix | its difference to the weight (out, in) |
|---|---|---|
| LoRA | `lora_A` (rank, in), `lora_B` (out, rank) | alpha / rank * B A; alpha is in no file |
| PiSSA | the same, and in `init_pissa.pth` beside it `init_lora_A`, `init_lora_B` | B A - B0 A0 |
| MiSS, before that DiSHA and Bone | `disha` (rank, out) | its columns, over and over along `in` |
| state tuning | `time_state` (H, V, K) | none: `speechllm.rwkv7.RWKV7State` reads it |

Besides, RWKV-PEFT trains the norms in full by default (`--train_parts`): they are in the same file, and replace the
base's.
Newer versions of it write folders of ``peft``, which need nothing of this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.quiet import quiet
from speechllm.weights import read_rwkv_pth

if TYPE_CHECKING:
    from peft import PeftConfig

PISSA_START = "init_pissa.pth"

_PART = re.compile(r"(.+)\.(lora_A|lora_B|disha|miss_block)(\.default)?(\.weight)?")
_UNKNOWN_PARTS = {
    "bone": "Bone, whose formula changed with the version of RWKV-PEFT: merge it with your merge_bone.py",
    "lora_magnitude_vector": "DoRA: give the folder of PEFT that it is in",
    "init_lora_A": f"the start of a PiSSA ({PISSA_START}): give the rwkv-N.pth that was trained from it",
}
_OTHER_VERSIONS = ("time_maa", "time_mix", "time_faaaa", "time_first", "time_decay")  # RWKV-4 to 6
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PEFT_PREFIX = "base_model.model."


@dataclass
class Adapter:
    """What is in a file of RWKV-PEFT.

    Attributes:
      config, weights: of the adapter, as ``peft`` stores them.
      replaced: weights of the base that were trained in full, by their names in the model.
    """

    config: PeftConfig
    weights: dict[str, Tensor]
    replaced: dict[str, Tensor]


def is_state(path: Path) -> bool:
    """Whether a .pth file holds a tuned state, and so no adapter."""
    return any(name.endswith(".att.time_state") for name in read_rwkv_pth(path))


@quiet()
def read(path: Path, base: dict[str, Tensor] | None = None, alpha: float | None = None) -> Adapter:
    """An adapter in a file of RWKV-PEFT.

    Args:
      base: weights of the model that it is for, to be checked against; they may be on the meta device.
      alpha: LoRA's, as RWKV-PEFT's `lora_alpha`.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is no adapter, or not of this base; its scale cannot be known; the message says which.
    """
    import peft

    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"{path}: alpha: {alpha:g}, but it must be positive: give RWKV-PEFT's lora_alpha")
    tensors = read_rwkv_pth(path)
    parts: dict[str, dict[str, Tensor]] = {}  # of each matrix
    replaced = {}
    for name, tensor in tensors.items():
        _check_known(name, path)
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2].replace("miss_block", "disha")] = tensor.float()
        else:
            replaced[name] = tensor
    if not parts:
        hint = "it is a whole model: give it as llm.path" if "emb.weight" in replaced else "it holds none"
        raise UserError(f"{path}: expected an adapter of RWKV-PEFT (lora_A and lora_B, or disha), but {hint}")
    if base is not None:
        _check_base(parts, replaced, base, path)
    rank = _rank(parts, path)
    targets = sorted({_BLOCK.sub(r"\2", name) for name in parts})
    is_miss = any("disha" in part for part in parts.values())
    config: PeftConfig
    start = path.parent / PISSA_START
    if is_miss:
        if alpha is not None:
            raise UserError(f"{path}: alpha: is LoRA's; this is MiSS, which has no scale")
        config = peft.MissConfig(r=rank, target_modules=targets)
        weights = {f"{name}.miss_block": part["disha"] for name, part in parts.items()}
    else:
        if start.is_file():
            if alpha is not None:
                raise UserError(f"{path}: alpha: is LoRA's; {start.name} beside it says that this is PiSSA")
            _subtract_start(parts, start, path)
            rank = alpha = 2 * rank
        elif alpha is None:
            raise UserError(
                f"{path}: the scale of a LoRA is not in its file: give alpha, RWKV-PEFT's lora_alpha "
                f"(model.llm.adapter_alpha, or --alpha); if it is a PiSSA, put its training's {PISSA_START} beside it"
            )
        number: Any = int(alpha) if alpha == int(alpha) else alpha  # peft says int, and computes with any number
        config = peft.LoraConfig(r=rank, lora_alpha=number, target_modules=targets)
        weights = {f"{name}.{key}.weight": x for name, part in parts.items() for key, x in part.items()}
    return Adapter(config, {_PEFT_PREFIX + name: x for name, x in weights.items()}, replaced)


def write(config: PeftConfig, weights: dict[str, Tensor], path: Path) -> float | None:
    """Writes an adapter of ``peft`` as RWKV-PEFT does.

    Returns:
      the alpha to give RWKV-PEFT with it, None for MiSS.

    Raises:
      UserError: RWKV-PEFT has no such method.
    """
    import peft

    alpha: float | None
    variant = "use_dora", "rank_pattern", "alpha_pattern"
    if type(config) is peft.LoraConfig and not any(getattr(config, name) for name in variant):
        alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1.0)
    elif isinstance(config, peft.MissConfig) and config.init_weights is True:
        alpha = None
    else:
        name = "DoRA" if getattr(config, "use_dora", False) else type(config).__name__.removesuffix("Config")
        raise UserError(f"{path}: RWKV-PEFT has no {name} of this form: merge it into its base (--adapter)")
    tensors = {}
    for name, tensor in weights.items():
        name = name.removeprefix(_PEFT_PREFIX).removesuffix(".weight").replace(".miss_block", ".disha")
        tensors[name] = tensor.detach().cpu().contiguous()
    with replaced_file(path) as tmp:
        torch.save(tensors, tmp)
    return alpha


def _check_known(name: str, path: Path) -> None:
    last = next((part for part in _UNKNOWN_PARTS if part in name.split(".")), None)
    if last is not None:
        raise UserError(f"{path}: {name} is of {_UNKNOWN_PARTS[last]}")
    if any(mark in name for mark in _OTHER_VERSIONS):
        raise UserError(f"{path}: {name} is of RWKV-4, 5 or 6; only RWKV-7 (x070) is supported")


def _check_base(
    parts: dict[str, dict[str, Tensor]], replaced: dict[str, Tensor], base: dict[str, Tensor], path: Path
) -> None:
    """Refuses an adapter of a model with other sizes, with the first names that do not fit."""
    layers, own = _num_layers(parts), _num_layers(base)
    if layers != own:
        raise UserError(f"{path}: is for a model of {layers} layers; the base has {own}: it is not its adapter")
    problems = [f"unexpected: {name}" for name in replaced if name not in base]
    problems += [
        f"{name}: {tuple(x.shape)} in the file, {tuple(base[name].shape)} in the base"
        for name, x in replaced.items()
        if name in base and x.shape != base[name].shape
    ]
    for name, part in parts.items():
        weight = base.get(f"{name}.weight")
        if weight is None:
            problems.append(f"unexpected: {name}, a matrix that the base does not have")
            continue
        sizes = {"lora_A": (1, 1), "lora_B": (0, 0), "disha": (1, 0)}  # axis of the part, and of the weight (out, in)
        problems += [
            f"{name}.{key}: {tuple(x.shape)} in the file, but the base's weight is {tuple(weight.shape)}"
            for key, x in part.items()
            if x.dim() == 2 and x.shape[sizes[key][0]] != weight.shape[sizes[key][1]]
        ]
    if problems:
        shown = "\n  ".join(problems[:10])
        raise UserError(f"{path}: the adapter does not fit the model:\n  {shown}")


def _num_layers(names: Iterable[str]) -> int:
    return len({match[1] for match in map(_BLOCK.fullmatch, names) if match})


def _rank(parts: dict[str, dict[str, Tensor]], path: Path) -> int:
    """The one rank of all matrices; an error where one lacks a half, or has another rank."""
    ranks = {}
    for name, part in parts.items():
        if set(part) not in ({"disha"}, {"lora_A", "lora_B"}):
            raise UserError(f"{path}: {name} has {' and '.join(part)}; expected lora_A and lora_B, or disha")
        if any(x.dim() == 3 for x in part.values()):
            raise UserError(
                f"{path}: {name}.disha has 3 dimensions: DiSHA's mode bat depends on the weights of its base, and is "
                "not kept apart from them here: merge it with RWKV-PEFT's merge_disha.py, and give the merged model"
            )
        own = part["disha"].shape[0] if "disha" in part else part["lora_A"].shape[0]
        if "lora_B" in part and part["lora_B"].shape[1] != own:
            raise UserError(
                f"{path}: {name}: lora_A has rank {own}, lora_B {part['lora_B'].shape[1]}: they are not of one adapter"
            )
        ranks[name] = own
    if len(set(ranks.values())) > 1:
        (one, a), (other, b) = list({rank: (name, rank) for name, rank in ranks.items()}.values())[:2]
        raise UserError(f"{path}: {one} has rank {a}, {other} {b}: RWKV-PEFT's adapters have one rank")
    return next(iter(ranks.values()))


def _subtract_start(parts: dict[str, dict[str, Tensor]], start: Path, path: Path) -> None:
    """Makes of PiSSA's B A - B0 A0 a LoRA of twice the rank, in place: (B, -B0) (A; A0)."""
    begun = read_rwkv_pth(start)
    for name, part in parts.items():
        a, b = begun.get(f"{name}.init_lora_A"), begun.get(f"{name}.init_lora_B")
        if a is None or b is None:
            raise UserError(f"{start}: lacks {name}.init_lora_A or init_lora_B: it is not the start of {path.name}")
        if a.shape != part["lora_A"].shape or b.shape != part["lora_B"].shape:
            raise UserError(
                f"{start}: {name}.init_lora_A has shape {tuple(a.shape)}, lora_A in {path.name} "
                f"{tuple(part['lora_A'].shape)}: it is not the start of {path.name}"
            )
        part["lora_A"] = torch.cat((part["lora_A"], a.float()), dim=0)
        part["lora_B"] = torch.cat((part["lora_B"], -b.float()), dim=1)
