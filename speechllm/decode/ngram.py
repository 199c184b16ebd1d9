"""N-gram language models over words, for shallow fusion: `WordScorer` makes them a part of the search."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from speechllm.decode.word_scorer import WordModel
from speechllm.errors import UserError
from speechllm.files import replaced_file

# The log10 probability of a word is at least this: kenlm gives -100 to the words that a file without <unk> lacks, with
# which no text would ever have one.
LEAST_LOG10 = -10.0


# Names of the files that `PackedNGram` writes end with it.
PACKED = ".safetensors"
# How often a word is asked for again in a search: so many answers are kept.
_KEPT_ANSWERS = 2**16


def load_ngram(path: str | Path) -> WordModel:
    """A packed n-gram language model by its name, `*.safetensors`; of other files kenlm knows what they are.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read; kenlm is not installed.
    """
    return PackedNGram.load(path) if Path(path).suffix == PACKED else KenLM(path)


class PackedNGram:
    """An n-gram language model over words that needs no library, small enough for a model's folder. A `WordModel`.

    tools/pack_ngram.py makes it. N-grams are a tree from the first word to the last; of each length n the file has

      words.n (N,): the last word, those with the same beginning together and in order; not of n = 1, which are all.
      log_probs.n (N,), float16: natural logarithm of the probability of the last word after the others, or of how much
        more probable they make it (`--relative`).
      backoffs.n (N,), float16: what is added where no longer n-gram is known; not of the longest.
      children.n (N,): how many longer n-grams begin with it; not of the longest.

    and `vocabulary`, the words with a line feed behind each, and `unknown` (1,), the log probability of any other.

    Args:
      tensors: these.

    Raises:
      KeyError, ValueError: they do not belong together.
    """

    def __init__(self, tensors: dict[str, NDArray]) -> None:
        self._tensors = tensors
        vocabulary = tensors["vocabulary"].tobytes().decode("utf-8").split("\n")[:-1]
        self._numbers = {word: i for i, word in enumerate(vocabulary)}
        self._unknown = float(tensors["unknown"][0])
        order = sum(name.startswith("log_probs.") for name in tensors)
        self._log_probs = [tensors[f"log_probs.{n}"] for n in range(1, order + 1)]
        self._words = [np.arange(len(vocabulary)), *(tensors[f"words.{n}"] for n in range(2, order + 1))]
        self._backoffs = [tensors[f"backoffs.{n}"] for n in range(1, order)]
        children = [tensors[f"children.{n}"] for n in range(1, order)]
        self._starts = [np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]) for counts in children]
        sizes = [len(words) for words in self._words]
        if not order or [len(x) for x in self._log_probs] != sizes or [len(x) for x in self._backoffs] != sizes[:-1]:
            raise ValueError("its tables are not of one size")
        if [starts[-1] for starts in self._starts] != sizes[1:]:
            raise ValueError("its n-grams do not begin with shorter ones")
        self._known = lru_cache(_KEPT_ANSWERS)(self._log_prob)

    @classmethod
    def of(
        cls, vocabulary: Sequence[str], levels: Sequence[tuple[NDArray, NDArray, NDArray, NDArray]], unknown: float
    ) -> PackedNGram:
        """From tables, of each length: where its first words are among the shorter ones, its last word's number, log
        probability and back-off weight, (N,) each and in this order; of single words all of `vocabulary`."""
        number = np.uint16 if len(vocabulary) <= np.iinfo(np.uint16).max else np.uint32
        text = "".join(f"{word}\n" for word in vocabulary)
        tensors: dict[str, NDArray] = {
            "vocabulary": np.frombuffer(text.encode(), np.uint8),
            "unknown": np.array([unknown], np.float32),
        }
        for n, (_, words, log_probs, backoffs) in enumerate(levels, start=1):
            tensors[f"log_probs.{n}"] = log_probs.astype(np.float16)
            if n > 1:
                tensors[f"words.{n}"] = words.astype(number)
            if n < len(levels):
                tensors[f"backoffs.{n}"] = backoffs.astype(np.float16)
        for n, ((_, words, *_), (beginnings, *_)) in enumerate(pairwise(levels), start=1):
            tensors[f"children.{n}"] = np.bincount(beginnings, minlength=len(words)).astype(number)
        return cls(tensors)

    @classmethod
    def load(cls, path: str | Path) -> PackedNGram:
        """Raises:
        FileNotFoundError: there is no such file. UserError: it is none that `save` wrote.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such n-gram language model")
        try:
            return cls(load_file(path))
        except (SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{path}: no n-gram language model of tools/pack_ngram.py: {e}") from e

    def save(self, path: str | Path) -> None:
        with replaced_file(path) as tmp:
            save_file(self._tensors, tmp)

    def start(self, utterance: int) -> tuple[int, ...]:
        """The same for all utterances: the words before, of which there is the mark of the beginning."""
        return (self._numbers["<s>"],) if "<s>" in self._numbers and len(self._words) > 1 else ()

    def read(self, texts: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]) -> list[tuple[float, tuple[int, ...]]]:
        """See `WordModel`."""
        return [self._read(before, words) for before, words in texts]

    def expect(self, texts: Sequence[tuple[tuple[int, ...], str]]) -> list[float]:
        """Nothing: of an n-gram a word is known when it has ended."""
        return [0.0] * len(texts)

    def _read(self, before: tuple[int, ...], words: tuple[str, ...]) -> tuple[float, tuple[int, ...]]:
        total, longest = 0.0, len(self._words) - 1
        for word in words:
            number = self._numbers.get(word, -1)
            total += self._known(before, number)
            before = (*before, number)[max(0, len(before) + 1 - longest) :]
        return total, before

    def _log_prob(self, before: tuple[int, ...], word: int) -> float:
        """Of the word with this number, -1 if it is unknown, after these; backing off as needed."""
        total = 0.0
        for i in range(len(before) + 1):
            place = self._find(before[i:])
            if place is None:
                continue
            if word >= 0 and (found := self._child(len(before) - i, place, word)) is not None:
                return total + float(self._log_probs[len(before) - i][found])
            if i < len(before):
                total += float(self._backoffs[len(before) - i - 1][place])
        return total + self._unknown

    def _find(self, words: tuple[int, ...]) -> int | None:
        """Where this n-gram is among those of its length."""
        place: int | None = 0
        for n, word in enumerate(words):
            if word < 0 or place is None:
                return None
            place = self._child(n, place, word)
        return place

    def _child(self, n: int, place: int, word: int) -> int | None:
        """Where the n-gram at `place` with a word more is among those of length n + 1."""
        if n == 0:
            return word
        start, end = self._starts[n - 1][place : place + 2].tolist()
        found = bisect_left(self._words[n], word, start, end)
        return found if found < end and self._words[n][found] == word else None


class KenLM:
    """An n-gram language model over words that kenlm (Heafield, WMT 2011) reads: ARPA, or binary. A `WordModel`.

    The file must have been made from text that is written like the texts of the model (case, punctuation), its words
    separated as `WordScorer` does.

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

    def start(self, utterance: int) -> Any:
        """The same for all utterances."""
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def read(self, texts: Sequence[tuple[Any, tuple[str, ...]]]) -> list[tuple[float, Any]]:
        """See `WordModel`; no word costs more than `LEAST_LOG10`."""
        return [self._read(state, words) for state, words in texts]

    def expect(self, texts: Sequence[tuple[Any, str]]) -> list[float]:
        """Nothing: of an n-gram a word is known when it has ended."""
        return [0.0] * len(texts)

    def _read(self, state: Any, words: tuple[str, ...]) -> tuple[float, Any]:
        total = 0.0
        for word in words:
            following = self._new_state()
            total += max(self._model.BaseScore(state, word, following), LEAST_LOG10) * log(10)
            state = following
        return total, state
