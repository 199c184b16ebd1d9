"""The model that a configuration or a folder is of: with a language model, or an encoder alone."""

from __future__ import annotations

from pathlib import Path

from speechllm.errors import UserError
from speechllm.linear import pack_for_inference
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import ModelConfig, SpeechLLM, load_model_config
from speechllm.weights import file_hash


def build_model(config: ModelConfig) -> SpeechLLM | EncoderModel:
    """A model to train; see `from_config` of both, also for what they raise."""
    return (EncoderModel if config.llm is None else SpeechLLM).from_config(config)


def load_model(folder: str | Path) -> SpeechLLM | EncoderModel:
    """A model that `save_pretrained` wrote, in evaluation mode, on the CPU.

    Raises:
      FileNotFoundError, UserError: the folder is not one, or its parts do not fit together.
    """
    config = load_model_config(folder)
    return (EncoderModel if config.llm is None else SpeechLLM).from_pretrained(folder)


def model_identity(folder: str | Path) -> str:
    """A text that differs between models that may give other results, wherever their folders are."""
    folder = Path(folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / "README.md"]
    identity = {str(file.relative_to(folder)): file_hash(file) for file in files}
    llm = load_model_config(folder).llm
    if llm is not None and llm.path is not None:  # an adapter without its base
        identity["base"] = file_hash(llm.path)
    return repr(identity)


def pack_model(model: SpeechLLM | EncoderModel, llm_weights: str = "float32") -> None:
    """Bring the matrices into the form that a CPU reads fastest, in place; `llm_weights`: see `pack_for_inference`.

    Raises:
      UserError: what `pack_for_inference` raises; other `llm_weights` than float32 without a language model.
    """
    if model.llm is not None:
        pack_for_inference(model.llm, llm_weights)
    elif llm_weights != "float32":
        raise UserError(f"--llm-weights {llm_weights}: the model has no language model")
    pack_for_inference(model.encoder)
