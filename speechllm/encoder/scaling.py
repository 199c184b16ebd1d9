"""Zipformer's activations, its norm, and the regularizers that make it train from scratch.

After "Zipformer: A faster and better encoder for automatic speech recognition" (Yao et al., arXiv 2310.11230)
and its implementation in the icefall project. Channels are always the last dimension. The regularizers return
their input unchanged and only edit the gradient that passes back through them; they do so on a random part of
the training batches, drawn with Python's `random`, and never in eval mode. None of them carries state from
one batch to the next, so a resumed run needs the global random states and the batch count only.
"""

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.linear import Linear


class ScheduledFloat:
    """A number that depends, piecewise linearly, on how many batches the model has been trained for.

    Args:
        points: (batch count, value) pairs in order; constant before the first and after the last one.

    The current number is `value`; `Zipformer.set_batch_count` moves it.
    """

    def __init__(self, *points: tuple[float, float]):
        self.points = points
        self.set_batch_count(0.0)

    def set_batch_count(self, batch_count: float) -> None:
        x0, y0 = self.points[0]
        self.value = y0
        for x1, y1 in self.points[1:]:
            if batch_count > x0:
                self.value = y0 + (y1 - y0) * min((batch_count - x0) / (x1 - x0), 1.0)
            x0, y0 = x1, y1

    def __repr__(self) -> str:
        return f"ScheduledFloat{self.points}"


def constant(value: float) -> ScheduledFloat:
    """A schedule that stays where it is."""
    return ScheduledFloat((0.0, value))


def _scheduled(value: float | ScheduledFloat) -> ScheduledFloat:
    return value if isinstance(value, ScheduledFloat) else constant(value)


def scheduled_floats(module: nn.Module) -> Iterator[ScheduledFloat]:
    """Every schedule that `module` or a module inside it holds as an attribute."""
    for m in module.modules():
        yield from (v for v in vars(m).values() if isinstance(v, ScheduledFloat))


# ------------------------------------------------------------------------------------------------------------
# Swoosh: softplus(x - shift) - 0.08 x - offset

SWOOSH_L = (4.0, 0.035)  # dies towards zero: for layers that may be off most of the time
SWOOSH_R = (1.0, 0.313261687)  # passes through the origin


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _swoosh(x: Tensor, kind: tuple[float, float]) -> Tensor:
    shift, offset = kind
    # softplus(z) - 0.08 z - (0.08 shift + offset), z = x - shift
    z = _at_least_float32(x) - shift
    return F.softplus(z).add_(z, alpha=-0.08).sub_(0.08 * shift + offset).to(x.dtype)


def _swoosh_backward(grad: Tensor, x: Tensor, kind: tuple[float, float]) -> Tensor:
    if not (_goes_by_pieces(x) and x.dtype == torch.float32 and grad.is_contiguous()):
        return (_at_least_float32(x) - kind[0]).sigmoid_().sub_(0.08).mul_(grad)
    out = torch.empty_like(x)
    size = _piece_size(x)
    for to, piece, scale in zip(*(z.view(-1).split(size) for z in (out, x, grad)), strict=True):
        torch.sub(piece, kind[0], out=to).sigmoid_().sub_(0.08).mul_(scale)
    return out


def _goes_by_pieces(x: Tensor) -> bool:
    """Whether x is worked on a piece at a time, which stays in the processor's cache through all operations."""
    on_cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return on_cpu and x.is_contiguous() and x.numel() > 0 and not torch._C._is_tracing()


def _piece_size(x: Tensor) -> int:
    return min(x.numel(), _PIECE * torch.get_num_threads())


# Floats that are worked on at once, per thread: 256 KiB, of the 512 KiB and more that a core's second cache has.
_PIECE = 2**16


