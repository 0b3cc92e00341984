"""
Training samples of CogView: the orders of tokens in training, batches, and the weights of their labels.

Every label is the token after its position, padding has none, and text can weigh more than pictures.

Source: the CogView release, and the paper (https://arxiv.org/abs/2105.13290), section 2.3.
"""

import math
from collections.abc import Sequence

import torch

from ..generation.token_sequence import IGNORED_LABEL
from ..models.cogview.sequences import SequenceLayout


def text_and_picture(text: Sequence[int], codes: Sequence[int], layout: SequenceLayout) -> list[int]:
    """
    `[ROI1] text size [BOI1] codes [EOI1]`: a sample of pretraining.

    Args:
        text (sequence of `int`): Token ids.
        codes (sequence of `int`): A square picture in raster order; its side chooses the size token.
        layout (`SequenceLayout`): Where things stand.
    """
    return [layout.command("[ROI1]"), *map(int, text), *_picture(codes, 1, layout)]


def two_pictures(
    text: Sequence[int], first: Sequence[int], second: Sequence[int], layout: SequenceLayout
) -> list[int]:
    """`[ROI1] text size [BOI1] codes [EOI1] size [BOI2] codes [EOI2]`: two pictures of one text."""
    return [*text_and_picture(text, first, layout), *_picture(second, 2, layout)]


def picture_and_part(
    text: Sequence[int], picture: Sequence[int], part: Sequence[int], position: int, layout: SequenceLayout
) -> list[int]:
    """
    `[ROI1] text size [BOI1] codes [EOI1] [ROI2] [POSp] size [BOI2] codes [EOI2]`: a sample of super-resolution.

    Args:
        text (sequence of `int`): Token ids.
        picture, part (sequence of `int`): The whole picture, and a part of it at more pixels a token.
        position (`int`): Which of 3 x 3 parts, row by row.
        layout (`SequenceLayout`): Where things stand.
    """
    between = [layout.command("[ROI2]"), layout.command(f"[POS{position}]")]
    return [*text_and_picture(text, picture, layout), *between, *_picture(part, 2, layout)]


def picture_and_text(codes: Sequence[int], text: Sequence[int], layout: SequenceLayout) -> list[int]:
    """`size [BOI1] codes [EOI1] [ROI1] text`: a sample of captioning."""
    return [*_picture(codes, 1, layout), layout.command("[ROI1]"), *map(int, text)]


def _picture(codes: Sequence[int], index: int, layout: SequenceLayout) -> list[int]:
    size = layout.size_token(math.isqrt(len(codes)))
    return [size, layout.command(f"[BOI{index}]"), *map(int, codes), layout.command(f"[EOI{index}]")]


def make_batch(
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
