"""Half precision of models of transformers on the CPU: what PyTorch's autocast does slowly there, done otherwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from speechllm.linear import converted

# Positions up to which the backward pass of PyTorch's attention takes longer in half precision than in float32: several
# times as long over some 50, no longer over 500.
_SHORT = 256


def autocast_on_cpu(device: torch.device) -> AbstractContextManager[object]:
    """Inside autocast on the CPU, the context to compute a forward pass in; elsewhere one that does nothing.

    Frozen matrices are converted once, not in every pass; attention over few positions is computed in float32.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    return _Autocast(torch.get_autocast_dtype("cpu"))


class _Autocast(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and not args[1].requires_grad:
            args = (args[0], converted(args[1], self.dtype), *args[2:])
        elif func is F.scaled_dot_product_attention and _learns_from_few(*args[:3]):
            return _attention_in_float32(self.dtype, *args, **kwargs)
        return func(*args, **kwargs)


def _learns_from_few(*tensors: Tensor) -> bool:
    """Whether attention of a query, keys and values has a backward pass, and few positions."""
    return (
        len(tensors) == 3
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in tensors)
        and max(x.shape[-2] for x in tensors) <= _SHORT
    )


def _attention_in_float32(
    dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.float()
        query, key, value = query.float(), key.float(), value.float()
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **kwargs).to(dtype)
