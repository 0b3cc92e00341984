"""The process: a socket, uvicorn, the log, and an orderly end."""

import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI

from .settings import ServerSettings


class Server(uvicorn.Server):
    """uvicorn, which lets nobody in any more as soon as it is to stop, while running requests may end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.worker.close()
        await super().shutdown(sockets)


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
