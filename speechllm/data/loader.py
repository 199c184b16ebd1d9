"""The data side as training and decoding see it: loaders that give batches, count what they skip, and resume.

train = build_train_loader(config, seed=42)
for epoch in range(1, epochs + 1):
    train.set_epoch(epoch)
    for batch in train:
        ...
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from speechllm.config import check_limits, setting
from speechllm.data.augment.augmenter import AugmentConfig, Augmenter
from speechllm.data.blocks import DURATION_TOLERANCE
from speechllm.data.commands import share_command_output
from speechllm.data.dataset import FEATURES_ON, Batch, BatchPlan, Noted, Skipped, SpeechDataset, WaveformBatch
from speechllm.data.hotwords import HotwordDrawer, HotwordsConfig
from speechllm.data.index import Corpus, Labels, open_index
from speechllm.data.manifests.manifest import DataError, SourceConfig, describe_cut
from speechllm.data.manifests.source import target_text
from speechllm.data.plan import Plan, draw, evaluation_plan, training_plan
from speechllm.data.sampling import BatchLimits, Lengths, UtteranceLimits, curriculum_limit
from speechllm.data.streams import mix, stream_batches
from speechllm.prompt.interleave import StreamingConfig
from speechllm.prompt.label import LabelTemplate
from speechllm.text.normalize import check_steps

# From so many utterances of the corpus the voices of babble are taken.
_VOICES = 300


@dataclass
class DataConfig:
    """The data section of a configuration.

    Sources: `train`, `valid`, and `test` by name of test set. An epoch has every training utterance once, or
    `epoch_cuts` of them; where the sources have weights, they are drawn in that proportion and come again where needed.
    `text`: steps of normalization (`speechllm.text.normalize`) that the targets go through.

    Used in training are utterances between `min_seconds` and `max_seconds`, with at most `max_chars_per_second`,
    `max_tokens_per_second`, `max_tokens_per_frame` (of the encoder's output; CTC needs at most 1) in their label.

    Batches: rows padded to the longest have at most `max_duration` seconds, where a row as long as
    `quadratic_duration` counts twice; at most `max_cuts` rows; at most `max_positions` positions of the language model
    (audio, label, end of text; longer utterances are left out). They come from `num_buckets` buckets of like durations.

    `features_on`: `worker` computes them in the worker processes, `device` on the model's device from waveforms,
    `precomputed` reads those in the manifest. `cache_encoder`: a folder for the outputs of the encoder's frozen part,
    which are computed once for each utterance of `train` and `valid` (see `speechllm.train.encoder_cache`).
    `index_dir`: where the indexes of manifests are kept; null for ~/.cache/speechllm. `buffer_size`: utterances held
    for shuffling, for streams only.

    Curriculum: with `curriculum_seconds`, the first `curriculum_hold_epochs` epochs have utterances up to so
    long; over the `curriculum_epochs` epochs that follow the limit grows evenly to `max_seconds`.

    `hotwords`: lists for the prompt's `{hotwords}` are drawn (`speechllm.data.hotwords`).

    Audio may be `duration_tolerance` seconds shorter or longer than its manifest says.

    More than `max_bad_share` of unusable utterances or manifest lines stop the run.
    """

    train: list[SourceConfig] = field(default_factory=list)
    valid: list[SourceConfig] = field(default_factory=list)
    test: dict[str, list[SourceConfig]] = field(default_factory=dict)
    epoch_cuts: int | None = setting(None, "null is no limit", above=0)
    text: list[str] = field(default_factory=list)
    min_seconds: float = 0.1
    max_seconds: float = setting(30.0, above=0)
    max_chars_per_second: float | None = setting(None, "null is no limit", above=0)
    max_tokens_per_second: float | None = setting(None, "null is no limit", above=0)
    max_tokens_per_frame: float | None = setting(None, "null is no limit", above=0)
    max_duration: float = setting(200.0, above=0)
    quadratic_duration: float | None = setting(None, "null is no limit", above=0)
    max_cuts: int | None = setting(None, "null is no limit", above=0)
    max_positions: int | None = setting(None, "null is no limit", above=0)
    num_buckets: int = setting(20, above=0)
    buffer_size: int = setting(20000, above=0)
    num_workers: int = setting(2, at_least=0)
    features_on: str = "worker"
    cache_encoder: str | None = None
    index_dir: str | None = None
    curriculum_seconds: float | None = None
    curriculum_hold_epochs: int = 1
    curriculum_epochs: int = 0
    duration_tolerance: float = setting(DURATION_TOLERANCE, at_least=0)
    max_bad_share: float = setting(0.5, at_least=0, at_most=1)
    hotwords: HotwordsConfig | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_limits(self)
        if not 0 <= self.min_seconds < self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} and max_seconds {self.max_seconds}: need 0 <= min < max")
        if self.curriculum_seconds is not None and not self.min_seconds < self.curriculum_seconds:
            raise ValueError(
                f"curriculum_seconds {self.curriculum_seconds} is not above min_seconds {self.min_seconds}"
            )
        if self.curriculum_seconds is not None and self.curriculum_epochs < 1:
            raise ValueError("curriculum_seconds needs curriculum_epochs of at least 1")
        check_steps(self.text)
        if self.features_on not in FEATURES_ON:
            raise ValueError(f"features_on: {self.features_on!r} is none of {', '.join(FEATURES_ON)}")
        if self.augment.changes_waveform and (self.features_on == "precomputed" or self.cache_encoder is not None):
            key = "cache_encoder" if self.cache_encoder is not None else "features_on"
            raise ValueError(f"{key}: precomputed features can only have augment.spec_augment")
        self._check_sources()

    def _check_sources(self) -> None:
        for name, values in (("weight", [s.weight is None for s in self.train]), ("stream", self._streams)):
            if len(set(values)) > 1:
                raise ValueError(f"train: give {name} to all sources or to none")
        if any(self._streams) and self.train[0].weight is not None and self.epoch_cuts is None:
            raise ValueError("epoch_cuts: streams with weights have no end; say how many utterances make an epoch")
        for name, sources in (("valid", self.valid), *self.test.items()):
            if any(source.stream for source in sources):
                raise ValueError(f"{name}: a set to evaluate cannot be a stream; take stream: true out")

    @property
    def _streams(self) -> list[bool]:
        return [source.stream for source in self.train]

    @property
    def batch_limits(self) -> BatchLimits:
        return BatchLimits(self.max_duration, self.max_cuts, self.quadratic_duration, self.max_positions)

    def utterance_limits(self, epoch: int, labels: Labels | None) -> UtteranceLimits:
        """What is trained on in `epoch`."""
        longest = self.max_seconds
        if self.curriculum_seconds is not None:
            growing = epoch - self.curriculum_hold_epochs
            longest = curriculum_limit(growing, self.curriculum_seconds, self.curriculum_epochs, longest)
        return UtteranceLimits(
            self.min_seconds,
            longest,
            self.max_chars_per_second,
            self.max_tokens_per_second,
            self.max_tokens_per_frame,
            self.max_positions,
            frame_seconds=labels.frame_seconds if labels is not None else 0.04,
            seconds_per_position=labels.seconds_per_position if labels is not None else 0.0,
            seconds_per_chunk=_seconds_per_chunk(labels),
            fastest=self.augment.fastest,
            slowest=self.augment.slowest,
        )


def _seconds_per_chunk(labels: Labels | None) -> float:
    """Of the streams with the most positions; infinite where nothing is a stream."""
    streaming: StreamingConfig | None = getattr(labels, "streaming", None)
    return math.inf if streaming is None else min(streaming.chunk_seconds)


def _as_is(item: Any) -> Any:
    return item


class Given(NamedTuple):
    """A part of an epoch that is done: each of so many ranks has been given so many batches."""

    world_size: int
    batches: int


class Epochs(Protocol):
    """Where the batches of an epoch come from."""

    def batches(self, epoch: int, start: int, before: Sequence[Given] = ()) -> Iterator[BatchPlan]:
        """This rank's, from the `start`-th on, of what was not given `before`."""

    def largest(self, epoch: int) -> list[BatchPlan]:
        """Some that are as large as batches get, the same for all ranks; none where that is not known."""


class PlannedEpochs:
    """Training epochs planned from indexes."""

    def __init__(
        self, config: DataConfig, corpus: Corpus, seed: int, rank: int, world_size: int, labels: Labels | None
    ) -> None:
        self._config, self._corpus, self._labels = config, corpus, labels
        self._seed, self._rank, self._world_size = seed, rank, world_size
        indexes = corpus.indexes
        tokens = np.concatenate([index.tokens for index in indexes]) if labels is not None else None
        durations, characters = (np.concatenate([getattr(i, n) for i in indexes]) for n in ("durations", "characters"))
        self._lengths = Lengths(durations, characters, tokens)

    def batches(self, epoch: int, start: int, before: Sequence[Given] = ()) -> Iterator[BatchPlan]:
        plan, notes = self._plan(epoch, before)
        if not len(plan):
            if before:  # that was all
                return iter(())
            raise DataError(f"epoch {epoch} has fewer utterances than the run has processes ({self._world_size})")
        for note in notes:
            logging.info("epoch %d: %s", epoch, note)
        logging.info(
            "epoch %d: %d utterances, %.2f h, in %d batches of %.1f s; %.1f %% of them padding",
            epoch, len(plan.numbers), plan.seconds / 3600, len(plan), plan.seconds / max(1, len(plan)),
            100 * plan.padding_share,
        )  # fmt: skip
        return _batches(plan, epoch, start, self._rank, self._world_size)

    def largest(self, epoch: int) -> list[BatchPlan]:
        # a curriculum comes to its longest utterances later
        plan, _ = self._plan(max(epoch, self._config.curriculum_hold_epochs + self._config.curriculum_epochs))
        return [BatchPlan(epoch, *plan.batch(i)) for i in plan.largest()]

    def _plan(self, epoch: int, before: Sequence[Given] = ()) -> tuple[Plan, list[str]]:
        """The batches of all ranks, and what is to be said about the choice of utterances."""
        config, corpus = self._config, self._corpus
        admitted, left_out = config.utterance_limits(epoch, self._labels).admit(self._lengths)
        notes = [f"left out {count} utterances: {reason}" for reason, count in left_out.items()]
        weighted = config.train[0].weight is not None
        drawable: list[np.ndarray] = []
        weights: list[float] = []
        for source, (first, end) in zip(config.train, pairwise(corpus.starts), strict=True):
            group = first + np.flatnonzero(admitted[first:end])
            if len(group):
                drawable.append(group)
                weights.append(1.0 if source.weight is None else source.weight)
            else:
                notes.append(f"no utterance of {source.path} is within the limits")
        if not drawable:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise DataError(f"no training utterance is within the limits: {reasons}")
        numbers, passes = draw(drawable, weights if weighted else None, config.epoch_cuts, self._seed, epoch)
        if weighted:
            counts, _ = np.histogram(numbers, corpus.starts)
            for index, count in zip(corpus.indexes, counts.tolist(), strict=True):
                notes.append(f"{count} times {index.source.path}, each {count / len(index):.2f} times")
        speeds = config.augment.draw_speeds(len(numbers), np.random.default_rng([self._seed, 3, epoch]))
        for given in before:
            plan = self._batched(numbers, passes, speeds, epoch, given.world_size)
            left = slice(plan.bounds[min(given.batches * given.world_size, len(plan))], None)
            numbers, passes, speeds = plan.numbers[left], plan.passes[left], plan.speeds[left]
        return self._batched(numbers, passes, speeds, epoch, self._world_size), notes

    def _batched(
        self, numbers: np.ndarray, passes: np.ndarray, speeds: np.ndarray, epoch: int, world_size: int
    ) -> Plan:
        labels = self._labels
        return training_plan(
            numbers,
            passes,
            speeds,
            self._lengths[numbers].at(speeds),
            self._config.batch_limits,
            seconds_per_position=labels.seconds_per_position if labels is not None else 0.0,
            seconds_per_chunk=_seconds_per_chunk(labels),
            num_buckets=self._config.num_buckets,
            world_size=world_size,
            seed=self._seed,
            epoch=epoch,
        )


class StreamedEpochs:
    """Training epochs from streams."""

    def __init__(self, config: DataConfig, seed: int, rank: int, world_size: int, labels: Labels | None) -> None:
        self._config, self._seed, self._rank, self._world_size = config, seed, rank, world_size
        self._labels = labels

    def batches(self, epoch: int, start: int, before: Sequence[Given] = ()) -> Iterator[BatchPlan]:
        config = self._config
        batches = stream_batches(
            config.train,
            config.utterance_limits(epoch, self._labels),
            config.batch_limits,
            config.augment,
            max_bad_share=config.max_bad_share,
            text_steps=config.text,
            labels=self._labels,
            epoch_cuts=config.epoch_cuts,
            num_buckets=config.num_buckets,
            buffer_size=config.buffer_size,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world_size=self._world_size,
        )
        for cuts in islice(batches, start, None):
            yield BatchPlan(epoch, cuts, [0] * len(cuts), [cut.speed for cut in cuts])

    def largest(self, epoch: int) -> list[BatchPlan]:
        return []


class EvaluationEpochs:
    """The same batches each time."""

    def __init__(self, config: DataConfig, corpus: Corpus, rank: int, world_size: int) -> None:
        limits = BatchLimits(config.max_duration, config.max_cuts, config.quadratic_duration)
        self._plan = evaluation_plan(np.concatenate([index.durations for index in corpus.indexes]), limits)
        self._rank, self._world_size = rank, world_size

    def batches(self, epoch: int, start: int, before: Sequence[Given] = ()) -> Iterator[BatchPlan]:
        return _batches(self._plan, epoch, start, self._rank, self._world_size)

    def largest(self, epoch: int) -> list[BatchPlan]:
        return [BatchPlan(epoch, *self._plan.batch(i)) for i in self._plan.largest()]


def _batches(plan: Plan, epoch: int, start: int, rank: int, world_size: int) -> Iterator[BatchPlan]:
    for i in range(rank + start * world_size, len(plan), world_size):
        yield BatchPlan(epoch, *plan.batch(i))


def _stated(value: Any) -> Any:
    """A setting without what says nothing: earlier versions, whose states go on, did not have all keys of today."""
    if isinstance(value, dict):
        return {key: _stated(part) for key, part in value.items() if part is not False and part not in (None, [], {})}
    return [_stated(part) for part in value] if isinstance(value, list) else value


class SpeechLoader:
    """Gives the batches of one epoch each time it is iterated; made by `build_train_loader`,
    `build_eval_loader`.

    Utterances that cannot be used are counted, logged once with their id, and left out; a batch of which
    nothing remains is passed over. `skipped` counts them by reason, `seen` counts all utterances, `noted` those that
    are used though something is to be known of their audio, such as damage; all since the start of the epoch.

    `state_dict` says which epoch it is and how many batches the caller has been given, whatever the workers
    have prepared ahead. After `load_state_dict`, the next iteration gives exactly the remaining batches, bit
    for bit, with any number of workers.

    With several ranks, a batch of which nothing remains makes a rank end its epoch one batch before the
    others, so a distributed training loop has to end the epoch for all when the first rank runs out.
    """

    def __init__(
        self,
        dataset: SpeechDataset,
        epochs: Epochs,
        *,
        num_workers: int,
        max_bad_share: float,
        identity: dict[str, Any],
        streaming: StreamingConfig | None = None,
        seed: int = 0,
    ) -> None:
        self._dataset = dataset
        self._epochs = epochs
        self._streaming, self._seed = streaming, seed
        self._num_workers = num_workers
        self._max_bad_share = max_bad_share
        self._identity = identity
        self._resumed = False
        self._finished = False
        self._logged: set[str] = set()
        self._before: list[Given] = []  # in this epoch, with other numbers of ranks
        self.epoch = 1
        self.batches = 0
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()

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
            "before": [list(given) for given in self._before],
            "finished": self._finished,
            "seen": self.seen,
            "skipped": dict(self.skipped),
            "noted": dict(self.noted),
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. With another number of ranks, what is left of the epoch is shared out to
        them, but for streams. With another seed, limits of batches or content of the manifests, nobody can tell what is
        left: the epoch begins anew then, with a warning. After a finished epoch all may differ."""
        saved, own = _stated(state["identity"]), _stated(self._identity)
        if "sounds" not in saved:  # a state of an earlier version does not say what augmentation is made of
            own.pop("sounds", None)
        before = [Given(*given) for given in state.get("before", ())]  # not in states of earlier versions
        batches = state["batches"]
        if isinstance(self._epochs, PlannedEpochs) and saved["world_size"] != own["world_size"]:
            before.append(Given(saved["world_size"], batches))
            saved["world_size"], batches = own["world_size"], 0
            if not state["finished"]:
                logging.info("what is left of epoch %d is shared out to %d ranks", state["epoch"], own["world_size"])
        differing = _differences(saved, own)
        if differing and not state["finished"]:
            logging.warning(
                "epoch %d begins anew: its %d batches so far were made with other data settings (%s), and cannot be "
                "told from those to come; some utterances come twice",
                state["epoch"], state["batches"], ", ".join(differing),
            )  # fmt: skip
            self.epoch = state["epoch"]
            self._reset()
            self._resumed = False
            return
        self.epoch = state["epoch"]
        self.batches, self._before = batches, before
        self.seen = state["seen"]
        self.skipped = Counter(state["skipped"])
        self.noted = Counter(state.get("noted"))  # not in states of version 0.1
        self._finished = state["finished"]
        self._resumed = True

    def __iter__(self) -> Iterator[Batch | WaveformBatch]:
        if not self._resumed:
            self._reset()
        self._resumed = False
        if self._finished:
            return
        share_command_output()
        loader = DataLoader(
            self._dataset,
            sampler=self._plans(),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_is,
            worker_init_fn=_leave_sigterm_to_the_main_process,
            pin_memory=torch.cuda.is_available(),
            # a generator of its own: the training loop's random numbers do not depend on how often it resumed
            generator=torch.Generator().manual_seed(0),
        )
        for batch, skipped, noted in loader:
            if isinstance(batch, DataError):
                raise batch
            self.batches += 1
            self._count(batch, skipped, noted)
            if batch is not None:
                yield batch
        self._finished = True
        for reason, count in self.noted.most_common():
            logging.info("epoch %d: used %d utterances with %s; the log has their ids", self.epoch, count, reason)
        self._check_share()

    def largest_batches(self) -> Iterator[Batch | WaveformBatch]:
        """Some batches as large as they get from this epoch on, the same on all ranks; where it is is not changed.

        With streams there are those and whole utterances: which of the two need more depends on model and loss.
        """
        # of the smallest chunks there are the most
        kinds = [None] if self._streaming is None else [min(self._streaming.chunk_seconds), None]
        for plan in self._epochs.largest(self.epoch):
            for chunk_seconds in kinds:
                batch, _, _ = self._dataset[replace(plan, chunk_seconds=chunk_seconds)]
                if isinstance(batch, DataError):
                    raise batch
                if batch is not None:
                    yield batch

    def _plans(self) -> Iterator[BatchPlan]:
        """What is left of the epoch, with the chunks of streams: they follow from the number of the batch."""
        for number, plan in enumerate(self._epochs.batches(self.epoch, self.batches, self._before), self.batches):
            if self._streaming is not None:
                plan = replace(plan, chunk_seconds=self._streaming.draw(self._seed, self.epoch, number))
            yield plan

    def _reset(self) -> None:
        self._finished = False
        self.batches = 0
        self._before = []
        self.seen = 0
        self.skipped = Counter()
        self.noted = Counter()

    def _count(self, batch: Batch | WaveformBatch | None, skipped: list[Skipped], noted: list[Noted]) -> None:
        self.seen += len(skipped) + (0 if batch is None else len(batch))
        for utterance in skipped:
            self.skipped[utterance.reason] += 1
            if utterance.id not in self._logged:
                self._logged.add(utterance.id)
                logging.warning("skipped utterance %s: %s", utterance.id, utterance.details)
        for note in noted:
            self.noted[note.reason] += 1
            if note.id not in self._logged:
                self._logged.add(note.id)
                logging.warning("utterance %s is used with %s: %s", note.id, note.reason, note.details)
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


def _differences(before: dict[str, Any], now: dict[str, Any], inside: str = "") -> list[str]:
    """What differs between two identities of loaders, in words."""
    words = {
        "manifests": "other lines in the manifests",
        "train": "other train sources",
        "labels": "other labels",
        "sounds": "other lines in the manifests of noise or rooms",
    }
    found = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), inside + key
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif isinstance(old, list) or isinstance(new, list) or name in words:
            found.append(words.get(name, f"other {name}"))
        else:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found


def require_sources(sources: Sequence[SourceConfig], purpose: str) -> None:
    """Whether there are any.

    Raises:
        DataError: there are none.
    """
    if not sources:
        raise DataError(f"data: no {purpose} sources are configured")


def build_train_loader(
    config: DataConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    labels: Labels | None = None,
    feature_kind: str = "fbank",
    two_views: bool = False,
) -> SpeechLoader:
    """The training data: mixed, bucketed and augmented.

    Args:
        labels: the model, where it writes more than texts or is trained on streams, or the configuration limits tokens
            or positions.
        feature_kind: that of the model's encoder; see `speechllm.data.features.MEL_BINS`.
        two_views: batches have each utterance twice, with other masks of SpecAugment (see `Batch`), for CR-CTC. The
            limits of batches count it once.

    Raises:
        DataError: two views, and no SpecAugment that they would differ in; no training sources, none of their
            utterances within the limits, or no noise in the noise manifests.
        ManifestError: a manifest is missing or useless.
    """
    require_sources(config.train, "train")
    if two_views and (config.augment.spec_augment is None or config.augment.spec_augment.probability == 0):
        raise DataError("data.augment.spec_augment: two views of an utterance would be the same without it")
    label = LabelTemplate() if labels is None else labels.label_template
    # of a model; what only counts tokens has none
    min_frames, streaming = getattr(labels, "min_frames", 0), getattr(labels, "streaming", None)
    word_times: Literal["required", "used"] | None = None
    if streaming is not None:
        word_times = "required" if getattr(labels, "ctc_head", None) is None else "used"
    if not config.utterance_limits(1, labels).needs_tokens:
        labels = None
    elif labels is None:
        raise DataError("data: limits on tokens or positions need the model that has the tokenizer")
    identity = {"seed": seed, "world_size": world_size, "labels": labels and labels.label_identity(), **asdict(config)}
    identity["two_views"] = two_views
    for name in ("valid", "test", "num_workers", "max_bad_share", "index_dir"):
        del identity[name]
    epochs: Epochs
    corpus: Corpus | None = None
    if config.train[0].stream:
        epochs = StreamedEpochs(config, seed, rank, world_size, labels)
        voices = list(islice(mix(config.train, seed, config.max_bad_share), _VOICES)) if config.augment.babble else []
    else:
        corpus = _corpus(config, config.train, labels)
        del identity["buffer_size"]  # of streams
        identity["manifests"] = [index.fingerprint for index in corpus.indexes]
        epochs = PlannedEpochs(config, corpus, seed, rank, world_size, labels)
        order = np.random.default_rng([seed, 2]).permutation(len(corpus))
        voices = [corpus[int(number)] for number in order[:_VOICES]] if config.augment.babble else []
    augmenter = Augmenter(config.augment, voices)
    if augmenter.fingerprints:
        identity["sounds"] = augmenter.fingerprints
    return SpeechLoader(
        SpeechDataset(
            corpus,
            text_steps=config.text,
            augmenter=augmenter,
            seed=seed,
            features_on=config.features_on,
            feature_kind=feature_kind,
            allow_empty_text=False,
            label=label,
            two_views=two_views,
            duration_tolerance=config.duration_tolerance,
            min_frames=min_frames,
            word_times=word_times,
            hotwords=_hotword_drawer(config, corpus),
        ),
        epochs,
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
        identity=identity,
        streaming=streaming,
        seed=seed,
    )


def _hotword_drawer(config: DataConfig, corpus: Corpus | None) -> HotwordDrawer | None:
    if config.hotwords is None:
        return None
    return HotwordDrawer(config.hotwords, None if corpus is None else _OtherTexts(corpus, config.text))


class _OtherTexts:
    """The text of any utterance of a corpus, for hotwords; goes to the workers."""

    def __init__(self, corpus: Corpus, text_steps: Sequence[str]) -> None:
        self._corpus, self._text_steps = corpus, text_steps

    def __call__(self, rng: np.random.Generator) -> str:
        cut = self._corpus[int(rng.integers(len(self._corpus)))]
        return target_text(describe_cut(cut), self._text_steps)


def build_eval_loader(
    config: DataConfig,
    sources: list[SourceConfig],
    rank: int = 0,
    world_size: int = 1,
    labels: Labels | None = None,
    feature_kind: str = "fbank",
) -> SpeechLoader:
    """Validation or test data: each utterance once, as it is, shortest first, in the same batches each time.

    Args:
        labels: the model, where the loss of its labels is wanted.

    Raises:
        DataError: no sources.
        ManifestError: a manifest is missing or useless.
    """
    require_sources(sources, "evaluation")
    corpus = _corpus(config, sources, None)
    return SpeechLoader(
        SpeechDataset(
            corpus,
            text_steps=config.text,
            augmenter=None,
            seed=0,
            features_on=config.features_on,
            feature_kind=feature_kind,
            allow_empty_text=True,
            label=LabelTemplate() if labels is None else labels.label_template,
            duration_tolerance=config.duration_tolerance,
            min_frames=getattr(labels, "min_frames", 0),
            hotwords=None if config.hotwords is None else "as given",
        ),
        EvaluationEpochs(config, corpus, rank, world_size),
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
        identity={"manifests": [index.fingerprint for index in corpus.indexes], "world_size": world_size},
    )


def _corpus(config: DataConfig, sources: list[SourceConfig], labels: Labels | None) -> Corpus:
    folder = Path(config.index_dir) if config.index_dir else None
    corpus = Corpus([open_index(source, config.text, labels, folder) for source in sources])
    for index in corpus.indexes:
        bad, lines = index.bad_lines.count, index.bad_lines.count + len(index)
        logging.info("%s: %d utterances, %.2f h", index.source.path, len(index), index.hours)
        if bad > config.max_bad_share * lines:
            raise DataError(
                f"{index.source.path}: {bad} of {lines} lines cannot be used, such as {index.bad_lines.messages[0]}; "
                f"more than {config.max_bad_share:.0%} is taken for a mistake"
            )
    return corpus


def _leave_sigterm_to_the_main_process(worker: int) -> None:
    """Where a job is told to stop in all its processes, training still needs its data until it has saved: of a worker
    only a SIGTERM from the main process makes an end."""

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where there are no such jobs
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()
