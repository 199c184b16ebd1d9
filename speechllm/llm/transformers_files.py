"""Files of language models of transformers: folders, GGUF files, the text part of folders for images or sound too."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from speechllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Packages with GPU kernels that transformers takes for layers with a recurrence.
_KERNEL_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")


@contextmanager
def gpu_kernels_only_on_gpus() -> Iterator[None]:
    """Inside, the code of a model may be imported. Then transformers chooses GPU kernels where their package is
    installed, even if there is no GPU; here it does not find them in that case, and chooses PyTorch.
    """
    if torch.cuda.is_available():
        yield
        return
    missing = object()
    modules: dict[str, Any] = sys.modules
    found = {name: modules.get(name, missing) for name in _KERNEL_PACKAGES}
    modules.update(dict.fromkeys(_KERNEL_PACKAGES))  # None: an import of it fails
    try:
        yield
    finally:
        for name, module in found.items():
            if module is missing:
                del modules[name]
            else:
                modules[name] = module


# ---- the text part of a folder ----------------------------------------------------------------------------------

# Text parts without a language model of their own in transformers, and the model that computes the same of text alone:
# they differ in positions of images.
_SAME_OF_TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"model_type": "qwen2"},
    "qwen2_5_vl_text": {"model_type": "qwen2"},
    "qwen3_vl_text": {"model_type": "qwen3"},
    "qwen3_vl_moe_text": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}

# Names of weights: as the parts of a model are named in files, and as a language model by itself has them.
TEXT_NAMES = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}

_TEXT_WEIGHT = re.compile(r"(model\.(layers|embed_tokens|norm)|lm_head)\.")


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of what reads and writes text in a model that also sees or hears.

    Raises:
      UserError: there is no language model of its kind by itself.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    text = config.get_text_config(decoder=True)
    if text.model_type in KNOWN:
        return text
    if text.model_type not in _SAME_OF_TEXT:
        raise UserError(f"the text part ({text.model_type}) of {config.model_type} is no language model by itself")
    plain = _SAME_OF_TEXT[text.model_type]
    known = AutoConfig.for_model(plain["model_type"]).to_dict()
    settings = {name: value for name, value in text.to_dict().items() if name in known} | plain
    rope = {name: value for name, value in settings["rope_parameters"].items() if not name.startswith("mrope")}
    settings["rope_parameters"] = rope | {"rope_type": "default"} if rope.get("rope_type") == "mrope" else rope
    return AutoConfig.for_model(**settings)


def is_of_text(name: str) -> bool:
    """Whether a weight, by the name it has in a language model by itself, is one of the text part."""
    return _TEXT_WEIGHT.match(name) is not None


def weight_names(folder: Path) -> list[str]:
    """The names of all weights in a folder."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


# ---- GGUF -------------------------------------------------------------------------------------------------------


def is_gguf(path: str | Path) -> bool:
    """Whether it is the name of a GGUF file, llama.cpp's format of a model and its tokenizer."""
    return Path(path).suffix.lower() == ".gguf"


def gguf_source(path: str | Path) -> dict[str, Any]:
    """What transformers is to be given to read a GGUF file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the package that reads it is not installed; it is no GGUF file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise UserError(f"{path}: a GGUF file needs the package gguf: pip install 'speechllm[gguf]'") from e
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}


def gguf_details(path: str | Path) -> tuple[torch.dtype, int | None]:
    """What transformers does not ask a GGUF file for: the type of its weights, bfloat16 for quantized ones, which is
    precise enough for them; and the size of an attention head, where the file has it.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(str(path))
    types: dict[Any, torch.dtype] = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    embedding = next((x.tensor_type for x in reader.tensors if x.name == "token_embd.weight"), None)
    architecture = reader.get_field("general.architecture")
    head_dim = reader.get_field(f"{architecture.contents()}.attention.key_length") if architecture else None
    return types.get(embedding, torch.bfloat16), None if head_dim is None else int(head_dim.contents())


@contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Inside, transformers shows no progress of the tensors that it dequantizes; no setting of it turns that off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar
