#!/usr/bin/env python3
"""Speed of RWKV-7: on the CPU beside what other packages offer; on a GPU that of the published sizes.

    tools/bench_rwkv.py                                      # 12 layers x 768, V=65536: about 15 minutes, 20 GB
    tools/bench_rwkv.py --layers 2 --width 128 --vocab 500   # seconds
    tools/bench_rwkv.py --only decode --skip rwkv7-hf
    tools/bench.sh                                           # with the other packages installed, and bench_wkv.py too
    tools/bench_rwkv.py --device cuda                        # sizes of the published models
    tools/bench_rwkv.py --device cuda --sizes 0.1b 24x1024

All have the same float32 weights, officially initialized but for the matrices that start at zero, which get small
random values, so that every path counts. Each row has a process to itself; times are the median over the
repetitions, the smallest in brackets, and ratios are to the first row.

train: forward, cross entropy at every position, backward; no optimizer; `checkpointed` is speechllm with the
activations of each block computed again (`checkpoint_blocks`). Memory is the highest of the whole process
(on Linux), and how much of it came with the step, gradients included; equal losses and gradient norms say that all
did the same. `floor-matmul` and `floor-product` are the time of the step's matrix products alone, by torch.matmul and
by speechllm.linear.product.
decode: tokens per second over all rows, each row reading its own best token next. prefill: from a prompt to the logits
of its last position. The error is that of the logits of random text, the norm of the difference from `speechllm`
over the norm of those; `same best` is how often the best token is the same.

With --sizes, which a GPU always has, only speechllm is measured, each size in a process to itself, with random weights
made on the device. train: as above, under bf16 autocast on a GPU; TFLOP/s counts 6 for each weight of a matrix and
position. decode: weights in bfloat16 on a GPU, each row reading its own best token next; `graphed` replays each step as
one CUDA graph (`GraphedStep`, which on the CPU is the plain step), and its error is how far its logits are from those
of the plain step. Memory is the highest, weights included.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_wkv import (
    PUBLISHED,
    VOCABULARY,
    Failure,
    add_common_options,
    add_rows_option,
    append_row,
    check_device,
    exit_status,
    in_own_process,
    machine,
    median_and_least,
    memory_of,
    number,
    print_profile,
    print_table,
    ratio,
    seconds,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm.linear import pack_for_inference, product
from speechllm.rwkv7 import RWKV7, RWKV7Config, RWKV7State, load_rwkv7
from speechllm.rwkv7.graph import GraphedStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.rwkv7.plain import PlainRWKV7

# In a folder that lasts as long as the bench.
WEIGHTS, EXPECTED, HF_FOLDER = "model.pth", "expected.safetensors", "rwkv7-hf"


def random_ids(rows: int, length: int, config: RWKV7Config) -> Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def prepare(config: RWKV7Config, folder: Path) -> None:
    """Writes the weights that all load, and the logits that all should give.

    They are random numbers that bfloat16 has, as those of released checkpoints are; all compute with them in float32.
    """
    torch.manual_seed(0)
    model = RWKV7(config)
    for p in model.parameters():
        if p.dim() == 2 and not p.any():
            nn.init.normal_(p, std=0.02)
        p.copy_(p.bfloat16())
    torch.save(model.state_dict(), folder / WEIGHTS)
    ids = random_ids(2, 64, config)
    save_file({"ids": ids, "logits": model(ids)[0]}, folder / EXPECTED)


def load_hf(folder: Path) -> nn.Module:
    from rwkv7_hf import RWKV7ForCausalLM, converter

    converted = folder / HF_FOLDER
    with contextlib.redirect_stdout(sys.stderr):
        if not converted.exists():
            converter.main(["--input", str(folder / WEIGHTS), "--output", str(converted), "--precision", "fp32"])
        return RWKV7ForCausalLM.from_pretrained(converted, dtype=torch.float32)


# ---- Training -------------------------------------------------------------------------------------------------


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def train_speechllm(folder: Path, config: RWKV7Config) -> tuple[nn.Module, Callable]:
    model = load_rwkv7(folder / WEIGHTS).train()
    return model, lambda ids, labels: model.loss(labels, input_ids=ids)[0].loss


def train_checkpointed(folder: Path, config: RWKV7Config) -> tuple[nn.Module, Callable]:
    model, loss_of = train_speechllm(folder, config)
    model.checkpoint_blocks = True
    return model, loss_of


def train_plain(folder: Path, config: RWKV7Config) -> tuple[nn.Module, Callable]:
    model = PlainRWKV7(config)
    model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return model, lambda ids, labels: summed_cross_entropy(model(ids), labels)


def train_hf(folder: Path, config: RWKV7Config) -> tuple[nn.Module, Callable]:
    model = load_hf(folder).train()
    return model, lambda ids, labels: summed_cross_entropy(model(input_ids=ids).logits, labels)


TRAINING = {
    "speechllm": train_speechllm,
    "checkpointed": train_checkpointed,
    "plain-loop": train_plain,
    "rwkv7-hf": train_hf,
}


@dataclass(frozen=True)
class Training:
    times: list[float]
    memory: tuple[int, int] | None  # before and at its highest, in bytes
    loss: float | None
    gradient_norm: float | None


def measure_training(name: str, folder: Path, config: RWKV7Config, args: argparse.Namespace) -> Training:
    model, loss_of = TRAINING[name](folder, config)
    ids, labels = random_ids(2 * args.batch, args.length, config).chunk(2)

    losses = []

    def step() -> None:
        loss = loss_of(ids, labels)
        loss.backward()
        losses.append(loss.item())

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    # the libraries load and set themselves up, without the memory of a whole step
    loss_of(ids[:, :16], labels[:, :16]).backward()
    clear()
    memory = memory_of(step)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if args.profile:
        clear()
        print_profile(f"{name}, training step", step)
    return Training(seconds(step, args.repeat, before=clear), memory, losses[0], norm.item())


FLOORS = {"floor-matmul": lambda x, weight: torch.matmul(x, weight.T), "floor-product": product}


@torch.no_grad()
def measure_floor(name: str, config: RWKV7Config, args: argparse.Namespace) -> Training:
    """The products of a training step: each shape is timed by itself and counted as often as it occurs."""
    multiply = FLOORS[name]  # x (M, K), weight (N, K) -> (M, N)
    with torch.device("meta"):
        model = RWKV7(config)
    shapes = Counter()  # (N, K)
    for parameter, p in model.named_parameters():
        if p.dim() == 2 and parameter != "emb.weight" and not parameter.endswith("r_k"):
            # low-rank matrices are stored the other way round
            shapes[tuple(p.shape) if parameter.endswith(".weight") else tuple(p.shape)[::-1]] += 1
    rows = args.batch * args.length
    times = [0.0] * args.repeat
    for (N, K), count in shapes.items():
        x, weight, grad = torch.randn(rows, K), torch.randn(N, K), torch.randn(rows, N)
        for pair in ((x, weight), (grad, weight.T), (grad.T, x.T)):  # forward, backward to the input, to the weight
            of_this = seconds(functools.partial(multiply, *pair), args.repeat)
            times = [total + count * t for total, t in zip(times, of_this, strict=True)]
    return Training(times, None, None, None)


def bench_training(folder: Path, config: RWKV7Config, args: argparse.Namespace) -> list[object]:
    print(f"Training step, B={args.batch} T={args.length}\n")
    results = {}
    for name in (x for x in [*TRAINING, *FLOORS] if x not in args.skip):
        print(f"... train {name}", file=sys.stderr, flush=True)
        case = (measure_floor, name, config) if name in FLOORS else (measure_training, name, folder, config)
        results[name] = in_own_process(*case, args, threads=args.threads)
    rows, first = [], None
    for name, result in results.items():
        if isinstance(result, Failure):
            rows.append([name, result.reason, *[""] * 5])
            continue
        first = first or result
        rows.append([name, median_and_least(result.times), ratio(result.times, first.times)])
        if result.memory is None:
            rows[-1] += [""] * 4
        else:
            before, highest = (x / 1e9 for x in result.memory)
            rows[-1] += [f"{highest:.2f}", f"{highest - before:.2f}"]
            rows[-1] += [f"{result.loss:.2f}", f"{result.gradient_norm:.6g}"]
    print_table(["", "seconds", "ratio", "memory, GB", "of the step", "loss", "norm of the gradients"], rows)
    return list(results.values())


# ---- Decoding and prefill -------------------------------------------------------------------------------------
# Each: logits(ids (N, L)) -> (N, L, V); prefill(ids (N, L)) -> logits (N, V), state; step(ids (N,), state) -> the same.


class SpeechLLM:
    largest_batch = None

    def __init__(self, folder: Path, weights: str | None = None):
        self.model = load_rwkv7(folder / WEIGHTS)
        if weights is not None:
            pack_for_inference(self.model, weights)

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)[0]

    def prefill(self, ids: Tensor):
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        logits, self.prompt = self.model(ids, logits_mask=last)
        return logits, self.prompt

    def step(self, ids: Tensor, state):
        # as greedy search does; every repetition starts from the prompt's state
        return self.model.step(ids, state, overwrite=state is not self.prompt)


class RwkvPackage:
    """PyPI's ``rwkv``, by the author of RWKV; it reads one row, so a batch is a loop over rows."""

    largest_batch = 8  # more of the same loop tells nothing

    def __init__(self, folder: Path):
        os.environ["RWKV_V7_ON"] = "1"
        with contextlib.redirect_stdout(sys.stderr):
            from rwkv.model import RWKV

            self.model = RWKV(str(folder / WEIGHTS).removesuffix(".pth"), "cpu fp32")

    def logits(self, ids: Tensor) -> Tensor:
        return torch.stack([self.model.forward(row, None, full_output=True)[0] for row in ids.tolist()])

    def prefill(self, ids: Tensor):
        return self._batch(self.model.forward(row, None) for row in ids.tolist())

    def step(self, ids: Tensor, state):
        return self._batch(self.model.forward(i, s) for i, s in zip(ids.tolist(), state, strict=True))

    @staticmethod
    def _batch(rows):
        logits, states = zip(*rows, strict=True)
        return torch.stack(logits), states


