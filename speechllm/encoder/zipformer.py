"""The Zipformer encoder: log-mel features in, embeddings at a quarter of the frame rate out.

"Zipformer: A faster and better encoder for automatic speech recognition" (Yao et al., arXiv 2310.11230), in
the form and with the parameter names of the encoders released by icefall and Auden. What differs from those:
an utterance's result does not depend on the batch it is in; every parameter gets a gradient in every step; and
`Whiten` acts on a fixed share of the batches, so that a resumed training needs no more than the batch count.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechllm.encoder import subsampling
from speechllm.encoder.scaling import (
    Balancer,
    BiasNorm,
    ScheduledFloat,
    Whiten,
    constant,
    dropout_mask,
    limit_parameter,
    penalize_large,
    scaled_linear,
    scheduled_floats,
    swoosh_l,
    swoosh_r,
)
from speechllm.encoder.zipformer_config import ZipformerConfig
from speechllm.encoder.zipformer_state import LAYER_PARTS, LayerCache, ZipformerState
from speechllm.linear import Linear


@dataclass
class Frames:
    """What all layers at one frame rate share about the frames of a batch; T counts them at that rate.

    In a stream T are the frames of the chunk, and S those and the ones before it that attention sees; else S is T.

    pos_emb: relative positions, (S + T - 1, pos_dim).
    attn_mask: added to attention scores, broadcasts with (N, T, S); None if nothing is masked.
    valid: (N, T, 1), 0 on padding, in the features' type; None if there is no padding.
    chunk: frames in a chunk of the causal convolution.
    edge_distance: from each frame to the first and to the last of its chunk, (N or 1, T); None if not
        causal.
    """

    pos_emb: Tensor
    attn_mask: Tensor | None
    valid: Tensor | None
    chunk: int
    edge_distance: tuple[Tensor, Tensor] | None


def relative_positions(num_queries: int, num_keys: int, dim: int, device: torch.device) -> Tensor:
    """Encodes how far a key is from a query, -(S - 1) to T - 1, with less resolution the further it is.

    T queries are the last frames of S keys. Offsets are compressed, first logarithmically and then by an arcus
    tangens, to a finite interval whose Fourier series is returned, (S + T - 1, dim); the last column is 1 and serves
    as a bias.
    """
    offset = torch.arange(1 - num_keys, num_queries, device=device, dtype=torch.float32)
    knee = math.sqrt(dim)
    compressed = knee * offset.sign() * (offset.abs() / knee).log1p()
    angle = (compressed * (2.0 * math.pi / dim)).atan()
    angles = angle[:, None] * torch.arange(1, dim // 2 + 1, device=device)
    encoding = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
    encoding[:, -1] = 1.0
    return encoding


_Number = TypeVar("_Number", int, Tensor)


def quotient_up(x: _Number, divisor: int) -> _Number:
    """x / divisor, rounded up, of x from 0 on: in ONNX the usual -(-x // divisor) is rounded down."""
    return (x + divisor - 1) // divisor


def keep_utterances(x: Tensor, skip_rate: float) -> Tensor | None:
    """What to multiply x (N, T, C) with to skip a module for some utterances, (N, 1, 1); None for rate 0."""
    if skip_rate == 0.0:
        return None
    return (torch.rand(len(x), 1, 1, device=x.device) >= skip_rate).to(x.dtype)


def whitening(limit: float, ratio: float = 2.0, grad_scale: float = 0.01, groups: int = 1) -> Whiten:
    """A `Whiten` whose limit grows by `ratio` over 20,000 batches."""
    return Whiten(ScheduledFloat((0.0, limit), (20000.0, ratio * limit)), grad_scale, groups)


@contextmanager
def _python_random_state(state: tuple) -> Iterator[None]:
    before = random.getstate()
    random.setstate(state)
    try:
        yield
    finally:
        random.setstate(before)


def _contexts_with_the_same_draws() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the first and the second run of a module; PyTorch's own generators `checkpoint` sees to itself."""
    return nullcontext(), _python_random_state(random.getstate())


def run(module: Callable[..., Tensor], *inputs: Any, checkpointed: bool) -> Tensor:
    """module(*inputs); if `checkpointed`, its activations are computed again in the backward pass.

    Both times the module draws the same random numbers, from PyTorch's generators and from Python's, and the
    second time leaves no trace in them.
    """
    if not checkpointed:
        return module(*inputs)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=_contexts_with_the_same_draws)


