"""What knows words, as a scorer of a search over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speechllm.text.tokenizer import Tokenizer
from speechllm.text.words import TokenTexts, is_spaceless

# What a `WordModel` reads at the end of a text.
END = "</s>"


class WordModel(Protocol):
    """What `WordScorer` asks of what knows words."""

    def start(self, utterance: int) -> Any:
        """The state at the start of the text of the utterance with this number."""
        ...

    def read(self, texts: Sequence[tuple[Any, tuple[str, ...]]]) -> list[tuple[float, Any]]:
        """Of each state and the words that are read after it, perhaps with `END` for the end of the text: their log
        probability, natural logarithm, and the state behind them; the state before stays as it is."""
        ...

    def expect(self, texts: Sequence[tuple[Any, str]]) -> list[float]:
        """Of each state and what has been written of a word after it, "" for nothing: the log probability that is
        expected so far of the words that begin like this. It counts until the word is read."""
        ...


class WordScorerState(NamedTuple):
    """Of a hypothesis: the word model's state, the word that has not ended and what is expected of it, the tokens
    behind it that end inside a character."""

    model_state: Any
    word: str
    expected: float
    pending: tuple[int, ...]


class WordScorer:
    """Adds the log probabilities that a `WordModel` gives.

    A word is what stands between white space, punctuation included; a character of a script without spaces (see
    `word_spans`), and what stands between two such, is one too. A word's score comes with the token that shows its end,
    such as the space of the next word; that of a character without spaces with the token that completes it; that of the
    last word, and of the end of the text, with the end of text. Until then the model may say what it expects of a word
    that is not whole. Over a whole text the scores add up to the log probability of its words and `END`.

    Args:
      model: over the words.
      tokenizer: that of the language model whose search this takes part in.
      weight: of the scores in the search.
    """

    def __init__(self, model: WordModel, tokenizer: Tokenizer, weight: float) -> None:
        self.weight = weight
        self._model = model
        self._eos_id = tokenizer.eos_id
        self._texts = TokenTexts(tokenizer)
        self._pieces: dict[tuple[int, ...], _Piece | None] = {}

    def start(self, utterance: int) -> WordScorerState:
        return WordScorerState(self._model.start(utterance), "", 0.0, ())

    def score(self, states: Sequence[WordScorerState], candidates: Tensor) -> Tensor:
        """The log probabilities (R, C), float32, of the words that each of `candidates` (R, C) ends."""
        # Of rows the words that end and what is written of the next one: many candidates end the same words, or none.
        texts: dict[tuple[int, tuple[str, ...], str], int] = {}
        places = []
        for row, (state, tokens) in enumerate(zip(states, candidates.tolist(), strict=True)):
            for token in tokens:
                words, word = self._ended(state) if token == self._eos_id else self._append(state, token)[:2]
                places.append(texts.setdefault((row, words, word), len(texts)))
        ended = list(dict.fromkeys((row, words) for row, words, _ in texts))
        read = dict(
            zip(ended, self._model.read([(states[row].model_state, words) for row, words in ended]), strict=True)
        )
        expected = self._model.expect([(read[row, words][1], word) for row, words, word in texts])
        scores = [
            read[row, words][0] + of_word - states[row].expected
            for (row, words, _), of_word in zip(texts, expected, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)[places].view(candidates.shape).to(candidates.device)

    def advance(self, states: Sequence[WordScorerState], tokens: Sequence[int]) -> list[WordScorerState]:
        """The hypotheses with one token more each."""
        appended = [self._append(state, token) for state, token in zip(states, tokens, strict=True)]
        read = self._model.read(
            [(state.model_state, words) for state, (words, _, _) in zip(states, appended, strict=True)]
        )
        after = [(model_state, word) for (_, model_state), (_, word, _) in zip(read, appended, strict=True)]
        return [
            WordScorerState(model_state, word, expected, pending)
            for (model_state, word), expected, (_, _, pending) in zip(
                after, self._model.expect(after), appended, strict=True
            )
        ]

    def _append(self, state: WordScorerState, token: int) -> tuple[tuple[str, ...], str, tuple[int, ...]]:
        """The words that end with `token`, the one that has begun then, and the tokens that end inside a character."""
        tokens = (*state.pending, token)
        if tokens not in self._pieces:
            text, is_whole = self._texts.of(tokens)
            self._pieces[tokens] = _split(text) if is_whole else None
        piece = self._pieces[tokens]
        if piece is None:
            return (), state.word, tokens
        if not piece.ends_word:
            return (), state.word + piece.head, ()
        word = state.word + piece.head
        return ((word,) if word else ()) + piece.words, piece.tail, ()

    def _ended(self, state: WordScorerState) -> tuple[tuple[str, ...], str]:
        """The words that end with the text, and `END`; none is begun."""
        piece = _split(state.word + self._texts.of(state.pending)[0])
        return (*(word for word in (piece.head, *piece.words, piece.tail) if word), END), ""


class _Piece(NamedTuple):
    """A text in which words end.

    Attributes:
      head: goes on with the word before it.
      ends_word: that word ends here.
      words: whole ones.
      tail: begins a word; "" if none ends here.
    """

    head: str
    ends_word: bool
    words: tuple[str, ...]
    tail: str


def _split(text: str) -> _Piece:
    words = [""]
    for character in text:
        if character.isspace():
            words.append("")
        elif is_spaceless(character):
            words += [character, ""]
        else:
            words[-1] += character
    if len(words) == 1:
        return _Piece(text, False, (), "")
    return _Piece(words[0], True, tuple(word for word in words[1:-1] if word), words[-1])