class Rwkv7Hf:
    largest_batch = None

    def __init__(self, folder: Path):
        self.model = load_hf(folder).eval()

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits

    def prefill(self, ids: Tensor, state=None):
        out = self.model(input_ids=ids, past_key_values=state, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def step(self, ids: Tensor, state):
        return self.prefill(ids[:, None], state)


INFERENCE: dict[str, Callable] = {
    "speechllm": SpeechLLM,
    "packed-float32": functools.partial(SpeechLLM, weights="float32"),
    "packed-bfloat16": functools.partial(SpeechLLM, weights="bfloat16"),
    "packed-int8": functools.partial(SpeechLLM, weights="int8"),
    "rwkv": RwkvPackage,
    "rwkv7-hf": Rwkv7Hf,
}


@dataclass(frozen=True)
class Inference:
    tokens_per_second: list[list[float]]  # one list a batch size, or a prompt
    error: float
    same_best: float


@torch.no_grad()
def compare(model, folder: Path) -> tuple[float, float]:
    expected = load_file(folder / EXPECTED)
    got = model.logits(expected["ids"]).float()
    error = (got - expected["logits"]).norm() / expected["logits"].norm()
    return error.item(), (got.argmax(-1) == expected["logits"].argmax(-1)).float().mean().item()


@torch.no_grad()
def measure_decoding(name: str, folder: Path, config: RWKV7Config, args: argparse.Namespace) -> Inference:
    model = INFERENCE[name](folder)
    speeds = []
    for n in args.batches:
        if model.largest_batch is not None and n > model.largest_batch:
            speeds.append([])
            continue
        start = model.prefill(random_ids(n, 8, config))

        def decode(start=start) -> None:
            logits, state = start
            for _ in range(args.tokens):
                logits, state = model.step(logits.argmax(-1), state)

        speeds.append([n * args.tokens / t for t in seconds(decode, args.repeat)])
        if args.profile:
            print_profile(f"{name}, {args.tokens} steps at batch {n}", decode)
    return Inference(speeds, *compare(model, folder))


@torch.no_grad()
def measure_prefill(name: str, folder: Path, config: RWKV7Config, args: argparse.Namespace) -> Inference:
    model = INFERENCE[name](folder)
    ids = random_ids(1, args.prompt, config)
    times = seconds(lambda: model.prefill(ids), args.repeat)
    if args.profile:
        print_profile(f"{name}, prefill", lambda: model.prefill(ids))
    return Inference([[args.prompt / t for t in times]], *compare(model, folder))


def bench_inference(
    measure: Callable, title: str, columns: list[str], folder: Path, config: RWKV7Config, args: argparse.Namespace
) -> list[object]:
    print(f"{title}, tokens per second (the slowest repetition in brackets)\n")
    results = {}
    for name in (x for x in INFERENCE if x not in args.skip):
        print(f"... {title} {name}", file=sys.stderr, flush=True)
        results[name] = in_own_process(measure, name, folder, config, args, threads=args.threads)
    rows, first = [], None
    for name, result in results.items():
        if isinstance(result, Failure):
            rows.append([name, result.reason, *[""] * (2 * len(columns) + 1)])
            continue
        first = first or result
        rows.append([name])
        for speeds, of_first in zip(result.tokens_per_second, first.tokens_per_second, strict=True):
            rows[-1] += [median_and_least(speeds), ratio(speeds, of_first)] if speeds and of_first else ["-", "-"]
        rows[-1] += [f"{result.error:.1e}", f"{100 * result.same_best:.1f}%"]
    header = [cell for column in columns for cell in (column, "ratio")]
    print_table(["", *header, "error", "same best"], rows)
    return list(results.values())


# ---- Sizes, on the device -------------------------------------------------------------------------------------


def size_option(text: str) -> tuple[int, int]:
    """A published size, or LAYERSxWIDTH."""
    if text in PUBLISHED:
        return PUBLISHED[text]
    layers, _, width = text.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) > 0 and int(width) > 0 and int(width) % 64 == 0):
        raise argparse.ArgumentTypeError(
            f"{text}: neither of {', '.join(PUBLISHED)} nor LAYERSxWIDTH, a width being a multiple of 64"
        )
    return int(layers), int(width)


