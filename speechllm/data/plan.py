"""The batches of an epoch, planned ahead from durations and lengths alone.

A plan follows from the data, the settings, the seed and the epoch, and from nothing else; a million utterances take a
second or two. To resume in the middle of an epoch, plan again and start at another batch: nothing is replayed.

Batches are made like lhotse's DynamicBucketingSampler makes them (buckets of like durations with equal hours, random
order within, padded size limited), but from all utterances instead of a buffer of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechllm.data.sampling import BatchLimits, Lengths


@dataclass(frozen=True)
class Plan:
    """Batches of utterance numbers.

    `numbers` (n,) int64 in the order of the batches; batch i is `numbers[bounds[i] : bounds[i + 1]]`. `passes` (n,):
    how often the utterance has come before in this epoch. `speeds` (n,): how many times faster it is played. `longest`:
    seconds of the longest of each batch; `seconds` of all utterances; both as they are played.
    """

    numbers: np.ndarray
    passes: np.ndarray
    speeds: np.ndarray
    bounds: np.ndarray
    longest: np.ndarray
    seconds: float

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def rows(self) -> np.ndarray:
        """How many utterances each batch has."""
        return np.diff(self.bounds)

    @property
    def padding_share(self) -> float:
        """Of the seconds that the batches have with padding."""
        return 1 - self.seconds / float(self.rows @ self.longest) if len(self) else 0.0

    def largest(self) -> list[int]:
        """The batches with the most padded seconds, the longest row, and the most rows."""
        if not len(self):
            return []
        return sorted({int(np.argmax(size)) for size in (self.rows * self.longest, self.longest, self.rows)})

    def batch(self, i: int) -> tuple[list[int], list[int], list[float]]:
        """Numbers, passes and speeds of the `i`-th batch."""
        part = slice(self.bounds[i], self.bounds[i + 1])
        return self.numbers[part].tolist(), self.passes[part].tolist(), self.speeds[part].tolist()


def draw(
    groups: list[np.ndarray], weights: Sequence[float] | None, epoch_cuts: int | None, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The utterances of an epoch in random order.

    Each source (`groups`: the numbers of its utterances) is an endless sequence of shuffled passes through it. An epoch
    takes the next stretch of each, in proportion to the weights; so no utterance comes a second time before all others
    of its source have come once, across epochs too. Without weights the sources together are one such sequence.

    Args:
        epoch_cuts: how many; None for as many as there are.

    Returns:
        numbers (n,), passes (n,): see `Plan`.
    """
    if weights is None:
        groups, weights = [np.concatenate(groups)], [1.0]
    total = epoch_cuts or sum(map(len, groups))
    shares = np.asarray(weights) / np.sum(weights)
    number_parts, pass_parts = [], []
    for which, (group, share) in enumerate(zip(groups, shares, strict=True)):
        start, end = round((epoch - 1) * total * share), round(epoch * total * share)
        first = start // len(group)
        for number in range(first, -(-end // len(group))):
            order = np.random.default_rng([seed, which, number]).permutation(group)
            offset = number * len(group)
            part = order[max(start - offset, 0) : end - offset]
            number_parts.append(part)
            pass_parts.append(np.full(len(part), number - first, dtype=np.int32))
    numbers, passes = np.concatenate(number_parts), np.concatenate(pass_parts)
    order = np.random.default_rng([seed, len(groups), epoch]).permutation(len(numbers))
    return numbers[order], passes[order]


def training_plan(
    numbers: np.ndarray,
    passes: np.ndarray,
    speeds: np.ndarray,
    lengths: Lengths,
    limits: BatchLimits,
    *,
    seconds_per_position: float,
    seconds_per_chunk: float = math.inf,
    num_buckets: int,
    world_size: int,
    seed: int,
    epoch: int,
) -> Plan:
    """Batches of the utterances `numbers`, whose `lengths` (as played at `speeds`) are given in the same order.

    The ranks take turns (rank r has batches r, r + world_size, ...): they get equally many, and the `world_size`
    batches of a step come from the same bucket wherever possible.
    """
    rng = np.random.default_rng([seed, 1, epoch])
    seconds = np.asarray(lengths.seconds, dtype=np.float64)
    positions = np.zeros(len(seconds), dtype=np.int64)
    if limits.max_positions:
        positions = lengths.positions(seconds_per_position, seconds_per_chunk)
    bucket_of = np.searchsorted(_bucket_edges(seconds, num_buckets), seconds, side="right")
    steps: list[list[np.ndarray]] = []
    leftover: list[np.ndarray] = []
    for number in range(num_buckets):
        bucket = np.flatnonzero(bucket_of == number)  # in the random order in which they were drawn
        batches = [bucket[a:b] for a, b in _fill(seconds[bucket], positions[bucket], limits)]
        whole = len(batches) - len(batches) % world_size
        steps += [batches[i : i + world_size] for i in range(0, whole, world_size)]
        leftover += batches[whole:]
    steps += _shared_out(leftover, world_size)
    batches = [batch for i in rng.permutation(len(steps)) for batch in steps[i]]
    return _plan(batches, numbers, passes, speeds, seconds)


def _bucket_edges(seconds: np.ndarray, num_buckets: int) -> np.ndarray:
    """The durations where buckets of equal hours begin; utterances of one duration stay together."""
    in_order = np.sort(seconds)
    hours = np.cumsum(in_order)
    if not len(hours):
        return hours
    return in_order[np.searchsorted(hours, hours[-1] * np.arange(1, num_buckets) / num_buckets)]


def evaluation_plan(seconds: np.ndarray, limits: BatchLimits) -> Plan:
    """Every utterance once, shortest first; equal durations in the order of the manifests."""
    seconds = np.asarray(seconds, dtype=np.float64)
    order = np.argsort(seconds, kind="stable")
    bounds = _fill(seconds[order], np.zeros(len(order), dtype=np.int64), limits)
    batches = [order[a:b] for a, b in bounds]
    passes, speeds = np.zeros(len(order), dtype=np.int32), np.ones(len(order))
    return _plan(batches, np.arange(len(order)), passes, speeds, seconds)


def _fill(seconds: np.ndarray, positions: np.ndarray, limits: BatchLimits) -> list[tuple[int, int]]:
    """Bounds of batches of consecutive utterances, each as large as the limits allow."""
    bounds, start, longest, most = [], 0, 0.0, 0
    for i, (cost, count) in enumerate(zip(limits.cost(seconds).tolist(), positions.tolist(), strict=True)):
        longest, most = max(longest, cost), max(most, count)
        if limits.exceeded(i + 1 - start, longest, most):
            bounds.append((start, i))
            start, longest, most = i, cost, count
    if len(seconds):
        bounds.append((start, len(seconds)))
    return bounds


def _shared_out(batches: list[np.ndarray], world_size: int) -> list[list[np.ndarray]]:
    """What the buckets had left over, as whole steps: the largest batches are halved until every rank has one. Fewer
    utterances than ranks are dropped."""
    batches = list(batches)
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches.pop(largest)
        if len(batch) == 1:
            continue
        batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return [batches[i : i + world_size] for i in range(0, len(batches), world_size)]


def _plan(
    batches: list[np.ndarray], numbers: np.ndarray, passes: np.ndarray, speeds: np.ndarray, seconds: np.ndarray
) -> Plan:
    order = np.concatenate(batches) if batches else np.empty(0, dtype=np.int64)
    bounds = np.cumsum([0] + [len(batch) for batch in batches])
    longest = np.array([seconds[batch].max() for batch in batches])
    return Plan(numbers[order], passes[order], speeds[order], bounds, longest, float(seconds[order].sum()))
