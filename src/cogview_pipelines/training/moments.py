"""
AdamW's moments in fewer bits, through torchao: bfloat16, or 8 bits with a scale for each block of 256 numbers.

The blocks are those of what a process holds. A checkpoint has the numbers that they stand for, in float32, so that
another number of processes, with other blocks, goes on from them.
"""

import torch
from torch.distributed.tensor import DTensor

from .arguments import TrainConfig

BLOCK = 256  # numbers that share a scale
LEAST = 4096  # torchao leaves smaller tensors, and those that blocks do not fill, in float32


def make_adamw(groups: list[dict], config: TrainConfig) -> torch.optim.Optimizer:
    """
    AdamW with the moments that the config asks for.

    torchao's is compiled when it first steps, once for each shape of a weight, and takes its learning rate from a
    tensor that must stay the same object.

    Args:
        groups (`list[dict]`): Parameters and their `weight_decay`.
        config ([`TrainConfig`]): Its `moments`, `learning_rate` and `adam_beta2` count.
    """
    options = {"lr": config.learning_rate, "betas": (0.9, config.adam_beta2)}
    if config.moments == "float32":
        # on a CPU in one pass; elsewhere torch chooses
        fused = all(value.device.type == "cpu" for group in groups for value in group["params"]) or None
        return torch.optim.AdamW(groups, fused=fused, **options)
    from torchao.optim import AdamW8bit

    if config.moments == "int8":
        return AdamW8bit(groups, block_size=BLOCK, **options)

    class AdamWBFloat16(AdamW8bit):
        def _new_buffer(self, parameter, signed):
            return torch.zeros_like(parameter.detach(), dtype=torch.bfloat16)

    return AdamWBFloat16(groups, **options)


@torch.no_grad()
def new_moment(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, signed: bool) -> torch.Tensor:
    """A moment of zeros as an optimizer keeps it: sharded as its parameter is."""
    if hasattr(optimizer, "_new_buffer"):
        return optimizer._new_buffer(parameter.detach(), signed)
    return torch.zeros_like(parameter.detach())


@torch.no_grad()
def as_saved(moment: torch.Tensor) -> torch.Tensor:
    """What a checkpoint holds of a moment: itself, or where it has 8 bits a copy in float32 on the CPU."""
    local = local_part(moment)
    if not _is_quantized(local):
        return moment
    whole = local.dequantize()
    if isinstance(moment, DTensor):
        whole = DTensor.from_local(
            whole,
            moment.device_mesh,
            moment.placements,
            run_check=False,
            shape=moment.shape,
            stride=moment.stride(),
        )
    return whole.cpu()


@torch.no_grad()
def take(moment: torch.Tensor, saved: torch.Tensor) -> None:
    """Put what [`as_saved`] gave, and a checkpoint may have overwritten, back where it is a copy."""
    local = local_part(moment)
    if _is_quantized(local):
        local.copy_(local_part(saved).to(local.device))


def moment_bytes(elements: int, moments: str) -> int:
    """
    Bytes of one moment.

    Args:
        elements (`int`): Of the parameter, or of the share of it that a device holds.
        moments (`str`): As [`TrainConfig`] has it.
    """
    if moments == "int8" and elements >= LEAST and elements % BLOCK == 0:
        return elements + 4 * elements // BLOCK + 4 * 256  # codes, scales, and a table of what the codes mean
    return elements * (2 if moments == "bfloat16" else 4)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_quantized(local: torch.Tensor) -> bool:
    return hasattr(local, "codes")  # of torchao's class, which is not imported where nobody asked for it