class _Swoosh(torch.autograd.Function):
    """Keeps its input only; the derivative is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _swoosh_by_pieces(x, torch.empty_like(x), kind) if _goes_by_pieces(x) else _swoosh(x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _swoosh_backward(grad, x, ctx.kind), None


def _swoosh_by_pieces(x: Tensor, out: Tensor, kind: tuple[float, float]) -> Tensor:
    """`_swoosh` of x, written to `out`, which may be x; both as `_goes_by_pieces` wants them.

    The operations are those that vector libraries have: softplus(x - shift) = log(exp(x) + exp(shift)) - shift, in a
    third of the time of PyTorch's softplus.
    """
    shift, offset = kind
    size = _piece_size(x)
    values, logs = (torch.empty(size, device=x.device) for _ in range(2))
    for piece, to in zip(x.view(-1).split(size), out.view(-1).split(size), strict=True):
        # in float32, also where x is in half precision
        z = piece if piece.dtype == torch.float32 else values[: len(piece)].copy_(piece)
        if not float(z.amax()) < _EXP_MAX:  # of larger ones, or of NaN, exp or what comes of it is not a number
            to.copy_(_swoosh(z, kind))
            continue
        log = torch.exp(z, out=logs[: len(piece)]).add_(math.exp(shift)).log_()
        in_float32 = to if to.dtype == torch.float32 else log
        torch.add(log, z, alpha=-0.08, out=in_float32).sub_(shift + offset)
        if in_float32 is not to:
            to.copy_(in_float32)
    return out


_EXP_MAX = 80.0


def _activate(x: Tensor, kind: tuple[float, float], fresh: bool) -> Tensor:
    if fresh and not (torch.is_grad_enabled() and x.requires_grad) and _goes_by_pieces(x):
        return _swoosh_by_pieces(x, x, kind)
    return _Swoosh.apply(x, kind)


def swoosh_l(x: Tensor, fresh: bool = False) -> Tensor:
    """SwooshL: log(1 + exp(x - 4)) - 0.08 x - 0.035, of any shape.

    Args:
        fresh: nobody else has x, so that the result may take its place where no gradient is needed.
    """
    return _activate(x, SWOOSH_L, fresh)


def swoosh_r(x: Tensor, fresh: bool = False) -> Tensor:
    """SwooshR: log(1 + exp(x - 1)) - 0.08 x - 0.313261687, of any shape; `fresh` as in `swoosh_l`."""
    return _activate(x, SWOOSH_R, fresh)


def scaled_linear(in_dim: int, out_dim: int, initial_scale: float, bias: bool = True) -> Linear:
    """A linear layer whose weights start `initial_scale` times as large, its biases within 0.1 of that."""
    linear = Linear(in_dim, out_dim, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(initial_scale)
        if bias:
            linear.bias.uniform_(-0.1 * initial_scale, 0.1 * initial_scale)
    return linear


def dropout_mask(x: Tensor, p: float) -> Tensor | None:
    """What to multiply x (N, ..., C) with to drop channels of whole utterances, (N, 1, C); None for p = 0."""
    if p == 0.0:
        return None
    shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    return (torch.rand(shape, device=x.device) >= p).to(x.dtype).mul_(1.0 / (1.0 - p))


# ------------------------------------------------------------------------------------------------------------
# Norm, and limits on parameters


class _BiasNorm(torch.autograd.Function):
    """y = x s, with s = exp(log_scale) / rms(x - bias). Keeps x and 1 / rms, one number per frame."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        inv_rms = (x - bias).square_().mean(-1, keepdim=True).add_(1e-20).rsqrt_()
        ctx.save_for_backward(x, bias, log_scale, inv_rms)
        return x * (inv_rms * log_scale.exp())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias, log_scale, inv_rms = ctx.saved_tensors
        scale = inv_rms * log_scale.exp()
        scale_grad = (grad * x).sum(-1, keepdim=True) * scale  # d / d log s, (..., 1)
        through_rms = (x - bias).mul_(scale_grad * inv_rms.square() / x.shape[-1])
        return grad * scale - through_rms, through_rms.flatten(0, -2).sum(0), scale_grad.sum()


