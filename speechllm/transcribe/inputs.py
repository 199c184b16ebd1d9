"""What is to be transcribed: files, folders, manifests, standard input, samples."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from lhotse.cut import Cut
from torch import Tensor

from speechllm.data import Entry
from speechllm.data.audio import cut_blocks, recordings
from speechllm.data.audio_file import AudioNote, UtteranceError
from speechllm.data.blocks import read_blocks
from speechllm.data.manifests.manifest import LINE_ERRORS, SourceConfig, describe_cut, explain, iter_objects, to_cut
from speechllm.data.manifests.source import DataError
from speechllm.data.manifests.tar import TAR
from speechllm.data.share import Share
from speechllm.errors import UserError
from speechllm.prompt.request import Request
from speechllm.transcribe.samples import sample_blocks

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"

AUDIO_SUFFIXES = (
    *(".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mkv", ".mov"),
    *(".mp2", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".rf64", ".sph", ".w64", ".wav", ".webm", ".wma", ".wv"),
)
# Samples without a header: nothing in the file says their rate, type and channels.
_HEADERLESS_SUFFIXES = (".raw", ".pcm", ".s16", ".sln", ".vox")
_MANIFEST = re.compile(r"\.(jsonl|tsv|csv)(\.gz)?$|\.(json|list|parquet|arrow|tar)$")
# What is in folders that are manifests; one with audio and a table of it is a folder of audio here.
_IN_MANIFESTS = re.compile(r"wav\.scp|cuts\..*\.jsonl.*|state\.json|.*\.(parquet|arrow)", re.DOTALL)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/+")  # a Path has one slash of two left


@dataclass(frozen=True)
class AudioInput:
    """What is to be transcribed.

    Attributes:
        id: of the result, also the path of its file, without suffix.
        name: what people know it by: the file, or the id in a manifest.
        audio: the file; "" where there is none.
        blocks: gives the audio, (num_samples,) float32 blocks of 16 kHz, and raises `UtteranceError` where it cannot;
            what is to be known of the audio is put into the list that it is called with.
        request: what is asked for; with a target language it is translated.
        files: what the audio is read from; None where it can be read once only, as a stream.
        part: which part of them it is, where it is not all.
        error: why there is no audio at all.
        text: what is said, as a manifest has it; None where there is none.
    """

    id: str
    name: str
    audio: str
    blocks: Callable[[list[AudioNote]], Iterator[np.ndarray]]
    request: Request = Request()
    files: tuple[str, ...] | None = ()
    part: str = ""
    error: UserError | None = None
    text: str | None = None

    def content(self) -> str | None:
        """What the audio is, as far as that can be known without reading it: another text when a file has changed. None
        where it cannot be known, as of a stream."""
        return None if self.files is None else " ".join(map(_size_and_time, self.files))


def _size_and_time(file: str) -> str:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"


def audio_input(
    audio: str | os.PathLike | np.ndarray | Tensor | Sequence[float],
    id: str,
    request: Request = Request(),  # noqa: B008 - it is frozen
    *,
    sampling_rate: int = 16000,
    channel: int | None = None,
    track: int | None = None,
) -> AudioInput:
    """A file, or samples. What is wrong with it is told when it is read.

    Args:
        audio: a path, or samples (see `samples.sample_blocks`).
        request: what is asked for.
        sampling_rate: of samples.
        channel, track: of a file, which ones to take of several channels and audio tracks.
    """
    if isinstance(audio, str | os.PathLike):
        file = os.fsdecode(audio)
        files = None if _is_fifo(file) else (file,)
        return AudioInput(id, file, file, lambda notes: _file_blocks(file, channel, track, notes), request, files)
    return AudioInput(id, id, "", lambda notes: sample_blocks(audio, sampling_rate, id, notes), request)


def _is_fifo(file: str) -> bool:
    """As of a shell's <(...)."""
    return os.path.exists(file) and stat.S_ISFIFO(os.stat(file).st_mode)


def _file_blocks(file: str, channel: int | None, track: int | None, notes: list[AudioNote]) -> Iterator[np.ndarray]:
    if not os.path.exists(file) and _URL.match(file):
        raise UtteranceError("a URL", f"{file}: only files are read; download it first")
    if file.lower().endswith(_HEADERLESS_SUFFIXES):
        raise UtteranceError(
            "unreadable audio",
            f"{file}: samples without a header do not say their rate and type; make a WAV file of them, as with "
            "ffmpeg -f s16le -ar 16000 -ac 1 -i FILE.raw FILE.wav",
        )
    if _is_fifo(file):
        with open(file, "rb") as stream:
            yield from _stream_blocks(stream, file, channel, track, notes)
        return
    with _name_in_utf8(file) as readable:
        yield from read_blocks(readable, channel=channel, track=track, name=file, notes=notes)


