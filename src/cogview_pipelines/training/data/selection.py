"""Which of many pictures are taken, and how they become squares; what is left out is counted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ...pictures.colours import on_white
from ...pictures.files import FORMATS, open_picture, read_bytes
from .captions import LANGUAGES
from .draws import derived_seed
from .inputs import PictureRow

FITS = ("crop", "pad", "random")
FIT_OF_FILES = {  # what an option of a script says, where pictures are known by their names
    "help": "How pictures become squares: crop takes the middle, pad adds white, random takes a section that follows "
    "from the name of the file.",
    "choices": list(FITS),
}
# What is counted, and how it is told.
REASONS = {
    "unusable": "rows whose picture or captions cannot be read",
    "too_small": "pictures with a side below `min_side`",
    "too_narrow": "pictures above `max_aspect`",
    "caption_length": "pictures without a caption of a length from `min_caption_length` to `max_caption_length`",
    "duplicates": "pictures that are there already",
}


@dataclass(frozen=True)
class Filters:
    """
    What pictures and captions must be like.

    Args:
        min_side (`int`): Pixels of the shorter side, at least.
        max_aspect (`float`, *optional*): The longer side over the shorter one, at most.
        min_caption_length (`int`): Characters of a caption, at least.
        max_caption_length (`int`, *optional*): Likewise, at most.
    """

    min_side: int = 1
    max_aspect: float | None = None
    min_caption_length: int = 1
    max_caption_length: int | None = None

    def reason(self, image: Image.Image) -> str | None:
        """Why a picture is left out, a key of `REASONS`; `None` if it is taken."""
        short, long = sorted(image.size)
        if short < self.min_side:
            return "too_small"
        return "too_narrow" if self.max_aspect is not None and long > self.max_aspect * short else None

    def captions(self, texts: dict) -> dict:
        """What is left of a picture's captions; without a language if nothing is."""
        longest = float("inf") if self.max_caption_length is None else self.max_caption_length
        kept = {
            language: [text for text in texts[language] if self.min_caption_length <= len(text) <= longest]
            for language in LANGUAGES
            if language in texts
        }
        others = {name: value for name, value in texts.items() if name not in LANGUAGES}
        return {language: captions for language, captions in kept.items() if captions} | others


@dataclass
class Selected:
    """
    A picture that is taken, or why it is not.

    Args:
        texts (`dict`): Its captions.
        squares (`list[PIL.Image.Image]`): The picture in each size.
        digest (`int`): 64 bits of a hash of its file.
        reason (`str`, *optional*): Why it is left out, a key of `REASONS`.
        problem (`str`, *optional*): A sentence of that, if it is unusable.
        num_blank (`int`): Blank captions that were left out of those.
    """

    texts: dict
    squares: list[Image.Image]
    digest: int = 0
    reason: str | None = None
    problem: str | None = None
    num_blank: int = 0


def select(row: PictureRow, filters: Filters, sizes: Sequence[int], fit: str, seed: int) -> Selected:
    """
    Read a picture, and make squares of it if it is taken.

    Args:
        row ([`PictureRow`]): Where it is.
        filters ([`Filters`]): What it must be like.
        sizes (sequence of `int`): Sides of the squares in pixels.
        fit, seed: As for [`to_square`]; where a random square lies follows from the seed and from the file.
    """
    if row.problem is not None:
        return Selected({}, [], reason="unusable", problem=f"{row.place} {row.problem}")
    texts = filters.captions(row.texts)
    if not any(language in texts for language in LANGUAGES):
        return Selected({}, [], reason="caption_length")
    assert row.content is not None  # or there would be a problem
    try:
        content = read_bytes(row.content) if isinstance(row.content, Path) else row.content
        image = open_picture(content, formats=FORMATS)
    except ValueError as error:
        return Selected({}, [], reason="unusable", problem=f"{row.place}: {error}")
    reason = filters.reason(image)
    if reason is not None:
        return Selected({}, [], reason=reason)
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    image = on_white(image)
    squares = [to_square(image, size, fit, (seed, digest)) for size in sizes]
    return Selected(texts, squares, digest, num_blank=row.num_blank)


def to_square(image: Image.Image, size: int, fit: str, key: tuple[int, ...] = (0,)) -> Image.Image:
    """
    A picture as a square.

    Args:
        image (`PIL.Image.Image`): The picture.
        size (`int`): Side of the square in pixels.
        fit (`str`): `"crop"` takes the middle, `"pad"` adds white at two sides, `"random"` takes a square at a place
            that the key draws: the same in each size.
        key (`tuple[int, ...]`): Of the random place.
    """
    if fit == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
    place = 0.5 if fit == "crop" else derived_seed(*key, "crop") / 2**56
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, centering=(place, place))
