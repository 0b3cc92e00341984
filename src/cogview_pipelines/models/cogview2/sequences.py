"""
Token order, position ids, attention masks and labels of every task of CogView2, for generation and for training alike.

What they are written with is in `generation/token_sequence.py`; what is drawn in training only, in
`training/samples_cogview2.py`.

Source: the CogView2 release; the paper (https://arxiv.org/abs/2204.14217) describes the strategies in section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...generation.token_sequence import (
    IGNORED_LABEL,
    TokenSequence,
    extend_mask,
    isolate_padding,
    pad_text,
    prefix_causal_mask,
)


@dataclass(frozen=True)
class SequenceLayout:
    """
    Where things stand in the sequences of one model family.

    Args:
        image_grid (`tuple[int, int]`): Rows and columns of the low-resolution tokens (release: 20 x 20).
        image_position (`int`): Position id of `<start_of_image>`; image token `i` has `image_position + 1 + i`
            (release: 512).
        boi_token_id (`int`): `<start_of_image>`, which also marks the tokens that super-resolution has yet to predict.
        num_image_tokens (`int`): Size of the image vocabulary; text ids start here.
    """

    image_grid: tuple[int, int]
    image_position: int
    boi_token_id: int
    num_image_tokens: int

    @property
    def image_length(self) -> int:
        """Number of low-resolution image tokens (release: 400)."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def image_positions(self) -> torch.Tensor:
        """Position ids of the image tokens in raster order, shape `(image_length,)`."""
        return self.image_position + 1 + torch.arange(self.image_length)


def text_to_image(
    texts: Sequence[Sequence[int]], layout: SequenceLayout, image_tokens: torch.Tensor | None = None
) -> TokenSequence:
    """
    `[padding] text <start_of_image> [image tokens]`: text sees text; the rest sees text and, causally, itself.

    Args:
        texts (sequence of sequences of `int`): Token ids of each text, without `<start_of_image>`.
        layout (`SequenceLayout`): Where things stand.
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`, *optional*):
            Image tokens in raster order, to read the whole sequence at once; without them this is the context for
            `generate`.
    """
    ids, positions, is_text = pad_text(texts)
    batch_size = len(texts)
    ids = torch.cat([ids, torch.full((batch_size, 1), layout.boi_token_id)], 1)
    positions = torch.cat([positions, torch.full((batch_size, 1), layout.image_position)], 1)
    if image_tokens is not None:
        image_tokens = image_tokens.reshape(batch_size, -1)
        ids = torch.cat([ids, image_tokens], 1)
        positions = torch.cat([positions, layout.image_positions[: image_tokens.shape[1]].expand(batch_size, -1)], 1)
    rest = ids.shape[1] - is_text.shape[1]
    padding, text = extend_mask(~is_text, rest, False), extend_mask(is_text, rest, False)
    mask = isolate_padding(prefix_causal_mask(text, ~padding & ~text), padding)
    return TokenSequence(ids, positions, mask, text, ~padding)


def caption(
    image_tokens: torch.Tensor,
    start_token_ids: Sequence[int],
    layout: SequenceLayout,
    texts: Sequence[Sequence[int]] | None = None,
) -> TokenSequence:
    """
    `image tokens, start token [text, padding]`: all rows see the image; start token and text are causal in themselves.

    With `texts`, the labels are the text tokens, each predicted at the position before it; there is no end token.

    Args:
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`): Low-resolution tokens in raster order.
        start_token_ids (sequence of `int`): `<start_of_english>` or `<start_of_chinese>` of each image.
        layout (`SequenceLayout`): Where things stand.
        texts (sequence of sequences of `int`, *optional*): Texts to score; without them this is the context for
            `generate`.
    """
    batch_size = image_tokens.shape[0]
    image_tokens = image_tokens.reshape(batch_size, -1)
    ids = torch.as_tensor(start_token_ids).reshape(batch_size, 1)
    is_text = torch.ones_like(ids, dtype=torch.bool)
    if texts is not None:
        mirrored_ids, _, mirrored_mask = pad_text([list(text)[::-1] for text in texts])  # pads on the right
        ids = torch.cat([ids, mirrored_ids.flip(1)], 1)
        is_text = torch.cat([is_text, mirrored_mask.flip(1)], 1)
    text_positions = torch.arange(ids.shape[1]).expand(batch_size, -1)
    positions = torch.cat([layout.image_positions.expand(batch_size, -1), text_positions * is_text], 1)
    ids = torch.cat([image_tokens, ids], 1)
    text = torch.cat([torch.zeros_like(image_tokens, dtype=torch.bool), is_text], 1)
    image = torch.zeros_like(text)
    image[:, : image_tokens.shape[1]] = True
    padding = ~text & ~image
    mask = isolate_padding(prefix_causal_mask(image, text), padding)
    labels = None
    if texts is not None:
        labels = torch.full_like(ids, IGNORED_LABEL)
        predicted = text[:, 1:] & text[:, :-1]
        labels[:, :-1][predicted] = ids[:, 1:][predicted]
    return TokenSequence(ids, positions, mask, text, ~padding, labels)


