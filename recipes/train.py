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
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.contrib.logging import logging_redirect_tqdm

from speechllm.config import save_config
from speechllm.data import Batch, SpeechLoader
from speechllm.errors import UserError
from speechllm.files import describe_write_error
from speechllm.log import setup_logging
from speechllm.model.build import build_model
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import build_optimizer, freeze_parameters
from speechllm.train import preflight
from speechllm.train.build import init_new_encoders, schedule_new_encoders, training_data, validation_data
from speechllm.train.checkpoint import load_checkpoint, newest_checkpoint
from speechllm.train.config import Experiment
from speechllm.train.diagnostics import statistics_of
from speechllm.train.encoder_cache import use_encoder_cache
from speechllm.train.monitor import Averages, RunLog, StepResult, describe_parameters, norms_by_part, provenance
from speechllm.train.objective import Objective, build_objective, model_losses
from speechllm.train.plot import plot_if_possible
from speechllm.train.processes import StopSignal, batch_groups, launch
from speechllm.train.sharding import average_gradients, clip_grad_norm, shard_language_model
from speechllm.train.stages import init_weights, plan_stages, start_checkpoint
from speechllm.train.state import TrainState
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
    "--report-to": "train.report_to",
    "--profile": "train.profile",
}
PRECISION = "train.mixed_precision"


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
    about = "folder of a model, or of a training, whose weights the (first) stage begins with"
    parser.add_argument("--init-from", metavar="FOLDER", help=about)
    for name, key in SHORT_OPTIONS.items():
        note = "; auto: the largest that fits into the GPU's memory" if name == "--max-duration" else ""
        parser.add_argument(name, dest=key, metavar="VALUE", help=f"the same as --{key}{note}")
    precision = parser.add_mutually_exclusive_group()
    for name in ("bf16", "fp16"):
        note = f"the same as --train.mixed_precision {name}"
        precision.add_argument(f"--use-{name}", dest=PRECISION, action="store_const", const=name, help=note)
    about = "print statistics of activations, gradients and parameters over the first batch, and stop"
    parser.add_argument("--print-diagnostics", action="store_true", help=about)
    args, overrides = parser.parse_known_args()
    if torch.cuda.is_available() and args.world_size > torch.cuda.device_count():
        sys.exit(f"error: --world-size {args.world_size}: this machine has {torch.cuda.device_count()} GPUs")
    if args.world_size > 1 and "LOCAL_RANK" not in os.environ:
        launch(args.world_size, sys.argv)
        return
    options = {key: getattr(args, key) for key in (*SHORT_OPTIONS.values(), PRECISION)}
    find_max_duration = options["data.max_duration"] == "auto"
    if find_max_duration:
        del options["data.max_duration"]
    overrides += [word for key, value in options.items() if value is not None for word in (f"--{key}", value)]
    start_from = start_checkpoint(args.start_epoch, args.start_batch)
    try:
        for stage in plan_stages(args.config, overrides, args.exp_dir, args.stage, start_from, args.init_from):
            folders = stage.exp_dir, stage.init_from
            if not train(stage.config, *folders, start_from, find_max_duration, args.print_diagnostics):
                break
    except (UserError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    except OSError as e:  # no room, or no right to write: of logs too, whose writers do not tell the file
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        sys.exit(f"error: {describe_write_error(e.filename or args.exp_dir, e)}")
    PartialState().destroy_process_group()


def train(
    config: Experiment,
    exp_dir: Path,
    init_from: str | Path | None = None,
    start_from: str | None = None,
    find_max_duration: bool = False,
    print_diagnostics: bool = False,
) -> bool:
    """Train one model: build it, go on from a checkpoint, check that its batches fit into memory, train.

    Args:
      init_from: a folder whose weights this training begins with, such as that of the stage before (`init_weights`).
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

    checkpoint = exp_dir / start_from if start_from is not None else newest_checkpoint(exp_dir)
    config, model, valid_loader, state = build(accelerator, config, init_from, checkpoint, find_max_duration)
    if checkpoint is not None:
        state.load(checkpoint)
    if accelerator.is_main_process:
        save_config(config, exp_dir / "config.yaml", header=provenance())
    model.train()
    if config.train.scan_largest_batches and state.step < config.train.num_steps:
        preflight.scan_largest_batches(accelerator, model, state.loader, build_objective(config))
    if print_diagnostics:
        print(statistics_of(accelerator, model, next(iter(state.loader)).to(accelerator.device)))
        return False
    if not train_epochs(accelerator, config, exp_dir, model, valid_loader, state):
        return False
    logger.info("done: %d steps, %d epochs", state.step, state.epoch)
    if accelerator.is_main_process and "tensorboard" in config.train.trackers:
        plot_if_possible(exp_dir)
    return True


def build(
    accelerator: Accelerator,
    config: Experiment,
    init_from: str | Path | None,
    checkpoint: Path | None,
    find_max_duration: bool,
) -> tuple[Experiment, torch.nn.Module, SpeechLoader, TrainState]:
    """The configuration as it is saved, the model, the validation data, and all that goes on from `checkpoint`."""
    bare = build_model(config.model)
    from_stage_before = init_weights(bare, init_from) if init_from is not None else set()
    logger.info("parameters: %s", describe_parameters(bare))
    preflight.check_lengths(config.data, bare)
    preflight.check_precision(config.train.mixed_precision, bare)

    data = config.data
    if find_max_duration and checkpoint is not None:  # it was found when the run began
        data = replace(data, max_duration=load_checkpoint(checkpoint)["config"]["data"]["max_duration"])
    if data.cache_encoder is not None:
        with accelerator.main_process_first():
            data = use_encoder_cache(data, bare)
    train_loader = training_data(data, config.train.seed, bare, accelerator)
    valid_loader = validation_data(data, bare, accelerator)
    if checkpoint is None:
        init_new_encoders(bare, train_loader, loaded=from_stage_before)

    freeze_parameters(bare, config.optim.freeze)
    base_weights = preflight.frozen_base_weights(bare, from_stage_before)
    model, optimizer = distribute(accelerator, bare, config)
    if find_max_duration and checkpoint is None:
        model.train()
        seconds = preflight.largest_max_duration(accelerator, model, data, config.train.seed, build_objective(config))
        data = replace(data, max_duration=seconds)
        train_loader = training_data(data, config.train.seed, bare, accelerator)
    train_loader.set_epoch(1)
    # What is saved has the audio in it, not what is kept of a frozen encoder: the model that is decoded hears.
    config = replace(config, data=replace(config.data, max_duration=data.max_duration))
    state = TrainState(accelerator, bare, optimizer, train_loader, config, from_stage_before, base_weights)
    return config, model, valid_loader, state


def train_epochs(
    accelerator: Accelerator,
    experiment: Experiment,
    exp_dir: Path,
    model: torch.nn.Module,
    valid_loader: SpeechLoader,
    state: TrainState,
) -> bool:
    """The loop: steps, epochs, validation and checkpoints. False if a signal stopped it."""
    config = experiment.train
    num_steps, last_epoch = config.num_steps, config.num_epochs or math.inf
    objective = build_objective(experiment)
    log = RunLog(accelerator, exp_dir, state.step, experiment)
    with logging_redirect_tqdm(), StopSignal() as stopping, closing(log):
        while state.step < num_steps and state.epoch <= last_epoch:
            loader = log.throughput.timed(state.loader)
            for batches, told_to_stop in batch_groups(accelerator, loader, config.accumulate, stopping):
                schedule_new_encoders(accelerator.unwrap_model(model), state.step)
                log_now = (state.step + 1) % config.log_every_n == 0
                with log.watching(state.step + 1):
                    result = train_step(
                        accelerator, model, state.optimizer, batches, experiment.optim.max_grad_norm,
                        state.step < config.ctc_only_steps, objective, state.ranks.loss, with_norms=log_now,
                    )  # fmt: skip
                state.check_gradient(result.grad_norm, batches, config.max_bad_steps, exp_dir)
                state.scheduler.step_batch()
                state.step += 1
                if result.finite:
                    state.ranks.step(state.step)
                state.optimizer.zero_grad()
                if state.average is not None:
                    state.average.update(state.step)
                state.total.add(result.losses, decay=1 - 1 / 200)
                log.advance(batches, result.losses)
                state.languages.add(batches)
                if log_now:
                    scalars = {"lr": state.scheduler.get_last_lr()[0], "grad_norm": result.grad_norm, **result.norms}
                    log.training(state.epoch, state.step, result.losses, state.total, batches, scalars)

                names = []
                done = state.step == num_steps
                if state.step % config.valid_every_n == 0 or done:
                    scalars, examples = validate(
                        accelerator, model, valid_loader, experiment.data.text, state.step <= config.ctc_only_steps
                    )
                    log.validation(state.epoch, state.step, scalars, examples)
                    names += [f"best-valid-{name}.pt" for name in state.improved(scalars)]
                if state.step % config.save_every_n == 0 or done or told_to_stop:
                    names.append(f"checkpoint-{state.step}.pt")
                if names:
                    state.save(exp_dir, names, keep=config.keep_last_k)
                if told_to_stop:
                    logger.info("stopped by a signal at step %d; the same command goes on from here", state.step)
                    return False
                if done:
                    return True
            state.epoch += 1
            state.scheduler.step_epoch()
            state.loader.set_epoch(state.epoch)
            if (state.epoch - 1) % config.save_every_n_epochs == 0 or state.epoch > last_epoch:
                state.save(exp_dir, [f"epoch-{state.epoch - 1}.pt"], keep=config.keep_last_k)
    return True


def distribute(
    accelerator: Accelerator, model: SpeechLLM | EncoderModel, config: Experiment
) -> tuple[torch.nn.Module, Optimizer]:
    """The model on its device, for all processes as one (DDP, or with `train.fsdp` FSDP2), and its optimizer."""
    if config.train.fsdp and isinstance(model, SpeechLLM):
        shard_language_model(model, accelerator.device)
        return model, accelerator.prepare_optimizer(build_optimizer(model, config.optim))
    # Every process has the frozen weights from the same files: DDP need not send them, and cannot if quantized.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return accelerator.prepare(model, build_optimizer(model, config.optim))


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    max_grad_norm: float,
    ctc_only: bool = False,
    objective: Objective = model_losses,
    extra_loss: Callable[[], Tensor | float] = lambda: 0.0,
    with_norms: bool = False,
    note: Callable[[str], None] = lambda part: None,
) -> StepResult:
    """One optimizer step; its loss is a mean over the label tokens of all its batches on all processes. With a gradient
    that is not finite no step is taken. The gradients stay until the caller sets them to zero.

    Args:
      ctc_only: leave the language model's loss out.
      objective: gives the losses of a batch; that of `train.loss`.
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
            out = objective(accelerator, model, batch)
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
