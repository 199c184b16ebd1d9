"""The type that a language model's weights are kept in, and in which it computes.

What trains in place is float32: steps of an optimizer are smaller than half precision can tell. What does not may be
kept as its checkpoint has it. Adapters, a trained initial state and the recurrent state are float32 in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speechllm.llm.adapters import ADAPTER_PARTS
from speechllm.llm.interface import TunableModel

DTYPES = ("float32", "bfloat16", "float16")


def base_dtype(name: str | None, trains: bool, on_gpu: bool) -> torch.dtype | None:
    """The type to load a checkpoint in: None for its own.

    Args:
      name: of `DTYPES`, if one is asked for. If None it is the checkpoint's own on a GPU, and float32 on a CPU, few of
        which compute as fast in half precision.
      trains: whether the weights train in place.
      on_gpu: where the model is to compute.
    """
    if name is not None:
        return getattr(torch, name)
    return None if on_gpu and not trains else torch.float32


def half_precision() -> str:
    """The half precision of this machine's GPU: bfloat16, or float16 on one that does not have that (before Ampere)."""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def convert(model: TunableModel, dtype: torch.dtype) -> None:
    """Convert the weights of a model to another type, in place.

    Those stay as they are that have another type than most: adapters, an initial state, quantized matrices, what a
    checkpoint has in float32 among half precision; and what the model wants in float32 whatever the others are.
    """
    kept = model.kept_in_float32()
    common = model.dtype
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        is_plain = type(parameter.data) is Tensor and parameter.dtype == common
        if is_plain and not (parts & ADAPTER_PARTS or any(part in name for part in kept)):
            parameter.data = parameter.data.to(dtype)
