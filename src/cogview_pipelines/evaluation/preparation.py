"""What is done to pictures of both sides before they are compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageFilter

from ..pictures.colours import on_white

RADII = (0, 1, 2, 4, 8)  # of the blur, as in DALL-E's and CogView's tables


@dataclass(frozen=True)
class Preparation:
    """
    What is done to pictures before they are compared.

    Args:
        size (`int`, defaults to 256): Pictures of both sides are resized to so many pixels in height and width.
        radii (tuple of `float`): A comparison for each: both sides are blurred by a Gaussian filter of this radius.
        contrast (`float`, defaults to 1): Factor of the contrast of the pictures that were made; CogView's has 1.5.
    """

    size: int = 256
    radii: tuple[float, ...] = RADII
    contrast: float = 1.0

    def __call__(self, image: Image.Image, is_true: bool) -> Iterator[torch.Tensor]:
        """`uint8` pixels of shape `(3, size, size)` for each radius."""
        image = on_white(image).convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        if not is_true and self.contrast != 1:
            image = ImageEnhance.Contrast(image).enhance(self.contrast)
        for radius in self.radii:
            blurred = image.filter(ImageFilter.GaussianBlur(radius)) if radius else image
            pixels = torch.frombuffer(bytearray(blurred.tobytes()), dtype=torch.uint8)
            yield pixels.view(self.size, self.size, 3).permute(2, 0, 1)
