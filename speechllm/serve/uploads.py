"""Recordings that are uploaded: the form, and the way from its file to segments with texts.

The file is decoded block by block in a thread of its own; segments go to the engine as they are found, a few at a time,
so that memory does not grow with the length. Nothing that a client says is taken for a path: audio is decoded from a
temporary file of ours, by what is in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic
from typing import BinaryIO

import numpy as np
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HTTPRequest

from speechllm.data.audio_file import UtteranceError, open_audio
from speechllm.data.blocks import read_blocks
from speechllm.data.features import SAMPLE_RATE, extract_features
from speechllm.decode.interface import RecognizeOptions
from speechllm.decode.result import Recognition
from speechllm.errors import UserError
from speechllm.prompt.request import Request
from speechllm.serve.errors import APIError
from speechllm.serve.limits import Place
from speechllm.serve.options import ServeOptions
from speechllm.serve.responses import RESPONSE_FORMATS, TIMED_FORMATS
from speechllm.serve.service import Service
from speechllm.transcribe.formats import Segment
from speechllm.transcribe.pauses import split_at_pauses
from speechllm.transcribe.segments import joined_segments

_FIELDS = {"file", "model", "language", "prompt", "response_format", "temperature", "stream", "chunking_strategy"}
_FIELDS |= {"timestamp_granularities", "timestamp_granularities[]", "target_language", "keywords", "keywords[]"}
_MOST_FIELDS, _LARGEST_FIELD = 64, 64 * 1024
# A client that sends nothing for so long has gone, or wants to keep us waiting.
_MOST_SECONDS_BETWEEN_PARTS = 20.0
# Of the segments of one upload that wait for their text; their features are held.
_MOST_SEGMENTS = 8
# Beyond these a header is a mistake or a trap: one block of samples would fill the memory.
_RATES, _MOST_CHANNELS = range(4000, 192_001), 8


async def read_form(request: HTTPRequest, options: ServeOptions) -> FormData:
    """The fields of an upload.

    Raises:
      APIError: it is no form, too large, or too slow.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise APIError(400, "send the fields as multipart/form-data", "invalid_content_type")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > options.max_upload_bytes:
        raise _too_large(options)
    async with aclosing(_body(request, options)) as body:
        parser = MultiPartParser(
            request.headers, body, max_files=1, max_fields=_MOST_FIELDS, max_part_size=_LARGEST_FIELD
        )
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise APIError(400, f"the form cannot be read: {error.message}", "invalid_form") from error


async def _body(request: HTTPRequest, options: ServeOptions) -> AsyncGenerator[bytes, None]:
    end = monotonic() + options.upload_seconds
    parts, size = request.stream(), 0
    while True:
        seconds = min(_MOST_SECONDS_BETWEEN_PARTS, end - monotonic())
        try:
            part = await asyncio.wait_for(anext(parts), seconds)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise APIError(
                408,
                f"the upload is too slow: it has to arrive in {options.upload_seconds:g} s, and never rest for "
                f"{_MOST_SECONDS_BETWEEN_PARTS:g} s",
                "upload_timeout",
                headers={"Connection": "close"},
            ) from None
        size += len(part)
        if size > options.max_upload_bytes:
            raise _too_large(options)
        yield part


def _too_large(options: ServeOptions) -> APIError:
    return APIError(413, f"the upload is larger than {options.max_upload_bytes} bytes", "upload_too_large", "file")


@dataclass(frozen=True)
class Asked:
    """What the form of an upload asks for.

    Attributes:
      language: of the speech, as far as it is known; the prompt may take no notice of it.
    """

    file: UploadFile
    request: Request
    options: RecognizeOptions
    response_format: str
    granularities: tuple[str, ...]
    temperature: float
    stream: bool
    language: str | None


def read_fields(form: FormData, service: Service, translates: bool) -> Asked:
    """What a form asks for.

    Raises:
      APIError: a field is unknown, or its value is not what the server can do.
    """
    if unknown := sorted(set(form) - _FIELDS):
        raise APIError(400, f"unknown field {unknown[0]!r}", "unknown_parameter", unknown[0])
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise APIError(400, "file: give the audio, as a file", "missing_parameter", "file")
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    service.check_model(fields.get("model"))
    response_format = fields.get("response_format", "json")
    _choose("response_format", response_format, RESPONSE_FORMATS)
    stream = fields.get("stream", "false").lower()
    _choose("stream", stream, ("true", "false"))
    granularities = tuple(
        str(value) for name in ("timestamp_granularities", "timestamp_granularities[]") for value in form.getlist(name)
    )
    for value in granularities:
        _choose("timestamp_granularities", value, ("segment", "word"))
    if granularities and response_format != "verbose_json":
        raise APIError(
            400, "timestamp_granularities: only verbose_json has them", "invalid_value", "timestamp_granularities"
        )
    if "word" in granularities and not service.has_word_times:
        raise APIError(400, "the model knows no times of words", "unsupported_value", "timestamp_granularities")
    if stream == "true" and response_format not in ("json", "text"):
        raise APIError(400, f"stream: {response_format} needs the whole text", "invalid_value", "stream")
    temperature = _temperature(fields.get("temperature", "0"))
    target = fields.get("target_language")
    if target is not None and not translates:
        raise APIError(400, "target_language: is for /v1/audio/translations", "unknown_parameter", "target_language")
    keywords = [str(value) for name in ("keywords", "keywords[]") for value in form.getlist(name)]
    return Asked(
        file,
        service.request(
            fields.get("language"), target or ("en" if translates else None), fields.get("prompt"), keywords or None
        ),
        service.recognize_options(response_format in TIMED_FORMATS, temperature),
        response_format,
        granularities or ("segment",),
        temperature,
        stream == "true",
        fields.get("language") or service.default_language,
    )


