"""The recurrent state of RWKV-7: what a model remembers of everything it has read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechllm.files import replaced_file


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

    @staticmethod
    def cat(states: Sequence["RWKV7State"]) -> "RWKV7State":
        """The rows of all ``states``, one state's after the other's."""
        return RWKV7State(*(torch.cat(parts, dim=1) for parts in zip(*(vars(s).values() for s in states), strict=True)))

    def detach(self) -> "RWKV7State":
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> "RWKV7State":
        return self._map(lambda x: x.to(device))

    def cpu(self) -> "RWKV7State":
        return self.to("cpu")

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; a file of this name is replaced only once the new one is complete."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in self.__dataclass_fields__}
        with replaced_file(path) as tmp:
            save_file(tensors, tmp)

    @classmethod
    def load(cls, path: str | Path) -> "RWKV7State":
        """Reads what ``save`` wrote, to the CPU.

        Raises:
          ValueError: the file is not a state.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as e:
            raise ValueError(f"{path}: not a safetensors file ({e})") from e
        names = list(cls.__dataclass_fields__)
        if sorted(tensors) != sorted(names):
            raise ValueError(f"{path}: not an RWKV-7 state: it holds {sorted(tensors)[:8]}, expected {names}")
        return cls(**tensors)
