"""Stages of a training: each begins with what the one before has trained."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from speechllm.config import ConfigError, from_dict, load_config, override, parse_overrides, to_dict
from speechllm.model.config import ModelConfig
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.train.checkpoint import load_checkpoint, newest_checkpoint
from speechllm.train.languages import languages_of
from speechllm.weights import CheckpointError, load_state_dict_strict

logger = logging.getLogger(__name__)

Config = TypeVar("Config")  # of a whole experiment


def stages_of(path: str, config: Config, overrides: list[str]) -> dict[str, Config]:
    """The configuration of each stage, in order, all of them checked before the first begins.

    Args:
      path: of the configuration file; overrides: of the command line, which count for all stages.

    Raises:
      ConfigError: a stage's changes are not right, or it cannot go on from the one before it.
    """
    changes_of = config.stages
    base = load_config(type(config), path)
    stages = {
        name: override(
            override(base, changes, source=f"{path}: stages.{name}"), parse_overrides(overrides), source="command line"
        )
        for name, changes in changes_of.items()
    }
    for (name, stage), (then, next_stage) in pairwise(stages.items()):
        check_same_projectors(path, f"stages.{name}", stage.model, f"stages.{then}", next_stage.model)
    return stages


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
