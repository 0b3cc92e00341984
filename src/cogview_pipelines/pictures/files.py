"""
Picture files that people hand in: checked before they are decoded, and turned into what everything here takes.

Command line, server, training and examples all read pictures here.
"""

import io
import os
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .colours import as_srgb
from .containers import take_apart

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what strangers may send
FORMATS = (*UPLOAD_FORMATS, "TIFF")
MOST_PIXELS = 2 * 89_478_485  # where PIL itself refuses a file

_TRANSPOSED = {  # how to turn a picture upright, by its orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(
    content: bytes, most_pixels: int = MOST_PIXELS, formats: Sequence[str] = UPLOAD_FORMATS
) -> Image.Image:
    """
    Decode a file: upright as its camera says, in sRGB, with 8 bits a channel.

    Anything else in the file (EXIF data, texts, resolutions) is ignored, whether valid or not.

    Args:
        content (`bytes`): The file.
        most_pixels (`int`): A picture with more is refused before any of its pixels are decoded.
        formats (sequence of `str`): Kinds of files that are known, as PIL calls them.

    Returns:
        `PIL.Image.Image`: Of mode `"L"`, `"LA"`, `"RGB"` or `"RGBA"`; with transparency, if the file has any.

    Raises:
        ValueError: If it is no picture of a known kind, too large, an animation, or damaged. The message goes on from
            a name, as in "`image` is an animation of 3 frames".
    """
    file = take_apart(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below decides about size; the rest is damage
            image = Image.open(io.BytesIO(file.content), formats=formats)
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {most_pixels:,} pixels. Reduce it.") from None
    except Exception:
        kinds = ", ".join(formats[:-1])
        raise ValueError(f"is no picture that can be read: it must be a {kinds} or {formats[-1]} file.") from None
    width, height = image.size
    if width * height > most_pixels:
        raise ValueError(f"may have {most_pixels:,} pixels, but has {width} x {height}. Reduce it.")
    frames = file.num_frames
    try:
        if image.format != "PNG":
            frames = getattr(image, "n_frames", 1)
        if frames <= 1:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes the decoders raise
        raise ValueError(f"is damaged: its {image.format} data cannot be decoded.") from error
    if frames > 1:
        raise ValueError(f"is an animation of {frames} frames. Send one of them as a picture.")
    image = as_srgb(image, file.profile)
    return image if file.orientation == 1 else image.transpose(_TRANSPOSED[file.orientation])


def read_picture(path: str | Path, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """
    The picture in a file of yours, as [`open_picture`] decodes it; TIFF files, too.

    The name is found whether its accents are letters of their own or not, as archives from macOS have them.

    Raises:
        ValueError: If the file cannot be read, or as [`open_picture`]; the message begins with the name.
    """
    content = read_bytes(path)
    try:
        return open_picture(content, most_pixels, FORMATS)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_bytes(path: str | Path) -> bytes:
    """
    The content of a file, whose name is found as [`find_file`] does.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    try:
        return find_file(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


def find_file(path: str | Path) -> Path:
    """
    The file of this name, or of the same name with its accents composed (NFC) or apart (NFD); `path` if there is none.
    """
    path = Path(path)
    for form in ("NFC", "NFD"):
        if os.path.lexists(path):
            break
        other = Path(unicodedata.normalize(form, os.fspath(path)))
        if os.path.lexists(other):
            return other
    return path


def as_mask(image: Image.Image) -> Image.Image:
    """
    A mask of mode `"L"`, white where to paint: of a picture with transparent parts these, else what is bright.
    """
    image = as_srgb(image)
    opacity = opacity_of(image)
    return image.convert("L") if opacity is None else opacity.point(lambda value: 255 - value)


def opacity_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel, if the picture has one that is not opaque throughout."""
    if not image.has_transparency_data:
        return None
    opacity = image.convert("RGBA").getchannel("A")
    return opacity if opacity.getextrema()[0] < 255 else None
