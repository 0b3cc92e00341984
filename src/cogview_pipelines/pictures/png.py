"""PNG files that say how their picture was made, written whole or not at all."""

import io
import json
import os
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from .._version import __version__

_LAST_CHUNK = b"IEND\xaeB`\x82"
SOFTWARE = f"cogview_pipelines {__version__}"


def encode_png(image: Image.Image, metadata: dict) -> bytes:
    """The content of a PNG file with metadata as text chunks, as [`save_png`] writes it."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in {"Software": SOFTWARE, **metadata}.items():
        chunks.add_text(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks)
    return content.getvalue()


def save_png(image: Image.Image, path: str | Path, metadata: dict) -> None:
    """
    Write a picture with its metadata as text chunks; the file appears complete, or what was there stays.

    Args:
        image (`PIL.Image.Image`): The picture.
        path (`str` or `Path`): The file; its folder exists.
        metadata (`dict`): By name, a text (kept as it is) or any value for JSON.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(encode_png(image, metadata))
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def read_metadata(path: str | Path) -> dict:
    """
    The metadata that [`save_png`] wrote: values that are JSON are decoded, except for the prompt.

    Raises:
        ValueError: If the file is missing, damaged, or not a PNG file.
    """
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()  # all of it, so that a file that was cut off is noticed
            chunks = dict(image.text)
        if not content.endswith(_LAST_CHUNK):
            raise ValueError("its end is missing")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a complete PNG file: {error}") from error
    return {
        name: value if name in ("Software", "prompt", "model") else _decode(value) for name, value in chunks.items()
    }


def _decode(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
