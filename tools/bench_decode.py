#!/usr/bin/env python3
"""Speed and memory of decoding speech on the CPU, beside what people would otherwise use.

    tools/bench.sh decode                                            # with the other packages installed: 15 minutes
    tools/bench_decode.py --layers 2 --width 128 --vocab 500 --encoder-scale 4   # seconds
    tools/bench_decode.py --only encoder --profile

All in float32, with random weights, RWKV-7's such as bfloat16 has, as those of released checkpoints are. Each row has a
process to itself; figures are the median over the repetitions, in brackets the worst (tokens per second: the slowest;
seconds: the fastest).

Language models: every utterance is 10 s of audio (125 positions) in a prompt of 12 more, and 40 tokens are written for
each, whatever they are: there is no end of text. Seconds are those from the embeddings to the last token, reading the
prompts included, the encoder not, which has its own table. Real-time factor: these by the seconds of audio. Tokens/s:
those after each utterance's first, by the time that they take. Ratios: how many times as fast as the package `rwkv`.

speechllm: `speechllm.decode.search` on RWKV-7, weights packed as for inference, greedy and with a beam of 4.
rwkv: PyPI's package, by the author of RWKV: one row at a time, so that a batch is a loop over utterances; it reads
token ids, as many as there are positions. The weights are the same as speechllm's.
transformers: `generate` with a key-value cache on a Qwen2 of the same depth, width, vocabulary and parameters.
speechllm, Qwen2: `speechllm.decode.search` on that Qwen2.

Encoder: the released size (AudenAI/auden-encoder-tta-m10, 152.7 M parameters), on one utterance of 40 s and on a batch
of eight of 10 s, with each kind of weights that `speechllm transcribe --encoder-weights` has. Operations are those of
torch.utils.flop_counter, and of oneDNN's linear product, which it does not know; share: of the rate of a square float32
matrix product in the same process, by torch.mm or by speechllm.linear.product, whichever is faster. Faster: than with
float32 weights; error: of the output, relative to theirs. With --cpu-time seconds are those of the processor, for one
thread on a machine that has other work.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_rwkv import WEIGHTS, prepare
from bench_train import TTA_M10, count_flops
from bench_wkv import (
    Failure,
    add_common_options,
    exit_status,
    in_own_process,
    machine,
    median_and_least,
    memory_of,
    number,
    print_profile,
    print_table,
    product_rate,
    ratio,
    seconds,
)
from torch import Tensor

from speechllm.allocator import keep_freed_memory
from speechllm.decode.search import Prompt, SearchOptions, search
from speechllm.encoder import Zipformer, ZipformerConfig
from speechllm.encoder.pretrained import FULLY_TRAINED
from speechllm.linear import INFERENCE_WEIGHTS, pack_for_inference
from speechllm.llm.interface import LanguageModel
from speechllm.llm.transformers import TransformersLM
from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7

UTTERANCE_SECONDS = 10.0
POSITIONS = 125 + 12
BEAM = 4
NO_END = -1  # no token has this id


def random_embeddings(rows: int, width: int) -> Tensor:
    return torch.randn(rows, POSITIONS, width, generator=torch.Generator().manual_seed(0))


# ---- Language models: decode(utterances, hypotheses of each, tokens) -> how many tokens it wrote for each ------


class SpeechLLM:
    searches = (1, BEAM)
    largest_batch = None

    def __init__(self, folder: Path, config: RWKV7Config):
        self.model = load_rwkv7(folder / WEIGHTS)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        pack_for_inference(self.model)

    def decode(self, batch: int, beam: int, tokens: int) -> list[int]:
        return searched(self.model, batch, beam, tokens)


def searched(model: LanguageModel, batch: int, beam: int, tokens: int) -> list[int]:
    options = SearchOptions(
        method="beam" if beam > 1 else "greedy", beam=beam, max_repeats=tokens, max_rows=batch * beam
    )
    prompts = [Prompt(row, max_tokens=tokens) for row in random_embeddings(batch, model.hidden_size)]
    return [len(nbest[0].tokens) for _, nbest in search(model, prompts, options, NO_END)]


class RwkvPackage:
    searches = (1,)
    largest_batch = 8  # more of the same loop tells nothing

    def __init__(self, folder: Path, config: RWKV7Config):
        os.environ["RWKV_V7_ON"] = "1"
        with contextlib.redirect_stdout(sys.stderr):
            from rwkv.model import RWKV

            self.model = RWKV(str(folder / WEIGHTS).removesuffix(".pth"), "cpu fp32")
        self.vocab_size = config.vocab_size
        self.parameters = sum(t.numel() for t in self.model.z.values() if isinstance(t, Tensor))

    def decode(self, batch: int, beam: int, tokens: int) -> list[int]:
        prompts = torch.randint(
            self.vocab_size, (batch, POSITIONS), generator=torch.Generator().manual_seed(0)
        ).tolist()
        written = []
        for prompt in prompts:
            logits, state = self.model.forward(prompt, None)
            ids = [int(logits.argmax())]
            while len(ids) < tokens:
                logits, state = self.model.forward(ids[-1], state)
                ids.append(int(logits.argmax()))
            written.append(len(ids))
        return written


class Transformers:
    searches = (1, BEAM)
    largest_batch = None

    def __init__(self, folder: Path, config: RWKV7Config):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in RWKV7(config).parameters())
        # beside embeddings and head, a layer has four square matrices and three of the feed-forward part
        width, layers = config.n_embd, config.n_layer
        per_layer = (parameters - 2 * config.vocab_size * width) / layers
        heads = width // 64
        self.model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=width,
                intermediate_size=round((per_layer - 4 * width**2) / (3 * width)),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=0,
            )
        ).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def decode(self, batch: int, beam: int, tokens: int) -> list[int]:
        embeds = random_embeddings(batch, self.model.config.hidden_size)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        ids = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=beam,
        )
        return [len(row) for row in ids]


class SearchedTransformers(Transformers):
    """The same model in our searches."""

    def __init__(self, folder: Path, config: RWKV7Config):
        super().__init__(folder, config)
        self.lm = TransformersLM(self.model)

    def decode(self, batch: int, beam: int, tokens: int) -> list[int]:
        return searched(self.lm, batch, beam, tokens)


LANGUAGE_MODELS = {
    "speechllm": SpeechLLM,
    "rwkv": RwkvPackage,
    "transformers": Transformers,
    "speechllm, Qwen2": SearchedTransformers,
}


@dataclass(frozen=True)
class Decoding:
    """One of a language model's searches; lists have an entry for each batch size, None if it was not tried.

    Attributes:
      seconds: of the repetitions, for all tokens; first: the same for the first token of each utterance.
      memory: the highest, in bytes.
    """

    seconds: list[list[float] | None]
    first: list[list[float] | None]
    memory: list[int | None]
    parameters: int


@torch.no_grad()
def measure_decoding(name: str, beam: int, folder: Path, config: RWKV7Config, args: argparse.Namespace) -> Decoding:
    model = LANGUAGE_MODELS[name](folder, config)
    result = Decoding([], [], [], model.parameters)
    for batch in args.batches:
        if model.largest_batch is not None and batch > model.largest_batch:
            for values in (result.seconds, result.first, result.memory):
                values.append(None)
            continue

        def run(tokens: int = args.tokens, batch: int = batch) -> None:
            written = model.decode(batch, beam, tokens)
            if written != [tokens] * batch:
                raise RuntimeError(f"{name} wrote {written} tokens, not {tokens} for each of {batch} utterances")

        result.memory.append(memory_of(run)[1])
        result.seconds.append(seconds(run, args.repeat))
        result.first.append(seconds(functools.partial(run, 1), args.repeat))
        if args.profile:
            print_profile(f"{name}, beam {beam}, batch {batch}", run)
    return result


def bench_decoding(folder: Path, config: RWKV7Config, args: argparse.Namespace) -> list[object]:
    results: dict[tuple[str, int], Decoding | Failure] = {}
    for name, kind in LANGUAGE_MODELS.items():
        if name in args.skip:
            continue
        for beam in kind.searches[: 1 if args.greedy else None]:
            print(f"... {name}, beam {beam}", file=sys.stderr, flush=True)
            results[name, beam] = in_own_process(
                measure_decoding, name, beam, folder, config, args, threads=args.threads
            )
    for i, batch in enumerate(args.batches):
        print(f"Batch {batch}\n")
        print_table(
            ["", "parameters, M", "tokens/s", "ratio", "seconds", "ratio", "real-time factor", "memory, GB"],
            [decoding_row(name, beam, results, i, args) for name, beam in results],
        )
    rows = []
    for name in LANGUAGE_MODELS:
        greedy, beam = results.get((name, 1)), results.get((name, BEAM))
        if isinstance(greedy, Decoding) and isinstance(beam, Decoding):
            rows.append([name, *(ratio(b, g) for g, b in zip(greedy.seconds, beam.seconds, strict=True))])
    if rows:
        print(f"Seconds of beam {BEAM} by those of greedy\n")
        print_table(["", *(f"batch {batch}" for batch in args.batches)], rows)
    return list(results.values())


def decoding_row(
    name: str, beam: int, results: dict[tuple[str, int], Decoding | Failure], i: int, args: argparse.Namespace
) -> list[str]:
    """Of the i-th batch size."""
    result, batch = results[name, beam], args.batches[i]
    title = f"{name}, greedy" if beam == 1 else f"{name}, beam {beam}"
    if isinstance(result, Failure):
        return [title, result.reason, *[""] * 6]
    row = [title, f"{result.parameters / 1e6:.1f}"]
    if result.seconds[i] is None:
        return [*row, *["-"] * 6]
    speeds, times = tokens_per_second(result, i, args), result.seconds[i]
    ratios = ["-", "-"]
    reference = results.get(("rwkv", 1))
    if isinstance(reference, Decoding):
        # a loop over utterances takes as long for each of them, however many they are
        last = max(j for j in range(i + 1) if reference.seconds[j] is not None)
        of_rwkv = [t * batch / args.batches[last] for t in reference.seconds[last]]
        ratios = [ratio(speeds, tokens_per_second(reference, last, args)), ratio(of_rwkv, times)]
    factor = statistics.median(times) / (batch * UTTERANCE_SECONDS)
    return [
        *row,
        median_and_least(speeds),
        ratios[0],
        median_and_least(times),
        ratios[1],
        f"{factor:.3f}",
        f"{result.memory[i] / 1e9:.2f}",
    ]


def tokens_per_second(result: Decoding, i: int, args: argparse.Namespace) -> list[float]:
    """Once the prompts are read."""
    first = statistics.median(result.first[i])
    return [args.batches[i] * (args.tokens - 1) / (t - first) for t in result.seconds[i]]


# ---- The encoder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    seconds: list[float]
    flops: float
    product_rate: float  # FLOP/s
    memory: int  # bytes
    output: Tensor


def encoder_config(scale: int) -> ZipformerConfig:
    """The released size, its widths divided by `scale`."""
    return replace(
        TTA_M10,
        encoder_dim=[d // scale for d in TTA_M10.encoder_dim],
        feedforward_dim=[d // scale for d in TTA_M10.feedforward_dim],
        encoder_unmasked_dim=[d // scale for d in TTA_M10.encoder_unmasked_dim],
    )


@torch.no_grad()
def measure_encoder(rows: int, length: float, weights: str, args: argparse.Namespace) -> Encoding:
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.manual_seed(0)
    encoder = Zipformer(encoder_config(args.encoder_scale)).eval()
    encoder.set_batch_count(FULLY_TRAINED)
    features = torch.randn(rows, round(100 * length), 80)
    lens = torch.full((rows,), features.shape[1])

    def run() -> Tensor:
        with computing(weights):
            return encoder(features, lens)[0]

    flops = count_flops(lambda: encoder(features, lens))  # which does not see into packed products
    pack_for_inference(encoder, weights)
    keep_freed_memory()
    memory = memory_of(run)[1]
    times = seconds(run, args.repeat, clock=clock)
    if args.profile:
        print_profile(f"encoder, {weights}, {rows} x {length} s", run)
    return Encoding(times, flops, product_rate(torch.float32, "cpu", clock), memory, run().float())


def computing(weights: str) -> AbstractContextManager[object]:
    """As `speechllm.model.build.prepare_for_inference` has it."""
    return nullcontext() if weights == "float32" else torch.autocast("cpu", torch.bfloat16)


def bench_encoder(args: argparse.Namespace) -> list[object]:
    print("Encoder\n")
    results: list[object] = []
    table: list[list[str]] = []
    for rows, length in ((1, 40.0), (8, 10.0)):
        plain = None
        for weights in args.encoder_weights:
            print(f"... encoder, {weights}, {rows} x {length:.0f} s", file=sys.stderr, flush=True)
            result = in_own_process(measure_encoder, rows, length, weights, args, threads=args.threads)
            results.append(result)
            title = [f"{rows} x {length:.0f} s", weights]
            if isinstance(result, Failure):
                table.append([*title, result.reason, *[""] * 7])
                continue
            plain = result if weights == "float32" else plain
            table.append([*title, *encoder_cells(result, plain, rows * length)])
    print_table(
        ["audio", "weights", "seconds", "real-time factor", "GFLOP/s", "of a product", "share", "faster", "error",
         "memory, GB"],
        table,
    )  # fmt: skip
    return results


def encoder_cells(result: Encoding, plain: Encoding | None, audio_seconds: float) -> list[str]:
    """`plain`: with float32 weights, if that is known."""
    time = statistics.median(result.seconds)
    beside = ["-", "-"]
    if plain is not None:
        error = (result.output - plain.output).norm() / plain.output.norm()
        beside = [ratio(plain.seconds, result.seconds), f"{float(error):.1e}"]
    return [
        median_and_least(result.seconds),
        f"{time / audio_seconds:.4f}",
        number(result.flops / time / 1e9),
        number(result.product_rate / 1e9),
        f"{100 * result.flops / time / result.product_rate:.0f}%",
        *beside,
        f"{result.memory / 1e9:.2f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["language-model", "encoder"], help="one of the two parts")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=65536, help="default: %(default)s")
    parser.add_argument("--encoder-scale", type=int, default=1, metavar="N",
                        help="divides the widths of the encoder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--encoder-weights", nargs="+", default=list(INFERENCE_WEIGHTS), choices=INFERENCE_WEIGHTS,
                        metavar="KIND", help="of the encoder (default: float32 bfloat16 int8)")  # fmt: skip
    parser.add_argument("--cpu-time", action="store_true", help="of the encoder: seconds of the processor")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N",
                        help="utterances in a batch (default: 1 8 32)")  # fmt: skip
    parser.add_argument("--greedy", action="store_true", help="no beam search")
    parser.add_argument("--tokens", type=int, default=40, help="to write for each utterance (default: %(default)s)")
    add_common_options(parser, list(LANGUAGE_MODELS), repeat=3)
    args = parser.parse_args()
    config = RWKV7Config(args.layers, args.width, args.vocab)

    print(machine(["speechllm", "rwkv", "transformers"], "cpu", args.threads) + "\n", flush=True)
    results = []
    if args.only != "encoder":
        print(f"{args.layers} layers x {args.width}, V={args.vocab}\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-decode-") as tmp:
            made = in_own_process(prepare, config, Path(tmp), threads=args.threads)
            if isinstance(made, Failure):
                sys.exit(f"error: cannot write the weights to {tmp}: {made.reason}")
            results += bench_decoding(Path(tmp), config, args)
    if args.only != "language-model":
        results += bench_encoder(args)
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
