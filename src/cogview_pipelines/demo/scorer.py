"""
Reads a scene back from a picture, without a neural network: the palette by the border, the objects by the nearest
drawing.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .captions import Request
from .rendering import SpriteSet, resize_rgba, shipped_sprites, slot_boxes
from .scenes import BACKGROUNDS, Scene, Scope

_REFERENCE_SIZE = 64  # pixels of a reference drawing, without its margin
_REFERENCE_MARGIN = 5
_VECTOR_SIZE = 24
_SLOT_MARGIN = 0.08  # how far around its slot an object is looked for, in sides of the slot
_PAINTED_DISTANCE = 15.0  # Lab distance from the background beyond which a pixel counts as painted
_MAX_STRAY_SHARE = 0.005

_RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE_POINT = np.array([0.9505, 1.0, 1.089])


def _linear_light(values: np.ndarray) -> np.ndarray:
    """sRGB values in 0..255 to linear light in 0..1."""
    values = values / 255
    return np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


_LINEAR_LIGHT_OF_BYTE = _linear_light(np.arange(256.0))


def rgb_to_lab(rgb) -> np.ndarray:
    """
    sRGB colours to CIE L*a*b* under D65.

    Args:
        rgb (array of shape `(..., 3)`): Values in 0..255; bytes are looked up, which is faster.

    Returns:
        `np.ndarray`: Of the same shape, in float64.
    """
    rgb = np.asarray(rgb)
    linear = _LINEAR_LIGHT_OF_BYTE[rgb] if rgb.dtype == np.uint8 else _linear_light(rgb.astype(np.float64))
    xyz = linear @ (_RGB_TO_XYZ.T / _WHITE_POINT)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _differs(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rgb_to_lab(pixels) - rgb_to_lab(colour), axis=-1) > _PAINTED_DISTANCE


def _describe(pixels: np.ndarray, painted: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """
    What is painted, made square and small, as differences from the background: indifferent to small shifts and to
    scale.
    """
    rows, columns = np.flatnonzero(painted.sum(1) > 1), np.flatnonzero(painted.sum(0) > 1)
    if len(rows) < 4 or len(columns) < 4:
        return None
    object_pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = object_pixels.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), background, dtype=np.float64)
    square[top : top + height, left : left + width] = object_pixels
    image = Image.fromarray(square.round().clip(0, 255).astype(np.uint8))
    small = image.resize((_VECTOR_SIZE, _VECTOR_SIZE), Image.Resampling.LANCZOS)
    return (np.asarray(small, dtype=np.float64) - background).ravel()


@dataclass(frozen=True)
class Reading:
    """
    What the scorer sees in a picture.

    Args:
        background (`str`): The nearest palette colour.
        objects (`tuple[str | None, ...]`):
            Hexcode of the nearest drawing in each slot; `None` where nothing is painted.
        styles (`tuple[str | None, ...]`): Style of the same drawings.
        clean (`bool`): Whether the rest of the picture is plain background.
    """

    background: str
    objects: tuple[str | None, ...]
    styles: tuple[str | None, ...]
    clean: bool


def hidden_backgrounds(drawing: Image.Image) -> list[str]:
    """The backgrounds from which at most 60 % of the painted pixels stand out (Lab distance above 20)."""
    pixels = np.asarray(resize_rgba(drawing, 48))
    painted = rgb_to_lab(pixels[pixels[..., 3] > 128][:, :3])
    return [
        name
        for name, background in BACKGROUNDS.items()
        if (np.linalg.norm(painted - rgb_to_lab(background.rgb), axis=-1) > 20).mean() <= 0.6
    ]


class Scorer:
    """
    Judges a picture against a scene.

    The background is the median of the border, matched to the nearest palette colour. In each slot of the scene's
    layout, the painted box is compared with all reference drawings on that colour, looked at in the same way. No
    chance is involved.

    Args:
        scope (`Scope`, *optional*):
            Compare only with the concepts and styles of this scope, which is faster and more lenient. By default with
            all 696 drawings, as scores are to be reported.
        sprites (`SpriteSet`, *optional*): By default the drawings that come with the package.
        looks (mapping of `str` to `SpriteSet`, *optional*):
            Other looks of the drawings of the scope, by name, such as outlined ones: what is nearest to one of those
            is read as of that style.
    """

    def __init__(
        self,
        scope: Scope | None = None,
        sprites: SpriteSet | None = None,
        looks: Mapping[str, SpriteSet] | None = None,
    ):
        scope = Scope.full() if scope is None else scope
        sprites = shipped_sprites() if sprites is None else sprites
        drawings = sorted((hexcode, style) for hexcode in scope.concepts for style in scope.styles)
        self.keys, references = list(drawings), [sprites.get(*key, _REFERENCE_SIZE) for key in drawings]
        for name, drawn in (looks or {}).items():
            self.keys += [(hexcode, name) for hexcode, _ in drawings]
            references += [drawn.get(*key, _REFERENCE_SIZE) for key in drawings]
        self._references = np.stack([np.asarray(reference) for reference in references])
        self._banks: dict[str, np.ndarray] = {}
        self._palette = rgb_to_lab([background.rgb for background in BACKGROUNDS.values()])

    def _bank(self, background: str) -> np.ndarray:
        """`(num_references, 24 * 24 * 3)` descriptions of the drawings on a palette colour, made when first needed."""
        if background not in self._banks:
            colour = np.array(BACKGROUNDS[background].rgb, dtype=np.float64)
            inner = slice(_REFERENCE_MARGIN, _REFERENCE_MARGIN + _REFERENCE_SIZE)
            side = _REFERENCE_SIZE + 2 * _REFERENCE_MARGIN
            invisible = np.full(_VECTOR_SIZE * _VECTOR_SIZE * 3, 1e3)  # far from every picture
            bank = []
            for reference in self._references:
                alpha = reference[..., 3:] / 255
                picture = np.full((side, side, 3), colour)
                picture[inner, inner] = reference[..., :3] * alpha + colour * (1 - alpha)
                picture = picture.round().astype(np.uint8)
                description = _describe(picture, _differs(picture, colour), colour)
                bank.append(invisible if description is None else description)
            self._banks[background] = np.stack(bank).astype(np.float32)
        return self._banks[background]

    def read(self, image: Image.Image, scene: Scene) -> Reading:
        """
        What a picture shows in the slots of a scene's layout; nothing else is taken from the scene.

        Args:
            image (`PIL.Image.Image`): A square picture of any size from about 40 px.
            scene (`Scene`): Says where to look.

        Raises:
            ValueError: If the picture is not square.
        """
        image = image.convert("RGB")
        if image.width != image.height:
            raise ValueError(f"`image` must be square, got {image.width}x{image.height} pixels.")
        pixels = np.asarray(image)
        smooth = np.asarray(image.filter(ImageFilter.MedianFilter(3)))  # stray pixels must not move the painted box
        edge = max(2, image.width // 40)
        border = [pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]]
        colour = np.median(np.concatenate([strip.reshape(-1, 3) for strip in border]), axis=0)
        background = list(BACKGROUNDS)[int(np.linalg.norm(self._palette - rgb_to_lab(colour), axis=-1).argmin())]

        painted = _differs(smooth, colour)
        outside = np.ones_like(painted)
        found: list[tuple[str | None, str | None]] = []
        for left, top, side in slot_boxes(scene, image.width):
            margin = side * _SLOT_MARGIN
            rows = slice(max(0, round(top - margin)), round(top + side + margin))
            columns = slice(max(0, round(left - margin)), round(left + side + margin))
            outside[rows, columns] = False
            description = _describe(pixels[rows, columns], painted[rows, columns], colour)
            if description is None:
                found.append((None, None))
                continue
            difference = self._bank(background) - description.astype(np.float32)
            found.append(self.keys[int(np.einsum("nd,nd->n", difference, difference).argmin())])
        objects, styles = zip(*found, strict=True)
        return Reading(background, objects, styles, clean=bool(painted[outside].mean() <= _MAX_STRAY_SHARE))

    def __call__(self, image: Image.Image, scene: Scene) -> dict[str, bool]:
        """
        Compare a picture with the scene that it should show.

        Returns:
            `dict[str, bool]`: `background`; `style` (of every object); `objects` (these concepts, in any place and
            style); `position` (each in its own place); `all` of these four; and apart from them `clean`: there is
            nothing but background around the objects.
        """
        reading = self.read(image, scene)
        result = {
            "background": reading.background == scene.background,
            "style": all(style == scene.style for style in reading.styles),
            "objects": sorted(map(str, reading.objects)) == sorted(scene.objects),
            "position": reading.objects == scene.objects,
        }
        return {**result, "all": all(result.values()), "clean": reading.clean}

    def judge(self, image: Image.Image, request: Request, scene: Scene) -> dict[str, bool]:
        """
        Compare a picture with what a sentence asks for; what it leaves open may be as it likes.

        Args:
            image (`PIL.Image.Image`): A square picture.
            request ([`Request`]): What was asked for.
            scene (`Scene`): Any scene that would be right.

        Returns:
            `dict[str, bool]`: As for a call, `background`, `style` and `position` only if asked for, and `all` of
            those.
        """
        results = []
        for wanted in request.layouts(scene):
            result = self(image, wanted)
            asked = {
                "objects": True,
                "background": request.background is not None,
                "style": request.style is not None,
                "position": request.tells_place,
            }
            shown = {name: result[name] for name, is_asked in asked.items() if is_asked}
            results.append({**shown, "all": all(shown.values()), "clean": result["clean"]})
        return max(results, key=lambda result: (result["all"], sum(result.values())))

    def mean(self, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
        """
        The share of pictures for which each key of the comparison holds.

        Raises:
            ValueError: If there are no pictures, or not as many as scenes.
        """
        if not images or len(images) != len(scenes):
            raise ValueError(
                f"`images` and `scenes` must be equally many and at least one, got {len(images)} and {len(scenes)}."
            )
        results = [self(image, scene) for image, scene in zip(images, scenes, strict=True)]
        return {key: sum(result[key] for result in results) / len(results) for key in results[0]}


@functools.cache
def full_scorer() -> Scorer:
    """The scorer by all 696 drawings, one for all: it describes the drawings once on each background."""
    return Scorer()
