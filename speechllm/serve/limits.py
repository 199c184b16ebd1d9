"""How much at a time: places for uploads and streams, and how often an address may ask."""

from __future__ import annotations

from collections import OrderedDict
from time import monotonic

# Addresses that are remembered; of more, those that have been quiet longest are forgotten.
_MOST_ADDRESSES = 10_000


class Place:
    """A place that one upload or stream has; given back once, however often `release` is called."""

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places

    def release(self) -> None:
        if self._places is not None:
            self._places.taken -= 1
            self._places = None


class Places:
    """Counts who is served; for one thread.

    Attributes:
      taken: how many are.
      is_closed: nobody new is.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken, self.is_closed = most, 0, False

    def take(self) -> Place | None:
        """A place, or None if none is free."""
        if self.is_closed or self.taken >= self.most:
            return None
        self.taken += 1
        return Place(self)


class RateLimiter:
    """So many requests a minute of each address, which may come all at once after a quiet minute: a token bucket."""

    def __init__(self, per_minute: int) -> None:
        self._most, self._per_second = float(per_minute), per_minute / 60
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def wait(self, address: str) -> float:
        """0 for a request that is allowed, which counts; else after how many seconds one will be."""
        now = monotonic()
        left, at = self._left.pop(address, (self._most, now))
        left = min(self._most, left + (now - at) * self._per_second)
        allowed = left >= 1
        self._left[address] = (left - allowed, now)
        if len(self._left) > _MOST_ADDRESSES:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second
