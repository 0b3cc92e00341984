"""What every request passes: a name and a line in the log, who may come in, and how much they may bring."""

import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import time
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import CLIENT_CLOSED_REQUEST, ApiError, internal_error
from .metrics import Metrics
from .settings import ServerSettings, is_loopback
from .uploads import Upload

logger = logging.getLogger(__name__)

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health",)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# The page may load nothing from elsewhere and send nothing there; its libraries evaluate templates as code.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestLog:
    """Gives each request an id, answers what was raised, and writes a line that holds nothing of its content."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]):
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # nothing here speaks WebSocket
        request_id = scope.setdefault("state", {}).setdefault("request_id", uuid.uuid4().hex[:16])
        started, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in HEADERS.items():
                    headers[name] = value
                if scope["path"].startswith("/v1/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:  # in mid-upload: nobody is there to answer
            status = status or CLIENT_CLOSED_REQUEST
        except ApiError as error:
            if not status:
                await error.response()(scope, receive, send_with_headers)
        except Exception:
            logger.exception("%s raised", request_id)
            if not status:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            path = scope["path"]
            route = path if path in self.routes else "page" if status < 400 else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            logger.info("%s %s %s %s %.2f s", request_id, scope["method"], route, status, time.monotonic() - started)


class Gate:
    """
    Who may come in: requests that mean this server (not one that a foreign page rebinds to it), do not come from a
    foreign page, and bring the token, if there is one.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app = app
        self.digest = None if settings.token is None else _digest(settings.token.encode())
        self.hosts = {host.lower() for host in settings.allowed_hosts}
        if settings.is_local or self.hosts:
            self.hosts |= {*LOOPBACK_NAMES, settings.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(headers, scope["method"])
            if scope["path"] not in OPEN_PATHS:
                self._check_token(headers)
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if not self.hosts:
            return
        host = _host_name(headers.get("host", ""))
        if host not in self.hosts and not is_loopback(host):
            raise ApiError(
                421, "This server does not answer to this host name. Allow it with --allow-host.", "unknown_host"
            )

    def _check_origin(self, headers: Headers, method: str) -> None:
        origin = headers.get("origin")
        if method in SAFE_METHODS or origin is None:
            return
        if origin.lower().partition("://")[2] != headers.get("host", "").lower():
            raise ApiError(403, "Pages of other sites may not use this server.", "foreign_origin")

    def _check_token(self, headers: Headers) -> None:
        if self.digest is None:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = b""
        if kind.lower() == "bearer":
            given = value.strip(" ").encode("latin-1")  # the bytes that were sent
        elif kind.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                given = base64.b64decode(value.strip(" "), validate=True).partition(b":")[2]
        if not hmac.compare_digest(_digest(given), self.digest):
            raise ApiError(401, "Send the token of this server: `Authorization: Bearer TOKEN`.", "invalid_token")


class BodyLimit:
    """How many bytes a request may bring, and how long it may take to."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app, self.most = app, settings.max_body_bytes
        self.timeout, self.grace = settings.body_timeout, settings.body_grace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.most:
            raise self._too_large()
        upload = scope.setdefault("state", {})["upload"] = Upload(self.timeout, self.grace)

        async def receive_within_limits() -> Message:
            if upload.is_complete:  # what comes now is the end of the connection, whenever that is
                return await receive()
            message = await upload.wait_for(receive())
            upload.received += len(message.get("body", b""))
            upload.is_complete = not message.get("more_body", False)
            if upload.received > self.most:
                raise self._too_large()
            return message

        await self.app(scope, receive_within_limits, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body of a request may have {self.most:,} bytes.", "body_too_large")


def _digest(token: bytes) -> bytes:
    """Of equal length for all tokens, so that the time of a comparison tells nothing, not even the length."""
    return hashlib.sha256(token).digest()


def _host_name(host: str) -> str:
    """A host without its port, and without the brackets of IPv6."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
