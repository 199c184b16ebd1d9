#!/usr/bin/env python3
"""What it takes to plan the transcription of very many files: CPU time and memory of one process of several.

    tools/bench_inputs.py --files 1000000 --world-size 8       # TMPDIR=/dev/shm, where there is room for its files

It is the part of `speechllm transcribe --world-size N --rank 0 --output DIR` before recognition, on empty files in
folders of 1,000 and on a manifest of them, where nothing is done yet; and where all is, as when a run is started again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_wkv import memory_of, number

from speechllm.data.share import Share
from speechllm.errors import UserError
from speechllm.transcribe.formats import Recording
from speechllm.transcribe.inputs import AudioInput, Inputs
from speechllm.transcribe.output import Output, run_all

FILES_IN_A_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--files", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=8, help="processes that share them (default: %(default)s)")
    args = parser.parse_args()
    share = Share(0, args.world_size)
    with tempfile.TemporaryDirectory(prefix="speechllm-") as folder:
        audio, manifest, results = (Path(folder, name) for name in ("audio", "lines.jsonl", "results"))
        make_inputs(args.files, audio, manifest)
        print("| | planned | of | CPU s | MB |\n|---|---:|---:|---:|---:|", flush=True)
        row(
            "a manifest, nothing done", args.files, Inputs([manifest], share=share), Output("txt", results, share=share)
        )
        row("folders, nothing done", args.files, Inputs([audio], share=share), Output("txt", results, share=share))
        finished = Output("txt", results, share=share)
        for input in Inputs([audio], share=share):
            finished.write(input, Recording(input.id, input.audio, 10.0, ()))
        row("folders, all done", args.files, Inputs([audio], share=share), Output("txt", results, share=share))


def make_inputs(count: int, audio: Path, manifest: Path) -> None:
    with open(manifest, "w", encoding="utf-8") as lines:
        for i in range(count):
            file = audio / f"{i // FILES_IN_A_FOLDER:06}" / f"{i:09}.wav"
            if i % FILES_IN_A_FOLDER == 0:
                file.parent.mkdir(parents=True)
            file.touch()
            lines.write(json.dumps({"audio_filepath": str(file), "duration": 10.0, "lang": "en"}) + "\n")


def row(title: str, files: int, inputs: Inputs, output: Output) -> None:
    looked_at = 0

    def take(to_do: Iterator[AudioInput], on_progress: object) -> Iterator[tuple[AudioInput, Recording | UserError]]:
        nonlocal looked_at
        for _ in to_do:
            looked_at += 1
        return iter(())

    start = time.process_time()
    held, most = memory_of(lambda: run_all(inputs, take, output, "transcribed"))
    cells = number(time.process_time() - start), number((most - held) / 1e6)
    print(f"| {title} | {looked_at} | {files} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
