"""Greedy search with a transducer (`speechllm.encoder.transducer`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speechllm.encoder.transducer import Transducer

# A frame of 40 ms has a syllable at most, in tokens of at least a byte. A search that never says blank has to end.
MAX_SYMBOLS_PER_FRAME = 5


class TransducerHypothesis(NamedTuple):
    """A text that a transducer gives."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]  # of the tokens
    log_prob: float  # of the whole alignment, blanks included


@torch.no_grad()
def transducer_greedy(
    transducer: Transducer, encoder_out: Tensor, lens: Tensor, max_symbols_per_frame: int = MAX_SYMBOLS_PER_FRAME
) -> list[TransducerHypothesis]:
    """The most probable class, one at a time: a token, or blank for the next frame.

    All utterances go on together, each at a frame of its own; a step is one call of the joiner for all of them.

    Args:
      encoder_out: (N, T, D); lens: (N,) frames.
      max_symbols_per_frame: after so many tokens a frame is left without a blank.
    """
    n, blank = len(encoder_out), transducer.blank_id
    audio, lens = transducer.encoder_proj(encoder_out), lens.to(encoder_out.device)
    rows = torch.arange(n, device=audio.device)
    frame, symbols = torch.zeros_like(rows), torch.zeros_like(rows)  # symbols: at this frame
    context = torch.full((n, transducer.context_size), blank, device=audio.device)
    emitted, scores = [], []  # of each step: (N,)
    while (running := frame < lens).any():
        logits = transducer.join(audio[rows, frame.clamp(max=lens - 1)], transducer.read(context)[:, 0])
        score, token = logits.float().log_softmax(-1).max(-1)
        is_token = running & (token != blank)
        emitted.append(token.where(is_token, blank))
        scores.append(score.where(running, 0.0))
        context = torch.where(is_token[:, None], torch.cat([context[:, 1:], token[:, None]], 1), context)
        symbols = symbols + is_token
        goes_on = running & (~is_token | (symbols == max_symbols_per_frame))
        frame, symbols = frame + goes_on, symbols.masked_fill(goes_on, 0)
    tokens, log_probs = torch.stack(emitted, 1).tolist(), torch.stack(scores, 1).tolist()
    found = []
    for row_tokens, row_log_probs in zip(tokens, log_probs, strict=True):
        said = [(t, p) for t, p in zip(row_tokens, row_log_probs, strict=True) if t != blank]
        found.append(TransducerHypothesis(tuple(t for t, _ in said), tuple(p for _, p in said), sum(row_log_probs)))
    return found
