"""
Linear layers of 8-bit numbers on a CPU: `csrc/linear_cpu.cpp`.

[`Int8Linear`] is an `nn.Linear` that keeps its weights as they are, and computes with whole numbers made of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .linear import kernel as _kernel
from .linear import linear_op, takes

_LARGEST = 127


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
        kernels = _kernel()
        if kernels is not None:
            size = kernels.linear_packed_size(self.inputs, self.outputs)
            self.packed, self.whole = torch.empty(size, dtype=torch.int8, device="cpu"), None
            kernels.linear_pack(whole.data_ptr(), self.packed.data_ptr(), self.inputs, self.outputs)


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
    nothing: tuple[list[torch.Tensor], float] = ([], 0.0)
    return linear_op(
        hidden_states.contiguous(), weight.packed, weight.scales, bias, *nothing, *nothing, None, gelu, isa
    )


def _int8_linear_reference(
    hidden_states: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    assert weight.whole is not None
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

    computes_whole = True
    _packed: tuple[tuple, PackedWeight] | None = None

    def forward(self, hidden_states: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        if self.computes_in_int8(hidden_states):
            return int8_linear(hidden_states, self.packed_weight(), self.bias, gelu=gelu)
        output = super().forward(hidden_states)
        return F.gelu(output, approximate="tanh") if gelu else output

    def computes_in_int8(self, hidden_states: torch.Tensor) -> bool:
        """Whether these inputs are multiplied as whole numbers."""
        weight = self.weight
        return takes(hidden_states) and weight.device.type == "cpu" and hidden_states.dtype == weight.dtype

    def packed_weight(self) -> PackedWeight:
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
