"""Pictures of every mode, depth and colour profile as 8-bit sRGB, in which all of this package works."""

import functools
import io
import itertools
import math

from PIL import Image

from .containers import LARGEST_PROFILE


def as_srgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """
    A picture in the colours that people see, with 8 bits a channel.

    Whole numbers of 16 bits are divided by 256, floats from 0 to 1 are multiplied by 255; palettes are looked up.
    Bytes of a picture that is sRGB already, or has no profile, stay what they are. A profile that cannot be used is
    passed over.

    Args:
        image (`PIL.Image.Image`): Of any mode.
        profile (`bytes`, *optional*): Its ICC profile; by default the one that PIL found in the file.

    Returns:
        `PIL.Image.Image`: Of mode `"L"`, `"LA"`, `"RGB"` or `"RGBA"`, without a profile.

    Raises:
        ValueError: If its numbers are outside of these ranges. The message goes on from a name, as in "`image` holds
            numbers from -3 to 5".
    """
    profile = image.info.get("icc_profile") if profile is None else profile
    if image.mode.startswith(("I", "F")):
        image = _scaled(image)
    opacity = None
    if image.has_transparency_data:
        opacity = image.convert("RGBA").getchannel("A")
        image = image.convert("L" if image.mode in ("L", "LA", "La") else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    usable = isinstance(profile, bytes) and 0 < len(profile) <= LARGEST_PROFILE
    transform = _transform(profile, image.mode) if usable else None
    if transform is not None:
        image = transform.apply(image)
    elif image.mode == "CMYK":
        image = image.convert("RGB")
    else:
        image = image.copy()
    image.info = {}
    if opacity is not None:
        image.putalpha(opacity)
    return image


def on_white(image: Image.Image) -> Image.Image:
    """What is seen on a white page, of mode `"RGB"`."""
    if image.mode not in ("LA", "RGBA"):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits as one of 8."""
    if image.mode == "F":
        least, most = image.getextrema()
        # the mean is no number if any pixel is none, which extrema do not tell
        mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        if not (least >= 0 and most <= 1) or math.isnan(mean):
            raise ValueError(
                f"holds floating point numbers from {least:g} to {most:g}. Scale them to 0 to 1, or save bytes."
            )
        return image.point(lambda value: value * 255 + 0.5).convert("L")
    image = image.convert("I")  # 16 bits in either order of bytes
    least, most = image.getextrema()
    if least < 0 or most > 65535:
        raise ValueError(f"holds numbers from {least} to {most}. Scale them to 0 to 65535 (16 bits), or save bytes.")
    return image.point(lambda value: value * (1 / 256)).convert("L")


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str):
    """From a profile to sRGB; `None` if the profile is sRGB itself, or cannot be used for pictures of this mode."""
    try:
        from PIL import ImageCms

        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except Exception:  # whatever a damaged or unknown profile, or PIL without LittleCMS, gives rise to
        return None


def _changes_nothing(transform, mode: str) -> bool:
    """Whether colours stay what they are, but for rounding."""
    levels = range(0, 256, 15)
    colours = list(itertools.product(levels, repeat=3)) if mode == "RGB" else [(level,) for level in range(256)]
    probe = Image.frombytes(mode, (len(colours), 1), bytes(itertools.chain(*colours)))
    before, after = probe.convert("RGB").tobytes(), transform.apply(probe).tobytes()
    return all(abs(old - new) <= 1 for old, new in zip(before, after))
