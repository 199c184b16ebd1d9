"""Matrix products of encoder and language model: on the CPU by the library and, for inference, in the layout that is
the fastest there.

PyTorch sends float32 products on the CPU to MKL. oneDNN's are faster on AMD processors with AVX-512 (see
tools/bench_rwkv.py); without it only those of a few rows, and where nothing is transposed. The operators behind
``torch.compile``'s CPU code give access to oneDNN; they are semi-private, so they are tried once and left alone where
they do not work. So are FBGEMM's, with weights in half precision.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from speechllm.errors import UserError
from speechllm.threads import one_thread

log = logging.getLogger(__name__)

INFERENCE_WEIGHTS = ("float32", "bfloat16", "int8")


@lru_cache
@torch.autocast("cpu", enabled=False)
def has_onednn() -> bool:
    """Whether oneDNN's linear operator is there and right; tried on a small product, wherever it is first asked."""
    x, weight = _small_integers()
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        products = [_onednn(x, weight), _onednn(x, packed), _onednn(weight.T.contiguous().T, x)]
    except (AttributeError, RuntimeError) as e:  # this build of PyTorch has no such operator, or it refuses
        log.info("oneDNN's linear operator is not available (%s): using torch's", e)
        return False
    right = all(map(torch.equal, products, (x @ weight.T, x @ weight.T, weight @ x.T)))
    if not right:
        log.warning("oneDNN's linear operator gives wrong results: using torch's")
    return right


def _small_integers() -> tuple[Tensor, Tensor]:
    """(3, 4), (5, 4), of which every product is exact."""
    numbers = torch.arange(-16.0, 16.0, dtype=torch.float32, device="cpu")
    return numbers[:12].view(3, 4), numbers[12:].view(5, 4)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(M, K), (N, K) or packed, (N,) -> (M, N)"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@lru_cache
@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def onednn_transposes() -> bool:
    """Whether oneDNN multiplies transposed matrices faster than MKL does, as backward passes must.

    It depends on the processor. Measured once in a process, in some hundredths of a second, and logged; by one thread,
    as ``fastest_layouts``.
    """
    x, weight, grad = (torch.ones(size, _MEASURED_WIDTH, device="cpu") for size in (128, _MEASURED_WIDTH, 128))
    with one_thread():
        onednn, mkl = (
            min(_time(multiply, grad, weight.T) + _time(multiply, grad.T, x.T) for _ in range(3))
            for multiply in (_onednn, F.linear)
        )
    log.info("transposed products: oneDNN %.1f ms, MKL %.1f ms", 1e3 * onednn, 1e3 * mkl)
    return onednn < mkl


_MEASURED_WIDTH = 768


