"""Losses: of the image tokenizer, and of the canvas of super-resolution."""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..generation.token_sequence import IGNORED_LABEL
from .data.tokens import CanvasBatch


def canvas_loss(model: nn.Module, batch: CanvasBatch) -> tuple[torch.Tensor, dict]:
    """Cross-entropy summed over the labelled cells of the canvas (there is at least one); no other scalars."""
    output = model(batch.canvas_ids, batch.context, labels=batch.labels)
    return output.label_losses.sum(), {}


def count_labels(batch) -> int:
    """The positions of a batch that have a label."""
    return int((batch.labels != IGNORED_LABEL).sum())


def reconstruction_loss(
    sample: torch.Tensor,
    target: torch.Tensor,
    l1_weight: float = 1.0,
    l2_weight: float = 1.0,
    edge_weight: float = 0.0,
    pixel_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Mix of absolute and squared differences of pixels, and of absolute differences of steps between neighbours.

    Args:
        sample, target (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Pictures in 0..1.
        l1_weight, l2_weight (`float`, defaults to 1.0): Weights of absolute and squared differences.
        edge_weight (`float`, defaults to 0.0): Weight of the steps between neighbours, for crisp edges.
        pixel_weights (`torch.Tensor` of shape `(batch_size, 1, height, width)`, *optional*):
            Weight of each pixel, with mean 1.

    Returns:
        `torch.Tensor`: Scalar, float32.
    """
    error = sample.float() - target.float()
    weights = error.new_ones(()) if pixel_weights is None else pixel_weights
    loss = (weights * (l1_weight * error.abs() + l2_weight * error.square())).mean()
    if edge_weight:
        loss = loss + edge_weight * (weights * _steps(error)).mean()
    return loss


def _steps(error):
    down = F.pad(error.diff(dim=2).abs(), (0, 0, 0, 1))
    return down + F.pad(error.diff(dim=3).abs(), (0, 1, 0, 0))


def content_weights(target: torch.Tensor, flat_weight: float, cell: int = 8) -> torch.Tensor:
    """
    Pixel weights that make one-coloured squares count less, so that a flat background does not drown the content.

    Args:
        target (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            Pictures in 0..1; sides are multiples of `cell`.
        flat_weight (`float`): Weight of pixels in one-coloured squares, relative to the others.
        cell (`int`, defaults to 8): Side of the squares in pixels.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, height, width)`: Weights with mean 1.
    """
    spread = F.max_pool2d(target, cell) + F.max_pool2d(-target, cell)
    busy = (spread.amax(1, keepdim=True) > 0.02).to(target.dtype)
    weights = flat_weight + (1 - flat_weight) * busy
    return F.interpolate(weights / weights.mean(), scale_factor=cell, mode="nearest")


def load_perceptual_network(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    A perceptual distance of two batches of pictures in 0..1.

    Args:
        name (`str`):
            `"lpips"` for the package of that name with its VGG network, or `"module:factory"`, where `factory()`
            returns a callable of `(sample, target)`.

    Returns:
        A callable that returns a tensor of distances; if it is an `nn.Module`, its weights are frozen.

    Raises:
        ValueError: If the name has neither form or cannot be imported.
    """
    try:
        if name == "lpips":
            network = importlib.import_module("lpips").LPIPS(net="vgg", verbose=False)
            network.requires_grad_(False)
            return lambda sample, target: network.to(sample.device)(sample * 2 - 1, target * 2 - 1)
        module, separator, factory = name.partition(":")
        if not separator:
            raise ValueError(f"`perceptual_network` must be 'lpips' or 'module:factory', but is '{name}'.")
        network = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`perceptual_network` '{name}' cannot be imported: {error}.") from error
    if isinstance(network, torch.nn.Module):
        network.requires_grad_(False)
    return network
