"""Where models compute while hooks move them, and how many pictures a device has room for."""

from collections.abc import Callable

import torch
from accelerate.hooks import CpuOffload

from ...generation.canvas import LOGITS_BYTES
from .offloading import share_weights

# Where memory is no guide: enough for the weights to be read for several pictures at once, and no more than a laptop
# has room for.
DEFAULT_MAX_BATCH_SIZE = 8
# The rest is for the fragments between tensors, and for what libraries take.
USED_SHARE = 0.8
# Copies of the logits that are drawn from at a time, that live at the peak.
LOGITS = 5


def execution_device(model: torch.nn.Module, group_device: Callable[[], torch.device]) -> torch.device:
    """
    Where a model computes: the device of its offload hooks, else where its weights are.

    Args:
        model (`torch.nn.Module`): A component of a pipeline.
        group_device: Tells where models with group offload compute, whose hooks keep it to themselves. Called only for
            those: it looks through all models.
    """
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        if hasattr(module, "_diffusers_hook"):
            return group_device()
    return model.device


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; `None` where that is unknown."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, cap - held) + held - torch.cuda.memory_allocated(device)


def pictures_that_fit(
    model: torch.nn.Module,
    device: torch.device,
    models: list[torch.nn.Module],
    bytes_per_picture: int,
    most: int,
) -> int:
    """
    How many pictures a stage can work on at a time with the memory that its device has free.

    Args:
        model (`torch.nn.Module`): Of the stage.
        device (`torch.device`): Where it computes.
        models (list of modules): All components; some make room if hooks offload them.
        bytes_per_picture (`int`): Memory that each picture needs, besides the weights.
        most (`int`): The most that are of use: with more pictures the device gets no faster.
    """
    free = free_memory(device)
    if free is None:
        return DEFAULT_MAX_BATCH_SIZE
    if isinstance(getattr(model, "_hf_hook", None), CpuOffload):
        free -= sum(parameter.nbytes for parameter in model.parameters() if parameter.device != device)
        leaving = {id(p): p for other in models if not share_weights(model, other) for p in other.parameters()}
        free += sum(parameter.nbytes for parameter in leaving.values() if parameter.device == device)
    free -= LOGITS * LOGITS_BYTES
    return max(1, min(most, int(USED_SHARE * free) // bytes_per_picture))
