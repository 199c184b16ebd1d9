"""The seam: what SpeechLLM and the searches ask of a language model, and no more.

`speechllm.rwkv7.RWKV7` implements it with its recurrent state, `speechllm.llm.transformers.TransformersLM` with the
keys and values of any causal language model of transformers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel
    from typing_extensions import Self

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

    def select(self, index: Tensor, overwrite: bool = False) -> Self:
        """Rows `index` (M,), in that order: beam reordering, dropping finished rows. With `overwrite` this state is
        given up.
        """

    def repeat(self, n: int) -> Self:
        """Each row `n` times, its copies side by side."""

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """The rows of all `states`, one state's after the other's: utterances that enter the batch."""

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, for `from_tensors` and for files."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From what `tensors` gave."""


_NO_STATE = "has_initial_state is False"

State = TypeVar("State", bound=LanguageModelState)


class LanguageModel(nn.Module, ABC, Generic[State]):
    """A decoder-only language model over embeddings."""

    checkpoint_blocks: bool
    """In training, compute activations again in the backward pass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages and model cards call it."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V."""

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """What computes one after the other, most of the model: what is sharded one by one."""

    @abstractmethod
    def untuned(self) -> Self:
        """A model of the same sizes, to be loaded: without values, and without an adapter."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D)."""

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: State | None = None,
        logits_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read (N, L) or (N, L, D), right-padded by `lens` (N,), from any state.

        Returns logits (N, L, V), or (K, V) for the K true positions of `logits_mask` (N, L) in row-major
        order, and the state at each row's own length.
        """

    @abstractmethod
    def loss(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], State | None]:
        """Summed cross entropy of `labels` (N, L), -100 where there is none; how many labels there are, and how many
        of them are the best guess. Its own method, because logits at every position need not exist for it, nor a
        state: None where keeping one has a price.
        """

    @abstractmethod
    def log_probs(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """The log probability of each of the K `labels` (N, L) that are not -100, in row-major order, float32 (K,); the
        logits are divided by `temperature`. For losses that need more than the sum that `loss` gives.
        """

    @abstractmethod
    def step(self, token_ids: Tensor, state: State, overwrite: bool = False) -> tuple[Tensor, State]:
        """One token per row, (N,) -> logits (N, V) and the new state. With `overwrite` the given state is given up."""


@dataclass
class Tuning:
    """What ``speechllm.llm.adapters.tune`` and ``load_adapter`` leave at a model."""

    peft: PeftModel | None  # no registered submodule of the model, which is one of its own
    quantized: bool = False
    replaces_base: bool = False  # what was loaded replaced weights of the base too, which no adapter folder holds
    originals: dict[str, Tensor] = field(default_factory=dict)  # base weights while the adapter is merged, by layer


class TunableModel(LanguageModel[State]):
    """What adapters, quantization and model folders ask of a language model besides.

    The initial state is what every text starts from: a parameter of some models (RWKV-7), of others there is none.
    """

    has_initial_state = False
    """Whether texts start from a state that can be trained; without, the four methods on it are not called."""

    tuning: Tuning | None = None
    """None of a model that was neither tuned nor given an adapter."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of its weights, in which it computes; adapters and an initial state are float32 all the same."""

    @abstractmethod
    def kept_in_float32(self) -> Collection[str]:
        """Parts of the names of weights that are float32 whatever `dtype` is."""

    @abstractmethod
    def adapter_root(self) -> nn.Module:
        """The module that ``peft`` puts an adapter on: its names are those of the adapter's files."""

    @abstractmethod
    def default_targets(self) -> list[str]:
        """The matrices of a layer that take an adapter when none are named."""

    @abstractmethod
    def tied_weights(self) -> dict[str, str]:
        """Names of weights that are another one under a second name, and the first name."""

    @abstractmethod
    def tie_weights(self) -> None:
        """Make one again what `tied_weights` names, after new tensors were assigned."""

    @property
    def initial_state_is_tuned(self) -> bool:
        """Whether the initial state is a parameter, as after `tune_initial_state` or `load_initial_state`."""
        return False

    def tune_initial_state(self) -> None:
        """Make the initial state a parameter that trains."""
        raise NotImplementedError(_NO_STATE)

    def save_initial_state(self, path: str | Path) -> None:
        """Write the initial state as a state file of one row."""
        raise NotImplementedError(_NO_STATE)

    def load_initial_state(self, path: str | Path, trainable: bool) -> None:
        """Make a state file the parameter that texts start from.

        Raises:
          UserError: the state is not one row of this model.
        """
        raise NotImplementedError(_NO_STATE)