def _time(multiply: Callable[..., Tensor], *operands: Any) -> float:
    began = perf_counter()
    multiply(*operands)
    return perf_counter() - began


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(M, K), (N, K), (N,) -> (M, N), by oneDNN where it is the faster."""
    by_onednn = weight.stride(-1) == 1 or onednn_transposes()
    return (_onednn if by_onednn else F.linear)(x, weight, bias)


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * weight.shape[0] >= (_WORTH_TRAINING if torch.is_grad_enabled() else _WORTH_A_CALL)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_tracing()  # ONNX has no such operator
        and has_onednn()
    )


# Multiplications below which starting oneDNN, or an autograd.Function with it, takes longer than is gained.
_WORTH_A_CALL = 2**20
_WORTH_TRAINING = 2**23


class _Product(torch.autograd.Function):
    """x (M, K), weight (N, K), bias (N,) -> x weight^T + bias (M, N); ``_multiply`` also in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = _multiply(grad, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = _multiply(grad.T, x.T) if ctx.needs_input_grad[1] else None
        d_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in its fastest way: x (..., K), weight (N, K), bias (N,) -> x weight^T + bias (..., N)."""
    if not _uses_onednn(x, weight):
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and not weight.requires_grad:
            weight = converted(weight, torch.get_autocast_dtype("cpu"))
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, weight, bias)):
        out = _Product.apply(flat, weight, bias)
    else:
        out = _multiply(flat, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in another type; a frozen matrix on the CPU is converted once, and kept beside it as long as it lives.

    PyTorch's autocast converts frozen weights anew in every pass, for it keeps those alone that have a gradient. Who
    writes into a frozen weight does it in PyTorch's usual ways, or by assigning to ``weight.data``; writing into
    ``weight.data`` goes unseen.
    """
    if weight.dtype == dtype:
        return weight
    is_kept = (
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not weight.requires_grad
        and not weight.is_inference()
    )
    if not is_kept:
        return weight.to(dtype)
    known = _CONVERTED.get(weight)
    if known is None or not known.is_of(weight, dtype):
        known = _CONVERTED[weight] = _Conversion(weight.detach(), weight._version, weight.detach().to(dtype))
    return known.result


@dataclass(frozen=True)
class _Conversion:
    """Of a weight: its memory, which no other weight can have as long as this is here, the version of what was in it,
    and that in another type."""

    source: Tensor
    version: int
    result: Tensor

    def is_of(self, weight: Tensor, dtype: torch.dtype) -> bool:
        same = weight.data_ptr() == self.source.data_ptr() and weight._version == self.version
        return same and weight.shape == self.source.shape and dtype == self.result.dtype


_CONVERTED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Linear(nn.Linear):
    """``nn.Linear`` by ``product``."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (M, D), weight (V, D), targets (M,) -> summed cross entropy, number of targets that are the best logit.

    The gradients are computed with the logits at hand, a chunk of positions at a time (the idea of Liger-Kernel,
    arXiv 2410.10989), so the (M, V) logits never exist.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        loss, correct = hidden.new_zeros((), dtype=torch.float32), targets.new_zeros(())
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        compute_weight = converted(weight, dtype)
        chunks = -(-len(targets) * weight.shape[0] // _LOGITS_AT_ONCE)
        # of one size: a short last one would cost a pass over the whole weight for little
        borders = [len(targets) * i // max(1, chunks) for i in range(chunks + 1)]
        for at in map(slice, borders[:-1], borders[1:]):
            x, target = hidden[at].to(dtype), targets[at].unsqueeze(1)
            logits = product(x, compute_weight).float()
            if cap is not None:
                bounded = logits.div_(cap).tanh_()
                logits = bounded * cap
            best, best_id = logits.max(1, keepdim=True)
            correct += (best_id == target).sum()
            logits.sub_(best)
            at_target = logits.gather(1, target)
            total = logits.exp_().sum(1, keepdim=True)
            loss += (total.log() - at_target).sum()
            if needs_hidden or needs_weight:
                # the gradient of the logits: softmax, less 1 at the target
                d_logits = logits.div_(total).scatter_add_(1, target, -torch.ones_like(total))
                if cap is not None:
                    d_logits.addcmul_(d_logits, bounded.square_(), value=-1)  # the derivative of tanh is 1 - tanh^2
                d_logits = d_logits.to(dtype)
                if d_hidden is not None:
                    d_hidden[at] = product(d_logits, compute_weight.T)
                if needs_weight and d_weight is None:
                    d_weight = product(d_logits.T, x.T).to(weight.dtype)  # the sum is not in autocast's type
                elif d_weight is not None:
                    for part, columns in zip(
                        d_weight.split(_ROWS_AT_ONCE), d_logits.split(_ROWS_AT_ONCE, 1), strict=True
                    ):
                        part.add_(product(columns.T, x.T))
        if needs_weight and d_weight is None:  # there was no target
            d_weight = torch.zeros_like(weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, correct: None) -> tuple[Tensor | None, ...]:
        # in place: a loss is differentiated once
        return *(None if x is None else x.mul_(grad) for x in ctx.saved_tensors), None, None, None


# Floats in the logits of one chunk: 128 MiB.
_LOGITS_AT_ONCE = 2**25

# Rows of the weight's gradient that are added to at once, so that there are never two of its size.
_ROWS_AT_ONCE = 8192


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of ``hidden @ weight.T`` without ever holding all logits.

    Args:
      hidden: (M, D); weight: (V, D); targets: (M,) in [0, V).
      cap: the logits are bounded by it: cap * tanh(logits / cap), as in Gemma 2 (arXiv 2408.00118); None: they are not.

    Returns:
      the sum over the positions, float32, and how many targets have the highest logit. Can be differentiated once.
      Products are in autocast's type where it is on, all else in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, cap)


@lru_cache
@torch.autocast("cpu", enabled=False)
def has_half() -> bool:
    """Whether FBGEMM's product of float32 with a weight kept in half precision is there and right."""
    x, weight = _small_integers()
    try:
        return torch.equal(_times_half(x, _to_half(weight)), x @ weight.T)
    except (AttributeError, RuntimeError) as e:  # another engine for quantized operators, or none
        log.info("products with weights in half precision are not available (%s)", e)
        return False


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)


def _to_half(weight: Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight, None)


