"""The seam: what SpeechLLM and the searches ask of a language model, and no more.

`speechllm.rwkv7.RWKV7` implements it with its recurrent state, `speechllm.llm.transformers.TransformersLM` with the
keys and values of any causal language model of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

IGNORE = -100  # of labels: no loss at this position; PyTorch's cross-entropy default

# The layers of RWKV-7 and of transformers are in lists: what follows the number is the name in a layer.
LAYER_NAME = re.compile(r".*?\.\d+\.(.+)")


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the `Conv1D` of transformers (GPT-2): a linear layer whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def is_matrix(module: nn.Module) -> bool:
    """Whether it is a linear layer, which an adapter can be put on."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def stacked_matrices(module: nn.Module) -> Iterator[str]:
    """Names of the module's own parameters that are stacks of matrices, as transformers keeps experts."""
    for name, parameter in module.named_parameters(recurse=False):
        if sum(size > 1 for size in parameter.shape) > 2 and not isinstance(module, nn.Conv1d):
            yield name


class LanguageModelState(Protocol):
    """Everything that a row has read so far; rows along the batch, N of them."""

    def __len__(self) -> int:
        """N."""
        ...

    def select(self, index: Tensor, overwrite: bool = False) -> LanguageModelState:
        """Rows `index` (M,), in that order: beam reordering, dropping finished rows. With `overwrite` this state is
        given up.
        """
        ...

    def repeat(self, n: int) -> LanguageModelState:
        """Each row `n` times, its copies side by side."""
        ...

    @staticmethod
    def cat(states: Sequence[LanguageModelState]) -> LanguageModelState:
        """The rows of all `states`, one state's after the other's: utterances that enter the batch."""
        ...


class LanguageModel(Protocol):
    """A decoder-only language model over embeddings."""

    name: str
    """What messages and model cards call it."""
    hidden_size: int
    vocab_size: int
    checkpoint_blocks: bool
    """In training, compute activations again in the backward pass."""

    def layers(self) -> list[nn.Module]:
        """What computes one after the other, most of the model: what is sharded one by one."""
        ...

    def untuned(self) -> LanguageModel:
        """A model of the same sizes, to be loaded: without values, and without an adapter."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D)."""
        ...

    def __call__(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: LanguageModelState | None = None,
        logits_mask: Tensor | None = None,
    ) -> tuple[Tensor, LanguageModelState]:
        """Read (N, L) or (N, L, D), right-padded by `lens` (N,), from any state.

        Returns logits (N, L, V), or (K, V) for the K true positions of `logits_mask` (N, L) in row-major
        order, and the state at each row's own length.
        """
        ...

    def loss(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: LanguageModelState | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], LanguageModelState | None]:
        """Summed cross entropy of `labels` (N, L), -100 where there is none; how many labels there are, and how many
        of them are the best guess. Its own method, because logits at every position need not exist for it, nor a
        state: None where keeping one has a price.
        """
        ...

    def step(
        self, token_ids: Tensor, state: LanguageModelState, overwrite: bool = False
    ) -> tuple[Tensor, LanguageModelState]:
        """One token per row, (N,) -> logits (N, V) and the new state. With `overwrite` the given state is given up."""
        ...


class TunableModel(LanguageModel, Protocol):
    """What adapters, quantization and model folders ask of a language model besides; all are an ``nn.Module`` too.

    The initial state is what every text starts from: a parameter of some models (RWKV-7), of others there is none.
    """

    dtype: torch.dtype
    """The type of its weights, in which it computes; adapters and an initial state are float32 all the same."""

    has_initial_state: bool
    """Whether texts start from a state that can be trained; without, the four methods on it are not called."""

    def kept_in_float32(self) -> Collection[str]:
        """Parts of the names of weights that are float32 whatever `dtype` is."""
        ...

    def adapter_root(self) -> nn.Module:
        """The module that ``peft`` puts an adapter on: its names are those of the adapter's files."""
        ...

    def default_targets(self) -> list[str]:
        """The matrices of a layer that take an adapter when none are named."""
        ...

    def tied_weights(self) -> dict[str, str]:
        """Names of weights that are another one under a second name, and the first name."""
        ...

    def tie_weights(self) -> None:
        """Make one again what `tied_weights` names, after new tensors were assigned."""
        ...

    @property
    def initial_state_is_tuned(self) -> bool:
        """Whether the initial state is a parameter, as after `tune_initial_state` or `load_initial_state`."""
        ...

    def tune_initial_state(self) -> None:
        """Make the initial state a parameter that trains."""
        ...

    def save_initial_state(self, path: str | Path) -> None:
        """Write the initial state as a state file of one row."""
        ...

    def load_initial_state(self, path: str | Path, trainable: bool) -> None:
        """Make a state file the parameter that texts start from.

        Raises:
          UserError: the state is not one row of this model.
        """
        ...
