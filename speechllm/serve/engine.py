"""The one thread that computes: a loop over the model that uploads and live streams share.

Each turn of the loop is a step of the streams that have heard enough for one, computed together; then segments of
recordings that wait join where there is room; then all that have joined are searched for one token more. So a stream
waits for a step, not for a recording, and each has the text that it would have alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from speechllm.data.features import SAMPLE_RATE
from speechllm.decode.interface import FRAME_SECONDS, ContinuousRecognizer, RecognizeOptions, Speech
from speechllm.decode.result import Recognition, StreamedWord
from speechllm.decode.streaming import Stream, StreamingRecognizer
from speechllm.errors import UserError
from speechllm.prompt.request import Request

logger = logging.getLogger(__name__)

# Of the segments that are encoded together: without live streams, and with them, which wait for it.
_BATCH_SECONDS, _BATCH_SECONDS_BESIDE_STREAMS = 300.0, 30.0
# Recognizers of options that one client alone asked for, such as its temperature, are not kept.
_MOST_IDLE_RECOGNIZERS = 4


class Recognizes(Protocol):
    """What the engine asks of a model."""

    def recognizer(self, options: RecognizeOptions | None = None) -> ContinuousRecognizer: ...


@dataclass(eq=False)
class _Segment:
    """A segment of a recording that waits for its text."""

    features: Tensor | None  # (T, F); None once it has joined
    request: Request
    seconds: float
    found: Future[Recognition] = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # nobody waits any more
            self.found.set_exception(error)


@dataclass
class _Lane:
    """The segments that are recognized with the same options."""

    options: RecognizeOptions
    recognizer: ContinuousRecognizer
    waiting: deque[_Segment] = field(default_factory=deque)
    joined: dict[int, _Segment] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.joined


Ended = Literal["commit", "clear"]


@dataclass(frozen=True)
class Heard:
    """What a live stream has said in a step.

    Attributes:
      unstable: text that follows for now.
      segment: the number of the segment that is being spoken.
      seconds: how much audio has been heard, since the stream began or was last ended.
      ended: what has ended it, if anything has: after a commit these are its last words.
    """

    words: Sequence[StreamedWord]
    unstable: str
    segment: int
    seconds: float
    ended: Ended | None = None


class LiveStream:
    """A live stream of words. What comes in is taken in order: samples, commits, clears.

    Args:
      request: what is asked for.
      on_heard: called in the engine's thread.
      on_error: the same, when computing has failed: what was heard since the last end is lost.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        on_heard: Callable[[Heard], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.on_heard, self.on_error = on_heard, on_error
        self._engine, self._request = engine, request
        self._stream: Stream | None = None
        self._inbox: deque[np.ndarray | Ended] = deque()
        self._waiting = 0  # samples in the inbox

    @property
    def backlog(self) -> float:
        """How many seconds of audio wait to be heard."""
        return self._waiting / SAMPLE_RATE

    def append(self, samples: np.ndarray) -> None:
        """(num_samples,) float32, 16 kHz."""
        with self._engine.changed:
            self._inbox.append(samples)
            self._waiting += len(samples)
            self._engine.changed.notify()

    def end(self, how: Ended) -> None:
        """Finish what was appended, or forget it; what follows begins anew."""
        with self._engine.changed:
            while how == "clear" and self._inbox and isinstance(item := self._inbox[-1], np.ndarray):
                self._inbox.pop()
                self._waiting -= len(item)
            self._inbox.append(how)
            self._engine.changed.notify()

    def close(self) -> None:
        """Nobody listens any more: its place is free at once."""
        with self._engine.changed:
            self._engine.streams.pop(self, None)

    # ------------------------------------------------------------------------------------------------------------
    # For the engine, which holds the lock

    def take(self, recognizer: StreamingRecognizer) -> _Step | None:
        """What it is to hear next; None while that is too little for a step."""
        if not self._inbox:
            return None
        if self._stream is None:
            self._stream = recognizer.open(self._request.language, self._request)
        wanted = max(1, self._stream.wanted)
        if self._waiting < wanted and not any(isinstance(item, str) for item in self._inbox):
            return None
        parts, found = [np.zeros(0, dtype=np.float32)], 0
        while found < wanted and self._inbox and isinstance(item := self._inbox[0], np.ndarray):
            part, rest = item[: wanted - found], item[wanted - found :]
            self._inbox.popleft()
            if len(rest):
                self._inbox.appendleft(rest)
            parts.append(part)
            found += len(part)
        self._waiting -= found
        step = _Step(self, self._stream, np.concatenate(parts))
        if self._inbox and isinstance(item := self._inbox[0], str):
            self._inbox.popleft()
            step.ended, self._stream = item, None
        return step

    def fail(self, error: Exception) -> None:
        """Forget all, and go on with what comes."""
        with self._engine.changed:
            self._inbox.clear()
            self._waiting, self._stream = 0, None
        self.on_error(error)


@dataclass
class _Step:
    """What a stream hears in a step, and what ends it after that."""

    live: LiveStream
    stream: Stream
    samples: np.ndarray
    ended: Ended | None = None


class Engine:
    """Recognizes segments and streams in a thread of its own.

    Args:
      model: in evaluation mode.
      streaming: for live streams of words; None where the model cannot hear them.
      on_step: called in the thread with the seconds that a turn took, and the seconds of audio that it finished.

    Attributes:
      changed: the lock of all that other threads change.
      streams: that are open, in the order in which they came.
    """

    def __init__(
        self,
        model: Recognizes,
        streaming: StreamingRecognizer | None = None,
        on_step: Callable[[float, float], None] = lambda seconds, audio: None,
    ) -> None:
        self.changed = threading.Condition()  # its lock may be taken again by the thread that has it
        self.streams: dict[LiveStream, None] = {}
        self._model, self._streaming, self._on_step = model, streaming, on_step
        self._lanes: dict[RecognizeOptions, _Lane] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="speechllm-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what waits fails."""
        with self.changed:
            self._is_stopping = True
            self.changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many segments wait for a place."""
        with self.changed:
            return sum(len(lane.waiting) for lane in self._lanes.values())

    def recognize(self, features: Tensor, request: Request, options: RecognizeOptions) -> Future[Recognition]:
        """The text of a segment; cancelling takes it out.

        Args:
          features: (T, F); options: segments with the same ones are searched together.

        Raises:
          UserError: the model cannot do what is asked for.
        """
        segment = _Segment(features, request, len(features) * FRAME_SECONDS)
        with self.changed:
            lane = self._lane(options)
            lane.recognizer.check(request, len(features))
            lane.waiting.append(segment)
            self.changed.notify()
        return segment.found

    def check(self, request: Request, options: RecognizeOptions) -> None:
        """Whether the model can do that.

        Raises:
          UserError: it cannot.
        """
        with self.changed:
            self._lane(options).recognizer.check(request)

    def open(
        self, request: Request, on_heard: Callable[[Heard], None], on_error: Callable[[Exception], None]
    ) -> LiveStream:
        """A live stream of words."""
        live = LiveStream(self, request, on_heard, on_error)
        with self.changed:
            self.streams[live] = None
        return live

    def _lane(self, options: RecognizeOptions) -> _Lane:
        if options not in self._lanes:
            idle = [other for other, lane in self._lanes.items() if lane.is_idle]
            for other in idle[: max(0, len(idle) + 1 - _MOST_IDLE_RECOGNIZERS)]:
                del self._lanes[other]
            self._lanes[options] = _Lane(options, self._model.recognizer(options))
        return self._lanes[options]

    # ------------------------------------------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        while True:
            with self.changed:
                steps = self._next_steps()
                while not self._is_stopping and not steps and all(lane.is_idle for lane in self._lanes.values()):
                    self.changed.wait()
                    steps = self._next_steps()
                if self._is_stopping:
                    self._fail_all(UserError("the server has ended"))
                    return
                lanes = list(self._lanes.values())
            began = monotonic()
            audio = self._advance(steps) if steps else 0.0
            for lane in lanes:
                audio += self._turn(lane)
            self._on_step(monotonic() - began, audio)

    def _next_steps(self) -> list[_Step]:
        if self._streaming is None:
            return []
        steps = []
        for live in list(self.streams):
            try:
                step = live.take(self._streaming)
            except Exception as error:
                logger.exception("a live stream cannot begin")
                live.fail(error)
                continue
            if step is not None:
                steps.append(step)
        return steps

    def _advance(self, steps: Sequence[_Step]) -> float:
        """A step of each of these streams; the seconds of audio that they have heard in it."""
        assert self._streaming is not None
        streams = [step.stream for step in steps]
        try:
            words = self._streaming.accept(streams, [step.samples for step in steps])
            ending = [i for i, step in enumerate(steps) if step.ended == "commit"]
            for i, found in zip(ending, self._streaming.finish([streams[i] for i in ending]), strict=True):
                words[i] += found
        except Exception as error:
            logger.exception("%d live streams have failed", len(steps))
            for step in steps:
                step.live.fail(error)
            return 0.0
        for step, found in zip(steps, words, strict=True):
            stream = step.stream
            unstable = "" if step.ended else stream.unstable
            step.live.on_heard(Heard(found, unstable, stream.segment, stream.seconds, step.ended))
        return sum(len(step.samples) for step in steps) / SAMPLE_RATE

    def _turn(self, lane: _Lane) -> float:
        """Segments leave and join a lane, and those in it go a step on; the seconds of those that are done."""
        entering: list[_Segment] = []
        try:
            gone = [number for number, segment in lane.joined.items() if segment.found.cancelled()]
            lane.recognizer.leave(gone)
            for number in gone:
                del lane.joined[number]
            if entering := self._entering(lane):
                numbers = lane.recognizer.join(_speech(entering))
                lane.joined |= zip(numbers, entering, strict=True)
            done = lane.recognizer.step() if lane.joined else []
        except Exception as error:
            logger.exception("%d segments have failed", len(lane.joined))
            with self.changed:
                # what is half-computed is gone: a new recognizer goes on with those that wait
                for segment in (*lane.joined.values(), *entering):
                    segment.fail(error)
                lane.joined.clear()
                lane.recognizer = self._model.recognizer(lane.options)
            return 0.0
        seconds = 0.0
        for number, recognition in done:
            segment = lane.joined.pop(number)
            seconds += segment.seconds
            with suppress(InvalidStateError):  # cancelled meanwhile
                segment.found.set_result(recognition)
        return seconds

    def _entering(self, lane: _Lane) -> list[_Segment]:
        """The next segments, if there is room: as many as may be encoded together."""
        most = _BATCH_SECONDS_BESIDE_STREAMS if self.streams else _BATCH_SECONDS
        entering: list[_Segment] = []
        longest = 0.0
        with self.changed:
            while lane.waiting and len(entering) < lane.recognizer.free:
                segment = lane.waiting[0]
                longest = max(longest, segment.seconds)
                if entering and longest * (len(entering) + 1) > most:
                    break
                lane.waiting.popleft()
                if not segment.found.cancelled():
                    entering.append(segment)
        return entering

    def _fail_all(self, error: Exception) -> None:
        for lane in self._lanes.values():
            for segment in (*lane.waiting, *lane.joined.values()):
                segment.fail(error)
        for live in self.streams:
            live.on_error(error)


def _speech(segments: Sequence[_Segment]) -> Speech:
    features = [segment.features for segment in segments if segment.features is not None]
    for segment in segments:
        segment.features = None
    return Speech.padded(features, [segment.request for segment in segments])
