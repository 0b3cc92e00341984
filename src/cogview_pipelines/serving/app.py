"""The application: API and page behind the same gates."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio.to_thread
from fastapi import FastAPI

from .._version import __version__
from ..pipelines.cogview.pipeline_cogview import CogViewPipeline
from ..pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from .api import make_router
from .errors import answer_errors
from .metrics import Metrics
from .middleware import BodyLimit, Gate, RequestLog
from .settings import ServerSettings
from .studio import Studio
from .studio_cogview import CogViewStudio
from .worker import Worker


def create_app(
    pipe: CogView2Pipeline | CogViewPipeline,
    settings: ServerSettings,
    name: str = "cogview2",
    identity: Mapping[str, Any] | None = None,
) -> FastAPI:
    """
    Everything that the server answers.

    Args:
        pipe ([`CogView2Pipeline`] or [`CogViewPipeline`]): The model, on its device. Only the worker's thread may call
            it from now on.
        settings ([`ServerSettings`]): Bounds, token, and what is served.
        name (`str`): What clients call the model.
        identity (`Mapping`, *optional*): What picture files say of the model: its name, fingerprint, adapters and
            `int8`; default: `name`.

    Returns:
        `FastAPI`: The application; `app.state.worker` is the [`Worker`], which starts and stops with it.
    """
    metrics = Metrics()
    worker = Worker(settings.queue_limit, settings.job_timeout, metrics, settings.batch_size)
    kind = CogViewStudio if isinstance(pipe, CogViewPipeline) else Studio
    studio = kind(pipe, name, settings, identity)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await anyio.to_thread.run_sync(worker.stop)

    app = FastAPI(title="cogview2", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.worker = worker
    app.include_router(make_router(studio, worker, metrics, settings))
    routes = frozenset(app.openapi()["paths"]) | {"/openapi.json"}
    answer_errors(app)
    if settings.page:
        from .page_mount import mount_page

        mount_page(app, studio, worker, metrics, settings)
    # the last one is the first that a request meets
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(RequestLog, metrics=metrics, routes=routes)
    return app
