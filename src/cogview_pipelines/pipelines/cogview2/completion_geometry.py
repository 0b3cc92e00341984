"""
Where a picture is cut, resized and masked when a part of it is painted anew: pure functions on tensors.

The transformer completes one square of 20 x 20 tokens. So a square crop around the mask is taken, large enough that
the mask is at most 14 of its 20 tokens wide; it is resized to the low resolution, completed, super-resolved if it was
larger than that, and pasted back.

Source: the completion script of the CogView2 release.
"""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F

# The mask takes at most this share of the crop's side, so that there is something to complete from.
MASK_SHARE = 14 / 20

Box = tuple[int, int, int, int]


def rectangle_mask(fractions: tuple[float, float, float, float], size: int = 480) -> torch.Tensor:
    """
    A mask with one rectangle.

    Args:
        fractions (`tuple[float, float, float, float]`): Top, left, bottom and right, as parts of the side, 0..1.
        size (`int`, defaults to 480): Pixels of the side.

    Returns:
        `torch.Tensor` of shape `(size, size)`: boolean.
    """
    top, left, bottom, right = (int(size * fraction) for fraction in fractions)
    if not (0 <= top < bottom <= size and 0 <= left < right <= size):
        raise ValueError(
            f"`fractions` must be top, left, bottom and right in 0..1 and span a pixel at least, but are {fractions}."
        )
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def bounding_box(mask: torch.Tensor) -> Box:
    """
    The smallest box around all that a mask marks.

    Returns:
        `tuple[int, int, int, int]`: Top, left, bottom and right; the last two are exclusive.

    Raises:
        ValueError: If nothing is marked.
    """
    if not mask.any():
        raise ValueError("`mask` marks no pixel to paint. Mark at least one.")
    rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def crop_box(
    mask: torch.Tensor, mask_share: float = MASK_SHARE, min_side: int = 0, max_side: int | None = None
) -> Box:
    """
    The square that is completed for a mask: the mask takes at most 14 of 20 parts of its side.

    Args:
        mask (`torch.Tensor` of shape `(height, width)`): boolean, True = paint.
        mask_share (`float`, defaults to 14 / 20): The largest part of the side that the mask takes, where there is
            room.
        min_side (`int`): The square is no smaller, in pixels, unless the picture is.
        max_side (`int`, *optional*): The square is no larger; default: the shorter side of the picture.

    Returns:
        `tuple[int, int, int, int]`: Top, left, bottom and right; the last two are exclusive. All of the mask is in it,
        unless the mask is larger than `max_side` (or, without a `min_side`, only two pixels large: the release then
        misses a part of it).

    Raises:
        ValueError: If the mask marks nothing.
    """
    limit = min(mask.shape) if max_side is None else min(*mask.shape, max_side)
    top, left, bottom, right = bounding_box(mask)
    share = Fraction(mask_share).limit_denominator(1000)
    sides = [int(extent * share.denominator / share.numerator) for extent in (bottom - top, right - left)]
    side = min(max(*sides, min_side), limit)
    first_row = _start(top, bottom - 1, side, mask.shape[0])
    first_column = _start(left, right - 1, side, mask.shape[1])
    return first_row, first_column, first_row + side, first_column + side


def _start(first: int, last: int, side: int, size: int) -> int:
    """Where an interval of `side` pixels around `first..last` starts, shifted into the picture."""
    center = (first + last) / 2
    if int(center + side / 2) >= size:
        return size - side
    return max(0, math.trunc(center - side / 2))


def best_window(mask: torch.Tensor, mask_share: float, side: int) -> Box:
    """
    Of all squares, the one in which the mask is largest, but not larger than `mask_share` of its area.

    One such square after the other paints a long stretch piece by piece, outwards from what is known.

    Args:
        mask (`torch.Tensor` of shape `(height, width)`): boolean, True = still to be painted.
        mask_share (`float`): Part of the area. If the mask is larger in all squares, it is the one where it is
            smallest.
        side (`int`): Of the squares, in pixels.
    """
    rows, columns = (_positions(size, side) for size in mask.shape)
    sums = F.pad(mask.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    areas = (
        sums[rows + side][:, columns + side]
        - sums[rows][:, columns + side]
        - sums[rows + side][:, columns]
        + sums[rows][:, columns]
    )
    enough = areas <= mask_share * side**2
    if (enough & (areas > 0)).any():
        best = areas.masked_fill(~enough, 0).argmax()
    else:
        best = areas.masked_fill(areas == 0, side**2 + 1).argmin()
    row, column = rows[best // len(columns)].item(), columns[best % len(columns)].item()
    return row, column, row + side, column + side


def _positions(size: int, side: int) -> torch.Tensor:
    """Starts of intervals of `side` in `size`, a twentieth of a side apart, the last one included."""
    starts = torch.arange(0, size - side + 1, max(side // 20, 1))
    return torch.cat([starts, torch.tensor([size - side])]).unique()


def token_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    A mask of pixels as a mask of tokens, by the pixel at each token's first corner.

    Args:
        mask (`torch.Tensor` of shape `(height, width)`): boolean.
        grid (`tuple[int, int]`): Rows and columns of tokens.

    Returns:
        `torch.Tensor` of shape `grid`: boolean.
    """
    return F.interpolate(mask[None, None].float(), grid, mode="nearest")[0, 0] >= 0.5


def covering_token_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    A mask of pixels as a mask of tokens: a token is marked if any of its pixels is.

    [`token_mask`], the rule of the release, looks at one pixel of each token: thin strokes fall through, and up to a
    token's width of the old content stays inside of the mask.

    Args:
        mask (`torch.Tensor` of shape `(height, width)`): boolean.
        grid (`tuple[int, int]`): Rows and columns of tokens.

    Returns:
        `torch.Tensor` of shape `grid`: boolean.
    """
    return F.adaptive_max_pool2d(mask[None, None].float(), grid)[0, 0] > 0
