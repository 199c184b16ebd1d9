"""What is looked at in single steps of a run: how many floating-point operations one has, and where the time of some
goes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from speechllm.files import replaced_file
from speechllm.linear import has_onednn

logger = logging.getLogger(__name__)

# The first steps of a process choose kernels and fill caches.
_WARM_UP_STEPS = 3
_LISTED_OPERATORS = 15
# Dense products in bfloat16 (V100: float16), TFLOP/s, of the data sheets; the first whose name is in the device's.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "A10": 125.0,
    "L4": 121.0,
    "V100": 125.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """What a GPU could do in half precision at most, in TFLOP/s; None if that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Inside, the products and convolutions are counted, backward passes included. Triton kernels are not seen."""

    # called with the shapes of an operator's tensors, other arguments as they are
    def product_added(shape: Any, x: Any, y: Any, **_: Any) -> int:
        return 2 * math.prod(x) * y[-1]

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    unknown_to_the_counter: dict[Any, Callable[..., int]] = {
        torch.ops.aten.baddbmm_: product_added,
        torch.ops.aten.addmm_: product_added,
    }
    if has_onednn():
        unknown_to_the_counter[torch.ops.mkldnn._linear_pointwise] = linear
    with FlopCounterMode(display=False, custom_mapping=unknown_to_the_counter) as counter:
        yield counter


class StepWatch:
    """Counts the operations of the second step of a process, and traces `profile_steps` of those that follow.

    A trace is `EXP_DIR/profile/steps-FIRST-LAST.json.gz`, for https://ui.perfetto.dev or chrome://tracing; the
    operators that take the most time are in the log.

    Attributes:
        flops: of the step that was counted; None before, or where it is not.
    """

    def __init__(self, exp_dir: Path, profile_steps: int, counts_flops: bool) -> None:
        self.flops: int | None = None
        self._folder, self._profile_steps, self._counts_flops = exp_dir / "profile", profile_steps, counts_flops
        self._done = 0
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around each step; `number` is that of the run."""
        if self._profile_steps and self._done == _WARM_UP_STEPS:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        counts = self._counts_flops and self._done == 1
        with flop_counter() if counts else nullcontext() as counter:
            yield
        if counter is not None:
            self.flops = counter.get_total_flops()
        self._done += 1
        if self._profile is not None and self._done == _WARM_UP_STEPS + self._profile_steps:
            self._write(self._profile, number)
            self._profile = None

    def _write(self, traced: profile, number: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        traced.stop()
        path = self._folder / f"steps-{number - self._profile_steps + 1}-{number}.json.gz"
        with replaced_file(path) as tmp:
            # by its suffix it is told whether to compress
            whole = tmp.with_name(f"{tmp.name}.json.gz")
            traced.export_chrome_trace(str(whole))
            whole.replace(tmp)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=by, row_limit=_LISTED_OPERATORS, max_name_column_width=50)
        logger.info("trace of %d steps: %s\n%s", self._profile_steps, path, table)
