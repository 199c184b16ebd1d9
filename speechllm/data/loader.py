"""The data side as training and decoding see it: loaders that give batches, count what they skip, and resume.

train = build_train_loader(config, seed=42)
for epoch in range(1, epochs + 1):
    train.set_epoch(epoch)
    for batch in train:
        ...
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from lhotse.cut import Cut
from torch.utils.data import DataLoader

from speechllm.data.augment import AugmentConfig, Augmenter
from speechllm.data.dataset import Batch, BatchPlan, Skipped, SpeechDataset
from speechllm.data.manifest import DataError, ManifestError, SourceConfig, read_manifest
from speechllm.data.sampling import curriculum_limit, evaluation_batches, training_batches


@dataclass
class DataConfig:
    """The data section of a configuration.

    Sources: `train`, `valid`, and `test` by name of test set. Batches: at most `max_duration` seconds of
    audio and `max_cuts` utterances (null: any number), from one of `num_buckets` buckets of like durations,
    with `buffer_size` utterances held in memory for shuffling. Only training utterances between `min_seconds`
    and `max_seconds` are used.

    Curriculum: with `curriculum_seconds`, the first `curriculum_hold_epochs` epochs have utterances up to so
    long; over the `curriculum_epochs` epochs that follow the limit grows evenly to `max_seconds`.

    A training epoch in which more than `max_bad_share` of the utterances are unusable stops the run.
    """

    train: list[SourceConfig] = field(default_factory=list)
    valid: list[SourceConfig] = field(default_factory=list)
    test: dict[str, list[SourceConfig]] = field(default_factory=dict)
    max_duration: float = 200.0
    max_cuts: int | None = None
    num_buckets: int = 20
    buffer_size: int = 20000
    num_workers: int = 2
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    curriculum_seconds: float | None = None
    curriculum_hold_epochs: int = 1
    curriculum_epochs: int = 0
    max_bad_share: float = 0.5
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        for name in ("max_duration", "num_buckets", "buffer_size", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not more than 0")
        if self.max_cuts is not None and self.max_cuts < 1:
            raise ValueError(f"max_cuts: {self.max_cuts} is not at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers: {self.num_workers} is negative")
        if not 0 <= self.min_seconds < self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} and max_seconds {self.max_seconds}: need 0 <= min < max")
        if self.curriculum_seconds is not None:
            if not self.min_seconds < self.curriculum_seconds:
                raise ValueError(
                    f"curriculum_seconds {self.curriculum_seconds} is not above min_seconds {self.min_seconds}"
                )
            if self.curriculum_epochs < 1:
                raise ValueError("curriculum_seconds needs curriculum_epochs of at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share: {self.max_bad_share} is not between 0 and 1")


class _Plans:
    """The batches of an epoch as the DataLoader's sampler, from the `start`-th on; runs in the main
    process."""

    def __init__(self, batches: Iterator[list[Cut]], epoch: int, start: int) -> None:
        self._batches = batches
        self._epoch = epoch
        self._start = start

    def __iter__(self) -> Iterator[BatchPlan]:
        for cuts in islice(self._batches, self._start, None):
            yield BatchPlan(self._epoch, cuts)


def _as_is(item: Any) -> Any:
    return item


class SpeechLoader:
    """Gives the batches of one epoch each time it is iterated; made by `build_train_loader`,
    `build_eval_loader`.

    Utterances that cannot be used are counted, logged once with their id, and left out; a batch of which
    nothing remains is passed over. `skipped` counts them by reason, `seen` counts all utterances; both since
    the start of the epoch.

    `state_dict` says which epoch it is and how many batches the caller has been given, whatever the workers
    have prepared ahead. After `load_state_dict`, the next iteration gives exactly the remaining batches, bit
    for bit, with any number of workers.

    With several ranks, a batch of which nothing remains makes a rank end its epoch one batch before the
    others, so a distributed training loop has to end the epoch for all when the first rank runs out.
    """

    def __init__(
        self,
        dataset: SpeechDataset,
        batches_of_epoch: Callable[[int], Iterator[list[Cut]]],
        *,
        num_workers: int,
        max_bad_share: float,
        identity: dict[str, Any],
    ) -> None:
        self._dataset = dataset
        self._batches_of_epoch = batches_of_epoch
        self._num_workers = num_workers
        self._max_bad_share = max_bad_share
        self._identity = identity
        self._resumed = False
        self._finished = False
        self._logged: set[str] = set()
        self.epoch = 1
        self.batches = 0
        self.seen = 0
        self.skipped: Counter[str] = Counter()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 1) of the next iteration. Another one than was loaded forgets the place in
        it."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._reset()
            self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values: epoch, batches given so far, counts, and what the batches depend on."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "finished": self._finished,
            "seen": self.seen,
            "skipped": dict(self.skipped),
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: seed, number of ranks or data settings differ in the middle of an epoch, so that the
                remaining batches cannot be the same. After a finished epoch they may differ.
        """
        saved = state["identity"]
        differing = [key for key in {**self._identity, **saved} if self._identity.get(key) != saved.get(key)]
        if differing and not state["finished"]:
            details = ", ".join(
                f"{key} was {saved.get(key)!r}, is {self._identity.get(key)!r}" for key in sorted(differing)
            )
            raise DataError(
                f"cannot resume in the middle of epoch {state['epoch']} with other data settings: {details}; "
                "put them back, or start from a checkpoint's weights with a new run"
            )
        self.epoch = state["epoch"]
        self.batches = state["batches"]
        self.seen = state["seen"]
        self.skipped = Counter(state["skipped"])
        self._finished = state["finished"]
        self._resumed = True

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._reset()
        self._resumed = False
        if self._finished:
            return
        loader = DataLoader(
            self._dataset,
            sampler=_Plans(self._batches_of_epoch(self.epoch), self.epoch, self.batches),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            # a generator of its own: the training loop's random numbers do not depend on how often it resumed
            generator=torch.Generator().manual_seed(0),
        )
        for batch, skipped in loader:
            self.batches += 1
            self._count(batch, skipped)
            if batch is not None:
                yield batch
        self._finished = True
        self._check_share()

    def _reset(self) -> None:
        self._finished = False
        self.batches = 0
        self.seen = 0
        self.skipped = Counter()

    def _count(self, batch: Batch | None, skipped: list[Skipped]) -> None:
        self.seen += len(skipped) + (0 if batch is None else len(batch))
        for utterance in skipped:
            self.skipped[utterance.reason] += 1
            if utterance.id not in self._logged:
                self._logged.add(utterance.id)
                logging.warning("skipped utterance %s: %s", utterance.id, utterance.details)
        # not before a sample is large enough to tell; the end of the epoch tells of small sets
        if self.seen >= 1000:
            self._check_share()

    def _check_share(self) -> None:
        bad = sum(self.skipped.values())
        if bad > self._max_bad_share * self.seen or (bad and bad == self.seen):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
            raise DataError(
                f"{bad} of {self.seen} utterances in epoch {self.epoch} cannot be used ({reasons}); "
                f"more than {self._max_bad_share:.0%} is taken for a mistake; the log has their ids"
            )


