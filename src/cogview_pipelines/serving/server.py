"""The process: a socket, uvicorn, the log, and an orderly end."""

import asyncio
import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .settings import ServerSettings


class Server(uvicorn.Server):
    """uvicorn, which lets nobody in any more as soon as it is to stop, while running requests may end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.worker.close()
        await super().shutdown(sockets)


class Connection(AutoHTTPProtocol):
    """A connection that is closed when no request comes on it: clients that say nothing must not keep others out."""

    head_timeout: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.head_timeout, self._close_if_silent, None)

    def _close_if_silent(self, last) -> None:
        """Close if the latest request is still that of the check before, and answered; else check again later."""
        if self.transport.is_closing():
            return
        is_answered = self.cycle is None or self.cycle.response_complete
        if is_answered and self.cycle is last:
            self.transport.close()
        else:
            self.loop.call_later(self.head_timeout, self._close_if_silent, self.cycle if is_answered else self)


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
        http=type("Connection", (Connection,), {"head_timeout": settings.head_timeout}),
        log_config=None,
        access_log=False,  # RequestLog writes a line with the request's id
        server_header=False,
        date_header=True,
        ws="none",
        lifespan="on",
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(int(settings.shutdown_timeout), 1),
    )
    return Server(config)


def set_up_log() -> None:
    """Lines of this package and warnings of others on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("cogview_pipelines").setLevel(logging.INFO)
