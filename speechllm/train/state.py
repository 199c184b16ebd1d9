"""Everything that a run needs to go on as if it had never stopped, saved and loaded as one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.optim import Optimizer

from speechllm.data import Batch
from speechllm.errors import UserError
from speechllm.train.checkpoint import (
    load_checkpoint,
    load_trained,
    remove_old_checkpoints,
    rng_state,
    save_checkpoint,
    save_share,
    set_rng_state,
    trained_state_dict,
)
from speechllm.train.diagnostics import save_batches
from speechllm.train.monitor import Averages
from speechllm.train.processes import failing_together
from speechllm.train.sharding import describe_shares, load_optimizer_shares, optimizer_shares
from speechllm.weights import CheckpointError

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run that a checkpoint holds."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class TrainState:
    """How far a run has come, and its parts, under the names that they have in a checkpoint.

    Attributes:
      step: optimizer steps that are done; epoch: the one that goes on, from 1.
      bad_steps: how many of the last steps had no finite gradient.
      best: the lowest loss and word error rate of the validation set so far.
      total: losses, an average over some 200 steps.

    Args:
      parts: what is one for all processes; None for what this run has not (fp16's scaler), or this process has not
        (the running average).
      of_each_process: what each process has of its own: its place in the data, its random generators.
      identity: what a checkpoint must have in common with a run that goes on from it (`base_weights`), and what else is
        to be found in it (`config`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parts: dict[str, Stateful | None],
        of_each_process: dict[str, Stateful],
        identity: dict[str, Any],
    ) -> None:
        self.step, self.epoch, self.bad_steps = 0, 1, 0
        self.best = {"loss": math.inf, "wer": math.inf}
        self.total = Averages()
        self._accelerator = accelerator
        self._parts, self._of_each_process, self._identity = parts, of_each_process, identity

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
          CheckpointError: it is of another model, other base weights, or, with train.fsdp, another number of
            processes.
        """
        rank = self._accelerator.process_index
        content = load_checkpoint(path, rank)
        self._check_fits(content, path)
        for name, part in self._parts.items():
            if part is not None:
                try:
                    part.load_state_dict(content[name])
                except CheckpointError as e:
                    raise CheckpointError(f"{path}: {e}") from None
        same_processes = len(content["rng"]) == self._accelerator.num_processes
        for name, part in self._of_each_process.items():
            if name not in content:  # checkpoints of earlier versions have no languages
                continue
            if same_processes:
                part.load_state_dict(content[name][rank])
            elif name == "loader":  # it gives up its place in the epoch, and says so
                part.load_state_dict(content[name][0])
            elif name == "languages":
                for state in content[name]:
                    part.load_state_dict(state)
            else:  # other random numbers than in the first steps
                set_seed((torch.initial_seed() + content["step"]) % 2**32)
        self.step, self.epoch, self.bad_steps = content["step"], content["epoch"], content["bad_steps"]
        self.best = dict(content["best"])
        self.total = Averages(content["total"].clone())
        logger.info("resuming from %s: epoch %d, step %d", path, self.epoch, self.step)

    def _check_fits(self, content: dict[str, Any], path: Path) -> None:
        processes, sharded = self._accelerator.num_processes, self._identity["sharded"]
        bases, own_bases = content["base_weights"], self._identity["base_weights"]
        if bases != own_bases:
            raise CheckpointError(f"{path}: was trained on other base weights: {bases}, now {own_bases}")
        if sharded is not None and len(content["rng"]) != processes:
            raise CheckpointError(
                f"{path}: was written by {len(content['rng'])} processes, not {processes}; with train.fsdp each has "
                "a share of it"
            )
        if (content["sharded"] is None) != (sharded is None):
            raise CheckpointError(f"{path}: was written {'without' if sharded else 'with'} train.fsdp")

    def check_gradient(self, grad_norm: float, batches: Sequence[Batch], max_bad_steps: int, exp_dir: Path) -> None:
        """Count steps in a row whose gradient was not finite.

        Raises:
          UserError: there are `max_bad_steps` of them; the last one's batches are in `exp_dir`.
        """
        if math.isfinite(grad_norm):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        ids = ", ".join(i for batch in batches for i in batch.ids)
        logger.warning("step %d: gradient norm %s, step skipped; batch: %s", self.step, grad_norm, ids)
        if self.bad_steps >= max_bad_steps:
            path = exp_dir / f"bad-batch-{self.step}-rank{self._accelerator.process_index}.pt"
            save_batches(path, batches)
            raise UserError(
                f"{self.bad_steps} steps in a row without a finite gradient; lower optim.lr, or look at the last batch "
                f"(in {path}) and at --print-diagnostics. The last checkpoint is intact."
            )

    def improved(self, scalars: dict[str, float]) -> list[str]:
        """Which of `best` a validation has improved on; they are noted."""
        names = [name for name, value in self.best.items() if scalars[name] < value]
        self.best |= {name: scalars[name] for name in names}
        return names

    def save(self, exp_dir: Path, names: list[str], keep: int) -> None:
        """Write one checkpoint under each of `names`; of the numbered ones the last `keep` stay. All processes call it.

        Raises:
          CheckpointError: one of the processes cannot write, so all stop.
        """
        main, sharded = self._accelerator.is_main_process, self._identity["sharded"] is not None
        each = {name: gather_object([part.state_dict()]) for name, part in self._of_each_process.items()}
        content: dict[str, Any] = {}
        if main or sharded:  # the others have nothing to write
            content = {name: None if part is None else part.state_dict() for name, part in self._parts.items()}
            content |= each | self._identity
            content |= {"step": self.step, "epoch": self.epoch, "bad_steps": self.bad_steps}
            content |= {"best": self.best, "total": self.total.values}
        with failing_together():
            if sharded and not main:
                for name in names:
                    save_share(exp_dir / name, content, self._accelerator.process_index)
        with failing_together():
            if main:
                for name in names:
                    save_checkpoint(exp_dir / name, content)
                remove_old_checkpoints(exp_dir, keep=keep)


class TrainedWeights:
    """What is trained of a model, and what was trained in a stage before and is frozen now (`carried`)."""

    def __init__(self, model: nn.Module, carried: list[str]) -> None:
        self.model, self.carried = model, carried

    def state_dict(self) -> dict[str, Any]:
        return trained_state_dict(self.model, also=self.carried)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trained(self.model, state, "its weights")


class OptimizerShares:
    """An optimizer; of one whose parameters are sharded, this process's share."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return optimizer_shares(self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer_shares(self.optimizer, state)


class RandomGenerators:
    """All that a training step draws from, of this process."""

    def state_dict(self) -> dict[str, Any]:
        return rng_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_rng_state(state)


def build_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    parts: dict[str, Stateful | None],
    loader: Stateful,
    languages: Stateful,
    carried: list[str],
    base_weights: dict[str, dict[str, str]],
    config: dict[str, Any],
) -> TrainState:
    """The state of a run of recipes/train.py.

    Args:
      model: without its wrapping for several processes.
      parts: those that are stateful by themselves: the schedule, the running average, ...
      loader, languages: of this process, the place in the data and what it has trained on.
      carried: names of what is frozen, but comes from a stage before and so is in no file.
      base_weights: the files of what is frozen, and their hashes.
      config: of the whole experiment, as it is saved.
    """
    return TrainState(
        accelerator,
        {
            "model": TrainedWeights(model, carried),
            "optimizer": OptimizerShares(optimizer),
            "scaler": accelerator.scaler,
            **parts,
        },
        {"loader": loader, "languages": languages, "rng": RandomGenerators()},
        {"sharded": describe_shares(model, optimizer), "base_weights": base_weights, "config": config},
    )
