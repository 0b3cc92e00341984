"""What all image tokenizers return."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from transformers.utils import ModelOutput


@dataclass
class VQEncoderOutput(BaseOutput):
    """
    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, height / rate, width / rate)`): Indices of the nearest codes.
    """

    tokens: torch.Tensor


@dataclass
class VQDecoderOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB values in about 0..1, not clamped.
    """

    sample: torch.Tensor


@dataclass
class VQModelOutput(ModelOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Reconstruction, 0..1, not clamped.
        tokens (`torch.LongTensor` of shape `(batch_size, height / rate, width / rate)`): The tokens in between.
        commitment_loss (`torch.Tensor`): Scalar to add to the loss of the reconstruction: what the vectors pay for
            their distance to the codes, and where codes have a gradient of their own, what these pay; weighted.
    """

    sample: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
