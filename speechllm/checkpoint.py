"""Checkpoints: save, find the newest, resume, average.

A checkpoint holds what is trained and what a resumed run needs to go on as if it had never stopped. Frozen
parts are not stored again: the checkpoint names their files and hashes. Every write goes to a temporary
name, is flushed to the disk, and is renamed: a reader sees a whole file or none. Loading never executes
pickled code (`weights_only`).
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechllm.errors import UserError
from speechllm.files import replaced_file

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(epoch|checkpoint)-(\d+)\.pt")


class CheckpointError(UserError):
    """A checkpoint that does not exist, is damaged, or does not fit; the message says which and why."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, and dicts or lists of them) to `path`, whole or not at all."""
    with replaced_file(path) as tmp:
        torch.save(content, tmp)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; tensors are mapped from the file on the CPU, not copied, until they are used.

    Raises:
      CheckpointError: no such file, or not a whole checkpoint.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch.load raises many kinds on a damaged file
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({type(e).__name__}: {e})") from e
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this library (it has no `model`)")
    return content


def newest_checkpoint(exp_dir: str | Path) -> Path | None:
    """The complete checkpoint in `exp_dir` with the most training steps; None where there is none."""
    best: tuple[int, Path] | None = None
    for path in sorted(Path(exp_dir).glob("*.pt")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            step = load_checkpoint(path)["step"]
        except CheckpointError as e:
            logger.warning("%s; passed over", e)
            continue
        if best is None or step > best[0]:
            best = step, path
    return best[1] if best else None


def remove_old_checkpoints(exp_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` of checkpoint-STEP.pt, and of epoch-N.pt, in `exp_dir`."""
    for kind in ("checkpoint", "epoch"):
        found = _numbered(exp_dir, kind)
        for number in sorted(found)[: max(len(found) - keep, 0)]:
            found[number].unlink()


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the frozen parameters; all buffers are in it."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load what `trained_state_dict` gave into a model whose frozen parameters are in place.

    Raises:
      CheckpointError: lists what is missing, unexpected, or of another shape.
    """
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    try:
        load_state_dict_strict(model, {**frozen, **state}, source)
    except CheckpointError as e:
        hint = "Use the configuration it was trained with, or another --exp-dir to start afresh."
        raise CheckpointError(f"{e}\n{hint}") from None


def load_state_dict_strict(
    model: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False
) -> None:
    """`model.load_state_dict(state)` with an error that can be acted on; nothing is loaded when one thing is off.

    `assign`: take over the tensors themselves, for a model on the meta device.

    Raises:
      CheckpointError: lists what is missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    problems = [f"  missing: {name}" for name in own if name not in state]
    problems += [f"  unexpected: {name}" for name in state if name not in own]
    problems += [
        f"  {name}: {tuple(state[name].shape)} in the file, {tuple(t.shape)} in the model"
        for name, t in own.items()
        if name in state and state[name].shape != t.shape
    ]
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"{source}: does not fit the model:\n{shown}")
    model.load_state_dict(state, assign=assign)


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


def rng_state() -> dict[str, Any]:
    """The state of every random generator a training step draws from, as `load_checkpoint` may read it back."""
    version, keys, gauss = random.getstate()
    _, np_keys, *np_rest = np.random.get_state()
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(np_keys.astype(np.int64)), *np_rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np_keys, *np_rest = state["numpy"]
    np.random.set_state(("MT19937", np_keys.numpy().astype(np.uint32), *np_rest))
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())


def average_state_dicts(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of floating-point tensors, summed in float64; other tensors are the last one's.

    Raises:
      CheckpointError: the state dicts differ in names or shapes, or there is none.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    count = 0
    for count, state in enumerate(states, start=1):
        if count == 1:
            dtypes = {name: t.dtype for name, t in state.items()}
        elif {n: t.shape for n, t in total.items()} != {n: t.shape for n, t in state.items()}:
            odd = [n for n in total.keys() | state.keys() if n not in total or n not in state]
            raise CheckpointError(
                f"checkpoint {count} of the average holds other tensors: {sorted(odd)[:5] or 'shapes'}"
            )
        for name, t in state.items():
            if t.is_floating_point():
                total[name] = total[name] + t.double() if name in total else t.double()
            else:
                total[name] = t
    if not count:
        raise CheckpointError("nothing to average")
    return {n: (t / count).to(dtypes[n]) if dtypes[n].is_floating_point else t for n, t in total.items()}


def checkpoints_to_average(exp_dir: str | Path, kind: str, last: int, avg: int) -> list[Path]:
    """The `avg` newest of `exp_dir`'s KIND-N.pt up to and including N = `last`; oldest first.

    Args:
      kind: `epoch` (epoch-N.pt) or `checkpoint` (checkpoint-STEP.pt).

    Raises:
      CheckpointError: KIND-LAST.pt does not exist, or there are fewer than `avg`.
    """
    found = _numbered(exp_dir, kind)
    there = ", ".join(found[n].name for n in sorted(found)) or "none"
    if last not in found:
        raise CheckpointError(f"{exp_dir}: no {kind}-{last}.pt; there: {there}")
    chosen = sorted(n for n in found if n <= last)[-avg:]
    if avg < 1 or len(chosen) < avg:
        raise CheckpointError(f"{exp_dir}: cannot average {avg} checkpoints up to {kind}-{last}.pt; there: {there}")
    return [found[n] for n in chosen]


def _numbered(exp_dir: str | Path, kind: str) -> dict[int, Path]:
    """The KIND-N.pt in `exp_dir`, by N."""
    found = {}
    for path in Path(exp_dir).glob(f"{kind}-*.pt"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[2])] = path
    return found
