"""Bodies of requests, read within bounds and checked: JSON objects and forms with picture files."""

import json
import re
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
from fastapi import Request
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from ..pictures.files import open_picture
from ..pipelines.common.picture_metadata import of_input
from .errors import ApiError, bad_request
from .settings import ServerSettings

MOST_FIELDS = 64
# `image[]` and `image[0]` are how common clients send a list, even of one
_LIST_NAME = re.compile(r"(\w+)\[\d{0,3}\]")


async def read_json(request: Request) -> dict[str, Any]:
    """
    The JSON object in a body.

    Raises:
        ApiError: If it is none, or holds a name twice.
    """
    _check_type(request, "application/json")
    body = await request.body()
    try:
        values = json.loads(body, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise bad_request("The body is nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError:
        raise bad_request("The body must be JSON in UTF-8.", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise bad_request(
            f"The body is not JSON: {error.msg}, line {error.lineno}, column {error.colno}.", code="invalid_json"
        ) from None
    except ValueError as error:
        raise bad_request(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise bad_request('The body must be a JSON object such as {"prompt": "a tiger"}.', code="invalid_json")
    return values


async def read_form(
    request: Request, files: Sequence[str], lists: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """
    The fields and the files of a form.

    Args:
        request: The request.
        files (sequence of `str`): Names under which files may come, any number of each.
        lists (sequence of `str`): Fields that may come several times; they become lists.

    Raises:
        ApiError: If it is no form, has a field twice, or a file where a text belongs or the other way round.
    """
    _check_type(request, "multipart/form-data")
    values: dict[str, Any] = {}
    contents: dict[str, list[bytes]] = {}
    try:
        form = await request.form(max_files=MOST_FIELDS, max_fields=MOST_FIELDS)
    except (MultiPartException, HTTPException) as error:
        message = error.message if isinstance(error, MultiPartException) else error.detail
        raise bad_request(f"The form cannot be read: {message}", code="invalid_form") from None
    try:
        for name, value in form.multi_items():
            if (listed := _LIST_NAME.fullmatch(name)) and listed[1] in (*files, *lists):
                name = listed[1]
            if name in files and _is_nothing(value):
                continue
            if isinstance(value, UploadFile) != (name in files):
                kind = "a file" if name in files else "a text"
                if isinstance(value, UploadFile) and name not in lists:
                    raise bad_request(
                        f"There is no file `{name[:60]}`. Known: {', '.join(files)}.", name[:60], "unknown_parameter"
                    )
                raise bad_request(f"`{name[:60]}` must be {kind}.", name[:60])
            if isinstance(value, UploadFile):
                contents.setdefault(name, []).append(await value.read())
            elif name in lists:
                values.setdefault(name, []).append(value)
            elif name in values:
                raise bad_request(f"`{name[:60]}` must come once.", name[:60])
            else:
                values[name] = value
    finally:
        await form.close()
    return values, contents


async def describe_files(files: dict[str, list[bytes]]) -> dict[str, dict[str, str]]:
    """What picture files say of the first that came under each name; hashed beside the event loop."""
    return await anyio.to_thread.run_sync(
        lambda: {name: of_input(contents[0]) for name, contents in files.items() if contents}
    )


async def read_pictures(
    files: dict[str, list[bytes]], name: str, settings: ServerSettings, most: int = 1
) -> list[Image.Image]:
    """
    The pictures that came under a name, decoded beside the event loop.

    Raises:
        ApiError: If there are none or too many, one is no picture, or they are too large together.
    """
    contents = files.pop(name, [])
    if not contents:
        raise bad_request(f"`{name}` must be given, as a file.", name, "missing_parameter")
    if len(contents) > most:
        raise bad_request(f"`{name}` may be {most} on this server, but is {len(contents)}.", name)
    pictures, pixels = [], settings.max_pixels
    for content in contents:
        picture = await decode_picture(content, name, pixels)
        pixels -= picture.width * picture.height
        pictures.append(picture)
    return pictures


async def decode_picture(content: bytes, name: str, most_pixels: int) -> Image.Image:
    """
    One picture, decoded beside the event loop.

    Raises:
        ApiError: If it is none that can be taken.
    """
    try:
        return await anyio.to_thread.run_sync(open_picture, content, most_pixels)
    except ValueError as error:
        raise bad_request(f"`{name}` {error}", name, "invalid_image") from None


def _is_nothing(value: UploadFile | str) -> bool:
    """What a form sends for a file that nobody chose."""
    return value == "" if isinstance(value, str) else not value.filename and not value.size


def _check_type(request: Request, wanted: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise ApiError(415, f"The body must be {wanted}.", "unsupported_media_type")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it names a field twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
