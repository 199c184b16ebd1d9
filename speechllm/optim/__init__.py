"""Optimizers, the schedules of the learning rate, and which parameters they apply to."""

from speechllm.optim.optimizer import (
    Eden,
    OptimConfig,
    Schedule,
    build_optimizer,
    build_scheduler,
    freeze_parameters,
    parameter_groups,
)
from speechllm.optim.scaled_adam import ScaledAdam

__all__ = [
    "Eden",
    "OptimConfig",
    "ScaledAdam",
    "Schedule",
    "build_optimizer",
    "build_scheduler",
    "freeze_parameters",
    "parameter_groups",
]