@dataclass
class CompletionTask:
    """
    Cells to fill in, as a context that is read at once and entries that are appended one by one.

    Args:
        context (`TokenSequence`): Text, `<start_of_image>`, and the known cells that do not stand left of a hole.
        entries (`torch.Tensor` of shape `(batch_size, num_entries)`): Known tokens to append, and -1 where one is
            generated.
        cells (`torch.Tensor` of shape `(num_entries,)`): Raster index of the cell of each entry.
        positions (`torch.Tensor` of shape `(num_entries,)`): Position id of each entry.
    """

    context: TokenSequence
    entries: torch.Tensor
    cells: torch.Tensor
    positions: torch.Tensor

    def whole_sequence(self) -> TokenSequence:
        """Context and entries as one sequence under its whole mask."""
        context, (batch_size, num_entries) = self.context, self.entries.shape
        length = context.input_ids.shape[1] + num_entries
        mask = torch.zeros(batch_size, length, length, dtype=torch.bool)
        mask[:, :-num_entries, :-num_entries] = context.attention_mask
        mask[:, -num_entries:, :-num_entries] = context.key_mask[:, None]
        mask[:, -num_entries:, -num_entries:] = torch.ones(num_entries, num_entries, dtype=torch.bool).tril()
        return TokenSequence(
            torch.cat([context.input_ids, self.entries], 1),
            torch.cat([context.position_ids, self.positions.expand(batch_size, -1)], 1),
            mask,
            extend_mask(context.text_mask, num_entries, False),
            extend_mask(context.key_mask, num_entries, True),
        )


def completion(
    texts: Sequence[Sequence[int]], image_tokens: torch.Tensor, mask: torch.Tensor, layout: SequenceLayout
) -> CompletionTask:
    """
    `[padding] text <start_of_image> context cells | entries`: cells to regenerate come last, after left neighbours.

    An entry is a masked cell, or a known cell whose right neighbour in the same row is masked: the transformer
    predicts an entry from the one before it, so a hole is best predicted from the cell on its left. All other known
    cells are context, seen by all but text.

    Args:
        texts (sequence of sequences of `int`): Token ids of each text, without `<start_of_image>`.
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`): Low-resolution tokens in raster order.
        mask (`torch.Tensor` of shape `(rows, columns)`): True = generate this cell anew; some True and some False.
        layout (`SequenceLayout`): Where things stand.

    Raises:
        ValueError: If `mask` does not fit the grid, or masks nothing or everything.
    """
    if tuple(mask.shape) != layout.image_grid or mask.dtype != torch.bool:
        raise ValueError(
            f"`mask` must be boolean of shape {layout.image_grid}, but is {mask.dtype} of shape {tuple(mask.shape)}."
        )
    if not mask.any():
        raise ValueError("`mask` marks no cell to generate. Mark at least one.")
    if mask.all():
        raise ValueError("`mask` marks every cell, so nothing is left to complete. Use text-to-image instead.")
    batch_size = len(texts)
    image_tokens = image_tokens.reshape(batch_size, -1)
    left_of_hole = torch.zeros_like(mask)
    left_of_hole[:, :-1] = mask[:, 1:] & ~mask[:, :-1]
    is_entry = (mask | left_of_hole).flatten()
    cells = is_entry.nonzero()[:, 0]
    entries = torch.where(mask.flatten(), -1, image_tokens)[:, cells]
    known = (~is_entry).nonzero()[:, 0]

    start = text_to_image(texts, layout)
    ids = torch.cat([start.input_ids, image_tokens[:, known]], 1)
    positions = torch.cat([start.position_ids, layout.image_positions[known].expand(batch_size, -1)], 1)
    before = start.input_ids.shape[1]
    context_mask = torch.zeros(batch_size, ids.shape[1], ids.shape[1], dtype=torch.bool)
    context_mask[:, :before, :before] = start.attention_mask
    context_mask[:, before:] = extend_mask(start.key_mask, len(known), True)[:, None]
    context = TokenSequence(
        ids,
        positions,
        context_mask,
        extend_mask(start.text_mask, len(known), False),
        extend_mask(start.key_mask, len(known), True),
    )
    return CompletionTask(context, entries, cells, layout.image_positions[cells])


def direct_super_resolution(
    texts: Sequence[Sequence[int]], image_tokens: torch.Tensor, num_text_slots: int, layout: SequenceLayout
) -> TokenSequence:
    """
    The context of direct super-resolution: `padding text` in fixed slots, then the low-resolution tokens.

    Nothing stands between text and tokens. Text sees text; image tokens see text and the whole image; padding sees
    padding and text. No row sees padding but padding.

    Args:
        texts (sequence of sequences of `int`): Token ids of each text, without `<start_of_image>`.
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`): Low-resolution tokens in raster order.
        num_text_slots (`int`): Slots for text and padding (release: 96).
        layout (`SequenceLayout`): Where things stand.
    """
    ids, positions, is_text = pad_text(texts, num_text_slots)
    batch_size, image_length = len(texts), layout.image_length
    text, padding = extend_mask(is_text, image_length, False), extend_mask(~is_text, image_length, False)
    kinds = text.to(torch.int8) - padding.to(torch.int8)
    mask = kinds[:, :, None] == kinds[:, None, :]  # each kind of rows sees its own kind of columns, and
    mask.view(torch.uint8).bitwise_or_(text[:, None, :].view(torch.uint8))  # text; bytes, which are vectorised
    return TokenSequence(
        torch.cat([ids, image_tokens.reshape(batch_size, -1)], 1),
        torch.cat([positions, layout.image_positions.expand(batch_size, -1)], 1),
        mask,
        text,
        ~padding,
    )


def iterative_super_resolution(texts: Sequence[Sequence[int]], num_text_slots: int) -> TokenSequence:
    """
    The context of iterative super-resolution: the first `num_text_slots` tokens of each text (release: 16).

    Texts are right-aligned. Every row sees all text and no padding; with an empty text every key is masked, and the
    canvas sees itself only.
    """
    ids, positions, is_text = pad_text([list(text)[:num_text_slots] for text in texts], num_text_slots)
    mask = is_text[:, None, :].expand(-1, num_text_slots, -1)
    return TokenSequence(ids, positions, mask, is_text, is_text)
