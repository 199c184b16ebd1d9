"""What a CTC head (Graves et al. 2006) gives: texts, by greedy and prefix beam search; scores for the hypotheses of
another search; and when known tokens are said, by forced alignment.

`log_probs` (N, T, V) are natural logarithms over V classes, one of which is `blank`; the other classes are token ids.
What lies beyond a length has no influence, and each row gets what it gets alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.torchaudio_import import import_torchaudio

# The logarithm that stands for a probability of 0 where a sum or a search has to go on behind it.
IMPOSSIBLE = -1e4


def ctc_greedy(log_probs: Tensor, lens: Tensor, blank: int) -> list[list[int]]:
    """The tokens of the most probable alignment of each row: N token lists.

    Args:
      log_probs: (N, T, V), or anything else that ranks alike, such as logits; lens: (N,) frames.
    """
    best = log_probs.argmax(-1)
    return [
        [token for token in row[:n].unique_consecutive().tolist() if token != blank]
        for row, n in zip(best.cpu(), lens.tolist(), strict=True)
    ]


class CTCHypothesis(NamedTuple):
    """A text that CTC gives."""

    tokens: tuple[int, ...]
    log_prob: float  # of the tokens, summed over their alignments


def ctc_prefix_beam_search(
    log_probs: Tensor, lens: Tensor, blank: int, beam: int = 8, nbest: int = 1, candidates: int = 16
) -> list[list[CTCHypothesis]]:
    """The most probable token sequences, each over all of its alignments that the beam has kept (arXiv 1408.2873).

    Args:
      log_probs: (N, T, V); lens: (N,) frames.
      beam: how many prefixes go on from frame to frame.
      nbest: at most so many results a row, best first.
      candidates: how many classes a frame may emit: the most probable, and blank.

    Returns:
      N lists. With a `beam` and `candidates` that leave nothing out the log probabilities are exact, else a little low.

    Raises:
      ValueError: a size is below 1, or `nbest` above `beam`.
    """
    if min(beam, nbest, candidates) < 1 or nbest > beam:
        raise ValueError(
            f"beam, nbest and candidates must be at least 1 and nbest at most beam; got beam={beam}, nbest={nbest}, "
            f"candidates={candidates}"
        )
    probs, classes = log_probs.float().topk(min(candidates, log_probs.shape[-1]), dim=-1)
    rows = zip(
        classes.tolist(),
        probs.exp().tolist(),
        log_probs[..., blank].float().exp().tolist(),
        lens.tolist(),
        strict=True,
    )
    return [_prefix_beam_search(c[:n], p[:n], b[:n], blank, beam)[:nbest] for c, p, b, n in rows]


def _prefix_beam_search(
    classes: list[list[int]], probs: list[list[float]], blank_probs: list[float], blank: int, beam: int
) -> list[CTCHypothesis]:
    # Prefixes are nodes of a tree, numbered as they are met; 0 is the empty one.
    parents, last_tokens = [-1], [-1]
    children: dict[tuple[int, int], int] = {}
    # Of each prefix in the beam the probability of its alignments that end in blank, and of those that end in its last
    # token. They are scaled to sum to 1 over the beam, so that products over many frames do not vanish.
    prefixes: dict[int, tuple[float, float]] = {0: (1.0, 0.0)}
    log_scale = 0.0

    def said(node: int, token: int) -> float:
        """The probability of the alignments of a prefix after which `token` begins anew."""
        in_blank, in_token = prefixes[node]
        return in_blank if token == last_tokens[node] else in_blank + in_token

    for frame_classes, frame_probs, blank_prob in zip(classes, probs, blank_probs, strict=True):
        prob_of = dict(zip(frame_classes, frame_probs, strict=True))
        grown: list[tuple[float, float, int]] = []
        for node, (in_blank, in_token) in prefixes.items():
            token_prob = prob_of.get(last_tokens[node], 0.0)
            from_parent = said(parents[node], last_tokens[node]) if parents[node] in prefixes else 0.0
            grown.append(((in_blank + in_token) * blank_prob, (in_token + from_parent) * token_prob, node))
        # A new prefix has one parent, so what it is worth is known at once.
        floor = min(map(_sum, grown)) if len(grown) == beam else 0.0
        for node, ends in prefixes.items():
            for token, prob in prob_of.items():  # the most probable first
                if sum(ends) * prob <= floor:
                    break
                worth = said(node, token) * prob
                if token != blank and worth > floor and children.get((node, token), -1) not in prefixes:
                    child = children.setdefault((node, token), len(parents))
                    if child == len(parents):
                        parents.append(node)
                        last_tokens.append(token)
                    grown.append((0.0, worth, child))
        grown = sorted((ends for ends in grown if _sum(ends) > 0), key=_sum, reverse=True)[:beam]
        scale = sum(map(_sum, grown))
        log_scale += math.log(scale)
        prefixes = {node: (in_blank / scale, in_token / scale) for in_blank, in_token, node in grown}

    hypotheses = []
    for node, ends in prefixes.items():
        log_prob, tokens = math.log(sum(ends)) + log_scale, []
        while node:
            tokens.append(last_tokens[node])
            node = parents[node]
        hypotheses.append(CTCHypothesis(tuple(reversed(tokens)), log_prob))
    return hypotheses


def _sum(ends: tuple[float, float, int]) -> float:
    return ends[0] + ends[1]


@dataclass(frozen=True, eq=False)
class _Utterance:
    log_probs: Tensor  # (T, V)
    blanks: Tensor  # (T + 1,) float64, log probability that the first t frames are all blank


@dataclass(frozen=True, eq=False)
class CTCPrefix:
    """A hypothesis as CTC sees it.

    Attributes:
      last: its last token; None at the start.
      forward: (T + 1, 2) float64. Log probability that the first t frames say all of the hypothesis, the last of them
        the hypothesis's last token [0] or blank [1], given that the text begins with the hypothesis.
    """

    utterance: _Utterance
    last: int | None
    forward: Tensor


class CTCScorer:
    """CTC's part in hybrid attention/CTC decoding (arXiv 1609.06773, 1706.02737).

    The score of a token is log p(the text begins with hypothesis + token) - log p(it begins with the hypothesis), and
    of the end of text log p(the hypothesis is all of it) - log p(it begins with it): over a whole hypothesis they add
    up to CTC's log probability of it. A score is at least `IMPOSSIBLE`, which is also that of ids that are no class.

    `score` costs one sum over the frames per candidate. The recursion over frames runs for the tokens that were chosen
    alone, and both of its recurrences are linear, with closed solutions (see `linear_recurrence`): there is no loop
    over frames.

    Args:
      weight: of the scores in the search.
      log_probs_of: (T, V) of an utterance by its number; called once by `start`. They are held for as long as the
        search holds a hypothesis of the utterance.
      blank: its class.
      eos_id: the id that ends a text.
    """

    def __init__(self, weight: float, log_probs_of: Callable[[int], Tensor], blank: int, eos_id: int) -> None:
        self.weight = weight
        self._log_probs_of = log_probs_of
        self._blank = blank
        self._eos_id = eos_id

    def start(self, utterance: int) -> CTCPrefix:
        log_probs = self._log_probs_of(utterance)
        blanks = running_sum(log_probs[:, self._blank])
        return CTCPrefix(
            _Utterance(log_probs, blanks), None, torch.stack([blanks.new_full(blanks.shape, -math.inf), blanks], -1)
        )

    def score(self, states: Sequence[CTCPrefix], candidates: Tensor) -> Tensor:
        """The scores (R, C), float32, of appending each of `candidates` (R, C) to the hypothesis of its row."""
        forward = _pad([state.forward for state in states])
        emissions = self._emissions(states, candidates)  # (R, T, C)
        repeats = candidates == _last_tokens(states, candidates.device)[:, None]
        # In float32: all that matters in a sum is close to 0.
        said, said_and_blank = forward.logsumexp(-1).float(), forward[..., 1].float()
        before = torch.where(repeats[:, None], said_and_blank[:, :-1, None], said[:, :-1, None])
        scores = (before + emissions).logsumexp(1)
        frames = torch.tensor([len(state.forward) - 1 for state in states], device=candidates.device)
        all_said = said.gather(1, frames[:, None])
        return torch.where(candidates == self._eos_id, all_said, scores).clamp(min=IMPOSSIBLE)

    def advance(self, states: Sequence[CTCPrefix], tokens: Sequence[int]) -> list[CTCPrefix]:
        """The hypotheses with one token more each."""
        forward = _pad([state.forward for state in states])
        candidates = torch.tensor(tokens, device=forward.device)[:, None]
        emissions = self._emissions(states, candidates)[..., 0].double()
        repeats = candidates == _last_tokens(states, candidates.device)[:, None]
        before = torch.where(repeats, forward[..., 1], forward.logsumexp(-1))[:, :-1]
        prefix = (before + emissions).logsumexp(1)[:, None]
        given_prefix = (before - prefix).masked_fill(prefix == -math.inf, -math.inf)
        in_token = linear_recurrence(given_prefix, running_sum(emissions))
        in_blank = linear_recurrence(in_token[:, :-1], _pad([state.utterance.blanks for state in states]))
        forward = torch.stack([in_token, in_blank], -1)
        return [
            CTCPrefix(state.utterance, token, row[: len(state.forward)])
            for state, token, row in zip(states, tokens, forward, strict=True)
        ]

    def _emissions(self, states: Sequence[CTCPrefix], ids: Tensor) -> Tensor:
        """Log probabilities of `ids` (R, C) at each frame: (R, T, C); -inf beyond a row's frames and for no class."""
        classes = states[0].utterance.log_probs.shape[-1]
        known = (ids >= 0) & (ids < classes) & (ids != self._blank)
        columns = ids.where(known, 0)
        rows_of = defaultdict(list)
        for row, state in enumerate(states):
            rows_of[state.utterance].append(row)
        emissions = [ids.new_empty(0)] * len(states)
        for utterance, rows in rows_of.items():
            found = utterance.log_probs.index_select(1, columns[rows].flatten()).float()
            for row, columns_of_row in zip(rows, found.split(ids.shape[1], dim=1), strict=True):
                emissions[row] = columns_of_row
        return _pad(emissions).masked_fill(~known[:, None], -math.inf)


