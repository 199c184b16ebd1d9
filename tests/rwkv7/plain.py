"""RWKV-7 (x070) as plainly as PyTorch allows: what tests and benches compare ``speechllm.rwkv7.RWKV7`` with.

Formulas of arXiv 2503.14456, parameter names of https://github.com/BlinkDL/RWKV-LM (RWKV-v7); autograd goes
through everything, position by position where the model is recurrent.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.rwkv7 import RWKV7Config


def shift(x: Tensor) -> Tensor:
    """(N, L, D) -> the same one position later, zeros first."""
    return F.pad(x, (0, 0, 1, -1))


class PlainTimeMix(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        D, ranks = config.n_embd, config.lora_ranks
        self.heads = (D // config.head_size, config.head_size)
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, D)))
        for name, rank in {"w": "decay", "a": "a", "v": "v", "g": "gate"}.items():
            if name == "v" and layer == 0:
                continue
            if name != "g":
                self.register_parameter(f"{name}0", nn.Parameter(torch.empty(1, 1, D)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(D, ranks[rank])))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(ranks[rank], D)))
        self.r_k = nn.Parameter(torch.empty(self.heads))
        self.receptance, self.key, self.value, self.output = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(self.heads[0], D, eps=64e-5)

    def forward(self, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (N, L, D), the first layer's values or None in that layer -> out (N, L, D), the first layer's values"""
        previous = shift(x)
        xr, xw, xk, xv, xa, xg = (
            torch.lerp(x, previous, mix) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(self.w0 + torch.tanh(xw @ self.w1) @ self.w2))
        rate = torch.sigmoid(self.a0 + xa @ self.a1 @ self.a2)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2))
        kk = F.normalize((k * self.k_k).unflatten(-1, self.heads), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r, w, k, v_heads, rate = (z.unflatten(-1, self.heads) for z in (r, w, k, v, rate))

        S = x.new_zeros(x.shape[0], self.heads[0], self.heads[1], self.heads[1])  # (N, H, V, K)
        y = []
        for t in range(x.shape[1]):
            removed = (S @ -kk[:, t].unsqueeze(-1)) @ (kk[:, t] * rate[:, t]).unsqueeze(-2)
            added = v_heads[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
            S = S * w[:, t].unsqueeze(-2) + removed + added
            y.append((S @ r[:, t].unsqueeze(-1)).squeeze(-1))
        y = self.ln_x(torch.stack(y, dim=1).flatten(2).flatten(0, 1)).view_as(x)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v_heads
        return self.output((y + bonus.flatten(2)) * gate), v_first


class PlainChannelMix(nn.Module):
    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(F.relu(self.key(torch.lerp(x, shift(x), self.x_k))) ** 2)


class PlainBlock(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.att, self.ffn = PlainTimeMix(config, layer), PlainChannelMix(config)


class PlainRWKV7(nn.Module):
    """The model without its weights: ``load_state_dict`` those of a ``RWKV7`` of the same ``config``."""

    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config, i) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (N, L) -> logits (N, L, V)."""
        x, v_first = self.blocks[0].ln0(self.emb(input_ids)), None
        for block in self.blocks:
            out, v_first = block.att(block.ln1(x), v_first)
            x = x + out
            x = x + block.ffn(block.ln2(x))
        return self.head(self.ln_out(x))
