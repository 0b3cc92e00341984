"""
Training samples of CogView: the orders of tokens in training, batches, and the weights of their labels.

Every label is the token after its position, padding has none, and text can weigh more than pictures.

Source: the CogView release, and the paper (https://arxiv.org/abs/2105.13290), section 2.3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..generation.token_sequence import IGNORED_LABEL
from ..models.cogview.sequences import SequenceLayout, restarted_positions

# What pictures of a style are trained on: objects are then drawn in it by "a cat of oil painting style".
STYLE_CAPTIONS = {"en": "an image of {} style", "zh": "一张{}风格的图片"}


@dataclass
class CogViewBatch:
    """
    Training samples.

    Args:
        input_ids, position_ids (`torch.Tensor` of shape `(batch_size, length)`): What the model reads, causal.
        labels (`torch.Tensor` of shape `(batch_size, length)`): What each position predicts, -100 where nothing.
        label_weights (`torch.Tensor` of shape `(batch_size, length)`): By how much each label counts.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "CogViewBatch":
        """The same batch on another device."""
        return CogViewBatch(*(value.to(device) for value in vars(self).values()))


def style_caption(style: str, language: str) -> str:
    """
    What a picture is called by its style alone.

    Args:
        style (`str`): The name of the style.
        language (`str`): `"en"` or `"zh"`.

    Source: CogView (https://arxiv.org/abs/2105.13290), section 3.3; the Chinese wording is ours.
    """
    return STYLE_CAPTIONS[language].format(style)


def words_of_style(style: str, language: str) -> list[str]:
    """
    What [`style_caption`] is made of: the name of the style, and the words around it.

    They come apart because Chinese has no spaces: whoever reads the sentence as words would take them for one.
    """
    return [style, style_caption(" ", language)]


def text_and_picture(
    text: Sequence[int], codes: Sequence[int], layout: SequenceLayout, size: str | None = None
) -> list[int]:
    """
    `[ROI1] text size [BOI1] codes [EOI1]`: a sample of pretraining.

    Args:
        text (sequence of `int`): Token ids.
        codes (sequence of `int`): A square picture in raster order.
        layout (`SequenceLayout`): Where things stand.
        size (`str`, *optional*):
            The command that announces the picture, by default the one for its side, as in the release's data. While
            generating, that is always `"[BASE]"`.
    """
    return [layout.command("[ROI1]"), *map(int, text), *_picture(codes, 1, layout, size)]


def two_pictures(
    text: Sequence[int],
    first: Sequence[int],
    second: Sequence[int],
    layout: SequenceLayout,
    size: str | None = None,
) -> list[int]:
    """`[ROI1] text size [BOI1] codes [EOI1] size [BOI2] codes [EOI2]`: two pictures of one text."""
    return [*text_and_picture(text, first, layout, size), *_picture(second, 2, layout, size)]


def picture_and_part(
    text: Sequence[int],
    picture: Sequence[int],
    part: Sequence[int],
    position: int,
    layout: SequenceLayout,
    size: str | None = None,
) -> list[int]:
    """
    `[ROI1] text size [BOI1] codes [EOI1] [ROI2] [POSp] size [BOI2] codes [EOI2]`: a sample of super-resolution.

    Args:
        text (sequence of `int`): Token ids.
        picture, part (sequence of `int`): The whole picture, and a part of it at more pixels a token.
        position (`int`): Which of 3 x 3 parts, row by row.
        layout (`SequenceLayout`): Where things stand.
        size (`str`, *optional*): As for [`text_and_picture`], for both.
    """
    between = [layout.command("[ROI2]"), layout.command(f"[POS{position}]")]
    return [*text_and_picture(text, picture, layout, size), *between, *_picture(part, 2, layout, size)]


def picture_and_text(
    codes: Sequence[int], text: Sequence[int], layout: SequenceLayout, size: str | None = None
) -> list[int]:
    """`size [BOI1] codes [EOI1] [ROI1] text`: a sample of captioning; arguments as of [`text_and_picture`]."""
    return [*_picture(codes, 1, layout, size), layout.command("[ROI1]"), *map(int, text)]


def _picture(codes: Sequence[int], index: int, layout: SequenceLayout, size: str | None) -> list[int]:
    announced = layout.size_token(math.isqrt(len(codes))) if size is None else layout.command(size)
    return [announced, layout.command(f"[BOI{index}]"), *map(int, codes), layout.command(f"[EOI{index}]")]


def make_inputs_and_labels(
    samples: Sequence[Sequence[int]], length: int, layout: SequenceLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Samples as inputs and labels of one length.

    Args:
        samples (sequence of sequences of `int`): Token ids. What is longer than `length + 1` is cut off.
        length (`int`): Of the inputs (release: 1,088).
        layout (`SequenceLayout`): Where things stand.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Input ids, filled up with `[PAD]` behind, and labels, -100 where nothing
            is to be predicted; each `(batch_size, length)`.
    """
    tokens = torch.full((len(samples), length + 1), layout.command("[PAD]"))
    is_real = torch.zeros(len(samples), length + 1, dtype=torch.bool)
    for row, sample in enumerate(samples):
        sample = torch.as_tensor(sample, dtype=torch.long)[: length + 1]
        tokens[row, : len(sample)] = sample
        is_real[row, : len(sample)] = True
    return tokens[:, :-1], tokens[:, 1:].masked_fill(~is_real[:, 1:], IGNORED_LABEL)


def label_weights(input_ids: torch.Tensor, layout: SequenceLayout, text_weight: float = 1.0) -> torch.Tensor:
    """
    Weights for `CogViewModel.forward`: 1 where the input is an image token, `text_weight` elsewhere.

    The input decides, as in the release: the first token of a picture weighs as text, its end as a picture.
    """
    return torch.where(input_ids < layout.num_image_tokens, 1.0, text_weight)


def position_ids(input_ids: torch.Tensor, layout: SequenceLayout, restart_on_roi2: bool = True) -> torch.Tensor:
    """
    Position ids of training, for samples of all kinds: 0, 1, ..., and again in rows with `[ROI2]`, from it on.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, length)`): Token ids.
        layout (`SequenceLayout`): Where things stand.
        restart_on_roi2 (`bool`): `[ROI2]` itself has position 0, as in the release's training. Otherwise it has the
            next one, as while the release, and this package, generate. What comes after it is the same.
    """
    roi2 = input_ids == layout.command("[ROI2]")
    counted = torch.arange(input_ids.shape[1], device=input_ids.device).clamp(max=layout.max_length - 1)
    positions = counted.repeat(len(input_ids), 1)
    restarts = roi2.any(1)
    if restarts.any():
        positions[restarts] = restarted_positions(input_ids[restarts], layout)
    if not restart_on_roi2:
        first = roi2 & (roi2.cumsum(1) == 1)
        positions = torch.where(first, counted, positions)
    return positions
