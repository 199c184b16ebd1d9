"""Training on sequences longer than memory: a segment at a time, the state carried from one to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from speechllm.rwkv7.model import RWKV7, RWKV7Loss
from speechllm.rwkv7.state import RWKV7State
from speechllm.rwkv7.wkv import row_lengths


def backward_in_segments(
    model: RWKV7,
    segment: int,
    labels: Tensor,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    lens: Tensor | None = None,
    state: RWKV7State | None = None,
    scale: float = 1.0,
    truncate: bool = True,
) -> tuple[RWKV7Loss, RWKV7State]:
    """Adds the gradients of ``scale * loss`` to ``.grad``, with the activations of one segment in memory.

    With ``truncate`` no gradient goes from a segment to those before it (truncated backpropagation through time:
    Williams and Peng, Neural Computation 2, 1990); the state that they left is used all the same. Without, the
    gradients are those of the whole sequence: a first pass keeps the states at the borders, a second one goes from the
    last segment to the first and hands the gradient of the state on. That costs one more forward pass.

    Args:
      segment: positions in a segment.
      labels, input_ids, inputs_embeds, lens, state: as for ``RWKV7.loss``. ``inputs_embeds`` and ``state``, where they
        are leaves that require it, receive gradients too (the state only without ``truncate``).

    Returns:
      the loss of the whole sequence and the last state, both detached: the next call may go on from there.

    Raises:
      ValueError: a segment of no position, arguments that ``RWKV7.loss`` refuses.
    """
    if segment < 1:
        raise ValueError(f"backward_in_segments: a segment of {segment} positions")
    N, L = labels.shape
    inputs = {name: x for name, x in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)) if x is not None}
    lens = row_lengths(N, L, lens, None)
    no_autocast = torch.autocast(
        model.emb.weight.device.type, enabled=False
    )  # a backward pass has the types of the forward one
    start = state if state is not None else model.initial_state(N)

    def run(at: int, state: RWKV7State) -> tuple[RWKV7Loss, RWKV7State]:
        part = slice(at, at + segment)
        part_lens = (lens - at).clamp(0, labels[:, part].shape[1])
        return model.loss(labels[:, part], **{k: x[:, part] for k, x in inputs.items()}, lens=part_lens, state=state)

    starts = range(0, max(1, int(lens.max())), segment)
    losses, last = [], start
    if truncate:
        for at in starts:
            # not detached at first: a tuned initial state learns from the first segment
            loss, after = run(at, last)
            if loss.loss.requires_grad:  # where only the initial state trains, that of the first segment alone does
                with no_autocast:
                    (loss.loss * scale).backward()
            losses.append(loss)
            last = after.detach()
    else:
        borders = []
        with torch.no_grad():
            for at in starts:
                borders.append(last)
                loss, last = run(at, last)
                losses.append(loss)
        d_after: list[Tensor] = []
        for at, border in zip(reversed(starts), reversed(borders), strict=True):
            border = RWKV7State(*(x.detach().clone().requires_grad_() for x in vars(border).values()))
            loss, after = run(at, border)
            ends = [loss.loss * scale, *vars(after).values()][: 1 + len(d_after)]
            with no_autocast:
                torch.autograd.backward(ends, [None, *d_after])
            d_after = [x.grad for x in vars(border).values()]
        for x, grad in zip(vars(start).values(), d_after, strict=True):
            if x.requires_grad:
                x.backward(grad)
    return RWKV7Loss(*(torch.stack(values).sum(0).detach() for values in zip(*losses, strict=True))), last