def build_train_loader(config: DataConfig, seed: int, rank: int = 0, world_size: int = 1) -> SpeechLoader:
    """The training data: each utterance of `config.train` once an epoch, mixed, bucketed and augmented.

    Raises:
        DataError: no training sources, or no noise in the noise manifests.
        ManifestError: a manifest is missing.
    """
    _check_sources("train", config.train)

    def batches_of_epoch(epoch: int) -> Iterator[list[Cut]]:
        longest = config.max_seconds
        if config.curriculum_seconds is not None:
            growing = epoch - config.curriculum_hold_epochs
            longest = curriculum_limit(growing, config.curriculum_seconds, config.curriculum_epochs, longest)
        return training_batches(
            config.train,
            max_duration=config.max_duration,
            max_cuts=config.max_cuts,
            num_buckets=config.num_buckets,
            buffer_size=config.buffer_size,
            min_seconds=config.min_seconds,
            max_seconds=longest,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
        )

    settings = asdict(config)
    for name in ("valid", "test", "num_workers", "max_bad_share"):
        del settings[name]
    return SpeechLoader(
        SpeechDataset(Augmenter(config.augment), seed, allow_empty_text=False),
        batches_of_epoch,
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
        identity={"seed": seed, "world_size": world_size, **settings},
    )


def build_eval_loader(
    config: DataConfig, sources: list[SourceConfig], rank: int = 0, world_size: int = 1
) -> SpeechLoader:
    """Validation or test data: each utterance once, as it is, shortest first, in the same batches each time.

    Raises:
        DataError: no sources.
        ManifestError: a manifest is missing.
    """
    _check_sources("evaluation", sources)

    def batches_of_epoch(epoch: int) -> Iterator[list[Cut]]:
        return evaluation_batches(
            sources,
            max_duration=config.max_duration,
            max_cuts=config.max_cuts,
            rank=rank,
            world_size=world_size,
        )

    return SpeechLoader(
        SpeechDataset(None, seed=0, allow_empty_text=True),
        batches_of_epoch,
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
        identity={"sources": [asdict(source) for source in sources], "world_size": world_size},
    )


def _check_sources(what: str, sources: list[SourceConfig]) -> None:
    if not sources:
        raise DataError(f"data: no {what} sources are configured")
    for source in sources:
        try:
            next(iter(read_manifest(source.path, source.lang)))
        except StopIteration:
            raise ManifestError(f"{source.path}: the manifest is empty") from None
