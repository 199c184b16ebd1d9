"""Where results go, what they are of, and the run over all inputs.

A folder of results has a file `.transcribed.jsonl` beside them. Each line of it says of one result: its file and the
SHA-256 of what was written, the audio that it is of, and a digest of what it was made with (model, options, language).
It is only ever appended to, before the result gets its name: after a run that was killed, the last line that fits the
content of a file is of that file, and several runs may write to one folder. Of several processes that share the inputs
each has a file of its own, `.transcribed.RANK.jsonl`: they may run on several machines, and a network's file system may
lose what two of them append at the same time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Protocol, cast

from tqdm import tqdm

from speechllm.data.share import Share
from speechllm.decode.interface import Recognizer
from speechllm.errors import UserError
from speechllm.files import MAX_NAME_BYTES, describe_write_error, replaced_file, shortened
from speechllm.transcribe.formats import FORMATS, Recording
from speechllm.transcribe.inputs import STANDARD_INPUT, AudioInput, is_manifest
from speechllm.transcribe.segments import SegmentOptions, transcribe_inputs

# What is wrong with the name of one result; all other errors would meet the next ones too.
_OF_ONE_FILE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)
_FORMATS_OF_ONE_FILE = ("srt", "vtt", "tsv", "TextGrid")


@dataclass(frozen=True)
class _Result:
    """What a result in a folder is of: a line of the index."""

    file: str
    sha256: str
    audio: str
    content: str | None
    made_with: str


@dataclass
class Output:
    """Where results go: files in `folder`, or standard output.

    A file is there as a whole or not at all. One that is the result of the same audio, made with the same, is not made
    again; with `overwrite` all are.

    Attributes:
        made_with: a text that differs where the results would: of the model and all options.
        of_text: whether they depend on what is said by the manifest (`AudioInput.text`), too.
        share: which of the inputs are this process's.
    """

    format: str = "txt"
    folder: Path | None = None
    overwrite: bool = False
    made_with: str = ""
    of_text: bool = False
    share: Share = Share()
    _index: _Index | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self._index = _Index(self.folder, self.share)

    def check(self, paths: Sequence[str | Path]) -> None:
        """Whether the results of these inputs have a place.

        Raises:
            UserError: standard output cannot hold the format for all these inputs; the folder is a file.
        """
        if self.folder is None and self.overwrite:
            raise UserError("--overwrite: is for --output DIR")
        has_several = len(paths) > 1 or (
            paths[0] != STANDARD_INPUT and (os.path.isdir(paths[0]) or is_manifest(paths[0]))
        )
        if self.folder is None and self.format in _FORMATS_OF_ONE_FILE and has_several:
            raise UserError(f"--format {self.format}: has room for one file; write one for each: --output DIR")
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output {self.folder}: is not a folder")

    def file_of(self, input: AudioInput) -> Path | None:
        """`FOLDER/ID.FORMAT`, whatever the id; None for standard output.

        Where the result of another audio file is there, of an earlier run, the folders that the audio is in come before
        the id, one after the other: day2/rec001.wav goes to `FOLDER/day2/rec001.txt` after day1/rec001.wav has gone to
        `FOLDER/rec001.txt`. Names that are too long for a folder are shortened, and end with a digest of the whole.
        """
        if self.folder is None:
            return None
        ids = [input.id]
        if input.audio and not input.part:
            above = Path(os.path.abspath(input.audio)).parent.parts[1:]
            ids += [os.path.join(*above[-depth:], input.id) for depth in range(1, len(above) + 1)]
        files = [self._file(self.folder, id) for id in ids]
        audio = _audio_of(input)
        free = (file for file in files if self.overwrite or self._owner(file) in (None, audio))
        return next(free, files[0])

    def _file(self, folder: Path, id: str) -> Path:
        parts = [part for part in PurePath(_writable(id)).parts if part not in ("/", "//", "..")]
        *folders, name = parts or [_writable(id)]
        ending = f".{self.format}"
        names = [_fitting(name) for name in folders]
        return folder.joinpath(*names, _fitting(name, MAX_NAME_BYTES - len(ending)) + ending)

    def _owner(self, file: Path) -> str | None:
        """The audio that a file is the result of; None if there is none, or it is not known."""
        found = self._known.results(self._name(file))
        return found[-1].audio if found and os.path.lexists(file) else None

    def is_done(self, input: AudioInput) -> bool:
        """Whether the result of an input is there.

        Raises:
            UserError: its place is taken by the result of other audio, or by a file that nothing is known of.
        """
        file = self.file_of(input)
        if file is None or self.overwrite or not os.path.lexists(file):
            return False
        try:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        known = self._known.results(self._name(file))
        written = next((result for result in reversed(known) if result.sha256 == content), None)
        found, now = written or (known[-1] if known else None), self._result(input, file, content)
        advice = "write to another --output, or replace it with --overwrite"
        if found is None or now.content is None:
            raise UserError(f"{input.name}: {file} is there, and it is not known what it is of: {advice}")
        if found.audio != now.audio:
            raise UserError(f"{input.name}: {file} is the result of {found.audio}: {advice}")
        if (found.content, found.made_with) == (now.content, now.made_with):
            return True
        if written is None:
            raise UserError(
                f"{input.name}: {file} was made with other options or of other audio, and changed since: {advice}"
            )
        return False

    def write(self, input: AudioInput, recording: Recording) -> str:
        """Writes the file; what is for standard output is returned."""
        text = FORMATS[self.format](recording)
        file = self.file_of(input)
        if file is None:
            return f"{input.name}\t{' '.join(text.split())}\n" if self.format == "txt" else text
        if not self.overwrite and os.path.lexists(file) and self._owner(file) != _audio_of(input):
            taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            raise UserError(f"{input.name}: {file} has been written meanwhile, by another process") from taken
        data = text.encode(errors="backslashreplace")
        try:
            with replaced_file(file) as temporary:
                temporary.write_bytes(data)
                self._known.append(self._result(input, file, hashlib.sha256(data).hexdigest()))
        except OSError as error:
            raise UserError(describe_write_error(file, error)) from error
        return ""

    @property
    def _known(self) -> _Index:
        assert self._index is not None  # asked for where there is a file, and so a folder
        return self._index

    def _name(self, file: Path) -> str:
        return str(file.relative_to(cast(Path, self.folder)))

    def _result(self, input: AudioInput, file: Path, sha256: str) -> _Result:
        asked = repr((self.made_with, input.request, *([input.text] if self.of_text else [])))
        return _Result(
            self._name(file),
            sha256,
            _audio_of(input),
            input.content(),
            hashlib.sha256(asked.encode(errors="backslashreplace")).hexdigest()[:16],
        )


class _Index:
    """The lines of the indexes of a folder. Where they are is kept, not what they say: there may be millions.

    What other runs add to the index that this one writes to is read when it is asked for; the other indexes, once.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        name = ".transcribed.jsonl" if share.world_size == 1 else f".transcribed.{share.rank}.jsonl"
        self._own = folder / name
        self._others: list[Path] | None = None
        self._read = 0  # bytes of its own
        # by the hash of a file's name: number of an index (0 is its own, then the others) and offset, one after another
        self._places: dict[int, tuple[int, ...]] = {}

    def results(self, file: str) -> list[_Result]:
        """What was written to a file, the last one last."""
        if self._others is None:
            found = [path for path in self._own.parent.glob(".transcribed*.jsonl") if path != self._own]
            self._others = sorted(found, key=lambda path: path.stat().st_mtime_ns)
            for number, path in enumerate(self._others, 1):
                self._note_lines(path, number, 0)
        self._read = self._note_lines(self._own, 0, self._read)
        places = self._places.get(hash(file), ())
        results = [self._result_at(*place) for place in zip(places[::2], places[1::2], strict=True)]
        return [result for result in results if result is not None and result.file == file]

    def _note_lines(self, path: Path, number: int, start: int) -> int:
        """Look at the whole lines from byte `start` on; returns where they end."""
        with suppress(FileNotFoundError), open(path, "rb") as index:
            index.seek(start)
            for line in index:
                if not line.endswith(b"\n"):
                    break
                if (result := _result_of(line)) is not None:
                    key = hash(result.file)
                    self._places[key] = (*self._places.get(key, ()), number, start)
                start += len(line)
        return start

    def _result_at(self, number: int, offset: int) -> _Result | None:
        assert self._others is not None  # they have been looked at
        with open([self._own, *self._others][number], "rb") as index:
            index.seek(offset)
            return _result_of(index.readline())

    def append(self, result: _Result) -> None:
        """At once, whoever else does the same. The line begins with a line break, as the one before may be cut off."""
        line = f"\n{json.dumps(asdict(result))}\n".encode()
        self._own.parent.mkdir(parents=True, exist_ok=True)
        index = os.open(self._own, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(index, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(index)


def _result_of(line: bytes) -> _Result | None:
    try:
        return _Result(**json.loads(line))
    except (ValueError, TypeError):  # empty; or cut off, by a full disk
        return None


def _audio_of(input: AudioInput) -> str:
    """Which audio an input is, wherever the program runs."""
    audio = ", ".join(map(os.path.abspath, input.files or ())) or input.name
    return f"{audio} ({input.part})" if input.part else audio


def _writable(id: str) -> str:
    """An id as a file system can have it: what is no Unicode and does not come from there, and a zero, are spelled."""
    try:
        os.fsencode(id)
    except UnicodeEncodeError:
        id = id.encode(errors="backslashreplace").decode()
    return id.replace("\0", "\\0")


def _fitting(name: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    if len(os.fsencode(name)) <= max_bytes:
        return name
    digest = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return shortened(name, max_bytes - len(digest)) + digest


class Counted(Protocol):
    """Inputs: a list of them, or `Inputs`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[AudioInput]: ...


def transcribe_all(
    inputs: Counted,
    recognizer: Recognizer,
    options: SegmentOptions,
    output: Output,
    feature_kind: str = "fbank",
) -> int:
    """Transcribes what is not done yet; see `run_all`."""
    return run_all(
        inputs,
        lambda to_do, on_progress: transcribe_inputs(to_do, recognizer, options, on_progress, feature_kind),
        output,
        "transcribed",
    )


def run_all(
    inputs: Counted,
    make: Callable[[Iterator[AudioInput], Callable[[float], None]], Iterable[tuple[AudioInput, Recording | UserError]]],
    output: Output,
    done: str,
) -> int:
    """Makes the results that are not there yet, with a progress bar on a terminal; returns 1 when something failed,
    else 0.

    Args:
        inputs: looked at one at a time, and counted before where a progress bar is shown.
        make: of inputs their results, and calls what it is given with the seconds of audio that are done.
        done: what could not be done with an input that failed, such as `transcribed`.

    Raises:
        UserError: a result cannot be written, as when the disk is full: none could be.
    """
    with _Progress(inputs) as progress:
        for input, found in make(_to_do(inputs, output, progress), progress.recognized):
            if isinstance(found, Exception):
                progress.failure(found)
                continue
            for warning in found.warnings:
                progress.say(f"warning: {warning}")
            try:
                text = output.write(input, found)
            except UserError as error:
                if getattr(error.__cause__, "errno", None) not in _OF_ONE_FILE:
                    raise
                progress.failure(error)
                continue
            progress.success(text)
    if progress.done_before:
        print(
            f"{progress.done_before} of {progress.seen} were done before (--overwrite replaces them)", file=sys.stderr
        )
    if progress.failed:
        print(f"error: {progress.failed} of {progress.seen} could not be {done}", file=sys.stderr)
    return 1 if progress.failed else 0


def _to_do(inputs: Iterable[AudioInput], output: Output, progress: _Progress) -> Iterator[AudioInput]:
    """The inputs that are not done yet; of several for one file, the first."""
    names: dict[int, str] = {}  # by the hash of the file: there may be millions
    for input in inputs:
        file = output.file_of(input)
        if file is not None:
            other = names.setdefault(hash(str(file)), input.name)
            if other is not input.name:
                progress.failure(f"{input.name}: {file} is for {other}; do them one by one, with an --output each")
                continue
            try:
                is_done = output.is_done(input)
            except UserError as error:
                progress.failure(error)
                continue
            if is_done:
                progress.skip()
                continue
        yield input


class _Progress:
    """How many inputs are done, in a bar on a terminal, and what is to be said above it."""

    def __init__(self, inputs: Counted) -> None:
        self.seen, self.failed, self.done_before = 0, 0, 0
        self._seconds = 0.0
        self._bar = tqdm(total=len(inputs) if sys.stderr.isatty() else None, unit=" inputs", disable=None)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def say(self, message: str) -> None:
        self._bar.write(message, file=sys.stderr)

    def failure(self, error: object) -> None:
        self.failed += 1
        self._advance()
        self.say(f"error: {error}")

    def skip(self) -> None:
        """For an input that was done before."""
        self.done_before += 1
        self._advance()

    def success(self, text: str | None) -> None:
        """With what is to be printed of it, if anything."""
        self._advance()
        if text:
            self._bar.write(text, end="")
            sys.stdout.flush()

    def _advance(self) -> None:
        self.seen += 1
        self._bar.update()

    def recognized(self, seconds: float) -> None:
        self._seconds += seconds
        self._bar.set_postfix_str(f"{self._seconds / 60:.1f} min of audio")
