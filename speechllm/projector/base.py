"""What all projectors are."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Projector(nn.Module, ABC):
    """Encoder frames to embeddings of the language model.

    Attributes:
      downsample: encoder frames per audio position.
    """

    downsample: int

    @abstractmethod
    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""

    @abstractmethod
    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, T', D_llm) and their lengths (N,)."""
