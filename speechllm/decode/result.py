"""What the searches find, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Stopped = Literal["end", "length", "loop"]


@dataclass(frozen=True)
class Hypothesis:
    """One sequence of tokens that a search has followed to its end.

    Attributes:
      tokens: without the end of text.
      log_probs: the language model's, natural logarithm, of each token and, where the text has ended, of its end.
        Without a language model, those of CTC or of the transducer, which have no end.
      score: what the search ranks by: larger is better.
      stopped: by the end of text; or by the guards: `length` (the longest text that the audio can have) or `loop`.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    stopped: Stopped

    @property
    def confidence(self) -> float:
        """The geometric mean of the tokens' probabilities, 0 to 1."""
        return math.exp(sum(self.log_probs) / len(self.log_probs)) if self.log_probs else 0.0


@dataclass(frozen=True)
class Word:
    """A word, or a character in languages without spaces, and when it is said: seconds from the start of the audio."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class StreamedWord(Word):
    """A word of a stream; once written, it is never taken back.

    Attributes:
      written: how much audio, in seconds, had to be heard before it was written; `written - end` is its delay, the time
        to compute not counted.
      segment: number of the segment that it is in, from 0 (see `interface.StreamingOptions.endpoint_seconds`).
      joined: there is no white space between it and the word before, in the same segment.
    """

    written: float
    segment: int = 0
    joined: bool = False


def streamed_text(words: Iterable[StreamedWord]) -> str:
    """The text of words; segments have a space between them."""
    text = "".join(word.text if word.joined else f" {word.text}" for word in words)
    return text.removeprefix(" ")


@dataclass(frozen=True)
class Recognition:
    """What was recognized in one utterance.

    Attributes:
      text: the result; that of `nbest[0]`, unless there was a `fallback`.
      nbest: best first; `texts` are theirs.
      fallback: what `text` is when a guard has stopped the search: `cut` (the loop is cut off) or `ctc` (that of the
        CTC head); None when the search has ended by itself.
      ctc_text: what the CTC head hears beside the search that `text` is from; None without a head or another search,
        and for translations.
      words: with times, if they were asked for, or the model writes them.
      language: of the speech, if the model writes it.
    """

    text: str
    nbest: tuple[Hypothesis, ...]
    texts: tuple[str, ...]
    fallback: Literal["cut", "ctc"] | None = None
    ctc_text: str | None = None
    words: tuple[Word, ...] | None = None
    language: str | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.nbest[0].tokens

    @property
    def log_probs(self) -> tuple[float, ...]:
        return self.nbest[0].log_probs

    @property
    def confidence(self) -> float:
        """That of the best hypothesis, 0 to 1."""
        return self.nbest[0].confidence


def without_sound(ctc_text: str | None = None, has_words: bool = False) -> Recognition:
    """The result of an utterance that is too short for anything to be heard in it."""
    return Recognition("", (Hypothesis((), (), 0.0, "end"),), ("",), ctc_text=ctc_text, words=() if has_words else None)
