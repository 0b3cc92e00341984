"""What the pipelines of CogView2 return."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..common.outputs import CaptionsOutput, PicturesOutput, PreviewOutput, StageStatistics


@dataclass
class CogView2PreviewOutput(PreviewOutput):
    """A [`PreviewOutput`] of CogView2, with `"transformer"`, `"direct_sr_transformer"` and
    `"iterative_sr_transformer"` as stages.
    """


@dataclass
class CogView2PipelineOutput(PicturesOutput):
    """A [`PicturesOutput`] of CogView2: `images`, `tokens`, `seeds`, `prompts`, `scores` of post-selection."""


@dataclass
class CogView2InpaintPipelineOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The whole pictures, in which only what the mask marks has changed.
        crops (`list[list]`): Of each picture, the square that was completed, as the model made it and at its
            resolution; several, in order, if the mask did not fit into one. Of the same type as a single picture.
        crop_boxes (`list[list[tuple[int, int, int, int]]]`): Where each crop lies: top, left, bottom and right in
            pixels, the last two exclusive.
        seeds (`list[int]`): The seed of each picture: a generator with this seed makes it again, alone or in any
            batch.
        prompts (`list[str]`): The prompt of each picture, as `prompt_translator` returned it.
        statistics (`dict[str, StageStatistics]`, *optional*): With `return_statistics`, of each stage.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    crops: list[list]
    crop_boxes: list[list[tuple[int, int, int, int]]]
    seeds: list[int]
    prompts: list[str]
    statistics: dict[str, StageStatistics] | None = None


@dataclass
class CogView2CaptionPipelineOutput(CaptionsOutput):
    """A [`CaptionsOutput`] of CogView2: best first; what the `scores` are depends on the way of choosing."""


for _public in (
    CogView2PipelineOutput,
    CogView2PreviewOutput,
    CogView2InpaintPipelineOutput,
    CogView2CaptionPipelineOutput,
):
    _public.__module__ = "cogview_pipelines"
