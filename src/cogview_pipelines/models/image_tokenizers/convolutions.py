"""
Convolutions of image tokenizers.

On a processor without arithmetic for 16-bit numbers, PyTorch computes convolutions of them several times more slowly
than in float32. These compute in float32 there, and round what comes out, which is more exact, too.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.processor import multiplies


def _is_emulated(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and not multiplies(tensor.dtype)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, in float32 where the processor would emulate 16-bit numbers."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not _is_emulated(input):
            return super()._conv_forward(input, weight, bias)
        bias = None if bias is None else bias.float()
        return super()._conv_forward(input.float(), weight.float(), bias).to(input.dtype)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`, likewise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _is_emulated(input):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        settings = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(input.float(), self.weight.float(), bias, *settings).to(input.dtype)
