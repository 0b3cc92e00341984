"""The picture files that commands start from."""

from pathlib import Path
from typing import TYPE_CHECKING

from .console import bad_input

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 50_000_000


def read_file(path: Path, name: str) -> bytes:
    """
    The content of a file.

    Raises:
        ValueError: If it cannot be read.
    """
    from ..pictures.files import read_bytes

    try:
        return read_bytes(path.expanduser())
    except (ValueError, RuntimeError) as error:  # RuntimeError: a home that is not known
        raise ValueError(f"{name}: {error}") from error


def decode(content: bytes, path: Path, name: str) -> "Image.Image":
    """
    The picture in the content of a file, upright as its camera says.

    Raises:
        ValueError: If it is none, damaged, an animation or too large.
    """
    from ..pictures.files import FORMATS, open_picture

    try:
        return open_picture(content, MOST_PIXELS, FORMATS)
    except ValueError as error:
        raise ValueError(f"{name}: {path} {error}") from error


def read_image(path: Path, name: str) -> "Image.Image":
    """The picture in a file; what is wrong with the file is told in one line."""
    with bad_input():
        return decode(read_file(path, name), path, name)


def describe_inputs(files: dict[str, Path], contents: dict[str, bytes]) -> dict:
    """What results say of the files that they were made from, so that a change of one is noticed."""
    from ..pipelines.common.picture_metadata import of_input

    return {name: of_input(contents[name], path.name) for name, path in files.items()}


def same_inputs(files: dict[str, Path], described: object) -> bool:
    """Whether these are the files that [`describe_inputs`] described; `False` if one cannot be read."""
    try:
        contents = {name: read_file(path, name) for name, path in files.items()}
    except ValueError:
        return False
    return describe_inputs(files, contents) == described
