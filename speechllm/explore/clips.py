"""The audio of utterances, as the player of a page needs it."""

from __future__ import annotations

import base64
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np
import soundfile
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from tqdm import tqdm

from speechllm.data.audio import cut_blocks
from speechllm.data.audio_file import UtteranceError
from speechllm.data.features import SAMPLE_RATE
from speechllm.data.manifests.tar import TAR
from speechllm.files import replaced_file

logger = logging.getLogger(__name__)

AudioMode = Literal["link", "copy", "none"]

# Points of a waveform: about what a page is wide.
_POINTS = 400
# What browsers play, Safari's Ogg aside. WAV may hold what they do not know, such as ADPCM.
_PLAYABLE = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".mp4", ".webm"}
_THREADS = 4
# Samples whose largest magnitude is kept while a recording is read: 5 ms.
_FINE = 80


@dataclass(frozen=True)
class Clip:
    """Audio to play: a URL relative to the page, the part of it in seconds, and the waveform.

    Attributes:
        peaks: the largest magnitudes of 400 stretches of equal length, a byte each, in base64; 255 is the loudest.
    """

    src: str
    start: float
    end: float
    peaks: str


def make_clips(cuts: Iterable[tuple[int, Cut]], folder: Path, mode: AudioMode) -> Iterator[tuple[int, Clip]]:
    """The clips of numbered cuts, in their order. Audio that cannot be read is logged, and has none.

    Args:
        folder: that of the page.
        mode: `link`: play the files from where they are; those that browsers cannot play, and what is not simply a part
            of a file, are copied to `FOLDER/audio/NUMBER.flac` (16 kHz, mono). `copy`: all are. `none`: no clips.
    """
    if mode == "none":
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        made = pool.map(lambda numbered: (numbered[0], _clip(numbered[0], numbered[1], folder, mode)), cuts)
        for number, clip in tqdm(made, desc="audio", unit="utt", disable=None):
            if clip is not None:
                yield number, clip


def _clip(number: int, cut: Cut, folder: Path, mode: AudioMode) -> Clip | None:
    path = _playable_file(cut) if mode == "link" else None
    try:
        if path is not None:
            peaks, seconds = _waveform(cut_blocks(cut))
            return Clip(_url(path, folder), cut.start, cut.start + seconds, peaks)
        file = folder / "audio" / f"{number}.flac"
        with (
            replaced_file(file) as tmp,
            soundfile.SoundFile(tmp, "w", SAMPLE_RATE, 1, format="FLAC", subtype="PCM_16") as written,
        ):
            peaks, seconds = _waveform(_passed_on(cut_blocks(cut), written))
        return Clip(f"audio/{number}.flac", 0.0, seconds, peaks)
    except UtteranceError as error:
        logger.warning("no player for %s: %s", cut.id, error)
        return None


def _passed_on(blocks: Iterable[np.ndarray], file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    for block in blocks:
        file.write(block)
        yield block


def _playable_file(cut: Cut) -> Path | None:
    """The file that a browser can play, of a cut that is a part of one."""
    if not isinstance(cut, DataCut) or TAR in (cut.custom or {}) or cut.recording.transforms:
        return None
    source, *others = cut.recording.sources
    path = Path(source.source) if source.type == "file" and not others else None
    return path if path is not None and path.suffix.lower() in _PLAYABLE else None


def _url(path: Path, folder: Path) -> str:
    try:
        path = Path(os.path.relpath(path, folder))
    except ValueError:  # on another drive, where there are such
        return path.resolve().as_uri()
    return quote(path.as_posix().encode(errors="surrogateescape"))


def _waveform(blocks: Iterable[np.ndarray]) -> tuple[str, float]:
    """The peaks of `Clip` and the duration in seconds; of a long recording no more than a block is in memory."""
    fine, count, rest = [], 0, np.zeros(0, np.float32)
    for block in blocks:
        count += len(block)
        rest = np.concatenate([rest, np.abs(block)])
        whole = len(rest) // _FINE * _FINE
        fine.append(rest[:whole].reshape(-1, _FINE).max(1))
        rest = rest[whole:]
    if len(rest) or not count:
        fine.append(rest.max(keepdims=True, initial=0.0))
    maxima = np.concatenate(fine)
    edges = np.linspace(0, len(maxima), _POINTS + 1).astype(int)
    peaks = np.array([maxima[start : max(end, start + 1)].max() for start, end in itertools.pairwise(edges)])
    scaled = np.round(255 * peaks / max(float(peaks.max()), 1e-5)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode(), count / SAMPLE_RATE
