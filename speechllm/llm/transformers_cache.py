"""What a language model of transformers has read: a state that can be reordered, and the cache that its layers fill.

Layers of attention keep keys and values, with the padding in FRONT of each row: so there is no hole between what was
read and what is read next, and a distance between two places is one between two tokens, which is what causal masks,
sliding windows and position ids are about. Layers of linear attention, state space models and short convolutions keep
a state of fixed size, in which there is no place for padding: it must not be read at all.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

# By what they keep; of all others (such as attention in chunks) the places would have to be absolute positions.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
STATELESS_LAYERS = {"mlp", "moe"}


class LayerState(NamedTuple):
    """What one layer keeps.

    Attributes:
      attention: keys and values (N, heads, S, D); nothing in a layer without attention.
      recurrent: states of convolutions and recurrences (N, ...), None where the layer uses only one of the two; nothing
        in a layer without recurrence.
    """

    attention: tuple[Tensor, ...] = ()
    recurrent: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class TransformersState:
    """The states of N rows, whose keys and values are at the last `lens[i]` of S places; before them is padding.

    Attributes:
      layers: of each layer.
      lens: (N,) how many positions each row has read, on the CPU.
    """

    layers: tuple[LayerState, ...]
    lens: Tensor

    def __len__(self) -> int:
        """The number of rows N."""
        return len(self.lens)

    @property
    def places(self) -> int:
        """S; 0 if no layer has attention."""
        return next((layer.attention[0].shape[2] for layer in self.layers if layer.attention), 0)

    def select(self, index: Tensor, overwrite: bool = False) -> TransformersState:
        """The rows at `index` (M,), in this order, without places that are padding in all of them."""
        lens = self.lens[index.cpu()]
        unused = max(0, self.places - int(lens.max()))
        index = index.to(self._device)
        layers = (
            LayerState(
                tuple(x[:, :, unused:].index_select(0, index) for x in layer.attention),
                tuple(None if x is None else x.index_select(0, index) for x in layer.recurrent),
            )
            for layer in self.layers
        )
        return TransformersState(tuple(layers), lens)

    def repeat(self, n: int) -> TransformersState:
        """Every row n times in succession: N rows become N * n."""
        layers = (
            LayerState(
                tuple(x.repeat_interleave(n, dim=0) for x in layer.attention),
                tuple(None if x is None else x.repeat_interleave(n, dim=0) for x in layer.recurrent),
            )
            for layer in self.layers
        )
        return TransformersState(tuple(layers), self.lens.repeat_interleave(n))

    @classmethod
    def cat(cls, states: Sequence[TransformersState]) -> TransformersState:
        """The rows of all `states`, one state's after the other's."""
        places = max(state.places for state in states)
        layers = []
        for parts in zip(*(state.layers for state in states), strict=True):
            attention = zip(*(layer.attention for layer in parts), strict=True)
            recurrent = zip(*(layer.recurrent for layer in parts), strict=True)
            layers.append(
                LayerState(
                    tuple(torch.cat([_pad_front(x, places) for x in xs]) for xs in attention),
                    tuple(None if xs[0] is None else torch.cat(xs) for xs in recurrent),
                )
            )
        return TransformersState(tuple(layers), torch.cat([state.lens for state in states]))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for `from_tensors` and for files."""
        tensors = {
            f"{i}.{kind}.{j}": x
            for i, layer in enumerate(self.layers)
            for kind, part in layer._asdict().items()
            for j, x in enumerate(part)
            if x is not None
        }
        counts = torch.tensor([[len(part) for part in layer] for layer in self.layers])
        return tensors | {"lens": self.lens, "counts": counts}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TransformersState:
        """From what `tensors` gave."""
        layers = (
            LayerState(
                tuple(tensors[f"{i}.attention.{j}"] for j in range(attention)),
                tuple(tensors.get(f"{i}.recurrent.{j}") for j in range(recurrent)),
            )
            for i, (attention, recurrent) in enumerate(tensors["counts"].tolist())
        )
        return cls(tuple(layers), tensors["lens"])

    @property
    def _device(self) -> torch.device:
        return next(x.device for layer in self.layers for part in layer for x in part if x is not None)


def _pad_front(x: Tensor, places: int) -> Tensor:
    return F.pad(x, (0, 0, places - x.shape[2], 0))


def has_recurrence(config: PreTrainedConfig) -> bool:
    """Whether some layer keeps a state of fixed size."""
    return not RECURRENT_LAYERS.isdisjoint(getattr(config, "layer_types", None) or ())


def new_cache(config: PreTrainedConfig, state: TransformersState | None = None, overwrite: bool = False) -> Cache:
    """A cache for a model to go on with from `state`, or from nothing.

    It keeps everything, of layers with a sliding window too: their masks leave out what is too far away.

    Args:
      overwrite: recurrent states may be written into, as nothing else holds them.
    """
    from transformers import DynamicCache

    if not has_recurrence(config):
        return DynamicCache() if state is None else DynamicCache([layer.attention for layer in state.layers])
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )

    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            has_attention = isinstance(layer, DynamicLayer)
            kind = _assigning(LinearAttentionAndFullAttentionLayer if has_attention else LinearAttentionLayer)
            cache.layers[i] = kind(number_of_states=layer.number_of_states)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = DynamicLayer()
    for layer, before in zip(cache.layers, () if state is None else state.layers, strict=state is not None):
        if before.attention:
            layer.update(*before.attention)
        conv_and_recurrent = (
            before.recurrent[: len(before.recurrent) // 2],
            before.recurrent[len(before.recurrent) // 2 :],
        )
        for number, (conv, recurrent) in enumerate(zip(*conv_and_recurrent, strict=True)):
            # kernels of single steps write into them
            conv, recurrent = (x if x is None or overwrite else x.clone() for x in (conv, recurrent))
            layer.lazy_initialization(conv_states=conv, recurrent_states=recurrent, state_idx=number)
            layer.conv_states[number], layer.recurrent_states[number] = conv, recurrent
            layer.has_previous_state[number] = True
    return cache


@functools.cache
def _assigning(kind: type) -> type:
    """A kind of layers of a cache whose recurrent states are replaced and not written into: what was there before is
    needed for the gradient."""

    class Assigning(kind):
        def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            self.is_recurrent_states_initialized[state_idx] = True
            return recurrent_states

    return Assigning


def cached(cache: Cache) -> tuple[LayerState, ...]:
    """What is in a cache that a model has filled: keys and values of S places, and recurrent states."""
    return tuple(
        LayerState(
            () if getattr(layer, "keys", None) is None else (layer.keys, layer.values),
            (*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()),
        )
        for layer in cache.layers
    )


def state_after(cache: Cache, valid: Tensor, before: TransformersState | None) -> TransformersState:
    """The state with the places that `cache` has now: those of `before`, then L of which `valid` (N, L) count, the
    first ones of each row."""
    read = valid.sum(1)
    lens = read if before is None else before.lens + read
    state = TransformersState(cached(cache), lens)
    places, longest = state.places, int(lens.max())
    # the last position of each row moves to the last place
    behind = valid.shape[1] - read
    index = (torch.arange(places - longest, places) - behind[:, None]).clamp(min=0).to(state._device)

    def move(x: Tensor) -> Tensor:
        if not behind.any():
            return x[:, :, places - longest :]
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    layers = (LayerState(tuple(map(move, layer.attention)), layer.recurrent) for layer in state.layers)
    return TransformersState(tuple(layers), lens)
