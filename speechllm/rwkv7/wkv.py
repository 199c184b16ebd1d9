"""The RWKV-7 recurrence (arXiv 2503.14456), the one operator of the model, and its backends.

For every row and head, with a state S of shape (V, K):

    S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

``reference`` is that loop. ``chunked`` handles all positions of a chunk at once: with c_t the sum of the
log-decays from the chunk's start, and a, r multiplied by exp(c), b, k by exp(-c), the decay disappears from
the recurrence, and u_t = S_{t-1} a_t solves one unit lower-triangular system a chunk (the WY form of a
product of Householder-like matrices, as in arXiv 2406.06484); only the border states are computed one
after another. ``fla`` calls the Triton kernels of flash-linear-attention (https://github.com/fla-org).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.rwkv7.fla_tuning import prepare_kernels

log = logging.getLogger(__name__)

# exp(-c) must stay far from the largest float32, about exp(88), also when it is summed and multiplied.
_LOWEST_LOG_DECAY = -60.0

# Rows run together, filled up with zeros, if the shortest has at least this share of the longest one's length.
_SIMILAR_LENGTH = 0.8


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    lens: Tensor | None = None,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over the positions of a batch.

    Args:
      r: (N, L, H, K), the receptance.
      w: (N, L, H, K), the log-decay, at most 0; RWKV-7 models have it in [-0.6065, 0).
      k: (N, L, H, K), the keys.
      v: (N, L, H, V), the values.
      a: (N, L, H, K), what is taken out of the state, times minus one.
      b: (N, L, H, K), what is put in its place.
      state: (N, H, V, K) state to start from, zeros if None.
      lens: (N,) number of positions that count, the others are padding on the right: whatever they hold (even
        NaN) leaves the state as it is, costs nothing, and their outputs are zero.
      backend: ``reference``, ``chunked``, ``fla`` (CUDA, bfloat16 or float16, needs the extra ``[gpu]``), or
        ``auto`` to choose: ``fla`` where it can serve the call, else the plain step for L = 1, else ``chunked``.
      cu_seqlens: (M + 1,) borders of M rows that stand one after another in a batch of N = 1, from 0 to L; the
        state then has M rows. Not together with lens.

    Returns:
      the outputs (N, L, H, V) in the type of ``v``, and the state (N, H, V, K) after each row's last
      position, in float32 (float64 for float64 inputs) whatever autocast says. Both are differentiable.

    Raises:
      ValueError: shapes do not fit, an unknown backend, one that cannot serve the call (the message says why),
        or a decay too strong for ``chunked``.
    """
    N, L, H, K = r.shape
    V = v.shape[-1]
    for name, x, shape in (("w", w, r.shape), ("k", k, r.shape), ("a", a, r.shape), ("b", b, r.shape),
                           ("v", v, (N, L, H, V))):  # fmt: skip
        if x.shape != shape:
            raise ValueError(f"wkv7: {name} has shape {tuple(x.shape)}, but r has {tuple(r.shape)}")
    lengths = row_lengths(N, L, lens, cu_seqlens).tolist()
    rows = len(lengths)
    if state is not None and state.shape != (rows, H, V, K):
        raise ValueError(f"wkv7: state has shape {tuple(state.shape)}, expected {(rows, H, V, K)}")
    if backend not in BACKENDS:
        raise ValueError(f"wkv7: unknown backend {backend!r}, choose from {', '.join(BACKENDS)}")
    why_not_fla = _why_not_fla(r.device.type, r.dtype)
    if backend == "fla" and why_not_fla:
        raise ValueError(f"wkv7: backend 'fla' cannot serve this call: {why_not_fla}")
    if backend == "auto":
        backend = ("reference" if L == 1 else "chunked") if why_not_fla else "fla"
        _log_choice(backend, r.device.type, r.dtype, "one position" if L == 1 else "many positions", why_not_fla)

    dtype = torch.promote_types(r.dtype, torch.float32)
    state = r.new_zeros(rows, H, V, K, dtype=dtype) if state is None else state.to(dtype)
    inputs = (r, w, k, v, a, b)
    with torch.autocast(r.device.type, enabled=False):
        if cu_seqlens is not None:
            out, state = _rows(backend, inputs, state, cu_seqlens.tolist()[:-1], lengths)
        elif lens is not None:
            out, state = _rows(backend, inputs, state, list(range(0, N * L, L)), lengths)
        else:
            out, state = _BACKENDS[backend](*inputs, state)
    return out.to(v.dtype), state


