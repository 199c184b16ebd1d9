"""Reading and writing RWKV-7 weights: official ``.pth`` files and folders of our own."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechllm.checkpoint import load_state_dict_strict
from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.rwkv7.model import RWKV7, RWKV7Config

# Present in released files, never used: the first layer has no earlier values to mix in.
_UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}

# Parameters that only other versions have, by the end of their names in a block.
_OTHER_VERSIONS = {
    "ffn.s_emb.weight": "RWKV-7a or later (DeepEmbed)",
    "att.time_maa_x": "RWKV-6",
    "att.time_faaaa": "RWKV-5",
    "att.time_first": "RWKV-4",
    "att.time_decay": "RWKV-4, 5 or 6",
}


def load_rwkv7(path: str | Path, dtype: torch.dtype = torch.float32, wkv_backend: str = "auto") -> RWKV7:
    """Loads a model to the CPU, in ``eval`` mode, with the sizes found in the file.

    Args:
      path: an official ``.pth`` file (https://huggingface.co/BlinkDL), or a folder with ``config.json`` and
        ``model.safetensors`` as ``save_rwkv7`` writes it. The file is mapped, not read: at its own ``dtype``
        the weights take no second copy in memory.
      dtype: of the weights.
      wkv_backend: backend of ``wkv7``.

    Raises:
      FileNotFoundError: there is no such file or folder.
      UserError: the file is not a checkpoint, is of another RWKV version, or its names or shapes do not fit;
        the message lists the names.
    """
    path = Path(path)
    if path.is_dir():
        config, weights = _read_folder(path)
    else:
        weights = _read_pth(path)
        config = _infer_config(weights, path)
    for name in _UNUSED & weights.keys():
        del weights[name]
    with torch.device("meta"):
        model = RWKV7(config, wkv_backend)
    for name in list(weights):  # one tensor after another, so that there is never a second copy of all
        weights[name] = weights[name].to(dtype)
    load_state_dict_strict(model, weights, path, assign=True)
    return model.requires_grad_().eval()


def save_rwkv7(model: RWKV7, path: str | Path) -> None:
    """Writes the folder ``path``: ``config.json`` and ``model.safetensors``, each complete or not at all."""
    path = Path(path)
    with replaced_file(path / "model.safetensors") as tmp:
        save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, tmp)
    with replaced_file(path / "config.json") as tmp:
        tmp.write_text(json.dumps(asdict(model.config), indent=2) + "\n")


def _read_folder(path: Path) -> tuple[RWKV7Config, dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path / name}: no such file; a model folder has config.json and model.safetensors"
            )
    try:
        config = RWKV7Config(**json.loads((path / "config.json").read_text()))
    except (TypeError, ValueError) as e:
        raise UserError(f"{path / 'config.json'}: not the configuration of an RWKV-7 model: {e}") from e
    try:
        return config, load_file(path / "model.safetensors")
    except SafetensorError as e:
        raise UserError(f"{path / 'model.safetensors'}: not a safetensors file, or a truncated one ({e})") from e


def _read_pth(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; expected an RWKV-7 .pth file or a model folder")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise UserError(f"{path}: not a PyTorch checkpoint, or a truncated one ({str(e).splitlines()[0]})") from e
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise UserError(f"{path}: not a state dict of tensors; expected the weights of an RWKV-7 model")
    return weights


def _infer_config(weights: dict[str, Tensor], path: Path) -> RWKV7Config:
    """Reads the sizes from the tensors: released models do not all follow one formula."""
    for end, version in _OTHER_VERSIONS.items():
        if f"blocks.0.{end}" in weights:
            raise UserError(f"{path}: these are weights of {version} (blocks.0.{end}); only RWKV-7 (x070) is supported")
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    # a model of one layer has no block 1, and no use for v1
    ranks = {"decay": "blocks.0.att.w1", "a": "blocks.0.att.a1", "gate": "blocks.0.att.g1"}
    if len(blocks) > 1:
        ranks["v"] = "blocks.1.att.v1"
    needed = ["emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", *ranks.values()]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise UserError(f"{path}: not an RWKV-7 (x070) checkpoint: it lacks {', '.join(missing)}")
    vocab_size, n_embd = weights["emb.weight"].shape
    return RWKV7Config(
        n_layer=max(blocks) + 1,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=weights["blocks.0.att.r_k"].shape[1],
        ffn_size=weights["blocks.0.ffn.key.weight"].shape[0],
        lora_ranks={name: weights[key].shape[1] for name, key in ranks.items()},
    )
