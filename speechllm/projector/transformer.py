"""A Transformer encoder between encoder and language model, on k frames side by side: the audio adaptor of Fun-ASR
(arXiv 2509.12508), whose blocks follow the downsampling."""

from __future__ import annotations

from torch import Tensor, nn

from speechllm.projector import frames
from speechllm.projector.base import Projector


class TransformerProjector(Projector):
    """k consecutive frames -> Linear -> Transformer encoder (arXiv 1706.03762), normalized first -> Linear.

    T' = ceil(T / k). Positions are sinusoids, so that audio may be of any length.
    """

    def __init__(
        self, input_dim: int, output_dim: int, downsample: int, hidden_dim: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.in_proj = nn.Linear(input_dim * downsample, hidden_dim)
        self.layers = nn.ModuleList(self.layer(hidden_dim, num_heads) for _ in range(num_layers))
        self.out_norm = nn.LayerNorm(hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, output_dim)

    @staticmethod
    def layer(dim: int, num_heads: int) -> nn.Module:
        return nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return frames.output_lens(lens, self.downsample)

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, ceil(T / k), D_llm) and their lengths (N,)."""
        x = self.in_proj(frames.side_by_side(encoder_out, encoder_out_lens, self.downsample))
        x = x + frames.sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        lens = self.output_lens(encoder_out_lens)
        padding = ~frames.within(lens, x.shape[1])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.out_proj(self.out_norm(x)), lens
