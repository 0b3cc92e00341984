"""
Token order, position ids and masks of every task of CogView, for generation and for training alike.

All of it is causal, text included. What is only drawn in training stands in `training/samples_cogview.py`.

Source: the CogView release; the paper (https://arxiv.org/abs/2105.13290), section 2.3, and 3.2 on super-resolution.
Where they differ, the release's weights decide: a picture of 16 x 16 tokens is announced by `[BASE]`, too, and while
super-resolution generates, `[ROI2]` keeps the position that it has in the sequence, whereas in training positions
start again from 0 on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...generation.token_sequence import IGNORED_LABEL, TokenSequence, extend_mask, isolate_padding
from .tokenization_cogview import COMMAND_TOKENS, SIZE_TOKENS, TO_GENERATE

# What stands around two pictures besides the text: [ROI1] [BASE] [BOI1] and [EOI1] [ROI2] [POS0] [BASE] [BOI2].
SECOND_PICTURE = ("[EOI1]", "[ROI2]", "[POS0]", "[BASE]", "[BOI2]")


@dataclass(frozen=True)
class SequenceLayout:
    """
    Where things stand in CogView's sequences.

    Args:
        image_grid (`tuple[int, int]`): Rows and columns of the tokens of a picture (release: 32 x 32).
        num_image_tokens (`int`): Size of the image vocabulary; text ids start here.
        command_token_id (`int`): Id of `[PAD]`, the first command token; text ids end here.
        max_length (`int`): The longest sequence with one picture (release: 1,089).
        max_super_resolution_length (`int`): The longest sequence with two pictures (release: 1,345).
    """

    image_grid: tuple[int, int]
    num_image_tokens: int
    command_token_id: int
    max_length: int
    max_super_resolution_length: int

    def command(self, token: str) -> int:
        """The id of a command token."""
        return self.command_token_id + COMMAND_TOKENS.index(token)

    @property
    def image_length(self) -> int:
        """Number of tokens of a picture (release: 1,024)."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def coarse_grid(self) -> tuple[int, int]:
        """Rows and columns of what super-resolution starts from: half of a picture's (release: 16 x 16)."""
        return self.image_grid[0] // 2, self.image_grid[1] // 2

    @property
    def coarse_length(self) -> int:
        """Number of tokens that super-resolution starts from (release: 256)."""
        return self.coarse_grid[0] * self.coarse_grid[1]

    @property
    def max_text_tokens(self) -> int:
        """The longest text of a picture (release: 62)."""
        return self.max_length - 3 - self.image_length

    @property
    def max_caption_tokens(self) -> int:
        """The longest text behind a picture (release: 61)."""
        return self.max_length - 4 - self.image_length

    @property
    def max_super_resolution_text_tokens(self) -> int:
        """The longest text of super-resolution (release: 57)."""
        length = self.max_super_resolution_length - 3 - len(SECOND_PICTURE)
        return length - self.coarse_length - self.image_length

    def size_token(self, rows: int) -> int:
        """The command that announces a picture of so many rows; of a size without one, `[BASE]`."""
        return self.command(SIZE_TOKENS.get(rows, "[BASE]"))


def causal_mask(is_padding: torch.Tensor) -> torch.Tensor:
    """`(batch_size, length)` -> `(batch_size, length, length)`: each sees itself and what is before it; no padding."""
    length = is_padding.shape[-1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=is_padding.device).tril()
    return isolate_padding(earlier.expand(*is_padding.shape[:-1], -1, -1), is_padding)


