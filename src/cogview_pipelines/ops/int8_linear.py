"""
Linear layers of 8-bit numbers on a CPU: `csrc/int8_linear_cpu.cpp`.

[`Int8Linear`] is an `nn.Linear` that keeps its weights as they are, and computes with whole numbers made of them.
"""

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import nn

from .native import FLOAT32_AND_HALVES, library, openmp_parallel
from .transforms import is_transformed

_ABI = 1
_LARGEST = 127
_ALIGNMENT = 64


class _Call(ctypes.Structure):
    """`Int8Linear` of `csrc/int8_linear.h`."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("abi", "dtype")],
        ("rows", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("inputs", "outputs", "gelu", "threads", "isa", "reserved")],
        *[(name, ctypes.c_void_p) for name in ("input", "weight", "scales", "bias", "output", "scratch", "parallel")],
    ]


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """The library, if it holds this kernel in this version."""
    kernels = library()
    if kernels is None or not hasattr(kernels, "int8_linear_size"):
        return None
    sizes = (kernels.int8_linear_size, kernels.int8_linear_scratch_size, kernels.int8_linear_packed_size)
    for function in sizes:
        function.restype = ctypes.c_int64
    kernels.int8_linear_packed_size.argtypes = [ctypes.c_int64] * 2
    kernels.int8_linear_pack.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2]
    return kernels if kernels.int8_linear_size() == ctypes.sizeof(_Call) else None


def is_built() -> bool:
    """Whether there is a kernel. Without it, the same numbers are computed by PyTorch, slowly."""
    return _kernel() is not None


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Whole numbers from -127 to 127 for each row, and the scale that gives back the values.

    Args:
        values (`torch.Tensor` of shape `(..., inputs)`): Floating-point numbers.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int8, shaped like `values`, and float32 of shape `(..., 1)`: the largest
            magnitude of the row over 127. It is NaN where a value is NaN or infinite.
    """
    values = values.float()
    scales = values.abs().amax(-1, keepdim=True) / _LARGEST + 0 * values.sum(-1, keepdim=True)
    whole = (values / scales.where(scales > 0, 1.0)).round()
    return whole.nan_to_num(0.0).to(torch.int8), scales


class PackedWeight:
    """
    The weights of a linear layer as the kernel reads them.

    Args:
        weight (`torch.Tensor` of shape `(outputs, inputs)`): Floating-point numbers on the CPU.
    """

    def __init__(self, weight: torch.Tensor):
        self.outputs, self.inputs = weight.shape
        whole, scales = quantize_rows(weight.detach())
        self.scales = scales[:, 0].contiguous()
        self.whole: torch.Tensor | None = whole
        self.packed: torch.Tensor | None = None
        if _kernel() is not None:
            size = _kernel().int8_linear_packed_size(self.inputs, self.outputs)
            self.packed, self.whole = torch.empty(size, dtype=torch.int8, device="cpu"), None
            _kernel().int8_linear_pack(whole.data_ptr(), self.packed.data_ptr(), self.inputs, self.outputs)


def int8_linear(
    hidden_states: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    gelu: bool = False,
    isa: int = 0,
) -> torch.Tensor:
    """
    A linear layer of whole numbers: those of the weights, and those that every row of the inputs is made, with a scale
    of its own. Their products are added exactly.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., inputs)`): float32, bfloat16 or float16 on the CPU.
        weight ([`PackedWeight`]): Of the layer.
        bias (`torch.Tensor` of shape `(outputs,)`, *optional*): In the dtype of the inputs.
        gelu (`bool`): Apply GELU, in its tanh approximation, to what comes out.
        isa (`int`): 1 + the index of an instruction set, for tests; 0 takes the best.

    Returns:
        `torch.Tensor` of shape `(..., outputs)`: In the dtype of the inputs. NaN in rows that hold what is no number.
    """
    if weight.packed is None:
        return _int8_linear_reference(hidden_states, weight, bias, gelu)
    hidden_states = hidden_states.contiguous()
    output = hidden_states.new_empty(*hidden_states.shape[:-1], weight.outputs)
    if not output.numel():
        return output
    call = _Call(abi=_ABI, dtype=FLOAT32_AND_HALVES[hidden_states.dtype], gelu=gelu, isa=isa)
    call.rows, call.inputs, call.outputs = hidden_states.numel() // weight.inputs, weight.inputs, weight.outputs
    call.threads, call.parallel = torch.get_num_threads(), openmp_parallel()
    call.input, call.output = hidden_states.data_ptr(), output.data_ptr()
    call.weight, call.scales = weight.packed.data_ptr(), weight.scales.data_ptr()
    call.bias = None if bias is None else bias.data_ptr()
    size = _kernel().int8_linear_scratch_size(ctypes.byref(call))
    scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    call.scratch = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    if _kernel().int8_linear_cpu(ctypes.byref(call)):
        raise RuntimeError(f"The int8 kernel refused {call.rows} rows of {call.inputs} numbers.")
    return output


def _int8_linear_reference(
    hidden_states: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    whole, scales = quantize_rows(hidden_states)
    # whole numbers up to 2^53 are exact in float64
    sums = whole.double() @ weight.whole.double().T
    output = sums.float() * (scales * weight.scales) + (0 if bias is None else bias.float())
    return (F.gelu(output, approximate="tanh") if gelu else output).to(hidden_states.dtype)


class Int8Linear(nn.Linear):
    """
    An `nn.Linear` that keeps its weights as they are and computes with whole numbers made of them: see
    [`int8_linear`]. While gradients are wanted, inside of a compiler and on other devices it is an `nn.Linear`.

    [`set_int8`] makes one of an `nn.Linear`, and back.
    """

    _packed: tuple[tuple, PackedWeight] | None = None

    def forward(self, hidden_states: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        if self.computes_in_int8(hidden_states):
            return int8_linear(hidden_states, self._pack(), self.bias, gelu=gelu)
        output = super().forward(hidden_states)
        return F.gelu(output, approximate="tanh") if gelu else output

    def computes_in_int8(self, hidden_states: torch.Tensor) -> bool:
        """Whether these inputs are multiplied as whole numbers."""
        return (
            hidden_states.device.type == self.weight.device.type == "cpu"
            and hidden_states.dtype == self.weight.dtype
            and hidden_states.dtype in FLOAT32_AND_HALVES
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not is_transformed(hidden_states)
        )

    def _pack(self) -> PackedWeight:
        """The weights as whole numbers, made anew when they have changed."""
        weight = self.weight
        state = (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[0] != state:
            self._packed = state, PackedWeight(weight)
        return self._packed[1]


def set_int8(model: nn.Module, int8: bool) -> None:
    """
    Let the linear layers of a model compute in int8 on a CPU, or as they did. Its weights, and what is saved, stay the
    same; small layers of adapters are left as they are.

    Args:
        model (`nn.Module`): Of whose parts those are meant that are `nn.Linear`, and nothing derived from it.
        int8 (`bool`): Whether to.
    """
    for name, module in model.named_modules():
        if int8 and type(module) is nn.Linear and "lora_" not in name:
            module.__class__ = Int8Linear
        elif not int8 and type(module) is Int8Linear:
            module.__class__ = nn.Linear
            module.__dict__.pop("_packed", None)
