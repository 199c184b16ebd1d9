#!/usr/bin/env python3
"""A step of the optimizers on the CPU, beside PyTorch's fused AdamW, which is the floor: one pass over the tensors.

    tools/bench_optim.py                # large matrices, and the many small tensors of an encoder; made-up gradients

CPU time of one thread; the optimizers take turns of four steps each, and the least counts. ScaledAdam updates the sizes
of the tensors in one step of four.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from bench_wkv import machine, number, print_table
from torch import nn

from speechllm.optim import ScaledAdam

SHAPES = {
    "large": [(768, 3072), (3072, 768), (768, 768), (4096, 1024)],
    "small": [(192,)] * 200 + [(192, 192)] * 50 + [(192, 512)] * 20,
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "ScaledAdam": ScaledAdam,
}
_STEPS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine([], "cpu", 1))
    rows = []
    for title, shapes in SHAPES.items():
        least = measure(shapes, args.repeat)
        floor = least["AdamW, fused"]
        size = f"{len(shapes)} {title}, {number(sum(map(_numel, shapes)) / 1e6)} M"
        rows += [[size, name, number(1e3 * seconds), number(seconds / floor)] for name, seconds in least.items()]
    print_table(["tensors", "optimizer", "ms a step", "to AdamW, fused"], rows)
    return 0


def measure(shapes: list[tuple[int, ...]], repeat: int) -> dict[str, float]:
    """Optimizer -> CPU seconds of a step."""
    optimizers = {name: build(made_up(shapes)) for name, build in OPTIMIZERS.items()}
    least = dict.fromkeys(optimizers, float("inf"))
    for turn in range(repeat + 1):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            for _ in range(_STEPS):
                optimizer.step()
            if turn:  # the first one allocates
                least[name] = min(least[name], (time.process_time() - start) / _STEPS)
    return least


def made_up(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.05 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return params


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


if __name__ == "__main__":
    sys.exit(main())
