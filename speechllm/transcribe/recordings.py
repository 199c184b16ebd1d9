"""`speechllm transcribe`: files, folders and manifests of any length to text.

    inputs -> blocks of audio -> segments at pauses (`data/pauses.py`) -> batches of segments of similar length, of
    several inputs -> a recogniser (`decode/recognise.py`) -> each input's segments together (`decode/formats.py`)

A few batches of audio are held at a time, however long and however many the inputs are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from speechllm.cli.search_options import add_search_options, search_options
from speechllm.errors import UserError
from speechllm.files import describe_write_error, replaced_file

# The rest of the library is imported where it is used: `speechllm --help` answers at once.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from speechllm.data import Entry
    from speechllm.decode.recognizer import Speech
    from speechllm.decode.result import Recognition
    from speechllm.prompt.template import PromptContext
    from speechllm.transcribe.formats import Recording, Segment

    Recogniser = Callable[[Iterable[Speech]], Iterator[list[Recognition]]]

AUDIO_SUFFIXES = (
    *(".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mkv", ".mov"),
    *(".mp2", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".rf64", ".sph", ".w64", ".wav", ".webm", ".wma", ".wv"),
)
_MANIFEST = re.compile(r"\.jsonl(\.gz)?$|\.json$")
_FORMATS = ("txt", "json", "srt", "ctm", "tsv")
_FORMATS_OF_ONE_FILE = ("srt", "tsv")
_FORMATS_WITH_WORD_TIMES = ("json", "srt", "ctm")

# Segments of similar length are looked for among those of so many batches.
_WINDOW_BATCHES = 4


def add_transcribe(commands: argparse._SubParsersAction) -> None:
    transcribe = commands.add_parser(
        "transcribe",
        help="audio files to text",
        description="Transcribe or translate audio of any format, sampling rate and length. Without --output the "
        "results go to standard output, in the order of the inputs. An input that cannot be read is reported and the "
        "others are done; the exit status is 1 then. Where the language model repeats itself or writes more than the "
        "audio can say, the text of the CTC head is taken, if the model has one; json says so.",
    )
    transcribe.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="FILE|DIR|MANIFEST",
        help="audio files; folders, which are searched for them; manifests: NeMo JSON lines, lhotse cuts, or a "
        "directory in Kaldi's or lhotse's Shar form",
    )
    transcribe.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    transcribe.add_argument("--language", help="language tag for the prompt, e.g. en")
    transcribe.add_argument("--target-language", help="translate into this language, e.g. de")
    transcribe.add_argument("--previous", metavar="TEXT", help="the text before the audio, for the prompt's {previous}")
    transcribe.add_argument(
        "--prompt-hotwords", type=Path, metavar="FILE", help="phrases for the prompt's {hotwords}, one a line"
    )
    transcribe.add_argument(
        "--task",
        choices=("asr", "ast"),
        help="transcribe or translate (default: translate with --target-language; else as a manifest says)",
    )
    transcribe.add_argument(
        "--format",
        choices=_FORMATS,
        default="txt",
        help="txt, or with times: json (an object a line), srt (subtitles), ctm (words), tsv (default: %(default)s)",
    )
    transcribe.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write a file for each input there; those that exist are not done again",
    )
    transcribe.add_argument("--overwrite", action="store_true", help="do them again")
    transcribe.add_argument(
        "--batch-duration", type=float, default=300.0, help="seconds of audio in a batch (default: %(default)g)"
    )
    transcribe.add_argument(
        "--max-segment",
        type=float,
        default=30.0,
        help="longer audio is cut at pauses into segments of at most so many seconds (default: %(default)g)",
    )
    transcribe.add_argument(
        "--llm-weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="on the CPU, how the language model's matrices are kept: float32 is exact, bfloat16 faster on processors "
        "that have its instructions, int8 smaller (default: %(default)s)",
    )
    add_search_options(transcribe)
    transcribe.set_defaults(run=run_transcribe)


def run_transcribe(args: argparse.Namespace) -> int:
    """Returns 1 when an input could not be transcribed, else 0.

    Raises:
        UserError, FileNotFoundError: the options do not go together, the model does not load, or a result cannot be
            written.
    """
    import torch

    from speechllm.model.build import load_model, pack_model

    how = replace(search_options(args), fallback="ctc")
    inputs = Inputs(args.inputs, args.language, args.target_language, args.task, prompt_context(args))
    options = SegmentOptions(args.batch_duration, args.max_segment)
    output = Output(args.format, args.output, args.overwrite)
    output.check(args.inputs)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model).to(device)
    if device == "cpu" or args.llm_weights != "float32":
        pack_model(model, args.llm_weights)
    timestamps = args.format in _FORMATS_WITH_WORD_TIMES and model.ctc_head is not None
    recognise = model.recogniser(replace(how, timestamps=timestamps))
    return transcribe_all(inputs, recognise, options, output, model.feature_kind)


def prompt_context(args: argparse.Namespace) -> PromptContext:
    """Of `--previous` and `--prompt-hotwords`.

    Raises:
        UserError, FileNotFoundError: the file cannot be read.
    """
    from speechllm.prompt.template import PromptContext

    hotwords = None
    if args.prompt_hotwords is not None:
        try:
            lines = args.prompt_hotwords.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"--prompt-hotwords: {args.prompt_hotwords}: no such file") from None
        except UnicodeDecodeError:
            raise UserError(f"--prompt-hotwords: {args.prompt_hotwords}: not UTF-8; save the file as UTF-8") from None
        hotwords = tuple(line.strip() for line in lines if line.strip())
    return PromptContext(previous=args.previous, hotwords=hotwords)


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
    from speechllm.data.blocks import read_blocks

    if isinstance(audio, str | Path):
        return AudioInput(id, str(audio), str(audio), lambda: read_blocks(audio), language, target_language, context)
    import torch

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
                if not _is_manifest(path):
                    raise UserError(f"--task ast: give a --target-language to translate {path} into")

    def __iter__(self) -> Iterator[AudioInput]:
        for path in self.paths:
            if _is_manifest(path):
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
        from speechllm.data.audio import cut_blocks, recordings
        from speechllm.data.manifests.manifest import (
            LINE_ERRORS,
            SourceConfig,
            describe_cut,
            explain,
            iter_objects,
            to_cut,
        )
        from speechllm.data.manifests.source import DataError

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
        from speechllm.prompt.template import PromptContext

        given = self.context or PromptContext()
        return PromptContext(
            previous=given.previous if entry.previous is None else entry.previous,
            hotwords=given.hotwords if entry.hotwords is None else entry.hotwords,
        )


def _is_manifest(path: Path) -> bool:
    if path.is_dir():
        return (path / "wav.scp").is_file() or any(path.glob("cuts.*.jsonl*"))
    return bool(_MANIFEST.search(path.name))


def _broken(name: str, error: UserError) -> AudioInput:
    def blocks() -> Iterator[np.ndarray]:
        raise error

    return AudioInput(name, name, name, blocks)


@dataclass(frozen=True)
class SegmentOptions:
    """`batch_seconds`: of a batch with its padding; a longer segment has one to itself. `max_seconds`: of a segment.

    Raises:
        UserError: a value is out of range.
    """

    batch_seconds: float = 300.0
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        from speechllm.transcribe.pauses import SHORTEST_MAX_SECONDS

        if not self.batch_seconds > 0:
            raise UserError(f"--batch-duration: must be more than 0 seconds, got {self.batch_seconds:g}")
        if not self.max_seconds >= SHORTEST_MAX_SECONDS:
            raise UserError(
                f"--max-segment: must be at least {SHORTEST_MAX_SECONDS:g} seconds, got {self.max_seconds:g}"
            )


@dataclass
class _Part:
    """A segment of an input, before and after it is recognised; the features only until it is in a batch."""

    offset: float
    duration: float
    overlap: float
    input: AudioInput
    features: Tensor | None
    recognition: Recognition | None = None


@dataclass
class _Progress:
    """How far an input is."""

    input: AudioInput
    parts: list[_Part] = field(default_factory=list)
    duration: float = 0.0
    error: UserError | None = None
    is_read: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_read and all(part.recognition is not None for part in self.parts)


def transcribe_inputs(
    inputs: Iterable[AudioInput],
    recognise: Recogniser,
    options: SegmentOptions | None = None,
    on_progress: Callable[[float], None] = lambda seconds: None,
    feature_kind: str = "fbank",
) -> Iterator[tuple[AudioInput, Recording | UserError]]:
    """Each input with its result, or why it has none, in order, as soon as all before it are done.

    Silence is not recognised: an input without sound has no segments. Where segments overlap, the words that both have
    are in one of them (`without_overlap`).

    Args:
        inputs: drawn lazily.
        recognise: such as a `speechllm.decode.recognizer.Recogniser`.
        on_progress: called with the seconds of audio of each batch that is recognised.
        feature_kind: that of the model's encoder; see `speechllm.data.features.MEL_BINS`.
    """
    from speechllm.data.manifests.source import DataError
    from speechllm.transcribe.formats import Recording

    options = options or SegmentOptions()
    unfinished: deque[_Progress] = deque()
    in_work: deque[list[_Part]] = deque()

    def batches() -> Iterator[Speech]:
        segments = _parts(inputs, unfinished, options.max_seconds, feature_kind)
        for parts in _batches(segments, options.batch_seconds):
            in_work.append(parts)
            yield _speech(parts)

    def finished() -> Iterator[tuple[AudioInput, Recording | UserError]]:
        while unfinished and unfinished[0].is_done:
            done = unfinished.popleft()
            if done.error is not None:
                yield done.input, DataError(str(done.error))
                continue
            segments = _joined(done.parts)
            yield done.input, Recording(done.input.id, done.input.audio, done.duration, segments)

    for recognitions in recognise(batches()):
        parts = in_work.popleft()
        for part, recognition in zip(parts, recognitions, strict=True):
            part.recognition = recognition
        on_progress(sum(part.duration for part in parts))
        yield from finished()
    yield from finished()


def _parts(
    inputs: Iterable[AudioInput], unfinished: deque[_Progress], max_seconds: float, feature_kind: str
) -> Iterator[_Part]:
    """The segments with sound of all inputs. Each input is added to `unfinished` when it is opened."""
    from speechllm.data.audio import UtteranceError
    from speechllm.data.features import SAMPLE_RATE, extract_features
    from speechllm.data.manifests.source import DataError
    from speechllm.transcribe.pauses import split_at_pauses

    for input in inputs:
        progress = _Progress(input)
        unfinished.append(progress)

        def blocks(progress: _Progress = progress) -> Iterator[np.ndarray]:
            for block in progress.input.blocks():
                progress.duration += len(block) / SAMPLE_RATE
                yield block

        try:
            for segment in split_at_pauses(blocks(), max_seconds):
                duration = len(segment.samples) / SAMPLE_RATE
                features = extract_features(segment.samples, feature_kind)
                part = _Part(segment.start, duration, segment.overlap, input, features)
                progress.parts.append(part)
                yield part
        except (UtteranceError, DataError) as error:
            progress.error = error
        progress.is_read = True


def _batches(parts: Iterable[_Part], batch_seconds: float) -> Iterator[list[_Part]]:
    """Batches whose longest part, times their size, is at most `batch_seconds`; the longest of a window come first."""
    window: list[_Part] = []
    held = 0.0
    for part in parts:
        window.append(part)
        held += part.duration
        if held >= _WINDOW_BATCHES * batch_seconds:
            yield from _packed(window, batch_seconds)
            window, held = [], 0.0
    yield from _packed(window, batch_seconds)


def _packed(window: list[_Part], batch_seconds: float) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    for part in sorted(window, key=lambda part: -part.duration):
        if batch and batch[0].duration * (len(batch) + 1) > batch_seconds:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _speech(parts: list[_Part]) -> Speech:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from speechllm.decode.recognizer import Speech
    from speechllm.prompt.template import PromptContext

    features = [part.features for part in parts]
    for part in parts:
        part.features = None
    return Speech(
        pad_sequence(features, batch_first=True),
        torch.tensor([len(rows) for rows in features]),
        [part.input.language for part in parts],
        [part.input.target_language for part in parts],
        [replace(part.input.context or PromptContext(), id=part.input.name) for part in parts],
    )


def _joined(parts: list[_Part]) -> list[Segment]:
    from speechllm.transcribe.formats import Segment

    segments: list[Segment] = []
    for part in parts:
        segment = Segment(part.offset, part.duration, part.recognition)
        if part.overlap:
            segments[-1], segment = without_overlap(segments[-1], segment)
        segments.append(segment)
    return segments


def without_overlap(before: Segment, after: Segment) -> tuple[Segment, Segment]:
    """Two segments that both hold the end of the first, without the words that both have.

    Of the words that the end of the first and the beginning of the second have in common, the longest run is where the
    two are joined: what the first has behind it, and the second before it, was cut off in the middle and is dropped. A
    run is too short when more than twice as many words would be dropped. Without a run, words with times are taken from
    the side of the middle of the overlap that they are on; without times all words stay.

    The words of the overlap are known by their times, else by their share of the segment. Only `text` and `words` of
    the recognitions are changed. The segments meet in the middle of the overlap.
    """
    overlap = min(before.offset + before.duration - after.offset, after.duration)
    middle = after.offset + overlap / 2
    first, second = _Words(before), _Words(after)
    tail, head = first.since(after.offset), second.until(after.offset + overlap)
    place, other, length = _longest_run(first.keys[tail:], second.keys[:head])
    dropped = len(first.keys) - tail - place - length + other
    if length and dropped <= 2 * length:
        kept, left_out = tail + place + length, other + length
    elif first.times and second.times:
        kept = sum(time < middle for time in first.times)
        left_out = sum(time < middle for time in second.times)
    else:
        kept, left_out = len(first.keys), 0
    return (
        replace(before, duration=middle - before.offset, recognition=first.part(0, kept)),
        replace(
            after,
            offset=middle,
            duration=after.duration - overlap / 2,
            recognition=second.part(left_out, len(second.keys), shift=-overlap / 2),
        ),
    )


class _Words:
    """The words of a segment's text, to be compared: case and punctuation do not count.

    `times`: the middle of each word, from the start of the recording; None without times, or when they are of another
    text.
    """

    def __init__(self, segment: Segment) -> None:
        from speechllm.decode.timestamps import word_spans

        self._segment = segment
        self._text = segment.recognition.text
        self._spans = word_spans(self._text)
        words = [self._text[start:end] for start, end in self._spans]
        self.keys = ["".join(filter(str.isalnum, word.casefold())) or word for word in words]
        timed = segment.words
        has_times = timed is not None and [word.text for word in timed] == words
        self.times = [(word.start + word.end) / 2 for word in timed] if has_times else None

    def since(self, seconds: float) -> int:
        """The number of the first word that may be said after this time."""
        if self.times is not None:
            return sum(time < seconds for time in self.times)
        return max(0, len(self.keys) - self._most_in(self._segment.offset + self._segment.duration - seconds))

    def until(self, seconds: float) -> int:
        """The number of words that may be said before this time."""
        if self.times is not None:
            return sum(time < seconds for time in self.times)
        return min(len(self.keys), self._most_in(seconds - self._segment.offset))

    def _most_in(self, seconds: float) -> int:
        """Half as many again as at the segment's rate, and one."""
        return 1 + int(1.5 * len(self.keys) * seconds / self._segment.duration)

    def part(self, first: int, end: int, shift: float = 0.0) -> Recognition:
        """With the words [first, end) alone, their times moved by `shift` seconds."""
        recognition = self._segment.recognition
        text = self._text[self._spans[first][0] : self._spans[end - 1][1]] if first < end else ""
        words = recognition.words
        if words is not None:
            words = words[first:end] if self.times is not None else None
        if words is not None:
            words = tuple(replace(word, start=word.start + shift, end=word.end + shift) for word in words)
        return replace(recognition, text=text, words=words)


def _longest_run(first: list[str], second: list[str]) -> tuple[int, int, int]:
    """Where the longest common run of words begins in both, and its length."""
    from difflib import SequenceMatcher

    return SequenceMatcher(None, first, second, autojunk=False).find_longest_match()


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
        is_one = len(paths) == 1 and not paths[0].is_dir() and not _is_manifest(paths[0])
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
        from speechllm.transcribe.formats import FORMATS

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
    from tqdm import tqdm

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
