"""The batches of an epoch from streams: data that is read in order, shard by shard, such as remote tar files.

Here lhotse does the work: CutSet.mux mixes, DynamicBucketingSampler makes batches from a buffer. A stream cannot be
planned ahead: to resume in the middle of an epoch it is read again up to that place.

Sources with shards are shared out among the ranks: each reads its own, and makes batches of its own. What one of them
cannot read is missing there alone. Of other streams, which only have lines to read, all ranks read all, and take
batches in turns, from the same bucket.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.base import SamplingConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from lhotse.lazy import Dillable

from speechllm.data.augment.augmenter import AugmentConfig
from speechllm.data.index import Labels
from speechllm.data.manifests.manifest import DataError, ManifestError, SourceConfig, describe_cut
from speechllm.data.manifests.source import ShardError, planned_label, target_text
from speechllm.data.manifests.stream import has_shards, stream_cuts
from speechllm.data.sampling import BatchLimits, Lengths, UtteranceLimits

# Enough cuts to know the distribution of durations, few enough to read them before each epoch.
_CUTS_TO_ESTIMATE_BUCKETS = 1000
# Passes through a rank's share of the shards without an utterance, before the source is taken for unreadable.
_MOST_EMPTY_PASSES = 10


@dataclass(frozen=True)
class Share:
    """What one rank reads of streams: all of it, or its own shards."""

    rank: int = 0
    world_size: int = 1


class Passes(Dillable):
    """One source as a stream: a single pass that says when it has run dry, or (`endless`) pass after pass. Bad lines
    are logged once, and so are shards that cannot be read; more than `max_bad_share` of bad lines in a pass are an
    error."""

    def __init__(
        self,
        source: SourceConfig,
        seed: int,
        endless: bool,
        goes_on: bool,
        max_bad_share: float,
        share: Share,
    ) -> None:
        self._source = source
        self._seed = seed
        self._endless = endless
        self._goes_on = goes_on
        self._max_bad_share = max_bad_share
        self._share = share

    def __iter__(self) -> Iterator[Cut]:
        number = empty = 0
        while True:
            count = bad = 0
            for found in stream_cuts(self._source, self._seed, number, self._share.rank, self._share.world_size):
                if isinstance(found, ShardError):
                    log_once(f"left out: {found}")
                elif isinstance(found, ManifestError):
                    bad += 1
                    log_once(f"bad manifest line: {found}")
                else:
                    count += 1
                    for tag in self._source.unknown_languages(describe_cut(found)):
                        log_once(f"{self._source.path}: the language {tag!r} is no code or name of ISO 639")
                    yield found
            empty = 0 if count else empty + 1
            # a share of the shards may have nothing that can be read; the next pass has other shards
            if empty and (self._share.world_size == 1 or empty == _MOST_EMPTY_PASSES):
                raise DataError(f"{self._source.path}: the stream has no utterance ({bad} bad lines)")
            if bad > self._max_bad_share * (count + bad):
                raise DataError(
                    f"{self._source.path}: {bad} of {count + bad} lines cannot be used (see the log); more than "
                    f"{self._max_bad_share:.0%} is taken for a mistake"
                )
            if not self._endless:
                if self._goes_on:
                    logging.info("%s has run dry after %d utterances; the others go on", self._source.path, count)
                return
            number += 1


@cache
def log_once(message: str) -> None:
    """A warning that is the same in every pass and epoch."""
    logging.warning("%s", message)


def mix(sources: Sequence[SourceConfig], seed: int, max_bad_share: float, share: Share = Share()) -> CutSet:
    """The cuts of the sources as one stream: each once, or with weights repeated without end in their proportion.

    Raises:
        DataError: a source with a weight has no shards. An epoch takes the first of each stream: only shards, in
            another order each time, let others come.
    """
    endless = sources[0].weight is not None
    for source in sources:
        if endless and not has_shards(source):
            raise DataError(
                f"{source.path}: a stream with a weight needs tar shards; without them, take stream: true out"
            )
    streams = [
        CutSet(Passes(source, seed * 1_000_003 + i, endless, len(sources) > 1, max_bad_share, share))
        for i, source in enumerate(sources)
    ]
    if len(streams) == 1:
        return streams[0]
    weights = [source.weight for source in sources] if endless else None
    return CutSet.mux(*streams, weights=weights, seed=seed)


class Admitted(Dillable):
    """The cuts that are within the limits, and no more than `at_most`. Counts the others by reason in `left_out`, and
    notes in `custom` of each what batches are made by: its `speed`, and how many `positions` it takes."""

    def __init__(
        self,
        cuts: CutSet,
        limits: UtteranceLimits,
        augment: AugmentConfig,
        seed: int,
        text_steps: Sequence[str],
        labels: Labels | None,
        at_most: int | None,
    ) -> None:
        self._cuts = cuts
        self._limits = limits
        self._augment = augment
        self._seed = seed
        self._text_steps = text_steps
        self._labels = labels
        self._at_most = at_most
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Cut]:
        self.left_out.clear()
        return islice(self._admitted(), self._at_most)

    def _admitted(self) -> Iterator[Cut]:
        rng = np.random.default_rng([self._seed, 3])
        for cut in self._cuts:
            entry = describe_cut(cut)
            target, tokens = target_text(entry, self._text_steps), None
            if self._labels is not None:
                label = planned_label(entry, self._labels.label_template, self._text_steps)
                tokens = np.array(self._labels.label_lengths([label]))
            lengths = Lengths(np.array([cut.duration], np.float32), np.array([len(target.replace(" ", ""))]), tokens)
            admitted, left_out = self._limits.admit(lengths)
            self.left_out += left_out
            if admitted[0]:
                speeds = self._augment.draw_speeds(1, rng)
                cut.speed = float(speeds[0])
                if self._limits.max_positions:
                    per_position, per_chunk = self._limits.seconds_per_position, self._limits.seconds_per_chunk
                    cut.positions = int(lengths.at(speeds).positions(per_position, per_chunk)[0])
                yield cut


@dataclass
class PaddedSize(SamplingConstraint):
    """`BatchLimits` for lhotse's samplers."""

    limits: BatchLimits
    rows: int = 0
    longest: float = 0.0
    most: int = 0

    def add(self, example: Cut) -> None:
        self.rows += 1
        self.longest = max(self.longest, self.limits.cost(self.measure_length(example)))
        if self.limits.max_positions:
            self.most = max(self.most, example.positions)

    def exceeded(self) -> bool:
        return self.limits.exceeded(self.rows, self.longest, self.most)

    def close_to_exceeding(self) -> bool:
        return self.limits.exceeded(self.rows + 1, self.longest, self.most)

    def reset(self) -> None:
        self.rows, self.longest, self.most = 0, 0.0, 0

    def measure_length(self, example: Cut) -> float:
        return example.duration / example.speed


