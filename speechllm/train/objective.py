"""What a training step makes smaller: the model's own loss, or one on the errors of what it writes."""

from __future__ import annotations

from typing import Protocol

import torch
from accelerate import Accelerator

from speechllm.data import Batch
from speechllm.model.base import Losses
from speechllm.train.config import Experiment
from speechllm.train.grpo import grpo_losses
from speechllm.train.mwer import mwer_losses


class Objective(Protocol):
    """Called by a training step, for each of its batches."""

    def __call__(self, accelerator: Accelerator, model: torch.nn.Module, batch: Batch) -> Losses:
        """Losses of a batch as a model's `forward` gives them: `loss`, to be divided by `tokens`, and its parts.

        Args:
          model: perhaps wrapped for several processes.
          batch: of this process, on its device.
        """
        ...


def model_losses(accelerator: Accelerator, model: torch.nn.Module, batch: Batch) -> Losses:
    """The model's own: the cross entropy, and CTC and what else it has beside it."""
    with accelerator.autocast():
        return model(*batch.inputs)


def build_objective(experiment: Experiment) -> Objective:
    """That of `train.loss`. Batches of streams have the model's own: the searches of the others are for whole
    utterances."""
    config, text_steps = experiment.train, experiment.data.text

    def objective(accelerator: Accelerator, model: torch.nn.Module, batch: Batch) -> Losses:
        if config.loss == "cross_entropy" or batch.chunk_seconds is not None:
            return model_losses(accelerator, model, batch)
        if config.loss == "mwer":
            return mwer_losses(accelerator, model, batch, config.mwer, text_steps)
        return grpo_losses(accelerator, model, batch, config.grpo, text_steps)

    return objective
