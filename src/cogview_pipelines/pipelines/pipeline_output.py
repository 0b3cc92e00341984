"""What the pipelines return."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class CogView2PipelineOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            Pictures, prompt by prompt: PIL; `(num_images, height, width, 3)` or `(num_images, 3, height, width)` in
            [0, 1]; or with `output_type="latent"` the token ids.
        tokens (`torch.Tensor` of shape `(num_images, rows, columns)`): The image tokens that the pictures were decoded
            from.
        seeds (`list[int]`): The seed of each picture: a generator with this seed makes it again, alone or in any
            batch.
        prompts (`list[str]`, *optional*): The prompt of each picture, as `prompt_translator` returned it.
        scores (`list[float]`, *optional*): What post-selection found of each picture; higher is better.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    tokens: torch.Tensor
    seeds: list[int]
    prompts: list[str] | None = None
    scores: list[float] | None = None


CogView2PipelineOutput.__module__ = "cogview_pipelines"
