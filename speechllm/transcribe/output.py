"""Where results go, and the run over all inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.files import describe_write_error, replaced_file
from speechllm.transcribe.formats import FORMATS, Recording
from speechllm.transcribe.inputs import AudioInput, is_manifest
from speechllm.transcribe.segments import Recogniser, SegmentOptions, transcribe_inputs

_FORMATS_OF_ONE_FILE = ("srt", "tsv")


@dataclass
class Output:
    """Where results go: files in `folder`, or standard output.

    A file is there as a whole or not at all; one that is there is not made again, unless with `overwrite`.
    """

    format: str = "txt"
    folder: Path | None = None
    overwrite: bool = False

    def check(self, paths: Sequence[Path]) -> None:
        """
        Raises:
            UserError: standard output cannot hold the format for all these inputs; the folder is a file.
        """
        if self.folder is None and self.overwrite:
            raise UserError("--overwrite: is for --output DIR")
        is_one = len(paths) == 1 and not paths[0].is_dir() and not is_manifest(paths[0])
        if self.folder is None and self.format in _FORMATS_OF_ONE_FILE and not is_one:
            raise UserError(f"--format {self.format}: has room for one file; write one for each: --output DIR")
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output {self.folder}: is not a folder")

    def file_of(self, input: AudioInput) -> Path | None:
        """`FOLDER/ID.FORMAT`, whatever the id; None for standard output."""
        if self.folder is None:
            return None
        parts = [part for part in PurePath(input.id).parts if part not in ("/", "..")]
        return self.folder.joinpath(*parts[:-1], f"{parts[-1] if parts else input.id}.{self.format}")

    def write(self, input: AudioInput, recording: Recording) -> str:
        """Writes the file; what is for standard output is returned."""
        text = FORMATS[self.format](recording)
        file = self.file_of(input)
        if file is None:
            return f"{input.name}\t{' '.join(text.split())}\n" if self.format == "txt" else text
        try:
            with replaced_file(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(describe_write_error(file, error)) from error
        return ""


def transcribe_all(
    inputs: Iterable[AudioInput],
    recognise: Recogniser,
    options: SegmentOptions,
    output: Output,
    feature_kind: str = "fbank",
) -> int:
    """Transcribes what is not done yet, with a progress bar on a terminal; returns 1 when something failed, else 0.

    `inputs` are iterated over twice: to count them, and to transcribe them.
    """
    total = sum(1 for _ in inputs)
    failed = done_before = 0
    seconds = 0.0
    bar = tqdm(total=total, unit=" inputs", disable=None)

    def report(error: object) -> None:
        nonlocal failed
        failed += 1
        bar.update()
        bar.write(f"error: {error}", file=sys.stderr)

    def to_do() -> Iterator[AudioInput]:
        nonlocal done_before
        files: dict[Path, str] = {}
        for input in inputs:
            file = output.file_of(input)
            if file is not None and file in files:
                report(f"{input.name}: {file} is for {files[file]}; do them one by one, with an --output each")
                continue
            if file is not None:
                files[file] = input.name
                if file.exists() and not output.overwrite:
                    done_before += 1
                    bar.update()
                    continue
            yield input

    def on_progress(recognised: float) -> None:
        nonlocal seconds
        seconds += recognised
        bar.set_postfix_str(f"{seconds / 60:.1f} min of audio")

    with bar:
        for input, found in transcribe_inputs(to_do(), recognise, options, on_progress, feature_kind):
            if isinstance(found, Exception):
                report(found)
                continue
            bar.update()
            if text := output.write(input, found):
                bar.write(text, end="")
                sys.stdout.flush()
    if done_before:
        print(f"{done_before} of {total} were done before (--overwrite does them again)", file=sys.stderr)
    if failed:
        print(f"error: {failed} of {total} could not be transcribed", file=sys.stderr)
    return 1 if failed else 0
