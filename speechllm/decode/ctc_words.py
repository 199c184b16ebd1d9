"""A CTC head of other pieces than the language model's tokens, in the search over these: it scores words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechllm.decode.ctc import IMPOSSIBLE, linear_recurrence, running_sum
from speechllm.decode.word_scorer import END
from speechllm.text.tokenizer import Beginnings
from speechllm.text.words import is_spaceless

# The end of the pieces of a text; no class of CTC.
_END_PIECE = -1

# Finite, so that it can be taken from -inf.
_LEAST = -1e300


@dataclass(eq=False, slots=True)
class _Said:
    """Pieces from the start of a text on: a node of a tree, so that what hypotheses have in common is scored once.

    Attributes:
      heard: the utterance whose tree it is in.
      piece: the last one.
      log_prob: that what is said begins with the pieces or, with `_END_PIECE`, that they are all of it.
      scores: log probabilities that pieces follow; -inf if they cannot. Most of these pieces never become nodes.
      forward: (2, T + 1) float64. Log probability that the first t frames say all of the pieces [0], and the last of
        these frames is blank [1], given that the text begins with the pieces; None until a piece is to follow.
    """

    heard: _Heard
    before: _Said | None
    piece: int
    log_prob: float
    forward: NDArray[np.float64] | None = None
    scores: dict[int, float] = field(default_factory=dict)
    following: dict[int, _Said] = field(default_factory=dict)

    def log_prob_of(self, piece: int) -> float:
        """Like `log_prob`, with one more piece that has a score."""
        return self.log_prob + max(self.scores[piece], IMPOSSIBLE)

    def after(self, piece: int) -> _Said:
        """The node behind a piece that has a score."""
        if piece not in self.following:
            self.following[piece] = _Said(self.heard, self, piece, self.log_prob_of(piece))
        return self.following[piece]

    def until(self, anew: bool) -> NDArray[np.float64]:
        """(T,) Log probability that a piece may begin at each frame; `anew`: the last one itself, so after a blank."""
        return cast("NDArray[np.float64]", self.forward)[int(anew), :-1]


class _Heard:
    """What CTC hears in the T frames of an utterance, and what that says of pieces.

    The scores of all pieces that may follow some others are one product, of what `_Said.until` gives and the classes'
    probabilities. It is on the CPU wherever the model is: Python decides which pieces, one by one.
    """

    def __init__(self, log_probs: Tensor, blank: int) -> None:
        self._log_probs, self._blank = log_probs.cpu(), blank
        self._blanks = running_sum(self._log_probs[:, blank])
        frames = len(log_probs)
        # Of the classes that were asked for; the first row is that of all that is no class.
        self._row_of: dict[int, int] = {}
        self._probs = np.zeros((1, frames))
        self._sums = np.zeros((1, frames + 1))  # of log probabilities, of the first t frames
        forward = self._blanks.expand(2, -1).numpy()
        self.start = _Said(self, None, _END_PIECE, 0.0, forward)

    def score(self, missing: Mapping[_Said, Iterable[int]]) -> None:
        """Let nodes of the tree have the scores of pieces."""
        pairs = [(node, piece) for node, pieces in missing.items() for piece in pieces]
        self._know(piece for _, piece in pairs)
        self._advance([node for node in missing if node.forward is None])
        for (node, piece), score in zip(pairs, self._scores(pairs), strict=True):
            node.scores[piece] = score

    def _know(self, pieces: Iterable[int]) -> None:
        classes = self._log_probs.shape[1]
        new = [p for p in dict.fromkeys(pieces) if p not in self._row_of and 0 <= p < classes and p != self._blank]
        if new:
            self._row_of.update(zip(new, range(len(self._probs), len(self._probs) + len(new)), strict=True))
            log_probs = self._log_probs[:, new].T.double()
            self._probs = np.concatenate([self._probs, log_probs.exp().numpy()])
            self._sums = np.concatenate([self._sums, running_sum(log_probs).numpy()])

    def _scores(self, pairs: Sequence[tuple[_Said, int]]) -> list[float]:
        """Log probabilities that a piece follows a node."""
        asked = [(node, piece == node.piece) for node, piece in pairs]
        row_of = {key: row for row, key in enumerate(dict.fromkeys(asked))}
        until = np.stack([node.until(anew) for node, anew in row_of])
        most = until.max(1, keepdims=True).clip(min=_LEAST)
        with np.errstate(divide="ignore"):
            scores = np.log(np.exp(until - most) @ self._probs.T) + most
        rows, columns = [row_of[key] for key in asked], [self._row_of.get(piece, 0) for _, piece in pairs]
        return [
            float(cast("NDArray[np.float64]", node.forward)[0, -1]) if piece == _END_PIECE else score
            for (node, piece), score in zip(pairs, scores[rows, columns].tolist(), strict=True)
        ]

    def _advance(self, nodes: Sequence[_Said]) -> None:
        """Have `forward` of nodes, in closed form: see `CTCScorer`."""
        if not nodes:
            return
        before = [cast(_Said, node.before) for node in nodes]
        until = np.stack([b.until(b.piece == node.piece) for b, node in zip(before, nodes, strict=True)])
        scores = np.array([b.scores[node.piece] for b, node in zip(before, nodes, strict=True)])[:, None]
        given = until - np.where(scores > -inf, scores, inf)  # nothing is left of what cannot be
        sums = self._sums[[self._row_of.get(node.piece, 0) for node in nodes]]
        in_piece = linear_recurrence(torch.from_numpy(given), torch.from_numpy(sums))
        in_blank = linear_recurrence(in_piece[:, :-1], self._blanks)
        for node, forward in zip(nodes, torch.stack([in_piece.logaddexp(in_blank), in_blank], 1).numpy(), strict=True):
            node.forward = forward


@dataclass(eq=False)
class SaidWords:
    """The words of a hypothesis, as CTC sees them.

    Attributes:
      text: of them; pieces: of the text.
      start, end: the nodes before the first and behind the last of the pieces.
      following: what was read after them.
      expected: of what was written of a word after them.
    """

    text: str
    pieces: list[int]
    start: _Said
    end: _Said
    following: dict[tuple[str, ...], SaidWords] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)


class CTCWords:
    """CTC's log probabilities of words: a `WordModel`. Over a whole text they add up to that of its pieces.

    They are those that `CTCScorer` gives for the pieces, for many pieces and hypotheses at a time.

    Args:
      log_probs_of: (T, V) of an utterance by its number, as for `CTCScorer`.
      pieces_of: a text. A word more may change the pieces of those before it.
      beginnings_of: a text and what is written of words, each of which may be behind it (`Tokenizer.beginnings`). Of
        what may be the pieces of a word so far, the most probable counts; none if no word begins like this.
      blank: its class.
    """

    def __init__(
        self,
        log_probs_of: Callable[[int], Tensor],
        pieces_of: Callable[[str], list[int]],
        beginnings_of: Callable[[str, Sequence[str]], Beginnings],
        blank: int,
    ) -> None:
        self._log_probs_of, self._blank = log_probs_of, blank
        self._pieces_of, self._beginnings_of = pieces_of, beginnings_of

    def start(self, utterance: int) -> SaidWords:
        start = _Heard(self._log_probs_of(utterance), self._blank).start
        return SaidWords("", [], start, start)

    def read(self, texts: Sequence[tuple[SaidWords, tuple[str, ...]]]) -> list[tuple[float, SaidWords]]:
        """See `speechllm.decode.word_scorer.WordModel`."""
        unread = dict.fromkeys((before, words) for before, words in texts if words and words not in before.following)
        found, walks = [], []
        for before, words in unread:
            text = before.text
            for word in words:
                if word != END:
                    text = _text_before(text, word) + word
            pieces = self._pieces_of(text)
            found.append((text, pieces))
            walks.append(_rest(before, [*pieces, _END_PIECE] if words[-1] == END else pieces))
        for (before, words), (text, pieces), end in zip(unread, found, _walk(walks), strict=True):
            before.following[words] = SaidWords(text, pieces, before.start, end)
        read = [before.following[words] if words else before for before, words in texts]
        return [
            (after.end.log_prob - before.end.log_prob, after) for (before, _), after in zip(texts, read, strict=True)
        ]

    def expect(self, texts: Sequence[tuple[SaidWords, str]]) -> list[float]:
        """See `speechllm.decode.word_scorer.WordModel`."""
        unknown: dict[tuple[SaidWords, str], list[str]] = {}  # words by what is before them
        for said, word in dict.fromkeys(texts):
            if word and word not in said.expected:
                unknown.setdefault((said, _text_before(said.text, word)), []).append(word)
        beginnings = [self._beginnings_of(text, words) for (_, text), words in unknown.items()]
        bases = _walk([_rest(said, [*common]) for (said, _), (common, _) in zip(unknown, beginnings, strict=True)])
        distinct = [dict.fromkeys(rest for of_word in of_words for rest in of_word) for _, of_words in beginnings]
        walks = [(base, rest) for base, rests in zip(bases, distinct, strict=True) for rest in rests]
        log_probs = iter(_log_probs(walks))
        for ((said, _), words), (_, of_words), rests in zip(unknown.items(), beginnings, distinct, strict=True):
            expected = {rest: next(log_probs) - said.end.log_prob for rest in rests}
            for word, of_word in zip(words, of_words, strict=True):
                said.expected[word] = max(map(expected.__getitem__, of_word), default=IMPOSSIBLE)
        return [said.expected[word] if word else 0.0 for said, word in texts]


def _walk(walks: Sequence[tuple[_Said, Sequence[int]]]) -> list[_Said]:
    """Where pieces lead to from nodes of trees."""
    nodes, places = [start for start, _ in walks], [0] * len(walks)
    waiting: Sequence[int] = range(len(walks))
    while waiting:
        missing, waits = [], []
        for row in waiting:
            node, pieces = nodes[row], walks[row][1]
            place = places[row]
            while place < len(pieces) and pieces[place] in node.scores:
                node = node.following.get(pieces[place]) or node.after(pieces[place])
                place += 1
            if place < len(pieces):
                places[row] = place
                missing.append((node, pieces[place]))
                waits.append(row)
            nodes[row] = node
        _score(missing)
        waiting = waits
    return nodes


def _log_probs(walks: Sequence[tuple[_Said, Sequence[int]]]) -> list[float]:
    """`log_prob` where pieces lead to from nodes of trees."""
    nodes = _walk([(start, pieces[:-1]) for start, pieces in walks])
    lasts = [pieces[-1] if pieces else None for _, pieces in walks]
    _score((node, piece) for node, piece in zip(nodes, lasts, strict=True) if piece is not None)
    return [
        node.log_prob if piece is None else node.log_prob_of(piece) for node, piece in zip(nodes, lasts, strict=True)
    ]


def _score(asked: Iterable[tuple[_Said, int]]) -> None:
    """Let nodes of trees have the scores of pieces."""
    missing: dict[_Heard, dict[_Said, dict[int, None]]] = {}
    for node, piece in asked:
        if piece not in node.scores:
            missing.setdefault(node.heard, {}).setdefault(node, {})[piece] = None
    for heard, of_nodes in missing.items():
        heard.score(of_nodes)


def _text_before(text: str, word: str) -> str:
    """`text` as it stands before a word."""
    together = not text or (is_spaceless(text[-1]) and is_spaceless(word[0]))
    return text if together else f"{text} "


def _rest(said: SaidWords, pieces: list[int]) -> tuple[_Said, list[int]]:
    """Those of `pieces` that are not said yet, and the node behind what is; all, from the start, if it is another."""
    known = len(said.pieces)
    return (said.end, pieces[known:]) if pieces[:known] == said.pieces else (said.start, pieces)