def row_lengths(N: int, L: int, lens: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The lengths of the rows of an (N, L) input, on the CPU, however they are given: see ``wkv7``.

    Raises:
      ValueError: they do not fit the input.
    """
    if cu_seqlens is not None:
        borders = cu_seqlens.cpu()
        lengths = borders.diff()
        if N != 1 or lens is not None or borders[0] != 0 or borders[-1] != L or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens must go from 0 up to L = {L}, for an input of one row and without lens; got "
                f"{borders[:8].tolist()} for an input of {N} rows"
            )
        return lengths
    if lens is None:
        return torch.full((N,), L)
    lens = lens.cpu()
    if lens.shape != (N,):
        raise ValueError(f"lens has shape {tuple(lens.shape)}, expected (N,) = ({N},)")
    if lens.min() < 0 or lens.max() > L:
        raise ValueError(f"lens go from {int(lens.min())} to {int(lens.max())}, the input has L = {L}")
    return lens


@lru_cache
def _log_choice(backend: str, device: str, dtype: torch.dtype, length: str, why_not_fla: str | None) -> None:
    reason = f" (not fla: {why_not_fla})" if why_not_fla else ""
    log.info("wkv7 on %s, %s, %s: backend %s%s", device, str(dtype).removeprefix("torch."), length, backend, reason)


def _positions(starts: list[int], lens: list[int], device: torch.device) -> Tensor:
    """The indices of all positions of rows that begin at ``starts``, row after row."""
    counts = torch.tensor(lens)
    shift = torch.tensor(starts) - (counts.cumsum(0) - counts)
    return (torch.arange(sum(lens)) + shift.repeat_interleave(counts)).to(device)


def _rows(
    backend: str, inputs: tuple[Tensor, ...], state: Tensor, starts: list[int], lens: list[int]
) -> tuple[Tensor, Tensor]:
    """Runs rows that begin at ``starts`` among the N * L positions; outputs are 0 between them."""
    if not any(lens):
        return inputs[3].new_zeros(inputs[3].shape), state
    if backend == "fla":
        return _fla_rows(inputs, state, starts, lens)
    return _by_length(_BACKENDS[backend], inputs, state, starts, lens)


@lru_cache(maxsize=4)  # all layers of a model ask for the same
def _similar_lengths(
    starts: tuple[int, ...], lens: tuple[int, ...], P: int, device: torch.device
) -> tuple[list[tuple[int, int]], Tensor, _Way]:
    """Groups of rows of similar length: of each group the number of rows and the longest one's length; the order of
    the rows; the way of their positions into the groups."""
    order = sorted(range(len(lens)), key=lambda row: -lens[row])
    shapes: list[tuple[int, int]] = []
    for row in order:
        if shapes and lens[row] >= _SIMILAR_LENGTH * shapes[-1][1]:
            shapes[-1] = shapes[-1][0] + 1, shapes[-1][1]
        else:
            shapes.append((1, lens[row]))
    grouped_starts: list[int] = []
    end = 0
    for n, longest in shapes:
        grouped_starts += range(end, end + n * longest, longest) if longest else [end] * n
        end += n * longest
    ordered_lens = [lens[row] for row in order]
    outside = _positions([starts[row] for row in order], ordered_lens, device)
    inside = _positions(grouped_starts, ordered_lens, device)
    return shapes, torch.tensor(order, device=device), _Way(outside, inside, P, end)


def _by_length(
    run: Callable, inputs: tuple[Tensor, ...], state: Tensor, starts: list[int], lens: list[int]
) -> tuple[Tensor, Tensor]:
    """``_rows`` with those of similar length together.

    So there is little padding inside a group and none between them; padding is 0, which leaves a state alone.
    """
    N, L = inputs[0].shape[:2]
    shapes, order, way = _similar_lengths(tuple(starts), tuple(lens), N * L, state.device)
    sizes = [n * longest for n, longest in shapes]
    moved = [way.go(x.flatten(0, 1)).split(sizes) for x in inputs]
    states = state[order].split([n for n, _ in shapes])
    outs, lasts = [], []
    for i, (n, longest) in enumerate(shapes):
        S = states[i]
        if longest > 0:
            out, S = run(*(x[i].unflatten(0, (n, longest)) for x in moved), S)
            outs.append(out.flatten(0, 1))
        lasts.append(S)
    return way.return_from(torch.cat(outs)).unflatten(0, (N, L)), torch.cat(lasts)[order.argsort()]


class _Way:
    """A way for positions to take: (P, ...) -> (size, ...), ``target`` from ``source``, 0 elsewhere; and back."""

    def __init__(self, source: Tensor, target: Tensor, P: int, size: int):
        self.there, self.back = self._indices(source, target, size), self._indices(target, source, P)

    @staticmethod
    def _indices(source: Tensor, target: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Where each position comes from (anywhere, if from nowhere), and those that come from nowhere."""
        origin = source.new_full((size,), -1).index_copy_(0, target, source)
        return origin.clamp_min(0), (origin < 0).nonzero().squeeze(1)

    def go(self, x: Tensor) -> Tensor:
        return _Move.apply(x, self.there, self.back)

    def return_from(self, x: Tensor) -> Tensor:
        return _Move.apply(x, self.back, self.there)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]) -> Tensor:
        ctx.ways = back, there
        origin, holes = there
        x = x.index_select(0, origin)
        return x.index_fill_(0, holes, 0) if len(holes) else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Move.apply(grad, *ctx.ways), None, None


