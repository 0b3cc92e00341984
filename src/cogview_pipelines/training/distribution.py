"""How a model is spread over the processes: a copy on each, whose gradients are averaged."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .arguments import TrainConfig
from .processes import Processes


class DistributedModel:
    """
    A model on the device of each process.

    Args:
        model (`nn.Module`): The model.
        config ([`TrainConfig`]): Its `compile` counts.
        accelerator (`Accelerator`): Of this process.
        processes ([`Processes`]): Who train together.

    Attributes:
        model (`nn.Module`): The model itself, whose names of parameters are its own.
        forward (`nn.Module`): What computes, to be called instead of `model` in a training step.
        gradient_factor (`float`): What a loss is multiplied by, so that gradients are sums over all processes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, accelerator: Accelerator, processes: Processes):
        self.model = self.forward = model.to(accelerator.device)
        self.gradient_factor = 1.0
        if config.compile:
            compile_layers(model)
        if processes.count > 1:
            devices = None if accelerator.device.type == "cpu" else [accelerator.device]
            self.forward = DistributedDataParallel(model, device_ids=devices)
            self.gradient_factor = float(processes.count)  # it averages

    @contextlib.contextmanager
    def synchronizing(self, last: bool) -> Iterator[None]:
        """A forward and backward pass, of which the last of a step gives the processes their common gradient."""
        with self.forward.no_sync() if not last and self.forward is not self.model else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, with neither gradients nor a trace in the global random state."""
        was_training = self.model.training
        with torch.random.fork_rng(), torch.no_grad():
            self.model.eval()
            yield
            self.model.train(was_training)

    def whole_model(self) -> nn.Module:
        """The model as one, to be saved."""
        return self.model


def compile_layers(model: nn.Module) -> None:
    """
    Run the layers of a model through `torch.compile`, each by itself: names of weights stay as they are.

    A model that does not say what its layers are (`_no_split_modules`) is compiled as a whole.
    """
    layers = list(layers_of(model))
    for module in layers or [model]:
        module.compile()


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformer: the modules that its class says not to split."""
    names = getattr(model, "_no_split_modules", None) or ()
    return (module for module in model.modules() if type(module).__name__ in names)
