"""What a training run tells while it goes on: running sums, throughput, norms by part, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from speechllm.data import Batch
from speechllm.train.sharding import total_norm

T = TypeVar("T")


class Averages:
    """Sums over batches, shown as icefall does: `loss[loss=0.51, ctc=0.3, acc=0.9]`."""

    # Sums; what a model does not have stays 0.
    _NAMES = ("loss", "llm_loss", "ctc_loss", "cr_ctc_loss", "transducer_loss", "tokens", "correct")

    def __init__(self, values: Tensor | None = None) -> None:
        self.values = torch.zeros(len(self._NAMES), dtype=torch.float64) if values is None else values

    @classmethod
    def of(cls, out: dict[str, Tensor]) -> Averages:
        """The sums of one batch, from what the `forward` of a model gives."""
        none = torch.zeros_like(out["loss"])
        return cls(torch.stack([out.get(name, none).detach().double() for name in cls._NAMES]).cpu())

    def add(self, other: Averages, decay: float = 1.0) -> None:
        self.values = self.values * decay + other.values

    def items(self) -> dict[str, float]:
        """The mean loss of a token, its parts that are not 0, and with a language model the share of right tokens."""
        sums = dict(zip(self._NAMES, self.values.tolist(), strict=True))
        tokens, correct = sums.pop("tokens"), sums.pop("correct")
        means = {name: value / max(tokens, 1.0) for name, value in sums.items() if value or name == "loss"}
        return means | ({"token_accuracy": correct / max(tokens, 1.0)} if sums["llm_loss"] else {})

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.items().items())
        return f"[{values}, over {self.values[self._NAMES.index('tokens')]:.0f} tokens]"


class Throughput:
    """How much audio was trained on since the last `restart`, how much of it was padding, and how much of the time went
    into waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()
        self._audio_seconds = self._frames = self._padded_frames = self._waited = 0.0

    def add(self, batch: Batch) -> None:
        frames = batch.features.shape[0] * batch.features.shape[1]
        self._audio_seconds += batch.audio_seconds
        self._frames += frames
        self._padded_frames += batch.padding_share * frames

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


def _norm(tensors: list[Tensor]) -> float:
    return total_norm(tensors).item() if tensors else 0.0


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU's memory, or on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