@torch.no_grad()
def random_model(config: RWKV7Config, dtype: torch.dtype, device: str) -> RWKV7:
    """Made where it is used, in a moment: the official initialization takes minutes for billions of weights."""
    with torch.device("meta"):
        model = RWKV7(config).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for p in model.parameters():
        p.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
    return model


def measure_size_training(config: RWKV7Config, args: argparse.Namespace) -> dict[str, float]:
    model = random_model(config, torch.float32, args.device).train()
    ids, labels = random_ids(2 * args.batch, args.length, config).to(args.device).chunk(2)
    losses = []

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = model.loss(labels, input_ids=ids)[0].loss
        loss.backward()
        losses.append(loss.item())

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    _, memory = memory_of(step, args.device)
    if not torch.isfinite(torch.tensor(losses)).all():
        raise RuntimeError(f"the loss is {losses[-1]}: that was no training step")
    times = seconds(step, args.repeat, args.device, before=clear)
    time, positions = statistics.median(times), ids.numel()
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "emb.weight")
    return {
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "tokens/s": positions / time,
        "step, ms": 1e3 * time,
        "TFLOP/s": 6 * weights * positions / time / 1e12,
        "memory, GB": memory / 1e9,
    }


@torch.no_grad()
def measure_size_decoding(model: RWKV7, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Steps as they are, and graphed."""
    ids, start = torch.zeros(rows, dtype=torch.long, device=args.device), model.initial_state(rows)

    def plain(ids: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        return model.step(ids, state, overwrite=state is not start)

    def decode(step: Callable) -> Tensor:
        """The logits of the last step."""
        logits, state = step(ids, start)
        for _ in range(args.tokens - 1):
            logits, state = step(logits.argmax(-1), state)
        return logits

    def speed(step: Callable) -> float:
        return rows * args.tokens / statistics.median(seconds(lambda: decode(step), args.repeat, args.device))

    _, memory = memory_of(lambda: decode(plain), args.device)
    graphed = GraphedStep(model, rows)
    expected = decode(plain)
    error = (decode(graphed) - expected).norm() / expected.norm()
    return {
        "tokens/s": speed(plain),
        "graphed, tokens/s": speed(graphed),
        "error of graphed": error.item(),
        "memory, GB": memory / 1e9,
    }


def measure_size(title: str, config: RWKV7Config, args: argparse.Namespace) -> list[dict[str, float] | Failure]:
    """Training, then decoding at each batch size; each row is written to ``--rows`` as it is known."""

    def attempt(case: str, measure: Callable, *arguments) -> dict[str, float] | Failure:
        print(f"... {title} {case}", file=sys.stderr, flush=True)
        try:
            result = measure(*arguments, args)
        except (RuntimeError, ValueError) as e:  # memory that runs out, too
            result = Failure(f"failed ({type(e).__name__}: {str(e).splitlines()[0]:.100})")
        append_row(args.rows, f"{title}, {case}", result)
        return result

    results = []
    if args.only in (None, "train"):
        results.append(attempt("train", measure_size_training, config))
    if args.only in (None, "decode"):
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = random_model(config, dtype, args.device).eval()
        results += [attempt(f"decode at batch {n}", measure_size_decoding, model, n) for n in args.batches]
    return results


def bench_sizes(sizes: list[tuple[int, int]], args: argparse.Namespace) -> list[object]:
    names = {size: name for name, size in PUBLISHED.items()}
    cases = ["train"] * (args.only != "decode") + [f"decode at batch {n}" for n in args.batches] * (
        args.only != "train"
    )
    rows, results = [], []
    for layers, width in sizes:
        title = names.get((layers, width), f"{layers}x{width}")
        config = RWKV7Config(layers, width, args.vocab)
        found = in_own_process(measure_size, title, config, args, threads=args.threads)
        if isinstance(found, Failure):  # the process was killed
            append_row(args.rows, title, found)
            found = [found] * len(cases)
        results += found
        rows += [(title, case, result) for case, result in zip(cases, found, strict=True)]
    columns = list(dict.fromkeys(name for *_, result in rows if isinstance(result, dict) for name in result)) or [""]
    table = []
    for title, case, result in rows:
        if isinstance(result, Failure):
            table.append([title, case, result.reason, *[""] * (len(columns) - 1)])
        else:
            table.append([title, case, *(number(result[name]) if name in result else "" for name in columns)])
    print_table(["", "", *columns], table)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["train", "decode", "prefill"], help="one of the three tables")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--sizes", type=size_option, nargs="+", metavar="SIZE",
                        help=f"of {', '.join(PUBLISHED)}, or LAYERSxWIDTH (default on a GPU: all of them)")  # fmt: skip
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, help="D (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=VOCABULARY, help="V (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows B in training (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="positions T in training (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N",
                        help="rows in decoding (default: 1 8 32)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=32, help="to decode for each row (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="positions of prefill (default: %(default)s)")
    add_rows_option(parser)
    add_common_options(parser, list(dict.fromkeys([*TRAINING, *FLOORS, *INFERENCE])), repeat=3)
    args = parser.parse_args()
    check_device(parser, args.device)
    sizes = args.sizes or (list(PUBLISHED.values()) if args.device == "cuda" else None)
    if sizes and (args.only == "prefill" or args.skip or args.profile):
        parser.error("--only prefill, --skip and --profile are of the comparison on the CPU, without --sizes")
    if args.rows and not sizes:
        parser.error("--rows needs --sizes")

    config = RWKV7Config(args.layers, args.width, args.vocab)
    about = f"{len(sizes)} sizes" if sizes else f"{args.layers} layers x {args.width}"
    print(f"RWKV-7, {about}, V={args.vocab}, on {args.device}\n")
    packages = ["speechllm", "fla-core", "rwkv", "rwkv7-hf", "transformers"]
    print(machine(packages, args.device, args.threads) + "\n", flush=True)
    if sizes:
        return exit_status(bench_sizes(sizes, args))
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-rwkv-") as tmp:
        folder = Path(tmp)
        prepared = in_own_process(prepare, config, folder, threads=args.threads)
        if isinstance(prepared, Failure):
            sys.exit(f"error: cannot write the weights to {folder}: {prepared.reason}")
        if args.only in (None, "train"):
            results += bench_training(folder, config, args)
        if args.only in (None, "decode"):
            columns = [f"batch {n}" for n in args.batches]
            results += bench_inference(measure_decoding, "Decoding", columns, folder, config, args)
        if args.only in (None, "prefill"):
            columns = [f"{args.prompt} tokens"]
            results += bench_inference(measure_prefill, "Prefill", columns, folder, config, args)
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
