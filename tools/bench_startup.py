#!/usr/bin/env python3
"""Start-up: CPU seconds of commands as a user starts them, beside the import of PyTorch alone, which is the floor.

    tools/bench_startup.py                        # a small model with random weights, one second of audio
    tools/bench_startup.py --model exp/model --language en

Each command has processes of its own, in turns, and the least of `--repeat` counts: user and system time, so that what
else runs on the machine matters little.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from bench_long import random_model
from bench_wkv import machine, number, print_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained model (default: a small one, random)")
    parser.add_argument("--language", default="en", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model is None:
            random_model().save_pretrained(folder / "model")
        soundfile.write(folder / "one.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
        transcribe = ["transcribe", folder / "one.wav", "--model", args.model or folder / "model"]
        commands = {
            "import torch": ["-c", "import torch"],
            "from speechllm import SpeechLLM": ["-c", "from speechllm import SpeechLLM"],
            "speechllm --help": ["-m", "speechllm.cli", "--help"],
            "speechllm transcribe one.wav": ["-m", "speechllm.cli", *transcribe, "--language", args.language],
        }
        least = dict.fromkeys(commands, float("inf"))
        for _ in range(args.repeat):
            for title, command in commands.items():
                least[title] = min(least[title], cpu_seconds([sys.executable, *map(str, command)]))
    print(machine(["lhotse"], "cpu", torch.get_num_threads()))
    floor = least["import torch"]
    rows = [[title, number(seconds), number(seconds / floor)] for title, seconds in least.items()]
    print_table(["command", "CPU seconds", "to import torch"], rows)
    return 0


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
