"""What an audio file is, whatever reads it, and what is told of one that cannot be used."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

BLOCK_SECONDS = 10.0


class UtteranceError(Exception):
    """One utterance cannot be used. `reason` is one of a few words to count by, the message has the
    details."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(f"{reason}: {details}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return UtteranceError, (self.reason, str(self).removeprefix(f"{self.reason}: "))


@dataclass(frozen=True)
class AudioNote:
    """What is to be known of audio that can be used: a `reason` to count by (`damaged audio`, `channels differ`), and
    `details` that name the file."""

    reason: str
    details: str


class AudioFile(ABC):
    """An opened file; made by `open_audio`.

    Attributes:
        name: what people know it by.
        rate: Hz.
        channels: how many.
        frames: samples of each channel, where the header is exact; else None.
    """

    name: str
    rate: int
    channels: int
    frames: int | None

    @abstractmethod
    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        """(channels, num_samples) float32 blocks from sample `start` on, to the end of the stream. May be used once.

        The number of channels of a chained stream may change on the way; its rate is converted to that of the
        beginning.

        Raises:
            UtteranceError: nothing can be decoded.
        """

    def count_frames(self) -> int:
        """Samples of each channel: as the header says where that is certain, or what decoding all of it finds. Takes
        the place of `blocks`."""
        return self.frames if self.frames is not None else sum(block.shape[1] for block in self.blocks())

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


def openable(source: str | Path | bytes) -> str | BinaryIO:
    """A file or its contents, as libraries open one."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)


def undecodable(name: str, why: str) -> UtteranceError:
    """That neither library can read a file."""
    return UtteranceError("unreadable audio", f"{name}: no audio that ffmpeg or soundfile could decode ({why})")


def cut_off(name: str, end: float, stated: float) -> AudioNote:
    """That a file ends, at `end` seconds, before the length that its header states."""
    return AudioNote("damaged audio", f"{name}: ends at {end:.3f} s, its header says {stated:.3f} s")
