"""Weights of a model: strict loading, what a file is that holds none, and the hash that names a file of them."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speechllm.errors import UserError
from speechllm.hub import identity


class CheckpointError(UserError):
    """A checkpoint that does not exist, is damaged, or does not fit; the message says which and why."""


def load_state_dict_strict(
    model: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False
) -> None:
    """`model.load_state_dict(state)` with an error that can be acted on; nothing is loaded when one thing is off.

    `assign`: take over the tensors themselves, for a model on the meta device.

    Raises:
      CheckpointError: lists what is missing, unexpected, or of another shape.
    """
    check_fits(model.state_dict(), state, source, "the model")
    model.load_state_dict(state, assign=assign)


def check_fits(own: dict[str, Tensor], state: dict[str, Tensor], source: str | Path, target: str) -> None:
    """Compare names and shapes of the tensors of `source` (state) with those of `target` (own).

    Raises:
      CheckpointError: lists what is missing, unexpected, or of another shape.
    """
    problems = [f"  missing: {name}" for name in own if name not in state]
    problems += [f"  unexpected: {name}" for name in state if name not in own]
    problems += [
        f"  {name}: {tuple(state[name].shape)} in the file, {tuple(t.shape)} in {target}"
        for name, t in own.items()
        if name in state and state[name].shape != t.shape
    ]
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"{source}: does not fit {target}:\n{shown}")


class _WithoutNormalValues(TorchFunctionMode):
    """Leaves out `normal_`, for which PyTorch imports its compiler on the meta device, a second and a half."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Inside, modules are made on the meta device: no time and memory for initial values that are to be replaced."""
    with torch.device("meta"), _WithoutNormalValues():
        yield


# What training programs put before the names of a model that they wrap.
_WRAPPERS = re.compile(r"^(_forward_module\.|_orig_mod\.|module\.|base_model\.|model\.)*(?=(emb|blocks|ln_out|head)\.)")


def stored(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights as they are written to a file: matrices in `dtype` if it is given; vectors are small and stay as they
    are, as norms and rates of decay suffer most from rounding."""
    return {
        name: (x.to(dtype) if dtype is not None and x.is_floating_point() and x.dim() > 1 else x).contiguous()
        for name, x in weights.items()
    }


def restored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stored`: matrices beside float32 vectors are float32 again.

    A part (what is before the first dot of a name) that is in half precision altogether stays so: a large language
    model is computed with as it was released.
    """
    whole = {name.split(".")[0] for name, x in weights.items() if x.dtype == torch.float32}
    return {
        name: x.float() if x.is_floating_point() and name.split(".")[0] in whole else x for name, x in weights.items()
    }


def read_rwkv_pth(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a .pth file of RWKV-LM or RWKV-PEFT, mapped, by the names that the bare model gives them.

    Nothing of the file is executed.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if what := foreign_format(path):
        raise UserError(f"{path}: is {what}; expected a .pth file of tensors, as RWKV-LM and RWKV-PEFT write it")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise UserError(f"{path}: not a PyTorch checkpoint, or a truncated one ({str(e).splitlines()[0]})") from e
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise UserError(f"{path}: not a state dict of tensors; expected the weights of an RWKV-7 model")
    return {_WRAPPERS.sub("", name, count=1): x for name, x in tensors.items()}


# What the suffix of a file tells; what is in files of PyTorch, `foreign_format` looks up.
_FORMATS = {
    ".onnx": "an ONNX model",
    ".ort": "an ONNX Runtime model",
    ".nemo": "a NeMo archive",
    ".tflite": "a TensorFlow Lite model",
    ".rknn": "an RKNN model",
    ".mnn": "an MNN model",
    ".engine": "a TensorRT engine",
    ".mlmodel": "a Core ML model",
    ".param": "an ncnn model",
}
_BEGINNINGS = {b"GGUF": "a GGUF file", b"version https://git-lfs": "a Git LFS pointer, and not the file it stands for"}


def foreign_format(path: str | Path) -> str | None:
    """What a file is that holds no plain tensors to be loaded: "a TorchScript model", ...; None if it is none of these.

    Nothing of the file is executed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".bin" and path.with_suffix(".param").is_file():
        suffix = ".param"  # ncnn's weights beside their graph
    if suffix in _FORMATS:
        return _FORMATS[suffix]
    with open(path, "rb") as file:
        beginning = file.read(64)
    for start, name in _BEGINNINGS.items():
        if beginning.startswith(start):
            return name
    if beginning[:1] == b"\x08" and any(producer in beginning for producer in (b"pytorch", b"onnx")):
        return "an ONNX model"  # whose first fields are its version and its producer
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except zipfile.BadZipFile:
        return None
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "a TorchScript model (torch.jit.save)"
    if any(name.startswith("models/") or "exported_program" in name for name in names):
        return "a program exported by torch.export"
    return None


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file or of a folder's files (names and contents): names the base weights of a checkpoint. That of an
    id of the Hub is of its version there."""
    if (version := identity(path)) is not None:
        return hashlib.sha256(version.encode()).hexdigest()
    path, digest = Path(path), hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
