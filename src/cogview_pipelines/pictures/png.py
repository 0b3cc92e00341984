"""PNG files that say how their picture was made, written whole or not at all."""

import io
import json
import os
import re
import secrets
import time
import zlib
from collections.abc import Collection
from pathlib import Path

from PIL import Image, PngImagePlugin

from .._version import __version__
from .containers import PNG_SIGNATURE, png_chunks, png_texts
from .files import open_picture

SOFTWARE = f"cogview_pipelines {__version__}"
_LAST_CHUNK = b"IEND\xaeB`\x82"
_PERCEPTUAL = b"\0"  # the rendering intent that an sRGB chunk names
_UNFINISHED = re.compile(r"\.(.{1,40})\.[0-9a-f]{8}\.part", re.DOTALL)
_ABANDONED = 24 * 3600  # seconds after which nobody is writing a file any more


def encode_png(image: Image.Image, metadata: dict | None) -> bytes:
    """The content of a PNG file in sRGB with metadata as text chunks, as [`save_png`] writes it."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"sRGB", _PERCEPTUAL)
    for name, value in ({} if metadata is None else {"Software": SOFTWARE, **metadata}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # names of files may hold halves of letters; as an escape, these are JSON
        chunks.add_text(name, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks, icc_profile=None)
    return content.getvalue()


def save_png(image: Image.Image, path: str | Path, metadata: dict | None) -> None:
    """
    Write a picture with its metadata as text chunks. The file is replaced as a whole, or not at all.

    Args:
        image (`PIL.Image.Image`): The picture, in sRGB.
        path (`str` or `Path`): The file; its folder exists.
        metadata (`dict`, *optional*): By name, a text (kept as it is) or any value for JSON; `None` writes the pixels
            alone.

    Raises:
        OSError: If it cannot be written.
    """
    write_whole(Path(path), encode_png(image, metadata))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is replaced as a whole, or not at all."""
    unfinished = path.with_name(f".{_beginning(path.name)}.{secrets.token_hex(4)}.part")
    try:
        with open(unfinished, "xb") as file:  # with the mode of any new file
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, names: Collection[str] = ()) -> None:
    """
    Remove what writers that were killed have left in a folder.

    Args:
        folder (`Path`): The folder.
        names (collection of `str`): Files that nobody else is writing now: theirs go at once, others after a day.
    """
    own = {_beginning(name) for name in names}
    for path in folder.glob(".*.part"):
        match = _UNFINISHED.fullmatch(path.name)
        try:
            if match and (match[1] in own or path.stat().st_mtime < time.time() - _ABANDONED):
                path.unlink()
        except OSError:  # somebody else was faster
            continue


def read_metadata(path: str | Path) -> dict:
    """
    The metadata that [`save_png`] wrote: values that are JSON are decoded, except for the prompt.

    Raises:
        ValueError: If the file is missing, damaged, or not a PNG file.
    """
    try:
        content = Path(path).read_bytes()
        if not content.startswith(PNG_SIGNATURE):
            raise ValueError("it is of another kind")
        if not content.endswith(_LAST_CHUNK):
            raise ValueError("its end is missing")
        for kind, data, whole in png_chunks(content):
            if zlib.crc32(kind + data) != int.from_bytes(whole[-4:], "big"):
                raise ValueError("it is damaged")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} is not a complete PNG file: {reason}.") from error
    try:
        open_picture(content, formats=("PNG",))  # all of it, so that no part is missing
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    texts = png_texts(content)
    return {name: text if name in ("Software", "prompt", "model") else _decode(text) for name, text in texts.items()}


def _decode(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _beginning(name: str) -> str:
    """So much of a name that there is room for more, however many bytes its letters take."""
    return name[:40]
