"""The model that a configuration or a folder is of: with a language model, or an encoder alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from speechllm.allocator import keep_freed_memory
from speechllm.errors import UserError
from speechllm.hub import local_path
from speechllm.linear import pack_for_inference
from speechllm.llm.precision import convert, half_precision
from speechllm.model.config import ModelConfig, load_model_config
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
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
    folder = local_path(folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / "README.md"]
    identity = {str(file.relative_to(folder)): file_hash(file) for file in files}
    llm = load_model_config(folder).llm
    if llm is not None and llm.path is not None:  # an adapter without its base
        identity["base"] = file_hash(llm.path)
    return repr(identity)


def prepare_for_inference(
    model: SpeechLLM | EncoderModel,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    llm_weights: str = "float32",
    encoder_weights: str | None = None,
) -> None:
    """Bring a loaded model to the device and into the precision that it recognizes speech in, in place.

    Args:
      device: such as `cuda`, `cuda:1` or `cpu`; for None see `usable_device`.
      dtype: of `speechllm.llm.precision.DTYPES`, the type of the language model's weights, and in which the encoder
        computes its matrix products; None for half precision on a GPU, float32 elsewhere. Softmax, recurrent states and
        the CTC head are float32 in any case.
      llm_weights: see `pack_for_inference`; on the CPU, in float32.
      encoder_weights: how the CPU keeps the matrices of the encoders: as `llm_weights`, and other than `float32` they
        compute in bfloat16; None for bfloat16 if that is `dtype`, else float32.

    On the CPU the process keeps the memory that it frees (`speechllm.allocator`).

    Raises:
      UserError: there is no such device; `dtype`, `llm_weights` and `encoder_weights` do not go together, or with the
        device; what `pack_for_inference` raises.
    """
    device = usable_device(device)
    if dtype is None:
        dtype = half_precision() if device.type == "cuda" else "float32"
    if llm_weights != "float32" and dtype != "float32":
        raise UserError(f"--llm-weights {llm_weights} packs a model that computes in float32, and not in {dtype}")
    encoder_weights = _encoder_weights(encoder_weights, dtype, device)
    if model.llm is not None:
        convert(model.llm, getattr(torch, dtype))
    model.to(device)
    encoder_dtype = "bfloat16" if encoder_weights == "int8" else encoder_weights or dtype
    model.autocast_dtype = None if encoder_dtype == "float32" else getattr(torch, encoder_dtype)
    if model.llm is not None and dtype == "float32" and (device.type == "cpu" or llm_weights != "float32"):
        pack_for_inference(model.llm, llm_weights)
    elif llm_weights != "float32":
        raise UserError(f"--llm-weights {llm_weights}: the model has no language model")
    if encoder_weights is not None:
        for _, _, encoder in model.encoders():
            pack_for_inference(encoder, encoder_weights)
    if device.type == "cpu":
        keep_freed_memory()


def _encoder_weights(asked: str | None, dtype: str, device: torch.device) -> str | None:
    """How the encoders' matrices are packed; None: they are not."""
    if device.type == "cpu" and dtype != "float16":
        if asked == "float32" and dtype != "float32":
            raise UserError(f"--encoder-weights float32: with --dtype {dtype} the encoder computes in {dtype}")
        return asked or dtype
    if asked is not None:
        raise UserError(f"--encoder-weights {asked} is for the CPU, with --dtype float32 or bfloat16")
    return None


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; for None the first GPU, or the one that torchrun gives this process, and the CPU where
    there is none.

    Raises:
      UserError: it is no name of a device, or PyTorch does not find that device.
    """
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device {name}: cannot be used ({str(e).splitlines()[0]})") from e
    return device
