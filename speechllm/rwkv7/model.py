"""RWKV-7 "Goose" (x070, arXiv 2503.14456) over token ids or embeddings.

Parameter names, formulas and the initialization are those of https://github.com/BlinkDL/RWKV-LM (RWKV-v7), so
that released checkpoints load as they are. All is a function of the inputs and a state given and returned.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechllm.errors import UserError
from speechllm.linear import Linear, linear_cross_entropy, product
from speechllm.llm.interface import IGNORE, TunableModel
from speechllm.rwkv7.remade import Remade
from speechllm.rwkv7.state import RWKV7State
from speechllm.rwkv7.wkv import row_lengths, wkv7
from speechllm.weights import meta_device

# The log-decay is -exp(-0.5) * sigmoid(.): a channel forgets at most 45% of its content in one position.
_LARGEST_DECAY = math.exp(-0.5)
_GROUP_NORM_EPS = 64e-5

# Columns of the first matrix of each low-rank layer, from the model width: x * sqrt(n_embd), in steps of 32.
_RANK_FACTORS = {"decay": 2.5, "a": 2.5, "v": 1.7, "gate": 5.0}


@dataclass
class RWKV7Config:
    """The sizes of a model.

    Attributes:
      n_layer, n_embd, vocab_size: layers, width D, vocabulary V.
      head_size: channels of a head, a divisor of n_embd.
      ffn_size: width of the channel mix, 4 * n_embd if None.
      lora_ranks: ranks of low-rank layers: ``decay``, ``a``, ``v`` and ``gate``; the official formula gives
        those that are not named.

    Raises:
      ValueError: a size that is not a positive integer, widths that do not divide, unknown ranks.
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int = 64
    ffn_size: int | None = None
    lora_ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.lora_ranks) - set(_RANK_FACTORS))
        if unknown:
            raise ValueError(f"lora_ranks: unknown {unknown}, allowed are {sorted(_RANK_FACTORS)}")
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_embd", "vocab_size", "head_size")}
        if self.ffn_size is not None:
            sizes["ffn_size"] = self.ffn_size
        sizes.update({f"lora_ranks[{name!r}]": rank for name, rank in self.lora_ranks.items()})
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")
        if self.n_embd % self.head_size:
            raise ValueError(f"head_size: {self.head_size} does not divide n_embd: {self.n_embd}")
        if self.ffn_size is None:
            self.ffn_size = 4 * self.n_embd
        formula = {name: max(32, 32 * round(x * self.n_embd**0.5 / 32)) for name, x in _RANK_FACTORS.items()}
        self.lora_ranks = formula | self.lora_ranks


class _Rows:
    """Where the rows of a batch stand among its P positions: one after another, without padding.

    Args:
      lens: of each row, on the CPU.
      device: of the indices.

    Attributes:
      shape: (N, L) if all have one length, else None.
      cu_seqlens: (N + 1,) borders of the rows, on the CPU.
      rows: (K,) those that have a position, ``first`` and ``final`` their first and last positions.
    """

    def __init__(self, lens: Tensor, device: torch.device):
        self.shape = (len(lens), int(lens[0])) if (lens == lens[0]).all() else None
        self.cu_seqlens = F.pad(lens.cumsum(0), (1, 0))
        rows = (lens > 0).nonzero().squeeze(1)
        self.rows = rows.to(device)
        self.first = self.cu_seqlens[rows].to(device)
        self.final = (self.cu_seqlens[rows + 1] - 1).to(device)

    def last(self, x: Tensor, prev: Tensor) -> Tensor:
        """What the next position of each row will see as its previous one: (P, D), (N, D) -> (N, D)"""
        return prev.index_copy(0, self.rows, x.index_select(0, self.final))


class _Shift:
    """What token shift mixes: x (P, D) and x_{t-1} - x_t, with x_{-1} = prev (N, D) in each row."""

    def __init__(self, x: Tensor, prev: Tensor, rows: _Rows):
        self.x, self.prev, self.rows = x, prev, rows

    @cached_property
    def delta(self) -> Tensor:
        x, first = self.x, self.rows.first
        delta = torch.empty_like(x)
        torch.sub(x[:-1], x[1:], out=delta[1:])
        delta[first] = self.prev[self.rows.rows] - x[first]
        return delta

    def mixture(self, mix: Tensor) -> Tensor:
        """mix (D,) or (M, 1, D) -> x_t + (x_{t-1} - x_t) * mix (P, D) or (M, P, D)"""
        return torch.addcmul(self.x, self.delta, mix)


