"""Pictures to train the image tokenizer on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .prefetch import draw_indices


class PicturePool:
    """
    Pictures of one size in memory.

    Args:
        pictures (`torch.Tensor` of shape `(num, 3, height, width)`): RGB bytes.
    """

    def __init__(self, pictures: torch.Tensor):
        self.pictures = pictures

    @classmethod
    def from_images(cls, images: Sequence[Image.Image]) -> "PicturePool":
        """A pool of equally large PIL images."""
        return cls(torch.stack([to_bytes(image) for image in images]))

    def batch(self, count: int, crop_size: int | None, multiple: int, generator: torch.Generator) -> torch.Tensor:
        """
        Random windows of random pictures.

        Args:
            count (`int`): Number of windows.
            crop_size (`int`, *optional*): Side of the windows in pixels; by default whole pictures.
            multiple (`int`): Windows begin at multiples of this, to be cut into tokens like whole pictures.
            generator (`torch.Generator`): Draws pictures and places.

        Returns:
            `torch.Tensor` of shape `(count, 3, side, side)`: float32 in 0..1.
        """
        indices = draw_indices(len(self.pictures), count, generator)
        height, width = self.pictures.shape[2:]
        if crop_size is None or crop_size >= min(height, width):
            return self.pictures[indices].float() / 255
        rows, columns = (
            torch.randint((side - crop_size) // multiple + 1, (count,), generator=generator) * multiple
            for side in (height, width)
        )
        windows = [
            self.pictures[index, :, row : row + crop_size, column : column + crop_size]
            for index, row, column in zip(indices.tolist(), rows.tolist(), columns.tolist())
        ]
        return torch.stack(windows).float() / 255


class PictureFolder(PicturePool):
    """
    Picture files, read when they are drawn, scaled to `size` on the shorter side and cut to the square in the middle.

    Args:
        paths (`Sequence[Path]`): The files.
        size (`int`): Side of the squares in pixels.
    """

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = list(paths), size

    def batch(self, count: int, crop_size: int | None, multiple: int, generator: torch.Generator) -> torch.Tensor:
        """As [`PicturePool.batch`]."""
        indices = draw_indices(len(self.paths), count, generator).tolist()
        squares = []
        for index in indices:
            image = read_picture(self.paths[index])
            squares.append(to_bytes(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)))
        pool = PicturePool(torch.stack(squares))
        windows = [
            PicturePool(pool.pictures[i : i + 1]).batch(1, crop_size, multiple, generator) for i in range(count)
        ]
        return torch.cat(windows)


def read_picture(path: str | Path) -> Image.Image:
    """
    A picture file as people see it: turned as its EXIF data says, transparent parts on white, RGB.

    Raises:
        ValueError: If the file is missing, damaged, or no picture.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow reports damage
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error


def to_bytes(image: Image.Image) -> torch.Tensor:
    """RGB bytes of a PIL image: `(3, height, width)` uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)