def _choose(name: str, value: str, among: tuple[str, ...]) -> None:
    if value not in among:
        raise APIError(400, f"{name}: {value!r} is none of {', '.join(among)}", "invalid_value", name)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise APIError(400, f"temperature: {text!r} is no number from 0 to 1", "invalid_value", "temperature")
    return value


class Upload:
    """A recording that is being transcribed.

    Args:
      file: its contents, which are read from the beginning and closed.
      place: that it has; given back when nothing is computed for it any more.

    Attributes:
      duration: seconds of audio so far.
    """

    def __init__(self, service: Service, file: BinaryIO, asked: Asked, place: Place) -> None:
        self._service, self._file, self._asked, self._place = service, file, asked, place
        self._is_cancelled = threading.Event()
        self._waiting: deque[tuple[float, float, float, Future[Recognition]]] = deque()
        self._found: asyncio.Queue[Segment | Exception | None] = asyncio.Queue()
        self.duration = 0.0

    def start(self) -> None:
        """Begin, in a thread of its own."""
        loop = asyncio.get_running_loop()

        def end(last: Exception | None) -> None:
            # before the client is told: it may ask for a place again at once
            self._place.release()
            self._found.put_nowait(last)

        def work() -> None:
            last: Exception | None = None
            try:
                for segment in self._segments():
                    loop.call_soon_threadsafe(self._found.put_nowait, segment)
            except Exception as error:
                last = error
            self._file.close()
            loop.call_soon_threadsafe(end, last)

        self._service.threads.submit(work)

    async def segments(self) -> AsyncGenerator[Segment, None]:
        """The segments, in order, as they are known; what is left is given up when the iterator is closed.

        Raises:
          APIError: the audio cannot be read, or is too long.
        """
        began = monotonic()
        try:
            while (item := await self._found.get()) is not None:
                if isinstance(item, Exception):
                    raise _told(item) from item
                yield item
            self._service.metrics.upload_seconds.observe(monotonic() - began)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._is_cancelled.set()
        for *_, future in list(self._waiting):
            future.cancel()

    def _segments(self) -> Iterator[Segment]:
        with tempfile.NamedTemporaryFile(prefix="speechllm-") as copy:
            shutil.copyfileobj(self._file, copy, 1 << 20)
            copy.flush()
            self._file.close()
            with open_audio(copy.name, "the file") as opened:
                _check(opened.rate, opened.channels)
            yield from joined_segments(self._recognized(copy.name))

    def _recognized(self, path: str) -> Iterator[tuple[Segment, float]]:
        service, asked = self._service, self._asked
        for audio in split_at_pauses(self._blocks(path), service.max_segment):
            features = extract_features(audio.samples, service.model.feature_kind)
            # of the audio, so that sampling gives the same text in any company
            key = hashlib.sha256(audio.samples.tobytes()).hexdigest()
            found = service.engine.recognize(features, replace(asked.request, key=key), asked.options)
            self._waiting.append((audio.start, len(audio.samples) / SAMPLE_RATE, audio.overlap, found))
            while len(self._waiting) >= _MOST_SEGMENTS or (self._waiting and self._waiting[0][3].done()):
                yield self._next()
        while self._waiting:
            yield self._next()

    def _next(self) -> tuple[Segment, float]:
        offset, duration, overlap, found = self._waiting[0]
        if self._is_cancelled.is_set():
            found.cancel()
        recognition = found.result()
        self._waiting.popleft()
        return Segment(offset, duration, recognition), overlap

    def _blocks(self, path: str) -> Iterator[np.ndarray]:
        """The audio, unless there is too much of it or nobody waits any more."""
        most = self._service.options.max_audio_seconds

        def all_channels(count: int) -> range:
            _check(SAMPLE_RATE, count)
            return range(count)

        for block in read_blocks(path, choose=all_channels, name="the file"):
            self.duration += len(block) / SAMPLE_RATE
            if self.duration > most:
                raise APIError(413, f"the recording is longer than {most:g} s", "audio_too_long", "file")
            if self._is_cancelled.is_set():
                raise UserError("nobody waits for it any more")
            yield block


def _check(rate: int, channels: int) -> None:
    if rate not in _RATES or channels > _MOST_CHANNELS:
        raise APIError(
            400,
            f"{channels} channels at {rate} Hz: give at most {_MOST_CHANNELS}, at {_RATES[0]} to {_RATES[-1]} Hz",
            "invalid_audio",
            "file",
        )


def _told(error: Exception) -> Exception:
    """What the client is told of an error."""
    if isinstance(error, UtteranceError):
        return APIError(400, str(error), "invalid_audio", "file")
    if isinstance(error, UserError):
        return APIError(400, str(error), "invalid_request")
    return error