@contextmanager
def _name_in_utf8(file: str) -> Iterator[str]:
    """The name of a file, or of a link to it where its own is not UTF-8: libsndfile and ffmpeg take no others."""
    try:
        file.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="speechllm-") as folder:
            link = os.path.join(folder, "audio")
            os.symlink(os.path.abspath(file), link)
            yield link
    else:
        yield file


def _standard_input_blocks(channel: int | None, track: int | None, notes: list[AudioNote]) -> Iterator[np.ndarray]:
    if sys.stdin is None or sys.stdin.isatty():
        raise UtteranceError("no audio", "standard input: is a terminal; pipe audio into it, or give a file")
    yield from _stream_blocks(sys.stdin.buffer, "standard input", channel, track, notes)


def _stream_blocks(
    stream: BinaryIO, name: str, channel: int | None, track: int | None, notes: list[AudioNote]
) -> Iterator[np.ndarray]:
    """By way of a temporary file: decoders go back and forth in a file."""
    with tempfile.NamedTemporaryFile(prefix="speechllm-") as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield from read_blocks(copy.name, channel=channel, track=track, name=name, notes=notes)


@dataclass
class Inputs:
    """The audio of files, folders and manifests; looked up anew each time that it is iterated over.

    A folder is a manifest in Kaldi's or Shar's form, or of Parquet or Arrow files, or it is searched for files with
    `AUDIO_SUFFIXES`, links followed; the path `-` is standard input. The id of a file is its path in the folder that is
    given, or, where several paths are given, in the folder that they have in common. `request` and `task` are for
    files, and for what lines of manifests do not say. `channel`: which one to take of several; None takes their mean,
    or those that speak. `track`: which one to take of several audio tracks; None for the default one. `share`: which of
    all these inputs there are here; of the others only the names are read, or the lines of a manifest.

    Raises:
        UserError: task and target language do not go together; standard input is given twice; a track is asked for of
            the audio of a manifest.
    """

    paths: Sequence[str | Path]
    request: Request = Request()
    task: str | None = None
    channel: int | None = None
    track: int | None = None
    share: Share = Share()
    _warned: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        target_language = self.request.target_language
        if self.task == "asr" and target_language is not None:
            raise UserError(f"--task asr: transcripts have no --target-language ({target_language})")
        if self.task is None and target_language is not None:
            self.task = "ast"
        if self.task == "ast" and target_language is None:
            for path in self.paths:
                if not is_manifest(path):
                    raise UserError(f"--task ast: give a --target-language to translate {path} into")
        if list(self.paths).count(STANDARD_INPUT) > 1:
            raise UserError(f"{STANDARD_INPUT}: standard input can be read once, and is given twice")
        for name, number in (("channel", self.channel), ("track", self.track)):
            if number is not None and number < 0:
                raise UserError(f"--{name}: they are counted from 0, got {number}")
        if self.track is not None and (manifests := list(filter(is_manifest, self.paths))):
            raise UserError(f"--track: is for files; the audio of a manifest ({manifests[0]}) has one track")

    def __iter__(self) -> Iterator[AudioInput]:
        return (look_at() for look_at in self.share.of(self._found()))

    def __len__(self) -> int:
        return sum(1 for _ in self.share.of(self._found()))

    def _found(self) -> Iterator[Callable[[], AudioInput]]:
        """What there is, one at a time: each tells what it is when it is called."""
        common = self._common_folder()
        for path in self.paths:
            if path == STANDARD_INPUT:
                yield self._standard_input
            elif not os.fspath(path):
                yield partial(_broken, "''", UserError("an empty name among the inputs"))
            elif is_manifest(path):
                yield from self._manifest(os.fspath(path))
            elif os.path.isdir(path):
                yield from self._folder(os.fspath(path), common or os.fspath(path))
            else:
                yield partial(self._file, os.fspath(path), common or os.path.dirname(os.path.abspath(path)))

    def _standard_input(self) -> AudioInput:
        def blocks(notes: list[AudioNote]) -> Iterator[np.ndarray]:
            return _standard_input_blocks(self.channel, self.track, notes)

        return AudioInput("stdin", STANDARD_INPUT, "", blocks, self.request, files=None)

    def _common_folder(self) -> str | None:
        """The folder that several files and folders are in."""
        if len(self.paths) < 2:  # whose names need not be looked up
            return None
        paths = [os.path.abspath(path) for path in self.paths if path != STANDARD_INPUT and not is_manifest(path)]
        return os.path.commonpath(map(os.path.dirname, paths)) if len(paths) > 1 else None

    def _file(self, file: str, folder: str) -> AudioInput:
        name = os.path.relpath(os.path.abspath(file), os.path.abspath(folder))
        id = name.removesuffix(os.path.splitext(name)[1])
        return audio_input(file, id, self.request, channel=self.channel, track=self.track)

    def _folder(self, folder: str, base: str) -> Iterator[Callable[[], AudioInput]]:
        is_empty = True
        for found in self._walk(folder, ()):
            is_empty = False
            yield partial(self._file, found, base) if isinstance(found, str) else found
        if is_empty:
            yield partial(_broken, folder, UserError(f"{folder}: no file with a suffix of audio, such as .wav or .mp3"))

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str | Callable[[], AudioInput]]:
        """The audio files in a folder and those below it, by name, and what keeps others from being found.

        Args:
            above: the folders that it is in.
        """
        try:
            here = os.stat(folder)
            names = sorted(os.listdir(folder))
        except OSError as error:
            yield partial(_broken, folder, UserError(f"{folder}: cannot be read: {error.strerror}"))
            return
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            self._warn(f"{folder}: links to a folder that it is in; not followed")
            return
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                yield from self._walk(path, (*above, identity))
            elif os.path.islink(path) and not os.path.exists(path):
                yield partial(_broken, path, UserError(f"{path}: a broken link to {os.readlink(path)}"))
            elif name.lower().endswith(AUDIO_SUFFIXES):
                yield path

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s", message)

    def _manifest(self, path: str) -> Iterator[Callable[[], AudioInput]]:
        source = SourceConfig(
            path,
            lang=self.request.language,
            target_lang=self.request.target_language,
            task=self.task,
            channel=self.channel,
        )
        try:
            for where, found in iter_objects(source):
                yield partial(self._line, where, found, source)
        except DataError as error:  # the manifest as a whole
            yield partial(_broken, path, error)
        except (OSError, EOFError) as error:  # such as a compressed file that was cut off
            yield partial(_broken, path, DataError(f"{path}: cannot be read on: {error}"))

    def _line(self, where: str, found: dict | DataError, source: SourceConfig) -> AudioInput:
        try:
            if isinstance(found, DataError):
                raise found
            cut = to_cut(found, source)
            entry = describe_cut(cut)
            if entry.task == "ast" and entry.target_lang is None:
                raise DataError(f"{where}: to be translated, without target_lang (or --target-language)")
        except DataError as error:
            return _broken(where, error)
        except LINE_ERRORS as error:
            return _broken(where, DataError(f"{where}: {explain(error)}"))
        return self._cut(cut, entry)

    def _cut(self, cut: Cut, entry: Entry) -> AudioInput:
        sources = [source for recording in recordings(cut) for source in recording.sources]
        files = [source.source for source in sources if source.type == "file"]
        members = (cut.custom or {}).get(TAR, {}).values()
        return AudioInput(
            cut.id,
            cut.id,
            next(iter(files), ""),
            lambda notes: cut_blocks(cut, notes),
            self._request(entry),
            (*files, *(member["path"] for member in members)),
            f"{cut.id}, {cut.start:g} s and {cut.duration:g} s from there",
            text=entry.text,
        )

    def _request(self, entry: Entry) -> Request:
        return replace(
            entry.request,
            previous=self.request.previous if entry.previous is None else entry.previous,
            hotwords=self.request.hotwords if entry.hotwords is None else entry.hotwords,
        )


def is_manifest(path: str | Path) -> bool:
    """Whether a path is a manifest, by its name, or by what is in the folder."""
    path = Path(path)
    if os.path.isdir(path):  # as opposed to Path.is_dir, False for a name that is too long
        try:
            with os.scandir(path) as found:
                return any(_IN_MANIFESTS.fullmatch(file.name) and file.is_file() for file in found)
        except OSError:  # whoever looks for audio in it says what is wrong
            return False
    return bool(_MANIFEST.search(path.name))


def _broken(name: str, error: UserError) -> AudioInput:
    return AudioInput(name, name, name, lambda notes: iter(()), error=error)
