"""Frames of a padded batch: what is beyond the lengths, k side by side, positions in time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def output_lens(lens: Tensor, k: int) -> Tensor:
    """ceil(lens / k), (N,): how many groups of k frames there are, the last perhaps not whole."""
    return (lens + k - 1) // k


def within(lens: Tensor, t: int) -> Tensor:
    """(N,) -> (N, t) bool: true within the lengths."""
    return torch.arange(t, device=lens.device) < lens[:, None]


def masked(x: Tensor, lens: Tensor) -> Tensor:
    """x (N, T, D) with zeros beyond the lengths, whatever was there."""
    return x.masked_fill(~within(lens.to(x.device), x.shape[1])[..., None], 0.0)


def side_by_side(x: Tensor, lens: Tensor, k: int) -> Tensor:
    """(N, T, D) -> (N, ceil(T / k), k * D): k frames make one; what a group lacks, and what is padding, is zero."""
    n, t, d = x.shape
    return F.pad(masked(x, lens), (0, 0, 0, -t % k)).reshape(n, -1, d * k)


def sinusoids(t: int, dim: int, device: torch.device) -> Tensor:
    """(t, dim): the position encoding of the Transformer (arXiv 1706.03762, section 3.5), sines before cosines."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / half))
    angles = torch.arange(t, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :dim]


def one_after_another(embeds: Sequence[Tensor], lens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(N, T_i, D), (N,) of several projectors -> (N, T, D), (N,): each row's embeddings of all, without gaps.

    Every input is part of the result's graph, also where it gives no row anything: it gets a gradient, of zeros.
    """
    is_valid = torch.cat([within(n, x.shape[1]) for x, n in zip(embeds, lens, strict=True)], dim=1)
    joined_lens = is_valid.sum(1)
    order = (~is_valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(joined_lens.max())]
    joined = torch.cat(list(embeds), dim=1)
    return joined.gather(1, order[..., None].expand(-1, -1, joined.shape[2])), joined_lens
