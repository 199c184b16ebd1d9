#!/usr/bin/env python3
"""Average checkpoints of a run and write the model that results.

    tools/average_ckpt.py --exp-dir exp --iter 3000 --avg 8      # the 8 checkpoint-STEP.pt up to step 3000
    tools/average_ckpt.py --exp-dir exp --epoch 20 --avg 5       # epoch-16.pt ... epoch-20.pt
    tools/average_ckpt.py --output exp/my-avg FILE [FILE ...]    # these files

The result is a folder that `SpeechLLM.from_pretrained`, `recipes/decode.py --model` and `speechllm transcribe
--model` read. Parameters are averaged with equal weights; frozen parts come from where the run took them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speechllm.checkpoint import (
    average_state_dicts,
    checkpoints_to_average,
    load_checkpoint,
    load_trained,
)
from speechllm.config import from_dict
from speechllm.errors import UserError
from speechllm.model import ModelConfig, SpeechLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="checkpoints to average")
    parser.add_argument("--exp-dir", type=Path, help="folder of the run")
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--epoch", type=int, help="average epoch-N.pt up to this N")
    last.add_argument("--iter", type=int, help="average checkpoint-STEP.pt up to this STEP")
    parser.add_argument("--avg", type=int, default=1, help="how many checkpoints (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write (default: EXP_DIR/epoch-N-avg-K, iter-N-avg-K)")
    args = parser.parse_args()
    by_number = args.epoch is not None or args.iter is not None
    if bool(args.files) == by_number or (by_number and not args.exp_dir) or (args.files and not args.output):
        parser.error("give either --exp-dir with --epoch or --iter, or FILES with --output")
    try:
        if args.files:
            paths, output = args.files, args.output
        elif args.epoch is not None:
            paths = checkpoints_to_average(args.exp_dir, "epoch", args.epoch, args.avg)
            output = args.output or args.exp_dir / f"epoch-{args.epoch}-avg-{args.avg}"
        else:
            paths = checkpoints_to_average(args.exp_dir, "checkpoint", args.iter, args.avg)
            output = args.output or args.exp_dir / f"iter-{args.iter}-avg-{args.avg}"
        average(paths, output)
    except (UserError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")


def average(paths: list[Path], output: Path) -> None:
    print("averaging:", *paths, sep="\n  ")
    checkpoints = [load_checkpoint(path) for path in paths]
    model = SpeechLLM.from_config(from_dict(ModelConfig, checkpoints[-1]["config"]["model"], str(paths[-1])))
    load_trained(model, average_state_dicts(c["model"] for c in checkpoints), paths[-1])
    model.save_pretrained(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
