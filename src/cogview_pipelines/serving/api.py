"""The HTTP API, in the manner of the image endpoints that people use already."""

import asyncio
import base64
import functools
import time
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from ..pictures.files import as_mask, opacity_of
from . import schemas
from .errors import CLIENT_CLOSED_REQUEST, ApiError, bad_request
from .forms import describe_files, read_form, read_json, read_pictures
from .jobs import Job, JobCancelled, Work, alone
from .metrics import Metrics
from .settings import ServerSettings
from .studio import Made, Studio
from .worker import Place, Worker


def make_router(studio: Studio, worker: Worker, metrics: Metrics, settings: ServerSettings) -> APIRouter:
    """The routes of a server."""
    api, router = _Api(studio, worker, metrics, settings), APIRouter()
    router.get("/health")(api.health)
    router.get("/metrics")(api.numbers)
    router.get("/v1/models")(api.models)
    router.get("/v1/models/{model}")(api.model)
    for name, endpoint, body in (
        ("generations", api.generations, _body(schemas.GenerationRequest)),
        ("edits", api.edits, _body(schemas.EditRequest, "image", "mask")),
        ("upscales", api.upscales, _body(schemas.UpscaleRequest, "image")),
        ("captions", api.captions, _body(schemas.CaptionRequest, "image")),
        ("scores", api.scores, _body(schemas.ScoreRequest, "image")),
    ):
        router.post(f"/v1/images/{name}", openapi_extra=body)(endpoint)
    return router


