"""Whether PyTorch is transforming a computation in a way that the kernels know nothing of."""

import torch
from torch.autograd.forward_ad import unpack_dual


@torch.compiler.assume_constant_result
def _inside_a_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


def is_transformed(*tensors: torch.Tensor) -> bool:
    """
    Whether a transform of `torch.func` is at work (`grad`, `jvp`, `vmap`, ...), or a tensor carries a tangent.

    The kernels have a backward pass for ordinary autograd only. Under a transform they would raise or, worse, give
    tangents of zero: PyTorch operations take their place. Asking the tensors alone does not do: a tensor of an outer
    transform looks plain inside of an inner one.
    """
    if _inside_a_transform():
        return True
    # the compiler takes no tensors with tangents
    return not torch.compiler.is_compiling() and any(unpack_dual(tensor).tangent is not None for tensor in tensors)