class AttentionWeights(nn.Module):
    """Multi-head attention weights, with relative positions. Three modules of a layer use them."""

    def __init__(self, dim: int, pos_dim: int, num_heads: int, query_head_dim: int, pos_head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_dim = num_heads * query_head_dim
        # The usual 1 / sqrt(head dim) is in the initial values of queries and keys.
        in_dim = (2 * query_head_dim + pos_head_dim) * num_heads
        self.in_proj = scaled_linear(dim, in_dim, initial_scale=query_head_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, num_heads * pos_head_dim, bias=False, initial_scale=0.05)
        self.pos_skip_rate = ScheduledFloat((0.0, 0.5), (4000.0, 0.0))
        # A constant added to all keys changes nothing, so nothing else would keep their bias from drifting
        # away.
        self.balance_keys = Balancer(0.4, 0.6, 0.0, 100.0, prob=0.025)
        self.whiten_keys = whitening(3.0, groups=num_heads, grad_scale=0.025)

    def forward(self, x: Tensor, frames: Frames, cache: LayerCache | None = None) -> Tensor:
        """(N, T, C) -> (heads, N, T, S), the last dimension sums to 1; of a softmax in float32."""
        n, t, _ = x.shape
        pos_dim = self.linear_pos.out_features
        query, key, pos_query = self.in_proj(x).split((self.query_dim, self.query_dim, pos_dim), dim=-1)
        key = _with_past(self.whiten_keys(self.balance_keys(key)), cache, "key")
        s = key.shape[1]
        use_positions = not self.training or random.random() >= self.pos_skip_rate.value
        if not use_positions:
            query = query + 0.0 * self.linear_pos.weight.sum()  # a gradient of 0 rather than none

        query, key = self.by_head(query), self.by_head(key)
        if use_positions:
            pos_query = self.by_head(pos_query).view(self.num_heads, n * t, -1)
            pos_key = self.linear_pos(frames.pos_emb[None])[0]
            pos_key = pos_key.view(s + t - 1, self.num_heads, -1).permute(1, 2, 0)
            if _can_overwrite() and x.device.type == "cpu" and not self.training:
                return self.weights_by_blocks(query, key, pos_query, pos_key, frames.attn_mask)
            # One product per head over all utterances, then each query's row is shifted to start at the first
            # key.
            by_offset = pos_query @ pos_key  # (heads, N T, S + T - 1)
            scores = torch.baddbmm(_by_key(by_offset, t, s), query, key.transpose(1, 2))
        else:
            scores = query @ key.transpose(1, 2)
        if self.training and random.random() < 0.1:
            scores = penalize_large(scores, limit=25.0, penalty=1e-4)  # a safety net: scores should be far smaller
        scores = scores.view(self.num_heads, n, t, s)
        if frames.attn_mask is not None:
            scores = scores + frames.attn_mask
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def weights_by_blocks(
        self, query: Tensor, key: Tensor, pos_query: Tensor, pos_key: Tensor, attn_mask: Tensor | None
    ) -> Tensor:
        """What `forward` gives, in the type of `query`: a block at a time, whose scores the processor's cache holds.

        A block has one head, and some utterances with all of their queries, or some queries of one utterance, which
        have fewer offsets to their keys than all queries have.

        Args:
            query: (heads N, T, C); key: (heads N, S, C).
            pos_query: (heads, N T, P); pos_key: (heads, P, S + T - 1); attn_mask: that of `Frames`.
        """
        rows, t, _ = query.shape
        s, heads = key.shape[1], self.num_heads
        n = rows // heads
        dtype = query.dtype  # under autocast what is kept of a stream is in another
        query, key = query.view(heads, n, t, -1), key.to(dtype).view(heads, n, s, -1)
        pos_query, pos_key = pos_query.to(dtype).view(heads, n, t, -1), pos_key.to(dtype).contiguous()
        mask = None if attn_mask is None else attn_mask.to(dtype).expand(n, t, s)
        weights = query.new_empty(heads, n, t, s)
        at_once = _SCORES_AT_ONCE * torch.get_num_threads()
        utterances = min(max(at_once // (t * s), 1), n)
        queries = min(max(at_once // s, _LEAST_QUERIES), t) if utterances == 1 else t
        # The same memory for all blocks, which is in the cache already.
        of_keys = query.new_empty(utterances * queries * s)
        of_offsets = query.new_empty(utterances * queries * (s + queries - 1))
        for head, first, start in itertools.product(range(heads), range(0, n, utterances), range(0, t, queries)):
            end = min(start + queries, t)
            block = slice(first, first + utterances), slice(start, end)
            out = weights[head][block]
            row = s + end - start - 1
            by_offset = of_offsets[: out.numel() // s * row].view(1, -1, row)
            offsets = pos_key[head : head + 1, :, t - end : s + t - 1 - start]
            torch.bmm(pos_query[head][block].reshape(1, -1, offsets.shape[1]), offsets, out=by_offset)
            scores = of_keys[: out.numel()].view(out.shape)
            torch.bmm(query[head][block], key[head, block[0]].transpose(1, 2), out=scores)
            scores += _by_key(by_offset, end - start, s)
            if mask is not None:
                scores += mask[block]
            torch.softmax(scores, -1, out=out)  # in float32 inside, whatever the type
        return weights

    def by_head(self, x: Tensor) -> Tensor:
        """(N, T, heads C) -> (heads N, T, C)"""
        n, t, _ = x.shape
        return x.view(n, t, self.num_heads, -1).permute(2, 0, 1, 3).reshape(self.num_heads * n, t, -1)


# Scores of a block, per thread: 1 MiB in float32, beside about as many of offsets. Products of fewer queries are slow.
_SCORES_AT_ONCE = 2**18
_LEAST_QUERIES = 16


def _by_key(by_offset: Tensor, t: int, s: int) -> Tensor:
    """Each query's row from where its first key is: (heads, N T, S + T - 1) -> (heads N, T, S), a view."""
    row = s + t - 1
    if torch._C._is_tracing():  # ONNX has no as_strided, whose gradient is the faster one
        rows = F.pad(by_offset, (0, 1)).reshape(-1, t * (row + 1))
        return rows[:, t - 1 : t - 1 + t * row].reshape(-1, t, row)[..., :s]
    return by_offset.as_strided((by_offset.numel() // (t * row), t, s), (t * row, row - 1, 1), t - 1)


def _can_overwrite() -> bool:
    """Whether no gradient is needed of what is computed now, nor a trace of it (for ONNX)."""
    return not torch.is_grad_enabled() and not torch._C._is_tracing()


def _added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in x's place where that is possible."""
    return x.add_(y) if _can_overwrite() else x + y


def attend(weights: Tensor, x: Tensor) -> Tensor:
    """Weighted sums over time: weights (heads, N, T, S), x (N, S, heads C) -> (N, T, heads C)"""
    heads, n, t, s = weights.shape
    x = x.view(n, s, heads, -1).permute(2, 0, 1, 3)
    return (weights.to(x.dtype) @ x).permute(1, 2, 0, 3).reshape(n, t, -1)


class SelfAttention(nn.Module):
    """Values, mixed by attention weights that several modules share."""

    def __init__(self, dim: int, num_heads: int, value_head_dim: int):
        super().__init__()
        self.in_proj = Linear(dim, num_heads * value_head_dim)
        self.out_proj = scaled_linear(num_heads * value_head_dim, dim, initial_scale=0.05)
        self.whiten = whitening(7.5, ratio=3.0)

    def forward(self, x: Tensor, weights: Tensor, cache: LayerCache | None = None, part: str = "value1") -> Tensor:
        """(N, T, C), (heads, N, T, S) -> (N, T, C); `part` of the cache is this module's."""
        value = _with_past(self.in_proj(x), cache, part)
        return self.whiten(self.out_proj(attend(weights, value)))


class NonlinAttention(nn.Module):
    """Attention with one head over a gated projection, gated again afterwards.

    In training the weights are at times made equal over all frames attended to, so that it learns to average.
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = 3 * dim // 4
        self.in_proj = Linear(dim, 3 * hidden)
        self.balancer = Balancer(
            ScheduledFloat((0.0, 0.25), (20000.0, 0.05)),
            ScheduledFloat((0.0, 0.75), (20000.0, 0.95)),
            0.5,
            5.0,
        )
        self.out_proj = scaled_linear(hidden, dim, initial_scale=0.05)
        self.whiten1 = whitening(5.0)
        self.whiten2 = whitening(5.0, ratio=3.0)
        self.const_attention_rate = ScheduledFloat((0.0, 0.25), (4000.0, 0.025))

    def forward(self, x: Tensor, weights: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(N, T, C), (heads, N, T, S) -> (N, T, C); the weights of the first head count."""
        weights = weights[:1]
        if self.training and random.random() < self.const_attention_rate.value:
            attended = (weights > 0.0).to(weights.dtype)  # masked frames have a weight of exactly 0
            weights = attended / attended.sum(-1, keepdim=True)
        gate, value, out_gate = self.in_proj(x).chunk(3, dim=-1)
        value = _with_past(self.whiten1(value) * self.balancer(gate).tanh(), cache, "nonlin_value")
        return self.whiten2(self.out_proj(attend(weights, value) * out_gate))


class FeedForward(nn.Module):
    """Two linear layers with SwooshL between them."""

    def __init__(self, dim: int, hidden: int, dropout: ScheduledFloat):
        super().__init__()
        self.in_proj = Linear(dim, hidden)
        self.hidden_balancer = Balancer(0.3, 1.0, 0.75, 5.0)
        self.out_proj = scaled_linear(hidden, dim, initial_scale=0.1)
        self.dropout = dropout
        self.out_whiten = whitening(7.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)"""
        x = swoosh_l(self.hidden_balancer(self.in_proj(x)), fresh=True)
        x = _masked(x, dropout_mask(x, self.dropout.value) if self.training else None)
        return self.out_whiten(self.out_proj(x))


def depthwise_conv(x: Tensor, conv: nn.Conv1d, padding: int) -> Tensor:
    """(N, T, C) -> (N, T', C). In 2-d, where channels can be last in memory: 4 times as fast on CPU."""
    x = x.transpose(1, 2).unsqueeze(2)
    x = F.conv2d(x, conv.weight.unsqueeze(2), conv.bias, padding=(0, padding), groups=conv.groups)
    return x.squeeze(2).transpose(1, 2)


class ChunkCausalConv(nn.Module):
    """A depthwise convolution that sees the past and its own chunk: one causal half, one within each chunk.

    Near a chunk's edges the latter lacks neighbors; it is scaled there, by learned amounts.
    """

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.causal_conv = nn.Conv1d(dim, dim, (kernel + 1) // 2, groups=dim)
        nn.init.uniform_(cast(Tensor, self.causal_conv.bias), -0.1, 0.1)
        self.chunkwise_conv = nn.Conv1d(dim, dim, kernel, groups=dim, padding=kernel // 2)
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, dim, kernel))

    def forward(self, x: Tensor, frames: Frames, cache: LayerCache | None = None, part: str = "conv1") -> Tensor:
        """(N, T, C) -> (N, T, C); T is a multiple of the chunk size. `part` of the cache is this module's."""
        n, t, c = x.shape
        kernel = self.chunkwise_conv.kernel_size[0]
        with_past = F.pad(x, (0, 0, kernel // 2, 0)) if cache is None else cache.extend(part, x)
        causal = depthwise_conv(with_past, self.causal_conv, 0)
        within = depthwise_conv(x.reshape(-1, frames.chunk, c), self.chunkwise_conv, kernel // 2).reshape(n, t, c)
        # The tables, (2, C, K), get an entry of 0 for frames that are a kernel or more away from the edge.
        edges = cast("tuple[Tensor, Tensor]", frames.edge_distance)  # which a causal model has
        from_left, from_right = (d.clamp(max=kernel) for d in edges)
        left, right = self.chunkwise_conv_scale
        left = F.pad(left.T, (0, 0, 0, 1))
        right = F.pad(right.T.flip(0), (0, 0, 0, 1))
        return causal + within * (1.0 + F.embedding(from_left, left) + F.embedding(from_right, right))


class ConvolutionModule(nn.Module):
    """A gated depthwise convolution over time."""

    def __init__(self, dim: int, kernel: int, causal: bool):
        super().__init__()
        self.in_proj = Linear(dim, 2 * dim)
        self.balancer1 = Balancer(
            ScheduledFloat((0.0, 0.05), (8000.0, 0.025)), 1.0, 1.5, ScheduledFloat((0.0, 5.0), (8000.0, 10.0))
        )
        self.depthwise_conv = (
            ChunkCausalConv(dim, kernel) if causal else nn.Conv1d(dim, dim, kernel, groups=dim, padding=kernel // 2)
        )
        self.balancer2 = Balancer(
            ScheduledFloat((0.0, 0.1), (8000.0, 0.05)), 1.0, ScheduledFloat((0.0, 0.2), (20000.0, 0.5)), 10.0
        )
        self.whiten = whitening(7.5)
        self.out_proj = scaled_linear(dim, dim, initial_scale=0.05)

    def forward(self, x: Tensor, frames: Frames, cache: LayerCache | None = None, part: str = "conv1") -> Tensor:
        """(N, T, C) -> (N, T, C); `part` of the cache is this module's."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = x * self.balancer1(gate).sigmoid()
        if frames.valid is not None:
            x = x * frames.valid
        conv = self.depthwise_conv
        if isinstance(conv, ChunkCausalConv):
            x = conv(x, frames, cache, part)
        else:
            x = depthwise_conv(x, conv, conv.kernel_size[0] // 2)
        return self.out_proj(swoosh_r(self.whiten(self.balancer2(x)), fresh=True))


class Bypass(nn.Module):
    """Interpolates between the input and the output of a module, per channel; may skip the module in
    training."""

    def __init__(self, dim: int, skip_rate: ScheduledFloat):
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))
        self.skip_rate = skip_rate
        # Early in training the output counts for nearly all, so that every module has to learn something.
        self.scale_min = ScheduledFloat((0.0, 0.9), (20000.0, 0.2))

    def forward(self, skipped: Tensor, x: Tensor) -> Tensor:
        """(N, T, C) twice -> (N, T, C)"""
        scale: Tensor = self.bypass_scale
        if self.training:
            scale = limit_parameter(scale, self.scale_min.value, 1.0)
            keep = keep_utterances(x, self.skip_rate.value)
            scale = scale if keep is None else scale * keep
        return torch.lerp(skipped, x, scale)


class ZipformerLayer(nn.Module):
    """Attention, convolution and feed-forward modules around one set of attention weights."""

    def __init__(self, config: ZipformerConfig, stack: int, skip_rate: ScheduledFloat, dropout: ScheduledFloat):
        super().__init__()
        dim = config.encoder_dim[stack]
        heads = config.num_heads[stack]
        hidden = config.feedforward_dim[stack]
        kernel = config.cnn_module_kernel[stack]
        self.self_attn_weights = AttentionWeights(
            dim, config.pos_dim, heads, config.query_head_dim[stack], config.pos_head_dim[stack]
        )
        self.self_attn1 = SelfAttention(dim, heads, config.value_head_dim[stack])
        self.self_attn2 = SelfAttention(dim, heads, config.value_head_dim[stack])
        self.feed_forward1 = FeedForward(dim, hidden * 3 // 4, dropout)
        self.feed_forward2 = FeedForward(dim, hidden, dropout)
        self.feed_forward3 = FeedForward(dim, hidden * 5 // 4, dropout)
        self.nonlin_attention = NonlinAttention(dim)
        self.conv_module1 = ConvolutionModule(dim, kernel, config.causal)
        self.conv_module2 = ConvolutionModule(dim, kernel, config.causal)
        self.norm = BiasNorm(dim)
        self.bypass = Bypass(dim, skip_rate)
        self.bypass_mid = Bypass(dim, constant(0.0))
        # Released models have this value and never use it; as a buffer it loads but is not trained.
        self.register_buffer("bypass_scale", torch.full((dim,), 0.5))

        self.dynamic_skip_rate = ScheduledFloat((0.0, 0.2), (4000.0, 0.05), (16000.0, 0.0))
        self.ff_skip_rate = ScheduledFloat((0.0, 0.1), (4000.0, 0.01), (50000.0, 0.0))
        self.balancer_na = Balancer(0.3, 0.7, ScheduledFloat((0.0, 0.004), (4000.0, 0.02)), 100.0, prob=0.05)
        self.balancer_ff2 = Balancer(0.3, 0.7, ScheduledFloat((0.0, 0.0), (4000.0, 0.1)), 2.0, prob=0.05)
        self.balancer_ff3 = Balancer(0.3, 0.7, ScheduledFloat((0.0, 0.0), (4000.0, 0.2)), 4.0, prob=0.05)
        self.balancer1 = Balancer(0.45, 0.55, 0.2, 4.0)
        self.balancer2 = Balancer(0.45, 0.55, 0.1, 4.0)
        self.whiten = whitening(4.0, ratio=3.0)

    def forward(self, x: Tensor, frames: Frames, cache: LayerCache | None = None) -> Tensor:
        """(N, T, C) -> (N, T, C); in a stream x is a chunk, and the cache has what is before it, then its end too."""
        skipped = x
        weights = self.self_attn_weights(x, frames, cache)
        keep_attn = keep_utterances(x, self.dynamic_skip_rate.value) if self.training else None

        x = x + self.feed_forward1(x)
        x = _added(x, _masked(self.balancer_na(self.nonlin_attention(x, weights, cache)), keep_attn))
        x = _added(x, _masked(self.self_attn1(x, weights, cache, "value1"), keep_attn))
        x = _added(x, self.dropped(self.conv_module1(x, frames, cache, "conv1"), self.dynamic_skip_rate))
        x = _added(x, self.dropped(self.balancer_ff2(self.feed_forward2(x)), self.ff_skip_rate))
        x = self.bypass_mid(skipped, x)
        x = _added(x, _masked(self.self_attn2(x, weights, cache, "value2"), keep_attn))
        x = _added(x, self.dropped(self.conv_module2(x, frames, cache, "conv2"), self.dynamic_skip_rate))
        x = _added(x, self.dropped(self.balancer_ff3(self.feed_forward3(x)), self.ff_skip_rate))
        x = self.norm(self.balancer1(x))
        x = self.bypass(skipped, x)
        return self.whiten(self.balancer2(x))

    def dropped(self, x: Tensor, skip_rate: ScheduledFloat) -> Tensor:
        return _masked(x, keep_utterances(x, skip_rate.value)) if self.training else x

    def empty_cache(self, n: int, left_frames: int) -> LayerCache:
        """Of N streams that have not begun, for attention to `left_frames` before a chunk."""
        frames = {part: left_frames for part in LAYER_PARTS}
        conv = cast(ChunkCausalConv, self.conv_module1.depthwise_conv)  # which a causal model has
        frames["conv1"] = frames["conv2"] = conv.chunkwise_conv.kernel_size[0] // 2
        dims = {
            "key": self.self_attn_weights.query_dim,
            "nonlin_value": self.nonlin_attention.out_proj.in_features,
            "value1": self.self_attn1.in_proj.out_features,
            "value2": self.self_attn2.in_proj.out_features,
            "conv1": self.conv_module1.out_proj.in_features,
            "conv2": self.conv_module2.out_proj.in_features,
        }
        like = self.norm.bias
        return LayerCache({part: like.new_zeros(n, frames[part], dims[part]) for part in LAYER_PARTS})


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _with_past(x: Tensor, cache: LayerCache | None, part: str) -> Tensor:
    """x (N, T, C), in a stream with the frames before it in front, (N, S, C)."""
    return x if cache is None else cache.extend(part, x)


class Stack(nn.Module):
    """Layers at one width and one frame rate."""

    def __init__(self, config: ZipformerConfig, stack: int, dropout: ScheduledFloat):
        super().__init__()
        # Layers are skipped half of the time at first, and come into play one after the other.
        num_layers = config.num_encoder_layers[stack]
        step = config.warmup_batches / (len(config.encoder_dim) + 1)
        final_rate = 0.035 * config.downsampling_factor[stack] ** 0.5
        begins = [step * (stack + 1 + i / num_layers) for i in range(num_layers)]
        rates = [ScheduledFloat((b, 0.5), (b + step / num_layers, final_rate)) for b in begins]
        self.layers = nn.ModuleList([ZipformerLayer(config, stack, rate, dropout) for rate in rates])

    def forward(
        self,
        x: Tensor,
        frames: Frames,
        feature_mask: Tensor | None,
        checkpointed: bool,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """(N, T, C) -> (N, T, C); `caches` of the layers, in a stream."""
        pos_emb = F.dropout(frames.pos_emb, 0.15, self.training)
        frames = dataclasses.replace(frames, pos_emb=pos_emb)
        x = _masked(x, feature_mask)
        of_layers: Sequence[LayerCache | None] = [None] * len(self.layers) if caches is None else caches
        for layer, cache in zip(self.layers, of_layers, strict=True):
            x = _masked(run(layer, x, frames, cache, checkpointed=checkpointed), feature_mask)
        return x


class Downsample(nn.Module):
    """Each output frame is a weighted mean of `factor` input frames, the weights learned."""

    def __init__(self, factor: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """x (N, T, C), T a multiple of the factor; lens (N,) -> (N, T / factor, C)

        An utterance that ends within a group counts its last frame for the missing ones.
        """
        n, t, c = x.shape
        factor = len(self.bias)
        weights = self.bias.softmax(0)
        rest = weights.sum() - weights.cumsum(0)  # of the frames after this one
        to_end = lens[:, None] - 1 - torch.arange(t, device=x.device)
        weights = weights.repeat(t // factor) * (to_end >= 0) + rest.repeat(t // factor) * (to_end == 0)
        weights = weights.view(n, -1, factor, 1).to(x.dtype)
        # Not a matrix product: under autocast that would leave the frames in half precision from here on.
        return (x.view(n, -1, factor, c) * weights).sum(2)


class DownsampledStack(nn.Module):
    """A stack at a lower frame rate, repeated back to the rate of its input and combined with it."""

    def __init__(self, config: ZipformerConfig, stack: int, dropout: ScheduledFloat):
        super().__init__()
        self.downsample = Downsample(config.downsampling_factor[stack])
        self.encoder = Stack(config, stack, dropout)
        self.out_combiner = Bypass(config.encoder_dim[stack], constant(0.0))

    def forward(
        self,
        x: Tensor,
        lens: Tensor,
        frames: Frames,
        feature_mask: Tensor | None,
        checkpointed: bool,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """(N, T, C) -> (N, T, C); `frames` are those of the lower rate, `lens` the lengths in x."""
        out = self.encoder(self.downsample(x, lens), frames, feature_mask, checkpointed, caches)
        out = out.unsqueeze(2).expand(-1, -1, x.shape[1] // out.shape[1], -1).reshape(x.shape)
        return self.out_combiner(x, out)


class StackedEncoder(nn.Module):
    """All stacks, at 50 frames a second in, 25 out (with the usual `output_downsampling_factor` of 2)."""

    def __init__(self, config: ZipformerConfig, dropout: ScheduledFloat):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(
            [
                (Stack if factor == 1 else DownsampledStack)(config, i, dropout)
                for i, factor in enumerate(config.downsampling_factor)
            ]
        )
        self.downsample_output = Downsample(config.output_downsampling_factor)

    def forward(
        self,
        x: Tensor,
        lens: Tensor,
        padded: bool,
        chunk_size: int,
        left_context_frames: int,
        checkpointed: bool,
        return_stacks: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (N, T, D0), lens (N,) -> (N, T', D) with T' = T / output_downsampling_factor, rounded up; on demand also
        (S, N, T', D), what would be the output after each stack. `padded`: whether one of the lengths may be below T.
        """
        config = self.config
        t = x.shape[1]
        # A length that all factors and the chunk divide spares every module its own padding.
        multiple = math.lcm(*config.downsampling_factor, config.output_downsampling_factor, max(chunk_size, 1))
        x = F.pad(x, (0, 0, 0, quotient_up(t, multiple) * multiple - t))
        padded = padded or x.shape[1] > t
        rates = {
            factor: self.frames_at(factor, x, lens, padded, chunk_size, left_context_frames)
            for factor in set(config.downsampling_factor)
        }
        outputs = self.outputs(x, lens, rates, checkpointed)
        t_out = quotient_up(t, config.output_downsampling_factor)
        encoder_out = self.downsample_output(_widest(outputs), lens)[:, :t_out]
        if not return_stacks:
            return encoder_out
        widened = [_widest(outputs[: i + 1]) for i in range(len(outputs) - 1)]
        widened = [F.pad(out, (0, encoder_out.shape[-1] - out.shape[-1])) for out in widened]
        below = [self.downsample_output(out, lens)[:, :t_out] for out in widened]
        return encoder_out, torch.stack([*below, encoder_out])

    def outputs(
        self,
        x: Tensor,
        lens: Tensor,
        rates: Mapping[int, Frames],
        checkpointed: bool,
        caches: Sequence[LayerCache] = (),
    ) -> list[Tensor]:
        """x (N, T, D0) -> (N, T, D) of each stack; `rates` are the frames at each downsampling factor, `caches` those
        of all layers, in a stream."""
        config = self.config
        outputs = []
        feature_masks = self.feature_masks(x)
        following = iter(caches)
        for i, stack in enumerate(self.encoders):
            dim = config.encoder_dim[i]
            feature_mask = feature_masks[i] if stack.training else None  # none in a frozen stack
            x = x[..., :dim] if dim <= x.shape[-1] else F.pad(x, (0, dim - x.shape[-1]))
            factor = config.downsampling_factor[i]
            inputs = (x,) if factor == 1 else (x, lens)
            own = list(islice(following, config.num_encoder_layers[i])) if caches else None
            x = stack(*inputs, rates[factor], feature_mask, checkpointed, own)
            outputs.append(x)
        return outputs

    def step(self, x: Tensor, lens: Tensor, state: ZipformerState, layers: Sequence[LayerCache]) -> Tensor:
        """A chunk x (N, T, D0) of streams, of which `lens` (N,) frames are there -> (N, T / output_downsampling_factor,
        D). `layers` go on to its end."""
        factors = set(self.config.downsampling_factor)
        rates = {factor: self.frames_in_stream(factor, x, lens, state) for factor in factors}
        outputs = self.outputs(x, lens, rates, False, layers)
        return self.downsample_output(_widest(outputs), lens)

    def frames_in_stream(self, factor: int, x: Tensor, lens: Tensor, state: ZipformerState) -> Frames:
        """What `frames_at` says of a whole utterance, of a chunk x (N, T, C) with what is before it."""
        chunk, left = state.chunk_size // factor, state.left_context_frames // factor
        lens = quotient_up(lens, factor)
        valid = torch.arange(chunk, device=x.device) < lens[:, None]
        heard = torch.arange(-left, 0, device=x.device) >= -(state.frames // factor)[:, None]
        masked = ~torch.cat([heard, valid], dim=1)[:, None]
        from_left = torch.arange(chunk, device=x.device)[None]
        # An utterance shorter than a chunk has its edges where it has them alone.
        length = lens.where(state.frames == 0, torch.full_like(lens, chunk))[:, None]
        return Frames(
            pos_emb=relative_positions(chunk, left + chunk, self.config.pos_dim, x.device).to(x.dtype),
            attn_mask=masked.to(x.dtype) * -1000.0,
            valid=valid.unsqueeze(-1).to(x.dtype),
            chunk=chunk,
            edge_distance=(from_left, (length - 1 - from_left).clamp(min=0)),
        )

    def frames_at(
        self, factor: int, x: Tensor, lens: Tensor, padded: bool, chunk_size: int, left_context_frames: int
    ) -> Frames:
        """What the layers at 1 / factor of the frame rate of x (N, T, C) need to know."""
        config = self.config
        t = x.shape[1] // factor
        lens = quotient_up(lens, factor)
        time = torch.arange(t, device=x.device)
        valid = time < lens[:, None]  # (N, T)
        masked = ~valid[:, None, :] if padded else None
        chunk = chunk_size // factor if chunk_size > 0 else t
        if chunk_size > 0:
            index = time // chunk
            distance = index[:, None] - index
            out_of_reach = distance < 0
            if left_context_frames >= 0:
                out_of_reach = out_of_reach | (distance > max(left_context_frames // chunk_size, 1))
            masked = out_of_reach if masked is None else masked | out_of_reach
        edge_distance = None
        if config.causal:
            # An utterance shorter than a chunk has its edges where it has them alone.
            length = lens.clamp(max=chunk)[:, None]
            from_left = time[None] % chunk
            edge_distance = from_left, (length - 1 - from_left).clamp(min=0)
        return Frames(
            pos_emb=relative_positions(t, t, config.pos_dim, x.device).to(x.dtype),
            # Low enough for weights of exactly 0, finite so that rows of nothing but padding give no NaN.
            attn_mask=None if masked is None else masked.to(x.dtype) * -1000.0,
            valid=valid.unsqueeze(-1).to(x.dtype) if padded else None,
            chunk=chunk,
            edge_distance=edge_distance,
        )

    def feature_masks(self, x: Tensor) -> list[Tensor | None]:
        """For each stack, what silences its upper dimensions for some utterances, (N, 1, C), or None."""
        config = self.config
        if not self.training:
            return [None] * len(config.encoder_dim)
        # For an eighth of the utterances all of the upper dimensions go, for nearly another the last half.
        keep = (torch.rand(len(x), 1, 2, device=x.device) >= 0.125).cumprod(-1).to(x.dtype)
        masks = []
        for dim, unmasked in zip(config.encoder_dim, config.encoder_unmasked_dim, strict=True):
            half = (dim - unmasked) // 2
            parts = torch.ones_like(keep[..., :1]), keep[..., :1], keep[..., 1:]
            sizes = unmasked, half, dim - unmasked - half
            mask = torch.cat([p.expand(-1, -1, s) for p, s in zip(parts, sizes, strict=True)], dim=-1)
            masks.append(mask if unmasked < dim else None)
        return masks


def shortest_and_longest(features: Tensor, feature_lens: Tensor, dim: int, min_frames: int) -> tuple[int, int]:
    """The least and the largest of `feature_lens` (N,), those of an encoder's input `features` (N, T, dim).

    Raises:
        ValueError: if shapes or lengths do not fit, or an utterance is too short.
    """
    if features.dim() != 3 or features.shape[2] != dim or len(features) != len(feature_lens):
        raise ValueError(
            f"features must be (N, T, {dim}) with N lengths, but are {tuple(features.shape)} with {len(feature_lens)}"
        )
    shortest, longest = (int(v) for v in feature_lens.aminmax())
    if shortest < min_frames:
        raise ValueError(
            f"an utterance has {shortest} feature frames, but the encoder needs at least {min_frames}; leave out such "
            "short ones"
        )
    if longest > features.shape[1]:
        raise ValueError(f"feature_lens say {longest} frames, but features have {features.shape[1]} only")
    return shortest, longest


def _widest(outputs: list[Tensor]) -> Tensor:
    """The last stack's output, widened: what it lacks comes from the last one before it that has it."""
    x = outputs[-1]
    pieces = [x]
    dim = x.shape[-1]
    for out in reversed(outputs):
        if out.shape[-1] > dim:
            pieces.append(out[..., dim:])
            dim = out.shape[-1]
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else x


class Zipformer(nn.Module):
    """The encoder, front end included. Call it as `encoder(features, feature_lens)`.

    Attributes:
        config: its ZipformerConfig.
        output_dim: D, the width of its output.
        frame_seconds: how much audio a frame of its output stands for.
        feature_kind, feature_dim: the features it reads, of those in `speechllm.data.features`, and their width.
        min_frames: the shortest utterance it can encode, in feature frames.
        max_seconds: the longest.
        num_stacks: how many stacks of layers it has.
        checkpoint_layers: in training, keep only the inputs of the front end and of each layer, and compute the
            rest again for the gradient (activation checkpointing, arXiv 1604.06174): a third more work, and
            memory that hardly grows with depth. Every number stays the same, random ones included, as long as
            the batch count and the training mode do from the forward pass to the backward pass.

    In training call `set_batch_count` for every batch: dropout, layer skip and the other regularizers follow
    it.
    """

    feature_kind = "fbank"
    min_frames = subsampling.MIN_FRAMES
    max_seconds = math.inf

    def __init__(self, config: ZipformerConfig):
        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        self.output_dim = max(config.encoder_dim)
        self.feature_dim = config.feature_dim
        self.frame_seconds = 0.02 * config.output_downsampling_factor
        self.num_stacks = len(config.encoder_dim)
        dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1)) if config.dropout is None else constant(config.dropout)
        self.encoder_embed = subsampling.Conv2dSubsampling(
            config.feature_dim, config.encoder_dim[0], config.subsampling_channels, dropout
        )
        self.encoder = StackedEncoder(config, dropout)
        self.model_batch_count: Tensor
        self.register_buffer("model_batch_count", torch.tensor(0.0))
        self.register_load_state_dict_post_hook(
            lambda module, _: module.set_batch_count(float(module.model_batch_count))
        )

    def set_batch_count(self, batch_count: float) -> None:
        """Moves all schedules to this point of training. Saved and restored with the weights."""
        self.model_batch_count.fill_(batch_count)
        for schedule in scheduled_floats(self):
            schedule.set_batch_count(batch_count)

    def bottom(self, num_stacks: int) -> list[nn.Module]:
        """The front end and the lowest stacks."""
        return [self.encoder_embed, *self.encoder.encoders[:num_stacks]]

    def output_lens(self, feature_lens: Tensor) -> Tensor:
        """How many output frames utterances of these many feature frames give; (N,) -> (N,)"""
        return quotient_up(subsampling.output_lens(feature_lens), self.config.output_downsampling_factor)

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        chunk_size: int | None = None,
        left_context_frames: int | None = None,
        return_stacks: bool = False,
    ) -> tuple[Tensor, ...]:
        """Features to frames of 40 ms, with the usual `output_downsampling_factor`.

        Args:
            features: log-mel features, 100 frames a second, (N, T, feature_dim); anything may lie beyond the
                lengths.
            feature_lens: (N,), in frames, each from `min_frames` to T.
            chunk_size: for causal models, see ZipformerConfig; by default what that says.
            left_context_frames: the same.
            return_stacks: give the outputs of all stacks too.

        Returns:
            encoder_out (N, T', D), encoder_out_lens (N,); with `return_stacks` also stack_outs (S, N, T', D): after
            each of the S stacks, what the output would be if it were the last, zero in dimensions that no stack so far
            has. The last is encoder_out.

        Raises:
            ValueError: if shapes or lengths do not fit, or an utterance is too short.
        """
        shortest, longest = shortest_and_longest(features, feature_lens, self.config.feature_dim, self.min_frames)
        chunk_size, left_context_frames = self.context(chunk_size, left_context_frames)
        if chunk_size >= subsampling.output_lens(longest):
            chunk_size = -1
        feature_lens = feature_lens.to(features.device)
        features = features[:, :longest]
        return self.encode(features, feature_lens, shortest < longest, chunk_size, left_context_frames, return_stacks)

    def encode(
        self,
        features: Tensor,
        feature_lens: Tensor,
        padded: bool,
        chunk_size: int | None = None,
        left_context_frames: int | None = None,
        return_stacks: bool = False,
    ) -> tuple[Tensor, ...]:
        """`forward` without looking at the lengths, which an exporter does not know.

        Args:
            padded: whether one of the lengths may be below T.
        """
        chunk_size, left_context_frames = self.context(chunk_size, left_context_frames)
        lens = subsampling.output_lens(feature_lens)
        valid = None
        if padded:
            padding = torch.arange(features.shape[1], device=features.device) >= feature_lens[:, None]
            features = features.masked_fill(padding.unsqueeze(-1), 0.0)
            frames = subsampling.output_lens(features.shape[1])
            valid = torch.arange(frames, device=features.device) < lens[:, None]
        checkpointed = self.checkpoint_layers and torch.is_grad_enabled()
        x = run(self.encoder_embed, features, valid, checkpointed=checkpointed)
        out = self.encoder(x, lens, padded, chunk_size, left_context_frames, checkpointed, return_stacks)
        encoder_out, *stack_outs = out if return_stacks else (out,)
        return encoder_out, self.output_lens(feature_lens), *stack_outs

    def context(self, chunk_size: int | None, left_context_frames: int | None) -> tuple[int, int]:
        """Chunk size and left context for a batch: as asked for, drawn in training, the widest otherwise."""
        if not self.config.causal:
            return -1, -1

        def choose(asked: int | None, options: list[int]) -> int:
            if asked is not None:
                return asked
            if self.training:
                return random.choice(options)
            return -1 if -1 in options else max(options)

        return (
            choose(chunk_size, self.config.chunk_size),
            choose(left_context_frames, self.config.left_context_frames),
        )

    def initial_state(
        self, n: int, chunk_size: int | None = None, left_context_frames: int | None = None
    ) -> ZipformerState:
        """The state of N streams that have not begun, on the encoder's device, for `step`.

        Args:
            n: how many streams.
            chunk_size: in frames of 20 ms; by default the smallest that the encoder was trained with.
            left_context_frames: the same; rounded down to whole chunks, but to one at least.

        Raises:
            ValueError: the encoder is not causal, or the chunk size is none that it can have.
        """
        config = self.config
        if not config.causal:
            raise ValueError("the encoder is not causal: it has to hear all before it says anything; train with causal")
        limited = [[v for v in options if v > 0] for options in (config.chunk_size, config.left_context_frames)]
        chunk_size, left = (
            asked if asked is not None else min(options, default=-1)
            for asked, options in zip((chunk_size, left_context_frames), limited, strict=True)
        )
        multiple = math.lcm(*config.downsampling_factor, config.output_downsampling_factor)
        if chunk_size <= 0 or chunk_size % multiple:
            raise ValueError(f"chunk_size is {chunk_size}, but in a stream it must be a multiple of {multiple}")
        if left <= 0:
            raise ValueError(
                f"left_context_frames is {left}, but in a stream it must be positive, so that it has an end"
            )
        left = max(left // chunk_size, 1) * chunk_size
        embed = self.encoder_embed
        stacks = [cast(Stack, stack if isinstance(stack, Stack) else stack.encoder) for stack in self.encoder.encoders]
        layers = [
            cast(ZipformerLayer, layer).empty_cache(n, left // factor)
            for factor, stack in zip(config.downsampling_factor, stacks, strict=True)
            for layer in stack.layers
        ]
        like = embed.out_norm.bias
        front = like.new_zeros(n, subsampling.FRAMES_AHEAD, *embed.convolved_shape)
        frames = torch.zeros(n, dtype=torch.int64, device=like.device)
        return ZipformerState(chunk_size, left, frames, front, tuple(layers))

    @staticmethod
    def step_frames(chunk_size: int) -> tuple[int, int]:
        """How many feature frames a step of this chunk size reads, and from how many on the next one does: the front
        end has to see 13 frames of the next chunk."""
        return 2 * chunk_size + 2 * subsampling.FRAMES_AHEAD + 7, 2 * chunk_size

    def step(
        self, features: Tensor, state: ZipformerState, feature_lens: Tensor | None = None
    ) -> tuple[Tensor, ZipformerState]:
        """The next chunk of N streams; chunk by chunk as the whole is with the same chunk size and left context.

        Args:
            features: (N, W, feature_dim), where `step_frames(state.chunk_size)` is (W, S): of the k-th step those from
                k * S on.
            state: of the streams so far; it stays as it is.
            feature_lens: (N,), how many frames are there. Fewer than W are the end of a stream. None: W of all. After
                a step with L < W there may be one more, of what is from S on, if that has more than 8 frames.

        Returns:
            encoder_out (N, T', D) and the state after it. T' is chunk_size / output_downsampling_factor; at the end of
            a stream no more frames count than `output_lens(feature_lens)`.

        Raises:
            ValueError: the encoder is in training mode, or shapes or lengths do not fit.
        """
        if self.training:
            raise ValueError("the encoder is in training mode: call eval() before it encodes a stream")
        window, _ = self.step_frames(state.chunk_size)
        if features.shape != (len(state), window, self.config.feature_dim):
            raise ValueError(
                f"features must be ({len(state)}, {window}, {self.config.feature_dim}) for {len(state)} streams with "
                f"chunks of {state.chunk_size} frames, but are {tuple(features.shape)}"
            )
        if feature_lens is None:
            feature_lens = torch.full((len(features),), window)
        shortest_and_longest(features, feature_lens, self.config.feature_dim, self.min_frames)
        return self.encode_chunk(features, state, feature_lens.to(features.device))

    def encode_chunk(
        self, features: Tensor, state: ZipformerState, feature_lens: Tensor
    ) -> tuple[Tensor, ZipformerState]:
        """`step` without looking at the lengths, which an exporter does not know."""
        padding = torch.arange(features.shape[1], device=features.device) >= feature_lens[:, None]
        features = features.masked_fill(padding.unsqueeze(-1), 0.0)
        lens = subsampling.output_lens(feature_lens)
        x, front = self.encoder_embed.step(features, lens, state.front)
        lens = lens.clamp(max=state.chunk_size)
        layers = tuple(LayerCache(layer) for layer in state.layers)
        encoder_out = self.encoder.step(x, lens, state, layers)
        state = dataclasses.replace(state, frames=state.frames + lens, front=front, layers=layers)
        return encoder_out, state
