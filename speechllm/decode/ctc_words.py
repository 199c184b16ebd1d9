"""A CTC head of other pieces than the language model's tokens, in the search over these: it scores words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speechllm.decode.ctc import IMPOSSIBLE, CTCPrefix, CTCScorer
from speechllm.decode.word_scorer import END
from speechllm.text.words import is_spaceless

# The end of the pieces of a text; no class of CTC.
_END_PIECE = -1


@dataclass(eq=False)
class _Said:
    """Pieces from the start of a text on: a node of a tree, so that what hypotheses have in common is scored once.

    Attributes:
      log_prob: that what is said begins with the pieces or, with `_END_PIECE`, that they are all of it.
      prefix: of the pieces; None until a piece is to follow.
    """

    before: _Said | None
    piece: int
    log_prob: float
    prefix: CTCPrefix | None = None
    following: dict[int, _Said] = field(default_factory=dict)


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

    Args:
      log_probs_of: (T, V) of an utterance by its number, as for `CTCScorer`.
      pieces_of: a text. A word more may change the pieces of those before it.
      beginnings_of: a text and what is written of the word behind it: what the pieces may be so far, the most probable
        of which counts; none if there is no word that begins like this.
      blank: its class.
    """

    def __init__(
        self,
        log_probs_of: Callable[[int], Tensor],
        pieces_of: Callable[[str], list[int]],
        beginnings_of: Callable[[str, str], list[list[int]]],
        blank: int,
    ) -> None:
        self._scorer = CTCScorer(1.0, log_probs_of, blank, eos_id=_END_PIECE)
        self._pieces_of, self._beginnings_of = pieces_of, beginnings_of

    def start(self, utterance: int) -> SaidWords:
        start = _Said(None, _END_PIECE, 0.0, self._scorer.start(utterance))
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
        for (before, words), (text, pieces), end in zip(unread, found, self._walk(walks), strict=True):
            before.following[words] = SaidWords(text, pieces, before.start, end)
        read = [before.following[words] if words else before for before, words in texts]
        return [
            (after.end.log_prob - before.end.log_prob, after) for (before, _), after in zip(texts, read, strict=True)
        ]

    def expect(self, texts: Sequence[tuple[SaidWords, str]]) -> list[float]:
        """See `speechllm.decode.word_scorer.WordModel`."""
        unknown = [(said, word) for said, word in dict.fromkeys(texts) if word and word not in said.expected]
        beginnings = [self._beginnings_of(_text_before(said.text, word), word) for said, word in unknown]
        walks = [
            _rest(said, pieces) for (said, _), of_word in zip(unknown, beginnings, strict=True) for pieces in of_word
        ]
        ends = iter(self._walk(walks))
        for (said, word), of_word in zip(unknown, beginnings, strict=True):
            log_probs = [next(ends).log_prob - said.end.log_prob for _ in of_word]
            said.expected[word] = max(log_probs, default=IMPOSSIBLE)
        return [said.expected[word] if word else 0.0 for said, word in texts]

    def _walk(self, walks: Sequence[tuple[_Said, Sequence[int]]]) -> list[_Said]:
        """Where pieces lead to from a node of the tree."""
        nodes = [start for start, _ in walks]
        for i in range(max((len(pieces) for _, pieces in walks), default=0)):
            rows = [row for row, (_, pieces) in enumerate(walks) if len(pieces) > i]
            self._add((nodes[row], walks[row][1][i]) for row in rows)
            for row in rows:
                nodes[row] = nodes[row].following[walks[row][1][i]]
        return nodes

    def _add(self, nodes: Iterable[tuple[_Said, int]]) -> None:
        """Of nodes and a piece after each those that the tree does not have."""
        new: dict[_Said, dict[int, None]] = {}
        for before, piece in nodes:
            if piece not in before.following:
                new.setdefault(before, {})[piece] = None
        if not new:
            return
        self._advance([before for before in new if before.prefix is None])
        prefixes = [before.prefix for before in new if before.prefix is not None]
        most = max(map(len, new.values()))
        candidates = [[*pieces, *[_END_PIECE] * (most - len(pieces))] for pieces in new.values()]
        scores = self._scorer.score(prefixes, torch.tensor(candidates, device=prefixes[0].forward.device)).tolist()
        for (before, pieces), of_pieces in zip(new.items(), scores, strict=True):
            for piece, score in zip(pieces, of_pieces, strict=False):  # behind them is padding
                before.following[piece] = _Said(before, piece, before.log_prob + score)

    def _advance(self, nodes: Sequence[_Said]) -> None:
        prefixes = [node.before.prefix for node in nodes if node.before is not None and node.before.prefix is not None]
        if nodes:
            for node, prefix in zip(nodes, self._scorer.advance(prefixes, [n.piece for n in nodes]), strict=True):
                node.prefix = prefix


def _text_before(text: str, word: str) -> str:
    """`text` as it stands before a word."""
    together = not text or (is_spaceless(text[-1]) and is_spaceless(word[0]))
    return text if together else f"{text} "


def _rest(said: SaidWords, pieces: list[int]) -> tuple[_Said, list[int]]:
    """Those of `pieces` that are not said yet, and the node behind what is; all, from the start, if it is another."""
    known = len(said.pieces)
    return (said.end, pieces[known:]) if pieces[:known] == said.pieces else (said.start, pieces)
