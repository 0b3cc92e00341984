"""From a scene to a picture: the shipped sprites, the geometry, and the composition."""

from functools import lru_cache
from pathlib import Path

from PIL import Image

from .scenes import BACKGROUNDS, DATA_FOLDER, STYLES, Scene, load_concepts

NATIVE_SIZE = 240  # pixels; the shipped sprites fill the largest slot of such a picture one to one
FULL_SIZE = 480  # pixels; pictures beyond the native size need full-size sprites
FULL_SPRITE_SIZE = 288  # pixels; fills the largest slot of a full-size picture one to one
SHEET_COLUMNS = 12
# Left, top and side of each slot, in twentieths of the picture: every corner is on the grid of the 20x20 tokens of a
# 160 px picture at 8 px a token, so that tokens cut an object in the same way in every scene.
SLOTS = {"centre": (4, 4, 12), "left": (1, 6, 8), "right": (11, 6, 8), "top": (6, 1, 8), "bottom": (6, 11, 8)}
GRID = 20
_PREPARE = "Write full-size drawings with `training_scripts/emoji/prepare_data.py --full_size_folder FOLDER`"


def slot_boxes(scene: Scene, size: int) -> list[tuple[float, float, float]]:
    """
    Left, top and side, in pixels, of the square that each object of the scene fills in a picture of `size` pixels.
    """
    boxes = (SLOTS[slot] for slot in scene.slots)
    return [(left * size / GRID, top * size / GRID, side * size / GRID) for left, top, side in boxes]


def resize_rgba(image: Image.Image, size: int) -> Image.Image:
    """Resize to a square with premultiplied alpha, which leaves no dark fringe."""
    if image.size == (size, size):
        return image
    return image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


class SpriteSet:
    """
    The drawings, one square RGBA picture for a concept in a style, cropped to what is painted and centred.

    Args:
        folder (`str` or `Path`, *optional*):
            Folder of drawings of 288 px, `<style>/<hexcode>.webp`, as `training_scripts/emoji/prepare_data.py
            --full_size_folder` writes it. By default the drawings of 144 px that come with the package.

    Raises:
        ValueError: If the folder does not hold a drawing of each style and concept.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._sheets: dict[str, Image.Image] = {}
        self._positions = {hexcode: divmod(index, SHEET_COLUMNS) for index, hexcode in enumerate(load_concepts())}
        self._resized: dict[tuple[str, str, int], Image.Image] = {}
        if self.folder is not None:
            names = [f"{style}/{hexcode}.webp" for style in STYLES for hexcode in self._positions]
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"`folder` must hold full-size drawings, but {self.folder} lacks {len(missing)} of {len(names)},"
                    f" the first being {missing[0]}. {_PREPARE}."
                )

    @property
    def picture_size(self) -> int:
        """Side in pixels of the largest picture that can be composed without enlarging a drawing."""
        return NATIVE_SIZE if self.folder is None else FULL_SIZE

    def get(self, hexcode: str, style: str, size: int | None = None) -> Image.Image:
        """The drawing at `size` pixels (by default as stored); do not change the returned picture."""
        if size is None:
            return self._stored(hexcode, style)
        key = (hexcode, style, size)
        if key not in self._resized:
            self._resized[key] = resize_rgba(self._stored(hexcode, style), size)
        return self._resized[key]

    def _stored(self, hexcode: str, style: str) -> Image.Image:
        if self.folder is not None:
            with Image.open(self.folder / style / f"{hexcode}.webp") as image:
                return image.convert("RGBA")
        if style not in self._sheets:
            with Image.open(DATA_FOLDER / f"sprites_{style}.webp") as image:
                self._sheets[style] = image.convert("RGBA")
        sheet = self._sheets[style]
        side = sheet.width // SHEET_COLUMNS
        row, column = self._positions[hexcode]
        return sheet.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


@lru_cache(maxsize=1)
def shipped_sprites() -> SpriteSet:
    """The drawings that come with the package, loaded once."""
    return SpriteSet()


def render(
    scene: Scene,
    size: int = NATIVE_SIZE,
    sprites: SpriteSet | None = None,
    colour: tuple[int, int, int] | None = None,
) -> Image.Image:
    """
    Draw a scene.

    The picture is composed at the size of the sprites (240 px with those of the package, 480 px with full-size ones)
    and reduced by the exact mean of pixels where `size` divides that: 120, 80, 60, ... from 240, and 160 too from 480.
    Multiples of 20 are composed directly, and other sizes reduced by a filter.

    Args:
        scene (`Scene`): What to show.
        size (`int`, defaults to 240):
            Side of the square picture in pixels. Where it neither divides the composed size nor is a multiple of 20,
            objects do not fall on whole pixels, and edges are soft.
        sprites (`SpriteSet`, *optional*):
            By default the drawings that come with the package, which are enough for 240 px.
        colour (`tuple[int, int, int]`, *optional*): RGB in 0..255 of the background, in place of the scene's.

    Returns:
        `PIL.Image.Image`: An RGB picture.

    Raises:
        ValueError: If the drawings are too small for `size`, or it is no size.
    """
    sprites = shipped_sprites() if sprites is None else sprites
    composed = sprites.picture_size
    if size > composed:
        advice = f" {_PREPARE} and pass `sprites=SpriteSet(FOLDER)`."
        raise ValueError(
            f"`size` {size} is more than the {composed} px that these drawings are enough for."
            + advice * (composed < FULL_SIZE)
        )
    if size > 0 and composed % size == 0:
        return _compose(scene, composed, sprites, colour).resize((size, size), Image.Resampling.BOX)
    if size > 0 and size % GRID == 0:
        return _compose(scene, size, sprites, colour)
    if size < 1:
        raise ValueError(f"`size` must be from 1 to {composed} pixels, but is {size}.")
    return _compose(scene, composed, sprites, colour).resize((size, size), Image.Resampling.LANCZOS)


def _compose(scene: Scene, size: int, sprites: SpriteSet, colour: tuple[int, int, int] | None) -> Image.Image:
    picture = Image.new("RGBA", (size, size), (*(colour or BACKGROUNDS[scene.background].rgb), 255))
    for hexcode, box in zip(scene.objects, slot_boxes(scene, size), strict=True):
        left, top, side = map(int, box)
        picture.alpha_composite(sprites.get(hexcode, scene.style, side), (left, top))
    return picture.convert("RGB")
