"""The page as a part of the application: offline, and with nothing of Gradio reachable that it does not need."""

import json
import os
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, bad_request
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


def mount_page(app: FastAPI, studio: Studio, worker: Worker, metrics: Metrics, settings: ServerSettings) -> None:
    """Add the page to the application, at `/`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # those of its own monitoring, which it keeps in memory
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
    mounted = app.routes[-1]
    mounted.app = PageGuard(mounted.app, methods)


class PageGuard:
    """
    Lets through to Gradio only what the page needs.

    Args:
        app: Gradio.
        methods (`dict[str, str]`): Those of the paths of the API: at `/`, Gradio gets what comes there by other ones.
    """

    def __init__(self, app: ASGIApp, methods: dict[str, str]):
        self.app, self.methods = app, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path in self.methods:
                raise HTTPException(405, headers={"Allow": self.methods[path]})
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            if not ALLOWED.fullmatch(f"{method} {path}") or ".." in path:
                raise ApiError(404, "There is no such path.", "not_found")
            if path == JOIN:
                receive = await _checked(receive)
        await self.app(scope, receive, send)


async def _checked(receive: Receive) -> Receive:
    """
    The body of a click, which may hold texts and numbers only.

    Whatever the component, Gradio takes an object for a file, and would fetch it if it has a URL.
    """
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    try:
        values = json.loads(body)
        plain = all(isinstance(value, (str, int, float, bool, type(None))) for value in values["data"])
        plain = plain and not isinstance(values["data"], (str, dict))
    except (ValueError, KeyError, TypeError, RecursionError):
        plain = False
    if not plain:
        raise bad_request("The page sends texts and numbers only.", code="invalid_json")
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
