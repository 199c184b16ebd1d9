"""k frames side by side and an MLP over them: the projector of SLAM-ASR (arXiv 2402.08846) and of icefall's ASR_LLM
recipe. SwooshR is the Zipformer's own activation."""

from __future__ import annotations

from torch import Tensor, nn

from speechllm.encoder.scaling import swoosh_r
from speechllm.projector import frames
from speechllm.projector.base import Projector


class MLPProjector(Projector):
    """k consecutive frames -> Linear -> SwooshR -> Linear -> one audio position. T' = ceil(T / k)."""

    def __init__(self, input_dim: int, output_dim: int, downsample: int, hidden_dim: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.in_proj = nn.Linear(input_dim * downsample, hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, output_dim)

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return frames.output_lens(lens, self.downsample)

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, ceil(T / k), D_llm) and their lengths (N,)."""
        x = frames.side_by_side(encoder_out, encoder_out_lens, self.downsample)
        return self.out_proj(swoosh_r(self.in_proj(x))), self.output_lens(encoder_out_lens)
