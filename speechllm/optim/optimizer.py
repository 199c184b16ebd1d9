"""Optimizer, parameter groups and learning-rate schedule of a training run."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol, runtime_checkable

from torch import nn
from torch.optim import AdamW, Optimizer

from speechllm.config import ConfigError, check_limits, setting
from speechllm.optim.scaled_adam import ScaledAdam

# Settings that are read only where another has this value.
_READ_WITH = {
    "weight_decay": ("name", "adamw"),
    "weight_decay_scale": ("name", "adamw"),
    "clip_grad_norm": ("name", "adamw"),
    "clipping_scale": ("name", "scaled_adam"),
    "final_lr_factor": ("schedule", "cosine"),
    "lr_batches": ("schedule", "eden"),
    "lr_epochs": ("schedule", "eden"),
}


@dataclass
class OptimConfig:
    """Optimizer and schedule. A setting that the chosen ones do not read must keep its default.

    `name`: `adamw`, or `scaled_adam` (see `ScaledAdam`; its `lr` is much higher, 0.045 from scratch).

    `schedule`: `lr` is the peak, reached after `warmup_steps`. From there `cosine` goes down to `lr * final_lr_factor`
    at the last step, `constant` stays, and `eden` falls with steps and epochs and knows no last step (see `Eden`).

    Patterns stand for parameters: `encoder.encoder_embed` is the parameter of that name or all below that module, and
    `*` is any text, as in `encoder.*.norm`. `freeze` lists what is not trained. `lr_scale` and `weight_decay_scale`
    multiply `lr` and `weight_decay` for what their patterns match; of several that match, the last counts.

    `weight_decay` is on the parameters that `parameter_groups` says. `clip_grad_norm` bounds the gradient's norm over
    all parameters. ScaledAdam has neither: it clips by itself, with `clipping_scale`.
    """

    name: Literal["adamw", "scaled_adam"] = "adamw"
    lr: float = setting(1e-3, above=0)
    lr_scale: dict[str, float] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = setting(0.01, at_least=0)
    weight_decay_scale: dict[str, float] = field(default_factory=dict)
    clip_grad_norm: float = setting(5.0, above=0)
    clipping_scale: float = setting(2.0, above=0)
    schedule: Literal["cosine", "constant", "eden"] = "cosine"
    warmup_steps: int = setting(1000, at_least=0)
    final_lr_factor: float = 0.01
    lr_batches: float = setting(7500.0, above=0)
    lr_epochs: float = setting(3.5, above=0)

    def __post_init__(self) -> None:
        check_limits(self)
        for pattern, scale in self.lr_scale.items():
            if scale <= 0:
                raise ValueError(f"lr_scale.{pattern} must be positive, got {scale}; to train nothing, use freeze")
        for pattern, scale in self.weight_decay_scale.items():
            if scale < 0:
                raise ValueError(f"weight_decay_scale.{pattern} must be at least 0, got {scale}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        for name, (key, needed) in _READ_WITH.items():
            # The class has the defaults as attributes, but for dicts, which are empty.
            value, chosen, default = getattr(self, name), getattr(self, key), getattr(OptimConfig, name, {})
            no_decay = name == "weight_decay" and value == 0
            if chosen != needed and value != default and not no_decay:
                raise ValueError(f"{name}: {value} is only for {key}: {needed}, but {key} is {chosen}")

    @property
    def max_grad_norm(self) -> float:
        """What the training loop clips the gradient's norm to; infinite for an optimizer that clips by itself."""
        return self.clip_grad_norm if self.name == "adamw" else math.inf


