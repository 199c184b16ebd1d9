#!/usr/bin/env python3
"""Long audio: memory and speed of transcription against duration, from a minute to three hours.

    tools/bench_long.py                                        # a small model with random weights
    tools/bench_long.py --minutes 1 10 --model exp/iter-2200-avg-5 --language en

The audio is made up (noise with the rhythm of speech, 44.1 kHz stereo, FLAC) and lies in a temporary folder. Each
duration has a process to itself. Memory is what the process holds at its highest above what it held with the model
loaded (on Linux); beside it is what the waveform alone would take, at 16 kHz in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from bench_wkv import exit_status, in_own_process, memory_of, number, print_table

from speechllm.data.features import SAMPLE_RATE
from speechllm.decode.recognizer import RecognizeOptions, SpeechLLMRecognizer
from speechllm.decode.search import SearchOptions
from speechllm.encoder import ZipformerConfig
from speechllm.model.config import EncoderSection, LLMSection, ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.request import Request
from speechllm.rwkv7 import RWKV7Config
from speechllm.transcribe.inputs import audio_input
from speechllm.transcribe.segments import SegmentOptions, transcribe_inputs

_RATE = 44100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10, 60, 180], help="(default: %(default)s)")
    parser.add_argument("--model", type=Path, help="folder of a trained model (default: a small one, random)")
    parser.add_argument("--language", default="en", help="(default: %(default)s)")
    parser.add_argument("--batch-duration", type=float, default=300.0, help="seconds (default: %(default)g)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    args = parser.parse_args()
    rows, results = [], []
    for minutes in args.minutes:
        result = in_own_process(measure, minutes, args.model, args.language, args.batch_duration, threads=args.threads)
        results.append(result)
        rows.append([f"{minutes:g}", *(result if isinstance(result, list) else [str(result)])])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print_table(["minutes", "segments", "memory MB", "waveform MB", "seconds", "real-time factor"], rows)
    return exit_status(results)


def measure(minutes: float, model_dir: Path | None, language: str, batch_seconds: float) -> list[str]:
    model = random_model() if model_dir is None else SpeechLLM.from_pretrained(model_dir)
    # a random model never ends a text by itself: a few tokens a second, as speech has
    recognizer = SpeechLLMRecognizer(model.eval(), RecognizeOptions(SearchOptions(tokens_per_second=4.0)))
    options = SegmentOptions(batch_seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.flac"
        write_speech_like(file, minutes * 60)
        warm_up(recognizer, options, language)
        segments, start = 0, time.perf_counter()

        def run() -> None:
            nonlocal segments
            inputs = [audio_input(file, "long", Request(language=language))]
            ((_, recording),) = transcribe_inputs(inputs, recognizer, options)
            segments = len(recording.segments)

        before, highest = memory_of(run)
        elapsed = time.perf_counter() - start
    waveform = minutes * 60 * SAMPLE_RATE * 4
    return [
        str(segments), number((highest - before) / 1e6), number(waveform / 1e6), number(elapsed),
        number(elapsed / (60 * minutes)),
    ]  # fmt: skip


def warm_up(recognizer: SpeechLLMRecognizer, options: SegmentOptions, language: str) -> None:
    samples = 0.1 * np.random.default_rng(0).standard_normal(5 * SAMPLE_RATE)
    list(transcribe_inputs([audio_input(samples, "warm-up", Request(language=language))], recognizer, options))


def write_speech_like(file: Path, seconds: float) -> None:
    """Syllables in phrases of some seconds with pauses between them, a minute at a time."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(file, "w", _RATE, 2) as out:
        left = round(seconds * _RATE)
        while left > 0:
            time_ = np.arange(min(left, int(rng.uniform(1.0, 8.0) * _RATE))) / _RATE
            syllables = 0.1 * rng.standard_normal(len(time_)) * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time_))
            pause = 0.001 * rng.standard_normal(int(rng.uniform(0.2, 1.0) * _RATE))
            phrase = np.append(syllables, pause)[:left]
            out.write(np.stack([phrase, phrase], axis=1))
            left -= len(phrase)


def random_model() -> SpeechLLM:
    torch.manual_seed(0)
    zipformer = ZipformerConfig(
        downsampling_factor=[1, 2],
        num_encoder_layers=[1, 1],
        encoder_dim=[64, 96],
        encoder_unmasked_dim=[48, 64],
        feedforward_dim=[128, 192],
        num_heads=[4, 4],
        query_head_dim=[16],
        value_head_dim=[12],
        pos_head_dim=[4],
        pos_dim=48,
        cnn_module_kernel=[31, 15],
    )
    return SpeechLLM.from_config(
        ModelConfig(
            tokenizer="rwkv",
            encoder=EncoderSection(zipformer=zipformer),
            llm=LLMSection(rwkv7=RWKV7Config(n_layer=2, n_embd=128, head_size=64, vocab_size=65536)),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
