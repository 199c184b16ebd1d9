"""Hotwords for training: phrases that are said, among others that are not, drawn anew each time.

A model that always reads lists with what is said in them learns to write whatever is in a list, and one that never does
learns not to look. So lists are empty, have distractors alone, or phrases of the reference among distractors: Chang et
al., "Context-aware transformer transducer for speech recognition", arXiv 2111.03250.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from speechllm.config import check_limits, setting
from speechllm.data.manifests.source import DataError
from speechllm.prompt.request import Request
from speechllm.text.words import word_spans


@dataclass
class HotwordsConfig:
    """Lists for the prompt's `{hotwords}`, of utterances whose manifest line has none.

    `empty`: the share of training utterances with an empty list; `absent`: that with distractors alone. The others have
    one to `max_said` phrases of the reference, of one to `max_words` words each. Distractors: up to `max_others`,
    evenly drawn. `file`: phrases such as names, one a line, as they are in the normalized texts, which distractors and
    phrases of the reference are chosen from; without it any words are, distractors from other utterances.

    Utterances of validation and test sets have the list in their manifest line, or an empty one.
    """

    empty: float = setting(0.2, at_least=0, at_most=1)
    absent: float = setting(0.2, at_least=0, at_most=1)
    max_said: int = setting(3, at_least=1)
    max_words: int = setting(2, at_least=1)
    max_others: int = setting(20, at_least=0)
    file: str | None = None

    def __post_init__(self) -> None:
        check_limits(self)
        if self.empty + self.absent > 1:
            raise ValueError(f"empty {self.empty:g} and absent {self.absent:g} are shares, together at most 1")


class HotwordDrawer:
    """Draws the lists of utterances.

    Args:
        other_text: gives the text of any other utterance, normalized; None where they cannot be read at random, as in
            streams of data.

    Raises:
        DataError: there is nothing to draw distractors from, or the file has no phrases or cannot be read.
    """

    def __init__(self, config: HotwordsConfig, other_text: Callable[[np.random.Generator], str] | None = None) -> None:
        self.config, self._other_text = config, other_text
        self._phrases: list[str] = []
        if config.file is not None:
            try:
                lines = Path(config.file).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"data.hotwords.file: {config.file}: cannot be read: {error}") from error
            self._phrases = list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
            if not self._phrases:
                raise DataError(f"data.hotwords.file: {config.file}: there is no phrase in it")
        elif other_text is None and config.max_others:
            raise DataError(
                "data.hotwords: distractors are drawn from other utterances, which streams of data (stream: true) do "
                "not have at hand: name a file of phrases (data.hotwords.file), or set data.hotwords.max_others: 0"
            )
        self._known = frozenset(self._phrases)
        self._longest = max((len(_words(phrase)) for phrase in self._phrases), default=config.max_words)

    def with_hotwords(self, request: Request, text: str, rng: np.random.Generator) -> Request:
        """The request of a training utterance with a list that is drawn, unless it has one.

        Args:
            text: what is to be written, normalized.
        """
        return request if request.hotwords is not None else replace(request, hotwords=self.draw(text, rng))

    def draw(self, text: str, rng: np.random.Generator) -> tuple[str, ...]:
        """A list in random order, each phrase once."""
        kind = rng.random()
        if kind < self.config.empty:
            return ()
        said = self._said(text, rng) if kind >= self.config.empty + self.config.absent else []
        others: list[str] = []
        written = f" {' '.join(_words(text))} "
        for phrase in self._others(int(rng.integers(self.config.max_others + 1)), rng):
            if f" {' '.join(_words(phrase))} " not in written:  # a distractor is not said
                others.append(phrase)
        phrases = list(dict.fromkeys([*said, *others]))
        return tuple(phrases[i] for i in rng.permutation(len(phrases)))

    def _said(self, text: str, rng: np.random.Generator) -> list[str]:
        count = int(rng.integers(1, self.config.max_said + 1))
        spans = word_spans(text)
        if self._known:
            found = [
                phrase
                for first in range(len(spans))
                for last in range(first, min(first + self._longest, len(spans)))
                if (phrase := text[spans[first][0] : spans[last][1]]) in self._known
            ]
            return [found[i] for i in rng.permutation(len(found))[:count]]
        return [self._part(text, spans, rng) for _ in range(count)] if spans else []

    def _part(self, text: str, spans: Sequence[tuple[int, int]], rng: np.random.Generator) -> str:
        """One to `max_words` words of a text, one after the other."""
        words = min(int(rng.integers(1, self.config.max_words + 1)), len(spans))
        first = int(rng.integers(len(spans) - words + 1))
        return text[spans[first][0] : spans[first + words - 1][1]]

    def _others(self, count: int, rng: np.random.Generator) -> list[str]:
        if self._phrases:
            return [self._phrases[i] for i in rng.integers(len(self._phrases), size=count)]
        found: list[str] = []
        while len(found) < count and self._other_text is not None:
            text = self._other_text(rng)
            if not (spans := word_spans(text)):
                break
            # several of one text: reading lines takes time
            found += [self._part(text, spans, rng) for _ in range(min(5, count - len(found)))]
        return found


def _words(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]
