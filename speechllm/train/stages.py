"""Stages of a training: each begins with what the one before has trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speechllm.config import ConfigError, from_dict
from speechllm.model.config import ModelConfig
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.checkpoint import load_checkpoint, newest_checkpoint
from speechllm.train.config import Experiment, check_same_projectors, load_experiment, stages_of
from speechllm.train.languages import languages_of
from speechllm.train.trackers import check_installed
from speechllm.weights import CheckpointError, load_state_dict_strict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One training: its configuration, its folder, and the folder of the stage that it goes on from."""

    config: Experiment
    exp_dir: Path
    init_dir: Path | None = None


def plan_stages(
    path: str, overrides: Sequence[str], exp_dir: Path, only: str | None = None, start_from: str | None = None
) -> list[Stage]:
    """What is to be trained, in order; a configuration without stages is trained at once, in `exp_dir` itself.

    Args:
      path: of the configuration file; overrides: of the command line, which count for all stages.
      only: train this stage alone.
      start_from: the name of a checkpoint that one stage goes on from.

    Raises:
      ConfigError: the configuration, or one of its stages, is not right; there is no such stage, or more than one where
        one is wanted.
    """
    config = load_experiment(path, overrides)
    configs = stages_of(path, config, overrides)
    if only is not None and only not in configs:
        raise ConfigError(f"--stage: {only} is none of {', '.join(configs) or 'no stages at all'}")
    for one in (config, *configs.values()):
        check_installed(one.train.trackers)
    if not configs:
        return [Stage(config, exp_dir)]
    folders = [exp_dir / name for name in configs]
    stages = map(Stage, configs.values(), folders, [None, *folders])
    chosen = [stage for name, stage in zip(configs, stages, strict=True) if only in (None, name)]
    if len({stage.config.train.mixed_precision for stage in chosen}) > 1:
        raise ConfigError(f"{path}: stages with another train.mixed_precision; run them one by one with --stage")
    if start_from is not None and len(chosen) > 1:
        raise ConfigError("--start-epoch and --start-batch are of one stage: name it with --stage")
    return chosen


def start_checkpoint(epoch: int | None, step: int | None) -> str | None:
    """The name of the checkpoint that --start-epoch or --start-batch means."""
    if step is not None:
        return f"checkpoint-{step}.pt"
    return f"epoch-{epoch - 1}.pt" if epoch is not None and epoch > 1 else None


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
    model.config.languages = languages_of(content)
    logger.info("starting from %s: %d tensors", path, len(state))
    return set(state)
