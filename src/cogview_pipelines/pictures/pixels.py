"""People's pictures and masks (PIL, numpy, torch; any size) to tensors, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch

from .colours import as_srgb

Images: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | Sequence
OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class Picture:
    """
    A picture as the pipelines work on it.

    Args:
        pixels (`torch.Tensor` of shape `(3, height, width)`): RGB, float32 in [0, 1], as they came.
        alpha (`torch.Tensor` of shape `(1, height, width)`, *optional*): Opacity in [0, 1], if the picture has any.
    """

    pixels: torch.Tensor
    alpha: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.pixels.shape[-2:])

    def on_white(self) -> torch.Tensor:
        """What is seen on a white page: `(3, height, width)`."""
        return self.pixels if self.alpha is None else self.pixels * self.alpha + (1 - self.alpha)


def read_pictures(images: Images, name: str = "image") -> list[Picture]:
    """
    One picture or many.

    Args:
        images: A PIL image of any mode, whose colour profile is heeded; a numpy array `(height, width, 3)` or
            `(num_images, height, width, 3)`; a torch tensor `(3, height, width)` or `(num_images, 3, height, width)`;
            or a list of single ones, of any sizes. Arrays and tensors hold bytes, or floating point numbers in [0, 1].
        name (`str`): What messages call the argument.

    Raises:
        TypeError: If something else came.
        ValueError: If a shape, a mode or the values are not as above.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"`{name}` must hold at least one picture, but is an empty list.")
        return [_read_one(image, f"{name}[{index}]") for index, image in enumerate(images)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return [_read_one(image, name) for image in images]
    return [_read_one(images, name)]


def read_masks(masks: Images, name: str = "mask_image") -> list[torch.Tensor]:
    """
    One mask or many as boolean tensors `(height, width)`; white (from half on) is True.

    Args:
        masks: A grey PIL image (`"1"`, `"L"`, or of 16 bits or floats); an array or tensor `(height, width)`,
            `(num_masks, height, width)` or with one channel (last in arrays, first in tensors), of booleans, bytes, or
            floats in [0, 1]; or a list of single ones.
        name (`str`): What messages call the argument.

    Raises:
        TypeError, ValueError: As [`read_pictures`].
    """
    if isinstance(masks, (list, tuple)):
        if not masks:
            raise ValueError(f"`{name}` must hold at least one mask, but is an empty list.")
        return [_read_mask(mask, f"{name}[{index}]") for index, mask in enumerate(masks)]
    if isinstance(masks, np.ndarray) and masks.ndim == 4 and masks.shape[-1] == 1:
        masks = masks[..., 0]
    if isinstance(masks, torch.Tensor) and masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if isinstance(masks, (np.ndarray, torch.Tensor)) and masks.ndim == 3 and 1 not in (masks.shape[0], masks.shape[2]):
        return [_read_mask(mask, name) for mask in masks]
    return [_read_mask(masks, name)]


def write_pictures(pictures: Sequence[Picture], output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    """
    The pictures as PIL images, or as float32 arrays or tensors: one batch, or a list where their sizes differ.

    A PIL image that came in with transparency goes out with it; bytes go out as they came in.
    """
    if output_type == "pil":
        return [_to_pil(picture) for picture in pictures]
    tensors = [picture.pixels.cpu() for picture in pictures]
    if output_type == "np":
        arrays = [tensor.permute(1, 2, 0).numpy() for tensor in tensors]
        return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def _to_pil(picture: Picture) -> PIL.Image.Image:
    channels = picture.pixels if picture.alpha is None else torch.cat([picture.pixels, picture.alpha])
    bytes_ = (channels.cpu() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(np.ascontiguousarray(bytes_))


def _read_one(image, name: str) -> Picture:
    if isinstance(image, Picture):
        return image
    if isinstance(image, PIL.Image.Image):
        _check_frames(image, name)
        if not image.width or not image.height:
            raise ValueError(f"`{name}` must have at least one pixel, but is {image.height} x {image.width}.")
        image = _in_srgb(image, name)
        transparent = image.mode in ("LA", "RGBA")
        image = image.convert("RGBA" if transparent else "RGB")
        channels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        _check_size(channels, name)
        return Picture(channels[:3], channels[3:] if transparent else None)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"`{name}` must have the shape (height, width, 3), but has {image.shape}.")
        pixels = _unit_values(_to_tensor(image, name), name).permute(2, 0, 1)
    elif isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"`{name}` must have the shape (3, height, width), but has {tuple(image.shape)}.")
        pixels = _unit_values(image.detach().cpu(), name)
    else:
        raise TypeError(
            f"`{name}` must be a PIL image, a numpy array or a torch tensor, but is of type `{type(image).__name__}`."
        )
    _check_size(pixels, name)
    return Picture(pixels)


def _read_mask(mask, name: str) -> torch.Tensor:
    if isinstance(mask, PIL.Image.Image):
        _check_frames(mask, name)
        if mask.mode not in ("1", "L", "F") and not mask.mode.startswith("I"):
            raise ValueError(
                f'`{name}` must have the mode "1" or "L" (white is painted anew), but has "{mask.mode}". Call '
                '`.convert("L")`, or `.getchannel("A")` if its transparency is the mask.'
            )
        values = torch.from_numpy(np.array(_in_srgb(mask, name).convert("L")))
    elif isinstance(mask, (np.ndarray, torch.Tensor)):
        values = _to_tensor(mask, name) if isinstance(mask, np.ndarray) else mask.detach().cpu()
        channel = values.ndim - 1 if isinstance(mask, np.ndarray) else 0
        if values.ndim == 3 and values.shape[channel] == 1:
            values = values.squeeze(channel)
        if values.ndim != 2:
            raise ValueError(f"`{name}` must have the shape (height, width), but has {tuple(mask.shape)}.")
    else:
        raise TypeError(
            f"`{name}` must be a PIL image, a numpy array or a torch tensor, but is of type `{type(mask).__name__}`."
        )
    if values.dtype == torch.bool:
        return values
    return _unit_values(values, name) >= 0.5


def _in_srgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    try:
        return as_srgb(image)
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from error


def _check_frames(image: PIL.Image.Image, name: str) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(
            f"`{name}` must be one picture, but is an animation of {image.n_frames} frames. Choose one: `.seek(i)`, "
            "then `.copy()`."
        )


def _to_tensor(array: np.ndarray, name: str) -> torch.Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"`{name}` must hold numbers, but has the dtype {array.dtype}.")
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        raise ValueError(f"`{name}` must hold bytes or floating point numbers, but has the dtype {array.dtype}.")
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # PIL hands out arrays that are read-only


def _unit_values(values: torch.Tensor, name: str) -> torch.Tensor:
    """Bytes, or floats in [0, 1], as float32 in [0, 1]."""
    if values.dtype == torch.uint8:
        return values.float() / 255
    if not values.is_floating_point():
        raise ValueError(f"`{name}` must hold bytes or floating point numbers, but has the dtype {values.dtype}.")
    values = values.float()
    if values.numel() and not (values.min() >= 0 and values.max() <= 1):  # false for nan, too
        raise ValueError(
            f"`{name}` must hold values from 0 to 1 if they are floating point, but they span {values.min():g} to "
            f"{values.max():g}."
        )
    return values


def _check_size(pixels: torch.Tensor, name: str) -> None:
    if not pixels.numel():
        raise ValueError(f"`{name}` must have at least one pixel, but is {pixels.shape[1]} x {pixels.shape[2]}.")