def _reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one position after another."""
    N, L, H, _ = r.shape
    dtype = state.dtype
    decay = w.to(dtype).exp()
    r, a, v = r.to(dtype).unsqueeze(-1), a.to(dtype).unsqueeze(-1), v.to(dtype).unsqueeze(-1)
    rows = torch.stack((b.to(dtype), k.to(dtype)), dim=-2)
    S = state.flatten(0, 1)
    outs = []
    for t in range(L):
        columns = torch.cat((S @ a[:, t].flatten(0, 1), v[:, t].flatten(0, 1)), dim=-1)
        S = torch.baddbmm(S * decay[:, t].flatten(0, 1).unsqueeze(-2), columns, rows[:, t].flatten(0, 1))
        outs.append((S @ r[:, t].flatten(0, 1)).view(N, H, -1))
    return torch.stack(outs, dim=1), S.view_as(state)


# Floats in one (rows, K) matrix of a segment: what a segment computes should stay in the processor's cache.
_SEGMENT_SIZE = 300_000


def _chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same, in parallel over the positions of a chunk."""
    L, K = r.shape[1], r.shape[3]
    longest = 32 if K > 32 else 16  # the work inside a chunk grows with its length, that at its borders with K
    C = -(-L // -(-L // longest))  # spreads L evenly
    return _Chunked.apply(r, w, k, v, a, b, state, -(-C // 4) * 4)


def _why_not_fla(device: str, dtype: torch.dtype) -> str | None:
    """What keeps the ``fla`` backend from serving a call; None if nothing does."""
    if device != "cuda":
        return f"its kernels run on CUDA, the inputs are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, the inputs are {dtype}: use bf16 autocast or bfloat16 weights"
    return _why_no_fla_package()


@lru_cache
def _why_no_fla_package() -> str | None:
    try:
        import fla.ops.rwkv7  # noqa: F401
    except Exception as e:  # not only ImportError: a Triton that does not fit the driver fails in many ways
        return f"fla-core cannot be imported ({type(e).__name__}: {e}); pip install 'speechllm[gpu]'"
    prepare_kernels()
    return None


def _fla(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    borders: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels of fla-core; their state is (N, H, K, V). ``borders`` of packed rows: on the device and the CPU."""
    from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7

    inputs = (r, w, k, v, a, b)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    one_step = r.shape[1] == 1 and not needs_grad
    kernel = fused_recurrent_rwkv7 if one_step else chunk_rwkv7  # the first has no backward
    packing = {}
    if borders is not None:
        packing["cu_seqlens"] = borders[0]
        if not one_step:
            packing["cu_seqlens_cpu"] = borders[1]  # else it waits for the GPU to read them there
    # log-decays are summed over a chunk: float32
    r, w, k, v, a, b = (x.to(torch.float32 if x is w else r.dtype).contiguous() for x in inputs)
    out, last = kernel(
        r,
        w,
        k,
        v,
        a,
        b,
        scale=1.0,
        initial_state=state.transpose(-1, -2).contiguous(),
        output_final_state=True,
        **packing,
    )
    return out, last.transpose(-1, -2)


@lru_cache(maxsize=4)  # all layers of a model ask for the same
def _nonempty_rows(
    starts: tuple[int, ...], lens: tuple[int, ...], P: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor], _Way | None]:
    """The rows that have a position; their borders when packed, on the device and on the CPU; the way of their
    positions there, None if they are packed already."""
    there = [row for row, length in enumerate(lens) if length > 0]
    their_lens = [lens[row] for row in there]
    borders = torch.tensor([0, *their_lens]).cumsum(0)
    way = None
    if sum(their_lens) < P:
        outside = _positions([starts[row] for row in there], their_lens, device)
        way = _Way(outside, torch.arange(len(outside), device=device), P, len(outside))
    return torch.tensor(there, device=device), (borders.to(device), borders), way


def _fla_rows(inputs: tuple[Tensor, ...], state: Tensor, starts: list[int], lens: list[int]) -> tuple[Tensor, Tensor]:
    """``_rows`` by the kernels' own packed form."""
    N, L = inputs[0].shape[:2]
    # the kernels know no empty ones
    rows, borders, way = _nonempty_rows(tuple(starts), tuple(lens), N * L, state.device)
    flat = [x.flatten(0, 1) for x in inputs]
    packed = [(x if way is None else way.go(x)).unsqueeze(0) for x in flat]
    out, last = partial(_fla, state=state[rows], borders=borders)(*packed)
    out = out.squeeze(0) if way is None else way.return_from(out.squeeze(0))
    return out.unflatten(0, (N, L)), state.index_copy(0, rows, last)


_BACKENDS: dict[str, Callable] = {"reference": _reference, "chunked": _chunked, "fla": _fla}
BACKENDS = ("auto", *_BACKENDS)


def _to_chunks(x: Tensor, C: int) -> Tensor:
    """(N, L, H, D) -> a view (L/C, N, H, C, D) of it, or of a copy with zeros up to a multiple of C."""
    if x.shape[1] % C:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % C))
    return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)


def _from_chunks(x: Tensor, out: Tensor) -> None:
    """Writes (L/C, N, H, C, D) to ``out`` (N, L, H, D), without what was added up to a multiple of C."""
    C = x.shape[3]
    if out.shape[1] % C:
        out.copy_(x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : out.shape[1]])
    else:
        out.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4).copy_(x)


