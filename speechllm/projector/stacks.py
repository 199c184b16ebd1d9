"""A weighted sum of what all stacks of an encoder give, in place of its output alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechllm.projector.base import Projector


class WeightedStacks(Projector):
    """A projector behind a weighted sum of S stacks' outputs; the weights are a learned softmax, all equal at first.

    It is how SUPERB (arXiv 2105.01051, section 3) makes use of all layers of an encoder.
    """

    def __init__(self, num_stacks: int, projector: Projector) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_stacks))
        self.projector = projector
        self.downsample = projector.downsample

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return self.projector.output_lens(lens)

    def forward(self, stack_outs: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(S, N, T, D_enc), (N,) -> `audio_embeds` (N, T', D_llm) and their lengths (N,)."""
        weights = self.scores.softmax(0).to(stack_outs.dtype)
        return self.projector(torch.einsum("s,sntd->ntd", weights, stack_outs), encoder_out_lens)
