"""Strided convolutions: the length adapter of Li et al. (arXiv 2010.12829), convolutions of stride 2 and kernel 3 with
gated linear units, here for any k."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.projector import frames
from speechllm.projector.base import Projector


class ConvProjector(Projector):
    """A convolution for each prime factor p of k, of stride p, then a linear layer. T' = ceil(T / k).

    The kernels have 2p - 1 frames, 3 at least, centered on each p-th frame: a position sees its neighbors too.
    """

    def __init__(self, input_dim: int, output_dim: int, downsample: int, hidden_dim: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.convs = nn.ModuleList()
        for stride in _prime_factors(downsample):
            kernel = max(2 * stride - 1, 3)
            self.convs.append(nn.Conv1d(input_dim, 2 * hidden_dim, kernel, stride, padding=kernel // 2))
            input_dim = hidden_dim
        self.out_proj = nn.Linear(hidden_dim, output_dim)

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return frames.output_lens(lens, self.downsample)

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, ceil(T / k), D_llm) and their lengths (N,)."""
        x, lens = encoder_out, encoder_out_lens
        for conv, stride in zip(self.convs, _prime_factors(self.downsample), strict=True):
            x = F.glu(conv(frames.masked(x, lens).transpose(1, 2)), dim=1).transpose(1, 2)
            lens = frames.output_lens(lens, stride)
        return self.out_proj(x), lens


def _prime_factors(k: int) -> list[int]:
    """12 -> [2, 2, 3]; of 1, 1 itself."""
    factors, p = [], 2
    while k > 1:
        if k % p == 0:
            factors.append(p)
            k //= p
        else:
            p += 1
    return factors or [1]
