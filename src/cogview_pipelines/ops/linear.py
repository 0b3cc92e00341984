"""
Linear layers on a CPU with the norms, GELU and residual addition around them in one pass: `csrc/linear_cpu.cpp`.

[`fuses`] says whether modules may go through the kernel, and [`fused_linear`] calls it. `int8_linear.py` has layers
that compute with whole numbers by the same kernel.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import nn

from .native import FLOAT32_AND_HALVES, build_info, library, openmp_parallel
from .processor import multiplies
from .transforms import is_transformed

_ABI = 1
_ALIGNMENT = 64
# fewer rows are left to PyTorch: the kernel lays out the weights anew in every call
LEAST_ROWS = 64
# and so are larger weights, which would be copied whole
MOST_WEIGHTS = 2**22


class _Norm(ctypes.Structure):
    """`LinearNorm` of `csrc/linear.h`."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_double)]


class _Call(ctypes.Structure):
    """`Linear` of `csrc/linear.h`."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("abi", "dtype")],
        ("rows", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("inputs", "outputs", "gelu", "int8", "threads", "isa")],
        *[(name, _Norm) for name in ("input_norm", "output_norm")],
        *[
            (name, ctypes.c_void_p)
            for name in ("input", "weight", "scales", "bias", "residual", "output", "scratch", "parallel")
        ],
    ]


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The library, if it holds this kernel in this version."""
    kernels = library()
    if kernels is None or not hasattr(kernels, "linear_size"):
        return None
    for function in (kernels.linear_size, kernels.linear_scratch_size, kernels.linear_packed_size):
        function.restype = ctypes.c_int64
    kernels.linear_packed_size.argtypes = [ctypes.c_int64] * 2
    kernels.linear_pack.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2]
    return kernels if kernels.linear_size() == ctypes.sizeof(_Call) else None


@torch.library.custom_op("cogview_pipelines::linear", mutates_args=(), device_types="cpu")
def linear_op(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_norm: list[torch.Tensor],
    input_epsilon: float,
    output_norm: list[torch.Tensor],
    output_epsilon: float,
    residual: torch.Tensor | None,
    gelu: bool,
    isa: int,
) -> torch.Tensor:
    """
    One call of the kernel; everything is contiguous and on the CPU.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., inputs)`): float32, bfloat16 or float16.
        weight (`torch.Tensor`): `(outputs, inputs)`; or, with `scales`, packed whole numbers.
        scales (`torch.Tensor` of shape `(outputs,)`, *optional*): Of whole numbers.
        bias (`torch.Tensor` of shape `(outputs,)`, *optional*): Like all that follows in the dtype of the inputs.
        input_norm, output_norm (`list[torch.Tensor]`): Weight and bias of a layer norm of the inputs, and of what
            comes out, with their epsilons; empty for none.
        residual (`torch.Tensor` of shape `(..., outputs)`, *optional*): Added at the end.
        gelu (`bool`): Apply GELU, in its tanh approximation, before the output's norm.
        isa (`int`): 1 + the index of an instruction set, for tests; 0 takes the best.
    """
    outputs = weight.shape[0] if scales is None else scales.shape[0]
    output = hidden_states.new_empty(*hidden_states.shape[:-1], outputs)
    if not output.numel():
        return output
    call = _Call(abi=_ABI, dtype=FLOAT32_AND_HALVES[hidden_states.dtype], gelu=gelu, isa=isa)
    call.inputs, call.outputs, call.int8 = hidden_states.shape[-1], outputs, scales is not None
    call.rows = hidden_states.numel() // call.inputs
    call.threads, call.parallel = torch.get_num_threads(), openmp_parallel()
    call.input, call.weight, call.output = hidden_states.data_ptr(), weight.data_ptr(), output.data_ptr()
    for name, tensor in (("scales", scales), ("bias", bias), ("residual", residual)):
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    if input_norm:
        call.input_norm = _Norm(*[tensor.data_ptr() for tensor in input_norm], input_epsilon)
    if output_norm:
        call.output_norm = _Norm(*[tensor.data_ptr() for tensor in output_norm], output_epsilon)
    kernels = kernel()
    assert kernels is not None
    size = kernels.linear_scratch_size(ctypes.byref(call))
    scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    call.scratch = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    if kernels.linear_cpu(ctypes.byref(call)):
        raise RuntimeError(f"The kernel of linear layers refused {call.rows} rows of {call.inputs} numbers.")
    return output