class _Api:
    """What the paths answer. The names and first lines of the methods stand in `/openapi.json`."""

    def __init__(self, studio: Studio, worker: Worker, metrics: Metrics, settings: ServerSettings):
        self.studio, self.worker, self.metrics, self.settings = studio, worker, metrics, settings

    async def health(self) -> Response:
        """Whether the server takes requests: 200 or 503."""
        status = "ok" if self.worker.is_alive else "stopping"
        return JSONResponse({"status": status}, 200 if self.worker.is_alive else 503)

    async def numbers(self) -> Response:
        """For Prometheus."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        """The one model, its sizes and styles."""
        return {"object": "list", "data": [self.studio.describe()]}

    async def model(self, model: str) -> dict[str, Any]:
        """The same by its name."""
        if model != self.studio.name:
            raise ApiError(
                404, f"There is no such model. This server has `{self.studio.name}`.", "model_not_found", "model"
            )
        return self.studio.describe()

    async def generations(self, request: Request) -> Response:
        """Pictures of a prompt."""
        with self.worker.place(request.state.upload) as place:
            wanted = schemas.parse(schemas.GenerationRequest, await read_json(request), strict=True)
            self.studio.check_generation(wanted)
            made = await _result(request, place, "generation", self.studio.generation(wanted))
            return await self._pictures("generation", wanted, made)

    async def edits(self, request: Request) -> Response:
        """A part of a picture painted anew: what the mask marks, or what is transparent."""
        with self.worker.place(request.state.upload) as place:
            values, files = await read_form(request, ("image", "mask"))
            wanted = schemas.parse(schemas.EditRequest, values, strict=False)
            inputs = await describe_files(files)
            [image] = await read_pictures(files, "image", self.settings)
            if files.get("mask"):
                mask = as_mask((await read_pictures(files, "mask", self.settings))[0])
            elif opacity_of(image) is not None:
                mask, image = as_mask(image), image.convert("RGBA")
            else:
                raise bad_request(
                    "`mask` must be given, as a file, unless `image` has transparent parts.",
                    "mask",
                    "missing_parameter",
                )
            self.studio.check_edit(wanted, image, mask)
            work = alone(functools.partial(self.studio.edit, wanted, image, mask, inputs))
            made = await _result(request, place, "edit", work)
            return await self._pictures("edit", wanted, made)

    async def upscales(self, request: Request) -> Response:
        """A picture enlarged."""
        with self.worker.place(request.state.upload) as place:
            values, files = await read_form(request, ("image",))
            wanted = schemas.parse(schemas.UpscaleRequest, values, strict=False)
            inputs = await describe_files(files)
            [image] = await read_pictures(files, "image", self.settings)
            self.studio.check_upscale(wanted, image)
            made = await _result(request, place, "upscale", self.studio.enlargement(wanted, image, inputs))
            return await self._pictures("upscale", wanted, made)

    async def captions(self, request: Request) -> Response:
        """Captions of pictures."""
        with self.worker.place(request.state.upload) as place:
            values, files = await read_form(request, ("image",))
            wanted = schemas.parse(schemas.CaptionRequest, values, strict=False)
            self.studio.check_caption(wanted, len(files.get("image", [])))
            images = await read_pictures(files, "image", self.settings, most=self.settings.max_images)
            work = alone(functools.partial(self.studio.caption, wanted, images))
            found = await _result(request, place, "caption", work)
            data = [{"index": index, "captions": captions} for index, captions in enumerate(found)]
            return JSONResponse({"object": "list", "model": self.studio.name, "data": data})

    async def scores(self, request: Request) -> Response:
        """How well texts describe a picture, best first."""
        with self.worker.place(request.state.upload) as place:
            values, files = await read_form(request, ("image",), lists=("prompt",))
            wanted = schemas.parse(schemas.ScoreRequest, values, strict=False)
            self.studio.check_scores(wanted)
            [image] = await read_pictures(files, "image", self.settings)
            work = alone(functools.partial(self.studio.score, wanted, image))
            data = await _result(request, place, "score", work)
            warnings = self.studio.warnings(scored=True, prompt=wanted.prompt)
            return JSONResponse({"object": "list", "model": self.studio.name, "data": data, "warnings": warnings})

    async def _pictures(
        self, kind: str, wanted: schemas.DrawsTokens | schemas.UpscaleRequest, made: list[Made]
    ) -> Response:
        self.metrics.pictures.labels(kind).inc(len(made))
        form = (wanted.output_format, wanted.output_compression)
        contents = await anyio.to_thread.run_sync(lambda: [self.studio.encode(one, *form) for one in made])
        data = [_entry(one, content) for one, content in zip(made, contents)]
        width, height = made[0].image.size
        return JSONResponse(
            {
                "created": int(time.time()),
                "model": self.studio.name,
                "size": f"{width}x{height}",
                "output_format": wanted.output_format,
                "data": data,
                "warnings": self.studio.warnings(
                    prompt=wanted.prompt, negative_prompt=getattr(wanted, "negative_prompt", None)
                ),
            }
        )


def _entry(made: Made, content: bytes) -> dict[str, Any]:
    entry = {"b64_json": base64.b64encode(content).decode(), "seed": made.seed, "revised_prompt": made.prompt}
    return entry if made.score is None else {**entry, "score": made.score}


async def _result(request: Request, place: Place, kind: str, work: Work) -> Any:
    """What the work makes; it is cancelled when the client leaves."""
    job = place.submit(Job(kind, work, request_id=request.state.request_id))
    future = asyncio.ensure_future(asyncio.wrap_future(job.future))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "The client left.", "client_closed_request")
        return future.result()
    except JobCancelled:
        raise ApiError(503, "The server is stopping.", "stopping", retry_after=10) from None
    finally:
        gone.cancel()
        future.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client has left. The body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _body(kind: type[BaseModel], *files: str) -> dict[str, Any]:
    """What `/openapi.json` says of the body of a request; the handlers read it themselves, within bounds."""
    schema = kind.model_json_schema()
    required = schema.get("required", [])
    if files:
        file = {"type": "string", "format": "binary"}
        schema["properties"] = {**schema["properties"], **dict.fromkeys(files, file)}
        schema["required"] = [*required, files[0]]
    else:
        schema["properties"] = {
            name: field if name in required else _or_null(field) for name, field in schema["properties"].items()
        }
    content = {"multipart/form-data" if files else "application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    """A field that may be null, which stands for its default."""
    if {"type": "null"} in field.get("anyOf", ()):
        return field
    about: dict[str, Any] = {name: field[name] for name in ("title", "description", "default") if name in field}
    return {"anyOf": [{name: value for name, value in field.items() if name not in about}, {"type": "null"}], **about}
