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
import importlib.util
import logging
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import lhotse
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import speechllm
from speechllm.config import ConfigError, from_dict, load_config, override, parse_overrides, save_config, to_dict
from speechllm.data import Batch, DataConfig, SpeechLoader, build_eval_loader, build_train_loader
from speechllm.encoder import init_from_data
from speechllm.errors import UserError
from speechllm.files import describe_write_error, replaced_file
from speechllm.llm.adapters import RankAllocation
from speechllm.log import setup_logging
from speechllm.model.build import build_model
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import ModelConfig, SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer, build_scheduler, freeze_parameters
from speechllm.scoring import characters, score, transcripts
from speechllm.train.checkpoint import (
    RunningAverage,
    load_checkpoint,
    load_trained,
    newest_checkpoint,
    remove_old_checkpoints,
    rng_state,
    save_checkpoint,
    save_share,
    set_rng_state,
    trained_state_dict,
)
from speechllm.train.diagnostics import ActivationStatistics
from speechllm.train.languages import TrainedLanguages
from speechllm.train.monitor import Averages, Throughput, norms_by_part, peak_memory_gb
from speechllm.train.plot import plot_runs, read_run
from speechllm.train.sharding import (
    average_gradients,
    clip_grad_norm,
    describe_shares,
    gathered,
    load_optimizer_shares,
    optimizer_shares,
    shard_language_model,
)
from speechllm.weights import CheckpointError, file_hash, load_state_dict_strict

