"""Inputs to recordings: cut into segments, recognized in batches across inputs, put together again."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from torch import Tensor

from speechllm.data.audio_file import AudioNote, UtteranceError
from speechllm.data.features import SAMPLE_RATE, extract_features
from speechllm.data.manifests.source import DataError
from speechllm.decode.interface import Recognizer, Speech
from speechllm.decode.result import Recognition
from speechllm.errors import UserError
from speechllm.transcribe.formats import Recording, Segment
from speechllm.transcribe.inputs import AudioInput
from speechllm.transcribe.overlap import without_overlap
from speechllm.transcribe.pauses import SHORTEST_MAX_SECONDS, split_at_pauses

# Segments of similar length are looked for among those of so many batches.
_WINDOW_BATCHES = 4


class TranscriptionError(DataError):
    """Some of the inputs could not be transcribed.

    Attributes:
        results: of each input its recording, or the error.
    """

    def __init__(self, errors: Sequence[UserError], results: Sequence[Recording | UserError]) -> None:
        more = f" (and {len(errors) - 1} more of {len(results)} inputs)" if len(errors) > 1 else ""
        super().__init__(f"{errors[0]}{more}")
        self.results = list(results)


@dataclass(frozen=True)
class SegmentOptions:
    """`batch_seconds`: of a batch with its padding; a longer segment has one to itself. `max_seconds`: of a segment.

    Raises:
        UserError: a value is out of range.
    """

    batch_seconds: float = 300.0
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.batch_seconds > 0:
            raise UserError(f"--batch-duration: must be more than 0 seconds, got {self.batch_seconds:g}")
        if not self.max_seconds >= SHORTEST_MAX_SECONDS:
            raise UserError(
                f"--max-segment: must be at least {SHORTEST_MAX_SECONDS:g} seconds, got {self.max_seconds:g}"
            )


@dataclass
class _Part:
    """A segment of an input, before and after it is recognized; the features only until it is in a batch."""

    offset: float
    duration: float
    overlap: float
    input: AudioInput
    features: Tensor | None
    key: str
    recognition: Recognition | None = None


@dataclass
class _Progress:
    """How far an input is."""

    input: AudioInput
    parts: list[_Part] = field(default_factory=list)
    notes: list[AudioNote] = field(default_factory=list)
    duration: float = 0.0
    error: UtteranceError | UserError | None = None
    is_read: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_read and all(part.recognition is not None for part in self.parts)


def transcribe_inputs(
    inputs: Iterable[AudioInput],
    recognizer: Recognizer,
    options: SegmentOptions | None = None,
    on_progress: Callable[[float], None] = lambda seconds: None,
    feature_kind: str = "fbank",
) -> Iterator[tuple[AudioInput, Recording | UserError]]:
    """Each input with its result, or why it has none, in order, as soon as all before it are done.

    Silence is not recognized: an input without sound has no segments. Where segments overlap, the words that both have
    are in one of them (`without_overlap`).

    Args:
        inputs: drawn lazily.
        recognizer: what it refuses (`check`) is the result of that input, and the others are done.
        on_progress: called with the seconds of audio of each batch that is recognized.
        feature_kind: that of the model's encoder; see `speechllm.data.features.MEL_BINS`.
    """
    options = options or SegmentOptions()
    unfinished: deque[_Progress] = deque()
    in_work: deque[list[_Part]] = deque()

    def batches() -> Iterator[Speech]:
        segments = _parts(inputs, unfinished, options.max_seconds, feature_kind, recognizer)
        for parts in _batches(segments, options.batch_seconds):
            in_work.append(parts)
            yield _speech(parts)

    def finished() -> Iterator[tuple[AudioInput, Recording | UserError]]:
        while unfinished and unfinished[0].is_done:
            done = unfinished.popleft()
            if done.error is not None:
                yield done.input, DataError(str(done.error))
                continue
            warnings = tuple(dict.fromkeys(f"{note.reason}: {note.details}" for note in done.notes))
            segments = _joined(done.parts)
            yield done.input, Recording(done.input.id, done.input.audio, done.duration, segments, warnings)

    for recognitions in recognizer(batches()):
        parts = in_work.popleft()
        for part, recognition in zip(parts, recognitions, strict=True):
            part.recognition = recognition
        on_progress(sum(part.duration for part in parts))
        yield from finished()
    yield from finished()


def _parts(
    inputs: Iterable[AudioInput],
    unfinished: deque[_Progress],
    max_seconds: float,
    feature_kind: str,
    recognizer: Recognizer,
) -> Iterator[_Part]:
    """The segments with sound of all inputs. Each input is added to `unfinished` when it is opened."""
    for input in inputs:
        progress = _Progress(input)
        unfinished.append(progress)

        try:
            if input.error is not None:
                raise input.error
            recognizer.check(replace(input.request, id=input.name))
            for segment in split_at_pauses(_blocks(progress), max_seconds):
                duration = len(segment.samples) / SAMPLE_RATE
                features = extract_features(segment.samples, feature_kind)
                # of the audio, so that it is the same whatever else is transcribed, and in what order
                key = hashlib.sha256(segment.samples.tobytes()).hexdigest()
                part = _Part(segment.start, duration, segment.overlap, input, features, key)
                progress.parts.append(part)
                yield part
        except (UtteranceError, UserError) as error:
            progress.error = error
        progress.is_read = True


def _blocks(progress: _Progress) -> Iterator[np.ndarray]:
    for block in input_blocks(progress.input, progress.notes):
        progress.duration += len(block) / SAMPLE_RATE
        yield block


def input_blocks(input: AudioInput, notes: list[AudioNote]) -> Iterator[np.ndarray]:
    """The audio of an input; whatever else goes wrong while it is read is an `UtteranceError` too."""
    try:
        yield from input.blocks(notes)
    except (UtteranceError, UserError, MemoryError):
        raise
    except Exception as error:  # each decoder raises what it likes about a broken file
        lines = str(error).splitlines() or [""]
        details = f"{input.name}: {type(error).__name__}: {lines[0][:300]}"
        raise UtteranceError("unreadable audio", details) from error


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
    features = [part.features for part in parts if part.features is not None]
    for part in parts:
        part.features = None
    return Speech.padded(features, [replace(part.input.request, id=part.input.name, key=part.key) for part in parts])


def _joined(parts: list[_Part]) -> list[Segment]:
    found = ((Segment(part.offset, part.duration, cast(Recognition, part.recognition)), part.overlap) for part in parts)
    return list(joined_segments(found))


def joined_segments(found: Iterable[tuple[Segment, float]]) -> Iterator[Segment]:
    """The segments of a recording as they are in its result: words that two have, as they overlap, are in one of them.

    Args:
        found: each segment with the seconds at its beginning that are the end of the one before.

    Yields:
        each as soon as the next one is known.
    """
    last: Segment | None = None
    for segment, overlap in found:
        if last is not None:
            if overlap:
                last, segment = without_overlap(last, segment)
            yield last
        last = segment
    if last is not None:
        yield last
