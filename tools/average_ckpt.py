#!/usr/bin/env python3
"""Average checkpoints of a run and write the model that results.

    tools/average_ckpt.py --exp-dir exp --epoch 20 --avg 5       # epoch-16.pt ... epoch-20.pt
    tools/average_ckpt.py --exp-dir exp --iter 3000 --avg 8      # the 8 checkpoint-STEP.pt up to step 3000
    tools/average_ckpt.py --output exp/my-avg FILE [FILE ...]    # these files

With --use-averaged-model the same epochs, or the steps between the same checkpoints, are averaged over all the steps in
them that the run's running average has seen, as in icefall: by the difference of the running averages at both ends, so
epoch-15.pt and epoch-20.pt, or checkpoint-3000.pt and the eighth before it.

With --released-share 0.25 a quarter of the encoder is as it was released, and the rest as it was trained; --released
names the released one where model.encoder.path of the run does not (it may name the encoder of an earlier run). On
speech unlike the training set that is mostly better, and often on speech like it: training on a small set takes away
more than it needs to (WiSE-FT, arXiv 2109.01903).

The result is a folder that `speechllm.model.build.load_model`, `recipes/decode.py --model` and `speechllm transcribe
--model` read. Frozen parts come from where the run took them; an adapter is averaged as an adapter, before it is
merged (if it is: --no-merge), and is in the folder by itself too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from speechllm.config import from_dict
from speechllm.encoder.pretrained import mix_released
from speechllm.errors import UserError
from speechllm.files import describe_write_error
from speechllm.model.build import build_model
from speechllm.model.config import ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import freeze_parameters
from speechllm.train.checkpoint import (
    average_between,
    average_state_dicts,
    checkpoints_to_average,
    load_checkpoint,
    load_trained,
)
from speechllm.train.languages import languages_of
from speechllm.weights import CheckpointError, file_hash


@dataclass(frozen=True)
class Form:
    """What becomes of the mean: its adapter `merged` or not, `bf16` matrices, a share of a released encoder."""

    merged: bool = True
    bf16: bool = False
    released_share: float = 0.0
    released: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="checkpoints to average")
    parser.add_argument("--exp-dir", type=Path, help="folder of the run")
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--epoch", type=int, metavar="N", help="average epoch-N.pt up to this N")
    last.add_argument("--iter", type=int, metavar="STEP", help="average checkpoint-STEP.pt up to this STEP")
    parser.add_argument("--avg", type=int, metavar="K", help="how many epochs or checkpoints (default: 1)")
    parser.add_argument(
        "--use-averaged-model", action="store_true", help="take the difference of the running averages at both ends"
    )
    parser.add_argument(
        "--no-merge",
        action="store_true",
        help="leave the adapter unmerged, and its base where it is: a small folder that names the path of the base",
    )
    parser.add_argument(
        "--released-share", type=float, metavar="S", help="so much of the released encoder, from 0 to 1"
    )
    parser.add_argument("--released", metavar="X", help="folder of the released encoder, or OWNER/REPO of the Hub")
    parser.add_argument("--bf16", action="store_true", help="the matrices in the file are bfloat16: half its size")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write (default: EXP_DIR/epoch-N-avg-K or iter-STEP-avg-K, and -use-averaged-model)",
    )
    args = parser.parse_args()
    by_number = args.epoch is not None or args.iter is not None
    if args.files and (by_number or args.exp_dir or args.avg is not None or args.use_averaged_model):
        parser.error("FILES go with --output alone")
    if not args.files and not (by_number and args.exp_dir):
        parser.error("give --exp-dir with --epoch or --iter, or FILES with --output")
    if args.files and not args.output:
        parser.error("FILES need --output")
    if args.released and args.released_share is None:
        parser.error("--released goes with --released-share")
    share = args.released_share or 0.0
    if not 0 <= share <= 1:
        parser.error(f"--released-share: from 0 to 1, got {share:g}")
    form = Form(not args.no_merge, args.bf16, share, args.released)
    try:
        if args.files:
            average(args.files, args.output, form)
            return
        name, kind, number = ("epoch", "epoch", args.epoch) if args.iter is None else ("iter", "checkpoint", args.iter)
        avg = 1 if args.avg is None else args.avg
        paths = checkpoints_to_average(args.exp_dir, kind, number, avg, args.use_averaged_model)
        suffix = "-use-averaged-model" if args.use_averaged_model else ""
        output = args.output or args.exp_dir / f"{name}-{number}-avg-{avg}{suffix}"
        if args.use_averaged_model:
            average_by_difference(*paths, output, form)
        else:
            average(paths, output, form)
    except (UserError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")


def average(paths: list[Path], output: Path, form: Form = Form()) -> None:
    """Write the model with the mean of the parameters in `paths`; frozen parts are as in the last."""
    print("averaging:", *paths, sep="\n  ")
    checkpoints = {path: load_checkpoint(path) for path in paths}
    write_model(average_state_dicts([c["model"] for c in checkpoints.values()]), checkpoints, output, form)


def average_by_difference(start: Path, end: Path, output: Path, form: Form) -> None:
    """Write the model with the mean of the parameters over the steps after `start` up to `end`."""
    checkpoints = {path: load_checkpoint(path) for path in (start, end)}
    for path, checkpoint in checkpoints.items():
        if "model_avg" not in checkpoint:
            raise CheckpointError(f"{path}: holds no running average (model_avg); leave out --use-averaged-model")
    print("averaging over the steps between the running averages in:")
    for path, checkpoint in checkpoints.items():
        print(f"  {path} (up to step {checkpoint['model_avg']['step']})")
    mean = average_between(*(checkpoint["model_avg"] for checkpoint in checkpoints.values()))
    # what an earlier stage has trained and this one has frozen is in no running average
    write_model({**checkpoints[end]["model"], **mean}, checkpoints, output, form)


def write_model(trained: dict[str, Tensor], checkpoints: dict[Path, dict[str, Any]], output: Path, form: Form) -> None:
    """Put what was trained on the frozen parts, and write the model.

    Raises:
      CheckpointError: the checkpoints were trained on different frozen weights, or on others than are there now.
      UserError: the folder cannot be written; there is nothing to leave unmerged.
    """
    last = list(checkpoints)[-1]
    bases = {path: checkpoint.get("base_weights", {}) for path, checkpoint in checkpoints.items()}
    for path, parts in bases.items():
        if _hashes(parts) != _hashes(bases[last]):
            raise CheckpointError(f"{path}: was trained on other base weights than {last}: {parts}, {bases[last]}")
    for part, base in bases[last].items():
        if file_hash(base["path"]) != base["sha256"]:
            raise CheckpointError(f"{base['path']}: not the {part} that {last} was trained on: its SHA-256 is another")
    config = from_dict(ModelConfig, checkpoints[last]["config"]["model"], str(last))
    languages = languages_of(checkpoints[last])
    if config.llm is None and not form.merged:
        raise UserError("--no-merge: there is no language model that has an adapter (model.llm: null): leave it out")
    model = build_model(config if languages is None else replace(config, languages=languages))
    # a checkpoint of a version before `optim.freeze` has none
    freeze_parameters(model, checkpoints[last]["config"].get("optim", {}).get("freeze", []))
    load_trained(model, trained, last)
    if form.released_share:
        released = form.released or config.encoder.path
        if not released:
            raise UserError("--released-share: the run began with no released encoder: name one by --released")
        mix_released(model.encoder, released, form.released_share, config.encoder.zipformer)
    try:
        dtype = torch.bfloat16 if form.bf16 else None
        if isinstance(model, SpeechLLM):
            model.save_pretrained(output, form.merged, dtype)
        else:
            model.save_pretrained(output, dtype)
    except (OSError, SafetensorError) as e:
        raise UserError(describe_write_error(output, e)) from e
    print(f"wrote {output}")


def _hashes(base_weights: dict[str, dict[str, str]]) -> dict[str, str]:
    return {part: base["sha256"] for part, base in base_weights.items()}


if __name__ == "__main__":
    main()
