"""Picture files that people hand in: checked before they are decoded, and turned into what the pipelines take."""

import io
import warnings

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def open_picture(content: bytes, most_pixels: int) -> Image.Image:
    """
    Decode a file, upright as its camera says.

    Args:
        content (`bytes`): The file.
        most_pixels (`int`): A picture with more is refused before any of its pixels are decoded.

    Returns:
        `PIL.Image.Image`: In the mode of the file.

    Raises:
        ValueError: If it is no picture of a known kind, too large, an animation, or damaged. The message goes on from
            a name, as in "`image` is an animation of 3 frames".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below decides
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {most_pixels:,} pixels. Reduce it.") from None
    except Exception:
        kinds = ", ".join(FORMATS[:-1])
        raise ValueError(f"is no picture that can be read: it must be a {kinds} or {FORMATS[-1]} file.") from None
    width, height = image.size
    if width * height > most_pixels:
        raise ValueError(f"may have {most_pixels:,} pixels, but has {width} x {height}. Reduce it.")
    frames = 1
    try:
        # a JPEG file of some cameras holds further versions of the same picture
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a damaged file makes the decoders raise
        raise ValueError(f"is damaged: its {image.format} data cannot be decoded.") from error
    if frames > 1:
        raise ValueError(f"is an animation of {frames} frames. Send one of them as a picture.")
    return image


def as_mask(image: Image.Image) -> Image.Image:
    """
    A mask of mode `"L"`, white where to paint: of a picture with transparent parts these, else what is bright.
    """
    opacity = opacity_of(image)
    if opacity is not None:
        return opacity.point(lambda value: 255 - value)
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255 instead of scaling them
        image = image.point(lambda value: value * (1 / 256))
    return image.convert("L")


def opacity_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel, if the picture has one that is not opaque throughout."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    opacity = image.convert("RGBA").getchannel("A")
    return opacity if opacity.getextrema()[0] < 255 else None
