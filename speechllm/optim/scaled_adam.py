"""ScaledAdam, the optimizer that Zipformer was trained with (arXiv 2310.11230, section 3.5; icefall's optim.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

logger = logging.getLogger(__name__)

_EARLY_CLIPPING_STEPS = (10, 20, 40)
# The correction of the second moment's bias that is left out.
_NO_BIAS = 0.99
# Elements of a large tensor that are updated at a time: the tensors of one update are in a second-level cache then.
_PIECE = 65536
# Elements from which a tensor is updated in such pieces, of which each costs some microseconds.
_LARGE = 4096


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose step on a tensor is relative to the tensor's size, and which learns that size by itself.

    A tensor's size is its root mean square (rms). `lr` is the change relative to it in one step, so it is much higher
    than Adam's: 0.045 from scratch, a tenth of that to fine-tune. The size moves at `lr * scalar_lr_scale`, on the
    gradients of `size_update_period` steps, as long as it is above `param_min_rms` and up to `param_max_rms`. Tensors
    of one element have Adam's steps at `lr * scalar_lr_scale` and are kept within `scalar_max`. There is no weight
    decay.

    Clipping: gradients times the sizes of their tensors are bounded, over all groups together, to `clipping_scale`
    times the median norm of the last `clipping_update_period` steps. The first thresholds, at steps 10, 20 and 40, are
    twice as high, because norms change fast there. icefall clips each group by itself; with one group, it is the same.

    A parameter without a gradient takes the step of a gradient of zeros: the momentum goes on. Skip a step whose
    gradient is not finite. Clipping, after the first step, raises before anything is changed; otherwise NaN would
    reach the parameters, as in every optimizer.

    `state_dict` is exact. What is kept by parameter and what is kept for a whole group (sizes, in the group's order)
    or for the model (norms) are both in torch's format, the latter at the group's and the model's first parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-2,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
    ) -> None:
        self.clipping_scale = clipping_scale
        self.clipping_update_period = clipping_update_period
        defaults = {
            "lr": lr,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "step": 0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, if there is a closure.

        Raises:
          FloatingPointError: clipping met a gradient that is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [[torch.zeros_like(p) if p.grad is None else p.grad for p in g["params"]] for g in self.param_groups]
        for group in self.param_groups:
            if group["step"] == 0:
                self._init_state(group)
        factor = self._clipping_factor(grads)
        for group, group_grads in zip(self.param_groups, grads, strict=True):
            if factor < 1.0:
                group_grads = list(torch._foreach_mul(group_grads, factor))
            pairs = list(zip(group["params"], group_grads, strict=True))
            if tensors := [(p, grad) for p, grad in pairs if p.numel() > 1]:
                self._step_tensors(group, [p for p, _ in tensors], [grad for _, grad in tensors])
            if scalars := [(p, grad) for p, grad in pairs if p.numel() == 1]:
                self._step_scalars(group, [p for p, _ in scalars], [grad for _, grad in scalars])
            group["step"] += 1
        return loss

    def _init_state(self, group: dict) -> None:
        for p in group["params"]:
            self.state[p]["delta"] = torch.zeros_like(p)
            self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        if tensors := [p for p in group["params"] if p.numel() > 1]:
            sizes = self.state[group["params"][0]]
            sizes["param_rms"] = _rms(tensors)
            sizes["scale_exp_avg_sq"] = torch.zeros_like(sizes["param_rms"])
            sizes["scale_grads"] = sizes["param_rms"].new_zeros(group["size_update_period"], len(tensors))

    def _clipping_factor(self, grads: list[list[Tensor]]) -> float:
        """What the gradients of this step are multiplied with, 1 at most."""
        step, period = self.param_groups[0]["step"], self.clipping_update_period
        if self.clipping_scale is None or step == 0:
            return 1.0
        norms = []
        for group, group_grads in zip(self.param_groups, grads, strict=True):
            grad_norms = torch.stack(torch._foreach_norm(group_grads))
            scales = torch.full_like(grad_norms, group["scalar_lr_scale"])
            is_tensor = torch.tensor([p.numel() > 1 for p in group["params"]], device=scales.device)
            if "param_rms" in (sizes := self.state[group["params"][0]]):
                scales[is_tensor] = sizes["param_rms"]
            norms.append((grad_norms * scales).norm().item())
        norm = math.hypot(*norms)
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the norm of the gradients is {norm}; skip such a step")

        state = self.state[self.param_groups[0]["params"][0]]
        if step == 1:
            state["model_norms"], state["clipping_threshold"] = [0.0] * period, math.inf
        state["model_norms"][step % period] = norm
        is_early = step in _EARLY_CLIPPING_STEPS and step < period
        if is_early or step % period == 0:
            recent = sorted(state["model_norms"])[-min(step, period) :]
            median = recent[min(len(recent) - 1, len(recent) // 4 * 2)]
            state["clipping_threshold"] = self.clipping_scale * median * (2.0 if is_early else 1.0)
        factor = min(1.0, state["clipping_threshold"] / (norm + 1e-20))
        if factor < 0.1:
            logger.warning("step %d: gradients scaled by %.2e: their norm is %.2e", step, factor, norm)
        return factor

    def _step_tensors(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        lr, step = group["lr"], group["step"]
        beta1, beta2 = group["betas"]
        sizes = self.state[group["params"][0]]
        phase = step % group["size_update_period"]
        changes, products = [0.0] * len(params), None
        if phase == group["size_update_period"] - 1:  # the sizes move, by gradients of which these are the last
            products = [torch.dot(p.reshape(-1), grad.reshape(-1)) for p, grad in zip(params, grads, strict=True)]
            sizes["scale_grads"][phase] = torch.stack(products)
            sizes["param_rms"] = _rms(params)
            if step > 0:
                changes = (self._size_steps(group, sizes) * (1 - beta1)).tolist()
        rates = (-lr * (1 - beta1) * sizes["param_rms"].clamp(min=group["param_min_rms"])).tolist()

        is_biased = 1 - beta2 ** (step + 1) < _NO_BIAS
        bias_step, scratch = torch.tensor(step + 1.0 if is_biased else math.inf), torch.zeros(_PIECE)
        together, found = [], []
        for p, grad, change, rate in zip(params, grads, changes, rates, strict=True):
            tensors = p, grad, self.state[p]["delta"], self.state[p]["exp_avg_sq"]
            if _is_updated_in_pieces(*tensors):
                parts = _update_in_pieces(group, tensors, change, rate, bias_step, scratch, products is None)
            else:
                parts = [torch.dot(p.reshape(-1), grad.reshape(-1))] if products is None else []
                together.append((*tensors, change, rate))
            if parts:
                found.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum())
        if products is None:
            sizes["scale_grads"][phase] = torch.stack(found)
        if together:
            _update_together(group, *map(list, zip(*together, strict=True)))

    def _size_steps(self, group: dict, sizes: dict[str, Tensor]) -> Tensor:
        """The relative change of each tensor's size, (tensors,)."""
        beta2 = group["betas"][1] ** group["size_update_period"]  # one update stands for that many steps
        rms, grads, exp_avg_sq = sizes["param_rms"], sizes["scale_grads"], sizes["scale_exp_avg_sq"]
        exp_avg_sq.mul_(beta2).add_((grads**2).mean(0), alpha=1 - beta2)
        updates = (group["step"] + 1) // group["size_update_period"]
        size_lr = group["lr"] * group["scalar_lr_scale"] * (1 - beta2**updates) ** 0.5
        steps = -size_lr * grads.sum(0) / (exp_avg_sq.sqrt() + group["eps"])
        steps.masked_fill_(rms < group["param_min_rms"], 0.0)
        return torch.minimum(steps, (group["param_max_rms"] - rms) / rms)

    def _step_scalars(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        deltas = [self.state[p]["delta"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(deltas, beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, (1 - beta2 ** (group["step"] + 1)) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(deltas, grads, denominators, -group["lr"] * group["scalar_lr_scale"] * (1 - beta1))
        torch._foreach_clamp_min_(params, -group["scalar_max"])
        torch._foreach_clamp_max_(params, group["scalar_max"])
        torch._foreach_add_(params, deltas)


def _update_together(
    group: dict,
    params: list[Tensor],
    grads: list[Tensor],
    deltas: list[Tensor],
    exp_avg_sqs: list[Tensor],
    changes: list[float],
    rates: list[float],
) -> None:
    """Change the sizes of tensors by `changes`, relative to them, and take Adam's steps at `rates`."""
    beta1, beta2 = group["betas"]
    torch._foreach_mul_(deltas, beta1)
    if any(changes):
        torch._foreach_add_(deltas, torch._foreach_mul(params, changes))
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    if (bias_correction := 1 - beta2 ** (group["step"] + 1)) < _NO_BIAS:
        torch._foreach_div_(denominators, bias_correction**0.5)
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(deltas, grads, denominators, rates)
    torch._foreach_add_(params, deltas)


def _is_updated_in_pieces(*tensors: Tensor) -> bool:
    return tensors[0].numel() >= _LARGE and all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )


def _update_in_pieces(
    group: dict,
    tensors: tuple[Tensor, ...],
    change: float,
    rate: float,
    bias_step: Tensor,
    scratch: Tensor,
    wants_product: bool,
) -> list[Tensor]:
    """`_update_together` of one large tensor on the CPU: a piece that one operation has read, the next finds in the
    cache. Adam's step is PyTorch's fused one, of `delta` and without momentum, as that is in `delta` itself, whose
    decay is the fused step's weight decay.

    Args:
      tensors: the parameter, its gradient, `delta` and `exp_avg_sq`.
      bias_step: the step, from 1, by which the second moment's bias is corrected; infinite for no correction.
      scratch: finite, of the size of a piece.
      wants_product: whether the product of the parameter, as it was, and its gradient is needed.

    Returns:
      that product, in the parts of the pieces; nothing if it is not needed.
    """
    beta1, beta2 = group["betas"]
    in_step = rate != 0 and beta1 > 0  # else no weight decay makes beta1
    products = []
    for p, grad, delta, exp_avg_sq in zip(*(t.view(-1).split(_PIECE) for t in tensors), strict=True):
        if not in_step:
            delta.mul_(beta1)
        if change:
            delta.add_(p, alpha=change / beta1 if in_step else change)
        torch._fused_adamw_(
            [delta],
            [grad],
            [scratch[: grad.numel()]],
            [exp_avg_sq],
            [],
            [bias_step],
            lr=-rate,
            beta1=0.0,
            beta2=beta2,
            weight_decay=(beta1 - 1) / rate if in_step else 0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if wants_product:  # only now: the step hides the time in which its three tensors come out of memory
            products.append(torch.dot(p, grad))
        p.add_(delta)
    return products


def _rms(tensors: list[Tensor]) -> Tensor:
    """Root mean square of each tensor, (tensors,)."""
    counts = torch.tensor([float(t.numel()) for t in tensors], device=tensors[0].device)
    return torch.stack(torch._foreach_norm(tensors)) / counts.sqrt()
