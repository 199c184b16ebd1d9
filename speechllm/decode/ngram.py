"""An n-gram language model over words, as a scorer of the search (shallow fusion)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speechllm.errors import UserError
from speechllm.text.tokenizer import Tokenizer
from speechllm.text.words import TokenTexts, is_spaceless

# The log10 probability of a word is at least this: kenlm gives -100 to the words that a file without <unk> lacks, with
# which no text would ever have one.
LEAST_LOG10 = -10.0


class WordModel(Protocol):
    """What `NGram` asks of a language model over words."""

    def start(self) -> Any:
        """The state at the start of a sentence."""
        ...

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        """The log10 probability of `word`, "</s>" for the end of the sentence, and the state after it; the one before
        stays as it is."""
        ...


class KenLM:
    """An n-gram language model that kenlm (Heafield, WMT 2011) reads: ARPA, or binary.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: kenlm is not installed, or cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import kenlm
        except ImportError as error:
            raise UserError(
                "n-gram language models need kenlm: pip install kenlm (pip builds it, with a C++ compiler)"
            ) from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such n-gram language model")
        config = kenlm.Config()
        config.show_progress = False
        try:
            self._model = kenlm.Model(str(path), config)
        except OSError as error:
            reason = str(error.__cause__ or error)
            raise UserError(f"{path}: kenlm cannot read it as an n-gram language model: {reason}") from error
        self._new_state = kenlm.State

    def start(self) -> Any:
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        following = self._new_state()
        return self._model.BaseScore(state, word, following), following


class NGramState(NamedTuple):
    """Of a hypothesis: the word model's state, the word that has not ended, the tokens behind it that end inside a
    character."""

    lm_state: Any
    word: str
    pending: tuple[int, ...]


class NGram:
    """Adds the log probabilities of an n-gram language model over words (shallow fusion).

    A word is what stands between white space, punctuation included; a character of a script without spaces (see
    `word_spans`), and what stands between two such, is one too. The file must have been made from text that is written
    like the texts of the model (case, punctuation) and separated like this. A word's score comes with the token that
    shows its end, such as the space of the next word; that of a character without spaces with the token that completes
    it; that of the last word, and of the end of the sentence, with the end of text. Over a whole text the scores add up
    to the natural logarithm of its probability, but no word costs more than `LEAST_LOG10`.

    Args:
      lm: over the words, such as `KenLM`.
      tokenizer: that of the language model whose search this takes part in.
      weight: of the scores in the search.
    """

    def __init__(self, lm: WordModel, tokenizer: Tokenizer, weight: float) -> None:
        self.weight = weight
        self._lm = lm
        self._eos_id = tokenizer.eos_id
        self._texts = TokenTexts(tokenizer)
        self._pieces: dict[tuple[int, ...], _Piece | None] = {}

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Tokenizer, weight: float) -> NGram:
        """With the model in an ARPA or binary file; raises what `KenLM` does."""
        return cls(KenLM(path), tokenizer, weight)

    def start(self, utterance: int) -> NGramState:
        """The same for all utterances."""
        return NGramState(self._lm.start(), "", ())

    def score(self, states: Sequence[NGramState], candidates: Tensor) -> Tensor:
        """The log probabilities (R, C), float32, of the words that each of `candidates` (R, C) ends."""
        rows = []
        for state, tokens in zip(states, candidates.tolist(), strict=True):
            # Most candidates end the same word, or none.
            scores: dict[tuple[str, ...], float] = {(): 0.0}
            row = []
            for token in tokens:
                words = self._ended(state) if token == self._eos_id else self._append(state, token)[0]
                if words not in scores:
                    scores[words] = self._read(state.lm_state, words)[0]
                row.append(scores[words])
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float32, device=candidates.device)

    def advance(self, states: Sequence[NGramState], tokens: Sequence[int]) -> list[NGramState]:
        """The hypotheses with one token more each."""
        following = []
        for state, token in zip(states, tokens, strict=True):
            words, word, pending = self._append(state, token)
            following.append(NGramState(self._read(state.lm_state, words)[1], word, pending))
        return following

    def _append(self, state: NGramState, token: int) -> tuple[tuple[str, ...], str, tuple[int, ...]]:
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

    def _ended(self, state: NGramState) -> tuple[str, ...]:
        """The words that end with the text."""
        piece = _split(state.word + self._texts.of(state.pending)[0])
        return (*(word for word in (piece.head, *piece.words, piece.tail) if word), "</s>")

    def _read(self, lm_state: Any, words: Iterable[str]) -> tuple[float, Any]:
        total = 0.0
        for word in words:
            log10, lm_state = self._lm.score(lm_state, word)
            total += max(log10, LEAST_LOG10) * log(10)
        return total, lm_state


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
