"""The recurrent state of RWKV-7: what a model remembers of everything it has read.

State files are ours (safetensors), or a tuned state of RWKV-PEFT (https://github.com/JL-er/RWKV-PEFT) and RWKV-LM: a
.pth file with ``blocks.N.att.time_state`` of each layer, (H, V, K), which is the state of the recurrence as it is here.
A state of RWKV-6 has the same names and shapes, its last two axes exchanged: nothing in a file tells them apart.
"""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.weights import read_rwkv_pth

_TIME_STATE = re.compile(r"blocks\.(\d+)\.att\.time_state")


def time_state_names(num_layers: int) -> list[str]:
    """The names that RWKV-PEFT gives the tuned state of each layer."""
    return [f"blocks.{i}.att.time_state" for i in range(num_layers)]


def tuned_wkv(weights: dict[str, Tensor], source: str | Path, remove: bool = False) -> Tensor | None:
    """The tuned state among `weights`, (layers, H, V, K) float32; None if there is none.

    Args:
      remove: take it out of them.

    Raises:
      UserError: it lacks a layer, or has not the shapes of a state.
    """
    found = {name for name in weights if _TIME_STATE.fullmatch(name)}
    if not found:
        return None
    names = time_state_names(len(found))
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{source}: a tuned state of {len(found)} layers without {', '.join(missing)}")
    states = [weights[name] for name in names]
    shape = states[0].shape
    if len(shape) != 3 or shape[1] != shape[2] or any(x.shape != shape for x in states):
        shapes = ", ".join(str(tuple(s)) for s in dict.fromkeys(x.shape for x in states))
        raise UserError(f"{source}: time_state has shape {shapes}; expected one of (heads, head size, head size)")
    if remove:
        for name in names:
            del weights[name]
    return torch.stack(states).float()


@dataclass(frozen=True)
class RWKV7State:
    """The state of N rows in all layers.

    Attributes:
      att_shift: (layers, N, D) last input of each time mix.
      ffn_shift: (layers, N, D) last input of each channel mix.
      wkv: (layers, N, H, V, K) state of the recurrence, float32.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor

    def __len__(self) -> int:
        """The number of rows N."""
        return self.wkv.shape[1]

    def _map(self, f: Callable[[Tensor], Tensor]) -> "RWKV7State":
        return RWKV7State(f(self.att_shift), f(self.ffn_shift), f(self.wkv))

    def select(self, index: Tensor, overwrite: bool = False) -> "RWKV7State":
        """The rows at ``index`` (M,), in this order; a row may be taken more than once or not at all.

        With ``overwrite`` and as many rows as before, only those that are not in their place are copied, in the memory
        of this state, which nothing else may hold then.
        """
        device = self.wkv.device
        if overwrite and len(index) == len(self):
            moved = (index != torch.arange(len(index), device=index.device)).nonzero().squeeze(1)
            sources, moved = index[moved].to(device), moved.to(device)
            for part in vars(self).values():
                for layer in part:  # one by one: what is on the move stays small, a fifth of the time on the CPU
                    layer.index_copy_(0, moved, layer.index_select(0, sources))
            return self
        index = index.to(device)
        return self._map(lambda x: x.index_select(1, index))

    def repeat(self, n: int) -> "RWKV7State":
        """Every row n times in succession: N rows become N * n."""
        return self._map(lambda x: x.repeat_interleave(n, dim=1))

    @classmethod
    def cat(cls, states: Sequence["RWKV7State"]) -> "RWKV7State":
        """The rows of all ``states``, one state's after the other's."""
        return RWKV7State(*(torch.cat(parts, dim=1) for parts in zip(*(vars(s).values() for s in states), strict=True)))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for ``from_tensors`` and for files."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "RWKV7State":
        """From what ``tensors`` gave."""
        return cls(**tensors)

    def detach(self) -> "RWKV7State":
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> "RWKV7State":
        return self._map(lambda x: x.to(device))

    def cpu(self) -> "RWKV7State":
        return self.to("cpu")

    @classmethod
    def of_wkv(cls, wkv: Tensor) -> "RWKV7State":
        """The state of one row with a tuned `wkv` (layers, H, V, K): as if nothing had been read before."""
        layers, heads, channels, _ = wkv.shape
        shift = wkv.new_zeros(layers, 1, heads * channels)
        return cls(shift, shift.clone(), wkv.unsqueeze(1))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; a file of this name is replaced only once the new one is complete.

        A name ending in .pth is written as RWKV-PEFT's tuned state, in float32.

        Raises:
          UserError: a .pth file has no place for this state, which is of several rows, or of a text that was read.
        """
        path = Path(path)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors().items()}
        if path.suffix == ".pth":
            if len(self) != 1 or self.att_shift.any() or self.ffn_shift.any():
                raise UserError(
                    f"{path}: only a tuned state of one row can be written so: RWKV-PEFT's file has no place for the "
                    "last token of a text that was read; end the name in .safetensors"
                )
            wkv = tensors["wkv"].squeeze(1)
            with replaced_file(path) as tmp:
                torch.save(dict(zip(time_state_names(len(wkv)), wkv.clone(), strict=True)), tmp)
            return
        with replaced_file(path) as tmp:
            save_file(tensors, tmp)

    @classmethod
    def load(cls, path: str | Path) -> "RWKV7State":
        """Reads what ``save`` wrote, or RWKV-PEFT's tuned state, to the CPU.

        Raises:
          UserError: the file is not a state.
        """
        if zipfile.is_zipfile(path):
            return cls._load_pth(path)
        try:
            tensors = load_file(path)
        except SafetensorError as e:
            raise UserError(f"{path}: not a safetensors file ({e})") from e
        names = list(cls.__dataclass_fields__)
        if sorted(tensors) != sorted(names):
            raise UserError(
                f"{path}: not an RWKV-7 state: it holds {', '.join(sorted(tensors)[:4])}, ...; expected "
                f"{', '.join(names)}. A whole model or an adapter in this format is given as the folder that it is in"
            )
        return cls(**tensors)

    @classmethod
    def _load_pth(cls, path: str | Path) -> "RWKV7State":
        weights = read_rwkv_pth(path)
        wkv = tuned_wkv(weights, path, remove=True)
        if wkv is None:
            raise UserError(
                f"{path}: not a tuned state: it holds {', '.join(sorted(weights)[:4])}, ...; expected "
                "blocks.N.att.time_state of each layer"
            )
        if weights:
            raise UserError(
                f"{path}: holds more than a tuned state ({', '.join(sorted(weights)[:4])}, ...): a whole model is "
                "given as llm.path, an adapter as llm.adapter"
            )
        return cls.of_wkv(wkv)
