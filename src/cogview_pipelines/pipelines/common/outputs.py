"""What calls of all pipelines tell of their stages, and show meanwhile."""

from dataclasses import dataclass

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