@linear_op.register_fake
def _(hidden_states, weight, scales, bias, *_):
    return hidden_states.new_empty(*hidden_states.shape[:-1], weight.shape[0] if scales is None else scales.shape[0])


def takes(hidden_states: torch.Tensor) -> bool:
    """Whether these inputs, and what happens to them, are such that the kernel may be called."""
    return (
        hidden_states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and type(hidden_states) is torch.Tensor
        and hidden_states.dtype in FLOAT32_AND_HALVES
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # a compiler fuses by itself
        and not torch.jit.is_tracing()  # the graph is for where there is no such kernel
        and not is_transformed(hidden_states)
        and kernel() is not None
    )


@functools.cache
def _is_faster_in(dtype: torch.dtype) -> bool:
    """
    Whether the kernel beats PyTorch's products of these numbers: where it has vectors, and the processor has no
    instructions for products of 16-bit numbers, which PyTorch uses then.
    """
    if build_info()["cpu_instruction_set"] == "baseline":
        return False
    return dtype == torch.float32 or not multiplies(dtype)


def fuses(hidden_states: torch.Tensor, *modules: nn.Module, inside: Sequence[nn.Module] = ()) -> bool:
    """
    Whether modules can be computed by [`fused_linear`], and are faster so.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., inputs)`): What goes into them.
        modules (`nn.Module`): What is computed: `nn.Linear` and `nn.LayerNorm`, which must be plain: no adapter
            around them, no quantised weights, nothing that watches or moves them.
        inside (sequence of `nn.Module`): Modules that are passed over on the way, such as those that hold the others:
            nothing may watch or move them.
    """
    if not takes(hidden_states):
        return False
    whole = all(getattr(module, "computes_whole", False) for module in modules if isinstance(module, nn.Linear))
    if not whole and (
        hidden_states.numel() < LEAST_ROWS * hidden_states.shape[-1] or not _is_faster_in(hidden_states.dtype)
    ):
        return False
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    if any(_is_watched(module) for module in (*modules, *inside)):
        return False
    return all(_is_plain(module, hidden_states.dtype) for module in modules)


def _is_watched(module: nn.Module) -> bool:
    # a `forward` of its own: offloading
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    if type(module) not in (nn.Linear, nn.LayerNorm) and not getattr(module, "computes_whole", False):
        return False
    weight, bias = module.weight, module.bias
    return (
        (bias is not None or isinstance(module, nn.Linear))
        and weight.numel() <= MOST_WEIGHTS
        and all(
            type(tensor.data) is torch.Tensor
            and tensor.dtype == dtype
            and tensor.device.type == "cpu"
            and tensor.is_contiguous()
            for tensor in (weight, bias)
            if tensor is not None
        )
    )


def fused_linear(
    hidden_states: torch.Tensor,
    layer: nn.Linear,
    *,
    input_norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    output_norm: nn.LayerNorm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `residual + output_norm(gelu(layer(input_norm(hidden_states))))`, of which all but the layer may be left out.

    What a row gets does not depend on the others, to the bit. [`fuses`] says whether these modules can be computed so.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., inputs)`): float32, bfloat16 or float16 on the CPU.
        layer (`nn.Linear`): Or an [`Int8Linear`], which multiplies whole numbers.
        input_norm, output_norm (`nn.LayerNorm`, *optional*): Over the last dimension, with weight and bias.
        gelu (`bool`): In its tanh approximation.
        residual (`torch.Tensor` of shape `(..., outputs)`, *optional*): Added at the end.

    Returns:
        `torch.Tensor` of shape `(..., outputs)`: In the dtype of the inputs.
    """
    weight, scales = layer.weight, None
    if getattr(layer, "computes_whole", False):
        packed = layer.packed_weight()
        weight, scales = packed.packed, packed.scales
    norms: list[torch.Tensor | float] = []
    for norm in (input_norm, output_norm):
        norms += [[], 0.0] if norm is None else [[norm.weight, norm.bias], norm.eps]
    residual = None if residual is None else residual.contiguous()
    return linear_op(hidden_states.contiguous(), weight, scales, layer.bias, *norms, residual, gelu, 0)
