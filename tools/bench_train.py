#!/usr/bin/env python3
"""Speed, memory and time by part of training steps as recipes/train.py makes them, on made-up data.

    tools/bench_train.py                                      # on the CPU: digits and 0.1b, some minutes, 12 GB
    tools/bench_train.py --sizes 0.4b --ways miss --batch-seconds 10
    tools/bench_train.py --device cuda                        # all sizes, in bf16
    tools/bench_train.py --sizes digits --profile

`digits` is the model of configs/digits.yaml, trained from scratch. The others are the encoder of
AudenAI/auden-encoder-tta-m10 (152.7 M parameters), a projector, and an RWKV-7 of a published size, all with random
weights, trained as the recipes train them: `projector` (the rest frozen); `lora` and `miss`: the projector and an
adapter of rank 8, the rest frozen; `all`; and `all-checkpointed`: `all` with model.encoder.checkpoint_layers and
model.llm.checkpoint_blocks. The data are wav files of noise in a temporary folder, of like length, with two words a
second; one worker reads them and computes features. The encoder's schedules are behind it. Each row has a process to
itself. Two steps come first that are not measured.

How each figure is measured:

step: from asking for a batch to the gradients being cleared; median over the steps, the smallest in brackets.
audio s/s: seconds of audio over all steps, without padding, by their time.
positions/s: positions that the language model reads (prompt, audio, label; no padding), trained or not.
memory: the highest of the whole training process (on Linux, without the worker), or of what PyTorch has allocated on
the GPU; weights, optimizer, and on the CPU the running average of the weights are part of it.
GFLOP/s: what torch.utils.flop_counter counts in a first step, for each second of audio in it, times audio s/s. The
counter sees inside the package's autograd functions; two operators that it does not know are added to it here (oneDNN's
linear product, the in-place batched product). It cannot see into Triton kernels, so that step runs the recurrence by
the `chunked` backend. Products that checkpointing computes again count.
share: what part that is of the GFLOP/s of a square matrix product in the same precision and process, right after the
steps, by torch.mm or by speechllm.linear.product, whichever is faster.

Time by part is the mean over the same steps, with CUDA synchronized at each border. `data` is waiting for the loader
and moving the batch; `language model` has the embeddings of the prompt and all losses; its backward pass ends when the
gradient arrives at `audio_embeds`, and has that of the CTC head where there is one; `optimizer` is clipping, the step
and clearing the gradients; `other` is counting tokens and reading the losses. What is computed again by checkpointing
is in the backward passes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from accelerate import Accelerator
from bench_wkv import (
    PUBLISHED,
    VOCABULARY,
    Failure,
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
    product_rate,
)
from torch import Tensor, nn

from speechllm.config import from_dict
from speechllm.data import Batch, DataConfig, build_train_loader
from speechllm.data.features import SAMPLE_RATE
from speechllm.encoder import ZipformerConfig, init_from_data
from speechllm.encoder.pretrained import FULLY_TRAINED
from speechllm.llm.adapters import TuneConfig, tune
from speechllm.model.config import EncoderSection, LLMSection, ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer
from speechllm.rwkv7 import RWKV7Config
from speechllm.text.tokenizer import train_sentencepiece
from speechllm.train.checkpoint import RunningAverage
from speechllm.train.watch import flop_counter

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))
from train import train_step

DIGITS = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"

TTA_M10 = ZipformerConfig(  # the shapes of AudenAI/auden-encoder-tta-m10
    num_encoder_layers=[2, 2, 4, 5, 4, 2],
    encoder_dim=[192, 256, 512, 768, 512, 256],
    feedforward_dim=[576, 768, 1536, 2304, 1536, 768],
)
SIZES = ("digits", *PUBLISHED)

WAYS = ("projector", "lora", "miss", "all", "all-checkpointed")
RANK = 8

PARTS = (
    "data",
    "encoder",
    "projector",
    "language model",
    "backward: language model",
    "backward: projector, encoder",
    "optimizer",
    "other",
)

# What train_step calls the parts of a step that no hook of a module sees.
NOTED = {
    "labels": "other",
    "forward": "language model",
    "backward": "backward: projector, encoder",
    "losses": "other",
    "step": "optimizer",
}

PRECISIONS = {"fp32": ("no", torch.float32), "bf16": ("bf16", torch.bfloat16), "fp16": ("fp16", torch.float16)}
UNMEASURED_STEPS = 2


@dataclass(frozen=True)
class Case:
    """A row: what is trained on what.

    Attributes:
      model: sizes to build at random; no part has a path.
      way: one of `WAYS`.
      batch_seconds: of audio in a batch, padding included; utterance_seconds: of the longest utterance.
    """

    name: str
    model: ModelConfig
    way: str
    optim: OptimConfig
    batch_seconds: float
    utterance_seconds: float


# ---- Models and data ------------------------------------------------------------------------------------------


def digits_case(tokenizer: Path, batch_seconds: float | None = None) -> Case:
    """The model of configs/digits.yaml with another tokenizer; as much audio in a batch as it says if not given."""
    tree = yaml.safe_load(DIGITS.read_text(encoding="utf-8"))
    model = from_dict(ModelConfig, tree["model"] | {"tokenizer": str(tokenizer)}, source=str(DIGITS))
    optim = from_dict(OptimConfig, tree["optim"], source=str(DIGITS))
    batch_seconds = batch_seconds or tree["data"]["max_duration"]
    return Case("digits", model, "all", optim, batch_seconds, min(4.0, batch_seconds))


def published_case(size: str, way: str, batch_seconds: float) -> Case:
    checkpointed = way == "all-checkpointed"
    layers, width = PUBLISHED[size]
    model = ModelConfig(
        tokenizer="rwkv",
        encoder=EncoderSection(zipformer=TTA_M10, checkpoint_layers=checkpointed),
        llm=LLMSection(rwkv7=RWKV7Config(layers, width, VOCABULARY), checkpoint_blocks=checkpointed),
    )
    return Case(size, model, way, OptimConfig(lr=1e-4), batch_seconds, min(10.0, batch_seconds))


_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_WORDS_PER_SECOND = 2
_SHORTEST = 0.8  # of the longest utterance: a bucket of a large corpus has such lengths


def make_tokenizer(folder: Path) -> None:
    """As recipes/digits makes it."""
    texts = [f" {first} {second}" for first in _WORDS for second in _WORDS]
    train_sentencepiece(texts, folder, vocab_size=400, special_tokens=["User: ", "\n\nAssistant:", "<|en|>"])


def make_corpus(folder: Path, case: Case, batches: int) -> DataConfig:
    """speech.jsonl and its audio for so many batches."""
    rng = np.random.default_rng(0)
    (folder / "speech").mkdir(parents=True)
    count = batches * math.ceil(case.batch_seconds / (_SHORTEST * case.utterance_seconds))
    with open(folder / "speech.jsonl", "w", encoding="utf-8") as file:
        for i, duration in enumerate(case.utterance_seconds * rng.uniform(_SHORTEST, 1.0, count)):
            samples = 0.1 * rng.standard_normal(int(duration * SAMPLE_RATE))
            name = f"speech/{i}.wav"
            soundfile.write(folder / name, samples, SAMPLE_RATE, "PCM_16")
            text = " ".join(rng.choice(_WORDS, math.ceil(duration * _WORDS_PER_SECOND)))
            line = {"audio_filepath": name, "duration": len(samples) / SAMPLE_RATE, "text": text, "lang": "en"}
            file.write(json.dumps(line) + "\n")
    tree = {
        "train": [{"path": str(folder / "speech.jsonl")}],
        "max_duration": case.batch_seconds,
        "num_buckets": 1,
        "num_workers": 1,
        "index_dir": str(folder / "index"),
    }
    return from_dict(DataConfig, tree)


def build_model(case: Case, device: str) -> SpeechLLM:
    """With random weights, prepared to train in the case's way."""
    with torch.device(device):
        model = SpeechLLM.from_config(case.model)
    for p in model.llm.parameters():
        if p.dim() == 2 and not p.any():
            nn.init.normal_(p, std=0.02)  # a trained model multiplies by no zeros, which a GPU does faster
    model.encoder.set_batch_count(FULLY_TRAINED)
    if not case.way.startswith("all"):
        model.encoder.requires_grad_(False)
    if case.way == "projector":
        model.llm.requires_grad_(False)
    elif case.way in ("lora", "miss"):
        tune(model.llm, TuneConfig(case.way, rank=RANK))
    return model.train()


