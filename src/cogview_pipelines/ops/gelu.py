"""GELU in its tanh approximation. Each picture and each training step on a CPU has millions: `csrc/gelu_cpu.cpp`."""

import ctypes
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .native import FLOAT32_AND_HALVES, library, openmp_parallel
from .transforms import is_transformed

# fewer numbers are left to PyTorch: the call would be most of the work
SMALLEST = 2**15


@functools.cache
def _kernel(name: str = "gelu_cpu") -> Callable[..., int] | None:
    """A function of the library, if there is one."""
    kernel = getattr(library(), name, None)
    if kernel is not None:
        pointers = [ctypes.c_void_p] * (3 if "backward" in name else 2)
        kernel.argtypes = [*pointers, ctypes.c_int64, *[ctypes.c_int32] * 3, ctypes.c_void_p]
    return kernel


def _call(kernel: Callable[..., int] | None, *tensors: torch.Tensor) -> torch.Tensor:
    """What a kernel makes of tensors of one shape and dtype, contiguous."""
    assert kernel is not None
    values, results = tensors[0], torch.empty_like(tensors[0])
    arguments = (values.numel(), FLOAT32_AND_HALVES[values.dtype], torch.get_num_threads(), 0, openmp_parallel())
    if kernel(*[tensor.data_ptr() for tensor in (*tensors, results)], *arguments):
        raise RuntimeError(f"The GELU kernel refused {values.numel()} numbers of {values.dtype}.")
    return results


@torch.library.custom_op("cogview_pipelines::gelu", mutates_args=(), device_types="cpu")
def _fused_gelu(values: torch.Tensor) -> torch.Tensor:
    return _call(_kernel(), values)


@_fused_gelu.register_fake
def _(values):
    return torch.empty_like(values)


@torch.library.custom_op("cogview_pipelines::gelu_backward", mutates_args=(), device_types="cpu")
def _fused_gelu_backward(values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return _call(_kernel("gelu_backward_cpu"), values, gradients.contiguous())


@_fused_gelu_backward.register_fake
def _(values, gradients):
    return torch.empty_like(values)


def _set_up(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradients):
    (values,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of the gradient is wanted, too
        return torch.ops.aten.gelu_backward(gradients, values, approximate="tanh")
    return _fused_gelu_backward(values, gradients)


_fused_gelu.register_autograd(_backward, setup_context=_set_up)


def gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """
    GELU, tanh approximation.

    Many numbers on a CPU, and their gradients, go through a kernel that computes in float32; all else goes through
    PyTorch.

    Args:
        hidden_states (`torch.Tensor`): Of any shape.
    """
    fused = (
        not torch.compiler.is_compiling()  # a compiler fuses it with what is around it
        and not torch.jit.is_tracing()  # what is exported runs where there is no kernel
        and hidden_states.device.type == "cpu"
        and hidden_states.numel() >= SMALLEST
        and hidden_states.dtype in FLOAT32_AND_HALVES
        and hidden_states.is_contiguous()
        and not is_transformed(hidden_states)
        and _kernel() is not None
        and (_kernel("gelu_backward_cpu") is not None or not (torch.is_grad_enabled() and hidden_states.requires_grad))
    )
    return _fused_gelu(hidden_states) if fused else F.gelu(hidden_states, approximate="tanh")