def freeze_parameters(model: nn.Module, patterns: Iterable[str], part: str = "") -> None:
    """Stop the training of what matches (see `OptimConfig`).

    Args:
      part: which part of a model `model` is, such as `llm`; empty where it is a whole one.

    Raises:
      ConfigError: a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters(prefix=part))
    for pattern in patterns:
        for name in _matches(pattern, parameters, "optim.freeze"):
            parameters[name].requires_grad_(False)


def parameter_groups(model: nn.Module, config: OptimConfig, part: str = "") -> list[dict]:
    """Trainable parameters by part of the model, in groups with the part's `name`.

    Weight decay is on matrices and kernels, not on vectors and scalars; what counts is the number of axes longer than
    1. A module may have rules of its own, wherever it is found: `no_weight_decay() -> set[str]`, the names of its
    parameters that are not decayed (as in timm), and `lr_scale() -> dict[str, float]`, by which the rate of some is
    multiplied. For ScaledAdam, `weight_decay` is 0 in every group.

    Args:
      part: which part of a model `model` is, such as `llm`; empty where it is a whole one.

    Raises:
      ConfigError: nothing is trainable, or a pattern of `lr_scale` or `weight_decay_scale` matches nothing trained.
    """
    trained = {name: p for name, p in model.named_parameters(prefix=part) if p.requires_grad}
    if not trained:
        raise ConfigError("no parameter is trainable: every part of the model is frozen")
    lr_scale = _scales(config.lr_scale, trained, "optim.lr_scale")
    decay_scale = _scales(config.weight_decay_scale, trained, "optim.weight_decay_scale")
    weight_decay = config.weight_decay if config.name == "adamw" else 0.0
    not_decayed, own_scale = _declared_rules(model)
    by_rule = defaultdict(list)
    for name, p in trained.items():
        lr = config.lr * lr_scale.get(name, 1.0) * own_scale.get(p, 1.0)
        decayed = sum(size > 1 for size in p.shape) >= 2 and p not in not_decayed
        decay = weight_decay * decay_scale.get(name, 1.0) if decayed else 0.0
        by_rule[name.partition(".")[0], lr, decay].append(p)
    return [
        {"name": part, "params": params, "lr": lr, "weight_decay": decay}
        for (part, lr, decay), params in by_rule.items()
    ]


@runtime_checkable
class HasNoWeightDecay(Protocol):
    """A module that names those of its own parameters that are not decayed."""

    def no_weight_decay(self) -> Iterable[str]: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...


@runtime_checkable
class HasLrScale(Protocol):
    """A module that has factors of the learning rate for parameters of its own, by name."""

    def lr_scale(self) -> dict[str, float]: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...


def _declared_rules(model: nn.Module) -> tuple[set[nn.Parameter], dict[nn.Parameter, float]]:
    """What the modules of a model say of their own parameters: which are not decayed, and factors of the rate."""
    not_decayed: set[nn.Parameter] = set()
    own_scale: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, HasNoWeightDecay):
            not_decayed |= {module.get_parameter(name) for name in module.no_weight_decay()}
        if isinstance(module, HasLrScale):
            own_scale |= {module.get_parameter(name): scale for name, scale in module.lr_scale().items()}
    return not_decayed, own_scale


def build_optimizer(model: nn.Module, config: OptimConfig, part: str = "") -> AdamW | ScaledAdam:
    """Freeze what `config.freeze` lists, then the optimizer over what is left; AdamW in its fused form.

    Raises:
      ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    freeze_parameters(model, config.freeze, part)
    groups = parameter_groups(model, config, part)
    beta1, beta2 = config.betas
    if config.name == "scaled_adam":
        return ScaledAdam(groups, betas=(beta1, beta2), clipping_scale=config.clipping_scale)
    return AdamW(groups, betas=(beta1, beta2), fused=True)


class Schedule:
    """Sets the learning rate of each group to its rate at construction times `factor(batch, epoch)`.

    `batch` counts the optimizer steps and `epoch` the epochs that are finished. The state is these two numbers: a run
    that goes on with another configuration has that one's rates.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int, int], float]) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.batch = self.epoch = 0
        self._set_lr()

    def step_batch(self) -> None:
        """To be called after each optimizer step."""
        self.batch += 1
        self._set_lr()

    def step_epoch(self) -> None:
        """To be called after each epoch."""
        self.epoch += 1
        self._set_lr()

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group, as it is now."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there; load the optimizer's state before."""
        self.batch, self.epoch = state["batch"], state["epoch"]
        self._set_lr()

    def _set_lr(self) -> None:
        factor = self.factor(self.batch, self.epoch)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor


class Eden(Schedule):
    """Zipformer's schedule (arXiv 2310.11230, section 3.5; icefall's optim.py).

        lr = base_lr * ((batch^2 + lr_batches^2) / lr_batches^2)^-0.25
                     * ((epoch^2 + lr_epochs^2) / lr_epochs^2)^-0.25 * warmup

    where `warmup` goes linearly from `warmup_start` to 1 in the first `warmup_batches`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: float = 500.0,
        warmup_start: float = 0.5,
    ) -> None:
        def factor(batch: int, epoch: int) -> float:
            decay = (1 + (batch / lr_batches) ** 2) ** -0.25 * (1 + (epoch / lr_epochs) ** 2) ** -0.25
            if batch >= warmup_batches:
                return decay
            return decay * (warmup_start + (1.0 - warmup_start) * batch / warmup_batches)

        super().__init__(optimizer, factor)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at `step`: linear, never 0."""
    return min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0


def lr_factor(step: int, warmup_steps: int, total_steps: int, final: float) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine down to `final`."""
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> Schedule:
    """The schedule over `total_steps` optimizer steps; all of them have `step` and `step_epoch`."""
    if config.schedule == "eden":
        return Eden(optimizer, config.lr_batches, config.lr_epochs, warmup_batches=config.warmup_steps)
    if config.schedule == "constant":
        return Schedule(optimizer, lambda step, epoch: warmup_factor(step, config.warmup_steps))
    return Schedule(
        optimizer, lambda step, epoch: lr_factor(step, config.warmup_steps, total_steps, config.final_lr_factor)
    )


def _scales(by_pattern: dict[str, float], parameters: dict[str, nn.Parameter], key: str) -> dict[str, float]:
    """Parameter name -> the scale of the last pattern that matches it."""
    return {name: scale for pattern, scale in by_pattern.items() for name in _matches(pattern, parameters, key)}


def _matches(pattern: str, parameters: dict[str, nn.Parameter], key: str) -> list[str]:
    """The names that are `pattern` or lie below it.

    Raises:
      ConfigError: there is none.
    """
    found = [name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    if found:
        return found
    paths = {".".join(path[:i]) for path in (n.split(".") for n in parameters) for i in range(1, len(path) + 1)}
    near = difflib.get_close_matches(pattern, sorted(paths), n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    parts = sorted({name.partition(".")[0] for name in parameters})
    what = "parameter" if key == "optim.freeze" else "trained parameter"
    raise ConfigError(f"{key}: {pattern} matches no {what}; {hint}parts: {', '.join(parts)}")