class BiasNorm(nn.Module):
    """Zipformer's replacement for LayerNorm: the input's length survives through a learned bias and scale."""

    def __init__(self, dim: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(dim).normal_(std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        log_scale = limit_parameter(self.log_scale, -1.5, 1.5) if self.training else self.log_scale
        return _BiasNorm.apply(x, self.bias, log_scale)


class _LimitParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(p)
        ctx.limits = low, high
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (p,) = ctx.saved_tensors
        low, high = ctx.limits
        outwards = ((p < low) & (grad > 0)) | ((p > high) & (grad < 0))
        return torch.where(outwards, -grad, grad), None, None


def limit_parameter(p: Tensor, low: float, high: float) -> Tensor:
    """p unchanged; gradients that would move an element further out of [low, high] are turned round.

    Done on 60% of the batches, which is enough to hold it there.
    """
    return _LimitParameter.apply(p, low, high) if random.random() < 0.6 else p


# ------------------------------------------------------------------------------------------------------------
# Regularizers that edit gradients


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def scale_grad(x: Tensor, scale: float) -> Tensor:
    """x unchanged, of any shape; the gradient that passes back through it is multiplied with `scale`."""
    return _ScaleGrad.apply(x, scale)


class _PenalizeLarge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: float) -> Tensor:
        ctx.save_for_backward((x > limit).to(torch.int8) - (x < -limit).to(torch.int8))
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (excess_sign,) = ctx.saved_tensors
        return grad + ctx.penalty * excess_sign, None, None


def penalize_large(x: Tensor, limit: float, penalty: float) -> Tensor:
    """x unchanged, as if `penalty * (|x| - limit).relu().sum()` had been added to the loss."""
    return _PenalizeLarge.apply(x, limit, penalty)


_MIN_STD = 10**-2.5  # of a channel, relative to its rms: a constant channel's mean / std must not overflow


def _rms(rows: Tensor) -> Tensor:
    """(frames, C) -> (C,)"""
    return torch.linalg.vector_norm(rows, dim=0) / math.sqrt(len(rows))


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limits: tuple[float, float, float, float], grad_scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.config = limits, grad_scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        (min_mean, max_mean, min_rms, max_rms), grad_scale = ctx.config
        rows = x.flatten(0, -2).float()
        # Per channel: m = mean / std must lie within the limits on the mean, the rms within those on the rms.
        # The loss is the distance of m plus that of log rms. Its gradient is shift + slope (x - mean), per channel.
        # From here on in units of the rms. Mean and deviation are kept apart: where a channel is nearly constant,
        # their shares of the gradient are large, and written as a + b x they would cancel.
        mean = rows.mean(0)
        deviation = rows - mean
        rms = _rms(rows).clamp_(min=1e-10)
        mean = mean / rms
        std = _rms(deviation) / rms
        inv_std = std.clamp(min=_MIN_STD).reciprocal_()
        m = mean * inv_std
        m_sign = (m - m.clamp(min_mean, max_mean)).sign_()
        rms_sign = (rms - rms.clamp(min_rms, max_rms)).sign_()
        shift = m_sign * inv_std + rms_sign * mean
        slope = rms_sign - m_sign * m * inv_std.square()
        # As large as grad_scale in the rms sense, times |grad|, which says how much each element matters.
        scale = grad_scale / torch.hypot(shift, slope * std).clamp_(min=1e-20)
        push = deviation.mul_(slope * scale / rms).add_(shift * scale).view_as(x)
        return torch.addcmul(grad, grad.abs(), push.to(grad.dtype)), None, None


class Balancer(nn.Module):
    """Keeps each channel's share of positive values and its mean absolute value within limits.

    Args:
        min_positive, max_positive: limits on the proportion of values above zero, each 0 to 1.
        min_abs, max_abs: limits on the mean absolute value.
        prob: the share of batches it acts on.

    Where a channel (C, the last dimension) leaves the limits, up to 4% of the gradient's magnitude is added
    so that gradient descent moves it back. The limits are turned into ones on mean / std and rms as if values
    were normal.
    """

    def __init__(
        self,
        min_positive: float | ScheduledFloat,
        max_positive: float | ScheduledFloat,
        min_abs: float | ScheduledFloat,
        max_abs: float | ScheduledFloat,
        prob: float | None = None,
    ):
        super().__init__()
        self.min_positive, self.max_positive = _scheduled(min_positive), _scheduled(max_positive)
        self.min_abs, self.max_abs = _scheduled(min_abs), _scheduled(max_abs)
        self.prob = ScheduledFloat((0.0, 0.5), (8000.0, 0.125)) if prob is None else constant(prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not x.requires_grad or random.random() >= self.prob.value:
            return x
        limits = (
            _mean_over_std(self.min_positive.value),
            _mean_over_std(self.max_positive.value),
            self.min_abs.value * math.sqrt(math.pi / 2),
            self.max_abs.value * math.sqrt(math.pi / 2),
        )
        return _Balance.apply(x, limits, 0.04)


def _mean_over_std(positive: float) -> float:
    """mean / std of a normal variable that is positive with this probability, roughly (icefall's formula)."""
    x = 2 * positive - 1
    return 0.8139535143 * 0.5 * (math.log(1 + x + 1e-10) - math.log(1 - x + 1e-10))


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, limit: float, grad_scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.config = groups, limit, grad_scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        groups, limit, grad_scale = ctx.config
        metric, direction = whitening_metric(x.float(), groups)
        grad_norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        scale = grad_scale * grad_norm / (torch.linalg.vector_norm(direction) + 1e-20)
        scale = torch.where(metric > limit, scale, torch.zeros_like(scale))
        # Either factor alone may be out of half precision's range.
        return grad + direction.mul_(scale).to(grad.dtype), None, None, None


def whitening_metric(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """How far the covariance of x (..., C) within each group of channels is from a multiple of the identity.

    Returns:
        The metric, a scalar: mean squared over squared mean eigenvalue, 1 when perfectly white; and its
            gradient in x up
        to a positive factor, of the shape of x.
    """
    rows = x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)  # (groups, frames, channels)
    rows = rows - rows.mean(1, keepdim=True)
    cov = rows.transpose(1, 2) @ rows
    mean_eig = cov.diagonal(dim1=1, dim2=2).mean()
    mean_eig_square = cov.square().sum() / x.shape[-1]
    metric = mean_eig_square / (mean_eig.square() + 1e-20)
    excess = cov - torch.eye(cov.shape[-1], device=x.device, dtype=x.dtype) * (mean_eig_square / (mean_eig + 1e-20))
    return metric, (rows @ excess).transpose(0, 1).reshape(x.shape)


class Whiten(nn.Module):
    """Pushes activations (..., C) towards a covariance with equal eigenvalues when they are further off than
    a limit.

    Args:
        limit: the whitening metric (see `whitening_metric`, 1 is white) above which it acts.
        grad_scale: norm of the push relative to the gradient's.
        groups: groups of channels with a covariance each.

    icefall acts on 25% of the batches while the limit is violated and looks at 2.5% otherwise. That is a
    state that a resumed run would lose, so here it is 10% at all times, with a push as much stronger.
    """

    prob = 0.1

    def __init__(self, limit: ScheduledFloat, grad_scale: float = 0.01, groups: int = 1):
        super().__init__()
        self.limit = limit
        self.grad_scale = grad_scale * 0.25 / self.prob
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not x.requires_grad or random.random() >= self.prob:
            return x
        return _Whiten.apply(x, self.groups, self.limit.value, self.grad_scale)
