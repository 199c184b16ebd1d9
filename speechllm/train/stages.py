"""Stages of a training: each begins with what the one before has trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from speechllm.config import ConfigError, from_dict
from speechllm.hub import local_path
from speechllm.model.config import ModelConfig, load_model_config
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.checkpoint import load_checkpoint, newest_checkpoint
from speechllm.train.config import Experiment, check_same_projectors, load_experiment, stages_of
from speechllm.train.languages import languages_of
from speechllm.train.trackers import check_installed
from speechllm.weights import CheckpointError, load_state_dict_strict, restored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One training: its configuration, its folder, and what it begins with (see `init_weights`)."""

    config: Experiment
    exp_dir: Path
    init_from: str | Path | None = None


def plan_stages(
    path: str,
    overrides: Sequence[str],
    exp_dir: Path,
    only: str | None = None,
    start_from: str | None = None,
    init_from: str | None = None,
) -> list[Stage]:
    """What is to be trained, in order; a configuration without stages is trained at once, in `exp_dir` itself.

    Args:
      path: of the configuration file; overrides: of the command line, which count for all stages.
      only: train this stage alone.
      start_from: the name of a checkpoint that one stage goes on from.
      init_from: what the first of the stages begins with, in place of the stage before it.

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
        return [Stage(config, exp_dir, init_from)]
    folders = [exp_dir / name for name in configs]
    stages = map(Stage, configs.values(), folders, [None, *folders])
    chosen = [stage for name, stage in zip(configs, stages, strict=True) if only in (None, name)]
    if len({stage.config.train.mixed_precision for stage in chosen}) > 1:
        raise ConfigError(f"{path}: stages with another train.mixed_precision; run them one by one with --stage")
    if start_from is not None and len(chosen) > 1:
        raise ConfigError("--start-epoch and --start-batch are of one stage: name it with --stage")
    return chosen if init_from is None else [replace(chosen[0], init_from=init_from), *chosen[1:]]


def start_checkpoint(epoch: int | None, step: int | None) -> str | None:
    """The name of the checkpoint that --start-epoch or --start-batch means."""
    if step is not None:
        return f"checkpoint-{step}.pt"
    return f"epoch-{epoch - 1}.pt" if epoch is not None and epoch > 1 else None


def init_weights(model: SpeechLLM | EncoderModel, init_from: str | Path) -> set[str]:
    """Load what was trained before.

    Args:
      init_from: the folder of a training, of which the last checkpoint counts; or that of a model (`save_pretrained`,
        tools/average_ckpt.py), as a text also its id on the Hugging Face Hub.

    Returns:
      the names of the weights that were loaded; others stay as they are.

    Raises:
      CheckpointError: there is neither, or there are weights that the model has not.
      ConfigError: it is of a model with other projectors.
    """
    folder = init_from if isinstance(init_from, Path) else local_path(init_from)
    is_model = (folder / "model.safetensors").is_file()
    path, state, config = _from_model_folder(folder) if is_model else _from_checkpoint(folder)
    check_same_projectors(str(path), "this model", config, "the stage", model.config)
    load_state_dict_strict(model, {**model.state_dict(), **state}, path)
    model.config.languages = config.languages
    logger.info("starting from %s: %d tensors", path, len(state))
    return set(state)


def _from_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor], ModelConfig]:
    path = newest_checkpoint(folder)
    if path is None:
        raise CheckpointError(
            f"{folder}: no checkpoint to start from, and no model.safetensors; train that stage first, or give the "
            "folder of a model"
        )
    content = load_checkpoint(path)
    config = from_dict(ModelConfig, content["config"]["model"], str(path))
    return path, content["model"], replace(config, languages=languages_of(content))


def _from_model_folder(folder: Path) -> tuple[Path, dict[str, Tensor], ModelConfig]:
    path = folder / "model.safetensors"
    return path, restored(load_file(path)), load_model_config(folder)
