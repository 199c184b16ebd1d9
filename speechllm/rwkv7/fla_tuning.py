"""How fla's kernels are tuned.

Before it runs a kernel for the first time, Triton compiles and times every configuration that fla lists for it: some
300 for a forward and a backward pass of RWKV-7, which takes minutes. What it finds is kept in `~/.triton` for the next
runs. `SPEECHLLM_FLA_TUNING=0` has one configuration taken untried: the first step comes in seconds, the kernels may be
slower.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

VARIABLE = "SPEECHLLM_FLA_TUNING"


def prepare_kernels() -> None:
    """To be called once, after the kernels are imported and before the first of them runs.

    Raises:
      ValueError: the environment variable is neither 0 nor 1.
    """
    wish = os.environ.get(VARIABLE, "1")
    if wish not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is 0 or 1, not {wish!r}")
    if wish == "1":
        logging.info(
            "fla: on its first run Triton compiles and tunes the kernels for minutes; the results stay in ~/.triton. "
            "%s=0 leaves the tuning out",
            VARIABLE,
        )
        return
    for tuner in _tuners():
        tuner.configs = [min(tuner.configs, key=_strangeness)]


def _tuners() -> Iterator[Any]:
    """Triton's `Autotuner` of each kernel of fla that is imported, below the heuristics that may wrap it."""
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            for kernel in list(vars(module).values()):
                while kernel is not None and not isinstance(kernel, Autotuner):
                    kernel = getattr(kernel, "fn", None)
                if kernel is not None:
                    yield kernel


def _strangeness(config: Any) -> tuple[int, ...]:
    """How far it is from what suits most kernels on most cards: tiles of 64 or less, 4 warps, 2 stages."""
    tiles = sum(abs(size - 64) for size in config.kwargs.values() if isinstance(size, int))
    return tiles, abs(config.num_warps - 4), abs(config.num_stages - 2)
