"""Frozen matrices of a language model in 8 or 4 bits: by bitsandbytes on CUDA, by torchao on the CPU.

The matrices of the layers are quantized, embedding and output layer stay as they are; so do biases and norms.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from speechllm.errors import UserError
from speechllm.llm.interface import TunableModel, is_conv1d, stacked_matrices

QUANTIZED = ("none", "int8", "nf4")


def quantize(model: TunableModel, kind: str) -> None:
    """Replaces the matrices of a model's layers by quantized ones, in place.

    Args:
      kind: ``int8`` or ``nf4``.

    Raises:
      UserError: the package is not installed; a matrix that cannot be quantized, which the message names.
    """
    make = _bitsandbytes_linear if torch.cuda.is_available() else _torchao_linear
    names = {module: name for name, module in model.named_modules()}
    modules = dict.fromkeys(module for layer in model.layers() for module in layer.modules())
    for module in modules:
        if name := _other_matrix(module):
            raise UserError(
                f"tune.quantize: {names[module]}.{name} of {model.name} is no torch.nn.Linear, and no others are "
                "quantized; leave out quantize"
            )
    for module in modules:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.out_features > 1:  # a gate of one row has nothing to save
                try:
                    setattr(module, name, make(child, kind))
                except _DoesNotFit as e:
                    raise UserError(f"tune.quantize: {names[child]} of {model.name}: {e}") from e


class _DoesNotFit(ValueError):
    """A matrix has a size that the package does not quantize."""


def _other_matrix(module: nn.Module) -> str | None:
    """The name of a matrix, or of a stack of matrices (the experts of a layer), that is a parameter of a module which
    keeps its matrices in another way than ``torch.nn.Linear``."""
    if is_conv1d(module):
        return "weight"
    return next(stacked_matrices(module), None)


# 256 scales of 64 weights each are quantized together.
_NF4_BLOCK = 64 * 256


def _torchao_linear(linear: nn.Linear, kind: str) -> nn.Linear:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
    except ImportError as e:
        raise UserError(
            f"tune.quantize: {kind} needs torchao 0.18 or newer on the CPU: pip install 'speechllm[quant]'"
        ) from e
    quantized = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    quantized.bias = linear.bias
    weight = linear.weight.detach()
    if kind == "nf4":
        if weight.numel() % _NF4_BLOCK:
            raise _DoesNotFit(f"nf4 needs a multiple of {_NF4_BLOCK} weights, it has {tuple(weight.shape)}")
        weight = to_nf4(weight)
    quantized.weight = nn.Parameter(weight, requires_grad=False)
    if kind == "int8":
        quantize_(quantized, Int8WeightOnlyConfig())
    return quantized


def _bitsandbytes_linear(linear: nn.Linear, kind: str) -> nn.Linear:
    """Quantized when it is moved to the GPU."""
    try:
        import bitsandbytes as bnb
    except ImportError as e:
        raise UserError(f"tune.quantize: {kind} needs bitsandbytes on CUDA: pip install 'speechllm[gpu]'") from e
    sizes = linear.in_features, linear.out_features
    weight = linear.weight.detach()
    if kind == "nf4":
        quantized = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", device="meta")
        quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
    else:
        quantized = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
        quantized.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantized.bias = linear.bias
    quantized.register_state_dict_post_hook(_drop_scales)
    return quantized


def _drop_scales(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The scales of bitsandbytes are no parameters, but no part of what a checkpoint has to hold either: they come
    from the base."""
    for name in [name for name in state if name.startswith(prefix)]:
        if name in (f"{prefix}weight", f"{prefix}bias"):
            continue
        del state[name]


def dequantized(model: TunableModel, name: str, weight: Tensor) -> Tensor:
    """The entry ``name`` of the model's state dict, in floating point, and the type that it had before ``quantize``."""
    kind = type(weight).__name__
    if kind == "NF4Tensor":  # torchao
        return cast(Any, weight).get_original_weight()
    if kind == "Int8Tensor":
        return weight.dequantize()
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and type(module).__name__ in ("Linear4bit", "Linear8bitLt"):  # bitsandbytes
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).to(model.dtype)
    return weight
