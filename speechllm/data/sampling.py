"""Which cuts make up the batches of an epoch: mixing, filters, curriculum, buckets. Decided from metadata
alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from lhotse.lazy import Dillable

from speechllm.data.manifest import DataError, SourceConfig, read_manifest

# Enough cuts to know the distribution of durations, few enough to read them before each epoch.
_CUTS_TO_ESTIMATE_BUCKETS = 10000


class DurationFilter(Dillable):
    """Whether a cut's duration lies within bounds (seconds)."""

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.high = high

    def __call__(self, cut: Cut) -> bool:
        return self.low <= cut.duration <= self.high


def curriculum_limit(growing: int, start: float, epochs: int, longest: float) -> float:
    """The longest duration (seconds) admitted in the `growing`-th epoch of growth: `start` in epochs up to 0,
    then growing evenly to `longest`, reached with the `epochs`-th."""
    return min(start + (longest - start) * min(max(growing, 0) / epochs, 1.0), longest)


def mix_sources(sources: list[SourceConfig], seed: int) -> CutSet:
    """Every cut of every source once, lazily, drawn from the sources in proportion to their weights."""
    cuts = [read_manifest(source.path, source.lang) for source in sources]
    if len(cuts) == 1:
        return cuts[0]
    return CutSet.mux(*cuts, weights=[source.weight for source in sources], seed=seed)


def training_batches(
    sources: list[SourceConfig],
    *,
    max_duration: float,
    max_cuts: int | None,
    num_buckets: int,
    buffer_size: int,
    min_seconds: float,
    max_seconds: float,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
) -> Iterator[list[Cut]]:
    """The batches of one rank in one epoch, by lhotse's DynamicBucketingSampler.

    All ranks walk through the same sequence and take every `world_size`-th batch, from the same bucket, so
    they have equally many batches of about the same size.

    Raises:
        DataError: no cut lies between `min_seconds` and `max_seconds`.
        ManifestError: a line of a manifest is wrong.
    """
    # well apart for all seeds and epochs, the same on all ranks
    epoch_seed = seed * 1_000_003 + epoch
    cuts = mix_sources(sources, epoch_seed).filter(DurationFilter(min_seconds, max_seconds))
    sample = list(islice(cuts, _CUTS_TO_ESTIMATE_BUCKETS))
    if not sample:
        raise DataError(
            f"no utterance between {min_seconds:g} s and {max_seconds:g} s in "
            f"{', '.join(source.path for source in sources)}"
        )
    buckets = min(num_buckets, len(sample))
    sampler = DynamicBucketingSampler(
        cuts,
        max_duration=max_duration,
        max_cuts=max_cuts,
        shuffle=True,
        duration_bins=estimate_duration_buckets(sample, buckets) if buckets > 1 else [],
        buffer_size=buffer_size,
        rank=rank,
        world_size=world_size,
        seed=epoch_seed,
    )
    for batch in sampler:
        yield list(batch)


def evaluation_batches(
    sources: list[SourceConfig], *, max_duration: float, max_cuts: int | None, rank: int, world_size: int
) -> Iterator[list[Cut]]:
    """Every cut of every source once, shortest first, in batches of at most `max_duration` seconds with
    padding.

    A longer cut comes alone. Ranks take turns; they may differ by one batch.
    """
    cuts = [cut for source in sources for cut in read_manifest(source.path, source.lang)]
    # the sort is stable: cuts of equal duration keep the order of the manifests
    cuts.sort(key=lambda cut: cut.duration)
    batches: list[list[Cut]] = []
    for cut in cuts:
        full = not batches or len(batches[-1]) >= (max_cuts or math.inf)
        if full or (len(batches[-1]) + 1) * cut.duration > max_duration:
            batches.append([])
        batches[-1].append(cut)
    yield from batches[rank::world_size]