def pad_left(rows: Sequence[Sequence[int]], layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids, right-aligned after `[PAD]`, and the mask of padding, each `(batch_size, longest)`."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), layout.command("[PAD]"))
    is_padding = torch.ones(len(rows), longest, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.as_tensor(tokens, dtype=torch.long)
        is_padding[row, longest - len(tokens) :] = False
    return ids, is_padding


def ordinary_positions(is_padding: torch.Tensor) -> torch.Tensor:
    """0, 1, ... from the first token of each row; padding 0."""
    return ((~is_padding).long().cumsum(-1) - 1).clamp(min=0)


def check_text_length(texts: Sequence[Sequence[int]], max_text_tokens: int, what: str = "texts") -> None:
    """
    Raises:
        ValueError: If a text has more tokens than fit; the message says how many do.
    """
    for index, text in enumerate(texts):
        if len(text) > max_text_tokens:
            raise ValueError(
                f"`{what}` may have {max_text_tokens} tokens each, but number {index} has {len(text)}. Shorten it."
            )


def _text_mask(ids: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """True at pieces, and at words that were added behind the command tokens."""
    end = layout.command_token_id + len(COMMAND_TOKENS)
    return (ids >= layout.num_image_tokens) & ((ids < layout.command_token_id) | (ids >= end))


def text_to_image(
    texts: Sequence[Sequence[int]], layout: SequenceLayout, image_tokens: torch.Tensor | None = None
) -> TokenSequence:
    """
    `[padding] [ROI1] text [BASE] [BOI1] [image tokens]`, causal throughout, positions from 0.

    Args:
        texts (sequence of sequences of `int`): Token ids of each text.
        layout (`SequenceLayout`): Where things stand.
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`, *optional*):
            Image tokens in raster order, to read the whole sequence at once; without them this is the context for
            `generate`.

    Raises:
        ValueError: If a text is too long.
    """
    check_text_length(texts, layout.max_text_tokens)
    start, end = [layout.command("[ROI1]")], [layout.command("[BASE]"), layout.command("[BOI1]")]
    ids, is_padding = pad_left([start + list(text) + end for text in texts], layout)
    if image_tokens is not None:
        image_tokens = image_tokens.reshape(len(texts), -1)
        ids = torch.cat([ids, image_tokens], 1)
        is_padding = extend_mask(is_padding, image_tokens.shape[1], False)
    positions = ordinary_positions(is_padding)
    return TokenSequence(ids, positions, causal_mask(is_padding), _text_mask(ids, layout), ~is_padding)


def image_positions(context: TokenSequence, num_entries: int) -> torch.Tensor:
    """Position ids of what follows a context of [`text_to_image`] or [`caption`]: `(batch_size, num_entries)`."""
    return context.position_ids[:, -1:] + 1 + torch.arange(num_entries)


def caption(
    image_tokens: torch.Tensor, layout: SequenceLayout, texts: Sequence[Sequence[int]] | None = None
) -> TokenSequence:
    """
    `[BASE] [BOI1] image tokens [EOI1] [ROI1] [text] [padding]`: the order of captions and of their scores.

    With `texts`, the labels are the text tokens, each predicted at the position before it.

    Args:
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`): Tokens in raster order.
        layout (`SequenceLayout`): Where things stand.
        texts (sequence of sequences of `int`, *optional*): Texts to score; without them this is the context for
            `generate`.

    Raises:
        ValueError: If a text is too long.
    """
    batch_size = len(image_tokens)
    image_tokens = image_tokens.reshape(batch_size, -1)

    def commands(*tokens: str) -> torch.Tensor:
        return torch.tensor([layout.command(token) for token in tokens]).expand(batch_size, -1)

    ids = torch.cat([commands("[BASE]", "[BOI1]"), image_tokens, commands("[EOI1]", "[ROI1]")], 1)
    num_given = ids.shape[1]
    is_padding = torch.zeros_like(ids, dtype=torch.bool)
    if texts is not None:
        check_text_length(texts, layout.max_length - num_given)
        # on the right: mirrored, padding on the left is padding on the right
        mirrored, mirrored_padding = pad_left([list(text)[::-1] for text in texts], layout)
        ids = torch.cat([ids, mirrored.flip(1)], 1)
        is_padding = torch.cat([is_padding, mirrored_padding.flip(1)], 1)
    positions = ordinary_positions(is_padding) * ~is_padding
    labels = None
    if texts is not None:
        labels = torch.full_like(ids, IGNORED_LABEL)
        following = ids[:, num_given:].masked_fill(is_padding[:, num_given:], IGNORED_LABEL)
        labels[:, num_given - 1 : -1] = following
    return TokenSequence(ids, positions, causal_mask(is_padding), _text_mask(ids, layout), ~is_padding, labels)


def super_resolution(
    texts: Sequence[Sequence[int]], coarse_tokens: torch.Tensor, layout: SequenceLayout
) -> TokenSequence:
    """
    The context of super-resolution: `[ROI1] text [BASE] [BOI1] tokens [EOI1] [ROI2] [POS0] [BASE] [BOI2]`.

    Positions count up to `[ROI2]` and go on with 1 after it; cell `i` of the finer picture has [`fine_positions`].

    Args:
        texts (sequence of sequences of `int`): Token ids of each text.
        coarse_tokens (`torch.Tensor` of shape `(batch_size, coarse_length)`): Tokens to make finer, raster order.
        layout (`SequenceLayout`): Where things stand.

    Raises:
        ValueError: If a text is too long.
    """
    check_text_length(texts, layout.max_super_resolution_text_tokens)
    start, middle = [layout.command("[ROI1]")], [layout.command("[BASE]"), layout.command("[BOI1]")]
    second = torch.tensor([layout.command(token) for token in SECOND_PICTURE]).expand(len(texts), -1)
    ids, is_padding = pad_left([start + list(text) + middle for text in texts], layout)
    coarse_tokens = coarse_tokens.reshape(len(texts), -1)
    ids = torch.cat([ids, coarse_tokens, second], 1)
    is_padding = extend_mask(is_padding, ids.shape[1] - is_padding.shape[1], False)
    positions = ordinary_positions(is_padding)
    after = len(SECOND_PICTURE) - 1 - SECOND_PICTURE.index("[ROI2]")
    positions[:, -after:] = 1 + torch.arange(after)
    return TokenSequence(ids, positions, causal_mask(is_padding), _text_mask(ids, layout), ~is_padding)


def fine_positions(layout: SequenceLayout) -> torch.Tensor:
    """Position ids of the tokens that follow a context of [`super_resolution`]: `(image_length,)`."""
    first = len(SECOND_PICTURE) - SECOND_PICTURE.index("[ROI2]")
    return first + torch.arange(layout.image_length)


def restarted_positions(input_ids: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """
    Position ids of training super-resolution: 0, 1, ... and again from 0 on the first `[ROI2]` of each row.

    What is beyond the position table gets its last row.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, length)`): Token ids.
        layout (`SequenceLayout`): Where things stand.

    Raises:
        ValueError: If a row has no `[ROI2]`.
    """
    found = input_ids == layout.command("[ROI2]")
    if not found.any(1).all():
        row = int((~found.any(1)).nonzero()[0, 0])
        raise ValueError(
            f"`input_ids` must have [ROI2] in every row to train super-resolution, but row {row} has none."
        )
    restart = found.long().argmax(1, keepdim=True)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    positions = torch.where(positions < restart, positions, positions - restart)
    return positions.clamp(max=layout.max_length - 1)


# Sliding windows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlidingWindow:
    """
    One step of super-resolution from one picture's tokens to four times as many.

    Args:
        row, column (`int`): Which of the 3 x 3 windows; it begins half a window further for each.
        num_rows (`int`): Rows of the finer tokens that it writes, from its top.
    """

    row: int
    column: int
    num_rows: int

    def coarse(self, layout: SequenceLayout) -> tuple[slice, slice]:
        """Rows and columns of the tokens it sees: half as many each way as a picture has."""
        return self._cells(layout, 4, layout.coarse_grid)

    def fine(self, layout: SequenceLayout) -> tuple[slice, slice]:
        """Rows and columns of the finer tokens it writes, or finds there."""
        return self._cells(layout, 2, (self.num_rows, layout.image_grid[1]))

    def _cells(self, layout: SequenceLayout, parts: int, size: tuple[int, int]) -> tuple[slice, slice]:
        top = self.row * layout.image_grid[0] // parts
        left = self.column * layout.image_grid[1] // parts
        return slice(top, top + size[0]), slice(left, left + size[1])


def sliding_windows(layout: SequenceLayout) -> list[SlidingWindow]:
    """
    The nine windows in their order: centre-continuous, which is to say that the middle of the picture is written
    before its last column, and the band around a border of windows by a window in whose inside it lies.

    The first rows are cut off short of a window's end, whose last rows would see nothing below them.
    """
    rows = layout.image_grid[0]
    margin = max(1, rows // 16)
    first, later, last = rows // 2 + margin, rows - margin, rows
    order = ((0, 0, first), (0, 1, later), (0, 2, later), (1, 1, later), (1, 0, later), (1, 2, later))
    return [SlidingWindow(*window) for window in (*order, *((2, column, last) for column in range(3)))]


def window_rounds(layout: SequenceLayout) -> list[list[int]]:
    """
    The windows of [`sliding_windows`] in rounds, each of which needs only what the rounds before it wrote.

    A window waits for those before it in the order that share cells with it; all others may be computed side by side.
    """
    windows = sliding_windows(layout)
    areas = []
    for window in windows:
        rows, columns = window.fine(layout)
        areas.append((rows.start, rows.stop, columns.start, columns.stop))
    rounds: list[int] = []
    for index, (top, bottom, left, right) in enumerate(areas):
        shared = [
            rounds[other]
            for other, (top2, bottom2, left2, right2) in enumerate(areas[:index])
            if top < bottom2 and top2 < bottom and left < right2 and left2 < right
        ]
        rounds.append(max(shared, default=-1) + 1)
    return [[index for index, found in enumerate(rounds) if found == number] for number in range(max(rounds) + 1)]


def window_entries(fine_tokens: torch.Tensor, window: SlidingWindow, layout: SequenceLayout) -> torch.Tensor:
    """
    What follows the context of a window: its cells in raster order, those already written as they are, -1 elsewhere.

    Args:
        fine_tokens (`torch.Tensor` of shape `(batch_size, rows, columns)`): The finer tokens so far; -1 = not yet.
    """
    rows, columns = window.fine(layout)
    return fine_tokens[:, rows, columns].flatten(1)


def unwritten(batch_size: int, layout: SequenceLayout, device: torch.device | str = "cpu") -> torch.Tensor:
    """The finer tokens before the first window: -1 throughout, twice a picture's rows and columns."""
    shape = (batch_size, 2 * layout.image_grid[0], 2 * layout.image_grid[1])
    return torch.full(shape, TO_GENERATE, device=device)