def _times_half(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    out = torch.ops.quantized.linear_dynamic_fp16(x, weight)
    return out if bias is None else out.add_(bias)


@torch.no_grad()
def _is_half(weight: Tensor) -> bool:
    """Whether half precision holds a float32 matrix, up to what a float32 product rounds: for one that was trained or
    published in half precision or, but for some of its smallest numbers, in bfloat16."""
    parts = (weight[:1], *weight.split(_ROWS_AT_ONCE))  # of another one, its first row tells
    return all((part.half().float() - part.float()).norm() <= part.float().norm() * _ROUNDING for part in parts)


# The error of float32 products, relative to their norm.
_ROUNDING = 2**-22


@dataclass(frozen=True)
class _Layout:
    """How a float32 weight (N, K) may be kept for inference, and ``multiply(x, kept, bias)``."""

    keep: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any, Tensor | None], Tensor]


_LAYOUTS = {
    "small": _Layout(lambda weight: weight, product),
    "plain": _Layout(lambda weight: weight, _onednn),
    "packed": _Layout(_pack, _onednn),
    "half": _Layout(_to_half, _times_half),
}

# The number of rows that a packed layout is chosen for; it serves any number.
_PACKED_FOR_ROWS = 32

# How many rows stand for "several" when they are measured, and the most that do: with more, layouts hardly differ.
_SEVERAL, _MANY = 8, 64

# Numbers in a weight below which a product takes hardly longer than to start oneDNN.
_WORTH_A_LAYOUT = 2**18

# How many times as fast as the best layout for several rows must be another one for one row.
_WORTH_A_CHANGE = 1.1

# Numbers of a weight that are measured together, and of all: more than caches hold, as a model has.
_MEASURED_AT_ONCE, _MEASURED = 2**21, 2**23

_FASTEST: dict[tuple[int, bool], tuple[str, str]] = {}


