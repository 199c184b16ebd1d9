"""From the samples of a live session to its items: word by word, or segment by segment between pauses."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from time import monotonic
from typing import Protocol, cast

import numpy as np

from speechllm.data.features import SAMPLE_RATE, extract_features
from speechllm.decode.result import StreamedWord, Word
from speechllm.errors import UserError
from speechllm.prompt.request import Request
from speechllm.serve.engine import Ended, Heard
from speechllm.serve.errors import APIError
from speechllm.serve.items import Items
from speechllm.serve.service import Service
from speechllm.serve.session import SessionConfig
from speechllm.transcribe.endpoints import Endpointer
from speechllm.transcribe.formats import Segment
from speechllm.transcribe.overlap import without_overlap
from speechllm.transcribe.pauses import AudioSegment

logger = logging.getLogger(__name__)

# What may wait to be computed until nothing more is read: seconds of audio, segments.
_MOST_BACKLOG, _MOST_SEGMENTS = 10.0, 4


class Listener(Protocol):
    """Takes samples in order, and says through `Items` what was heard; for one event loop."""

    room: asyncio.Event
    """Set while more may be appended."""

    idle: asyncio.Event
    """Set while all that was committed is written."""

    def append(self, samples: np.ndarray) -> None:
        """(num_samples,) float32, 16 kHz."""

    def end(self, how: Ended) -> None:
        """Finish or forget what was appended; what follows begins anew."""

    def close(self) -> None:
        """Nobody listens any more."""


class Arrivals:
    """When audio has come, to say how long after it words are written."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._came: deque[tuple[float, float]] = deque()  # seconds of audio, and when it was that much

    def come(self, seconds: float) -> None:
        self._came.append((seconds, monotonic()))

    def written(self, seconds: float) -> None:
        """Words are written that needed so many seconds of audio, and no less."""
        while len(self._came) > 1 and self._came[0][0] < seconds:
            self._came.popleft()
        if self._came:
            self._observe(monotonic() - self._came[0][1])


