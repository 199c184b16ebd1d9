"""What a causal Zipformer keeps of a stream from one chunk to the next: tensors of fixed sizes, whatever was heard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from speechllm.errors import UserError
from speechllm.files import replaced_file

# Of a layer: what it has made of the frames before, in the order of its modules.
LAYER_PARTS = ("key", "nonlin_value", "value1", "value2", "conv1", "conv2")


class LayerCache(dict[str, Tensor]):
    """What one layer keeps of the frames before a chunk, by the names in `LAYER_PARTS`, each (N, P, C).

    Attention reaches back P frames, a convolution half of its kernel.
    """

    def extend(self, part: str, x: Tensor) -> Tensor:
        """x (N, T, C) with the P frames before it, (N, P + T, C); the last P of these are kept for the next chunk."""
        before = self[part]
        x = torch.cat([before.to(x.dtype), x], dim=1)
        self[part] = x[:, x.shape[1] - before.shape[1] :].to(before.dtype)
        return x


@dataclass(frozen=True)
class ZipformerState:
    """Where N streams stand; made by `Zipformer.initial_state`, and anew by each `Zipformer.step`.

    Streams with the same chunk size and left context can be in one state, wherever each of them is.

    Attributes:
        chunk_size, left_context_frames: in frames of 20 ms; the latter a multiple of the former.
        frames: (N,) int64, how many frames of 20 ms each stream has behind it.
        front: (N, 3, F', C), what the front end's convolutions made of the last frames.
        layers: the caches of all layers, from the first stack to the last.
    """

    chunk_size: int
    left_context_frames: int
    frames: Tensor
    front: Tensor
    layers: tuple[LayerCache, ...]

    def __len__(self) -> int:
        """The number of streams N."""
        return len(self.frames)

    @property
    def nbytes(self) -> int:
        """How much memory all streams take together; the same for a stream of an hour as for one of a second."""
        return sum(t.nbytes for t in self.tensors().values())

    def select(self, indices: Tensor | Sequence[int]) -> ZipformerState:
        """The streams at `indices` (M,), in this order; one may be taken more than once or not at all."""
        indices = torch.as_tensor(indices, dtype=torch.long, device=self.frames.device)
        return self._map(lambda x: x.index_select(0, indices))

    @staticmethod
    def stack(states: Sequence[ZipformerState]) -> ZipformerState:
        """The streams of all `states`, one state's after the other's.

        Raises:
            ValueError: there is none, or they differ in chunk size or left context.
        """
        contexts = {(state.chunk_size, state.left_context_frames) for state in states}
        if len(contexts) != 1:
            raise ValueError(
                "states to be stacked must have one chunk size and left context, but have (chunk_size, "
                f"left_context_frames) {sorted(contexts)}"
            )
        if len(states) == 1:
            return states[0]
        parts = [state.tensors() for state in states]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return ZipformerState.from_tensors(tensors, *contexts.pop())

    def to(self, device: torch.device | str) -> ZipformerState:
        return self._map(lambda x: x.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as `save` writes them; the streams are along their first dimension."""
        layers = {f"layers.{i}.{part}": x for i, layer in enumerate(self.layers) for part, x in layer.items()}
        return {"frames": self.frames, "front": self.front} | layers

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], chunk_size: int, left_context_frames: int) -> ZipformerState:
        """From what `tensors` gave.

        Raises:
            KeyError: one is missing.
        """
        num_layers = (len(tensors) - 2) // len(LAYER_PARTS)
        layers = (LayerCache({part: tensors[f"layers.{i}.{part}"] for part in LAYER_PARTS}) for i in range(num_layers))
        return ZipformerState(chunk_size, left_context_frames, tensors["frames"], tensors["front"], tuple(layers))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; a file of this name is replaced only once the new one is complete."""
        metadata = {"chunk_size": str(self.chunk_size), "left_context_frames": str(self.left_context_frames)}
        with replaced_file(Path(path)) as tmp:
            save_file({name: x.cpu().contiguous() for name, x in self.tensors().items()}, tmp, metadata)

    @staticmethod
    def load(path: str | Path) -> ZipformerState:
        """Reads what `save` wrote, to the CPU.

        Raises:
            UserError: the file is not a state.
        """
        try:
            with safe_open(path, framework="pt") as file:
                context = (int((file.metadata() or {})[name]) for name in ("chunk_size", "left_context_frames"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                return ZipformerState.from_tensors(tensors, *context)
        except (SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{path}: not the state of a Zipformer's stream ({e})") from e

    def _map(self, f: Callable[[Tensor], Tensor]) -> ZipformerState:
        tensors = {name: f(x) for name, x in self.tensors().items()}
        return self.from_tensors(tensors, self.chunk_size, self.left_context_frames)
