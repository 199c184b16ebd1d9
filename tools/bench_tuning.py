#!/usr/bin/env python3
"""A training step of LoRA on a frozen language model of transformers: what of it is matrix products, what the rest is.

    tools/bench_tuning.py                      # sizes of SmolLM2-135M, random weights, on the CPU: some minutes
    tools/bench_tuning.py --precision bf16

The batch has the shape of those of configs/english-smollm2.yaml: 24 rows of 40 to 56 positions of embeddings, a label
at 13 of each; the gradient reaches the embeddings, as it must where the projector trains. LoRA of rank 16 is on all
matrices of the layers. Beside `speechllm` is `peft`: the same model with peft's own layers and PyTorch's own autocast.

CPU time of one thread, forward and backward pass; the two take turns, and the least counts. The floor is the time that
the step's products take at the rate of a square matrix product in the same type, by torch.mm or by
speechllm.linear.product, whichever is faster, in the same process. Memory is what the step takes at its highest (on
Linux); of `speechllm` without the frozen weights in half precision, which are made once under autocast. The last
columns are shares of one more step, by PyTorch's profiler: matrix products, attention, conversions between types, and
all else, most of which passes over activations.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from bench_wkv import machine, memory_of, number, print_table
from peft.tuners import lora
from torch import Tensor, nn

from speechllm.linear import product
from speechllm.llm import transformers
from speechllm.llm.adapters import TuneConfig, tune
from speechllm.llm.lora import LoRALinear
from speechllm.llm.transformers import TransformersLM, new_transformers_lm
from speechllm.train.watch import flop_counter

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
ROWS, SHORTEST, LONGEST, LABELS = 24, 40, 56, 13
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear_pointwise"),
    "attention": ("scaled_dot_product",),
    "conversions": ("copy_", "_to_copy"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="(default: both)")
    parser.add_argument("--repeat", type=int, default=2, help="turns (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"], help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(["transformers", "peft"], "cpu", 1) + "\n")
    torch.manual_seed(0)
    model = new_transformers_lm(SMOLLM2 | {"num_hidden_layers": args.layers}).train()
    tune(model, TuneConfig("lora", rank=16))
    rows = [row for precision in args.precision for row in measure(model, precision, args.repeat)]
    print_table(["", "", "ms", "to peft", "memory, MB", "floor, ms", "share of it, %", *KINDS, "else"], rows)
    return 0


def measure(model: TransformersLM, precision: str, repeat: int) -> list[list[str]]:
    """The rows of one precision."""
    step, dtype = step_of(model, precision), PRECISIONS[precision]
    variants: dict[str, Callable] = {"speechllm": contextlib.nullcontext, "peft": lambda: as_peft(model)}
    least, memory, shares = dict.fromkeys(variants, float("inf")), {}, {}
    for turn in range(repeat + 1):
        for name, variant in variants.items():
            with variant():
                start = time.process_time()
                step()
                if turn:  # the first converts
                    least[name] = min(least[name], time.process_time() - start)
    for name, variant in variants.items():
        with variant():
            before, highest = memory_of(step)
            memory[name], shares[name] = highest - before, by_operator(step)
    with flop_counter() as counter:
        step()
    floor = counter.get_total_flops() / product_rate(dtype)
    rows = []
    for name, seconds in least.items():
        rows.append(
            [precision, name, number(1e3 * seconds), f"{seconds / least['peft']:.2f}", number(memory[name] / 1e6)]
        )
        rows[-1] += [number(1e3 * floor), number(100 * floor / seconds)]
        rows[-1] += [f"{100 * share:.0f} %" for share in shares[name].values()]
    return rows


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square product, in CPU time."""
    n, least = 2048, float("inf")
    x, y = torch.randn(2, n, n).to(dtype)
    for multiply in 3 * (torch.mm, product):
        start = time.process_time()
        multiply(x, y)
        least = min(least, time.process_time() - start)
    return 2 * n**3 / least


def step_of(model: TransformersLM, precision: str) -> Callable[[], None]:
    embeds, lens, labels = batch(model)

    def step() -> None:
        model.zero_grad()
        embeds.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            (loss, _, _), _ = model.loss(labels, inputs_embeds=embeds, lens=lens)
        loss.backward()

    return step


def batch(model: TransformersLM) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, L, D) that take a gradient, lengths (N,) and labels (N, L)."""
    ids = torch.randint(0, model.vocab_size, (ROWS, LONGEST))
    lens = torch.linspace(SHORTEST, LONGEST, ROWS).round().long()
    places = torch.arange(LONGEST)
    is_label = (places < lens[:, None]) & (places >= lens[:, None] - LABELS)
    return model.embed(ids).detach().requires_grad_(True), lens, ids.masked_fill(~is_label, -100)


@contextlib.contextmanager
def as_peft(model: nn.Module) -> Iterator[None]:
    """Inside, the layers are peft's, and autocast is PyTorch's."""
    layers = [module for module in model.modules() if type(module) is LoRALinear]
    ours = transformers.autocast_on_cpu
    transformers.autocast_on_cpu = lambda device: contextlib.nullcontext()
    for layer in layers:
        layer.__class__ = lora.Linear
    try:
        yield
    finally:
        transformers.autocast_on_cpu = ours
        for layer in layers:
            layer.__class__ = LoRALinear


def by_operator(step: Callable[[], None]) -> dict[str, float]:
    """The share of each of `KINDS`, and of all else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    times = dict.fromkeys([*KINDS, "else"], 0.0)
    for event in profiler.key_averages():
        name = event.key.partition("::")[2]
        kind = next((k for k, parts in KINDS.items() if name and any(_is(name, part) for part in parts)), "else")
        times[kind] += event.self_cpu_time_total
    return {kind: t / sum(times.values()) for kind, t in times.items()}


def _is(operator: str, part: str) -> bool:
    return operator.strip("_").startswith(part.strip("_"))


if __name__ == "__main__":
    sys.exit(main())
