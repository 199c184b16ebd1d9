"""Which utterances train and how many make a batch: limits on single utterances and on batches.

The same limits hold for planned epochs (`plan.py`) and for streams (`streams.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import numpy as np


def curriculum_limit(growing: int, start: float, epochs: int, longest: float) -> float:
    """The longest duration (seconds) admitted in the `growing`-th epoch of growth: `start` in epochs up to 0,
    then growing evenly to `longest`, reached with the `epochs`-th."""
    return min(start + (longest - start) * min(max(growing, 0) / epochs, 1.0), longest)


@dataclass(frozen=True)
class Lengths:
    """(n,) arrays of n utterances: seconds, characters and tokens of the label; `tokens` may be None."""

    seconds: np.ndarray
    characters: np.ndarray
    tokens: np.ndarray | None

    def __getitem__(self, chosen: np.ndarray | slice) -> Lengths:
        tokens = None if self.tokens is None else self.tokens[chosen]
        return Lengths(self.seconds[chosen], self.characters[chosen], tokens)

    def at(self, speeds: np.ndarray | float) -> Lengths:
        """The same utterances played so many times faster."""
        return Lengths(self.seconds / speeds, self.characters, self.tokens)

    def positions(self, seconds_per_position: float, seconds_per_chunk: float = math.inf) -> np.ndarray:
        """What the language model reads of each, the prompt's text aside: audio, label and end of text, and of a stream
        the end of each chunk."""
        chunks = np.floor(self.seconds / seconds_per_chunk).astype(np.int64)
        return np.ceil(self.seconds / seconds_per_position).astype(np.int64) + chunks + self.label_tokens + 1

    @property
    def label_tokens(self) -> np.ndarray:
        """(n,): `tokens`, where they are needed."""
        if self.tokens is None:
            raise ValueError("these lengths have no tokens: a limit on them needs the model that has the tokenizer")
        return self.tokens


@dataclass(frozen=True)
class UtteranceLimits:
    """What is not trained on; None for no limit. `min_seconds` and `max_seconds` are as recorded. `fastest`
    and `slowest`: the factors of speed perturbation, which leave a label less audio, or the language model more."""

    min_seconds: float
    max_seconds: float
    max_chars_per_second: float | None = None
    max_tokens_per_second: float | None = None
    max_tokens_per_frame: float | None = None
    max_positions: int | None = None
    frame_seconds: float = 0.04
    seconds_per_position: float = 0.0
    seconds_per_chunk: float = math.inf
    fastest: float = 1.0
    slowest: float = 1.0

    @property
    def needs_tokens(self) -> bool:
        return any((self.max_tokens_per_second, self.max_tokens_per_frame, self.max_positions))

    def admit(self, lengths: Lengths) -> tuple[np.ndarray, Counter[str]]:
        """(n,) bool: which utterances are within the limits, and how many are not, by the reason."""
        admitted = np.ones(len(lengths.seconds), dtype=bool)
        left_out: Counter[str] = Counter()
        for reason, bad in self._violations(lengths):
            if count := int(np.count_nonzero(admitted & bad)):
                left_out[reason] = count
                admitted &= ~bad
        return admitted, left_out

    def _violations(self, lengths: Lengths) -> Iterator[tuple[str, np.ndarray]]:
        seconds = np.asarray(lengths.seconds)
        yield f"shorter than {self.min_seconds:g} s", seconds < np.float32(self.min_seconds)
        yield f"longer than {self.max_seconds:g} s", seconds > np.float32(self.max_seconds)
        if limit := self.max_chars_per_second:
            yield f"more than {limit:g} characters per second", lengths.characters > limit * seconds
        if limit := self.max_tokens_per_second:
            yield f"more than {limit:g} tokens per second", lengths.label_tokens > limit * seconds
        if limit := self.max_tokens_per_frame:
            frames = seconds / (self.fastest * self.frame_seconds)
            yield f"more than {limit:g} tokens per encoder frame", lengths.label_tokens > limit * frames
        if limit := self.max_positions:
            positions = lengths.at(self.slowest).positions(self.seconds_per_position, self.seconds_per_chunk)
            yield f"more than {limit} positions of the language model", positions > limit


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch of padded rows may be; None for no limit.

    `max_duration` seconds, where a row that is `quadratic_duration` long counts twice (d + d^2 / quadratic_duration, as
    in lhotse); `max_cuts` rows; `max_positions` positions of the language model.
    """

    max_duration: float
    max_cuts: int | None = None
    quadratic_duration: float | None = None
    max_positions: int | None = None

    @overload
    def cost(self, seconds: float) -> float: ...

    @overload
    def cost(self, seconds: np.ndarray) -> np.ndarray: ...

    def cost(self, seconds: np.ndarray | float) -> np.ndarray | float:
        """What rows of so many seconds count against `max_duration`."""
        return seconds + seconds**2 / self.quadratic_duration if self.quadratic_duration else seconds

    def exceeded(self, rows: int, longest_cost: float, most_positions: int) -> bool:
        """Whether a batch is too large; a single row never is."""
        return rows > 1 and (
            rows * longest_cost > self.max_duration
            or rows > (self.max_cuts or math.inf)
            or rows * most_positions > (self.max_positions or math.inf)
        )