class _TokenShift(torch.autograd.Function):
    """x (P, D), prev (N, D), mixes (M, D) -> a mixture (P, D) for each mix. Keeps at most x: those are made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prev: Tensor, mixes: Tensor, rows: _Rows) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, prev, mixes)  # frozen mixes do not need it
        ctx.rows = rows
        return _Shift(x, prev, rows).mixture(mixes.unsqueeze(1)).unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, prev, mixes = ctx.saved_tensors
        d_x, d_delta = grads[0].clone(), grads[0] * mixes[0]
        for grad, mix in zip(grads[1:], mixes[1:], strict=True):
            d_x.add_(grad)
            d_delta.addcmul_(grad, mix)
        d_mixes = None
        if ctx.needs_input_grad[2]:
            delta = _Shift(x, prev, ctx.rows).delta
            d_mixes = torch.stack([(grad * delta).sum(0) for grad in grads])
        d_x.sub_(d_delta)
        first = ctx.rows.first
        d_prev = torch.zeros_like(prev).index_copy_(0, ctx.rows.rows, d_delta[first])
        d_delta[first] = 0
        d_x[:-1].add_(d_delta[1:])
        return d_x, d_prev, d_mixes, None


def _token_shift(x: Tensor, prev: Tensor, mixes: Tensor, rows: _Rows, remade: Remade) -> tuple[Tensor, ...]:
    """``_TokenShift``, whose mixtures no matrix product keeps."""
    mixed = _TokenShift.apply(x, prev, mixes, rows)
    if not remade.enabled:
        return mixed
    again = _Shift(x.detach(), prev.detach(), rows)
    return tuple(remade.add(y, partial(again.mixture, mix)) for y, mix in zip(mixed, mixes.detach(), strict=True))


_SHORTEST = 1e-12  # what F.normalize divides by at least

_NOTHING_REMADE = Remade(enabled=False)  # of a decoding step, which has no backward pass

_STATE_AT_ONCE = 2**19  # numbers of the state that a decoding step reads and writes together: 2 MB


class _ReluSquared(torch.autograd.Function):
    """relu(x)^2. Keeps its result, as the product after it does, and no other tensor of this size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu().square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.sqrt().mul_(grad).mul_(2)


class _LogDecay(torch.autograd.Function):
    """-exp(-0.5) sigmoid(x). Keeps its result, as the recurrence does, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        w = x.sigmoid().mul_(-_LARGEST_DECAY)
        ctx.save_for_backward(w)
        return w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return torch.addcmul(w, w, w, value=1 / _LARGEST_DECAY).mul_(grad)


def _low_rank(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    between: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x (P, D), first (D, rank), second (rank, D), bias of D -> (P, D)"""
    x = product(x, first.T)
    return product(x if between is None else between(x), second.T, None if bias is None else bias.view(-1))


