"""Live audio over a WebSocket: OpenAI's realtime transcription, as docs/guides/serving.md has it message by message.

    session.update, input_audio_buffer.append, commit, clear -> samples of 16 kHz -> listener -> items -> events

What a client is to be told waits in a queue with an end; one that does not read is let go.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import Any

import numpy as np
from starlette.websockets import WebSocket

from speechllm.data.features import SAMPLE_RATE
from speechllm.data.resample import ResampledStream
from speechllm.serve.engine import Ended
from speechllm.serve.errors import APIError, busy
from speechllm.serve.guard import SUBPROTOCOL
from speechllm.serve.items import Items
from speechllm.serve.listeners import Listener, SegmentListener, WordListener
from speechllm.serve.service import Service
from speechllm.serve.session import changed, described, first_config

# Events that wait to be read by the client.
_MOST_EVENTS = 256
# For the last words, for the client to read them, and to say that this is the end.
_FINISH_SECONDS, _FLUSH_SECONDS, _CLOSE_SECONDS = 20.0, 5.0, 1.0
# Codes that a connection is closed with (RFC 6455).
_NORMAL, _RESTART, _TRY_LATER = 1000, 1012, 1013


class _Closing(Exception):
    """The connection is to be closed.

    Args:
      status: the code of the close frame.
      error: what the client is told before that.
      finishes: whether what was heard is finished first.
    """

    def __init__(self, status: int, error: APIError, finishes: bool = True) -> None:
        super().__init__(error.message)
        self.status, self.error, self.finishes = status, error, finishes


async def serve_session(socket: WebSocket, service: Service) -> None:
    """Serve a connection to its end."""
    try:
        if socket.query_params.get("intent", "transcription") != "transcription":
            raise APIError(400, "intent: only transcription is served", "invalid_value", "intent")
        service.check_model(socket.query_params.get("model"))
        place = service.places.take()
        if place is None:
            raise busy(f"all {service.places.most} places are taken", "too_many_streams")
    except APIError as error:
        await socket.receive()
        await socket.send_denial_response(error.response())
        return
    try:
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
        await _Connection(socket, service).run()
    finally:
        place.release()


class _Connection:
    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service = socket, service
        self._id = f"sess_{secrets.token_hex(12)}"
        self._numbers = count(1)
        self._events: asyncio.Queue[str] = asyncio.Queue(_MOST_EVENTS)
        self._closing: asyncio.Future[_Closing] = asyncio.get_running_loop().create_future()
        self._items = Items(self._emit)
        self._config = first_config(service)
        self._listener: Listener | None = None
        self._resampled: ResampledStream | None = None
        self._odd = b""  # half a sample
        self._has_audio = False  # since the last end
        self._seconds = 0.0  # that have been heard
        self._is_changing = False  # the listener hears with values that are no longer those of the session
        self._handlers = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }

    async def run(self) -> None:
        sender = asyncio.ensure_future(self._send())
        drain = asyncio.ensure_future(self._service.draining.wait())
        drain.add_done_callback(self._drain)
        try:
            self._emit({"type": "session.created", "session": described(self._config, self._id, self._service)})
            await self._receive()
        except _Closing as closing:
            await self._close(closing)
        finally:
            if self._listener is not None:
                self._listener.close()
            for task in (sender, drain):
                task.cancel()

    def _drain(self, draining: asyncio.Future[Any]) -> None:
        if not draining.cancelled():
            self._end(_Closing(_RESTART, APIError(503, "the server is about to end", "server_shutting_down")))

    def _end(self, closing: _Closing) -> None:
        if not self._closing.done():
            self._closing.set_result(closing)

    # ------------------------------------------------------------------------------------------------------------
    # To the client

    def _emit(self, event: dict[str, Any]) -> None:
        try:
            self._events.put_nowait(
                json.dumps({"event_id": f"event_{next(self._numbers)}"} | event, ensure_ascii=False)
            )
        except asyncio.QueueFull:
            error = APIError(400, "the client does not read what it is sent", "slow_reader")
            self._end(_Closing(_TRY_LATER, error, finishes=False))

    def _refuse(self, error: APIError, event_id: object = None) -> None:
        self._emit({"type": "error", "error": error.body() | {"event_id": event_id}})

    async def _send(self) -> None:
        with suppress(Exception):  # the client has gone: so says what is received
            while True:
                event = await self._events.get()
                await self._socket.send_text(event)
                self._events.task_done()

    async def _close(self, closing: _Closing) -> None:
        if closing.finishes and self._listener is not None:
            with suppress(asyncio.TimeoutError):
                if self._has_audio:
                    self._finish("commit")
                await asyncio.wait_for(self._listener.idle.wait(), _FINISH_SECONDS)
        self._refuse(closing.error)
        with suppress(Exception):  # it may have gone, or never read
            if closing.finishes:
                await asyncio.wait_for(self._events.join(), _FLUSH_SECONDS)
            await asyncio.wait_for(self._socket.close(closing.status, closing.error.code), _CLOSE_SECONDS)

    # ------------------------------------------------------------------------------------------------------------
    # From the client

    async def _receive(self) -> None:
        """Until the client has gone.

        Raises:
          _Closing: the server ends the connection.
        """
        options = self._service.options
        end = monotonic() + options.max_session_seconds
        while True:
            message = await self._wait(self._socket.receive(), min(options.idle_seconds, end - monotonic()))
            if message is None:
                if monotonic() >= end:
                    raise _Closing(_NORMAL, APIError(400, "the session has lasted long enough", "session_expired"))
                what = f"nothing has come for {options.idle_seconds:g} s"
                raise _Closing(_NORMAL, APIError(408, what, "idle_timeout"))
            if message["type"] == "websocket.disconnect":
                return
            self._take(message.get("text"))
            if self._listener is not None and not self._listener.room.is_set():
                await self._wait(self._listener.room.wait(), max(0.0, end - monotonic()))
            if self._listener is not None and self._is_changing:
                await self._wait(self._listener.idle.wait(), max(0.0, end - monotonic()))
                self._listener.close()
                self._listener = None
            self._is_changing = False

    async def _wait(self, work: Any, seconds: float) -> Any:
        """The result of a coroutine, None when the time is over.

        Raises:
          _Closing: the server ends the connection.
        """
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, self._closing}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._closing.done():
            task.cancel()
            raise self._closing.result()
        if not task.done():
            task.cancel()
            return None
        return task.result()

    def _take(self, text: str | None) -> None:
        event_id = None
        try:
            message = _parsed(text)
            event_id = message.get("event_id")
            kind = message.get("type")
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                known = ", ".join(self._handlers)
                raise APIError(400, f"type: {str(kind)[:100]!r} is none of {known}", "unknown_type", "type")
            handler(message)
        except APIError as error:
            self._refuse(error, event_id if isinstance(event_id, str) else None)

    def _update(self, message: dict[str, Any]) -> None:
        config = changed(self._config, message.get("session"), self._service)
        if self._has_audio:
            self._finish("commit")
        self._is_changing = self._listener is not None
        self._config = config
        self._resampled, self._odd = None, b""
        self._emit({"type": "session.updated", "session": described(config, self._id, self._service)})

    def _append(self, message: dict[str, Any]) -> None:
        audio = message.get("audio")
        try:
            data = self._odd + base64.b64decode(audio if isinstance(audio, str) else "!", validate=True)
        except (binascii.Error, ValueError):
            raise APIError(400, "audio: is not base64 of samples", "invalid_audio", "audio") from None
        if self._config.lacks is not None:
            raise self._config.lacks
        even = len(data) // 2 * 2
        self._odd = data[even:]
        samples = np.frombuffer(data[:even], dtype="<i2").astype(np.float32) / 32768
        self._has_audio = self._has_audio or even > 0
        if self._resampled is None:
            self._resampled = ResampledStream(self._config.rate, SAMPLE_RATE)
        heard = self._resampled.accept(samples)
        if heard is not None and len(heard):
            self._hear(heard)

    def _commit(self, message: dict[str, Any]) -> None:
        if not self._has_audio:
            raise APIError(400, "no audio has come since the last end", "input_audio_buffer_commit_empty")
        self._finish("commit")

    def _clear(self, message: dict[str, Any]) -> None:
        if self._listener is None:
            self._items.cleared(0.0)
        else:
            self._finish("clear")

    def _finish(self, how: Ended) -> None:
        listener = self._listening()
        rest = None if self._resampled is None else self._resampled.finish()
        if rest is not None and len(rest) and how == "commit":
            self._hear(rest)
        self._resampled, self._odd, self._has_audio = None, b"", False
        listener.end(how)

    def _hear(self, samples: np.ndarray) -> None:
        self._listening().append(samples)
        self._seconds += len(samples) / SAMPLE_RATE

    def _listening(self) -> Listener:
        if self._listener is None:
            translates = self._config.target_language is not None
            kind = SegmentListener if self._service.streaming is None or translates else WordListener
            self._listener = kind(self._service, self._config, self._items, self._seconds)
        return self._listener


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        message = json.loads(text or "")
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise APIError(400, "send one JSON object in each text frame", "invalid_json")
    return message
