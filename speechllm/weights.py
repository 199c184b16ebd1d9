"""Weights of a model: strict loading, and the hash that names a file of them."""

import hashlib
from pathlib import Path

from torch import Tensor, nn

from speechllm.errors import UserError


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


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file or of a folder's files (names and contents): names the base weights of a checkpoint."""
    path, digest = Path(path), hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
