"""What is to be transcribed: files, folders, manifests, samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechllm.data import Entry
from speechllm.data.audio import cut_blocks, recordings
from speechllm.data.blocks import read_blocks
from speechllm.data.manifests.manifest import LINE_ERRORS, SourceConfig, describe_cut, explain, iter_objects, to_cut
from speechllm.data.manifests.source import DataError
from speechllm.errors import UserError
from speechllm.prompt.template import PromptContext

AUDIO_SUFFIXES = (
    *(".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mkv", ".mov"),
    *(".mp2", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".rf64", ".sph", ".w64", ".wav", ".webm", ".wma", ".wv"),
)
_MANIFEST = re.compile(r"\.jsonl(\.gz)?$|\.json$")


@dataclass(frozen=True)
class AudioInput:
    """What is to be transcribed.

    Attributes:
        id: of the result, also the path of its file, without suffix.
        name: what people know it by: the file, or the id in a manifest.
        audio: the file.
        blocks: gives the audio, (num_samples,) float32 blocks of 16 kHz, and raises `UtteranceError` or `DataError`
            where it cannot.
        language, target_language: for the prompt; with a target language it is translated.
        context: for the prompt's other slots.
    """

    id: str
    name: str
    audio: str
    blocks: Callable[[], Iterator[np.ndarray]]
    language: str | None = None
    target_language: str | None = None
    context: PromptContext | None = None


def audio_input(
    audio: str | Path | np.ndarray | Tensor,
    id: str,
    language: str | None = None,
    target_language: str | None = None,
    context: PromptContext | None = None,
) -> AudioInput:
    """A file, or samples.

    Args:
        audio: a path, or (num_samples,) floating-point samples in [-1, 1], 16 kHz.

    Raises:
        UserError: an array of another shape or type.
    """
    if isinstance(audio, str | Path):
        return AudioInput(id, str(audio), str(audio), lambda: read_blocks(audio), language, target_language, context)
    samples = torch.as_tensor(audio).detach().cpu()
    if samples.ndim != 1 or not samples.is_floating_point():
        raise UserError(
            f"{id}: samples of shape {tuple(samples.shape)} and type {samples.dtype}; they must be (num_samples,), "
            "floating point in [-1, 1], 16 kHz"
        )
    block = samples.float().numpy()
    return AudioInput(id, id, "", lambda: iter([block]), language, target_language, context)


@dataclass
class Inputs:
    """The audio of files, folders and manifests; looked up anew each time that it is iterated over.

    A folder is a manifest in Kaldi's or Shar's form, or it is searched for files with `AUDIO_SUFFIXES`. `language`,
    `target_language`, `task` and `context` are for files, and for lines of manifests that do not say theirs.

    Raises:
        UserError: task and target language do not go together.
    """

    paths: Sequence[Path]
    language: str | None = None
    target_language: str | None = None
    task: str | None = None
    context: PromptContext | None = None

    def __post_init__(self) -> None:
        if self.task == "asr" and self.target_language is not None:
            raise UserError(f"--task asr: transcripts have no --target-language ({self.target_language})")
        if self.task is None and self.target_language is not None:
            self.task = "ast"
        if self.task == "ast" and self.target_language is None:
            for path in self.paths:
                if not is_manifest(path):
                    raise UserError(f"--task ast: give a --target-language to translate {path} into")

    def __iter__(self) -> Iterator[AudioInput]:
        for path in self.paths:
            if is_manifest(path):
                yield from self._manifest(path)
            elif path.is_dir():
                yield from self._folder(path)
            else:
                yield audio_input(path, path.stem, self.language, self.target_language, self.context)

    def _folder(self, folder: Path) -> Iterator[AudioInput]:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
        if not files:
            yield _broken(str(folder), UserError(f"{folder}: no file with a suffix of audio, such as .wav or .mp3"))
        for file in files:
            id = str(file.relative_to(folder).with_suffix(""))
            yield audio_input(file, id, self.language, self.target_language, self.context)

    def _manifest(self, path: Path) -> Iterator[AudioInput]:
        source = SourceConfig(str(path), lang=self.language, target_lang=self.target_language, task=self.task)
        try:
            for where, found in iter_objects(source):
                try:
                    if isinstance(found, DataError):
                        raise found
                    cut = to_cut(found, source)
                    entry = describe_cut(cut)
                    if entry.task == "ast" and entry.target_lang is None:
                        raise DataError(f"{where}: to be translated, without target_lang (or --target-language)")
                except DataError as error:
                    yield _broken(where, error)
                except LINE_ERRORS as error:
                    yield _broken(where, DataError(f"{where}: {explain(error)}"))
                else:
                    sources = [source for recording in recordings(cut) for source in recording.sources]
                    yield AudioInput(
                        cut.id,
                        cut.id,
                        next((source.source for source in sources if source.type == "file"), ""),
                        lambda cut=cut: cut_blocks(cut),
                        entry.lang,
                        entry.target_lang if entry.task == "ast" else None,
                        self._context(entry),
                    )
        except DataError as error:  # the manifest as a whole
            yield _broken(str(path), error)

    def _context(self, entry: Entry) -> PromptContext:
        given = self.context or PromptContext()
        return PromptContext(
            previous=given.previous if entry.previous is None else entry.previous,
            hotwords=given.hotwords if entry.hotwords is None else entry.hotwords,
        )


def is_manifest(path: Path) -> bool:
    if path.is_dir():
        return (path / "wav.scp").is_file() or any(path.glob("cuts.*.jsonl*"))
    return bool(_MANIFEST.search(path.name))


def _broken(name: str, error: UserError) -> AudioInput:
    def blocks() -> Iterator[np.ndarray]:
        raise error

    return AudioInput(name, name, name, blocks)
