"""The page as a part of the application: offline, and with nothing of Gradio reachable that it does not need."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, bad_request, internal_error
from .metrics import Metrics
from .page_texts import TEXTS
from .settings import ServerSettings
from .studio import Studio
from .worker import Worker

SCRIPT = "/cogview2/page.js"
SCRIPT_TEXTS = ("unreadable", "too_large", "picture", "mask")
# Gradio would also store uploads, serve files, fetch URLs for a client, and run functions past the queue.
ALLOWED = re.compile(
    r"GET /|GET /(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)|GET /(assets|static|svelte)/[\w./~@-]+"
    r"|GET /gradio_api/(startup-events|queue/data|heartbeat/\w+|info)"
    r"|POST /gradio_api/(queue/join|cancel|reset)"
)
JOIN = "/gradio_api/queue/join"
STREAMS = re.compile(r"/gradio_api/(queue/data|heartbeat/\w+)")
SESSION = re.compile(r"[\w-]{1,64}")


def mount_page(app: FastAPI, studio: Studio, worker: Worker, metrics: Metrics, settings: ServerSettings) -> None:
    """Add the page to the application, at `/`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # those of its own monitoring, which it keeps in memory
    with _without_network_settings():
        import gradio as gr

        from .page import FONTS, Page

    here = Path(__file__).parent
    texts = {key: dict(zip(("en", "zh"), TEXTS[key])) for key in SCRIPT_TEXTS}
    script = (
        f"{(here / 'page.js').read_text(encoding='utf-8')}\n"
        f"window.cogview2.setLimits({settings.max_pixels});\n"
        f"Object.assign(window.cogview2.texts, {json.dumps(texts, ensure_ascii=False)});\n"
    )

    methods = {path: ", ".join(sorted(map(str.upper, kinds))) for path, kinds in app.openapi()["paths"].items()}

    @app.get(SCRIPT, include_in_schema=False)
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript")

    with _without_network_settings():
        blocks = Page(studio, worker, metrics, settings).build()
        gr.mount_gradio_app(
            app,
            blocks,
            path="/",
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=1,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
            css=(here / "page.css").read_text(encoding="utf-8"),
            head=f'<script src=".{SCRIPT}" defer></script>',
        )
    mounted: Any = app.routes[-1]
    inputs = {index: len(function.inputs) for index, function in blocks.fns.items()}
    mounted.app = PageGuard(mounted.app, methods, inputs, worker, settings.max_connections // 2)


@contextlib.contextmanager
def _without_network_settings() -> Iterator[None]:
    """
    Hide the proxies and certificates of the environment: Gradio makes HTTP clients when it is imported, which fails if
    there is a proxy of a kind that they cannot use. The page asks nobody for anything.
    """
    names = {"SSL_CERT_FILE", "SSL_CERT_DIR"} | {name for name in os.environ if name.lower().endswith("_proxy")}
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class PageGuard:
    """
    Lets through to Gradio only what the page needs, and answers errors as the API does.

    Args:
        app: Gradio.
        methods (`dict[str, str]`): Those of the paths of the API: at `/`, Gradio gets what comes there by other ones.
        inputs (`dict[int, int]`): How many values each function of the page takes, by its number.
        worker ([`Worker`]): Whose places bound the bodies that are held.
        max_streams (`int`): Answers that may stay open at a time.
    """

    def __init__(
        self, app: ASGIApp, methods: dict[str, str], inputs: Mapping[int, int], worker: Worker, max_streams: int
    ):
        self.app, self.methods, self.inputs = app, methods, inputs
        self.worker, self.max_streams = worker, max_streams
        self._num_streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path in self.methods:
            raise HTTPException(405, headers={"Allow": self.methods[path]})
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if not ALLOWED.fullmatch(f"{method} {path}") or ".." in path:
            raise ApiError(404, "There is no such path.", "not_found")
        if path == JOIN:
            with self.worker.place(scope["state"]["upload"]):
                receive = await self._checked(receive)
        with self._stream() if STREAMS.fullmatch(path) else contextlib.nullcontext():
            await self.app(scope, receive, _Answers(send))

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if self._num_streams >= self.max_streams:
            raise ApiError(503, "Too many pages are open. Close some.", "too_many_pages", retry_after=10)
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    async def _checked(self, receive: Receive) -> Receive:
        """
        The body of a click, which may hold texts and numbers only, as many as its function takes.

        Whatever the component, Gradio takes an object for a file, and would fetch it if it has a URL.
        """
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = self._plain(b"".join(parts))
        is_sent = False

        async def replay() -> Message:
            nonlocal is_sent
            if is_sent:
                return await receive()
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    def _plain(self, body: bytes) -> bytes:
        """What Gradio needs of the body of a click, and nothing else."""
        try:
            values = json.loads(body)
            function, session, data = values["fn_index"], values["session_hash"], values["data"]
            trigger = values.get("trigger_id")
            are_plain = isinstance(data, list) and all(
                isinstance(value, (str, int, float, bool, type(None))) for value in data
            )
            text = json.dumps([session, data], ensure_ascii=False)
            text.encode()  # no lone surrogates
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            are_plain = False
        if not are_plain:
            raise bad_request("The page sends texts and numbers only.", code="invalid_json")
        if type(function) is not int or function not in self.inputs:
            raise bad_request("`fn_index` must be the number of a function of the page.", "fn_index")
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise bad_request("`session_hash` must be 1 to 64 letters and digits.", "session_hash")
        if type(trigger) not in (int, type(None)):
            raise bad_request("`trigger_id` must be a number.", "trigger_id")
        if len(data) != self.inputs[function]:
            raise bad_request(f"`data` must have {self.inputs[function]} values, but has {len(data)}.", "data")
        kept = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": trigger}
        return json.dumps(kept).encode()


class _Answers:
    """Passes answers on; those of errors become what the API would say."""

    def __init__(self, send: Send):
        self.send = send
        self._is_replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._is_replaced = True
            await self._replace(message["status"], MutableHeaders(scope=message).get("allow"))
        elif not self._is_replaced:
            await self.send(message)

    async def _replace(self, status: int, allowed: str | None) -> None:
        if status == 404:
            error = ApiError(404, "There is no such path.", "not_found")
        elif status == 405:
            error = ApiError(405, "This path has other methods.", "method_not_allowed")
        elif status == 503:
            error = ApiError(503, "Too many clicks wait. Try again.", "queue_full", retry_after=10)
        elif status >= 500:
            error = internal_error()
        else:
            error = ApiError(status, "This is not what the page sends.", "invalid_request")
        response = error.response()
        if allowed is not None:
            response.headers["Allow"] = allowed
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": response.body})
