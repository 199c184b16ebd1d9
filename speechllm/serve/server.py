"""uvicorn around the application: its limits, and how it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from types import FrameType

import uvicorn

from speechllm.errors import UserError
from speechllm.serve.app import make_app
from speechllm.serve.protocols import WebSocketProtocol, http_protocol
from speechllm.serve.service import Service

logger = logging.getLogger(__name__)

_BACKLOG = 128
# For the next request of a connection; for responses to be read when all are computed.
_KEEP_ALIVE_SECONDS, _LAST_SECONDS = 5, 5
# A live client that sends faster than it is heard reads our pings late, behind its own audio.
_PING_SECONDS, _PONG_SECONDS = 20.0, 60.0


class Server(uvicorn.Server):
    """Serves until it is told to end; then what is being served has `drain_seconds` to finish.

    Args:
      listening: a socket that is bound and listens, as `listen` gives one.
    """

    def __init__(self, service: Service, listening: socket.socket) -> None:
        self._service, self._listening = service, listening
        self.is_loopback = is_loopback(listening.getsockname()[0])
        options = service.options
        config = uvicorn.Config(
            make_app(service, self.is_loopback),
            http=http_protocol(options.max_connections),
            ws=WebSocketProtocol,
            ws_max_size=options.max_message_bytes,
            # a message of a few bytes could unpack to gigabytes
            ws_per_message_deflate=False,
            ws_ping_interval=_PING_SECONDS,
            ws_ping_timeout=_PONG_SECONDS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_SECONDS,
            server_header=False,
            proxy_headers=False,
            log_level="warning",
        )
        super().__init__(config)

    @property
    def url(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        if self._service.draining.is_set():
            self.should_exit = self.force_exit = True
            return
        logger.warning("draining: %d are being served", self._service.places.taken)
        # a signal comes in the middle of anything: the loop does it next
        asyncio.get_running_loop().call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Take nobody new, and end when all that are being served are done."""
        self._service.drain()
        self._draining = asyncio.ensure_future(self._exit_when_done())

    async def _exit_when_done(self) -> None:
        for _ in range(round(10 * self._service.options.drain_seconds)):
            if not self._service.places.taken:
                break
            await asyncio.sleep(0.1)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free.

    Raises:
      UserError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return listening


def is_loopback(host: str) -> bool:
    """Whether an address of a socket is this machine's own, which no other reaches."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