def _last_tokens(states: Sequence[CTCPrefix], device: torch.device) -> Tensor:
    return torch.tensor([-1 if state.last is None else state.last for state in states], device=device)


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=-math.inf)


def running_sum(log_probs: Tensor) -> Tensor:
    """(..., T) -> (..., T + 1) float64, from 0 on: sums of thousands, of which small differences are taken."""
    log_probs = log_probs.double().clamp(min=IMPOSSIBLE)  # from -inf there is no way back
    return F.pad(log_probs.cumsum(-1), (1, 0))


def linear_recurrence(inputs: Tensor, factors: Tensor) -> Tensor:
    """x[0] = 0, x[t] = factor[t] * (x[t - 1] + input[t - 1]), all given and returned as logarithms.

    Divided by the product of the factors up to t it is a sum over the inputs.

    Args:
      inputs: (R, T); factors: (R, T + 1), the running products of the factors, or (T + 1,) for all rows.

    Returns:
      (R, T + 1)
    """
    sums = (inputs - factors[..., :-1]).logcumsumexp(-1)
    return F.pad(sums + factors[..., 1:], (1, 0), value=-math.inf)


class TokenSpan(NamedTuple):
    """Where a token is said.

    Attributes:
      start, end: its frames are [start, end).
      score: the mean of its log probabilities in these frames.
    """

    token: int
    start: int
    end: int
    score: float


