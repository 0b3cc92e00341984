"""`cogview2 serve`: a page and an HTTP API for one model."""

import contextlib
import importlib.util
from typing import TYPE_CHECKING

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import FAILURE, fail, say
from .loading import (
    DEVICE_OPTION,
    DTYPE_OPTION,
    INT8_OPTION,
    METADATA_OPTION,
    MODEL_OPTION,
    DType,
    describe_model,
    find_model,
    load_pipeline,
)

if TYPE_CHECKING:
    import socket

    from ..serving.settings import ServerSettings

NEEDED = ("fastapi", "python_multipart", "prometheus_client", "uvicorn")


def serve(
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 is all of them, and needs a token."),
    port: int = typer.Option(7860, min=0, max=65535, help="Port to listen on; 0 is a free one."),
    token: str = typer.Option(
        None,
        envvar="COGVIEW2_TOKEN",
        show_envvar=True,
        help="What clients must send. Others can read the command line of a process: prefer the variable.",
    ),
    allow_host: list[str] = typer.Option(
        None, help="A host name that the server answers to, such as a proxy's; may be repeated."
    ),
    page: bool = typer.Option(
        None, help="Whether to serve the page as well as the API.  [default: yes, where gradio is installed]"
    ),
    queue_limit: int = typer.Option(32, min=1, max=1000, help="Requests that wait or are computed at a time."),
    batch_size: int = typer.Option(
        8, min=1, max=64, help="Pictures of several requests that are computed together; 1: one request at a time."
    ),
    job_timeout: float = typer.Option(600, min=1, help="Seconds until the work for a request is stopped."),
    max_images: int = typer.Option(8, min=1, max=64, help="Pictures in a request."),
    max_pixels: int = typer.Option(4_200_000, min=1, max=100_000_000, help="Pixels that a request may send in."),
    metadata: bool = METADATA_OPTION,
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    int8: bool = INT8_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
) -> None:
    """
    Serve a page and an HTTP API.

    The page is at /, the API at /v1/images/generations, edits, upscales, captions and scores. On this machine only,
    unless --host says otherwise. Ctrl-C stops it.
    """
    page = _check_installed(page)
    from ..serving.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        token=token or None,
        allowed_hosts=tuple(allow_host or ()),
        page=page,
        queue_limit=queue_limit,
        batch_size=batch_size,
        job_timeout=job_timeout,
        max_images=max_images,
        max_pixels=max_pixels,
        metadata=metadata,
    )
    if not settings.is_local and settings.token is None:
        fail(
            f"`--host` {host} lets other machines in, so a token must be set: COGVIEW2_TOKEN=... cogview2 serve. "
            "Leave --host out to serve this machine only."
        )
    source, adapters = find_model(model), read_adapters(lora)
    with _listen(settings) as listening:
        from ..serving.app import create_app
        from ..serving.server import make_server, set_up_log

        pipe = load_pipeline(source, device, dtype, adapters=adapters, int8=int8)
        set_up_log()
        identity = describe_model(model, adapters, int8)
        app = create_app(pipe, settings, _name(identity["model"]), identity)
        server = make_server(app, settings)
        shown = f"[{host}]" if ":" in host else host
        say(f"Serving on http://{shown}:{listening.getsockname()[1]}", err=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after an orderly end
            server.run(sockets=[listening])


def _check_installed(page: bool | None) -> bool:
    """Whether to serve the page, by what is wanted and what is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fail(f'{" and ".join(missing)} must be installed: `pip install "cogview_pipelines[serve]"`.', FAILURE)
    if page is False or importlib.util.find_spec("gradio") is not None:
        return page is not False
    install = '`pip install "cogview_pipelines[page]"`'
    if page:
        fail(
            f"gradio must be installed for --page: {install}. Leave --page out to serve the API alone.",
            FAILURE,
        )
    say(f"Without gradio there is no page, only the API: {install} adds it.", err=True)
    return False


def _listen(settings: "ServerSettings") -> "socket.socket":
    """Before the model is loaded: a port that is taken is told at once."""
    from ..serving.server import bind

    try:
        return bind(settings)
    except OSError as error:
        fail(
            f"Cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}. Choose another "
            "--port or --host.",
            FAILURE,
        )


def _name(model: str) -> str:
    """What clients call the model: of a Hub id the last part, since it stands in addresses."""
    return model.rpartition("/")[2] or "cogview2"
