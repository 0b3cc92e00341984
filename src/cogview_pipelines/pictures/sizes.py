"""Pictures made larger and smaller, cut, and made to agree with the picture they came from. Tensors only."""

import torch
import torch.nn.functional as F


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resize `(num_images, 3, height, width)` to `size`: where it becomes a whole number of times smaller, the mean of
    the pixels that fall together; else bilinear, with a low-pass where it gets smaller.
    """
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    if all(before % after == 0 for before, after in zip(pixels.shape[-2:], size)):
        return F.avg_pool2d(pixels, [before // after for before, after in zip(pixels.shape[-2:], size)])
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def resize_shorter_side(
    image: torch.Tensor, size: int, antialias: bool = True, as_pillow: bool = False
) -> torch.Tensor:
    """
    Resize a picture so that its shorter side has `size` pixels; bilinear.

    Args:
        image (`torch.Tensor` of shape `(..., height, width)`): Bytes, or floating point values.
        size (`int`): Pixels.
        antialias (`bool`): Low-pass before reducing. The release ran without; some tokens of reduced pictures differ.
        as_pillow (`bool`): Resize bytes on a CPU in the integer arithmetic of Pillow, which differs by one here and
            there. The first CogView's release read pictures so.

    Returns:
        `torch.Tensor`: Of the same dtype; bytes are rounded.
    """
    height, width = image.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    target = (size, longer) if height <= width else (longer, size)
    if target == (height, width):
        return image
    planes = image.reshape(1, -1, height, width)
    exact = planes.is_floating_point() or (as_pillow and antialias)
    resized = F.interpolate(planes if exact else planes.float(), target, mode="bilinear", antialias=antialias)
    if resized.dtype != image.dtype:
        resized = resized.round().clamp(0, 255).to(image.dtype)
    return resized.view(*image.shape[:-2], *target)


def center_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` x `size` pixels in the middle of `(..., height, width)`; both sides must be at least that."""
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"`image` must be at least {size} x {size}, but is {height} x {width}. Enlarge it first.")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[..., top : top + size, left : left + size]


def agree_with(enlarged: torch.Tensor, original: torch.Tensor, num_passes: int = 4) -> torch.Tensor:
    """
    Correct an enlarged picture so that, reduced again, it is the picture that it was made from.

    Tokens are coarse: what a picture of people holds in fine colours and edges is lost when it is encoded. What the
    means of the enlarged pixels lack is added to them smoothly; detail within them stays.

    Args:
        enlarged (`torch.Tensor` of shape `(num_images, 3, rows * height, columns * width)`): In [0, 1].
        original (`torch.Tensor` of shape `(num_images, 3, height, width)`): In [0, 1].
        num_passes (`int`, defaults to 4): The remaining difference shrinks in each.

    Returns:
        `torch.Tensor`: Shaped like `enlarged`, in [0, 1].

    Source: back-projection, Irani and Peleg, Improving resolution by image registration (1991).
    """
    for _ in range(num_passes):
        missing = original - resize(enlarged, original.shape[-2:])
        smooth = F.interpolate(missing, enlarged.shape[-2:], mode="bicubic", align_corners=False)
        enlarged = (enlarged + smooth).clamp(0, 1)
    return enlarged
