"""The model that a configuration or a folder is of: with a language model, or an encoder alone."""

from __future__ import annotations

from pathlib import Path

from speechllm.config import load_config
from speechllm.encoder_model import EncoderModel
from speechllm.model import ModelConfig, SpeechLLM


def build_model(config: ModelConfig) -> SpeechLLM | EncoderModel:
    """A model to train; see `from_config` of both, also for what they raise."""
    return (EncoderModel if config.llm is None else SpeechLLM).from_config(config)


def load_model(folder: str | Path) -> SpeechLLM | EncoderModel:
    """A model that `save_pretrained` wrote, in evaluation mode, on the CPU.

    Raises:
      FileNotFoundError, UserError: the folder is not one, or its parts do not fit together.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.yaml: not a folder written by save_pretrained")
    config = load_config(ModelConfig, path)
    return (EncoderModel if config.llm is None else SpeechLLM).from_pretrained(folder)
