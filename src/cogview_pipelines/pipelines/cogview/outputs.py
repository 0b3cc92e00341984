"""What the pipelines of CogView return."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..common.outputs import PreviewOutput, StageStatistics


@dataclass
class CogViewPreviewOutput(PreviewOutput):
    """A [`PreviewOutput`] of CogView, with `"transformer"` or `"super_resolution_transformer"` as its stage."""


@dataclass
class CogViewPipelineOutput(BaseOutput):
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
        scores (`list[float]`, *optional*): What self-reranking found of each picture; higher is better.
        statistics (`dict[str, StageStatistics]`, *optional*): With `return_statistics`, of each stage.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    tokens: torch.Tensor
    seeds: list[int]
    prompts: list[str] | None = None
    scores: list[float] | None = None
    statistics: dict[str, StageStatistics] | None = None


@dataclass
class CogViewCaptionPipelineOutput(BaseOutput):
    """
    Args:
        captions (`list[str]`): Picture by picture.
        scores (`list[float]`): Mean log-probability of each caption; higher is likelier.
        token_ids (`list[list[int]]`): Of each caption.
        seeds (`list[int]`): Of each caption.
        statistics (`dict[str, StageStatistics]`, *optional*): With `return_statistics`, of each stage.
    """

    captions: list[str]
    scores: list[float]
    token_ids: list[list[int]]
    seeds: list[int]
    statistics: dict[str, StageStatistics] | None = None


for _public in (CogViewPreviewOutput, CogViewPipelineOutput, CogViewCaptionPipelineOutput):
    _public.__module__ = "cogview_pipelines"