class TimeMix(nn.Module):
    """The recurrent half of a block."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        D, H, ranks = config.n_embd, config.n_embd // config.head_size, config.lora_ranks
        self.layer, self.head_size = layer, config.head_size

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, D))

        def low_rank(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(D, rank)), nn.Parameter(torch.empty(rank, D))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in range(6))
        self.w0, (self.w1, self.w2) = vector(), low_rank(ranks["decay"])
        self.a0, (self.a1, self.a2) = vector(), low_rank(ranks["a"])
        if layer > 0:  # the first layer has no values before its own to mix in
            self.v0, (self.v1, self.v2) = vector(), low_rank(ranks["v"])
        self.g1, self.g2 = low_rank(ranks["gate"])
        self.k_k, self.k_a = vector(), vector()
        self.r_k = nn.Parameter(torch.empty(H, config.head_size))
        self.receptance, self.key, self.value, self.output = (Linear(D, D, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(H, D, eps=_GROUP_NORM_EPS)

    def lr_scale(self) -> dict[str, float]:
        """Where the decay of the recurrence starts from learns at twice the rate, as in RWKV-LM."""
        return {"w0": 2.0}

    def mixes(self) -> Tensor:
        """(6, D) how much of the previous position each input takes."""
        return torch.cat((self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)).flatten(1)

    def project(self, mixed: tuple[Tensor, ...], v_first: Tensor | None, remade: Remade) -> tuple[Tensor, ...]:
        """Six mixtures (P, D) -> r, w before `_LogDecay`, k, v, rate, gate, v_first, (P, D) each."""
        xr, xw, xk, xv, xa, xg = mixed
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = _low_rank(xw, self.w1, self.w2, self.w0, torch.tanh)
        rate = _low_rank(xa, self.a1, self.a2, self.a0).sigmoid()
        gate = _low_rank(xg, self.g1, self.g2, between=torch.sigmoid)
        if v_first is None:  # this is the first layer
            v_first = v
        else:
            mix = _low_rank(xv, self.v1, self.v2, self.v0).sigmoid()
            # under autocast an adapter may give float32
            v = remade(torch.lerp, v, v_first.to(v.dtype), mix.to(v.dtype))
        return r, w, k, v, rate, gate, v_first

    def recurrent(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, rate: Tensor, remade: Remade) -> tuple[Tensor, ...]:
        """What `project` gives, (P, D) -> r, w, k, v, a, b (P, H, K) of the recurrence."""
        w = _LogDecay.apply(w)
        r, w, k, v, rate, k_k, k_a = (
            x.unflatten(-1, (-1, self.head_size)) for x in (r, w, k, v, rate, self.k_k.view(-1), self.k_a.view(-1))
        )
        a = F.normalize(remade(torch.mul, k, -k_k), dim=-1)
        b = remade(lambda a, rate: (a * rate).neg_(), a, rate)
        k = k * remade(torch.addcmul, 1 - k_a, rate, k_a)
        return r, w, k, v, a, b

    def combine(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, remade: Remade) -> Tensor:
        """The recurrence's (M, H, V) -> (M, D): normalized, with a direct path for each position, gated."""
        bonus = (remade(torch.mul, r, k) * self.r_k).sum(-1, keepdim=True) * v
        return self.output(remade(torch.mul, self.ln_x(y.flatten(1)) + bonus.flatten(1), gate))

    def forward(
        self, x: Tensor, prev: Tensor, v_first: Tensor | None, wkv: Tensor, rows: _Rows, backend: str, remade: Remade
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (P, D), prev (N, D), wkv (N, H, V, K) -> out (P, D), v_first (P, D), wkv."""
        mixed = _token_shift(x, prev, self.mixes(), rows, remade)
        r, w, k, v, rate, gate, v_first = self.project(mixed, v_first, remade)
        rwkvab = self.recurrent(r, w, k, v, rate, remade)
        r, _, k, v, _, _ = rwkvab
        shape, borders = (rows.shape, None) if rows.shape is not None else ((1, len(x)), rows.cu_seqlens)
        inputs = (z.unflatten(0, shape) for z in rwkvab)
        y, wkv = partial(wkv7, state=wkv, backend=backend, cu_seqlens=borders)(*inputs)
        return self.combine(y.flatten(0, 1), r, k, v, gate, remade), v_first, wkv

    def step(self, x: Tensor, prev: Tensor, v_first: Tensor | None, wkv: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """One position: x, prev (N, D), wkv (N, H, V, K) -> (N, D), v_first; the new wkv goes to ``out``.

        What ``forward`` computes, in few operations: with few rows each takes longer to start than to run.
        """
        mixed = torch.addcmul(x, prev - x, self.mixes().unsqueeze(1)).unbind()
        r, decay, k, v, rate, gate, v_first = self.project(mixed, v_first, _NOTHING_REMADE)
        in_heads = -1, self.head_size  # (N, D) -> (N * H, K)
        removed = (k * self.k_k.view(-1)).view(in_heads)
        removed = removed / torch.linalg.vector_norm(removed, dim=-1, keepdim=True).clamp_min(_SHORTEST)
        k = k * torch.addcmul(1 - self.k_a, rate, self.k_a).view(k.shape)
        S, new = wkv.flatten(0, 1), out.view(-1, *out.shape[2:])
        r, rate, k, v = (z.view(in_heads) for z in (r, rate, k, v))
        decay = decay.to(S.dtype).sigmoid().mul_(-_LARGEST_DECAY).exp_().view(in_heads)
        read, added = torch.stack((removed, decay * r), dim=-2), torch.stack((removed * rate, k), dim=-2)
        y = _step_wkv(S, new, decay, read.to(S.dtype), added.to(S.dtype), r.to(S.dtype), v.to(S.dtype)).to(x.dtype)
        y = F.layer_norm(y, y.shape[-1:], eps=_GROUP_NORM_EPS).view(x.shape)
        y = torch.addcmul(self.ln_x.bias, y, self.ln_x.weight).view(in_heads)
        direct = (r * k).view(-1, *self.r_k.shape).mul_(self.r_k).sum(-1).view(-1, 1)
        return self.output(torch.addcmul(y, direct, v).view(x.shape) * gate), v_first


def _step_wkv(S: Tensor, new: Tensor, *vectors: Tensor) -> Tensor:
    """``_step_some_wkv``, on the CPU a few matrices at a time, which stay in its cache between reading and writing."""
    at_once = max(1, _STATE_AT_ONCE // S[0].numel()) if S.device.type == "cpu" else len(S)
    if len(S) <= at_once:
        return _step_some_wkv(S, new, *vectors)
    parts = zip(*(z.split(at_once) for z in (S, new, *vectors)), strict=True)
    return torch.cat([_step_some_wkv(*some) for some in parts])


def _step_some_wkv(S: Tensor, new: Tensor, decay: Tensor, read: Tensor, added: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """One position of M recurrences: states S (M, V, K) -> (M, V), `new` is written.

    decay, r (M, K), v (M, V); read: -a over w r, added: b over k, (M, 2, K).
    """
    # S is read once, for S a and for S_t r = (S diag(w) + (S a) b^T + v k^T) r = S (w r) + (S a) (b r) + v (k r).
    # Vectors stand in rows: MKL is half as fast where they are columns.
    taken, y = torch.bmm(read, S.mT).unbind(-2)
    columns = torch.stack((-taken, v), dim=-2)
    torch.mul(S, decay.unsqueeze(-2), out=new).baddbmm_(columns.mT, added)
    return torch.baddbmm(y.unsqueeze(-2), torch.bmm(r.unsqueeze(-2), added.mT), columns).squeeze(-2)


class ChannelMix(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        hidden = config.ffn_size or 4 * config.n_embd
        self.key = Linear(config.n_embd, hidden, bias=False)
        self.value = Linear(hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor, prev: Tensor, rows: _Rows, wanted: Tensor | None, remade: Remade) -> Tensor:
        """x (P, D), prev (N, D) -> (P, D), or (K, D) at the K ``wanted`` of the P positions."""
        (mixed,) = _token_shift(x, prev, self.x_k.view(1, -1), rows, remade)
        if wanted is not None:
            mixed = mixed.index_select(0, wanted)
        return self.value(_ReluSquared.apply(self.key(mixed)))

    def step(self, x: Tensor, prev: Tensor) -> Tensor:
        """x, prev (N, D) -> (N, D)"""
        return self.value(self.key(torch.lerp(x, prev, self.x_k.view(-1))).relu_().square_())


class Block(nn.Module):
    """One layer: time mix and channel mix, each after a norm and beside a residual path."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        att_prev: Tensor,
        ffn_prev: Tensor,
        wkv: Tensor,
        rows: _Rows,
        wanted: Tensor | None,
        backend: str,
        keep_all: bool = False,
    ) -> tuple[Tensor, ...]:
        """x, v_first (P, D) -> x (P, D), or (K, D) where ``wanted``; v_first; the layer's next state, three parts.

        keep_all: whatever the backward pass needs, as where the whole block is computed again; else what is quickly
        made is made again there.
        """
        h = self.ln1(x)
        att_prev = att_prev.to(h.dtype)
        with Remade(not keep_all) as remade:
            out, v_first, wkv = self.att(h, att_prev, v_first, wkv, rows, backend, remade)
        att_last = rows.last(h, att_prev)
        x = x + out
        h = self.ln2(x)
        ffn_prev = ffn_prev.to(h.dtype)
        if wanted is not None:
            x = x.index_select(0, wanted)
        with Remade(not keep_all) as remade:
            out = self.ffn(h, ffn_prev, rows, wanted, remade)
        return x + out, v_first, att_last, rows.last(h, ffn_prev), wkv


