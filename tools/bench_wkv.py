#!/usr/bin/env python3
"""Time, memory and error of the RWKV-7 recurrence, beside what other packages offer.

    tools/bench_wkv.py                              # B=4 T=512 H=12 D=64, float32, on the CPU
    tools/bench_wkv.py --length 2048 --repeat 3 --skip rwkv7-hf
    tools/bench_wkv.py --device cuda                # also in bfloat16, and the Triton kernels of fla
    tools/bench.sh                                  # with the other packages installed, and bench_rwkv.py too

Each implementation has a process to itself. Times are the median over the repetitions, the smallest in brackets;
`forward` is without gradients. Memory is what one forward and backward pass takes at its highest above what the
process held before (on Linux). Ratios are to the first row. Errors are the norm of the difference from the plain
recurrence in float64 over the norm of that, for gradients the worst of the seven inputs, all the worst over typical,
fast and slow decays and repeated keys.

GFLOP/s and GB/s are those of forward and backward together, of the recurrence as it is written, however it is computed:
its four products of V x K for each position and head, and twice that backward; each input read once and each output
written once, and the inputs read again for the gradients. The line above the table has what the machine does in a copy
(bytes read and written) and in a square matrix product.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.linear import product
from speechllm.rwkv7 import wkv7

# ---- What the benches share -----------------------------------------------------------------------------------

PUBLISHED = {"0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "2.9b": (32, 2560)}  # RWKV-7: layers, width
VOCABULARY = 65536


@dataclass(frozen=True)
class Failure:
    """Why a row has no numbers."""

    reason: str
    not_installed: bool = False


def in_own_process(function: Callable, *args, threads: int):
    """What ``function(*args)`` returns in a process of ``threads`` threads that has only imported PyTorch, or a
    ``Failure``.

    One package that is missing or breaks does not cost the rows of the others; what broke goes to stderr.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "speechllm.model.speech_llm"])  # once, for all such processes
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        try:
            return pool.submit(function, *args).result()
        except ModuleNotFoundError as e:
            return Failure(f"not installed ({e})", not_installed=True)
        except BrokenProcessPool:
            return Failure("failed (the process was killed: out of memory?)")
        except Exception as e:
            traceback.print_exception(e)
            return Failure(f"failed ({e!r:.100})")


