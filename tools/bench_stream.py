#!/usr/bin/env python3
r"""One long stream: whether memory and word error rate stay what they are at its beginning.

    tools/bench_stream.py --model recipes/digits/exp-streaming/offline/iter-900-avg-5 --language en \
        --manifest recipes/digits/data/test-en.jsonl --minutes 60

The utterances of the manifests follow one another without a pause, in a random order that begins anew when all have
been played, and are heard as one stream, a second at a time. For each tenth of it are printed the word error rate, the
median delay (from the true end of a word, `alignment` in the manifest, to the audio that was heard when it was written)
and the resident memory of the process (Linux). Beside it is the error rate of the same utterances as streams of their
own. --plot FILE.png (or .svg) draws both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench_wkv import print_table, resident

from speechllm.cli.exits import run_to_exit
from speechllm.data.audio import load_samples
from speechllm.data.features import SAMPLE_RATE, extract_features
from speechllm.data.manifests.manifest import describe_cut, read_manifest
from speechllm.data.manifests.source import Entry, said_words
from speechllm.decode.options import StreamingOptions
from speechllm.decode.result import StreamedWord, streamed_text
from speechllm.decode.streaming import StreamingRecognizer
from speechllm.errors import UserError
from speechllm.model.build import load_model, prepare_for_inference
from speechllm.prompt.label import WordTime
from speechllm.scoring import align

PARTS = 10


@dataclass
class Part:
    """A tenth of the stream."""

    end: float  # seconds
    words: int = 0
    errors: int = 0
    delays: list[float] | None = None
    memory: int = 0  # bytes, at its end

    @property
    def wer(self) -> float:
        return 100 * self.errors / max(self.words, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that was trained on streams")
    parser.add_argument("--manifest", type=Path, nargs="+", required=True, help="with text and alignment")
    parser.add_argument("--language", default="en", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the stream (default: %(default)g)")
    parser.add_argument("--chunk-seconds", type=float, default=0.64, help="(default: %(default)g)")
    parser.add_argument(
        "--memory-seconds",
        type=float,
        help="of audio, that the language model remembers, and at most twice as much (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a picture: .png, .svg")
    run_to_exit(lambda: measure(parser.parse_args()))


def measure(args: argparse.Namespace) -> None:
    utterances = [
        (entry, said_words(entry, []) or [], load_samples(cut))
        for path in args.manifest
        for cut in read_manifest(path)
        for entry in [describe_cut(cut)]
    ]
    if not all(words for _, words, _ in utterances):
        raise UserError(f"{args.manifest[0]}: utterances without word times: give `alignment` in every line")
    model = load_model(args.model)
    prepare_for_inference(model, "cpu")
    options = StreamingOptions(memory_seconds=args.memory_seconds)
    recognizer = StreamingRecognizer(model, args.chunk_seconds, args.language, options=options)
    print(f"{len(utterances)} utterances by themselves: WER {alone(recognizer, utterances):.2f} %", flush=True)
    parts, words, refs = one_stream(recognizer, utterances, 60 * args.minutes, args.seed)
    count_errors(parts, refs, words)
    header = ["minutes", "words", "WER %", "median delay, s", "memory, MB"]
    rows = [
        [f"{p.end / 60:.1f}", str(p.words), f"{p.wer:.2f}", f"{median(p.delays or [0.0]):.2f}", f"{p.memory / 1e6:.1f}"]
        for p in parts
    ]
    print_table(header, rows)
    total, errors = sum(p.words for p in parts), sum(p.errors for p in parts)
    growth = (parts[-1].memory - parts[0].memory) / 1e6
    print(f"all: {total} words, WER {100 * errors / total:.2f} %; memory grew by {growth:.1f} MB after the first tenth")
    if args.plot:
        plot(parts, args.plot)


def alone(recognizer: StreamingRecognizer, utterances: Sequence[tuple[Entry, list[WordTime], np.ndarray]]) -> float:
    """WER in percent of the utterances as streams of their own."""
    errors = total = 0
    for start in range(0, len(utterances), 16):
        some = utterances[start : start + 16]
        features = [extract_features(samples, recognizer.model.feature_kind) for _, _, samples in some]
        lens = torch.tensor([len(x) for x in features])
        found = recognizer.simulate(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lens)
        for (_, said, _), words in zip(some, found, strict=True):
            pairs = align([word.word for word in said], streamed_text(words).split())
            errors += sum(ref != hyp for ref, hyp in pairs)
            total += len(said)
    return 100 * errors / total


def one_stream(
    recognizer: StreamingRecognizer,
    utterances: Sequence[tuple[Entry, list[WordTime], np.ndarray]],
    seconds: float,
    seed: int,
) -> tuple[list[Part], list[StreamedWord], list[WordTime]]:
    """What was written, and what was said, in seconds from the beginning of the stream."""
    stream, refs = recognizer.open(), []
    parts = [Part(seconds * (i + 1) / PARTS) for i in range(PARTS)]
    words: list[StreamedWord] = []

    def samples() -> Iterator[np.ndarray]:
        played = 0.0
        rng = np.random.default_rng(seed)
        while True:
            for i in rng.permutation(len(utterances)):
                _, said, heard = utterances[i]
                if played + len(heard) / SAMPLE_RATE > seconds:
                    return
                refs.extend(WordTime(word, played + start, played + end) for word, start, end in said)
                played += len(heard) / SAMPLE_RATE
                for start in range(0, len(heard), SAMPLE_RATE):
                    yield heard[start : start + SAMPLE_RATE]

    done = 0
    for heard in samples():
        words += stream.accept(heard)
        while done < PARTS and stream.seconds >= parts[done].end - 1:
            parts[done].memory = resident("VmRSS")
            done += 1
    words += stream.finish()
    for part in parts[done:]:
        part.memory = resident("VmRSS")
    return parts, words, refs


def count_errors(parts: Sequence[Part], refs: Sequence[WordTime], words: Sequence[StreamedWord]) -> None:
    """Errors and delays, in the part of the reference word, of inserted words in that of the one before."""
    said, found = iter(refs), iter(words)
    part = 0
    for ref, hyp in align([word.word for word in refs], [word.text for word in words]):
        written = next(found) if hyp is not None else None
        if ref is not None:
            word = next(said)
            while part + 1 < len(parts) and word.end > parts[part].end:
                part += 1
            parts[part].words += 1
            if ref == hyp:
                parts[part].delays = [*(parts[part].delays or []), written.written - word.end]
        parts[part].errors += ref != hyp


def plot(parts: Sequence[Part], path: Path) -> None:
    """WER and memory over the stream."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'speechllm[plot]'") from error
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    minutes = [part.end / 60 for part in parts]
    for axis, label, values in zip(
        figure.subplots(1, 2),
        ("WER, %", "memory, MB"),
        ([part.wer for part in parts], [part.memory / 1e6 for part in parts]),
        strict=True,
    ):
        axis.plot(minutes, values, "o-")
        axis.set_ylim(0, 1.2 * max(*values, 1.0))
        axis.set_xlabel("minutes")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
