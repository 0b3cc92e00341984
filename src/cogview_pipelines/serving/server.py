"""The process: a socket, uvicorn, the log, and an orderly end."""

import asyncio
import logging
import math
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .settings import ServerSettings


class Server(uvicorn.Server):
    """uvicorn, which lets nobody in any more as soon as it is to stop, while running requests may end."""

    shutdown_timeout: float

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        worker = getattr(self.config.app.state, "worker", None)
        if worker is None:  # nothing is computed, so nothing takes long
            return await super().shutdown(sockets)
        worker.close()
        # what does not end in time is answered before uvicorn cuts it off
        over = asyncio.get_running_loop().call_later(self.shutdown_timeout, worker.abandon)
        try:
            await super().shutdown(sockets)
        finally:
            over.cancel()


class Connection(AutoHTTPProtocol):
    """
    A connection that is closed when no request comes on it, at once when others want its place: clients that say
    nothing must not keep others out.
    """

    settings: ServerSettings

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.silent_since = self.loop.time()
        self.loop.call_later(self.settings.head_timeout, self._close_if_silent, None)
        if len(self.connections) >= self.settings.max_connections:  # from here on uvicorn answers 503
            self._close_longest_silent()

    def on_response_complete(self) -> None:
        self.silent_since = self.loop.time()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether there is no request on it that has come whole, or whose body is coming, and is not answered."""
        return self.cycle is None or self.cycle.response_complete

    def _close_longest_silent(self) -> None:
        """Make room for one more request."""
        latest = self.loop.time() - self.settings.silence_grace
        silent = [each for each in self.connections if each.is_idle and each.silent_since <= latest]
        surplus = len(self.connections) - self.settings.max_connections + 1
        for each in sorted(silent, key=lambda each: each.silent_since)[:surplus]:
            self.connections.discard(each)  # now, not when the transport tells of its end
            each.transport.close()

    def _close_if_silent(self, last) -> None:
        """Close if the latest request is still that of the check before, and answered; else check again later."""
        if self.transport.is_closing():
            return
        if self.is_idle and self.cycle is last:
            self.transport.close()
        else:
            seconds = self.settings.head_timeout
            self.loop.call_later(seconds, self._close_if_silent, self.cycle if self.is_idle else self)


def bind(settings: ServerSettings) -> socket.socket:
    """
    The socket, bound but not listening yet, so that nobody connects before the model is there.

    Raises:
        OSError: If the address cannot be used.
    """
    [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(True)
    return bound


def make_server(app: FastAPI, settings: ServerSettings) -> Server:
    """The server, not running yet."""
    config = uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"settings": settings}),
        log_config=None,
        access_log=False,  # RequestLog writes a line with the request's id
        server_header=False,
        date_header=True,
        ws="none",
        lifespan="on",
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout) + 1,
    )
    server = Server(config)
    server.shutdown_timeout = settings.shutdown_timeout
    return server


def set_up_log() -> None:
    """Lines of this package and warnings of others on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("cogview_pipelines").setLevel(logging.INFO)
