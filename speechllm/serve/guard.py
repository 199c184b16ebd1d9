"""What every request passes first: is it meant for this server, by somebody who may, and not too often?"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speechllm.serve.errors import APIError, busy
from speechllm.serve.service import Service

SUBPROTOCOL = "realtime"
_KEY_SUBPROTOCOL = "openai-insecure-api-key."
# All else is read without a key: the page, which asks for it, and what a load balancer asks.
_GUARDED = ("/v1/", "/metrics")
_COUNTED = {f"/v1/{path}" for path in ("audio/transcriptions", "audio/translations", "models", "realtime")}
_COUNTED |= {"/health", "/metrics"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; worker-src 'self'; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Middleware of an application.

    Args:
      is_loopback: the server listens to this machine alone: then other names in `Host` are those of a site that has its
        name point here, to be let through its visitors' browsers.
    """

    def __init__(self, app: ASGIApp, service: Service, is_loopback: bool) -> None:
        self._app, self._service, self._is_loopback = app, service, is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _COUNTED else "other"
        send = _sender(send, lambda status: self._service.metrics.requests.labels(path, str(status)).inc())
        try:
            self._check(scope)
        except APIError as error:
            if scope["type"] == "websocket":
                await receive()  # its connect; the refusal is an HTTP response
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises:
        APIError: the request is refused.
        """
        headers = Headers(scope=scope)
        host = urlsplit(f"//{headers.get('host', '')}")
        if self._is_loopback and host.hostname not in _LOOPBACK:
            raise APIError(403, f"the server is not called {host.hostname!r}; it is 127.0.0.1", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host.netloc:
            raise APIError(403, f"a page of {origin} may not use this server", "wrong_origin")
        if not scope["path"].startswith(_GUARDED):
            return
        if self._service.places.is_closed:
            raise APIError(503, "the server is about to end", "server_shutting_down", headers={"Retry-After": "5"})
        address = scope["client"][0] if scope.get("client") else ""
        if seconds := self._service.rates.wait(address):
            raise busy("too many requests", "rate_limit_exceeded", math.ceil(seconds))
        if self._service.keys and not self._knows_key(headers, scope.get("subprotocols", ())):
            raise APIError(
                401,
                "the API key is missing or wrong: give Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _knows_key(self, headers: Headers, subprotocols: list[str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = next((name for name in subprotocols if name.startswith(_KEY_SUBPROTOCOL)), "")
            given = given.removeprefix(_KEY_SUBPROTOCOL)
        # all are compared, each in a time that does not say how much of it is right
        return any([hmac.compare_digest(given.strip().encode(), key.encode()) for key in self._service.keys])


def _sender(send: Send, count: Callable[[int], None]) -> Send:
    """`send` with our headers, which counts what is answered."""

    async def sending(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            count(message["status"])
        elif message["type"] == "websocket.accept":
            count(101)
        await send(message)

    return sending
