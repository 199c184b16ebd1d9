"""Several processes as one: starting them, stopping them, failing together, and steps of like numbers of batches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from speechllm.data import Batch, WaveformBatch
from speechllm.weights import CheckpointError


def launch(processes: int, command: Sequence[str]) -> None:
    """Run a script and its arguments in several processes, with torchrun; a SIGTERM is passed on to them."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in; 30 are few
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={processes}", *command])
    except SignalException as e:
        if e.sigval != signal.SIGTERM:
            raise
    except ChildFailedError as e:
        sys.exit(str(e))


@contextmanager
def failing_together() -> Iterator[None]:
    """If one process cannot write, all stop with its error: the others would wait for it for ever."""
    error = None
    try:
        yield
    except CheckpointError as e:
        error = e
    if failures := [e for e in gather_object([error]) if e is not None]:
        raise failures[0]


class StopSignal:
    """Inside a `with`, notes SIGTERM (a job that is preempted or runs out of its time) instead of dying of it."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: object) -> None:
        self.received = True


def batch_groups(
    accelerator: Accelerator, batches: Iterable[Batch | WaveformBatch], size: int, stopping: StopSignal
) -> Iterator[tuple[list[Batch], bool]]:
    """What one optimizer step takes: lists of `size` batches, as many on each process; what is left over at the end of
    an epoch makes a shorter one. The first process that has none left ends the epoch for all.

    Yields:
      the batches of this process, on its device, and whether any process has been told to stop.
    """
    iterator = iter(batches)
    while True:
        group = list(islice(iterator, size))
        mine = torch.tensor([[len(group), stopping.received]], device=accelerator.device)
        counts, told_to_stop = accelerator.gather(mine).unbind(1)
        # One that has fewer, as nothing of a batch was usable, ends the epoch for all.
        group = group[: int(counts.min())]
        if not group:
            return
        yield [batch.to(accelerator.device) for batch in group], bool(told_to_stop.any())
