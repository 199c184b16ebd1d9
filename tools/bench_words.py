#!/usr/bin/env python3
"""What a model's search costs with the scores that its CTC head gives words, and without them.

    tools/bench_words.py models/english recipes/english/data/corpus/test.jsonl

Utterances of a manifest, spread over it, are transcribed together: with the search that the model's folder asks for,
with the same without the CTC head, and with greedy search. CPU time of one thread, features and encoder included; the
searches take turns, and the least counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_wkv import machine, number, print_table

from speechllm.decode.options import RecognizeOptions, SearchOptions
from speechllm.model.build import load_model
from speechllm.transcribe.inputs import Inputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model whose `decoding` has a ctc_weight")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--utterances", type=int, default=24, help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model).eval()
    own = model.config.recognize_options(None)
    if not own.ctc_weight:
        parser.error(f"{args.model}: its decoding has no ctc_weight, so that its CTC head scores nothing")
    audio = [input.audio for input in Inputs([args.manifest])]
    audio = audio[:: max(len(audio) // args.utterances, 1)][: args.utterances]
    searches = {
        f"{own.search.method} {own.search.beam}, CTC head scores words": own,
        f"{own.search.method} {own.search.beam}": replace(own, ctc_weight=0.0),
        "greedy": RecognizeOptions(SearchOptions()),
    }
    least = dict.fromkeys(searches, float("inf"))
    for _ in range(args.repeat):
        for name, options in searches.items():
            start = time.process_time()
            found = model.transcribe(audio, options=options)
            least[name] = min(least[name], time.process_time() - start)
    seconds = sum(recording.duration for recording in found)
    print(machine([], "cpu", 1))
    print(f"{len(audio)} utterances, {number(seconds)} s of audio")
    print_table(["search", "CPU s per s of audio"], [[name, number(t / seconds)] for name, t in least.items()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
