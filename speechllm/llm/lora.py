"""LoRA and the frozen matrix under it as one operation.

`peft` computes `x W^T + s (x A^T) B^T` operator by operator. Scaling, adding and, in the backward pass, adding up what
reaches the input each pass over tensors as large as the activations, for products of a small rank. Here the products
themselves add to what there is. What is no such sum is computed by `peft`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from speechllm.linear import Linear, converted, product


class _LoRAProduct(torch.autograd.Function):
    """x (M, K), weight (N, K) and bias (N,), both frozen, a (R, K), b (N, R) -> x weight^T + bias + scale x a^T b^T.

    Computed in `dtype`; gradients have the types of what they are for.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.types, ctx.scale = (x.dtype, a.dtype, b.dtype), scale
        x, weight, a, b = x.to(dtype), converted(weight, dtype), a.to(dtype), (scale * b).to(dtype)
        low = x @ a.T
        out = product(x, weight, None if bias is None else bias.to(dtype)).addmm_(low, b.T)
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        ctx.save_for_backward(
            x if needs_a else None, weight if needs_x else None, a if needs_x else None, b, low if needs_b else None
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        x_type, a_type, b_type = ctx.types
        grad = grad.contiguous()
        d_low = grad @ b
        d_x = None if weight is None else product(grad, weight.T).addmm_(d_low, a).to(x_type)
        d_a = None if x is None else (d_low.T @ x).to(a_type)
        d_b = None if low is None else (grad.T @ low).to(b_type).mul_(ctx.scale)
        return d_x, None, None, d_a, d_b, None, None


class LoRALinear(lora.Linear):
    """`peft`'s LoRA of a linear layer, whose training computes as this module says."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., K) -> (..., N); see `peft.tuners.lora.Linear`."""
        name = None if args or kwargs else self._only_adapter()
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        elif x.dtype == base.weight.dtype == a.dtype:
            dtype = x.dtype
        else:
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            out = _LoRAProduct.apply(
                x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, self.scaling[name], dtype
            )
        return out.view(*x.shape[:-1], out.shape[-1])

    def _only_adapter(self) -> str | None:
        """The adapter that is all there is besides a frozen matrix, in training; None if it is not so simple."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not torch.is_grad_enabled() or len(names) != 1 or self.disable_adapters or self.merged:
            return None
        (name,) = names
        base, parts = self.base_layer, (self.base_layer, self.lora_A[name], self.lora_B[name])
        is_plain = (
            type(base) in (nn.Linear, Linear)
            and type(base.weight.data) is Tensor
            and base.weight.is_floating_point()
            and not any(p.requires_grad for p in base.parameters())
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and self.lora_B[name].bias is None
            # whoever listens to these layers hears them
            and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        )
        return name if is_plain else None


def fuse(layer: nn.Module) -> None:
    """Make a layer of `peft` a `LoRALinear` in place, if it is a plain LoRA of a linear layer."""
    if type(layer) is lora.Linear:
        layer.__class__ = LoRALinear
