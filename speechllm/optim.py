"""Optimiser, parameter groups and learning-rate schedule of a training run."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from speechllm.config import ConfigError
from speechllm.rwkv7 import RWKV7
from speechllm.rwkv7.model import TimeMix


@dataclass
class OptimConfig:
    """AdamW with a warm-up and a cosine decay.

    `lr` is the peak, reached after `warmup_steps`; the schedule ends at `lr * final_lr_factor`. `lr_scale` multiplies
    it for parts of the model, by the names of its children (encoder, projector, llm, ctc_head). `weight_decay` is on
    the parameters that `parameter_groups` names. `clip_grad_norm` bounds the gradient's norm over all parameters.
    """

    lr: float = 1e-3
    lr_scale: dict[str, float] = field(default_factory=dict)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.01
    warmup_steps: int = 1000
    final_lr_factor: float = 0.01
    clip_grad_norm: float = 5.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trainable parameters by part of the model, in groups with the part's `name`.

    Weight decay is on matrices and kernels, not on vectors and scalars; what counts is the number of axes longer than
    1. RWKV-7, wherever it is found, has the rules of its own training (RWKV-LM, RWKV-v7/train_temp/src/model.py):
    decay only on the weights of layers, adapters included, so on none of the low-rank matrices `w1` to `g2`, `r_k` or
    a trained initial state; and `w0`, where the decay of the recurrence starts from, learns at twice the rate.

    A bare RWKV-7 is one part, `llm`.

    Raises:
      ConfigError: nothing is trainable, or `lr_scale` names a part that is not there or is frozen.
    """
    groups = []
    for name, part in [("llm", model)] if isinstance(model, RWKV7) else model.named_children():
        lr = config.lr * config.lr_scale.get(name, 1.0)
        rwkv7 = [p for module in part.modules() if isinstance(module, RWKV7) for p in module.named_parameters()]
        no_weights = {p for p_name, p in rwkv7 if ".weight" not in p_name}
        double_rate = {module.w0 for module in part.modules() if isinstance(module, TimeMix)}
        by_rule = defaultdict(list)
        for p in part.parameters():
            if p.requires_grad:
                decayed = sum(size > 1 for size in p.shape) >= 2 and p not in no_weights
                by_rule[2 * lr if p in double_rate else lr, config.weight_decay if decayed else 0.0].append(p)
        for (rate, decay), params in by_rule.items():
            groups.append({"name": name, "params": params, "lr": rate, "weight_decay": decay})
    trained = {group["name"] for group in groups}
    if not trained:
        raise ConfigError("no parameter is trainable: every part of the model is frozen")
    if unknown := sorted(set(config.lr_scale) - trained):
        raise ConfigError(f"optim.lr_scale: {unknown[0]} is not a trained part; trained: {', '.join(sorted(trained))}")
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in its fused form."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=tuple(config.betas), fused=True)


def lr_factor(step: int, warmup_steps: int, total_steps: int, final: float) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine down to `final`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """The schedule over `total_steps` optimiser steps; call its `step()` after each one."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config.warmup_steps, total_steps, config.final_lr_factor))
