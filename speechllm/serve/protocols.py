"""uvicorn's protocols with limits of their own: connections, and the time that a client may take.

uvicorn waits for the headers of a request, for the rest of a body that nobody reads, and for a client to read its
response, as long as the client likes. Here each has an end, so that what holds a connection open holds no more.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

# For the headers of a request, for a body that is not read, and for a response to be read.
_HEADER_SECONDS, _REST_SECONDS, _READ_SECONDS = 10.0, 30.0, 60.0
_WATCH_SECONDS = 2.0
# From the end of a live session to that of its connection.
_ABORT_SECONDS = 10.0
_BODY = b'{"error":{"message":"too many connections","type":"server_error","param":null,"code":"too_many_connections"}}'
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
_REFUSAL += b"Retry-After: 1\r\nContent-Length: %d\r\n\r\n" % len(_BODY) + _BODY


class HTTPProtocol(H11Protocol):
    """HTTP/1.1 in limited time."""

    most_connections = 256

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_for, self._since = "headers", monotonic()
        self._watcher: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most_connections:
            transport.write(_REFUSAL)
            transport.close()
            return
        self._watcher = self.loop.call_later(_WATCH_SECONDS, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._forget()
        super().handle_websocket_upgrade(event)

    def data_received(self, data: bytes) -> None:
        # of a connection that was refused, nothing is read
        if not self.transport.is_closing():
            super().data_received(data)

    def _forget(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def _watch(self) -> None:
        """Look every few seconds what the client lets us wait for, and how long."""
        waits_for = self._awaited()
        if waits_for != self._waits_for:
            self._waits_for, self._since = waits_for, monotonic()
        most = {"headers": _HEADER_SECONDS, "rest": _REST_SECONDS, "reader": _READ_SECONDS}.get(waits_for)
        if most is not None and monotonic() - self._since > most:
            self.transport.abort()
            return
        self._watcher = self.loop.call_later(_WATCH_SECONDS, self._watch)

    def _awaited(self) -> str:
        if self.flow.write_paused:
            return "reader"
        if self.cycle is not None and not self.cycle.response_complete:
            return "us"
        if self.conn.their_state is h11.SEND_BODY:
            return "rest"
        # after a request, of the next one
        return "headers" if self.conn.their_state is h11.IDLE else "end"


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """A connection whose end is one, also if the client never reads it."""

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.loop.call_later(_ABORT_SECONDS, self.transport.abort)


def http_protocol(most_connections: int) -> type[HTTPProtocol]:
    """The protocol with so many connections."""
    attributes: dict[str, Any] = {"most_connections": most_connections}
    return type("HTTPProtocol", (HTTPProtocol,), attributes)
