"""Checkpoints: save, find the newest, resume, average.

A checkpoint holds what is trained and what a resumed run needs to go on as if it had never stopped. Frozen
parts are not stored again: the checkpoint names their files and hashes. Every write goes to a temporary
name, is flushed to the disk, and is renamed: a reader sees a whole file or none. Loading never executes
pickled code (`weights_only`).

Where the language model is sharded (`speechllm.train.sharding`), each process writes its share beside the checkpoint,
as NAME.rank-1.pt for process 1; the checkpoint itself has that of process 0, and is written last.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from speechllm.files import describe_write_error, replaced_file
from speechllm.train.sharding import like, local, rows_of
from speechllm.weights import CheckpointError, check_fits, load_state_dict_strict

_NAME = re.compile(r"(epoch|checkpoint)-(\d+)\.pt")


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, text, and dicts or lists of them) to `path`, whole or not at all.

    Raises:
      CheckpointError: it cannot be written, as when the disk is full; what was at `path` before is intact.
    """
    try:
        with replaced_file(path) as tmp, open(tmp, "wb") as file:  # given a name, torch.save would not tell the reason
            torch.save(content, file)
    except (OSError, RuntimeError) as e:
        reason = e if isinstance(e, OSError) else e.__context__  # closing its archive, torch.save fails once more
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{describe_write_error(path, reason)}. The checkpoints that were there are intact: make room, or make the "
            "folder writable, and start again to go on from the newest."
        ) from e


def save_share(path: str | Path, content: dict[str, Any], rank: int) -> None:
    """Write what only process `rank` has of `content`, beside the checkpoint `path` that is written after it.

    Raises:
      CheckpointError: as in `save_checkpoint`.
    """
    names, numbers = content["sharded"]["names"], content["sharded"]["optimizer"]
    average = content["model_avg"]["model"]
    share = {
        "model": {name: content["model"][name] for name in names if name in content["model"]},
        "model_avg": {name: average[name] for name in names if name in average},
        "optimizer": {i: content["optimizer"]["state"][i] for i in numbers if i in content["optimizer"]["state"]},
    }
    save_checkpoint(share_path(path, rank), share)


def share_path(path: str | Path, rank: int) -> Path:
    """Where process `rank` writes its share of a checkpoint."""
    return Path(path).with_suffix(f".rank-{rank}.pt")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; tensors are mapped from the file on the CPU, not copied, until they are used.

    What is sharded is put together, without the optimizer's state. The whole file is read once, to compare checksums.

    Raises:
      CheckpointError: no such file, or not a whole checkpoint.
    """
    content = _load(path)
    if content.get("sharded"):
        del content["optimizer"]
        _reshard(content, _other_shares(path, content), content["sharded"], 0, 1)
    return content


def load_share(path: str | Path, rank: int, processes: int, sharded: dict[str, list] | None = None) -> dict[str, Any]:
    """Read what process `rank` of `processes` goes on from, whatever number of them wrote the checkpoint.

    Args:
      sharded: what is (`describe_shares`), if the checkpoint was written where nothing was.

    Raises:
      CheckpointError: as in `load_checkpoint`.
    """
    content = _load(path)
    written: dict[str, list] | None = content.get("sharded")
    if written and processes == len(content["rng"]):
        if rank > 0:
            share = _load(share_path(path, rank))
            content["model"] |= share["model"]
            content["model_avg"]["model"] |= share["model_avg"]
            content["optimizer"]["state"] |= share["optimizer"]
    elif written:
        _reshard(content, _other_shares(path, content), written, rank, processes)
    elif sharded:
        _reshard(content, [], sharded, rank, processes)
    return content


def _other_shares(path: str | Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    return [_load(share_path(path, rank)) for rank in range(1, len(content["rng"]))]


def _reshard(
    content: dict[str, Any], others: list[dict[str, Any]], sharded: dict[str, list], rank: int, processes: int
) -> None:
    """Make of `content` and the shares of the `others` what process `rank` of `processes` has, in place."""
    for tensors, part in ((content["model"], "model"), (content["model_avg"]["model"], "model_avg")):
        for name in sharded["names"]:
            if name in tensors:
                tensors[name] = rows_of([tensors[name], *(other[part][name] for other in others)], rank, processes)
    states = content["optimizer"]["state"] if "optimizer" in content else {}
    for number in sharded["optimizer"]:
        for name, value in states.get(number, {}).items():
            if isinstance(value, Tensor) and value.dim():  # Adam's count of steps has no rows
                shares = [value, *(other["optimizer"][number][name] for other in others)]
                states[number][name] = rows_of(shares, rank, processes)


def _load(path: str | Path) -> dict[str, Any]:
    content = _read(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as e:  # zipfile raises many kinds on a damaged file
        raise _damage(path, f"{type(e).__name__}: {e}") from e
    if damaged is not None:
        raise _damage(path, f"wrong checksum of {damaged}")
    return content


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch.load raises many kinds on a damaged file
        raise _damage(path, f"{type(e).__name__}: {e}") from e
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this library (it has no `model`)")
    return content


def _damage(path: str | Path, reason: str) -> CheckpointError:
    """Checkpoints are written whole: damage is trouble with the disk or a copy, for a person to look at."""
    path = Path(path)
    others = {p: p.stat().st_mtime for p in path.parent.glob("*.pt") if _NAME.fullmatch(p.name) and p != path}
    older = [p for p, written in others.items() if written <= path.stat().st_mtime]
    hint = f"; the next older one is {max(older, key=lambda p: others[p])}" if older else ""
    return CheckpointError(
        f"{path}: cannot be read as a checkpoint ({reason}). Checkpoints are written whole, so look after the disk; to "
        f"go on without this one, move it away{hint}"
    )


def newest_checkpoint(exp_dir: str | Path) -> Path | None:
    """The epoch-N.pt or checkpoint-STEP.pt in `exp_dir` with the most training steps; None where there is none.

    Raises:
      CheckpointError: one of them cannot be read: whether to go on from an older one is for a person to decide.
    """
    paths = [*_numbered(exp_dir, "checkpoint").values(), *_numbered(exp_dir, "epoch").values()]
    return max(paths, key=lambda path: _read(path)["step"], default=None)


def remove_old_checkpoints(exp_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` of checkpoint-STEP.pt in `exp_dir`, and what killed runs left half-written.

    As in icefall, epoch-N.pt and best-*.pt stay. Not to be called while a checkpoint is written.
    """
    found = _numbered(exp_dir, "checkpoint")
    for number in sorted(found)[: max(len(found) - keep, 0)]:
        found[number].unlink()  # before its shares: without them it would look like a whole one
        for share in Path(exp_dir).glob(f"checkpoint-{number}.rank-*.pt"):
            share.unlink()
    for leftover in Path(exp_dir).glob("*.pt*.tmp"):
        leftover.unlink()


