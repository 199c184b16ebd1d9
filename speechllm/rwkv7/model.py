"""RWKV-7 "Goose" (x070, arXiv 2503.14456) over token ids or embeddings.

Parameter names, formulas and the initialisation are those of https://github.com/BlinkDL/RWKV-LM (RWKV-v7), so
that released checkpoints load as they are. All is a function of the inputs and a state given and returned.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.rwkv7.state import RWKV7State
from speechllm.rwkv7.wkv import wkv7

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

    def __post_init__(self):
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


class _TokenShift(torch.autograd.Function):
    """x (N, L, D), prev (N, D), mixes (M, D) -> M tensors x_t + (x_{t-1} - x_t) * mix, with x_{-1} = prev."""

    @staticmethod
    def forward(ctx, x: Tensor, prev: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
        delta = torch.empty_like(x)
        torch.sub(prev, x[:, 0], out=delta[:, 0])
        torch.sub(x[:, :-1], x[:, 1:], out=delta[:, 1:])
        ctx.save_for_backward(delta, mixes)
        return tuple(torch.addcmul(x, delta, mix) for mix in mixes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta, mixes = ctx.saved_tensors
        d_x, d_delta = grads[0].clone(), grads[0] * mixes[0]
        for grad, mix in zip(grads[1:], mixes[1:], strict=True):
            d_x.add_(grad)
            d_delta.addcmul_(grad, mix)
        d_mixes = torch.stack([(grad * delta).sum((0, 1)) for grad in grads])
        d_x.sub_(d_delta)
        d_x[:, :-1].add_(d_delta[:, 1:])
        return d_x, d_delta[:, 0], d_mixes


class _ReluSquared(torch.autograd.Function):
    """relu(x)^2, keeping one tensor for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.relu()
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * x).mul_(2)


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
        self.receptance, self.key, self.value, self.output = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.ln_x = nn.GroupNorm(H, D, eps=_GROUP_NORM_EPS)

    def mixes(self) -> Tensor:
        """(6, D) how much of the previous position each input takes."""
        return torch.cat((self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)).flatten(1)

    def project(self, mixed: tuple[Tensor, ...], v_first: Tensor | None) -> tuple[Tensor, ...]:
        """Six mixtures (M, D) -> r, w, k, v, a, b (M, H, K) of the recurrence, gate, v_first (M, D)."""
        xr, xw, xk, xv, xa, xg = mixed
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = torch.addmm(self.w0.view(-1), torch.tanh(xw @ self.w1), self.w2).sigmoid() * -_LARGEST_DECAY
        rate = torch.addmm(self.a0.view(-1), xa @ self.a1, self.a2).sigmoid()
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.addmm(self.v0.view(-1), xv @ self.v1, self.v2).sigmoid())
        r, w, k, v, rate, k_k, k_a = (
            x.unflatten(-1, (-1, self.head_size)) for x in (r, w, k, v, rate, self.k_k.view(-1), self.k_a.view(-1))
        )
        kk = F.normalize(k * k_k, dim=-1)
        k = torch.addcmul(k, k * k_a, rate - 1)
        return r, w, k, v, -kk, kk * rate, gate, v_first

    def combine(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """The recurrence's (M, H, V) -> (M, D): normalised, with a direct path for each position, gated."""
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.output((self.ln_x(y.flatten(1)) + bonus.flatten(1)) * gate)

    def forward(
        self,
        x: Tensor,
        prev: Tensor,
        v_first: Tensor | None,
        wkv: Tensor,
        lens: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, L, D), prev (N, D), wkv (N, H, V, K) -> out (N, L, D), v_first (N * L, D), wkv."""
        N, L, _ = x.shape
        mixed = tuple(m.flatten(0, 1) for m in _TokenShift.apply(x, prev, self.mixes()))
        *rwkvab, gate, v_first = self.project(mixed, v_first)
        y, wkv = wkv7(*(z.unflatten(0, (N, L)) for z in rwkvab), wkv, lens, backend)
        r, _, k, v, _, _ = rwkvab
        return self.combine(y.flatten(0, 1), r, k, v, gate).view(N, L, -1), v_first, wkv

    def step(self, x: Tensor, prev: Tensor, v_first: Tensor | None, wkv: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """One position: x, prev (N, D), wkv (N, H, V, K) -> (N, D), v_first; the new wkv goes to ``out``."""
        mixed = torch.addcmul(x, prev - x, self.mixes().unsqueeze(1)).unbind()
        r, w, k, v, a, b, gate, v_first = self.project(mixed, v_first)
        S, new = wkv.flatten(0, 1), out.flatten(0, 1)
        r, w, a, b, k_, v_ = (z.flatten(0, 1).to(S.dtype) for z in (r, w, a, b, k, v))
        columns = torch.stack((torch.bmm(S, a.unsqueeze(-1)).squeeze(-1), v_), dim=-1)
        torch.mul(S, w.exp_().unsqueeze(-2), out=new).baddbmm_(columns, torch.stack((b, k_), dim=-2))
        y = torch.bmm(new, r.unsqueeze(-1)).view(v.shape).to(x.dtype)
        return self.combine(y, r.view(v.shape).to(x.dtype), k, v, gate), v_first


class ChannelMix(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x: Tensor, prev: Tensor, wanted: Tensor | None) -> Tensor:
        """x (N, L, D), prev (N, D) -> (N, L, D), or (K, D) at the K ``wanted`` of the N * L positions."""
        (mixed,) = _TokenShift.apply(x, prev, self.x_k.view(1, -1))
        if wanted is not None:
            mixed = mixed.flatten(0, 1).index_select(0, wanted)
        return self.value(_ReluSquared.apply(self.key(mixed)))

    def step(self, x: Tensor, prev: Tensor) -> Tensor:
        """x, prev (N, D) -> (N, D)"""
        return self.value(self.key(torch.lerp(x, prev, self.x_k.view(-1))).relu_().square_())


class Block(nn.Module):
    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)


class RWKV7(nn.Module):
    """The language model, officially initialised; ``speechllm.rwkv7.load_rwkv7`` reads released weights.

    Args:
      config: its sizes.
      wkv_backend: backend of ``wkv7``.
    """

    def __init__(self, config: RWKV7Config, wkv_backend: str = "auto"):
        super().__init__()
        self.config, self.wkv_backend = config, wkv_backend
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.emb.weight.is_meta:  # else the weights are about to be loaded
            self.reset_parameters()

    @property
    def hidden_size(self) -> int:
        return self.config.n_embd

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., D), as ``forward`` takes them: it applies ``ln0`` itself."""
        return self.emb(token_ids)

    def zero_state(self, n: int) -> RWKV7State:
        """The state of n rows that have read nothing."""
        c, weight = self.config, self.ln_out.weight
        shift = weight.new_zeros(2, c.n_layer, n, c.n_embd)
        heads = (c.n_embd // c.head_size, c.head_size, c.head_size)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return RWKV7State(shift[0], shift[1], weight.new_zeros(c.n_layer, n, *heads, dtype=dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lens: Tensor | None = None,
        state: RWKV7State | None = None,
        logits_mask: Tensor | None = None,
    ) -> tuple[Tensor, RWKV7State]:
        """Reads L positions in parallel.

        Args:
          input_ids: (N, L) token ids; or
          inputs_embeds: (N, L, D) embeddings, of tokens (``embed``) or of anything else.
          lens: (N,) positions that count in each row, all if None; the others are padding on the right, and
            what they hold has no influence.
          state: where each row goes on from; the start of a text if None. Gradients flow to it.
          logits_mask: (N, L) bool, the positions to compute logits at, all if None.

        Returns:
          logits (N, L, V), or (K, V) for the K positions of ``logits_mask`` in row-major order (those of
          padding are finite and mean nothing); the state after each row's own last position.

        Raises:
          ValueError: both or none of input_ids and inputs_embeds; no position; shapes or lens that do not fit
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("RWKV7: give either input_ids or inputs_embeds")
        N, L = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if L == 0:
            raise ValueError("RWKV7: no position to read (L = 0)")
        if logits_mask is not None and logits_mask.shape != (N, L):
            raise ValueError(f"RWKV7: logits_mask has shape {tuple(logits_mask.shape)}, expected {(N, L)}")
        if state is not None and len(state) != N:
            raise ValueError(f"RWKV7: the state has {len(state)} rows, the input {N}")
        device = self.emb.weight.device
        padding = None
        if lens is not None:
            if lens.shape != (N,):
                raise ValueError(f"RWKV7: lens has shape {tuple(lens.shape)}, expected (N,) = ({N},)")
            shortest, longest = lens.aminmax()
            if shortest < 0 or longest > L:
                raise ValueError(f"RWKV7: lens go from {int(shortest)} to {int(longest)}, the input has L = {L}")
            if shortest < L:
                lens = lens.to(device)
                padding = torch.arange(L, device=device) >= lens[:, None]
            else:
                lens = None
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids if padding is None else input_ids.masked_fill(padding, 0))
        elif padding is not None:
            inputs_embeds = inputs_embeds.masked_fill(padding[:, :, None], 0)

        def last(x: Tensor, prev: Tensor) -> Tensor:
            """What the next position will see as its previous one: (N, L, D), (N, D) -> (N, D)"""
            if lens is None:
                return x[:, -1]
            x = x[torch.arange(N, device=device), (lens - 1).clamp_min(0)]
            return torch.where((lens > 0)[:, None], x, prev)

        x = self.blocks[0].ln0(inputs_embeds)
        before = self.zero_state(N) if state is None else state
        v_first = None
        att_shift, ffn_shift, wkv = [], [], []
        for i, block in enumerate(self.blocks):
            h = block.ln1(x)
            prev = before.att_shift[i].to(h.dtype)
            out, v_first, S = block.att(h, prev, v_first, before.wkv[i], lens, self.wkv_backend)
            att_shift.append(last(h, prev))
            wkv.append(S)
            x = x + out
            h = block.ln2(x)
            prev = before.ffn_shift[i].to(h.dtype)
            ffn_shift.append(last(h, prev))
            if i + 1 == len(self.blocks) and logits_mask is not None:
                # from here on nothing goes from one position to another
                wanted = logits_mask.to(device).flatten().nonzero().squeeze(1)
                x = x.flatten(0, 1).index_select(0, wanted) + block.ffn(h, prev, wanted)
            else:
                x = x + block.ffn(h, prev, None)
        after = RWKV7State(torch.stack(att_shift), torch.stack(ffn_shift), torch.stack(wkv))
        return self.head(self.ln_out(x)), after

    @torch.no_grad()
    def step(self, token_ids: Tensor, state: RWKV7State) -> tuple[Tensor, RWKV7State]:
        """Reads one token a row, for decoding: (N,) -> logits (N, V), the next state; no gradients.

        The given state stays as it is.
        """
        x = self.blocks[0].ln0(self.emb(token_ids))
        wkv = torch.empty_like(state.wkv)
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
        """The official initialisation (RWKV-LM, RWKV-v7/train_temp/src/model.py) of every parameter."""
        c = self.config
        D, V = c.n_embd, c.vocab_size
        channel = torch.arange(D) / D
        linear = torch.arange(D) / max(1, D - 1)  # 0 to 1
        in_head = torch.linspace(-1, 1, c.head_size).repeat(D // c.head_size)
        zigzag = in_head * in_head.abs()

        def fill(parameter: Tensor, values: Tensor) -> None:
            parameter.copy_(values.view_as(parameter))

        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, math.sqrt(V / D)))
        for i, block in enumerate(self.blocks):
            depth, height = i / max(1, c.n_layer - 1), 1 - i / c.n_layer  # 0 to 1, 1 to almost 0
            att, ffn = block.att, block.ffn
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
