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

from speechllm.config import to_dict
from speechllm.data import Batch, SpeechLoader
from speechllm.errors import UserError
from speechllm.llm.adapters import RankAllocation
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import build_scheduler
from speechllm.train.checkpoint import (
    RunningAverage,
    load_share,
    load_trained,
    remove_old_checkpoints,
    rng_state,
    save_checkpoint,
    save_share,
    set_rng_state,
    trained_state_dict,
)
from speechllm.train.config import Experiment
from speechllm.train.diagnostics import save_batches
from speechllm.train.languages import TrainedLanguages
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
    """All of a run that goes on as it was: how far it has come, and the parts that a checkpoint holds besides.

    Attributes:
      step: optimizer steps that are done; epoch: the one that goes on, from 1.
      bad_steps: how many of the last steps had no finite gradient.
      best: the lowest loss and word error rate of the validation set so far.
      total: losses, an average over some 200 steps.
      optimizer, scheduler, ranks: what a step moves, besides the weights.
      average: of the weights; None in a process that writes no checkpoint.
      loader, languages: this process's place in the training data, and what it has trained on.

    Args:
      model: without its wrapping for several processes.
      config: of the whole experiment, as it is saved.
      from_stage_before: names of the weights that were trained in the stage before.
      base_weights: the files of what is frozen, and their hashes: a run goes on with the same ones only.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: SpeechLLM | EncoderModel,
        optimizer: Optimizer,
        loader: SpeechLoader,
        config: Experiment,
        from_stage_before: set[str],
        base_weights: dict[str, dict[str, str]],
    ) -> None:
        self.step, self.epoch, self.bad_steps = 0, 1, 0
        self.best = {"loss": math.inf, "wer": math.inf}
        self.total = Averages()
        self.optimizer, self.loader = optimizer, loader
        self.scheduler = build_scheduler(optimizer, config.optim, config.train.num_steps)
        self.ranks = RankAllocation(model.llm, config.train.num_steps)
        # Process 0 writes the checkpoints; the others need no average, unless they have shares of their own.
        averages_here = accelerator.is_main_process or config.train.fsdp
        self.average = RunningAverage(model, config.train.average_period) if averages_here else None
        self.languages = TrainedLanguages(model.config.languages or ())
        # Frozen, but not in the files that encoders and language model come from, so every checkpoint has it: what was
        # trained in a stage before, and parts that have no file of their own.
        in_files = ("llm.", *(f"{name}." for name, _, _ in model.encoders()))
        carried = sorted(
            n
            for n, p in model.named_parameters()
            if not p.requires_grad and (n in from_stage_before or not n.startswith(in_files))
        )
        self._accelerator = accelerator
        # under the names that they have in a checkpoint; None is what this run or this process does not have
        self._parts: dict[str, Stateful | None] = {
            "model": TrainedWeights(model, carried),
            "optimizer": OptimizerShares(optimizer),
            "scaler": accelerator.scaler,
            "model_avg": self.average,
            "scheduler": self.scheduler,
            "ranks": self.ranks,
        }
        self._of_each_process: dict[str, Stateful] = {
            "loader": loader,
            "languages": self.languages,
            "rng": RandomGenerators(),
        }
        self._sharded = describe_shares(model, optimizer)
        self._identity = {
            "sharded": self._sharded,
            "base_weights": base_weights,
            "config": to_dict(config),
        }

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, of any number of processes, sharded or not.

        Raises:
          CheckpointError: it is of another model, or of other base weights.
        """
        rank = self._accelerator.process_index
        if self._sharded is None:
            content = load_share(path, 0, 1)
        else:
            content = load_share(path, rank, self._accelerator.num_processes, self._sharded)
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
            elif name == "loader":  # it shares out what is left of the epoch, or begins it anew and says so
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
        bases, own_bases = content["base_weights"], self._identity["base_weights"]
        if bases != own_bases:
            raise CheckpointError(f"{path}: was trained on other base weights: {bases}, now {own_bases}")

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
        """Which of `best` a validation has improved on, of those that it has; they are noted."""
        names = [name for name, value in self.best.items() if scalars.get(name, math.inf) < value]
        self.best |= {name: scalars[name] for name in names}
        return names

    def save(self, exp_dir: Path, names: list[str], keep: int) -> None:
        """Write one checkpoint under each of `names`; of the numbered ones the last `keep` stay. All processes call it.

        Raises:
          CheckpointError: one of the processes cannot write, so all stop.
        """
        main, sharded = self._accelerator.is_main_process, self._sharded is not None
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
    """What is trained of a model, and what is frozen and in no other file (`carried`)."""

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