def seconds(
    run: Callable[[], object],
    repeat: int,
    device: str = "cpu",
    before: Callable = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """How long ``run`` takes each of ``repeat`` times, after once to warm up; ``before`` each is not counted."""
    times = []
    for _ in range(repeat + 1):
        before()
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return times[1:]


def print_profile(title: str, run: Callable[[], object]) -> None:
    """One line to stderr: the operators that ``run`` spends its time in, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares = [f"{event.key} {100 * event.self_cpu_time_total / total:.0f}% ({event.count})" for event in events[:8]]
    print(f"profile of {title}, {total / 1e3:.0f} ms: {', '.join(shares)}", file=sys.stderr, flush=True)


def memory_of(run: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Bytes held before ``run`` and at its highest: the resident memory of the process (Linux), or the GPU's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return held, torch.cuda.max_memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is free now would hide what the run takes
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    held = resident("VmRSS")
    run()
    return held, resident("VmHWM")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def median_and_least(values: list[float], factor: float = 1.0) -> str:
    return f"{number(statistics.median(values) * factor)} ({number(min(values) * factor)})"


def ratio(values: list[float], first: list[float]) -> str:
    """Of the medians."""
    return f"{statistics.median(values) / statistics.median(first):.2f}"


def machine(packages: list[str], device: str, threads: int) -> str:
    """One line: processor, threads, versions, settings of the allocator."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    if device == "cuda":
        model += f", {torch.cuda.get_device_name()}"
    versions = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    allocator = os.environ.get("MALLOC_MMAP_THRESHOLD_", "default")
    return f"{model}, {threads} threads; {', '.join(versions)}; MALLOC_MMAP_THRESHOLD_: {allocator}"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


@torch.no_grad()
def product_rate(dtype: torch.dtype, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a square product, by the faster of torch.mm and the language model's own product."""
    n = 8192 if device == "cuda" else 2048
    x, y = torch.randn(2, n, n, device=device).to(dtype)
    ways = (functools.partial(multiply, x, y) for multiply in (torch.mm, product))
    return 2 * n**3 / min(statistics.median(seconds(way, 5, device, clock=clock)) for way in ways)


@torch.no_grad()
def copy_rate(device: str) -> float:
    """Bytes/s, read and written, of copying a tensor much larger than any cache."""
    source = torch.zeros(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(seconds(lambda: target.copy_(source), 5, device))


def machine_rates(device: str) -> dict[str, float]:
    """What the machine does at best, to hold achieved rates against."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    rates = {"copy, GB/s": copy_rate(device) / 1e9}
    for dtype in dtypes:
        rates[f"{str(dtype).removeprefix('torch.')} product, GFLOP/s"] = product_rate(dtype, device) / 1e9
    return rates


def append_row(path: Path | None, case: str, figures: Mapping[str, float | str] | Failure) -> None:
    """Writes a row to the file of ``--rows`` as soon as it is known: a run that is cut keeps what it has."""
    if path is None:
        return
    row: dict[str, object] = {"case": case}
    if isinstance(figures, Failure):
        row |= {"status": "skipped" if figures.not_installed else "failed", "error": figures.reason}
    else:
        row |= {"status": "ok", "figures": dict(figures)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def figures_text(figures: Mapping[str, float | str]) -> str:
    """`copy, GB/s: 31.4; ...`"""
    return "; ".join(f"{name}: {x if isinstance(x, str) else number(x)}" for name, x in figures.items())


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=Path, metavar="FILE",
                        help="also append each row to this file, as a line of JSON, once it is known")  # fmt: skip


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")


def add_common_options(parser: argparse.ArgumentParser, names: list[str], repeat: int) -> None:
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=repeat, help="repetitions after a warm-up (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also print where the time of each row goes")
    parser.add_argument("--skip", action="append", default=[], choices=names, metavar="NAME",
                        help=f"leave a row out, may be repeated: {', '.join(names)}")  # fmt: skip


def exit_status(results: list[object]) -> int:
    """1 if a row failed other than for want of a package."""
    return int(any(isinstance(x, Failure) and not x.not_installed for x in results))


# ---- The implementations: r, w, k, v, a, b (N, L, H, D), state (N, H, V, K) -> out, state ---------------------


def fla_pytorch(r, w, k, v, a, b, state):
    """fla's chunked form in PyTorch: lengths of whole chunks, queries scaled, heads before positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise

    chunk, L = 32, r.shape[1]
    r, w, k, v, a, b = (F.pad(x, (0, 0, 0, 0, 0, -L % chunk)).transpose(1, 2) for x in (r, w, k, v, a, b))
    out, state = dplr_chunkwise(r * r.shape[-1] ** 0.5, k, v, a, b, w, state.mT, chunk_size=chunk)
    return out[:, :, :L].transpose(1, 2), state.mT


def fla_triton(r, w, k, v, a, b, state):
    from fla.ops.rwkv7 import chunk_rwkv7

    out, state = chunk_rwkv7(r, w, k, v, a, b, initial_state=state.mT.contiguous(), output_final_state=True)
    return out, state.mT


def fla_bounded(r, w, k, v, a, b, state):
    """The same kernels, told how strong a decay of RWKV-7 can be: longer chunks, by tensor cores."""
    from fla.ops.rwkv7 import chunk_rwkv7

    initial = {"initial_state": state.mT.contiguous(), "output_final_state": True}
    out, state = chunk_rwkv7(r, w, k, v, a, b, **initial, lower_bound=-math.exp(-0.5))
    return out, state.mT


def rwkv7_hf(r, w, k, v, a, b, state):
    from rwkv7_hf.ops_rwkv7 import rwkv7_recurrent

    out, state = rwkv7_recurrent(r, w.exp(), k, v, a, b, state.mT)
    return out, state.mT


IMPLEMENTATIONS: dict[str, Callable] = {
    "speechllm": functools.partial(wkv7, backend="chunked"),
    "plain-loop": functools.partial(wkv7, backend="reference"),
    "fla-pytorch": fla_pytorch,
    "rwkv7-hf": rwkv7_hf,
    "fla-triton": fla_triton,
    "fla-bounded": fla_bounded,
}
ONLY_CUDA = {"fla-triton", "fla-bounded"}
BFLOAT16 = {"speechllm", "fla-triton", "fla-bounded"}

# Mean and deviation of what goes through the sigmoid of the decay.
DECAYS = {"typical": (-2.0, 2.0), "fast": (20.0, 0.0), "slow": (-9.0, 0.0), "repeated keys": (-6.0, 0.0)}


# ---- The measurements -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    forward: list[float]
    both: list[float]
    memory: int
    errors: tuple[float, float, float]


def make_inputs(N: int, L: int, H: int, D: int, decay: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """r, w, k, v, a, b, state as a model makes them; the state is float32."""
    torch.manual_seed(0)
    mean, deviation = DECAYS[decay]
    r, k, v = torch.randn(3, N, L, H, D)
    w = -math.exp(-0.5) * torch.sigmoid(mean + deviation * torch.randn(N, L, H, D))
    kk, rate = F.normalize(torch.randn(N, L, H, D), dim=-1), torch.rand(N, L, H, D)
    if decay == "repeated keys":
        kk, rate = kk[:, :1].expand_as(kk), torch.ones_like(rate)
    inputs = [x.to(device, dtype, memory_format=torch.contiguous_format) for x in (r, w, k, v, -kk, kk * rate)]
    return [*inputs, torch.randn(N, H, D, D, device=device)]


def outputs_and_gradients(function: Callable, inputs: list[Tensor], directions: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, state = function(*inputs)
    return out.detach(), state.detach(), *torch.autograd.grad((out, state), inputs, directions)


def errors(function: Callable, L: int, D: int, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    worst = torch.zeros(9, dtype=torch.float64)
    for decay in DECAYS:
        inputs = make_inputs(1, L, 2, D, decay, dtype, device)
        directions = [torch.randn_like(inputs[3]), torch.randn_like(inputs[6])]
        reference = functools.partial(wkv7, backend="reference")
        expected = outputs_and_gradients(reference, [x.double() for x in inputs], [x.double() for x in directions])
        got = outputs_and_gradients(function, inputs, directions)
        error = [(x.double() - y).norm() / y.norm() for x, y in zip(got, expected, strict=True)]
        worst = worst.maximum(torch.stack(error).cpu())
    return worst[0].item(), worst[1].item(), worst[2:].max().item()


def measure(name: str, dtype: torch.dtype, args: argparse.Namespace) -> Result:
    function, device = IMPLEMENTATIONS[name], args.device
    inputs = make_inputs(args.batch, args.length, args.heads, args.head_size, "typical", dtype, device)
    directions = [torch.randn_like(inputs[3]), torch.randn_like(inputs[6])]

    @torch.no_grad()
    def forward() -> None:
        function(*inputs)

    def both() -> None:
        outputs_and_gradients(function, inputs, directions)

    # the libraries load and set themselves up, without the memory of a whole pass
    short = [x[:, :32] for x in (*inputs[:6], directions[0])]
    outputs_and_gradients(function, [*short[:6], inputs[6]], [short[6], directions[1]])
    held, highest = memory_of(both, device)
    if args.profile:
        print_profile(f"{name}, forward", forward)
        print_profile(f"{name}, forward and backward", both)
    return Result(
        seconds(forward, args.repeat, device),
        seconds(both, args.repeat, device),
        highest - held,
        errors(function, args.length, args.head_size, dtype, device),
    )


def work(dtype: torch.dtype, args: argparse.Namespace) -> tuple[float, float]:
    """FLOPs and bytes of forward and backward together."""
    positions, D = args.batch * args.length * args.heads, args.head_size
    states = 4 * 4 * args.batch * args.heads * D * D  # float32: the first, the last and their gradients
    # r, w, k, v, a, b and out; then these six and the gradient of out, and six gradients
    return 3 * 4 * 2 * positions * D * D, (7 + 7 + 6) * positions * D * dtype.itemsize + states


def figures(result: Result, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, float]:
    """A row of the table."""
    flops, size = work(dtype, args)
    both = statistics.median(result.both)
    return {
        "forward, ms": 1e3 * statistics.median(result.forward),
        "forward + backward, ms": 1e3 * both,
        "GFLOP/s": flops / both / 1e9,
        "GB/s": size / both / 1e9,
        "memory, MB": result.memory / 1e6,
        **dict(zip(("error of outputs", "of the state", "of gradients"), result.errors, strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="rows B (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="positions T (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=12, help="H (default: %(default)s)")
    parser.add_argument("--head-size", type=int, default=64, help="D (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add_rows_option(parser)
    add_common_options(parser, list(IMPLEMENTATIONS), repeat=10)
    args = parser.parse_args()
    check_device(parser, args.device)

    cases = [(name, torch.float32) for name in IMPLEMENTATIONS if args.device == "cuda" or name not in ONLY_CUDA]
    if args.device == "cuda":
        cases += [(name, torch.bfloat16) for name in IMPLEMENTATIONS if name in BFLOAT16]
    cases = [case for case in cases if case[0] not in args.skip]
    print(f"wkv7, B={args.batch} T={args.length} H={args.heads} D={args.head_size}, {args.device}\n")
    print(machine(["speechllm", "fla-core", "rwkv7-hf"], args.device, args.threads) + "\n", flush=True)

    rates = in_own_process(machine_rates, args.device, threads=args.threads)
    append_row(args.rows, "the machine", rates)
    print((rates.reason if isinstance(rates, Failure) else figures_text(rates)) + "\n", flush=True)

    rows, first, results = [], None, [rates]
    for name, dtype in cases:
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        print(f"... {label}", file=sys.stderr, flush=True)
        result = in_own_process(measure, name, dtype, args, threads=args.threads)
        results.append(result)
        row = result if isinstance(result, Failure) else figures(result, dtype, args)
        append_row(args.rows, label, row)
        if isinstance(result, Failure):
            rows.append([label, result.reason, *[""] * 9])
            continue
        first = first or result
        rows.append([
            label,
            median_and_least(result.forward, 1e3),
            ratio(result.forward, first.forward),
            median_and_least(result.both, 1e3),
            ratio(result.both, first.both),
            number(row["GFLOP/s"]),
            number(row["GB/s"]),
            f"{result.memory / 1e6:.0f}",
            *(f"{error:.1e}" for error in result.errors),
        ])  # fmt: skip
    print_table(
        ["", "forward, ms", "ratio", "forward + backward, ms", "ratio", "GFLOP/s", "GB/s", "memory, MB",
         "error of outputs", "of the state", "of gradients"],
        rows,
    )  # fmt: skip
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
