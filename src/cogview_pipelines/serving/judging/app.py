"""The application for judges: a page, and what it asks for. Nobody comes in without a judge's link."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from ..._version import __version__
from ...pictures.png import encode_png
from ..errors import ApiError, answer_errors, bad_request
from ..metrics import Metrics
from ..middleware import BodyLimit, Gate, RequestLog
from ..settings import ServerSettings
from .answers import Answer, Answers
from .study import GRADES, Study
from .texts import TEXTS

_HERE = Path(__file__).parent
_FILES = {"judge.css": "text/css", "judge.js": "text/javascript"}
_Grade = Annotated[int, Field(ge=1, le=5)]


class Grades(BaseModel):
    """Of one picture; see [`GRADES`]."""

    model_config = ConfigDict(extra="forbid", strict=True)
    clarity: _Grade
    texture: _Grade
    relevance: _Grade
    overall: Annotated[int, Field(ge=1, le=GRADES["overall"])]


class SentAnswer(BaseModel):
    """What the page sends: places of pictures, not models."""

    model_config = ConfigDict(extra="forbid", strict=True)
    best: Annotated[int, Field(ge=0)]
    grades: list[Grades] | None = None


def create_judging_app(study: Study, answers: Answers, settings: ServerSettings) -> FastAPI:
    """
    Everything that the server for judges answers.

    Args:
        study ([`Study`]): What is shown.
        answers ([`Answers`]): Where answers go; its judges may come in. It is closed with the application.
        settings ([`ServerSettings`]): Bounds; there is no token but those of the judges.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        answers.close()

    app = FastAPI(
        title="cogview2 judge", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    answer_errors(app)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    _add_routes(app, Desk(study, answers))
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(RequestLog, metrics=Metrics(), routes=frozenset({"/health"}))
    return app


def _add_routes(app: FastAPI, desk: "Desk") -> None:
    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/judging/{name}")
    def file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, "There is no such path.", "not_found")
        return Response((_HERE / name).read_bytes(), media_type=_FILES[name])

    @app.get("/judge/{token}")
    def page(token: str) -> Response:
        desk.check(token)
        return Response((_HERE / "judge.html").read_bytes(), media_type="text/html")

    @app.get("/v1/judging/{token}")
    def start(token: str) -> dict:
        return desk.start(token)

    @app.get("/v1/judging/{token}/tasks/{place}")
    def task(token: str, place: int) -> dict:
        return desk.task(token, place)

    @app.put("/v1/judging/{token}/tasks/{place}")
    def put(token: str, place: int, answer: SentAnswer) -> dict:
        return desk.put(token, place, answer)

    @app.get("/v1/judging/{token}/tasks/{place}/pictures/{position}")
    def picture(token: str, place: int, position: int) -> Response:
        return Response(desk.picture(token, place, position), media_type="image/png")


class Desk:
    """Translates between what judges see, places in an order of their own, and captions and models."""

    def __init__(self, study: Study, answers: Answers):
        self.study, self.answers = study, answers
        self._orders = {token: study.order_of_captions(token) for token in answers.judges().values()}

    def check(self, token: str) -> list[int]:
        """The order of a judge's captions."""
        if token not in self._orders:
            raise ApiError(404, "This link is not known. Ask for a new one.", "not_found")
        return self._orders[token]

    def start(self, token: str) -> dict:
        """What the page must know of the study."""
        return {
            "texts": {key: dict(zip(("en", "zh"), pair, strict=True)) for key, pair in TEXTS.items()},
            "mode": "ab" if self.study.is_pair else "grades",
            "grades": GRADES,
            "count": len(self.check(token)),
            **self._state(token, 0),
        }

    def task(self, token: str, place: int) -> dict:
        """A caption, and where its pictures are."""
        caption = self._caption(token, place)
        order = self.study.order_of_models(token, caption)
        there = self.answers.of(token).get(caption)
        answer = None
        if there is not None:
            grades = None if there.grades is None else [there.grades[model] for model in order]
            answer = {"best": order.index(there.best), "grades": grades}
        return {
            "place": place,
            "caption": self.study.rows[caption].caption,
            "pictures": [f"v1/judging/{token}/tasks/{place}/pictures/{position}" for position in range(len(order))],
            "answer": answer,
        }

    def put(self, token: str, place: int, sent: SentAnswer) -> dict:
        """Keep an answer."""
        caption = self._caption(token, place)
        order = self.study.order_of_models(token, caption)
        if sent.best >= len(order):
            raise bad_request(f"`best` must be below {len(order)}.", "best")
        wanted = None if self.study.is_pair else len(order)
        if (None if sent.grades is None else len(sent.grades)) != wanted:
            raise bad_request(f"`grades` must be {'left out' if wanted is None else f'a list of {wanted}'}.", "grades")
        grades = None
        if sent.grades is not None:
            grades = [sent.grades[order.index(model)].model_dump() for model in range(len(order))]
        self.answers.put(token, caption, Answer(order[sent.best], grades))
        return self._state(token, place + 1)

    def picture(self, token: str, place: int, position: int) -> bytes:
        """A picture as a PNG file that says nothing of its origin."""
        caption = self._caption(token, place)
        order = self.study.order_of_models(token, caption)
        if not 0 <= position < len(order):
            raise ApiError(404, "There is no such picture.", "not_found")
        try:
            return encode_png(self.study.picture(caption, order[position]), None)
        except ValueError:
            raise ApiError(404, "The picture cannot be read any more.", "not_found") from None

    def _caption(self, token: str, place: int) -> int:
        order = self.check(token)
        if not 0 <= place < len(order):
            raise ApiError(404, "There is no such task.", "not_found")
        return order[place]

    def _state(self, token: str, after: int) -> dict:
        """How many are answered, and what comes next: the first from a place on that is not, or any before it."""
        order, done = self._orders[token], self.answers.of(token)
        open_places = [place for place, caption in enumerate(order) if caption not in done]
        later = [place for place in open_places if place >= after]
        return {"answered": len(done), "next": next(iter(later or open_places), None)}


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return bad_request(f"`{name}`: {first['msg']}.", name).response()
