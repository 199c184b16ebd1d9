#!/usr/bin/env python3
"""Train a SpeechLLM: the training loop of every recipe, to be read from top to bottom.

    python recipes/train.py --config configs/digits.yaml --exp-dir recipes/digits/exp [--section.key value ...]
    accelerate launch --num_processes 8 recipes/train.py ...        # data parallel

A run that was stopped, at whatever moment, goes on from the newest checkpoint in --exp-dir when the same command
is given again. The folder receives, as in icefall: epoch-N.pt, checkpoint-STEP.pt, best-valid-loss.pt, log/,
tensorboard/, and config.yaml (what was run).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import lhotse
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import speechllm
from speechllm.checkpoint import (
    CheckpointError,
    file_hash,
    load_checkpoint,
    load_trained,
    newest_checkpoint,
    remove_old_checkpoints,
    rng_state,
    save_checkpoint,
    set_rng_state,
    trained_state_dict,
)
from speechllm.config import load_config, save_config, to_dict
from speechllm.data import Batch, DataConfig, build_eval_loader, build_train_loader
from speechllm.encoder import init_from_data
from speechllm.errors import UserError
from speechllm.log import setup_logging
from speechllm.model import ModelConfig, SpeechLLM
from speechllm.optim import OptimConfig, build_optimizer, build_scheduler
from speechllm.rwkv7 import RankAllocation
from speechllm.scoring import score, transcripts

logger = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """`num_steps` optimiser steps in all, each over `accumulate` batches per process.

    In the first `ctc_only_steps` the CTC loss alone trains (the encoder): a language model that begins with an encoder
    that hears nothing learns to ignore the audio, and takes long to unlearn it.
    """

    num_steps: int = 10000
    ctc_only_steps: int = 0
    accumulate: int = 1
    mixed_precision: str = "no"
    seed: int = 42
    log_every_n: int = 50
    valid_every_n: int = 1000
    save_every_n: int = 1000
    keep_last_k: int = 10
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}")
        for name in ("num_steps", "accumulate", "log_every_n", "valid_every_n", "save_every_n", "keep_last_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Config:
    """A whole experiment: one YAML file in configs/."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.train.ctc_only_steps and not self.model.ctc_weight:
            raise ValueError("train.ctc_only_steps needs a CTC head: set model.ctc_weight above 0")


class Averages:
    """Sums over batches, shown as icefall does: `loss[loss=0.51, ctc=0.3, acc=0.9]`."""

    def __init__(self, values: torch.Tensor | None = None) -> None:
        # loss, llm_loss, ctc_loss, tokens, correct: sums over tokens
        self.values = torch.zeros(5, dtype=torch.float64) if values is None else values

    def add(self, other: Averages, decay: float = 1.0) -> None:
        self.values = self.values * decay + other.values

    def items(self) -> dict[str, float]:
        loss, llm, ctc, tokens, correct = self.values.tolist()
        n = max(tokens, 1.0)
        return {"loss": loss / n, "llm_loss": llm / n, "ctc_loss": ctc / n, "token_accuracy": correct / n}

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.items().items())
        return f"[{values}, over {self.values[3]:.0f} tokens]"


