"""The projector: encoder frames at 25 Hz -> language-model embeddings at 12.5 Hz.

Concatenating k frames and an MLP over them is the projector of SLAM-ASR (arXiv 2402.08846) and of icefall's
ASR_LLM recipe; SwooshR is the Zipformer's own activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speechllm.encoder.scaling import swoosh_r


@dataclass
class ProjectorConfig:
    """`downsample`: encoder frames per audio position (k); `hidden_dim`: width between, null for the output's."""

    downsample: int = 2
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        if self.downsample < 1:
            raise ValueError(f"downsample must be at least 1, got {self.downsample}")


class Projector(nn.Module):
    """k consecutive frames -> Linear -> SwooshR -> Linear -> one audio position.

    A tail of fewer than k frames is completed with zeros, so no frame is lost: T' = ceil(T / k).
    """

    def __init__(self, config: ProjectorConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.downsample = config.downsample
        hidden_dim = config.hidden_dim or output_dim
        self.in_proj = nn.Linear(input_dim * config.downsample, hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, output_dim)

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return (lens + self.downsample - 1) // self.downsample

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, ceil(T / k), D_llm) and their lengths (N,)."""
        n, t, d = encoder_out.shape
        k = self.downsample
        # What lies beyond a row's length must not enter its last position.
        mask = torch.arange(t, device=encoder_out.device)[None, :] < encoder_out_lens[:, None]
        x = encoder_out.masked_fill(~mask[..., None], 0.0)
        x = nn.functional.pad(x, (0, 0, 0, -t % k)).reshape(n, -1, d * k)
        return self.out_proj(swoosh_r(self.in_proj(x))), self.output_lens(encoder_out_lens)
