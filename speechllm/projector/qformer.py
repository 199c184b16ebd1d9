"""Window-level Q-Former (SALMONN, arXiv 2310.13289; the Q-Former is that of BLIP-2, arXiv 2301.12597): learned queries
attend to the frames of one window after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.projector import frames
from speechllm.projector.base import Projector


class QFormerProjector(Projector):
    """Q queries for each window of W = Q * k frames. T' = ceil(T / k).

    Of a last window with fewer than W frames, r of them, the first ceil(r / k) queries make a position: so every kind
    of projector has the same number of positions. SALMONN has Q = 1 and W = 17 frames of 20 ms, and leaves out a last
    window that is not whole. The frames of a window have learned position embeddings, as a Zipformer's outputs have
    none of their own.

    BLIP-2 normalizes after each sum, but starts from BERT. From random numbers that did not learn to pass on what is
    said (recipes/digits, short strings, 600 steps); the norm before each attention and feed-forward did.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        downsample: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        num_queries: int,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.in_proj = nn.Linear(input_dim, hidden_dim)
        self.in_norm = nn.LayerNorm(hidden_dim)
        self.frame_positions = nn.Parameter(0.02 * torch.randn(num_queries * downsample, hidden_dim))
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, hidden_dim))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                hidden_dim, num_heads, 4 * hidden_dim, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, output_dim)

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return frames.output_lens(lens, self.downsample)

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, ceil(T / k), D_llm) and their lengths (N,)."""
        n, t, _ = encoder_out.shape
        window, hidden_dim = self.frame_positions.shape
        x = self.in_norm(self.in_proj(frames.masked(encoder_out, encoder_out_lens)))
        x = F.pad(x, (0, 0, 0, -t % window)).reshape(-1, window, hidden_dim) + self.frame_positions.to(x.dtype)
        is_frame = frames.within(encoder_out_lens, t + -t % window).view(-1, window)
        # A window beyond an utterance has one frame to look at all the same: nothing at all would give NaN.
        is_frame = torch.cat([torch.ones_like(is_frame[:, :1]), is_frame[:, 1:]], dim=1)
        queries = self.queries.to(x.dtype).expand(len(x), -1, -1)
        for layer in self.layers:
            queries = layer(queries, x, memory_key_padding_mask=~is_frame)
        positions = -(-t // self.downsample)
        queries = self.out_proj(self.out_norm(queries))
        audio_embeds = queries.view(n, -1, self.out_proj.out_features)[:, :positions]
        return audio_embeds, self.output_lens(encoder_out_lens)
