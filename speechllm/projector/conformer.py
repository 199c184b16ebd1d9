"""A Conformer encoder (arXiv 2005.08100) between encoder and language model, on k frames side by side.

Two things differ from the paper. Positions are sinusoids added to the input, as of the Transformer here. In the
convolution a layer norm takes the place of the batch norm, which would make an utterance's output depend on its batch;
and as every module normalizes its input, the stack is normalized once at its end, not each block.
"""

from __future__ import annotations

from torch import Tensor, nn

from speechllm.projector.transformer import TransformerProjector

# Of Fast Conformer (arXiv 2305.05084), for frames of 80 ms: those of k = 2.
_KERNEL_SIZE = 9


class ConformerProjector(TransformerProjector):
    """k consecutive frames -> Linear -> Conformer blocks -> Linear; T' = ceil(T / k)."""

    @staticmethod
    def layer(dim: int, num_heads: int) -> nn.Module:
        return ConformerLayer(dim, num_heads)


class ConformerLayer(nn.Module):
    """Half a feed-forward module, self-attention, convolution, the other half; each is added to its input."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.feed_forward1 = _feed_forward(dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.convolution = Convolution(dim)
        self.feed_forward2 = _feed_forward(dim)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        """(N, T, D), (N, T) bool, true where padding is -> (N, T, D)."""
        x = x + 0.5 * self.feed_forward1(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=src_key_padding_mask, need_weights=False)[0]
        x = x + self.convolution(x, src_key_padding_mask)
        return x + 0.5 * self.feed_forward2(x)


class Convolution(nn.Module):
    """Pointwise with a gate, depthwise over time, norm, SiLU, pointwise; what is padding counts as silence."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, _KERNEL_SIZE, padding="same", groups=dim)
        self.depthwise_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(N, T, D), (N, T) bool -> (N, T, D)."""
        x = nn.functional.glu(self.in_proj(self.norm(x))).masked_fill(padding[..., None], 0.0)
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.out_proj(nn.functional.silu(self.depthwise_norm(x)))


def _feed_forward(dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
