"""RWKV-7 blocks over the audio, the design of the public `rwkv_asr` (https://github.com/yynil/RWKVTTS): an RWKV-7 reads
the audio, and a linear layer takes its hidden states to the language model's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechllm.projector import frames
from speechllm.projector.base import Projector
from speechllm.rwkv7 import RWKV7Config, RWKV7Layers


class RWKVProjector(Projector):
    """k consecutive frames -> Linear -> RWKV-7 blocks -> Linear -> one audio position. T' = ceil(T / k).

    Bidirectional, a second stack of blocks reads each utterance from its own end, and the last layer sees both.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        downsample: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.in_proj = nn.Linear(input_dim * downsample, hidden_dim)
        sizes = RWKV7Config(num_layers, hidden_dim, vocab_size=1, head_size=hidden_dim // num_heads)
        self.forwards = RWKV7Layers(sizes)
        self.backwards = RWKV7Layers(sizes) if bidirectional else None
        self.out_proj = nn.Linear((1 + bidirectional) * hidden_dim, output_dim)

    def output_lens(self, lens: Tensor) -> Tensor:
        """Audio positions (N,) for `lens` (N,) encoder frames."""
        return frames.output_lens(lens, self.downsample)

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D_enc), (N,) -> `audio_embeds` (N, ceil(T / k), D_llm) and their lengths (N,)."""
        x = self.in_proj(frames.side_by_side(encoder_out, encoder_out_lens, self.downsample))
        lens = self.output_lens(encoder_out_lens)
        out = self.forwards(x, lens)
        if self.backwards is not None:
            from_end = _reversed(self.backwards(_reversed(x, lens), lens), lens)
            out = torch.cat((out, from_end), dim=-1)
        return self.out_proj(out), lens


def _reversed(x: Tensor, lens: Tensor) -> Tensor:
    """x (N, L, D), each row reversed within its own length; beyond it, its first position."""
    index = (lens[:, None] - 1 - torch.arange(x.shape[1], device=x.device)).clamp_min(0)
    return x.gather(1, index[..., None].expand_as(x))
