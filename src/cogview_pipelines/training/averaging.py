"""The moving average of the weights, beside them in memory and sharded as they are."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class WeightAverage:
    """
    An exponential moving average of the parameters of a model that are trained.

    Args:
        model (`nn.Module`): The model; where its parameters are sharded, so is their average.
        decay (`float`): Share of the average that stays at an update, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.started = decay, False
        self.tensors = {name: value.detach().clone() for name, value in trained_parameters(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights; the first update takes them as they are."""
        if not self.started:
            self.restart(model)
            return
        for name, value in trained_parameters(model):
            self.tensors[name].lerp_(value.detach(), 1 - self.decay)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Begin anew with the weights as they are."""
        for name, value in trained_parameters(model):
            self.tensors[name].copy_(value.detach())
        self.started = True

    @contextlib.contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the average meanwhile."""
        self.exchange(model)
        try:
            yield
        finally:
            self.exchange(model)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Put the average into the model, and the model's weights where the average was."""
        for name, value in trained_parameters(model):
            kept = value.detach().clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient: the others stay what they are."""
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def make_average(model: nn.Module, decay: float) -> WeightAverage | None:
    """The average of a model's weights, or `None` for a decay of 0."""
    return WeightAverage(model, decay) if decay else None
