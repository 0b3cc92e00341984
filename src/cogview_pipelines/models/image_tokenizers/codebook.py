"""What image tokenizers of all kinds share: the nearest code, codes as grids, statistics of pixels."""

import math
from collections.abc import Sequence

import torch
import torch.distributed

NUM_DISTANCES = 2**26  # at most so many distances to the codebook stand in memory at once


@torch.no_grad()
def nearest_codes(vectors: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest code of each vector, found in float32 whatever the dtypes, a part of the vectors at a time.

    Args:
        vectors (`torch.Tensor` of shape `(positions, dim)`): What is to be coded.
        codes (`torch.Tensor` of shape `(num_codes, dim)`): The codebook.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Index and squared distance of each, `(positions,)`.
    """
    codes = codes.float()
    squares = codes.square().sum(1)
    tokens, distances = [], []
    with torch.autocast(vectors.device.type, enabled=False):
        for part in vectors.float().split(max(1, NUM_DISTANCES // len(codes))):
            distance, token = torch.addmm(squares, part, codes.T, alpha=-2).min(1)
            tokens.append(token)
            distances.append((distance + part.square().sum(1)).clamp_min(0))
    return torch.cat(tokens), torch.cat(distances)


def choose_by_weight(weights: torch.Tensor, count: int) -> torch.Tensor:
    """`count` different indices, drawn with a chance that grows with the (non-negative) weights."""
    # The Gumbel trick, because `multinomial` is limited to 2**24 categories.
    noise = -torch.empty_like(weights).exponential_().log()
    return (weights.log() + noise).topk(count).indices


def as_grids(tokens: torch.Tensor, num_codes: int) -> torch.Tensor:
    """
    Codes of shape `(batch_size, rows, columns)`; flat ones, `(batch_size, side * side)`, are taken as squares.

    Raises:
        ValueError: If a code is out of range, or flat codes are no square.
    """
    if tokens.ndim == 2:
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"Flat `tokens` must be a square number of codes, but are {tokens.shape[1]}. "
                "Pass (batch_size, rows, columns) for other shapes."
            )
        tokens = tokens.view(-1, side, side)
    if tokens.ndim != 3:
        shape = tuple(tokens.shape)
        raise ValueError(
            f"`tokens` must have the shape (batch_size, rows, columns) or (batch_size, codes), but have {shape}."
        )
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < num_codes:
        raise ValueError(
            f"`tokens` must be codes in 0..{num_codes - 1}, but span {int(tokens.min())}..{int(tokens.max())}. "
            "Text ids cannot be decoded to pixels."
        )
    return tokens


def check_pixels(pixel_values: torch.Tensor, compression_rate: int) -> None:
    """
    Raises:
        ValueError: If pixels are not `(batch_size, 3, height, width)` with sides that the rate divides.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"`pixel_values` must have the shape (batch_size, 3, height, width), but has {shape}.")
    if pixel_values.shape[2] % compression_rate or pixel_values.shape[3] % compression_rate:
        raise ValueError(
            f"Height and width of `pixel_values` must be multiples of `compression_rate` {compression_rate}, "
            f"but are {pixel_values.shape[2]} and {pixel_values.shape[3]}. Resize or crop the pictures."
        )


def image_statistics(
    mean: Sequence[float], std: Sequence[float], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation as tensors that broadcast over pictures `like` these."""
    mean, std = (like.new_tensor(value).view(3, 1, 1) for value in (mean, std))
    return mean, std


def same_on_all_processes(value: torch.Tensor) -> torch.Tensor:
    """The value of the first process."""
    value = value.contiguous()
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(value, 0)
    return value