class RWKV7Loss(NamedTuple):
    """``loss``: summed cross entropy; ``tokens``: how many; ``correct``: how many of them were the best guess."""

    loss: Tensor
    tokens: Tensor
    correct: Tensor


class RWKV7(TunableModel[RWKV7State]):
    """The language model, officially initialized; ``speechllm.rwkv7.load_rwkv7`` reads released weights.

    Args:
      config: its sizes.
      wkv_backend: backend of ``wkv7``.

    Attributes:
      initial_wkv: (layers, H, V, K) float32, the recurrence's state before a text; None (zeros) until
        ``add_initial_state`` makes it a parameter.
      checkpoint_blocks: in training, keep only the inputs of each block and compute it again for the gradient
        (activation checkpointing, arXiv 1604.06174): a third more work, and memory that hardly grows with depth.
    """

    has_initial_state = True

    def __init__(self, config: RWKV7Config, wkv_backend: str = "auto"):
        super().__init__()
        self.config, self.wkv_backend = config, wkv_backend
        self.checkpoint_blocks = False
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(config, i) for i in range(config.n_layer)))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.initial_wkv: nn.Parameter | None
        self.register_parameter("initial_wkv", None)
        if not self.emb.weight.is_meta:  # else the weights are about to be loaded
            self.reset_parameters()

    @property
    def name(self) -> str:
        return "RWKV-7"

    @property
    def hidden_size(self) -> int:
        return self.config.n_embd

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return self.emb.weight.dtype

    def no_weight_decay(self) -> set[str]:
        return _not_decayed(self)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., D), as ``forward`` takes them: it applies ``ln0`` itself."""
        return self.emb(token_ids)

    def add_initial_state(self, state: RWKV7State | None = None) -> nn.Parameter:
        """Makes the state that texts start from a parameter: state tuning, as in RWKV-PEFT.

        Args:
          state: of one row; its ``wkv`` is where the parameter starts. Zeros if None.

        Returns:
          the parameter.

        Raises:
          ValueError: the state is not one row of this model.
        """
        wkv = self.initial_state(1).wkv if state is None else state.wkv
        expected = (self.config.n_layer, 1, *self._head_shape)
        if wkv.shape != expected:
            raise ValueError(f"initial state: wkv has shape {tuple(wkv.shape)}, this model needs {expected}")
        self.initial_wkv = nn.Parameter(wkv.squeeze(1).detach().clone())
        return self.initial_wkv

    @property
    def initial_state_is_tuned(self) -> bool:
        """Whether the initial state is a parameter."""
        return self.initial_wkv is not None

    def tune_initial_state(self) -> None:
        """Makes the initial state a parameter that trains, whatever it is now."""
        initial = self.add_initial_state() if self.initial_wkv is None else self.initial_wkv
        initial.requires_grad_(True)

    def save_initial_state(self, path: str | Path) -> None:
        """Writes the initial state as a state file of one row (``RWKV7State.load``)."""
        self.initial_state(1).save(path)

    def load_initial_state(self, path: str | Path, trainable: bool) -> None:
        """Makes a state file the parameter that texts start from.

        Raises:
          UserError: it is no state file; the state is not one row of this model.
        """
        state = RWKV7State.load(path)
        try:
            self.add_initial_state(state).requires_grad_(trainable)
        except ValueError as e:
            raise UserError(f"{path}: does not fit the model: {e}") from e

    def kept_in_float32(self) -> tuple[str, ...]:
        """Parts of the names of weights that are float32 whatever ``dtype`` is."""
        return ("initial_wkv",)

    def adapter_root(self) -> nn.Module:
        """What ``peft`` puts an adapter on: the model itself."""
        return self

    def default_targets(self) -> list[str]:
        """The matrices that take an adapter when none are named."""
        return ["receptance", "key", "value", "output"]

    def tied_weights(self) -> dict[str, str]:
        """No weight has a second name."""
        return {}

    def tie_weights(self) -> None:
        """There is nothing to tie."""

    def layers(self) -> list[nn.Module]:
        """What computes one after the other, most of the model: the two halves of every block."""
        return [layer for block in self.blocks for layer in (block.att, block.ffn)]

    def untuned(self) -> "RWKV7":
        """A model of the same sizes on the meta device, to be loaded."""
        with meta_device():
            model = RWKV7(self.config)
            if self.initial_wkv is not None:
                model.add_initial_state()
        return model

    @property
    def _head_shape(self) -> tuple[int, int, int]:
        c = self.config
        return c.n_embd // c.head_size, c.head_size, c.head_size

    def initial_state(self, n: int) -> RWKV7State:
        """The state of n rows that have read nothing."""
        c, weight = self.config, self.ln_out.weight
        shift = weight.new_zeros(2, c.n_layer, n, c.n_embd)
        if self.initial_wkv is not None:
            wkv = self.initial_wkv.unsqueeze(1).expand(-1, n, -1, -1, -1)
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            wkv = weight.new_zeros(c.n_layer, n, *self._head_shape, dtype=dtype)
        return RWKV7State(shift[0], shift[1], wkv)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: RWKV7State | None = None,
        logits_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, RWKV7State]:
        """Reads L positions in parallel.

        Args:
          input_ids: (N, L) token ids; or
          inputs_embeds: (N, L, D) embeddings, of tokens (``embed``) or of anything else.
          lens: (N,) positions that count in each row, all if None; the others are padding on the right: they
            have no influence and cost nothing.
          state: where each row goes on from; ``initial_state`` if None. Gradients flow to it.
          logits_mask: (N, L) bool, the positions to compute logits at, all if None.
          cu_seqlens: (M + 1,) borders of M rows that stand one after another in an input of N = 1, from 0 to L;
            the state then has M rows. Not together with lens.

        Returns:
          logits (N, L, V), zero at padding, or (K, V) for the K positions of ``logits_mask`` in row-major order;
          the state after each row's own last position.

        Raises:
          ValueError: both or none of input_ids and inputs_embeds; no position; shapes, lens or cu_seqlens that
            do not fit; logits asked for at padding.
        """
        inputs = self._inputs(input_ids, inputs_embeds)
        N, L = inputs.shape[:2]
        if logits_mask is not None and logits_mask.shape != (N, L):
            raise ValueError(f"RWKV7: logits_mask has shape {tuple(logits_mask.shape)}, expected {(N, L)}")
        hidden, valid, after = self._read(inputs, lens, cu_seqlens, state, logits_mask)
        logits = self.head(hidden)
        if logits_mask is None:
            if valid is not None:
                logits = logits.new_zeros(N * L, logits.shape[-1]).index_copy(0, valid, logits)
            logits = logits.view(N, L, -1)
        return logits, after

    def loss(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: RWKV7State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[RWKV7Loss, RWKV7State]:
        """Cross entropy of ``labels`` (N, L): what each position should predict, -100 where there is no loss.

        The other arguments, and what is raised, are those of ``forward``. Logits are computed at the labels
        only, and never all at once; the loss can be differentiated once.
        """
        hidden, targets, after = self._read_labels(labels, input_ids, inputs_embeds, lens, state, cu_seqlens)
        if type(self.head) is Linear:
            loss, correct = linear_cross_entropy(hidden, self.head.weight, targets)
        else:  # an adapter or packed weights
            logits = self.head(hidden).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.detach().argmax(-1) == targets).sum()
        return RWKV7Loss(loss, (labels != IGNORE).sum(), correct), after

    def log_probs(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """The log probability of each of the K ``labels`` (N, L) that are not -100, in row-major order, float32 (K,).

        The other arguments, and what is raised, are those of ``forward``; logits are divided by ``temperature``.
        """
        hidden, targets, _ = self._read_labels(labels, input_ids, inputs_embeds, lens)
        return -F.cross_entropy(self.head(hidden).float() / temperature, targets, reduction="none")

    def _read_labels(
        self,
        labels: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        lens: Tensor | None,
        state: RWKV7State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, RWKV7State]:
        """hidden (K, D) at the K positions that have a label, ready for ``head``; the labels (K,); the state after."""
        inputs = self._inputs(input_ids, inputs_embeds)
        if labels.shape != inputs.shape[:2]:
            raise ValueError(f"RWKV7: labels have shape {tuple(labels.shape)}, expected {tuple(inputs.shape[:2])}")
        mask = labels != IGNORE
        hidden, _, after = self._read(inputs, lens, cu_seqlens, state, mask)
        return hidden, labels[mask].to(hidden.device), after

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("RWKV7: give either input_ids or inputs_embeds")
        if inputs.shape[1] == 0:
            raise ValueError("RWKV7: no position to read (L = 0)")
        return inputs

    def _read(
        self,
        inputs: Tensor,
        lens: Tensor | None,
        cu_seqlens: Tensor | None,
        state: RWKV7State | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, RWKV7State]:
        """Ids (N, L) or embeddings (N, L, D) -> hidden, valid, the state after each row's last position.

        valid: (P,) indices of those of the N * L positions that count, None if all do.
        hidden: (P, D), or (K, D) at the K positions of ``mask``, ready for ``head``.
        """
        N, L = inputs.shape[:2]
        device = self.emb.weight.device
        row_lens = row_lengths(N, L, lens, cu_seqlens)
        if state is not None and len(state) != len(row_lens):
            raise ValueError(f"RWKV7: the state has {len(state)} rows, the input {len(row_lens)}")

        inputs, valid = inputs.flatten(0, 1).to(device), None
        if cu_seqlens is None and row_lens.min() < L:
            is_valid = torch.arange(L) < row_lens[:, None]
            valid = is_valid.flatten().nonzero().squeeze(1).to(device)
            inputs = inputs.index_select(0, valid)
            if mask is not None:
                mask, beyond = mask.flatten().index_select(0, valid.to(mask.device)), mask.cpu() & ~is_valid
                if beyond.any():
                    raise ValueError(
                        f"RWKV7: logits or labels are asked for at {int(beyond.sum())} positions of padding"
                    )
        x = self.blocks[0].ln0(inputs.to(self.dtype) if inputs.is_floating_point() else self.embed(inputs))
        wanted = None if mask is None else mask.to(device).flatten().nonzero().squeeze(1)
        rows = _Rows(row_lens, device)
        before = self.initial_state(len(row_lens)) if state is None else state
        v_first, layers = None, []
        for i, block in enumerate(self.blocks):
            arguments = (
                x, v_first, before.att_shift[i], before.ffn_shift[i], before.wkv[i], rows,
                wanted if i + 1 == len(self.blocks) else None,  # after it nothing goes from position to position
                self.wkv_backend,
            )  # fmt: skip
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x, v_first, *layer = checkpoint(block, *arguments, keep_all=True, use_reentrant=False)
            else:
                x, v_first, *layer = block(*arguments)
            layers.append(layer)
        return self.ln_out(x), valid, RWKV7State(*(torch.stack(parts) for parts in zip(*layers, strict=True)))

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: RWKV7State, overwrite: bool = False) -> tuple[Tensor, RWKV7State]:
        """Reads one token a row, for decoding: (N,) -> logits (N, V), the next state; no gradients.

        The given state stays as it is; with ``overwrite`` the next one takes its memory, which saves writing to
        fresh memory (75 MB for 32 rows of 12 layers x 768) at each step. Then nothing else may hold the given one.
        """
        x = self.blocks[0].ln0(self.emb(token_ids))
        wkv = state.wkv if overwrite else torch.empty_like(state.wkv, memory_format=torch.contiguous_format)
        v_first = None
        att_shift, ffn_shift = [], []
        for i, block in enumerate(self.blocks):
            h = block.ln1(x)
            out, v_first = block.att.step(h, state.att_shift[i].to(h.dtype), v_first, state.wkv[i], wkv[i])
            att_shift.append(h)
            x = x + out
            h = block.ln2(x)
            x = x + block.ffn.step(h, state.ffn_shift[i].to(h.dtype))
            ffn_shift.append(h)
        return self.head(self.ln_out(x)), RWKV7State(torch.stack(att_shift), torch.stack(ffn_shift), wkv)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialization (RWKV-LM, RWKV-v7/train_temp/src/model.py) of every parameter."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, math.sqrt(self.vocab_size / self.hidden_size)))
        for i, block in enumerate(self.blocks):
            _reset_block(block, self.config, i)


class RWKV7Layers(nn.Module):
    """The blocks of an RWKV-7 between other layers: no embedding of tokens, no vocabulary, no state carried on.

    Args:
      config: its sizes; ``vocab_size`` means nothing here.

    Officially initialized, as ``RWKV7`` is.
    """

    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.config = config
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(config, i) for i in range(config.n_layer)))
        self.ln_out = nn.LayerNorm(config.n_embd)
        if not self.ln_out.weight.is_meta:  # else the weights are about to be loaded
            with torch.no_grad():
                for i, block in enumerate(self.blocks):
                    _reset_block(block, config, i)

    def no_weight_decay(self) -> set[str]:
        return _not_decayed(self)

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """x (N, L, D), lens (N,) -> (N, L, D), zero beyond the lengths; each row is read from its first position on."""
        N, L, D = x.shape
        lens = row_lengths(N, L, lens, None)
        valid = (torch.arange(L) < lens[:, None]).flatten().nonzero().squeeze(1).to(x.device)
        rows = _Rows(lens, x.device)
        before = x.new_zeros(N, D)
        H, K = D // self.config.head_size, self.config.head_size
        state = x.new_zeros(N, H, K, K, dtype=torch.promote_types(self.ln_out.weight.dtype, torch.float32))
        out, v_first = self.blocks[0].ln0(x.flatten(0, 1).index_select(0, valid)), None
        for block in self.blocks:
            out, v_first, *_ = block(out, v_first, before, before, state, rows, None, "auto")
        out = self.ln_out(out)
        return out.new_zeros(N * L, D).index_copy(0, valid, out).view(N, L, D)


def _not_decayed(model: nn.Module) -> set[str]:
    """All but the weights of layers, adapters included: not the low-rank matrices `w1` to `g2`, `r_k`, nor a trained
    initial state (RWKV-LM, RWKV-v7/train_temp/src/model.py)."""
    return {name for name, _ in model.named_parameters() if ".weight" not in name}


def _reset_block(block: Block, c: RWKV7Config, i: int) -> None:
    """The official initialization of block number ``i``, but for its LayerNorms, which have PyTorch's."""
    D = c.n_embd
    channel = torch.arange(D) / D
    linear = torch.arange(D) / max(1, D - 1)  # 0 to 1
    in_head = torch.linspace(-1, 1, c.head_size).repeat(D // c.head_size)
    zigzag = in_head * in_head.abs()
    depth, height = i / max(1, c.n_layer - 1), 1 - i / c.n_layer  # 0 to 1, 1 to almost 0
    att, ffn = block.att, block.ffn

    def fill(parameter: Tensor, values: Tensor) -> None:
        parameter.copy_(values.view_as(parameter))

    exponents = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    for name, exponent in exponents.items():
        fill(getattr(att, f"x_{name}"), 1 - channel ** (exponent * height))
    fill(att.w0, -6 + 6 * linear ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    fill(att.a0, -0.19 + 0.3 * zigzag + 0.4 * (linear - 0.5))
    if i > 0:
        fill(att.v0, 0.73 - 0.4 * (linear - 0.5))
    for name in "wavg" if i > 0 else "wag":
        nn.init.zeros_(getattr(att, f"{name}1"))
        second = getattr(att, f"{name}2")
        nn.init.orthogonal_(second, gain=0.1 * max(1.0, math.sqrt(second.shape[0] / second.shape[1])))
    fill(att.k_k, 0.71 - 0.1 * (linear - 0.5))
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    att.ln_x.weight.fill_(((1 + i) / c.n_layer) ** 0.7)
    att.ln_x.bias.zero_()
    nn.init.orthogonal_(att.receptance.weight)
    nn.init.orthogonal_(att.key.weight, gain=0.1)
    nn.init.orthogonal_(att.value.weight)
    nn.init.zeros_(att.output.weight)
    fill(ffn.x_k, 1 - channel ** (height**4))
    nn.init.orthogonal_(ffn.key.weight)
    nn.init.zeros_(ffn.value.weight)