def trained_state_dict(model: nn.Module, also: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state dict without the frozen parameters, but for those in `also`; all buffers are in it. Of what is sharded
    it has this process's share."""
    frozen = _frozen(model)
    return {name: local(t.detach()) for name, t in _trained(model).items()} | {
        name: local(frozen[name]) for name in also
    }


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """As `trained_state_dict`, with the model's own tensors: one that has several names is one object."""
    frozen = _frozen(model)
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in frozen}


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """The frozen parameters under all their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in named if not p.requires_grad}


def load_trained(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load what `trained_state_dict` gave into a model whose frozen parameters are in place.

    Raises:
      CheckpointError: lists what is missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    state = {name: like(own[name], t) if name in own else t for name, t in state.items()}
    try:
        load_state_dict_strict(model, {**_frozen(model), **state}, source)
    except CheckpointError as e:
        hint = "Use the configuration it was trained with, or another --exp-dir to start afresh."
        raise CheckpointError(f"{e}\n{hint}") from None


def rng_state() -> dict[str, Any]:
    """The state of every random generator a training step draws from, as `load_checkpoint` may read it back."""
    version, keys, gauss = random.getstate()
    _, np_keys, *np_rest = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(np_keys.astype(np.int64)), *np_rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on drawing where `rng_state` was asked."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np_keys, *np_rest = state["numpy"]
    np.random.set_state(("MT19937", np_keys.numpy().astype(np.uint32), *np_rest))
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())


class RunningAverage:
    """The mean of the trained tensors over a run, of their values after each `period` steps.

    It is icefall's `model_avg` (egs/librispeech/ASR/zipformer/train.py): kept in float64, here on the CPU. Two of
    them, from two checkpoints, give the mean over the steps between: `average_between`. Tensors that are not floating
    point are copied, one that has several names is kept once; of a sharded one, this process's share.

    Args:
      model: as it trains, with what is frozen frozen.
      period: steps from one value that is averaged to the next.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self.model, self.period = model, period
        self.step = 0  # of the last value in the average
        copies: dict[int, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        for name, t in _trained(model).items():
            if id(t) not in copies:
                dtype = torch.float64 if t.is_floating_point() else t.dtype
                copies[id(t)] = local(t.detach()).to("cpu", dtype, copy=True)
            self.average[name] = copies[id(t)]

    def update(self, step: int) -> None:
        """To be called after the optimizer's step number `step` (from 1)."""
        if step % self.period:
            return
        weight = (step - self.step) / step
        current = trained_state_dict(self.model)
        for name, average in _once(self.average).items():
            if average.is_floating_point():
                average.lerp_(current[name].cpu().double(), weight)
            else:
                average.copy_(current[name])
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        """`step`, and the averaged tensors as `model`: themselves, not copies."""
        return {"step": self.step, "model": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
          CheckpointError: it is of a model that trains other tensors.
        """
        check_fits(self.average, state["model"], "the running average of the checkpoint", "what is trained")
        for name, average in _once(self.average).items():
            average.copy_(state["model"][name])
        self.step = state["step"]


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under one of its names."""
    return dict({id(t): (name, t) for name, t in tensors.items()}.values())


def average_state_dicts(
    states: Sequence[dict[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The mean of floating-point tensors, summed in float64 and rounded to their type; other tensors are the last's.

    Args:
      states: state dicts with the same names and shapes.
      weights: one for each, with a sum of 1; equal ones if None.

    Raises:
      CheckpointError: the state dicts differ in names or shapes, or there is none.
    """
    if not states:
        raise CheckpointError("nothing to average")
    for number, state in enumerate(states[1:], start=2):
        check_fits(states[0], state, f"number {number} of the average", "number 1")
    weights = [1 / len(states)] * len(states) if weights is None else weights
    mean = {}
    for name, last in states[-1].items():  # one tensor after another: there is never a second copy of all in float64
        mean[name] = last
        if last.is_floating_point():
            total = torch.zeros(last.shape, dtype=torch.float64)
            for state, weight in zip(states, weights, strict=True):
                total.add_(state[name].double(), alpha=weight)
            mean[name] = total.to(last.dtype)
    return mean


def average_between(start: dict[str, Any], end: dict[str, Any]) -> dict[str, Tensor]:
    """The mean over the steps after `start` up to `end`, two states of one `RunningAverage`, in float64.

    (end.step * end.mean - start.step * start.mean) / (end.step - start.step), as icefall's
    `average_checkpoints_with_averaged_model` has it.

    Raises:
      CheckpointError: the average was not updated between the two, or they are of different models.
    """
    steps = end["step"] - start["step"]
    if steps <= 0:
        raise CheckpointError(
            f"the running averages reach to step {start['step']} at the start and step {end['step']} at the end: there "
            "is nothing between them; take checkpoints further apart"
        )
    weight = end["step"] / steps
    return average_state_dicts([start["model"], end["model"]], [1 - weight, weight])


def checkpoints_to_average(
    exp_dir: str | Path, kind: str, last: int, avg: int, use_averaged_model: bool = False
) -> list[Path]:
    """What to average of `exp_dir`'s KIND-N.pt up to N = `last`; oldest first.

    Args:
      kind: `epoch`, for the epochs `last` - `avg` + 1 to `last`; or `checkpoint`, for KIND-LAST.pt and the `avg` - 1
        that are there before it.
      use_averaged_model: take two, between whose running averages these lie: KIND-LAST.pt and the one before those.

    Raises:
      CheckpointError: lists what is missing and what is there.
    """
    if avg < 1:
        raise CheckpointError(f"cannot average {avg} checkpoints: give 1 or more")
    found = _numbered(exp_dir, kind)
    there = ", ".join(found[n].name for n in sorted(found)) or "none"
    count = avg + use_averaged_model
    if kind == "epoch":
        wanted = list(range(last - count + 1, last + 1))
    else:
        wanted = [*sorted(n for n in found if n < last), last][-count:]
    if len(wanted) < count:
        raise CheckpointError(
            f"{exp_dir}: cannot average {avg} checkpoints up to {kind}-{last}.pt: {count} are needed; there: {there}"
        )
    if use_averaged_model:
        wanted = [wanted[0], wanted[-1]]
    if missing := [f"{kind}-{n}.pt" for n in wanted if n not in found]:
        raise CheckpointError(f"{exp_dir}: no {', '.join(missing)}; there: {there}")
    return [found[n] for n in wanted]


def _numbered(exp_dir: str | Path, kind: str) -> dict[int, Path]:
    """The KIND-N.pt in `exp_dir`, by N."""
    found = {}
    for path in Path(exp_dir).glob(f"{kind}-*.pt"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[2])] = path
    return found