@lru_cache
def _causal(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2C, 2C) of 0 and 1: position t of a sees those before it, position t of r also itself."""
    ones = torch.ones(C, C, dtype=dtype, device=device)
    return torch.cat((ones.tril(-1).repeat(1, 2), ones.tril().repeat(1, 2)))


class _Segment:
    """What forward and backward both need of the next few chunks; G = chunks * N * H, the chunks come first.

    decay, before, inverse: exp(c_t), exp(c_{t-1}), exp(-c_t), (chunks, N, H, C, K)
    ar: (G, 2C, K) a exp(c_{t-1}) over r exp(c_t)        bk: (G, 2C, K) b over k, times exp(-c_t)
    uv: (G, 2C, V) u over v, u yet to be filled in       scores: (G, 2C, 2C) ar bk^T where causal
    """

    def __init__(self, inputs: list[Tensor], C: int, dtype: torch.dtype):
        r, w, k, v, a, b = inputs
        w_view = _to_chunks(w, C)
        chunks, N, H, _, K = w_view.shape
        w = torch.empty(w_view.shape, dtype=dtype, device=r.device).copy_(w_view)
        causal = _causal(C, dtype, r.device)
        c = torch.matmul(causal[C:, :C], w)
        lowest = c[..., -1, :].min()
        if lowest < _LOWEST_LOG_DECAY:
            raise ValueError(
                f"wkv7: w adds up to {lowest.item():.1f} over {C} positions, too low for chunked (at "
                f"least {_LOWEST_LOG_DECAY:.0f}; those of RWKV-7 stay above -20): use backend='reference'"
            )
        self.shape = (chunks, N, H)
        self.decay = c.exp()
        self.inverse = self.decay.reciprocal()
        self.before = F.pad(self.decay[..., :-1, :], (0, 0, 1, 0), value=1.0)
        ar, bk = c.new_empty(2, chunks, N, H, 2 * C, K)
        uv = c.new_empty(chunks, N, H, 2 * C, v.shape[-1])
        torch.mul(_to_chunks(a, C), self.before, out=ar[..., :C, :])
        torch.mul(_to_chunks(r, C), self.decay, out=ar[..., C:, :])
        torch.mul(_to_chunks(b, C), self.inverse, out=bk[..., :C, :])
        torch.mul(_to_chunks(k, C), self.inverse, out=bk[..., C:, :])
        uv[..., C:, :] = _to_chunks(v, C)
        self.ar, self.bk, self.uv = ar.flatten(0, 2), bk.flatten(0, 2), uv.flatten(0, 2)
        self.scores = torch.bmm(self.ar, self.bk.mT).mul_(causal)
        self.end = self.decay[..., -1:, :].flatten(1, 2)  # (chunks, N * H, 1, K)

    def by_chunk(self, x: Tensor) -> Tensor:
        """(G, ...) -> (chunks, N * H, ...)"""
        return x.unflatten(0, (self.shape[0], -1))


def _segments(L: int, C: int, size: int) -> list[tuple[slice, slice]]:
    """The chunks and the positions of each segment; ``size`` is that of all rows' K at one position."""
    chunks, step = -(-L // C), max(1, _SEGMENT_SIZE // (C * size))
    return [(slice(i, min(i + step, chunks)), slice(i * C, min((i + step) * C, L))) for i in range(0, chunks, step)]


class _Chunked(torch.autograd.Function):
    """Keeps inputs, states at the chunk borders and triangular inverses; all else is computed again."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, C: int
    ) -> tuple[Tensor, Tensor]:
        inputs = (r, w, k, v, a, b)
        N, L, H, K = r.shape
        V = v.shape[-1]
        chunks = -(-L // C)
        out = state.new_empty(N, L, H, V)
        S = state.new_empty(chunks + 1, N * H, V, K)
        S[0] = state.flatten(0, 1)
        solve = state.new_empty(chunks, N * H, C, C)
        eye = torch.eye(C, dtype=state.dtype, device=r.device)
        for at, where in _segments(L, C, N * H * K):
            f = _Segment([x[:, where] for x in inputs], C, S.dtype)
            # u = solve (S_0 a + (a k) v): directly, a series of powers cancels badly for repeated keys
            inverse = solve[at].flatten(0, 1)
            torch.linalg.solve_triangular(
                f.scores[:, :C, :C].neg(),
                eye.expand_as(inverse),
                upper=False,
                unitriangular=True,
                out=inverse,
            )
            solved_a = f.by_chunk(torch.bmm(inverse, f.ar[:, :C]))
            u = f.by_chunk(torch.bmm(inverse, torch.bmm(f.scores[:, :C, C:], f.uv[:, C:])))
            uv, bk = f.by_chunk(f.uv), f.by_chunk(f.bk)
            for i, j in enumerate(range(at.start, at.stop)):
                uv[i, :, :C] = u[i].baddbmm_(solved_a[i], S[j].mT)
                torch.baddbmm(S[j], uv[i].mT, bk[i], out=S[j + 1]).mul_(f.end[i])
            y = torch.bmm(f.ar[:, C:], S[at].flatten(0, 1).mT).baddbmm_(f.scores[:, C:], f.uv)
            _from_chunks(y.view(*f.shape, C, V), out[:, where])
        ctx.save_for_backward(*inputs, S, solve)
        ctx.set_materialize_grads(False)
        return out, S[-1].clone().view(N, H, V, K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, S, solve = ctx.saved_tensors
        with torch.autocast(S.device.type, enabled=False):
            return *_chunked_backward(inputs, S, solve, d_out, d_state), None


def _chunked_backward(
    inputs: Sequence[Tensor], S: Tensor, solve: Tensor, d_out: Tensor | None, d_state: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradients of the inputs and of the initial state, from the last segment to the first."""
    N, L, H, K = inputs[0].shape
    V, C = inputs[3].shape[-1], solve.shape[-1]
    causal = _causal(C, S.dtype, S.device)
    if d_out is None:
        d_out = S.new_zeros(N, L, H, V)
    d_next = S.new_zeros(S.shape[1:]) if d_state is None else d_state.flatten(0, 1)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]

    for at, where in reversed(_segments(L, C, N * H * K)):
        f = _Segment([x[:, where] for x in inputs], C, S.dtype)
        S_start, inverse = S[at].flatten(0, 1), solve[at].flatten(0, 1)
        # z = (1 - scores) u, solved for u
        z = torch.bmm(f.ar[:, :C], S_start.mT).baddbmm_(f.scores[:, :C, C:], f.uv[:, C:])
        f.uv[:, :C] = torch.bmm(inverse, z)
        solved_a = f.by_chunk(torch.bmm(inverse, f.ar[:, :C]))

        d_zy = S.new_empty(*f.shape, 2 * C, V)  # the gradient of z over that of the outputs
        d_zy[..., C:, :] = _to_chunks(d_out[:, where], C)
        d_zy = d_zy.flatten(0, 2)
        d_u = f.by_chunk(torch.bmm(f.scores[:, C:, :C].mT, d_zy[:, C:]))
        d_start = f.by_chunk(torch.bmm(d_zy[:, C:].mT, f.ar[:, C:]))
        d_stop = torch.empty_like(d_start)  # that of the state at a chunk's end, before its decay exp(c_C)
        d_end = torch.empty_like(f.end)  # that of this decay's c_C
        b = f.by_chunk(f.bk)[:, :, :C]
        for i in reversed(range(f.shape[0])):
            torch.sum(S[at.start + i + 1] * d_next, dim=-2, keepdim=True, out=d_end[i])
            torch.mul(d_next, f.end[i], out=d_stop[i])
            d_u[i].baddbmm_(b[i], d_stop[i].mT)
            d_next = d_start[i].baddbmm_(d_u[i].mT, solved_a[i]).add_(d_stop[i])
        d_stop = d_stop.flatten(0, 1)

        d_zy[:, :C] = torch.bmm(inverse.mT, d_u.flatten(0, 1))
        d_v = torch.bmm(f.scores[:, :, C:].mT, d_zy).baddbmm_(f.bk[:, C:], d_stop.mT)
        d_scores = torch.bmm(d_zy, f.uv.mT).mul_(causal)
        d_ar = torch.bmm(d_scores, f.bk).baddbmm_(d_zy, S_start)
        d_bk = torch.bmm(d_scores.mT, f.ar).baddbmm_(f.uv, d_stop)
        # c appears only in exponents, so its gradient is each factor times the gradient of that factor;
        # the log-decay at t is part of every c_s with s >= t
        d_a, d_r = (f.ar * d_ar).view(*f.shape, 2, C, K).unbind(-3)
        d_b, d_k = (f.bk * d_bk).view(*f.shape, 2, C, K).unbind(-3)
        d_w = torch.matmul(causal[C:, :C].mT, (d_r + d_a).sub_(d_b).sub_(d_k)).sub_(d_a)
        d_w.add_(d_end.view(*f.shape, 1, K))
        d_a, d_r = d_ar.view(*f.shape, 2, C, K).unbind(-3)
        d_b, d_k = d_bk.view(*f.shape, 2, C, K).unbind(-3)
        d_r, d_a = d_r.mul_(f.decay), d_a.mul_(f.before)
        d_b, d_k = d_b.mul_(f.inverse), d_k.mul_(f.inverse)
        for grad, x in zip(grads, (d_r, d_w, d_k, d_v.view(*f.shape, C, V), d_a, d_b), strict=True):
            _from_chunks(x, grad[:, where])
    return *grads, d_next.view(N, H, V, K)