def forced_align(
    log_probs: Tensor, lens: Tensor, tokens: Sequence[Sequence[int]], blank: int
) -> list[tuple[TokenSpan, ...] | None]:
    """The most probable CTC alignment of known tokens, by torchaudio, which aligns one row at a time.

    Args:
      log_probs: (N, T, V); lens: (N,) frames; tokens: N token lists.

    Returns:
      N tuples with a span for each token; None where there is no alignment: there are fewer frames than tokens (and one
      frame more for each token that is the same as the one before), or a token is no class of CTC.

    Raises:
      UserError: torchaudio does not import.
    """
    return [
        _forced_align(row[:length].float(), ids, blank)
        for row, length, ids in zip(log_probs, lens.tolist(), tokens, strict=True)
    ]


def _forced_align(log_probs: Tensor, tokens: Sequence[int], blank: int) -> tuple[TokenSpan, ...] | None:
    """The same of one row, (T, V)."""
    frames, classes = log_probs.shape
    if any(not 0 <= token < classes or token == blank for token in tokens):
        return None
    if len(tokens) + sum(a == b for a, b in pairwise(tokens)) > frames:
        return None
    if not tokens:
        return ()
    functional = import_torchaudio().functional
    targets = torch.tensor([tokens], dtype=torch.int32, device=log_probs.device)
    path, scores = functional.forced_align(log_probs[None], targets, blank=blank)
    if scores.isinf().any():
        return None
    spans = functional.merge_tokens(path[0].cpu(), scores[0].cpu(), blank=blank)
    return tuple(TokenSpan(span.token, span.start, span.end, span.score) for span in spans)
