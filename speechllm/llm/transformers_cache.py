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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

# By what they keep; of all others (such as attention in chunks) the places would have to be absolute positions.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
STATELESS_LAYERS = {"mlp", "moe"}


# Room for at least so many places, and for this share of those that there are, is behind keys and values that grow.
_ROOM = 32
_ROOM_SHARE = 0.25

# Padding in front may be this share of the places before it is worth a copy of everything to be rid of it.
_PADDING_SHARE = 0.25


class LayerState(NamedTuple):
    """What one layer keeps.

    Attributes:
      attention: keys and values (N, heads, S, D); nothing in a layer without attention.
      recurrent: states of convolutions and recurrences (N, ...), None where the layer uses only one of the two; nothing
        in a layer without recurrence.
      buffers: keys and values (N, heads, S + room, D) of which `attention` is the first S places, and which no other
        state has; nothing if there is no room.
    """

    attention: tuple[Tensor, ...] = ()
    recurrent: tuple[Tensor | None, ...] = ()
    buffers: tuple[Tensor, ...] = ()


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
        """The rows at `index` (M,), in this order, without places that are padding in all of them.

        With `overwrite` and not more rows than before, keys and values of those alone that are not in their place are
        copied, in the memory of this state, which nothing else may hold then; a few places of padding may stay.
        """
        lens = self.lens[index.cpu()]
        unused = max(0, self.places - int(lens.max()))
        if overwrite and len(index) <= len(self) and unused <= _PADDING_SHARE * self.places:
            return self._moved(index.cpu(), lens)
        index = index.to(self._device)
        layers = (
            LayerState(
                tuple(x[:, :, unused:].index_select(0, index) for x in layer.attention),
                tuple(None if x is None else x.index_select(0, index) for x in layer.recurrent),
            )
            for layer in self.layers
        )
        return TransformersState(tuple(layers), lens)

    def _moved(self, index: Tensor, lens: Tensor) -> TransformersState:
        """The rows at `index`, in the memory of this state."""
        rows, device = len(index), self._device
        moved = (index != torch.arange(rows)).nonzero().squeeze(1)
        sources, moved, index = index[moved].to(device), moved.to(device), index.to(device)
        layers = []
        for layer in self.layers:
            for x in layer.attention if len(moved) else ():
                x.index_copy_(0, moved, x.index_select(0, sources))
            layers.append(
                LayerState(
                    tuple(x[:rows] for x in layer.attention),
                    tuple(None if x is None else x.index_select(0, index) for x in layer.recurrent),
                    tuple(x[:rows] for x in layer.buffers),
                )
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
            for kind, part in (("attention", layer.attention), ("recurrent", layer.recurrent))
            for j, x in enumerate(part)
            if x is not None
        }
        counts = torch.tensor([[len(layer.attention), len(layer.recurrent)] for layer in self.layers])
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
        return next(x.device for layer in self.layers for x in (*layer.attention, *layer.recurrent) if x is not None)


def _pad_front(x: Tensor, places: int) -> Tensor:
    return F.pad(x, (0, 0, places - x.shape[2], 0))


def has_recurrence(config: PreTrainedConfig) -> bool:
    """Whether some layer keeps a state of fixed size."""
    return not RECURRENT_LAYERS.isdisjoint(getattr(config, "layer_types", None) or ())


def new_cache(config: PreTrainedConfig, state: TransformersState | None = None, overwrite: bool = False) -> Cache:
    """A cache for a model to go on with from `state`, or from nothing.

    It keeps everything, of layers with a sliding window too: their masks leave out what is too far away.

    Args:
      overwrite: recurrent states may be written into, and places behind keys and values, as nothing else holds them.
    """
    from transformers import DynamicCache

    if not has_recurrence(config):
        if state is None or not overwrite:
            return DynamicCache() if state is None else DynamicCache([layer.attention for layer in state.layers])
        cache = DynamicCache()
        cache.layers = [_appending()(layer) for layer in state.layers]
        return cache
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
        if overwrite and state is not None and type(cache.layers[i]) is DynamicLayer and state.layers[i].attention:
            cache.layers[i] = _appending()(state.layers[i])
    for layer, before in zip(cache.layers, () if state is None else state.layers, strict=state is not None):
        if before.attention and not isinstance(layer, _appending()):
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


@functools.cache
def _appending() -> type:
    """A kind of layers of a cache whose keys and values go on in room behind those of a `LayerState`; where there is
    none they are copied to where there is."""
    from transformers.cache_utils import DynamicLayer

    class Appending(DynamicLayer):
        def __init__(self, before: LayerState) -> None:
            super().__init__()
            self.keys, self.values = before.attention
            self.buffers = before.buffers
            self.dtype, self.device = self.keys.dtype, self.keys.device
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Any:
            places = self.keys.shape[2]
            after = places + key_states.shape[2]
            if not self.buffers or self.buffers[0].shape[2] < after:
                self.buffers = _with_room(self.keys, after), _with_room(self.values, after)
            keys, values = self.buffers
            keys[:, :, places:after], values[:, :, places:after] = key_states, value_states
            self.keys, self.values = keys[:, :, :after], values[:, :, :after]
            return self.keys, self.values

    return Appending


def _with_room(x: Tensor, places: int) -> Tensor:
    """Keys or values, in memory for `places` and more."""
    buffer = x.new_empty(*x.shape[:2], places + max(_ROOM, int(_ROOM_SHARE * places)), x.shape[3])
    buffer[:, :, : x.shape[2]] = x
    return buffer


def cached(cache: Cache) -> tuple[LayerState, ...]:
    """What is in a cache that a model has filled: keys and values of S places, and recurrent states."""
    return tuple(
        LayerState(
            () if getattr(layer, "keys", None) is None else (layer.keys, layer.values),
            (*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()),
            getattr(layer, "buffers", ()),
        )
        for layer in cache.layers
    )


def state_after(cache: Cache, valid: Tensor, before: TransformersState | None) -> TransformersState:
    """The state with the places that `cache` has now: those of `before`, then L of which `valid` (N, L) count, the
    first ones of each row."""
    read = valid.sum(1)
    lens = read if before is None else before.lens + read
    state = TransformersState(cached(cache), lens)
    behind = valid.shape[1] - read
    if not behind.any():
        return state
    # the last position of each row moves to the last place
    places, longest = state.places, int(lens.max())
    index = (torch.arange(places - longest, places) - behind[:, None]).clamp(min=0).to(state._device)

    def move(x: Tensor) -> Tensor:
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    layers = (LayerState(tuple(map(move, layer.attention)), layer.recurrent) for layer in state.layers)
    return TransformersState(tuple(layers), lens)
