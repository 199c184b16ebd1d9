#!/usr/bin/env python3
r"""Decode test sets as streams: error rates against delay, and how fast it is.

    python recipes/streaming_decode.py --config configs/digits-streaming.yaml --model EXP/iter-2400-avg-5 \
        --exp-dir EXP --chunk-seconds 0.32 0.64 1.28 offline       # EXP=recipes/digits/exp-streaming/write

The utterances of each set under `data.test` are played to --streams streams at a time, a chunk of audio to each, all of
which are computed together; as one ends, the next utterance takes its place. `offline` hears all of an utterance before
it writes. With a language model it needs one that was trained with model.streaming; an encoder alone, and --ctc, write
with the CTC head.

EXP_DIR/streaming_greedy_search_0.64 (or the like) receives, as icefall's decoding, recogs-SET-MODEL.txt,
errs-SET-MODEL.txt, wer-summary-SET-MODEL.txt and wer-by-language-SET-MODEL.txt. Printed, and put into
EXP_DIR/streaming-summary-MODEL.txt, are:

  WER %         of all words
  delay         from the true end of a word, as the manifest has it (`alignment`), to when it is written: audio that has
                to be heard, the time to compute not counted; of the words that were recognized rightly
  first         the median of the same, of the first word of each utterance
  chunk, ms     time to compute one chunk of all streams that are played at once: half of the chunks take less than
                the first number, 95 % less than the second
  RTF           real-time factor: seconds of computing for a second of audio
  streams/core  1 / (RTF x threads): how many streams a core can hear in real time; on a GPU of the device
  KiB/stream    the most memory that a stream took: features, caches of the encoder, state of the language model

EXP_DIR/streaming-SET-MODEL.png shows WER against delay, where matplotlib is installed. Ctrl-C ends the program with the
status 130.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from speechllm.cli.exits import run_to_exit
from speechllm.cli.options import add_device_option, add_dtype_option, add_weights_options, positive
from speechllm.cli.streaming_options import add_streaming_options, streaming_options
from speechllm.config import ConfigError
from speechllm.data import Batch, build_eval_loader
from speechllm.data.dataset import WaveformBatch
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.loader import SpeechLoader
from speechllm.decode.interface import Speech
from speechllm.decode.options import StreamingOptions
from speechllm.decode.result import StreamedWord, streamed_text
from speechllm.decode.streaming import Stream, StreamingRecognizer
from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.log import setup_logging
from speechllm.model.build import load_model, prepare_for_inference
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.scoring import Transcript, transcripts, write_reports
from speechllm.scoring.latency import Delays, percentile
from speechllm.scoring.reports import aligned
from speechllm.train.config import Experiment, load_experiment

logger = logging.getLogger(__name__)

HEADER = (
    "test set", "chunk, s", "words", "WER %", "delay, ms: median", "p90", "p99", "first", "chunk, ms: p50", "p95",
    "RTF", "streams/core", "KiB/stream",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="experiment configuration (YAML)")
    parser.add_argument("--exp-dir", required=True, type=Path, help="folder for logs and results")
    parser.add_argument("--model", required=True, type=Path, help="folder of the trained model")
    parser.add_argument(
        "--chunk-seconds",
        nargs="+",
        type=chunk_seconds,
        default=[0.64],
        metavar="X",
        help="audio that is heard before something is written, in seconds, or offline; several are compared (default: "
        "0.64)",
    )
    parser.add_argument(
        "--streams", type=positive, default=8, help="how many are played at the same time (default: %(default)s)"
    )
    add_weights_options(parser)
    add_device_option(parser)
    add_dtype_option(parser)
    add_streaming_options(parser)
    args, overrides = parser.parse_known_args()

    def run() -> None:
        config = load_experiment(args.config, overrides)
        if not config.data.test:
            raise ConfigError("data.test names no test set")
        options = streaming_options(args)
        setup_logging(args.exp_dir / "log", "log-streaming-decode")
        model = load_model(args.model)
        prepare_for_inference(model, args.device, args.dtype, args.llm_weights, args.encoder_weights)
        decode(config, args.exp_dir, model, args.model.name, args.chunk_seconds, args.streams, options)

    run_to_exit(run)


def chunk_seconds(text: str) -> float | None:
    """None for `offline`."""
    if text == "offline":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seconds nor offline") from None


@dataclass
class Measured:
    """Of one test set with one chunk size; times in seconds."""

    results: list[Transcript] = field(default_factory=list)
    delays: Delays = field(default_factory=Delays)
    chunks: list[float] = field(default_factory=list)  # to compute one of all streams
    computing: float = 0.0
    audio: float = 0.0
    stream_bytes: int = 0
    left_out: int = 0


def decode(
    config: Experiment,
    exp_dir: Path,
    model: SpeechLLM | EncoderModel,
    model_name: str,
    chunks: Sequence[float | None],
    count: int,
    options: StreamingOptions,
) -> None:
    # All that is refused is, before the first of them takes its time.
    recognizers = {
        seconds: StreamingRecognizer(model, seconds, None, options=options) for seconds in chunks if seconds is not None
    }
    rows: list[tuple[str, ...]] = []
    for name, sources in config.data.test.items():
        points: list[tuple[str, float, Measured]] = []
        for seconds in chunks:
            label = "offline" if seconds is None else f"{seconds:g}"
            loader = build_eval_loader(replace(config.data, features_on="device"), sources)
            if seconds is None:
                measured = offline(model, loader, config.data.text)
            else:
                measured = streamed(recognizers[seconds], loader, count, config.data.text)
            if measured.left_out:
                logger.warning("%s: %d utterances were left out", name, measured.left_out)
            if not measured.results:
                logger.error("%s: no utterance of this test set can be recognized", name)
                continue
            setting = f"streaming_{search_name(model, options)}_{label}"
            report = write_reports(exp_dir / setting, name, model_name, measured.results, setting=setting)
            logger.info("%s, %s: WER %s", name, setting, report)
            points.append((label, 100 * report.rate, measured))
            rows.append(row(name, label, report.ref_len, 100 * report.rate, measured))
        plot_if_possible(points, exp_dir / f"streaming-{name}-{model_name}.png", name)
    if not rows:
        raise UserError(f"{model_name}: no utterance of the test sets can be recognized; the log says why")
    text = aligned([HEADER, *rows])
    where = f"{count} streams at a time, {model.device}, {torch.get_num_threads()} threads\n"
    with replaced_file(exp_dir / f"streaming-summary-{model_name}.txt") as tmp:
        tmp.write_text(where + text, encoding="utf-8")
    print(f"\n{where}{text}", end="")


def search_name(model: SpeechLLM | EncoderModel, options: StreamingOptions) -> str:
    if model.llm is None or options.ctc:
        return "ctc_greedy_search"
    name = "greedy_search" if options.beam == 1 else f"beam_search_{options.beam}"
    return name + ("_hotwords" if options.hotwords else "")


@dataclass
class Utterance:
    """One that is played: row `row` of its batch, to `stream`; `at` samples of it have been."""

    batch: WaveformBatch
    row: int
    samples: torch.Tensor
    stream: Stream
    at: int = 0
    words: list[StreamedWord] = field(default_factory=list)


def streamed(recognizer: StreamingRecognizer, loader: SpeechLoader, count: int, text_steps: Sequence[str]) -> Measured:
    """Play all utterances, `count` at a time."""
    measured = Measured()
    waiting = utterances(recognizer, loader, measured)
    chunk = round(recognizer.chunk.seconds * SAMPLE_RATE)
    playing: list[Utterance] = []
    while True:
        playing += [found for found in (next(waiting, None) for _ in range(count - len(playing))) if found is not None]
        if not playing:
            return measured
        pieces = [utterance.samples[utterance.at : utterance.at + chunk] for utterance in playing]
        ending = []
        start = time.perf_counter()
        for utterance, words in zip(playing, recognizer.accept([u.stream for u in playing], pieces), strict=True):
            utterance.words += words
            utterance.at += chunk
            if utterance.at >= len(utterance.samples):
                ending.append(utterance)
        for utterance, words in zip(ending, recognizer.finish([u.stream for u in ending]), strict=True):
            utterance.words += words
        measured.chunks.append(time.perf_counter() - start)
        measured.computing += measured.chunks[-1]
        measured.stream_bytes = max([measured.stream_bytes, *(utterance.stream.nbytes for utterance in playing)])
        for utterance in ending:
            count_result(measured, utterance, text_steps)
        playing = [utterance for utterance in playing if utterance not in ending]


def utterances(recognizer: StreamingRecognizer, loader: SpeechLoader, measured: Measured) -> Iterator[Utterance]:
    """Those that the model can recognize, each with a stream that is open."""
    for batch in loader:
        assert isinstance(batch, WaveformBatch)  # features are on the device
        for row, (request, length) in enumerate(zip(batch.requests, batch.sample_lens.tolist(), strict=True)):
            try:
                if (target := request.target_language) is not None:
                    raise UserError(f"{target} is asked for, but a stream is not translated")
                stream = recognizer.open(request.language, request)
            except UserError as error:
                leave_out(batch, row, error, measured)
            else:
                yield Utterance(batch, row, batch.samples[row, :length], stream)


def leave_out(batch: Batch | WaveformBatch, row: int, error: UserError, measured: Measured) -> None:
    logger.warning("left out: %s: %s", batch.ids[row], error)
    measured.left_out += 1


def count_result(measured: Measured, utterance: Utterance, text_steps: Sequence[str]) -> None:
    hyps: list[str | None] = [None] * len(utterance.batch)
    hyps[utterance.row] = streamed_text(utterance.words)
    (result,) = transcripts(utterance.batch, hyps, text_steps)
    measured.results.append(result)
    measured.audio += len(utterance.samples) / SAMPLE_RATE
    if result.words is not None:
        measured.delays.add(result.words, utterance.words, text_steps, result.language)


@torch.no_grad()
def offline(model: SpeechLLM | EncoderModel, loader: SpeechLoader, text_steps: Sequence[str]) -> Measured:
    """Utterances that are heard whole; a word is written when its utterance has ended."""
    measured = Measured()
    recognizer = model.recognizer()
    for batch in loader:
        batch = batch.to(model.device)
        rows = []
        for i, frames in enumerate(batch.feature_lens.tolist()):
            try:
                recognizer.check(batch.requests[i], frames)
            except UserError as error:
                leave_out(batch, i, error, measured)
            else:
                rows.append(i)
        if not rows:
            continue
        speech = Speech(batch.features, batch.feature_lens, batch.requests).rows(rows)
        start = time.perf_counter()
        (found,) = recognizer([speech])
        measured.computing += time.perf_counter() - start
        measured.audio += sum(batch.durations[i] for i in rows)
        hyps: list[str | None] = [None] * len(batch)
        for i, result in zip(rows, found, strict=True):
            hyps[i] = result.text
        for i, scored in zip(rows, transcripts(batch, hyps, text_steps), strict=True):
            measured.results.append(scored)
            words = [StreamedWord(text, 0.0, 0.0, 1.0, written=batch.durations[i]) for text in scored.hyp.split()]
            if scored.words is not None:
                measured.delays.add(scored.words, words, text_steps, scored.language)
    return measured


def row(name: str, label: str, words: int, wer: float, measured: Measured) -> tuple[str, ...]:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds:.0f}"

    rtf = measured.computing / max(measured.audio, 1e-9)
    per_core = 1 / max(rtf * torch.get_num_threads(), 1e-9)
    return (
        name,
        label,
        str(words),
        f"{wer:.2f}",
        *(ms(percentile(measured.delays.words, share)) for share in (50, 90, 99)),
        ms(percentile(measured.delays.first, 50)),
        *(ms(percentile(measured.chunks, share)) for share in (50, 95)),
        f"{rtf:.4f}",
        "-" if label == "offline" else f"{per_core:.1f}",
        f"{measured.stream_bytes / 1024:.0f}" if measured.stream_bytes else "-",
    )


def plot_if_possible(points: Sequence[tuple[str, float, Measured]], path: Path, title: str) -> None:
    """WER against median delay, up to the 90th percentile, where there are true times."""
    known = [(label, wer, m.delays.words) for label, wer, m in points if m.delays.words]
    if not known or importlib.util.find_spec("matplotlib") is None:
        logger.info("%s: no plot, which needs matplotlib (pip install 'speechllm[plot]') and word times", title)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axis = figure.subplots()
    for label, wer, delays in known:
        median, p90 = (1000 * (percentile(delays, share) or 0.0) for share in (50, 90))
        axis.plot([median, p90], [wer, wer], "-", color="C0", alpha=0.4)
        axis.plot(median, wer, "o", color="C0")
        axis.annotate(label if label == "offline" else f"{label} s", (median, wer), (4, 4), textcoords="offset points")
    axis.set(xlabel="delay, ms: median, and line to the 90th percentile", ylabel="WER, percent", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    with replaced_file(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


if __name__ == "__main__":
    main()