def stream_batches(
    sources: Sequence[SourceConfig],
    utterance_limits: UtteranceLimits,
    batch_limits: BatchLimits,
    augment: AugmentConfig,
    *,
    max_bad_share: float,
    text_steps: Sequence[str],
    labels: Labels | None,
    epoch_cuts: int | None,
    num_buckets: int,
    buffer_size: int,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
) -> Iterator[list[Cut]]:
    """The batches of one rank in one epoch.

    With shards, ranks may have a few batches more than others: the training loop ends the epoch for all when the first
    runs out. Without, they have equally many.

    Raises:
        DataError: no utterance is within the limits.
    """
    share = Share()
    if any(has_shards(source) for source in sources):
        share, rank, world_size = Share(rank, world_size), 0, 1
        if epoch_cuts is not None:
            epoch_cuts = -(-epoch_cuts // share.world_size)
    # well apart for all seeds and epochs, the same on all ranks
    epoch_seed = seed * 1_000_003 + epoch
    cuts = mix(sources, epoch_seed, max_bad_share, share)
    admitted = Admitted(cuts, utterance_limits, augment, epoch_seed, text_steps, labels, epoch_cuts)
    sample = list(islice(admitted, _CUTS_TO_ESTIMATE_BUCKETS))
    if not sample and share.world_size > 1:
        logging.warning("epoch %d: nothing that this process reads can be used", epoch)
        return
    if not sample:
        reasons = ", ".join(f"{count} {reason}" for reason, count in admitted.left_out.items())
        raise DataError(f"no utterance of {', '.join(s.path for s in sources)} is within the limits ({reasons})")
    buckets = min(num_buckets, len(sample))
    size = PaddedSize(batch_limits)
    sampler = DynamicBucketingSampler(
        CutSet(admitted),
        constraint=size,
        shuffle=True,
        duration_bins=estimate_duration_buckets(sample, buckets, constraint=size) if buckets > 1 else [],
        buffer_size=buffer_size,
        rank=rank,
        world_size=world_size,
        seed=epoch_seed,
    )
    for batch in sampler:
        yield list(batch)
    for reason, count in admitted.left_out.items():
        logging.info("epoch %d: left out %d utterances: %s", epoch, count, reason)