class WordListener:
    """Live words of a model that has learned to write while it listens.

    Args:
      base: how many seconds of audio the connection has had before.
    """

    def __init__(self, service: Service, config: SessionConfig, items: Items, base: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        self._items, self._detects_turns = items, config.silence_seconds is not None
        self.room, self.idle = asyncio.Event(), asyncio.Event()
        self.room.set()
        self.idle.set()
        self._is_closed = False
        self._seconds = base  # that have been appended
        self._base = base  # where the stream begins that is being heard
        self._segment = 0
        self._ends: deque[float] = deque()  # that are asked for
        self._arrivals = Arrivals(service.metrics.word_seconds.observe)

        def on_heard(heard: Heard) -> None:
            loop.call_soon_threadsafe(self._heard, heard)

        def on_error(error: Exception) -> None:
            loop.call_soon_threadsafe(self._failed, error)

        self._live = service.engine.open(cast(Request, config.request), on_heard, on_error)

    def append(self, samples: np.ndarray) -> None:
        self._seconds += len(samples) / SAMPLE_RATE
        self._arrivals.come(self._seconds)
        self._live.append(samples)
        if self._live.backlog > _MOST_BACKLOG:
            self.room.clear()

    def end(self, how: Ended) -> None:
        self._ends.append(self._seconds)
        self.idle.clear()
        self._live.end(how)

    def close(self) -> None:
        self._is_closed = True
        self._live.close()

    def _heard(self, heard: Heard) -> None:
        if self._is_closed:
            return
        if self._live.backlog <= _MOST_BACKLOG:
            self.room.set()
        end = self._base + heard.seconds
        for segment, words in groupby(heard.words, lambda word: word.segment):
            self._begin_segment(segment, end)
            self._write(list(words), heard.unstable)
        self._begin_segment(heard.segment, end)
        if heard.unstable or self._items.is_open:
            self._items.add("", [], heard.unstable, end)
        if heard.ended is not None:
            self._end(heard.ended)

    def _begin_segment(self, segment: int, end: float) -> None:
        if segment == self._segment or not self._detects_turns:
            return
        self._segment = segment
        if self._items.is_open:
            self._complete(end)

    def _complete(self, end: float) -> None:
        self._items.committed(self._items.begin())
        self._items.complete(end)

    def _write(self, words: list[StreamedWord], unstable: str) -> None:
        text = "".join(word.text if word.joined else f" {word.text}" for word in words)
        moved = [replace(word, start=word.start + self._base, end=word.end + self._base) for word in words]
        written = self._base + words[-1].written
        self._items.add(text, moved, unstable, written)
        self._arrivals.written(written)

    def _end(self, how: Ended) -> None:
        end = self._ends.popleft()
        if how == "commit":
            self._items.begin()
            self._complete(end)
        else:
            self._items.cleared(end)
        self._base, self._segment = end, 0
        if not self._ends:
            self.idle.set()

    def _failed(self, error: Exception) -> None:
        """What was heard since the last end is lost, and so are ends that were asked for."""
        if self._is_closed:
            return
        self._items.begin()
        self._items.fail(_told(error), self._seconds)
        self._ends.clear()
        self._base, self._segment = self._seconds, 0
        self.room.set()
        self.idle.set()


@dataclass
class _Job:
    """What becomes of audio, in order: a segment of the item with this id, if there is one, and what ends there.

    Attributes:
      at: the end of the audio, in seconds.
    """

    at: float
    id: str
    segment: AudioSegment | None = None
    ended: Ended | None = None


class SegmentListener:
    """Live audio for any model: what is said between pauses is recognized as recordings are; see `WordListener`."""

    def __init__(self, service: Service, config: SessionConfig, items: Items, base: float = 0.0) -> None:
        self._service, self._items, self._config = service, items, config
        self.room, self.idle = asyncio.Event(), asyncio.Event()
        self.room.set()
        self.idle.set()
        self._seconds = self._base = base
        self._id: str | None = None  # of the item that is being spoken
        self._jobs: deque[_Job] = deque()
        self._some = asyncio.Event()
        self._last: Segment | None = None
        self._start: float | None = None  # of the item's audio
        self._arrivals = Arrivals(service.metrics.word_seconds.observe)
        self._endpointer = self._new_endpointer()
        self._worker = asyncio.ensure_future(self._work())

    def _new_endpointer(self) -> Endpointer:
        return Endpointer(self._config.silence_seconds, self._service.max_segment)

    def append(self, samples: np.ndarray) -> None:
        self._seconds += len(samples) / SAMPLE_RATE
        self._arrivals.come(self._seconds)
        for segment in self._endpointer.accept(samples):
            self._stopped(segment)
        if self._endpointer.started is not None:
            self._started(self._endpointer.started)

    def end(self, how: Ended) -> None:
        rest = self._endpointer.finish() if how == "commit" else []
        segment = self._moved(rest[0]) if rest else None
        self._put(_Job(self._seconds, self._id or self._items.new_id(), segment, how))
        self._id, self._base = None, self._seconds
        self._endpointer = self._new_endpointer()

    def close(self) -> None:
        self._worker.cancel()

    def _started(self, at: float) -> None:
        if self._id is None:
            self._id = self._items.new_id()
            if self._config.silence_seconds is not None:
                self._items.speech("started", self._id, self._base + at)

    def _stopped(self, segment: AudioSegment) -> None:
        self._started(segment.start)
        assert self._id is not None
        moved = self._moved(segment)
        at = moved.start + len(moved.samples) / SAMPLE_RATE
        if self._config.silence_seconds is None:
            self._put(_Job(at, self._id, moved))
            return
        self._items.speech("stopped", self._id, at)
        self._put(_Job(at, self._id, moved, "commit"))
        self._id = None

    def _moved(self, segment: AudioSegment) -> AudioSegment:
        """With its time from the first sample of the connection."""
        return replace(segment, start=self._base + segment.start)

    def _put(self, job: _Job) -> None:
        self._jobs.append(job)
        self._some.set()
        self.idle.clear()
        if len(self._jobs) >= _MOST_SEGMENTS:
            self.room.clear()

    async def _work(self) -> None:
        while True:
            while not self._jobs:
                self._some.clear()
                self.idle.set()
                await self._some.wait()
            job = self._jobs[0]
            await self._do(job)
            self._jobs.popleft()
            self.room.set()

    async def _do(self, job: _Job) -> None:
        if job.ended == "clear":
            self._items.cleared(job.at)
            self._last = None
            return
        if job.ended:
            self._items.committed(job.id)
        if not self._items.is_open:
            self._items.begin(job.id)
            self._start = None if job.segment is None else job.segment.start
        try:
            if job.segment is not None:
                await self._recognize(job.segment)
        except Exception as error:
            logger.exception("a live segment has failed")
            self._items.fail(_told(error), job.at)
            return
        if job.ended:
            self._items.complete(job.at, self._start)

    async def _recognize(self, audio: AudioSegment) -> None:
        features = await asyncio.to_thread(extract_features, audio.samples, self._service.model.feature_kind)
        request = replace(cast(Request, self._config.request), key=hashlib.sha256(audio.samples.tobytes()).hexdigest())
        options = self._service.recognize_options(timestamps=True)
        found = await asyncio.wrap_future(self._service.engine.recognize(features, request, options))
        segment = Segment(audio.start, len(audio.samples) / SAMPLE_RATE, found)
        if audio.overlap and self._last is not None:
            # the end of the one before is written already, and stays
            _, segment = without_overlap(self._last, segment)
        self._last = segment
        end = audio.start + len(audio.samples) / SAMPLE_RATE
        if segment.text:
            words = None if segment.words is None else _joined(segment.text, segment.words, end)
            self._items.add(f" {segment.text}", words, "", end)
        self._arrivals.written(end)


def _joined(text: str, words: Sequence[Word], written: float) -> list[StreamedWord]:
    """The words of a text, which know whether there is white space before them."""
    joined, end = [], 0
    for word in words:
        start = max(text.find(word.text, end), end)
        is_joined = 0 < start == end
        joined.append(StreamedWord(word.text, word.start, word.end, word.confidence, written=written, joined=is_joined))
        end = start + len(word.text)
    return joined


def _told(error: Exception) -> APIError:
    if isinstance(error, UserError):
        return APIError(400, str(error), "invalid_request")
    return APIError(500, "the server has failed; its log says how", "server_error")
