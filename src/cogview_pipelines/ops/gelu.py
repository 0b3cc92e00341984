"""GELU in its tanh approximation. Super-resolution on a CPU computes millions of these: `csrc/gelu_cpu.cpp`."""

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
def _kernel() -> Callable[..., int] | None:
    """The function of the library, if there is one."""
    kernel = getattr(library(), "gelu_cpu", None)
    if kernel is not None:
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int32] * 3, ctypes.c_void_p]
    return kernel


@torch.library.custom_op("cogview_pipelines::gelu", mutates_args=(), device_types="cpu")
def _fused_gelu(values: torch.Tensor) -> torch.Tensor:
    results, kernel = torch.empty_like(values), _kernel()
    assert kernel is not None
    arguments = (values.numel(), FLOAT32_AND_HALVES[values.dtype], torch.get_num_threads(), 0, openmp_parallel())
    if kernel(values.data_ptr(), results.data_ptr(), *arguments):
        raise RuntimeError(f"The GELU kernel refused {values.numel()} numbers of {values.dtype}.")
    return results


@_fused_gelu.register_fake
def _(values):
    return torch.empty_like(values)


def gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """
    GELU, tanh approximation.

    Where no gradient is wanted, many numbers on a CPU go through a kernel that computes in float32; all else goes
    through PyTorch.

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
        and not (torch.is_grad_enabled() and hidden_states.requires_grad)
        and not is_transformed(hidden_states)
        and _kernel() is not None
    )
    return _fused_gelu(hidden_states) if fused else F.gelu(hidden_states, approximate="tanh")