class Throughput:
    """How much audio was trained on since the last `restart`, and how much of it was padding."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()
        self.audio_seconds = self.frames = self.padded_frames = 0.0

    def add(self, batch: Batch) -> None:
        frames = batch.features.shape[0] * batch.features.shape[1]
        self.audio_seconds += batch.audio_seconds
        self.frames += frames
        self.padded_frames += batch.padding_share * frames

    @property
    def audio_seconds_per_second(self) -> float:
        return self.audio_seconds / (time.perf_counter() - self.since)

    @property
    def padding_share(self) -> float:
        return self.padded_frames / max(self.frames, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="experiment configuration (YAML)")
    parser.add_argument("--exp-dir", required=True, type=Path, help="folder for checkpoints, logs and results")
    args, overrides = parser.parse_known_args()
    try:
        train(load_config(Config, args.config, overrides), args.exp_dir)
    except (UserError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")


def train(config: Config, exp_dir: Path) -> None:
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    setup_logging(exp_dir / "log", "log-train", rank)
    set_seed(config.train.seed, device_specific=True)
    logger.info("device: %s, processes: %d", accelerator.device, world_size)

    # ---- data and model -------------------------------------------------------------------------------------
    model = SpeechLLM.from_config(config.model)
    logger.info("parameters: %s", describe_parameters(model))
    train_loader = build_train_loader(config.data, config.train.seed, rank, world_size, labels=model)
    valid_loader = build_eval_loader(config.data, config.data.valid, rank, world_size)
    checkpoint_path = newest_checkpoint(exp_dir)
    if checkpoint_path is None and config.model.encoder.path is None:
        first = next(iter(train_loader)).to("cpu")
        init_from_data(model.encoder, first.features, first.feature_lens)
    frozen_bases = {}
    if config.model.encoder.freeze:
        frozen_bases["encoder"] = config.model.encoder.path
    if config.model.llm.freezes_base:
        frozen_bases["llm"] = config.model.llm.path
    base_weights = {name: {"path": path, "sha256": file_hash(path)} for name, path in frozen_bases.items()}

    # ---- optimiser ------------------------------------------------------------------------------------------
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, config.train.num_steps)
    # Every process has loaded the frozen weights from the same files: DDP need not send them, and cannot if quantised.
    frozen_names = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen_names)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    ranks = RankAllocation(bare.llm, config.train.num_steps)

    # ---- resume ---------------------------------------------------------------------------------------------
    step, epoch, bad_steps, best_valid_loss = 0, 1, 0, math.inf
    total = Averages()
    train_loader.set_epoch(epoch)
    if checkpoint_path is not None:
        state = load_checkpoint(checkpoint_path)
        if state["base_weights"] != base_weights:
            raise CheckpointError(
                f"{checkpoint_path}: was trained on other base weights: {state['base_weights']}, now {base_weights}"
            )
        if len(state["rng"]) != world_size:
            raise CheckpointError(f"{checkpoint_path}: was written by {len(state['rng'])} processes, not {world_size}")
        load_trained(bare, state["model"], checkpoint_path)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        ranks.load_state_dict(state["ranks"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        train_loader.load_state_dict(state["loader"])
        step, epoch = state["step"], state["epoch"]
        bad_steps, best_valid_loss = state["bad_steps"], state["best_valid_loss"]
        total = Averages(state["total"].clone())
        set_rng_state(state["rng"][rank])
        logger.info("resuming from %s: epoch %d, step %d of %d", checkpoint_path, epoch, step, config.train.num_steps)

    def save(*names: str) -> None:
        """Write one checkpoint under each of `names`."""
        rng = gather_object([rng_state()])
        if accelerator.is_main_process:
            content = {
                "model": trained_state_dict(bare),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "ranks": ranks.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "loader": train_loader.state_dict(),
                "rng": rng,
                "step": step,
                "epoch": epoch,
                "bad_steps": bad_steps,
                "best_valid_loss": best_valid_loss,
                "total": total.values,
                "base_weights": base_weights,
                "config": to_dict(config),
            }
            for name in names:
                save_checkpoint(exp_dir / name, content)
            remove_old_checkpoints(exp_dir, keep=config.train.keep_last_k)
        accelerator.wait_for_everyone()

    # ---- train ----------------------------------------------------------------------------------------------
    writer = None
    if accelerator.is_main_process:
        save_config(config, exp_dir / "config.yaml", header=provenance())
        writer = SummaryWriter(exp_dir / "tensorboard", purge_step=step + 1 if step else None)
    progress = tqdm(
        total=config.train.num_steps,
        initial=step,
        unit="step",
        disable=None if rank == 0 else True,
        smoothing=0.05,
    )
    model.train()
    throughput = Throughput()
    with logging_redirect_tqdm():
        while step < config.train.num_steps:
            for batches in groups_of(train_loader, config.train.accumulate):
                # One optimiser step. Its loss is a mean over the label tokens of all its batches on all processes.
                if config.model.encoder.path is None:  # a released encoder has its schedules behind it
                    bare.encoder.set_batch_count(step * config.model.encoder.schedule_speed)
                tokens = sum(len(bare.label_ids(text)) + 1 for batch in batches for text in batch.texts)
                tokens = accelerator.reduce(torch.tensor(float(tokens), device=accelerator.device)).item()
                sums = torch.zeros(5, dtype=torch.float64)
                for i, batch in enumerate(batches):
                    batch = batch.to(accelerator.device)
                    with accelerator.no_sync(model) if i + 1 < len(batches) else nullcontext():
                        out = model(
                            batch.features, batch.feature_lens, batch.texts, batch.languages, batch.target_languages
                        )
                        loss = out["loss"] if step >= config.train.ctc_only_steps else out["loss"] - out["llm_loss"]
                        # DDP averages gradients over the processes; the sum is wanted.
                        accelerator.backward(loss * (world_size / tokens) + ranks.loss() / len(batches))
                    sums += stats(out)
                    throughput.add(batch)
                if accelerator.scaler is not None:
                    accelerator.unscale_gradients()
                grad_norm = torch.nn.utils.clip_grad_norm_(trainable, config.optim.clip_grad_norm).item()
                finite = math.isfinite(grad_norm)
                if finite or accelerator.scaler is not None:  # the fp16 scaler skips by itself, and learns from it
                    optimizer.step()
                bad_steps = 0 if finite else bad_steps + 1
                if not finite:
                    ids = ", ".join(i for batch in batches for i in batch.ids)
                    logger.warning("step %d: gradient norm %s, step skipped; batch: %s", step, grad_norm, ids)
                    if bad_steps >= config.train.max_bad_steps:
                        raise UserError(
                            f"{bad_steps} steps in a row without a finite gradient; lower optim.lr, or look at the "
                            "utterances named above. The last checkpoint is intact."
                        )
                scheduler.step()
                step += 1
                if finite:
                    ranks.step(step)
                optimizer.zero_grad()
                progress.update()

                # ---- log, validate, save ---------------------------------------------------------------------
                averages = Averages(accelerator.reduce(sums.float().to(accelerator.device)).double().cpu())
                total.add(averages, decay=1 - 1 / 200)
                if step % config.train.log_every_n == 0:
                    lr = scheduler.get_last_lr()[0]
                    speed = world_size * throughput.audio_seconds_per_second
                    logger.info(
                        "Epoch %d, step %d, loss%s, tot_loss%s, batch size: %d, lr: %.2e, grad norm: %.2f, "
                        "%.0f audio s/s", epoch, step, averages, total, sum(len(b.ids) for b in batches), lr,
                        grad_norm, speed,
                    )  # fmt: skip
                    scalars = {
                        **{f"train/{k}": v for k, v in averages.items().items()},
                        **{f"train/tot_{k}": v for k, v in total.items().items()},
                        "train/lr": lr,
                        "train/grad_norm": grad_norm,
                        "train/padding_share": throughput.padding_share,
                        "train/audio_seconds_per_second": speed,
                    }
                    write_scalars(writer, scalars, step)
                    throughput.restart()
                names = []
                if step % config.train.valid_every_n == 0 or step == config.train.num_steps:
                    scalars = validate(accelerator, model, valid_loader, config.data.text)
                    values = ", ".join(f"{name}: {value:.4g}" for name, value in scalars.items())
                    logger.info("Epoch %d, step %d, validation: %s", epoch, step, values)
                    write_scalars(writer, {f"valid/{k}": v for k, v in scalars.items()}, step)
                    if scalars["loss"] < best_valid_loss:
                        best_valid_loss = scalars["loss"]
                        names.append("best-valid-loss.pt")
                    throughput.restart()
                if step % config.train.save_every_n == 0 or step == config.train.num_steps:
                    names.append(f"checkpoint-{step}.pt")
                if names:
                    save(*names)
                if step == config.train.num_steps:
                    break
            else:
                epoch += 1
                train_loader.set_epoch(epoch)
                save(f"epoch-{epoch - 1}.pt")
    progress.close()
    logger.info("done: %d steps, %d epochs", step, epoch)
    if writer is not None:
        writer.close()
    accelerator.end_training()


def validate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Batch], text_steps: Sequence[str]
) -> dict[str, float]:
    """Loss and WER (percent) of the validation set; each process has its share of the batches."""
    bare = accelerator.unwrap_model(model)
    model.eval()
    averages, results, ctc_results = Averages(), [], []
    for batch in loader:
        batch = batch.to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            out = bare(batch.features, batch.feature_lens, batch.texts, batch.languages, batch.target_languages)
            texts, ctc_texts = bare.recognise(
                batch.features, batch.feature_lens, batch.languages, batch.target_languages
            )
        averages.add(Averages(stats(out)))
        results += transcripts(batch, texts, text_steps)
        if ctc_texts is not None:
            ctc_results += transcripts(batch, ctc_texts, text_steps)
    model.train()
    averages = Averages(accelerator.reduce(averages.values.float().to(accelerator.device)).double().cpu())
    scalars = {**averages.items(), "wer": 100 * score(gather_object(results)).rate}
    if bare.ctc_head is not None:
        scalars["ctc_wer"] = 100 * score(gather_object(ctc_results)).rate
    return scalars


def stats(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([out[k].detach().double() for k in ("loss", "llm_loss", "ctc_loss", "tokens", "correct")]).cpu()


def groups_of(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; what is left over at the end of an epoch makes a shorter one."""
    iterator = iter(loader)
    while group := list(islice(iterator, size)):
        yield group


def write_scalars(writer: SummaryWriter | None, scalars: dict[str, float], step: int) -> None:
    if writer is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)


def describe_parameters(model: SpeechLLM) -> str:
    """`encoder 1.2 M, projector 0.05 M (frozen), ...`"""
    parts = []
    for name, part in model.named_children():
        count = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        note = "" if trained == count else " (frozen)" if trained == 0 else f" ({trained / 1e6:.2f} M trained)"
        parts.append(f"{name} {count / 1e6:.2f} M{note}")
    return ", ".join(parts)


def provenance() -> str:
    """What was run, for the head of config.yaml."""
    return (
        f"{shlex.join(sys.argv)}\nspeechllm {speechllm.__version__}, torch {torch.__version__}, "
        f"lhotse {lhotse.__version__}, python {platform.python_version()}, {os.cpu_count()} CPUs"
    )


if __name__ == "__main__":
    main()
