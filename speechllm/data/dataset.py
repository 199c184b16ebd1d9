"""Cuts to batches of features. Runs in the data loader's worker processes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from speechllm.data.audio import load_precomputed, load_samples
from speechllm.data.audio_file import AudioNote, UtteranceError
from speechllm.data.augment.augmenter import Augmenter
from speechllm.data.augment.specaugment import SpecAugmentConfig, spec_augment, spec_augment_twice
from speechllm.data.blocks import DURATION_TOLERANCE
from speechllm.data.features import (
    FRAME_SHIFT,
    SAMPLE_RATE,
    extract_features,
    extract_features_padded,
    num_frames,
)
from speechllm.data.hotwords import HotwordDrawer
from speechllm.data.index import Corpus
from speechllm.data.manifests.manifest import describe_cut
from speechllm.data.manifests.source import DataError, Entry, label_of, said_words, target_text
from speechllm.prompt.label import LabelError, LabelTemplate, WordTime, check_words
from speechllm.prompt.request import Request
from speechllm.threads import one_thread

FEATURES_ON = ("worker", "device", "precomputed")


@dataclass
class _Batch:
    """What is known of N utterances besides their audio: the `texts` that are said or their translations, the `labels`
    to write (`speechllm.prompt.label`), the `requests`, `durations` (seconds, after speed perturbation), and the times
    of the `words` of `texts`, as the manifest has them, for streams as they are played (None where nothing is known).
    `chunk_seconds`: of streams (`speechllm.prompt.interleave`), None for offline recognition."""

    texts: list[str]
    labels: list[str]
    requests: list[Request]
    durations: list[float]
    words: list[tuple[WordTime, ...] | None] | None = field(default=None, kw_only=True)
    chunk_seconds: float | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def ids(self) -> list[str]:
        return [request.id or "" for request in self.requests]

    @property
    def languages(self) -> list[str | None]:
        return [request.language for request in self.requests]

    @property
    def target_languages(self) -> list[str | None]:
        return [request.target_language for request in self.requests]

    @property
    def audio_seconds(self) -> float:
        """Seconds of audio in the batch, without padding."""
        return sum(self.durations)


@dataclass
class Batch(_Batch):
    """What the model sees of N utterances.

    `features` (N, T, F) float32, zero beyond `feature_lens` (N,) int64. With two views of each utterance (see
    `build_train_loader`) both are 2 N long, the second views behind all the first. For the other fields see `_Batch`.
    """

    features: Tensor
    feature_lens: Tensor

    @property
    def inputs(self) -> tuple[object, ...]:
        """The arguments of a model's `forward`, in its order."""
        texts = self.texts, self.requests, self.labels
        return self.features, self.feature_lens, *texts, self.words, self.chunk_seconds

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            features=self.features.to(device, non_blocking=True),
            feature_lens=self.feature_lens.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU can copy while it computes."""
        return replace(self, features=self.features.pin_memory(), feature_lens=self.feature_lens.pin_memory())

    @property
    def padding_share(self) -> float:
        """The share of the frames in `features` that is padding, in [0, 1)."""
        return 1.0 - sum(self.feature_lens.tolist()) / (self.features.shape[0] * self.features.shape[1])


@dataclass
class WaveformBatch(_Batch):
    """A batch whose features are still to be computed, on the device that it is moved to.

    `samples` (N, S) float32, 16 kHz, zero beyond `sample_lens` (N,) int64. `spec_augment` (None for none) draws from
    each utterance's own of the `generators`, `two_views` of each or one. `feature_kind`: see
    `speechllm.data.features.MEL_BINS`.
    """

    samples: Tensor
    sample_lens: Tensor
    spec_augment: SpecAugmentConfig | None
    generators: list[np.random.Generator]
    feature_kind: str
    two_views: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """The batch with features, on `device`."""
        lens = self.sample_lens.to(device, non_blocking=True)
        samples = self.samples.to(device, non_blocking=True)
        features, feature_lens = extract_features_padded(samples, lens, self.feature_kind)
        if self.two_views and self.spec_augment is not None:
            first, second = features, features.clone()
            for i, (frames, rng) in enumerate(zip(feature_lens.tolist(), self.generators, strict=True)):
                views = spec_augment_twice(features[i, :frames].clone(), self.spec_augment, rng)
                first[i, :frames], second[i, :frames] = views
            features, feature_lens = torch.cat([first, second]), feature_lens.repeat(2)
        elif self.spec_augment is not None:
            for row, frames, rng in zip(features, feature_lens.tolist(), self.generators, strict=True):
                row[:frames] = spec_augment(row[:frames], self.spec_augment, rng, self.feature_kind)
        known = {f.name: getattr(self, f.name) for f in fields(_Batch)}
        return Batch(**known, features=features, feature_lens=feature_lens)

    def pin_memory(self) -> WaveformBatch:
        """The batch in page-locked memory, from which a GPU can copy while it computes."""
        return replace(self, samples=self.samples.pin_memory(), sample_lens=self.sample_lens.pin_memory())


@dataclass(frozen=True)
class Skipped:
    """An utterance that was left out: its id, the reason to count by, and the details."""

    id: str
    reason: str
    details: str


@dataclass(frozen=True)
class Noted:
    """What is to be known of the audio of an utterance that is used: damage, channels that were chosen."""

    id: str
    reason: str
    details: str


@dataclass(frozen=True)
class BatchPlan:
    """One batch: `utterances` are cuts, or their numbers in a `Corpus`; `passes` how often each has come before in this
    `epoch`; `speeds` how many times faster each is played; `chunk_seconds` that of a batch of streams."""

    epoch: int
    utterances: list[Cut] | list[int]
    passes: list[int]
    speeds: list[float]
    chunk_seconds: float | None = None


class SpeechDataset(torch.utils.data.Dataset):
    """Maps a `BatchPlan` to a batch, the utterances that had to be left out of it, and what is to be known of others;
    in place of a batch, the `DataError` that ends the run.

    Args:
        corpus: where plans have numbers; None where they have cuts.
        text_steps: normalization of the targets (`speechllm.text.normalize`).
        augmenter: for training; None leaves the audio as it is.
        seed: the augmentation of an utterance, and the instruction in its prompt, depend on this, the epoch, its
            passes and its id, on nothing else.
        features_on: `worker` computes features here, `device` leaves that to `WaveformBatch.to`, `precomputed` reads
            those of the manifest.
        feature_kind: see `speechllm.data.features.MEL_BINS`.
        allow_empty_text: for test sets, where an empty reference is a statement; in training it is an error.
        label: what the model is to write.
        duration_tolerance: seconds by which audio may be shorter or longer than its manifest says.
        two_views: of each utterance, with other masks of SpecAugment; needs an `augmenter` that has it.
        min_frames: of features; the encoder cannot hear shorter utterances.
        word_times: for the streams of training: `required` of all transcripts, or `used` where the manifest has them.
            With None words are as the manifest has them.
        hotwords: draws those of utterances without any; `as given`: these have an empty list; None: they have none.
    """

    def __init__(
        self,
        corpus: Corpus | None,
        *,
        text_steps: Sequence[str],
        augmenter: Augmenter | None,
        seed: int,
        features_on: str,
        feature_kind: str,
        allow_empty_text: bool,
        label: LabelTemplate,
        two_views: bool = False,
        duration_tolerance: float = DURATION_TOLERANCE,
        min_frames: int = 0,
        word_times: Literal["required", "used"] | None = None,
        hotwords: HotwordDrawer | Literal["as given"] | None = None,
    ) -> None:
        self._corpus = corpus
        self._text_steps = text_steps
        self._augmenter = augmenter
        self._seed = seed
        self._features_on = features_on
        self._feature_kind = feature_kind
        self._label = label
        self._allow_empty_text = allow_empty_text
        self._two_views = two_views
        self._duration_tolerance = duration_tolerance
        self._min_frames = min_frames
        self._word_times = word_times
        self._hotwords = hotwords

    def __getitem__(
        self, plan: BatchPlan
    ) -> tuple[Batch | WaveformBatch | DataError | None, list[Skipped], list[Noted]]:
        good, skipped, noted = [], [], []
        # so that features are the same, bit for bit, in a worker (which has one thread) and in the main process
        with one_thread():
            for item, times, speed in zip(plan.utterances, plan.passes, plan.speeds, strict=True):
                name = item.id if isinstance(item, Cut) else f"number {item}"
                try:
                    cut = item if self._corpus is None else self._corpus[item]
                    name = cut.id
                    notes: list[AudioNote] = []
                    good.append(self._utterance(cut, plan.epoch, times, speed, notes))
                    noted += [Noted(cut.id, note.reason, note.details) for note in notes]
                except DataError as error:  # returned, as a worker process would bury it in its own traceback
                    return error, [], []
                except UtteranceError as error:
                    skipped.append(Skipped(name, error.reason, str(error)))
            batch = replace(self._collate(good), chunk_seconds=plan.chunk_seconds) if good else None
        return batch, skipped, noted

    def _utterance(self, cut: Cut, epoch: int, times: int, speed: float, notes: list[AudioNote]) -> Utterance:
        entry = describe_cut(cut)
        text = target_text(entry, self._text_steps)
        if not text and not self._allow_empty_text:
            raise UtteranceError(
                "empty text", f"the manifest has no {'translation' if entry.task == 'ast' else 'text'}"
            )
        try:
            label = label_of(entry, self._label, self._text_steps, speed)
            words = self._words(entry, text, speed)
        except LabelError as error:
            raise UtteranceError(error.reason, str(error)) from error
        rng = augmentation_rng(self._seed, epoch, times, cut.id)
        samples: np.ndarray | None = None
        features: Tensor | None = None
        if self._features_on == "precomputed":
            features = load_precomputed(cut, self._feature_kind)
            frames, duration = len(features), len(features) * FRAME_SHIFT
        else:
            samples = load_samples(cut, speed, self._duration_tolerance, notes)
            if self._augmenter is not None:
                samples = self._augmenter.samples(samples, rng)
            frames, duration = num_frames(len(samples)), len(samples) / SAMPLE_RATE
            if self._features_on == "worker":
                features = extract_features(samples, self._feature_kind)
                frames = len(features)
        if frames < self._min_frames:
            raise UtteranceError("too short for the encoder", f"{frames} frames, and it needs {self._min_frames}")
        second_view = None
        if features is not None and self._two_views and self._augmenter is not None:
            features, second_view = self._augmenter.two_views(features, rng)
        elif features is not None and self._augmenter is not None:
            features = self._augmenter.features(features, rng, self._feature_kind)
        draw = instruction_draw(self._seed, epoch, times, cut.id) if self._augmenter is not None else 0.0
        request = self._with_hotwords(replace(entry.request, draw=draw), text, epoch, times)
        return Utterance(request, samples, features, text, label, duration, words, rng, second_view)

    def _with_hotwords(self, request: Request, text: str, epoch: int, times: int) -> Request:
        if self._hotwords is None or request.hotwords is not None:
            return request
        if isinstance(self._hotwords, HotwordDrawer):
            return self._hotwords.with_hotwords(request, text, hotwords_rng(self._seed, epoch, times, request.id or ""))
        return replace(request, hotwords=())

    def _words(self, entry: Entry, text: str, speed: float) -> tuple[WordTime, ...] | None:
        if entry.task == "ast":
            return None
        if self._word_times is None:
            return entry.words
        words = said_words(entry, self._text_steps, speed)
        if words is not None:
            check_words(text, words)
            return tuple(words)
        if self._word_times == "required":
            raise LabelError(
                "no word times",
                "a stream is to be made of the utterance, but it has no word times: give `alignment` in its manifest "
                "line, or train a CTC head that finds them (model.ctc_weight)",
            )
        return None

    def _collate(self, utterances: list[Utterance]) -> Batch | WaveformBatch:
        if self._features_on != "device":
            return collate(utterances)
        samples, lens = _padded([torch.from_numpy(u.samples) for u in utterances if u.samples is not None])
        config = self._augmenter.config.spec_augment if self._augmenter is not None else None
        generators = [u.rng for u in utterances if u.rng is not None]
        return WaveformBatch(
            **_fields(utterances),
            samples=samples,
            sample_lens=lens,
            spec_augment=config,
            generators=generators,
            feature_kind=self._feature_kind,
            two_views=self._two_views,
        )


def augmentation_rng(seed: int, epoch: int, times: int, id: str) -> np.random.Generator:
    """The random numbers that augment one utterance, the same in whichever process and order it is made."""
    return np.random.default_rng(_words(seed, epoch, times, id))


def instruction_draw(seed: int, epoch: int, times: int, id: str) -> float:
    """`Request.draw` of one utterance in training, as reproducible as `augmentation_rng`, and independent."""
    return float(np.random.default_rng([*_words(seed, epoch, times, id), 1]).random())


def hotwords_rng(seed: int, epoch: int, times: int, id: str) -> np.random.Generator:
    """The random numbers that draw the hotwords of one utterance; independent of the others."""
    return np.random.default_rng([*_words(seed, epoch, times, id), 2])


def _words(seed: int, epoch: int, times: int, id: str) -> list[int]:
    return [seed, epoch, times, zlib.crc32(id.encode())]


@dataclass(frozen=True)
class Utterance:
    """One utterance before padding: `samples` (S,) or `features` (T, F), perhaps in a `second_view`, `duration` in
    seconds, and the generator from which SpecAugment draws."""

    request: Request
    samples: np.ndarray | None
    features: Tensor | None
    text: str
    label: str
    duration: float
    words: tuple[WordTime, ...] | None = None
    rng: np.random.Generator | None = None
    second_view: Tensor | None = None


def collate(utterances: Iterable[Utterance]) -> Batch:
    """Pad utterances with zeros on the right to one batch."""
    utterances = list(utterances)
    views = [*(u.features for u in utterances), *(u.second_view for u in utterances)]
    features, lens = _padded([view for view in views if view is not None])
    return Batch(**_fields(utterances), features=features, feature_lens=lens)


def _fields(utterances: list[Utterance]) -> dict[str, Any]:
    """Those of `_Batch`."""
    return {
        "texts": [u.text for u in utterances],
        "labels": [u.label for u in utterances],
        "requests": [u.request for u in utterances],
        "durations": [u.duration for u in utterances],
        "words": [u.words for u in utterances],
    }


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lens
