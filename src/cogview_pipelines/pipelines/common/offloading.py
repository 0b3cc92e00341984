"""Offload of whole models, one of them on the device at a time, where two of them may share weights."""

from collections.abc import Sequence

import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache


class StageOffload(CpuOffload):
    """
    Move a model to its device when it is called, and move the others away first.

    The hook of accelerate knows the one model before, sends away shared weights only to fetch them again, and takes
    the device of the first weight for that of all.

    Args:
        models (list of `torch.nn.Module`): All that have such a hook. Those that share weights with the called one
            stay.
        device (`torch.device`): Where they compute.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device):
        super().__init__(device)
        self.models = models

    def pre_forward(self, module: torch.nn.Module, *args, **kwargs):
        if any(parameter.device != self.execution_device for parameter in module.parameters()):
            for other in self.models:
                if not share_weights(module, other):
                    other.to("cpu")
            clear_device_cache()
            module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def share_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two models hold the same parameters, in part at least."""
    return not {id(parameter) for parameter in first.parameters()}.isdisjoint(map(id, second.parameters()))


def offload_stages(models: Sequence[torch.nn.Module]) -> None:
    """Replace the offload hooks of accelerate on these models."""
    offloaded = [model for model in models if isinstance(getattr(model, "_hf_hook", None), CpuOffload)]
    for model in offloaded:
        add_hook_to_module(model, StageOffload(offloaded, torch.device(model._hf_hook.execution_device)))
