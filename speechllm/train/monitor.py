"""What a training run tells while it goes on: running sums, throughput, norms by part, memory; log and TensorBoard."""

from __future__ import annotations

import logging
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import speechllm
from speechllm.config import to_dict
from speechllm.data import Batch
from speechllm.train.config import Experiment
from speechllm.train.sharding import total_norm
from speechllm.train.trackers import Trackers
from speechllm.train.watch import StepWatch, peak_tflops

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Averages:
    """Sums over batches, shown as icefall does: `loss[loss=0.51, ctc=0.3, acc=0.9]`."""

    # Sums; what a model does not have stays 0. New ones come last: a checkpoint of an earlier version has fewer.
    _NAMES = ("loss", "llm_loss", "ctc_loss", "cr_ctc_loss", "transducer_loss", "tokens", "correct", "errors")

    def __init__(self, values: Tensor | None = None) -> None:
        self.values = torch.zeros(len(self._NAMES), dtype=torch.float64)
        if values is not None:
            self.values[: len(values)] = values

    @classmethod
    def of(cls, out: dict[str, Tensor]) -> Averages:
        """The sums of one batch, from what the `forward` of a model gives."""
        none = torch.zeros_like(out["loss"])
        return cls(torch.stack([out.get(name, none).detach().double() for name in cls._NAMES]).cpu())

    def add(self, other: Averages, decay: float = 1.0) -> None:
        self.values = self.values * decay + other.values

    @property
    def tokens(self) -> float:
        """Of the labels."""
        return self.values[self._NAMES.index("tokens")].item()

    def items(self) -> dict[str, float]:
        """The mean loss of a token, its parts that are not 0, and with a language model the share of right tokens;
        `errors` for a token of those that a loss on errors has found."""
        sums = dict(zip(self._NAMES, self.values.tolist(), strict=True))
        tokens, correct = sums.pop("tokens"), sums.pop("correct")
        means = {name: value / max(tokens, 1.0) for name, value in sums.items() if value or name == "loss"}
        return means | ({"token_accuracy": correct / max(tokens, 1.0)} if sums["llm_loss"] else {})

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.items().items())
        return f"[{values}, over {self.tokens:.0f} tokens]"


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to: sums over the batches of all processes; the norm of the gradient before it was
    clipped; norms by part of the model, if they were asked for."""

    losses: Averages
    grad_norm: float
    norms: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)


class Throughput:
    """How much audio was trained on since the last `restart`, how much of it was padding, and how much of the time went
    into waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()
        self._audio_seconds = self._frames = self._padded_frames = self._waited = self._tokens = 0.0

    def add(self, batch: Batch) -> None:
        frames = batch.features.shape[0] * batch.features.shape[1]
        self._audio_seconds += batch.audio_seconds
        self._frames += frames
        self._padded_frames += batch.padding_share * frames

    def add_tokens(self, tokens: float) -> None:
        """Those of the labels of a step, of all processes."""
        self._tokens += tokens

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same items; how long each lets one wait is counted."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            yield item

    def scalars(self, world_size: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self._since
        return {
            "audio_seconds_per_second": world_size * self._audio_seconds / elapsed,
            "tokens_per_second": self._tokens / elapsed,
            "padding_share": self._padded_frames / max(self._frames, 1.0),
            "data_wait_share": self._waited / elapsed,
        }


def norms_by_part(model: nn.Module) -> dict[str, float]:
    """`grad_norm/PART` and `param_norm/PART` of the trained parameters of each child of the model; all processes of a
    sharded model must call this."""
    norms = {}
    for name, part in model.named_children():
        trained = [p for p in part.parameters() if p.requires_grad]
        if trained:
            norms[f"param_norm/{name}"] = _norm(trained)
            norms[f"grad_norm/{name}"] = _norm([p.grad for p in trained if p.grad is not None])
    return norms


def _norm(tensors: Sequence[Tensor]) -> float:
    return total_norm(tensors).item() if tensors else 0.0


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU's memory, or on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunLog:
    """A progress bar, log lines in icefall's words, and TensorBoard; process 0 writes, but all of them have it.

    Args:
      step: that the run goes on from: what an earlier one has written of later steps is taken back.
    """

    def __init__(self, accelerator: Accelerator, exp_dir: Path, step: int, experiment: Experiment) -> None:
        self._accelerator = accelerator
        self.throughput = Throughput()
        config, is_main = experiment.train, accelerator.is_main_process
        self._trackers = Trackers(config.trackers, exp_dir, step, to_dict(experiment)) if is_main else None
        known = peak_tflops(accelerator.device) if config.mixed_precision is not None else None
        # sharded tensors are no matter for the counter
        self._peak = None if config.fsdp else config.peak_tflops or known
        self._watch = StepWatch(exp_dir, config.profile if is_main else 0, self._peak is not None)
        self._flops_per_second: float | None = None  # of audio
        # None: a bar on a terminal only
        self._bar = tqdm(
            total=config.num_steps, initial=step, unit="step", disable=None if is_main else True, smoothing=0.05
        )

    def watching(self, step: int) -> AbstractContextManager[None]:
        """To be around step number `step`."""
        return self._watch.step(step)

    def advance(self, batches: Sequence[Batch], losses: Averages) -> None:
        """To be called after each step, with its batches, and its losses over all processes."""
        for batch in batches:
            self.throughput.add(batch)
        self.throughput.add_tokens(losses.tokens)
        if self._watch.flops is not None and self._flops_per_second is None:
            self._flops_per_second = self._watch.flops / sum(batch.audio_seconds for batch in batches)
        self._bar.update()

    def _utilization(self, audio_seconds_per_second: float) -> dict[str, float]:
        """The products of one process in a second, and what part that is of what its GPU could do."""
        if self._flops_per_second is None or self._peak is None:
            return {}
        tflops = self._flops_per_second * audio_seconds_per_second / self._accelerator.num_processes / 1e12
        return {"tflops": tflops, "mfu": tflops / self._peak}

    def training(
        self,
        epoch: int,
        step: int,
        averages: Averages,
        total: Averages,
        batches: Sequence[Batch],
        scalars: dict[str, float],
    ) -> None:
        """The losses of a step, `total` over the last ones, and more: `lr`, `grad_norm`, norms by part."""
        rows = sum(len(batch) for batch in batches)
        speed = self.throughput.scalars(self._accelerator.num_processes)
        speed |= self._utilization(speed["audio_seconds_per_second"])
        logger.info(
            "Epoch %d, step %d, loss%s, tot_loss%s, batch size: %d, lr: %.2e, grad norm: %.2f, %.0f audio s/s, "
            "%.0f tokens/s%s",
            epoch, step, averages, total, rows, scalars["lr"], scalars["grad_norm"], speed["audio_seconds_per_second"],
            speed["tokens_per_second"], f", MFU: {speed['mfu']:.1%}" if "mfu" in speed else "",
        )  # fmt: skip
        running = {f"tot_{name}": value for name, value in total.items().items()}
        memory = {"peak_memory_gb": peak_memory_gb(self._accelerator.device)}
        self._write("train", {**averages.items(), **running, **scalars, **speed, **memory}, step)
        self.throughput.restart()

    def validation(self, epoch: int, step: int, scalars: dict[str, float], examples: str) -> None:
        values = ", ".join(f"{name}: {value:.4g}" for name, value in scalars.items())
        logger.info("Epoch %d, step %d, validation: %s\n%s", epoch, step, values, examples)
        self._write("valid", scalars, step)
        if self._trackers is not None:
            self._trackers.text("valid/examples", examples, step)
        self.throughput.restart()

    def _write(self, kind: str, scalars: dict[str, float], step: int) -> None:
        if self._trackers is not None:
            self._trackers.scalars(kind, scalars, step)

    def close(self) -> None:
        self._bar.close()
        if self._trackers is not None:
            self._trackers.close()


def describe_parameters(model: nn.Module) -> str:
    """`encoder 1.2 M, projector 0.05 M (frozen), ...`"""
    parts = []
    for name, part in model.named_children():
        count = sum(p.numel() for p in part.parameters())
        if not count:
            continue
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        note = "" if trained == count else " (frozen)" if trained == 0 else f" ({trained / 1e6:.2f} M trained)"
        parts.append(f"{name} {count / 1e6:.2f} M{note}")
    return ", ".join(parts)


def provenance() -> str:
    """What was run, for the head of config.yaml."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    revision = git.stdout.strip() or "no git"
    return (
        f"{shlex.join(sys.argv)}\nspeechllm {speechllm.__version__} ({revision}), torch {torch.__version__}, "
        f"lhotse {version('lhotse')}, python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
