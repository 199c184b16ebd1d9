"""Lists of cuts to batches of features. Runs in the data loader's worker processes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lhotse import Recording
from lhotse.audio.utils import AudioLoadingError
from lhotse.cut import Cut
from torch import Tensor

from speechllm.data.audio import UtteranceError, load_samples
from speechllm.data.augment import Augmenter
from speechllm.data.features import SAMPLE_RATE, fbank
from speechllm.data.manifest import DataError


@dataclass
class Batch:
    """What the model sees of N utterances.

    `features` (N, T, 80) float32, zero beyond `feature_lens` (N,) int64; `texts`, `languages` (None where
    unknown), `ids` and `durations` (seconds, after speed perturbation) have N entries each.
    """

    features: Tensor
    feature_lens: Tensor
    texts: list[str]
    languages: list[str | None]
    ids: list[str]
    durations: list[float]

    def __len__(self) -> int:
        return len(self.ids)

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
    def audio_seconds(self) -> float:
        """Seconds of audio in the batch, without padding."""
        return sum(self.durations)

    @property
    def padding_share(self) -> float:
        """The share of the frames in `features` that is padding, in [0, 1)."""
        return 1.0 - sum(self.feature_lens.tolist()) / (self.features.shape[0] * self.features.shape[1])


@dataclass(frozen=True)
class Skipped:
    """An utterance that was left out: its id, the reason to count by, and the details."""

    id: str
    reason: str
    details: str


@dataclass(frozen=True)
class BatchPlan:
    """The cuts of one batch; `epoch` is part of what seeds their augmentation."""

    epoch: int
    cuts: list[Cut]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Features come out the same, bit for bit, in a worker (which has one thread) and in the main process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class SpeechDataset(torch.utils.data.Dataset):
    """Maps a `BatchPlan` to a `Batch` and the utterances that had to be left out of it.

    Args:
        augmenter: for training; None leaves the audio as it is.
        seed: the augmentation of an utterance depends on this, the epoch and its id, on nothing else.
        allow_empty_text: for test sets, where an empty reference is a statement; in training it is an error.
    """

    def __init__(self, augmenter: Augmenter | None, seed: int, allow_empty_text: bool) -> None:
        self._augmenter = augmenter
        self._seed = seed
        self._allow_empty_text = allow_empty_text

    def __getitem__(self, plan: BatchPlan) -> tuple[Batch | None, list[Skipped]]:
        good, skipped = [], []
        with _one_thread():
            for cut in plan.cuts:
                try:
                    good.append(self._utterance(cut, plan.epoch))
                except UtteranceError as error:
                    skipped.append(Skipped(cut.id, error.reason, str(error)))
        return (collate(good) if good else None), skipped

    def _utterance(self, cut: Cut, epoch: int) -> Utterance:
        text = cut_text(cut)
        if not text and not self._allow_empty_text:
            raise UtteranceError("empty text", "the manifest has no transcript")
        if self._augmenter is None:
            samples = load_samples(cut)
            features = fbank(samples)
        else:
            rng = np.random.default_rng([self._seed, epoch, zlib.crc32(cut.id.encode())])
            samples = load_samples(cut, speed=self._augmenter.speed(rng))
            samples = self._augmenter.samples(samples, rng)
            features = self._augmenter.features(fbank(samples), rng)
        return Utterance(cut.id, features, text, cut_language(cut), len(samples) / SAMPLE_RATE)


@dataclass(frozen=True)
class Utterance:
    """One utterance before padding; `features` (T, 80), `duration` in seconds."""

    id: str
    features: Tensor
    text: str
    language: str | None
    duration: float


def load_features(paths: Sequence[str | Path]) -> tuple[Tensor, Tensor]:
    """Features (N, T, 80) and feature_lens (N,) of N audio files of any format and sampling rate.

    Raises:
        DataError: names the file that is missing or cannot be used.
    """
    utterances = []
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
        try:
            samples = load_samples(Recording.from_file(path).to_cut())
        except UtteranceError as error:
            raise DataError(f"{path}: {error}") from error
        except (OSError, AssertionError, AudioLoadingError) as error:
            raise DataError(f"{path}: cannot be read as audio") from error
        utterances.append(Utterance(str(path), fbank(samples), "", None, len(samples) / SAMPLE_RATE))
    batch = collate(utterances)
    return batch.features, batch.feature_lens


def cut_text(cut: Cut) -> str:
    """The transcript of a cut: its supervisions' texts in order."""
    return " ".join(s.text.strip() for s in cut.supervisions if s.text and s.text.strip())


def cut_language(cut: Cut) -> str | None:
    """The language of a cut's first supervision that has one."""
    return next((s.language for s in cut.supervisions if s.language), None)


def collate(utterances: Iterable[Utterance]) -> Batch:
    """Pad utterances with zeros on the right to one batch."""
    utterances = list(utterances)
    return Batch(
        features=torch.nn.utils.rnn.pad_sequence([u.features for u in utterances], batch_first=True),
        feature_lens=torch.tensor([len(u.features) for u in utterances], dtype=torch.int64),
        texts=[u.text for u in utterances],
        languages=[u.language for u in utterances],
        ids=[u.id for u in utterances],
        durations=[u.duration for u in utterances],
    )