def positions_of(model: SpeechLLM, batch: Batch) -> int:
    """How many positions the language model reads."""
    audio_lens = model.audio_lens(batch.feature_lens)
    label_ids = [model.label_ids(text) for text in batch.texts]
    return int(model.spliced(audio_lens, batch.requests, label_ids).lens.sum())


# ---- The measurements -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Of all measured steps together, but `times`: seconds of each, and `parts`: mean seconds in one."""

    trained: int  # parameters
    times: list[float]
    parts: dict[str, float]
    audio_seconds: float
    positions: int
    memory: int  # bytes
    flops: float
    product_rate: float  # FLOP/s of a square product


class StepClock:
    """Seconds by part since `restart`: `note` puts down the time since the note before it to a part."""

    def __init__(self, model: SpeechLLM, device: str):
        self._device = device
        self.restart()
        model.encoder.register_forward_hook(lambda *_: self.note("encoder"))
        model.projector.register_forward_hook(self._projected)

    def restart(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._last = self._now()

    def note(self, part: str) -> None:
        now = self._now()
        self.parts[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _projected(self, module: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        self.note("projector")
        outputs[0].register_hook(lambda _: self.note("backward: language model"))


def measure(
    case: Case, folder: Path, steps: int, device: str, precision: str, profile: bool, start_method: str
) -> Result:
    """Trains for some steps, on a corpus that it makes in `folder` (to be created).

    Args:
      precision: one of `PRECISIONS`.
      profile: print the operators that one more step spends its time in.
      start_method: of the loader's worker, as in a training run; a process that was spawned would spawn its own.

    Raises:
      RuntimeError: a measured step had no finite gradient.
    """
    torch.multiprocessing.set_start_method(start_method, force=True)
    torch.manual_seed(0)
    mixed_precision, dtype = PRECISIONS[precision]
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    model = build_model(case, device)
    data = make_corpus(folder, case, batches=UNMEASURED_STEPS + steps + profile + 1)  # the last may be smaller
    batches = iter(build_train_loader(data, seed=0, labels=model))
    first = next(batches).to(device)
    init_from_data(model.encoder, first.features, first.feature_lens)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, case.optim))
    trained = [p for p in model.parameters() if p.requires_grad]
    average = RunningAverage(model, period=200)
    clock = StepClock(model, device)

    def step(batch: Batch | None = None) -> tuple[Batch, float]:
        """One of recipes/train.py: the batch, if none is given the next one, and the norm of its gradient."""
        clock.restart()
        batch = (batch or next(batches)).to(accelerator.device)
        clock.note("data")
        result = train_step(
            accelerator, model, optimizer, [batch], case.optim.max_grad_norm, note=lambda part: clock.note(NOTED[part])
        )
        optimizer.zero_grad()
        average.update(1)
        clock.note("optimizer")
        return batch, result.grad_norm

    backend, model.llm.wkv_backend = model.llm.wkv_backend, "chunked"
    flops_per_second = count_flops(lambda: step(first)) / first.audio_seconds
    model.llm.wkv_backend = backend
    for _ in range(UNMEASURED_STEPS - 1):
        step()

    times, audio_seconds, positions, parts = [], 0.0, 0, dict.fromkeys(PARTS, 0.0)

    def run() -> None:
        nonlocal audio_seconds, positions
        for _ in range(steps):
            start = time.perf_counter()
            batch, norm = step()
            times.append(time.perf_counter() - start)
            if not math.isfinite(norm):
                raise RuntimeError(f"the norm of the gradient is {norm}: that was no training step")
            audio_seconds += batch.audio_seconds
            positions += positions_of(model, batch)
            for part in PARTS:
                parts[part] += clock.parts[part] / steps

    _, memory = memory_of(run, device)
    if profile:
        print_profile(f"{case.name}, {case.way}, training step", step)
    return Result(
        trained=sum(p.numel() for p in trained),
        times=times,
        parts=parts,
        audio_seconds=audio_seconds,
        positions=positions,
        memory=memory,
        flops=flops_per_second * audio_seconds,
        product_rate=product_rate(dtype, device),
    )


def count_flops(run: Callable[[], object]) -> int:
    """Of the products and convolutions in `run`, backward passes included."""
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def figures(result: Result) -> dict[str, float]:
    """A row of the first table."""
    total = sum(result.times)
    rate = result.flops / total
    return {
        "trained, M": result.trained / 1e6,
        "step, ms": 1e3 * statistics.median(result.times),
        "audio s/s": result.audio_seconds / total,
        "positions/s": result.positions / total,
        "memory, GB": result.memory / 1e9,
        "GFLOP/s": rate / 1e9,
        "share of a product, %": 100 * rate / result.product_rate,
    }


def print_results(cases: list[Case], results: list[Result | Failure]) -> None:
    """Two tables: speed and memory; time by part in milliseconds a step."""
    speed, by_part = [], []
    for case, result in zip(cases, results, strict=True):
        name = [case.name, case.way]
        if isinstance(result, Failure):
            speed.append([*name, result.reason, *[""] * 6])
            continue
        row = figures(result)
        speed.append([
            *name,
            f"{row['trained, M']:.2f}",
            median_and_least(result.times, 1e3),
            number(row["audio s/s"]),
            number(row["positions/s"]),
            f"{row['memory, GB']:.2f}",
            number(row["GFLOP/s"]),
            f"{row['share of a product, %']:.0f} % of {number(result.product_rate / 1e9)}",
        ])  # fmt: skip
        mean = sum(result.times) / len(result.times)
        by_part.append([
            *name,
            *(f"{number(1e3 * t)} ({100 * t / mean:.0f} %)" for t in result.parts.values()),
            number(1e3 * mean),
        ])  # fmt: skip
    print_table(
        ["", "trained", "of it, M", "step, ms", "audio s/s", "positions/s", "memory, GB", "GFLOP/s", "share"], speed
    )
    if by_part:
        print("Time by part, ms a step\n")
        print_table(["", "trained", *PARTS, "step"], by_part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, metavar="SIZE",
                        help=f"of {', '.join(SIZES)} (default: digits 0.1b on the CPU, else all)")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY",
                        help=f"of training the published sizes: of {', '.join(WAYS)} "
                        "(default: all but lora on the CPU, else all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="to measure (default: %(default)s)")
    parser.add_argument("--batch-seconds", type=float, metavar="S",
                        help="audio in a batch (default: 40 for digits; others 20 on the CPU, else 200)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 on the CPU, else bf16")
    parser.add_argument("--profile", action="store_true", help="also print where the time of each row goes")
    add_rows_option(parser)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.batch_seconds is not None and args.batch_seconds < 1:
        parser.error(f"--batch-seconds must be at least 1, got {args.batch_seconds:g}")
    check_device(parser, args.device)
    if on_cpu and args.precision == "fp16":
        parser.error("--precision fp16 needs --device cuda; on the CPU there are fp32 and bf16")
    sizes = args.sizes or (("digits", "0.1b") if on_cpu else SIZES)
    ways = args.ways or [way for way in WAYS if not (on_cpu and way == "lora")]
    precision = args.precision or ("fp32" if on_cpu else "bf16")

    print(f"Training steps, {precision}, {args.device}\n")
    packages = ["speechllm", "accelerate", "peft", "fla-core"]
    print(machine(packages, args.device, args.threads) + "\n", flush=True)
    start_method = torch.multiprocessing.get_start_method()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as tmp:
        tokenizer = Path(tmp) / "tokenizer"
        make_tokenizer(tokenizer)
        cases = []
        for size in sizes:
            if size == "digits":
                cases.append(digits_case(tokenizer, args.batch_seconds))
            else:
                batch_seconds = args.batch_seconds or (20.0 if on_cpu else 200.0)
                cases += [published_case(size, way, batch_seconds) for way in ways]
        results = []
        for i, case in enumerate(cases):
            print(f"... {case.name} {case.way}", file=sys.stderr, flush=True)
            arguments = (case, Path(tmp) / str(i), args.steps, args.device, precision, args.profile, start_method)
            result = in_own_process(measure, *arguments, threads=args.threads)
            results.append(result)
            row = result if isinstance(result, Failure) else figures(result)
            append_row(args.rows, f"{case.name}, {case.way}", row)
    print_results(cases, results)
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
