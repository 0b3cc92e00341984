"""What pipelines of all families return, tell of their stages, and show meanwhile."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class StageStatistics:
    """
    Args:
        seconds (`float`): Time that a call spent in a stage, its callbacks included.
        peak_memory_bytes (`int`, *optional*):
            The most memory that was taken during it: by tensors on the GPU, or by the whole process on the CPU. `None`
            where that cannot be measured.
        num_passes (`int`, *optional*):
            How often the model read new tokens to write tokens, in all batches together; `None` where it does not
            write tokens one after another.
    """

    seconds: float
    peak_memory_bytes: int | None = None
    num_passes: int | None = None


@dataclass
class PreviewOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`): The pictures of one batch as they are so far; grey where nothing is written.
        tokens (`torch.Tensor` of shape `(batch_size, rows, columns)`): What they were decoded from; -1 where unknown.
        stage (`str`): The component that writes them, such as `"transformer"`.
        step (`int`): Counts the steps of a picture, of all stages.
        timestep (`int`): Counts the steps of the stage.
        image_indices (`list[int]`): Which of the call's pictures these are.
    """

    images: list[PIL.Image.Image]
    tokens: torch.Tensor
    stage: str
    step: int
    timestep: int
    image_indices: list[int]


@dataclass
class PicturesOutput(BaseOutput):
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
        scores (`list[float]`, *optional*): What the choice among candidates found of each picture; higher is better.
        statistics (`dict[str, StageStatistics]`, *optional*): With `return_statistics`, of each stage.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    tokens: torch.Tensor
    seeds: list[int]
    prompts: list[str] | None = None
    scores: list[float] | None = None
    statistics: dict[str, StageStatistics] | None = None


@dataclass
class CaptionsOutput(BaseOutput):
    """
    Args:
        captions (`list[str]`): Picture by picture.
        scores (`list[float]`): Of each caption; higher is better.
        token_ids (`list[list[int]]`): Of each caption.
        seeds (`list[int]`, *optional*): If captions were sampled, the seed of each.
        statistics (`dict[str, StageStatistics]`, *optional*): With `return_statistics`, of each stage.
    """

    captions: list[str]
    scores: list[float]
    token_ids: list[list[int]]
    seeds: list[int] | None = None
    statistics: dict[str, StageStatistics] | None = None
