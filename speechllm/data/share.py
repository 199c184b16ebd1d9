"""A large set shared out over processes that need not know of each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from speechllm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Every `world_size`-th part of a set, from number `rank` on: shares are disjoint, and together all of it.

    Raises:
        UserError: there is no such rank.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"--rank {self.rank} with --world-size {self.world_size}: ranks are counted from 0 to world size - 1"
            )

    def of(self, parts: Iterable[T]) -> Iterator[T]:
        """This share of `parts`, one at a time."""
        return islice(parts, self.rank, None, self.world_size)