logger = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """`num_steps` optimiser steps in all, each over `accumulate` batches per process; no more than `num_epochs` epochs.

    Every `valid_every_n` steps the validation set is decoded, every `save_every_n` steps a checkpoint written, of which
    the last `keep_last_k` are kept, and every `save_every_n_epochs` epochs one that stays. `average_period`: steps from
    one value to the next in the running average of the weights (tools/average_ckpt.py --use-averaged-model).
    `scan_largest_batches`: the largest batches are run before the first step, so that memory runs out then if it does.
    `fsdp`: the language model is sharded over the processes, for one whose training does not fit on one GPU
    (`speechllm.train.sharding`).

    In the first `ctc_only_steps` the CTC loss alone trains (the encoder): a language model that begins with an encoder
    that hears nothing learns to ignore the audio, and takes long to unlearn it.
    """

    num_steps: int = 10000
    num_epochs: int | None = None
    ctc_only_steps: int = 0
    accumulate: int = 1
    mixed_precision: str | None = None
    seed: int = 42
    log_every_n: int = 50
    valid_every_n: int = 1000
    save_every_n: int = 1000
    save_every_n_epochs: int = 1
    keep_last_k: int = 10
    average_period: int = 200
    max_bad_steps: int = 20
    scan_largest_batches: bool = True
    fsdp: bool = False
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.mixed_precision not in (None, "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be bf16, fp16 or null, got {self.mixed_precision!r}")
        for name in (
            "num_steps", "num_epochs", "accumulate", "log_every_n", "valid_every_n", "save_every_n",
            "save_every_n_epochs", "keep_last_k", "average_period",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Config:
    """A whole experiment: one YAML file in configs/.

    `stages`: what differs in each stage of the training, in order, as `{name: {section.key: value}}`.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train.ctc_only_steps and not self.model.ctc_weight:
            raise ValueError("train.ctc_only_steps needs a CTC head: set model.ctc_weight above 0")
        if self.model.llm is None:
            for name, given in (
                ("train.ctc_only_steps", self.train.ctc_only_steps),
                ("train.fsdp", self.train.fsdp),
                ("data.max_positions", self.data.max_positions is not None),
            ):
                if given:
                    raise ValueError(f"{name} is about the language model, and model.llm is null: leave out {name}")
        spec_augment = self.data.augment.spec_augment
        if self.model.cr_ctc is not None and (spec_augment is None or spec_augment.probability == 0):
            raise ValueError(
                "model.cr_ctc compares two views of an utterance, which differ by SpecAugment: set "
                "data.augment.spec_augment, with a probability above 0"
            )
        if self.train.fsdp and self.optim.name != "adamw":
            raise ValueError(f"train.fsdp: optim.name: {self.optim.name} looks at whole tensors; use adamw")
        if self.train.fsdp and self.train.mixed_precision == "fp16":
            raise ValueError("train.fsdp: fp16's scaling of the loss is not shared between processes; use bf16")
        if self.train.fsdp and self.model.llm.tune is not None and self.model.llm.tune.method == "adalora":
            raise ValueError("train.fsdp: AdaLoRA looks at whole matrices; use another model.llm.tune.method")


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
        launch(args.world_size)
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


def launch(processes: int) -> None:
    """Run this script in so many processes, with torchrun; a SIGTERM is passed on to them."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in; 30 are few
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={processes}", *sys.argv])
    except SignalException as e:
        if e.sigval != signal.SIGTERM:
            raise
    except ChildFailedError as e:
        sys.exit(str(e))


def train_stages(args: argparse.Namespace, overrides: list[str], find_max_duration: bool) -> None:
    """Train one stage after the other, each from the result of the one before; without stages, all at once."""
    config = load_config(Config, args.config, overrides)
    options = {
        "start_from": start_checkpoint(args.start_epoch, args.start_batch),
        "find_max_duration": find_max_duration,
        "print_diagnostics": args.print_diagnostics,
    }
    if args.stage is not None and args.stage not in config.stages:
        raise ConfigError(f"--stage: {args.stage} is none of {', '.join(config.stages) or 'no stages at all'}")
    stages = {  # all of them are checked before the first begins
        name: override(
            override(load_config(Config, args.config), changes, source=f"{args.config}: stages.{name}"),
            parse_overrides(overrides),
            source="command line",
        )
        for name, changes in config.stages.items()
    }
    for (name, stage), (then, next_stage) in pairwise(stages.items()):
        check_same_projectors(args.config, f"stages.{name}", stage.model, f"stages.{then}", next_stage.model)
    stages = {name: stage for name, stage in stages.items() if args.stage in (None, name)}
    if len({stage.train.mixed_precision for stage in stages.values()}) > 1:
        raise ConfigError(f"{args.config}: stages with another train.mixed_precision; run them one by one with --stage")
    if options["start_from"] is not None and len(stages) > 1:
        raise ConfigError("--start-epoch and --start-batch are of one stage: name it with --stage")
    if not stages:
        train(config, args.exp_dir, **options)
    names = list(config.stages)
    for name, stage in stages.items():
        before = args.exp_dir / names[names.index(name) - 1] if name != names[0] else None
        if not train(stage, args.exp_dir / name, init_dir=before, **options):
            break
    PartialState().destroy_process_group()


def check_same_projectors(source: str, name: str, model: ModelConfig, then: str, next_model: ModelConfig) -> None:
    """A stage goes on with the projectors of the one before it; it may have encoders more.

    Raises:
      ConfigError: names both stages, the key and what differs.
    """
    for key, projector in model.projectors.items():
        if key not in next_model.projectors:
            raise ConfigError(f"{source}: {name} trains model.{key}, but {then} has no such encoder")
        before, after = to_dict(projector), to_dict(next_model.projectors[key])
        for field_name, value in before.items():
            if after[field_name] != value:
                raise ConfigError(
                    f"{source}: {then} has model.{key}.{field_name}: {after[field_name]}, but goes on from the "
                    f"projector of {name}, which has {value}; use one for both, or train them as two experiments"
                )


def start_checkpoint(epoch: int | None, step: int | None) -> str | None:
    """The name of the checkpoint that --start-epoch or --start-batch means."""
    if step is not None:
        return f"checkpoint-{step}.pt"
    return f"epoch-{epoch - 1}.pt" if epoch is not None and epoch > 1 else None


def train(
    config: Config,
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
    """
    # cpu: without it, several processes on a machine without GPUs would each train by themselves
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.train.mixed_precision or "no")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    setup_logging(exp_dir / "log", "log-train", rank)
    set_seed(config.train.seed, device_specific=True)
    logger.info("device: %s, processes: %d", accelerator.device, world_size)

    # ---- data and model -------------------------------------------------------------------------------------
    model = build_model(config.model)
    from_stage_before = init_from_stage(model, init_dir) if init_dir is not None else set()
    logger.info("parameters: %s", describe_parameters(model))

    check_lengths(config.data, model)
    feature_kind = model.feature_kind

    def training_data(max_duration: float) -> SpeechLoader:
        config.data.max_duration = max_duration
        return build_train_loader(
            config.data,
            config.train.seed,
            rank,
            world_size,
            labels=model,
            feature_kind=feature_kind,
            two_views=model.needs_two_views,
        )

    train_loader = training_data(config.data.max_duration)
    valid_loader = build_eval_loader(config.data, config.data.valid, rank, world_size, model, feature_kind)
    checkpoint_path = exp_dir / start_from if start_from is not None else newest_checkpoint(exp_dir)
    new_encoders = [
        encoder
        for name, section, encoder in model.encoders()
        if section.is_new_zipformer and not any(key.startswith(f"{name}.") for key in from_stage_before)
    ]
    if checkpoint_path is None and new_encoders:
        first = next(iter(train_loader)).to("cpu")
        for encoder in new_encoders:
            init_from_data(encoder, model.features_of(encoder, first.features), first.feature_lens)

    # ---- optimiser ------------------------------------------------------------------------------------------
    freeze_parameters(model, config.optim.freeze)
    # Frozen here, but trained in a stage before: not in the files that bases come from, so every checkpoint has it.
    carried = sorted({name for name, p in model.named_parameters() if not p.requires_grad} & from_stage_before)
    base_weights = frozen_base_weights(model, carried)
    if config.train.fsdp:
        shard_language_model(model, accelerator.device)
    else:
        # Every process has the frozen weights from the same files: DDP need not send them, and cannot if quantised.
        frozen_names = [name for name, p in model.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen_names)
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, config.train.num_steps)
    if config.train.fsdp:
        optimizer = accelerator.prepare_optimizer(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    ranks = RankAllocation(bare.llm, config.train.num_steps)
    sharded = describe_shares(bare, optimizer)
    # Process 0 writes the checkpoints; the others need no average, unless they have shares of their own.
    has_content = accelerator.is_main_process or sharded is not None
    average = RunningAverage(bare, config.train.average_period) if has_content else None

    # ---- resume ---------------------------------------------------------------------------------------------
    step, epoch, bad_steps = 0, 1, 0
    languages = TrainedLanguages(bare.config.languages or ())
    best = {"loss": math.inf, "wer": math.inf}
    total = Averages()
    train_loader.set_epoch(epoch)
    if checkpoint_path is not None:
        state = load_checkpoint(checkpoint_path, rank)
        if state["base_weights"] != base_weights:
            raise CheckpointError(
                f"{checkpoint_path}: was trained on other base weights: {state['base_weights']}, now {base_weights}"
            )
        if len(state["rng"]) != world_size:
            raise CheckpointError(f"{checkpoint_path}: was written by {len(state['rng'])} processes, not {world_size}")
        if (state["sharded"] is None) != (sharded is None):
            raise CheckpointError(f"{checkpoint_path}: was written {'without' if sharded else 'with'} train.fsdp")
        load_trained(bare, state["model"], checkpoint_path)
        load_optimizer_shares(optimizer, state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        ranks.load_state_dict(state["ranks"])
        if average is not None:
            average.load_state_dict(state["model_avg"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if find_max_duration:
            train_loader = training_data(state["config"]["data"]["max_duration"])
        train_loader.load_state_dict(state["loader"][rank])
        step, epoch = state["step"], state["epoch"]
        bad_steps, best = state["bad_steps"], dict(state["best"])
        languages.load_state_dict(state.get("languages", ()))  # checkpoints of earlier versions have none
        total = Averages(state["total"].clone())
        set_rng_state(state["rng"][rank])
        logger.info("resuming from %s: epoch %d, step %d of %d", checkpoint_path, epoch, step, config.train.num_steps)

    def save(*names: str) -> None:
        """Write one checkpoint under each of `names`."""
        rng, loader = gather_object([rng_state()]), gather_object([train_loader.state_dict()])
        trained_languages = languages.state_dict()
        if has_content:
            content = {
                "model": trained_state_dict(bare, also=carried),
                "model_avg": average.state_dict(),
                "optimizer": optimizer_shares(optimizer),
                "sharded": sharded,
                "scheduler": scheduler.state_dict(),
                "ranks": ranks.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "loader": loader,
                "rng": rng,
                "step": step,
                "epoch": epoch,
                "bad_steps": bad_steps,
                "best": best,
                "total": total.values,
                "languages": trained_languages,
                "base_weights": base_weights,
                "config": to_dict(config),
            }
        with failing_together():
            if sharded is not None and not accelerator.is_main_process:
                for name in names:
                    save_share(exp_dir / name, content, rank)
        with failing_together():
            if accelerator.is_main_process:
                for name in names:
                    save_checkpoint(exp_dir / name, content)
                remove_old_checkpoints(exp_dir, keep=config.train.keep_last_k)

    # ---- train ----------------------------------------------------------------------------------------------
    writer = None
    if accelerator.is_main_process:
        save_config(config, exp_dir / "config.yaml", header=provenance())
        if config.train.tensorboard:
            writer = SummaryWriter(exp_dir / "tensorboard", purge_step=step + 1)
    progress = tqdm(
        total=config.train.num_steps,
        initial=step,
        unit="step",
        disable=None if rank == 0 else True,
        smoothing=0.05,
    )
    if print_diagnostics:  # what is computed twice would be counted twice
        for _, _, encoder in bare.encoders():
            encoder.checkpoint_layers = False
        if bare.llm is not None:
            bare.llm.checkpoint_blocks = False
    stopping = StopSignal()
    model.train()
    if find_max_duration and checkpoint_path is None:
        if sharded is not None:
            raise UserError("--max-duration auto: not with train.fsdp, where one process that fails holds up all")
        if accelerator.device.type != "cuda":
            raise UserError("--max-duration auto needs a GPU: a CPU's memory does not run out with a message")
        largest = largest_that_fits(
            lambda seconds: fits_in_memory(accelerator, model, training_data(seconds)), config.data.max_seconds
        )
        train_loader = training_data(largest)
        logger.info("--max-duration auto: %g s", config.data.max_duration)
    if config.train.scan_largest_batches and step < config.train.num_steps:
        scan_largest_batches(accelerator, model, train_loader)
    throughput = Throughput()
    last_epoch = config.train.num_epochs or math.inf
    with logging_redirect_tqdm(), stopping:
        while step < config.train.num_steps and epoch <= last_epoch:
            groups = throughput.timed(groups_of(train_loader, config.train.accumulate))
            while True:
                # One optimiser step. Its loss is a mean over the label tokens of all its batches on all processes.
                batches = next(groups, [])
                # One that has fewer, as nothing of a batch was usable, ends the epoch for all.
                mine = torch.tensor([[len(batches), stopping.received]], device=accelerator.device)
                counts, told_to_stop = accelerator.gather(mine).unbind(1)
                batches, told_to_stop = batches[: int(counts.min())], bool(told_to_stop.any())
                if not batches:
                    break
                tokens = sum(len(bare.label_ids(label)) + 1 for batch in batches for label in batch.labels)
                tokens = accelerator.reduce(torch.tensor(float(tokens), device=accelerator.device)).item()
                for _, section, encoder in bare.encoders():
                    if section.is_new_zipformer:  # a released encoder has its schedules behind it
                        encoder.set_batch_count(step * section.schedule_speed)
                averages = Averages()
                for i, batch in enumerate(batches):
                    batch = batch.to(accelerator.device)
                    with (
                        accelerator.no_sync(model) if i + 1 < len(batches) else nullcontext(),
                        ActivationStatistics(model) if print_diagnostics else nullcontext() as statistics,
                    ):
                        with accelerator.autocast():
                            out = model(
                                batch.features,
                                batch.feature_lens,
                                batch.texts,
                                batch.languages,
                                batch.target_languages,
                                batch.labels,
                                batch.contexts,
                            )
                        loss = out["loss"] if step >= config.train.ctc_only_steps else out["loss"] - out["llm_loss"]
                        # DDP averages gradients over the processes; the sum is wanted.
                        accelerator.backward(loss * (world_size / tokens) + ranks.loss() / len(batches))
                    if print_diagnostics:
                        print(statistics.report())
                        return False
                    averages.add(Averages.of(out))
                    throughput.add(batch)
                    languages.add(batch)
                if accelerator.scaler is not None:
                    accelerator.unscale_gradients()
                if sharded is not None:
                    average_gradients(trainable)
                log_now = (step + 1) % config.train.log_every_n == 0
                norms = norms_by_part(bare) if log_now else {}
                grad_norm = clip_grad_norm(trainable, config.optim.max_grad_norm)
                finite = math.isfinite(grad_norm)
                if finite or accelerator.scaler is not None:  # the fp16 scaler skips by itself, and learns from it
                    optimizer.step()
                bad_steps = 0 if finite else bad_steps + 1
                if not finite:
                    ids = ", ".join(i for batch in batches for i in batch.ids)
                    logger.warning("step %d: gradient norm %s, step skipped; batch: %s", step, grad_norm, ids)
                    if bad_steps >= config.train.max_bad_steps:
                        path = exp_dir / f"bad-batch-{step}-rank{rank}.pt"
                        save_batches(path, batches)
                        raise UserError(
                            f"{bad_steps} steps in a row without a finite gradient; lower optim.lr, or look at the "
                            f"last batch (in {path}) and at --print-diagnostics. The last checkpoint is intact."
                        )
                scheduler.step_batch()
                step += 1
                if finite:
                    ranks.step(step)
                optimizer.zero_grad()
                if average is not None:
                    average.update(step)
                progress.update()

                # ---- log, validate, save ---------------------------------------------------------------------
                averages = Averages(accelerator.reduce(averages.values.float().to(accelerator.device)).double().cpu())
                total.add(averages, decay=1 - 1 / 200)
                if log_now:
                    lr = scheduler.get_last_lr()[0]
                    speed = throughput.scalars(world_size)
                    logger.info(
                        "Epoch %d, step %d, loss%s, tot_loss%s, batch size: %d, lr: %.2e, grad norm: %.2f, "
                        "%.0f audio s/s", epoch, step, averages, total, sum(len(b.ids) for b in batches), lr,
                        grad_norm, speed["audio_seconds_per_second"],
                    )  # fmt: skip
                    scalars = {
                        **averages.items(),
                        **{f"tot_{k}": v for k, v in total.items().items()},
                        "lr": lr,
                        "grad_norm": grad_norm,
                        **norms,
                        **speed,
                        "peak_memory_gb": peak_memory_gb(accelerator.device),
                    }
                    write_scalars(writer, {f"train/{k}": v for k, v in scalars.items()}, step)
                    throughput.restart()
                names = []
                done = step == config.train.num_steps
                if step % config.train.valid_every_n == 0 or done:
                    scalars, examples = validate(accelerator, model, valid_loader, config.data.text)
                    values = ", ".join(f"{name}: {value:.4g}" for name, value in scalars.items())
                    logger.info("Epoch %d, step %d, validation: %s\n%s", epoch, step, values, examples)
                    write_scalars(writer, {f"valid/{k}": v for k, v in scalars.items()}, step)
                    if writer is not None:
                        writer.add_text("valid/examples", examples.replace("\n", "  \n"), step)
                    for name in best:
                        if scalars[name] < best[name]:
                            best[name] = scalars[name]
                            names.append(f"best-valid-{name}.pt")
                    throughput.restart()
                if step % config.train.save_every_n == 0 or done or told_to_stop:
                    names.append(f"checkpoint-{step}.pt")
                if names:
                    save(*names)
                if told_to_stop:
                    logger.info("stopped by a signal at step %d; the same command goes on from here", step)
                    return False
                if done:
                    break
            if step < config.train.num_steps:
                epoch += 1
                scheduler.step_epoch()
                train_loader.set_epoch(epoch)
                if (epoch - 1) % config.train.save_every_n_epochs == 0 or epoch > last_epoch:
                    save(f"epoch-{epoch - 1}.pt")
    progress.close()
    logger.info("done: %d steps, %d epochs", step, epoch)
    if writer is not None:
        writer.close()
        plot_if_possible(exp_dir)
    return True


def init_from_stage(model: SpeechLLM | EncoderModel, init_dir: Path) -> set[str]:
    """Load what the stages before have trained, from the last checkpoint in `init_dir`.

    Returns:
      the names of the weights that were loaded.

    Raises:
      CheckpointError: there is no checkpoint, or it has weights that the model has not.
      ConfigError: it is of a model with other projectors.
    """
    path = newest_checkpoint(init_dir)
    if path is None:
        raise CheckpointError(f"{init_dir}: no checkpoint to start from; train that stage first")
    content = load_checkpoint(path)
    before = from_dict(ModelConfig, content["config"]["model"], str(path))
    check_same_projectors(str(path), "this checkpoint", before, "the stage", model.config)
    state = content["model"]
    load_state_dict_strict(model, {**model.state_dict(), **state}, path)
    model.config.languages = content.get("languages")
    logger.info("starting from %s: %d tensors", path, len(state))
    return set(state)


def check_lengths(data: DataConfig, model: SpeechLLM | EncoderModel) -> None:
    """Whether encoders and projectors fit the lengths of the utterances that are trained on.

    Raises:
      ConfigError: an encoder cannot hear the longest; all of them are shorter than a position of the language model, or
        the shortest leaves none for a label.
    """
    slowest = data.augment.slowest
    for name, section, encoder in model.encoders():
        if data.max_seconds > encoder.max_seconds * slowest:
            played = f", played {slowest:g} times as fast" if slowest != 1 else ""
            raise ConfigError(
                f"data.max_seconds: {data.max_seconds:g}{played}, is longer than the {encoder.max_seconds:g} s that "
                f"the encoder ({section.path or f'model.{name}.whisper'}) has positions for: set it to "
                f"{encoder.max_seconds * slowest:g}"
            )
    if model.llm is None:
        return
    seconds = model.seconds_per_position
    keys = ", ".join(f"model.{key}.downsample: {p.downsample}" for key, p in model.config.projectors.items())
    if seconds > data.max_seconds:
        raise ConfigError(
            f"{keys} makes one position of {seconds:g} s of audio, but no utterance is longer than "
            f"data.max_seconds: {data.max_seconds:g}"
        )
    shortest = math.ceil(data.min_seconds / seconds)
    if data.max_positions is not None and shortest + 2 > data.max_positions:
        raise ConfigError(
            f"data.max_positions: {data.max_positions} leaves no position for a label and its end of text: "
            f"with {keys} the shortest audio (data.min_seconds: {data.min_seconds:g}) takes {shortest}"
        )


def frozen_base_weights(model: SpeechLLM | EncoderModel, carried: Sequence[str]) -> dict[str, dict[str, str]]:
    """Path and hash of the files that frozen weights are from: checkpoints do not have these.

    Raises:
      ConfigError: weights are frozen that come from no file.
    """
    bases = {}
    language_model = [] if model.llm is None else [("llm", model.config.llm, model.llm)]
    for name, section, part in [*model.encoders(), *language_model]:
        frozen = [n for n, p in part.named_parameters(prefix=name) if not p.requires_grad and n not in carried]
        if frozen and section.path is None:
            raise ConfigError(f"optim.freeze: {frozen[0]} comes from no file (model.{name}.path) and no stage before")
        if frozen:
            bases[name] = {"path": section.path, "sha256": file_hash(section.path)}
    if model.llm is not None and (adapter := model.config.llm.adapter) is not None:
        bases["adapter"] = {"path": adapter, "sha256": file_hash(adapter)}
    return bases


def scan_largest_batches(accelerator: Accelerator, model: torch.nn.Module, loader: SpeechLoader) -> None:
    """Forward and backward of the largest batches: if memory is to run out, then now (as icefall's
    scan_pessimistic_batches_for_oom). Nothing of it stays: no gradient, no random number.

    Raises:
      MemoryRanOut: the message names the settings to lower.
    """
    rng = rng_state()
    for batch in loader.largest_batches():
        batch = batch.to(accelerator.device)
        try:
            with accelerator.no_sync(model):  # if one process fails, the others do not wait for it
                with accelerator.autocast():
                    out = model(
                        batch.features,
                        batch.feature_lens,
                        batch.texts,
                        batch.languages,
                        batch.target_languages,
                        batch.labels,
                        batch.contexts,
                    )
                accelerator.backward(out["loss"] / out["tokens"])
        except torch.OutOfMemoryError as e:
            raise MemoryRanOut(
                f"memory ran out with a batch of {len(batch)} rows of {batch.features.shape[1] / 100:.1f} s: lower "
                "data.max_duration (or data.max_cuts, data.max_seconds, data.max_positions), or set "
                "model.llm.checkpoint_blocks or model.encoder.checkpoint_layers"
            ) from e
        finally:
            model.zero_grad(set_to_none=True)
    set_rng_state(rng)
    logger.info("the largest batches fit: at most %.2f GB", peak_memory_gb(accelerator.device))


class MemoryRanOut(UserError):
    """A batch is too large for the device; the message names the settings to lower."""


def fits_in_memory(accelerator: Accelerator, model: torch.nn.Module, loader: SpeechLoader) -> bool:
    """Whether the largest batches fit into the memory of every process's device."""
    try:
        scan_largest_batches(accelerator, model, loader)
        fits = True
    except MemoryRanOut:
        torch.cuda.empty_cache()
        fits = False
    return all(gather_object([fits]))


def largest_that_fits(fits: Callable[[float], bool], start: float, limit: float = 20000.0) -> float:
    """The largest of `start`, 1.25 * start, ... that fits, less a tenth for what fragments and fluctuates.

    Raises:
      UserError: not even `start` does.
    """
    seconds = start
    if not fits(seconds):
        raise UserError(f"not even {start:g} s of audio fit: use a smaller model, or lower data.max_seconds")
    while 1.25 * seconds <= limit and fits(1.25 * seconds):
        seconds *= 1.25
    return float(math.floor(max(0.9 * seconds, start)))


@contextmanager
def failing_together() -> Iterator[None]:
    """If one process cannot write, all stop with its error: the others would wait for it for ever."""
    error = None
    try:
        yield
    except CheckpointError as e:
        error = e
    if failures := [e for e in gather_object([error]) if e is not None]:
        raise failures[0]


class StopSignal:
    """Inside a `with`, notes SIGTERM (a job that is preempted or runs out of its time) instead of dying of it."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: object) -> None:
        self.received = True


def save_batches(path: Path, batches: list[Batch]) -> None:
    with replaced_file(path) as tmp:
        torch.save([asdict(batch.to("cpu")) for batch in batches], tmp)


def validate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Batch], text_steps: Sequence[str]
) -> tuple[dict[str, float], str]:
    """Loss, WER and CER (percent) of the validation set, and five transcripts beside their references; each process has
    its share of the batches."""
    bare = accelerator.unwrap_model(model)
    model.eval()
    averages, results, ctc_results = Averages(), [], []
    with torch.no_grad(), accelerator.autocast(), gathered(bare):
        for batch in loader:
            batch = batch.to(accelerator.device)
            inputs = batch.features, batch.feature_lens
            prompt = batch.languages, batch.target_languages
            out = bare(*inputs, batch.texts, *prompt, batch.labels, batch.contexts)
            found = bare.recognise(*inputs, *prompt, contexts=batch.contexts)
            averages.add(Averages.of(out))
            results += transcripts(batch, [r.text for r in found], text_steps)
            ctc_results += transcripts(batch, [r.ctc_text for r in found], text_steps)
    model.train()
    averages = Averages(accelerator.reduce(averages.values.float().to(accelerator.device)).double().cpu())
    results = sorted(gather_object(results), key=lambda result: result.id)
    scalars = {**averages.items(), "wer": 100 * score(results).rate, "cer": 100 * score(results, characters).rate}
    if ctc_results := gather_object(ctc_results):
        scalars["ctc_wer"] = 100 * score(ctc_results).rate
    shown = results[:: max(1, len(results) // 5)][:5]
    return scalars, "\n".join(f"{result.id}:\n  ref: {result.ref}\n  hyp: {result.hyp}" for result in shown)


def groups_of(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; what is left over at the end of an epoch makes a shorter one."""
    iterator = iter(loader)
    while group := list(islice(iterator, size)):
        yield group


def write_scalars(writer: SummaryWriter | None, scalars: dict[str, float], step: int) -> None:
    if writer is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)


def plot_if_possible(exp_dir: Path) -> None:
    """EXP_DIR/plot.png, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        plot_runs([read_run(exp_dir)], exp_dir / "plot.png")


def describe_parameters(model: SpeechLLM | EncoderModel) -> str:
    """`encoder 1.2 M, projector 0.05 M (frozen), ...`"""
    parts = []
    for name, part in model.named_children():
        count = sum(p.numel() for p in part.parameters())
        if not count:
            continue
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        note = "" if trained == count else " (frozen)" if trained == 0 else f" ({trained / 1e6:.2f} M trained)"
        parts.append(f"{name} {count / 1e6:.2f} M{note}")
    return ", ".join(parts)


def provenance() -> str:
    """What was run, for the head of config.yaml."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    revision = git.stdout.strip() or "no git"
    return (
        f"{shlex.join(sys.argv)}\nspeechllm {speechllm.__version__} ({revision}), torch {torch.__version__}, "
        f"lhotse {lhotse.__version__}, python {platform.python_version()}, {os.cpu_count()} CPUs"
    )


if __name__ == "__main__":
    main()
