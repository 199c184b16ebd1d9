"""How long after they were said words of a stream are written.

As the field reports it (Shangguan et al., arXiv 2104.02138, "emission latency"): for each word that was recognized
rightly the time at which it was written, counted in audio that had to be heard, minus its true end; the time to compute
comes on top. The first word of each utterance is reported by itself too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from speechllm.decode.result import StreamedWord
from speechllm.prompt.label import WordTime
from speechllm.scoring.counting import align
from speechllm.text.normalize import normalize_text
from speechllm.text.words import word_spans


@dataclass
class Delays:
    """Seconds from the true end of words to when they were written: of all `words`, and of `first` ones."""

    words: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def add(
        self,
        said: Sequence[WordTime],
        found: Sequence[StreamedWord],
        text_steps: Sequence[str] = (),
        language: str | None = None,
    ) -> None:
        """Count the words of an utterance that were recognized rightly.

        Args:
            said: with their true times; normalized, as `Transcript.words` is.
            found: in the order in which they were written.
            text_steps, language: found words are normalized by these, as the references were.
        """
        normalized = [(normalize_text(word.text, text_steps, language), word) for word in whole_words(found)]
        normalized = [(text, word) for text, word in normalized if text]
        refs, hyps = iter(said), iter(normalized)
        for ref, hyp in align([word.word for word in said], [text for text, _ in normalized]):
            truth, written = next(refs) if ref else None, next(hyps) if hyp else None
            if ref == hyp and truth is not None and written is not None:
                delay = written[1].written - truth.end
                self.words.append(delay)
                if truth is said[0]:
                    self.first.append(delay)


def whole_words(words: Iterable[StreamedWord]) -> list[StreamedWord]:
    """The words, those that were written in several parts as one: written when the last part was."""
    whole: list[StreamedWord] = []
    for word in words:
        if word.joined and whole and len(word_spans(whole[-1].text + word.text)) == 1:
            text = whole[-1].text + word.text
            whole[-1] = replace(whole[-1], text=text, end=word.end, written=word.written)
        else:
            whole.append(word)
    return whole


def percentile(seconds: Sequence[float], share: float) -> float | None:
    """The value below which `share` percent of the values are, linear in between; None of none."""
    return float(np.percentile(seconds, share)) if len(seconds) else None
