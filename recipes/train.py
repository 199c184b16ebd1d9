#!/usr/bin/env python3
"""Train a SpeechLLM, or an encoder alone: the training loop of every recipe, to be read from top to bottom.

    python recipes/train.py --config configs/digits.yaml --exp-dir recipes/digits/exp [--section.key value ...]
    python recipes/train.py --world-size 8 ...                      # data parallel; or torchrun, accelerate launch

A run that was stopped, at whatever moment, goes on from the newest checkpoint in --exp-dir when the same command
is given again. SIGTERM saves first. The folder receives, as in icefall: epoch-N.pt, checkpoint-STEP.pt,
best-valid-loss.pt, best-valid-wer.pt, log/, tensorboard/, and config.yaml (what was run).

Without a language model (`model.llm: null`) the encoder is trained by CTC, CR-CTC or a transducer (`model.ctc_weight`,
`cr_ctc`, `transducer`).

A configuration with `stages` is trained stage by stage, each in a folder of its name in --exp-dir, each from what the
last one has trained.
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.contrib.logging import logging_redirect_tqdm

from speechllm.config import ConfigError, save_config, to_dict
from speechllm.data import Batch
from speechllm.errors import UserError
from speechllm.files import describe_write_error
from speechllm.llm.adapters import RankAllocation
from speechllm.log import setup_logging
from speechllm.model.build import build_model
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import build_optimizer, build_scheduler, freeze_parameters
from speechllm.train.build import init_new_encoders, training_data, validation_data
from speechllm.train.checkpoint import RunningAverage, load_checkpoint, newest_checkpoint
from speechllm.train.config import Experiment, load_experiment
from speechllm.train.diagnostics import statistics_of
from speechllm.train.encoder_cache import use_encoder_cache
from speechllm.train.languages import TrainedLanguages
from speechllm.train.monitor import Averages, RunLog, describe_parameters, norms_by_part, provenance
from speechllm.train.plot import plot_if_possible
from speechllm.train.preflight import (
    check_lengths,
    check_precision,
    frozen_base_weights,
    largest_max_duration,
    scan_largest_batches,
)
from speechllm.train.processes import StopSignal, batch_groups, launch
from speechllm.train.sharding import average_gradients, clip_grad_norm, shard_language_model
from speechllm.train.stages import init_from_stage, stages_of, start_checkpoint
from speechllm.train.state import build_state
from speechllm.train.validation import validate

logger = logging.getLogger(__name__)


Config = Experiment  # its name in earlier versions

# icefall's names of settings, for those who have them in their fingers.
SHORT_OPTIONS = {
    "--num-epochs": "train.num_epochs",
    "--max-duration": "data.max_duration",
    "--base-lr": "optim.lr",
    "--seed": "train.seed",
    "--keep-last-k": "train.keep_last_k",
    "--save-every-n": "train.save_every_n",
    "--tensorboard": "train.tensorboard",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="experiment configuration (YAML)")
    parser.add_argument("--exp-dir", required=True, type=Path, help="folder for checkpoints, logs and results")
    parser.add_argument("--world-size", type=int, default=1, help="processes on this machine, one per GPU")
    parser.add_argument("--start-epoch", type=int, metavar="N", help="go on from epoch-(N-1).pt, not the newest")
    parser.add_argument("--start-batch", type=int, metavar="STEP", help="go on from checkpoint-STEP.pt")
    parser.add_argument("--stage", help="train only this one of the configuration's stages")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--use-bf16", action="store_true", help="the same as --train.mixed_precision bf16")
    precision.add_argument("--use-fp16", action="store_true", help="the same as --train.mixed_precision fp16")
    for name, key in SHORT_OPTIONS.items():
        note = "; auto: the largest that fits into the GPU's memory" if name == "--max-duration" else ""
        parser.add_argument(name, metavar="VALUE", help=f"the same as --{key}{note}")
    parser.add_argument(
        "--print-diagnostics",
        action="store_true",
        help="print statistics of activations, gradients and parameters over the first batch, and stop",
    )
    args, overrides = parser.parse_known_args()
    if torch.cuda.is_available() and args.world_size > torch.cuda.device_count():
        sys.exit(f"error: --world-size {args.world_size}: this machine has {torch.cuda.device_count()} GPUs")
    if args.world_size > 1 and "LOCAL_RANK" not in os.environ:
        launch(args.world_size, sys.argv)
        return
    find_max_duration = args.max_duration == "auto"
    if find_max_duration:
        args.max_duration = None
    for name, key in SHORT_OPTIONS.items():
        value = getattr(args, name[2:].replace("-", "_"))
        overrides += [f"--{key}", value] if value is not None else []
    if args.use_bf16 or args.use_fp16:
        overrides += ["--train.mixed_precision", "bf16" if args.use_bf16 else "fp16"]
    try:
        train_stages(args, overrides, find_max_duration)
    except (UserError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    except OSError as e:  # no room, or no right to write: of logs too, whose writers do not tell the file
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        sys.exit(f"error: {describe_write_error(e.filename or args.exp_dir, e)}")


def train_stages(args: argparse.Namespace, overrides: list[str], find_max_duration: bool) -> None:
    """Train one stage after the other, each from the result of the one before; without stages, all at once."""
    config = load_experiment(args.config, overrides)
    stages = stages_of(args.config, config, overrides)
    names = list(stages)
    if args.stage is not None and args.stage not in stages:
        raise ConfigError(f"--stage: {args.stage} is none of {', '.join(stages) or 'no stages at all'}")
    stages = {name: stage for name, stage in stages.items() if args.stage in (None, name)}
    if len({stage.train.mixed_precision for stage in stages.values()}) > 1:
        raise ConfigError(f"{args.config}: stages with another train.mixed_precision; run them one by one with --stage")
    start_from = start_checkpoint(args.start_epoch, args.start_batch)
    if start_from is not None and len(stages) > 1:
        raise ConfigError("--start-epoch and --start-batch are of one stage: name it with --stage")
    options = {
        "start_from": start_from,
        "find_max_duration": find_max_duration,
        "print_diagnostics": args.print_diagnostics,
    }
    if not stages:
        train(config, args.exp_dir, **options)
    for name, stage in stages.items():
        before = args.exp_dir / names[names.index(name) - 1] if name != names[0] else None
        if not train(stage, args.exp_dir / name, init_dir=before, **options):
            break
    PartialState().destroy_process_group()


def train(
    config: Experiment,
    exp_dir: Path,
    init_dir: Path | None = None,
    start_from: str | None = None,
    find_max_duration: bool = False,
    print_diagnostics: bool = False,
) -> bool:
    """Train one model.

    Args:
      init_dir: the folder of the stage before, whose last weights this one begins with.
      start_from: the name of a checkpoint in `exp_dir`; None for the newest.
      find_max_duration: instead of `data.max_duration`, the largest that fits; found once for a run.
      print_diagnostics: print statistics of the first batch, and stop.

    Returns:
      whether it came to its end; False if it was stopped.
    """
    # cpu: without it, several processes on a machine without GPUs would each train by themselves
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.train.mixed_precision or "no")
    setup_logging(exp_dir / "log", "log-train", accelerator.process_index)
    set_seed(config.train.seed, device_specific=True)
    logger.info("device: %s, processes: %d", accelerator.device, accelerator.num_processes)

    # ---- build: the model, its data, its optimizer ----------------------------------------------------------
    bare = build_model(config.model)
    from_stage_before = init_from_stage(bare, init_dir) if init_dir is not None else set()
    logger.info("parameters: %s", describe_parameters(bare))
    check_lengths(config.data, bare)
    check_precision(config.train.mixed_precision, bare)
    data_as_given = config.data
    if config.data.cache_encoder is not None:
        with accelerator.main_process_first():
            config = replace(config, data=use_encoder_cache(config.data, bare))
    checkpoint = exp_dir / start_from if start_from is not None else newest_checkpoint(exp_dir)
    if find_max_duration and checkpoint is not None:  # it was found when the run began
        found = load_checkpoint(checkpoint)["config"]["data"]["max_duration"]
        config = replace(config, data=replace(config.data, max_duration=found))
    train_loader = training_data(config.data, config.train.seed, bare, accelerator)
    valid_loader = validation_data(config.data, bare, accelerator)
    if checkpoint is None:
        init_new_encoders(bare, train_loader, loaded=from_stage_before)

    freeze_parameters(bare, config.optim.freeze)
    # Frozen here, but trained in a stage before: not in the files that bases come from, so every checkpoint has it.
    carried = sorted({name for name, p in bare.named_parameters() if not p.requires_grad} & from_stage_before)
    base_weights = frozen_base_weights(bare, carried)
    model, optimizer = distribute(accelerator, bare, config)
    scheduler = build_scheduler(optimizer, config.optim, config.train.num_steps)
    ranks = RankAllocation(bare.llm, config.train.num_steps)
    # Process 0 writes the checkpoints; the others need no average, unless they have shares of their own.
    averages_here = accelerator.is_main_process or config.train.fsdp
    average = RunningAverage(bare, config.train.average_period) if averages_here else None

    # ---- check before training, and go on from a checkpoint -------------------------------------------------
    if find_max_duration and checkpoint is None:
        model.train()
        longest = largest_max_duration(
            accelerator,
            model,
            lambda data: training_data(data, config.train.seed, bare, accelerator),
            config.data,
        )
        config = replace(config, data=replace(config.data, max_duration=longest))
        train_loader = training_data(config.data, config.train.seed, bare, accelerator)
    train_loader.set_epoch(1)
    # What is saved has the audio in it, not what is kept of a frozen encoder: the model that is decoded hears.
    saved_config = replace(config, data=replace(data_as_given, max_duration=config.data.max_duration))
    parts = {"model_avg": average, "scheduler": scheduler, "ranks": ranks}
    languages = TrainedLanguages(bare.config.languages or ())
    state = build_state(
        accelerator,
        bare,
        optimizer,
        parts,
        train_loader,
        languages,
        carried,
        base_weights,
        config=to_dict(saved_config),
    )
    if checkpoint is not None:
        state.load(checkpoint)
    if accelerator.is_main_process:
        save_config(saved_config, exp_dir / "config.yaml", header=provenance())
    model.train()
    num_steps, last_epoch = config.train.num_steps, config.train.num_epochs or math.inf
    if config.train.scan_largest_batches and state.step < num_steps:
        scan_largest_batches(accelerator, model, train_loader)
    if print_diagnostics:
        print(statistics_of(accelerator, model, next(iter(train_loader))))
        return False

    # ---- train ----------------------------------------------------------------------------------------------
    log = RunLog(accelerator, exp_dir, num_steps, state.step, config.train.tensorboard)
    with logging_redirect_tqdm(), StopSignal() as stopping:
        while state.step < num_steps and state.epoch <= last_epoch:
            loader = log.throughput.timed(train_loader)
            for batches, told_to_stop in batch_groups(accelerator, loader, config.train.accumulate, stopping):
                for _, section, encoder in bare.encoders():
                    if section.is_new_zipformer:  # a released encoder has its schedules behind it
                        encoder.set_batch_count(state.step * section.schedule_speed)
                log_now = (state.step + 1) % config.train.log_every_n == 0
                result = train_step(
                    accelerator,
                    model,
                    optimizer,
                    batches,
                    max_grad_norm=config.optim.max_grad_norm,
                    ctc_only=state.step < config.train.ctc_only_steps,
                    extra_loss=ranks.loss,
                    with_norms=log_now,
                )
                state.check_gradient(result.grad_norm, batches, config.train.max_bad_steps, exp_dir)
                scheduler.step_batch()
                state.step += 1
                if result.finite:
                    ranks.step(state.step)
                optimizer.zero_grad()
                if average is not None:
                    average.update(state.step)
                state.total.add(result.losses, decay=1 - 1 / 200)
                log.advance(batches)
                languages.add(batches)
                if log_now:
                    rows = sum(len(batch.ids) for batch in batches)
                    lr = scheduler.get_last_lr()[0]
                    scalars = {"lr": lr, "grad_norm": result.grad_norm, **result.norms}
                    log.training(state.epoch, state.step, result.losses, state.total, rows, scalars)

                names = []
                done = state.step == num_steps
                if state.step % config.train.valid_every_n == 0 or done:
                    scalars, examples = validate(accelerator, model, valid_loader, config.data.text)
                    log.validation(state.epoch, state.step, scalars, examples)
                    names += [f"best-valid-{name}.pt" for name in state.improved(scalars)]
                if state.step % config.train.save_every_n == 0 or done or told_to_stop:
                    names.append(f"checkpoint-{state.step}.pt")
                if names:
                    state.save(exp_dir, names, keep=config.train.keep_last_k)
                if told_to_stop:
                    logger.info("stopped by a signal at step %d; the same command goes on from here", state.step)
                    return False
                if done:
                    break
            if state.step < num_steps:
                state.epoch += 1
                scheduler.step_epoch()
                train_loader.set_epoch(state.epoch)
                if (state.epoch - 1) % config.train.save_every_n_epochs == 0 or state.epoch > last_epoch:
                    state.save(exp_dir, [f"epoch-{state.epoch - 1}.pt"], keep=config.train.keep_last_k)
    log.close()
    logger.info("done: %d steps, %d epochs", state.step, state.epoch)
    if accelerator.is_main_process and config.train.tensorboard:
        plot_if_possible(exp_dir)
    return True


def distribute(
    accelerator: Accelerator, model: SpeechLLM | EncoderModel, config: Experiment
) -> tuple[torch.nn.Module, Optimizer]:
    """The model on its device, for all processes as one (DDP, or with `train.fsdp` FSDP2), and its optimizer."""
    if config.train.fsdp:
        shard_language_model(model, accelerator.device)
        return model, accelerator.prepare_optimizer(build_optimizer(model, config.optim))
    # Every process has the frozen weights from the same files: DDP need not send them, and cannot if quantized.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return accelerator.prepare(model, build_optimizer(model, config.optim))


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to: sums over the batches of all processes; the norm of the gradient before it was
    clipped; norms by part of the model, if they were asked for."""

    losses: Averages
    grad_norm: float
    norms: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    max_grad_norm: float,
    ctc_only: bool = False,
    extra_loss: Callable[[], Tensor | float] = lambda: 0.0,
    with_norms: bool = False,
    note: Callable[[str], None] = lambda part: None,
) -> StepResult:
    """One optimizer step; its loss is a mean over the label tokens of all its batches on all processes. With a gradient
    that is not finite no step is taken. The gradients stay until the caller sets them to zero.

    Args:
      ctc_only: leave the language model's loss out.
      extra_loss: a term that is added to the mean.
      batches: of this process, on its device.
      note: called after what it names: `labels` (counted), `forward`, `backward`, `losses`, `step`.
    """
    bare = accelerator.unwrap_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens = sum(bare.num_label_tokens(batch.labels, batch.feature_lens, batch.chunk_seconds) for batch in batches)
    tokens = accelerator.reduce(torch.tensor(float(tokens), device=accelerator.device)).item()
    note("labels")
    losses = Averages()
    for i, batch in enumerate(batches):
        with accelerator.no_sync(model) if i + 1 < len(batches) else nullcontext():
            with accelerator.autocast():
                out = model(*batch.inputs)
            note("forward")
            loss = out["loss"] - out["llm_loss"] if ctc_only else out["loss"]
            # DDP averages gradients over the processes; the sum is wanted.
            accelerator.backward(loss * (accelerator.num_processes / tokens) + extra_loss() / len(batches))
        note("backward")
        losses.add(Averages.of(out))
    if accelerator.scaler is not None:
        accelerator.unscale_gradients()
    if isinstance(bare, FSDPModule):
        average_gradients(trained)
    norms = norms_by_part(bare) if with_norms else {}
    losses = Averages(accelerator.reduce(losses.values.float().to(accelerator.device)).double().cpu())
    note("losses")
    grad_norm = clip_grad_norm(trained, max_grad_norm)
    if math.isfinite(grad_norm) or accelerator.scaler is not None:  # fp16's scaler skips by itself, and learns from it
        optimizer.step()
    note("step")
    return StepResult(losses, grad_norm, norms)


if __name__ == "__main__":
    main()