def fastest_layouts(weights: Sequence[Tensor]) -> tuple[str, str]:
    """The layouts in which one row, and several, are multiplied the fastest with float32 weights (N, K) of one shape.

    ``half`` is only for weights that half precision holds, ``packed`` is oneDNN's; which wins depends on the processor.
    Measured once in a process for shapes of about this size, in some tenths of a second, and logged. By one thread:
    several wait for each other, and what else the machine does would decide.
    """
    N, K = weights[0].shape
    if N * K < _WORTH_A_LAYOUT or not has_onednn():
        return "small", "small"
    key = (N * K).bit_length(), has_half() and _is_half(weights[0])
    if key not in _FASTEST:
        rows = min(N, -(-_MEASURED_AT_ONCE // K))
        parts = (part.float() for weight in weights for part in weight.split(rows) if len(part) == rows)
        plain = list(islice(parts, max(1, _MEASURED // (rows * K))))
        names = ("plain", "packed", "half") if key[1] else ("plain", "packed")
        kept = {name: [_LAYOUTS[name].keep(part) for part in plain] for name in names}
        one, several = (_times(kept, torch.ones(n, K)) for n in (1, _SEVERAL))
        _FASTEST[key] = _choice(one, several)
        told = (", ".join(f"{name} {1e6 * t * N / rows:.0f}" for name, t in times.items()) for times in (one, several))
        log.info(
            "products with about %d x %d: %s for one row (us: %s), %s for several (of %d: %s)",
            *(N, K, _FASTEST[key][0], next(told), _FASTEST[key][1], _SEVERAL, next(told)),
        )
    return _FASTEST[key]


def _choice(one: dict[str, float], several: dict[str, float]) -> tuple[str, str]:
    """Of seconds by layout, for one row and for several. In ``half`` a weight stays: it takes half the memory."""
    if min(one, key=lambda name: one[name] * several[name]) == "half":
        return "half", "half"
    best = min(("plain", "packed"), key=several.__getitem__)
    return min(("plain", "packed"), key=lambda name: one[name] * (1 if name == best else _WORTH_A_CHANGE)), best


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def _times(kept: dict[str, list[Any]], x: Tensor) -> dict[str, float]:
    """Seconds of a product with weights in each layout: the medians, by one thread."""
    times: dict[str, list[float]] = {name: [] for name in kept}
    with one_thread():
        for of_pass in range(_PASSES + 1):
            for name, weights in kept.items():
                for weight in weights:
                    seconds = _time(_LAYOUTS[name].multiply, x, weight, None)
                    if of_pass:  # in the first one the libraries set themselves up
                        times[name].append(seconds)
    return {name: median(of_layout) for name, of_layout in times.items()}


_PASSES = 2


def _packs_bfloat16() -> bool:
    """Whether oneDNN has products in bfloat16 here: it refuses them without AVX-512 or AVX-NE-CONVERT."""
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A matrix product for inference, its weight in the form that the processor reads fastest.

    With float32 weights, one row may want another layout than several. There is never more than one of them: it follows
    the use.

    Args:
      linear: what it replaces.
      weights: ``float32``; ``bfloat16``, also the type of the product; or ``int8``, one scale a row.
      layouts: of float32 weights, for one row and for several; None for the fastest.
    """

    def __init__(self, linear: nn.Linear, weights: str, layouts: tuple[str, str] | None = None):
        super().__init__()
        self.in_features, self.out_features, self.weights = linear.in_features, linear.out_features, weights
        weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach().to(_TYPE_OF_PRODUCT[weights])
        self.scale: Tensor | None = None
        if weights == "int8":
            scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
            self.packed = (weight.float() / scale[:, None]).round_().to(torch.int8)
            self.scale = scale.bfloat16()
        elif weights == "bfloat16":
            self.packed = _pack(weight.bfloat16()) if _packs_bfloat16() else weight.bfloat16()
        else:
            self.layouts = layouts or fastest_layouts([weight])
            self.unsuited = 0  # products, one after the other, that wanted the other layout
            self.kept = self.layouts[0], _LAYOUTS[self.layouts[0]].keep(weight.float())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.weights}"

    def forward(self, x: Tensor) -> Tensor:
        # as under autocast other layers are
        out_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(_TYPE_OF_PRODUCT[self.weights])
        if self.weights == "float32":
            with nullcontext() if out_dtype == flat.dtype else torch.autocast("cpu", enabled=False):
                out = self._float32(flat)
        elif self.scale is None:
            multiply = _onednn if _packs_bfloat16() else F.linear
            out = multiply(flat, self.packed, self.bias)
        else:
            # of other widths torch's int8 product reads beyond the rows' ends
            if len(flat) <= _INT8_ROWS and self.in_features % 32 == 0:
                out = torch._weight_int8pack_mm(flat, self.packed, self.scale)
            else:
                out = F.linear(flat, self.packed.bfloat16()).mul_(self.scale)
            if self.bias is not None:
                out += self.bias
        return out.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def _float32(self, x: Tensor) -> Tensor:
        (layout, weight), few = self.kept, len(x) <= _MANY
        wanted = self.layouts[len(x) > 1] if few else layout
        if wanted != layout:
            self.unsuited += 1
            if self.unsuited >= _IN_A_ROW:
                weight = _LAYOUTS[wanted].keep(weight.to_dense() if layout == "packed" else weight)
                layout, _ = self.kept = wanted, weight
        elif few:
            self.unsuited = 0
        multiply = product if layout == "plain" and not few else _LAYOUTS[layout].multiply
        return multiply(x, weight, self.bias)


# To change the layout takes as long as about so many products in the right one save.
_IN_A_ROW = 32

_TYPE_OF_PRODUCT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}

# Up to so many rows, reading int8 weights saves more than their conversion for a bfloat16 product costs.
_INT8_ROWS = 16


def use_own_products(module: nn.Module) -> None:
    """Make every ``nn.Linear`` of a module that others wrote a ``Linear``, in place, with the same parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                own = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                own.weight, own.bias = child.weight, child.bias
                setattr(parent, name, own)


def pack_for_inference(model: nn.Module, weights: str = "float32") -> nn.Module:
    """Replaces every ``Linear`` of a model, in place, for decoding on the CPU; it can no longer be trained or saved.

    Args:
      model: an encoder, an ``RWKV7``, or anything that holds them; adapters must have been merged.
      weights: ``float32`` computes what the plain model does, in the fastest layouts (``fastest_layouts``);
        ``bfloat16`` is faster on processors that have its instructions, ``int8`` takes a quarter of the memory;
        tools/bench_rwkv.py prints speed and error of each.

    Returns:
      the model, in eval mode.

    Raises:
      UserError: other ``weights``; the model is not on the CPU; it has no ``Linear``, whose ``weights`` could be other
        than float32.
    """
    if weights not in INFERENCE_WEIGHTS:
        raise UserError(f"pack_for_inference: unknown weights {weights!r}, choose from {', '.join(INFERENCE_WEIGHTS)}")
    alike = defaultdict(list)  # those that the fastest layouts are found for together
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is Linear:
                if child.weight.device.type != "cpu":
                    raise UserError(f"pack_for_inference: {name} is on {child.weight.device}; packing is for the CPU")
                alike[child.weight.shape, weights == "float32" and _is_half(child.weight)].append((parent, name))
    for places in alike.values():
        layouts = None
        if weights == "float32":
            layouts = fastest_layouts([getattr(*place).weight.detach() for place in places])
        for parent, name in places:
            setattr(parent, name, PackedLinear(getattr(parent, name), weights, layouts))
    if weights != "float32" and not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError(f"pack_for_inference: weights {weights!r} are for RWKV-7, which the model does not have")
    return model.requires_grad_(False).eval()
