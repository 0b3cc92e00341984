"""
Token order, position ids, attention masks and labels of every task, for generation and for training alike.

Masks are boolean, True = the row may attend to the column. Left padding of shorter texts in a batch attends to itself, so that no
softmax is over nothing, and nothing else attends to it.

Source: the CogView2 release; the paper (https://arxiv.org/abs/2204.14217) describes the strategies in section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED_LABEL = -100


@dataclass(frozen=True)
class SequenceLayout:
    """
    Where things stand in the sequences of one model family.

    Args:
        image_grid (`tuple[int, int]`): Rows and columns of the low-resolution tokens (release: 20 x 20).
        image_position (`int`): Position id of `<start_of_image>`; image token `i` has `image_position + 1 + i` (release: 512).
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


@dataclass
class TokenSequence:
    """
    What the transformer reads.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, length)`): Token ids.
        position_ids (`torch.Tensor` of shape `(batch_size, length)`): Position ids.
        attention_mask (`torch.Tensor` of shape `(batch_size, length, length)`): True = row may attend to column.
        text_mask (`torch.Tensor` of shape `(batch_size, length)`): True at the text keys, which `text_attention_bias` strengthens.
        key_mask (`torch.Tensor` of shape `(batch_size, length)`): True where later tokens may attend: all but padding.
        labels (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            What each position is trained to predict (the token after it, not shifted again), -100 where there is no loss.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    text_mask: torch.Tensor
    key_mask: torch.Tensor
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice) -> "TokenSequence":
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> "TokenSequence":
        """The same sequences on another device."""
        return self._map(lambda value: value.to(device))

    def repeat_interleave(self, repeats: int) -> "TokenSequence":
        """Every sequence `repeats` times in a row."""
        return self._map(lambda value: value.repeat_interleave(repeats, 0))

    def _map(self, function) -> "TokenSequence":
        return TokenSequence(*(None if value is None else function(value) for value in vars(self).values()))


def stack(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """Join sequences of one length into a batch."""
    columns = zip(*(vars(sequence).values() for sequence in sequences))
    return TokenSequence(*(None if column[0] is None else torch.cat(column) for column in columns))


def prefix_causal_mask(prefix: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """
    The mask of text-to-image and captioning: all rows see the prefix, and causal rows also see causal columns up to themselves.

    Args:
        prefix, causal (`torch.Tensor` of shape `(..., length)`): Which positions belong to which part; boolean.

    Returns:
        `torch.Tensor` of shape `(..., length, length)`.
    """
    length = prefix.shape[-1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril()
    return prefix[..., None, :] | (causal[..., :, None] & causal[..., None, :] & earlier)


def pad_text(
    texts: Sequence[Sequence[int]], num_slots: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Right-align texts in `num_slots` slots (default: the length of the longest), filling up with id 0 on the left.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Ids, position ids (0, 1, ... from the first token of each text, padding 0)
        and the mask of real tokens, each of shape `(batch_size, num_slots)`.
    """
    longest = max(map(len, texts))
    num_slots = longest if num_slots is None else num_slots
    if longest > num_slots:
        raise ValueError(f"`texts` may have {num_slots} tokens each, but one has {longest}. Shorten it.")
    ids = torch.zeros(len(texts), num_slots, dtype=torch.long)
    mask = torch.zeros(len(texts), num_slots, dtype=torch.bool)
    for row, text in enumerate(texts):
        start = num_slots - len(text)
        ids[row, start:] = torch.as_tensor(text, dtype=torch.long)
        mask[row, start:] = True
    return ids, (mask.long().cumsum(-1) - 1).clamp(min=0), mask


def _isolate_padding(mask: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Let rows of padding attend to themselves only, and nothing else to them."""
    return (mask & ~padding[..., :, None] & ~padding[..., None, :]) | torch.diag_embed(padding)


def _extend(mask: torch.Tensor, columns: int, value: bool) -> torch.Tensor:
    """Append constant columns to a `(batch_size, length)` mask."""
    return torch.cat([mask, mask.new_full((mask.shape[0], columns), value)], 1)


def text_to_image(
    texts: Sequence[Sequence[int]], layout: SequenceLayout, image_tokens: torch.Tensor | None = None
) -> TokenSequence:
    """
    `[padding] text <start_of_image> [image tokens]`: text sees text; the rest sees text and, causally, itself.

    Args:
        texts (sequence of sequences of `int`): Token ids of each text, without `<start_of_image>`.
        layout (`SequenceLayout`): Where things stand.
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`, *optional*):
            Image tokens in raster order, to read the whole sequence at once; without them this is the context for `generate`.
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
    padding, text = _extend(~is_text, rest, False), _extend(is_text, rest, False)
    mask = _isolate_padding(prefix_causal_mask(text, ~padding & ~text), padding)
    return TokenSequence(ids, positions, mask, text, ~padding)


def caption(
    image_tokens: torch.Tensor,
    start_token_ids: Sequence[int],
    layout: SequenceLayout,
    texts: Sequence[Sequence[int]] | None = None,
) -> TokenSequence:
    """
    `image tokens, start token [text, padding]`: all rows see the whole image; start token and text are causal among themselves.

    With `texts`, the labels are the text tokens, each predicted at the position before it; there is no end token.

    Args:
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`): Low-resolution tokens in raster order.
        start_token_ids (sequence of `int`): `<start_of_english>` or `<start_of_chinese>` of each image.
        layout (`SequenceLayout`): Where things stand.
        texts (sequence of sequences of `int`, *optional*): Texts to score; without them this is the context for `generate`.
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
    mask = _isolate_padding(prefix_causal_mask(image, text), padding)
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
        entries (`torch.Tensor` of shape `(batch_size, num_entries)`): Known tokens to append, and -1 where one is generated.
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
            _extend(context.text_mask, num_entries, False),
            _extend(context.key_mask, num_entries, True),
        )


def completion(
    texts: Sequence[Sequence[int]], image_tokens: torch.Tensor, mask: torch.Tensor, layout: SequenceLayout
) -> CompletionTask:
    """
    `[padding] text <start_of_image> context cells | entries`: cells to regenerate come last, each hole after its left neighbour.

    An entry is a masked cell, or a known cell whose right neighbour in the same row is masked: the transformer predicts an entry from
    the one before it, so a hole is best predicted from the cell on its left. All other known cells are context, seen by all but text.

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
    context_mask[:, before:] = _extend(start.key_mask, len(known), True)[:, None]
    context = TokenSequence(
        ids,
        positions,
        context_mask,
        _extend(start.text_mask, len(known), False),
        _extend(start.key_mask, len(known), True),
    )
    return CompletionTask(context, entries, cells, layout.image_positions[cells])


def direct_super_resolution(
    texts: Sequence[Sequence[int]], image_tokens: torch.Tensor, num_text_slots: int, layout: SequenceLayout
) -> TokenSequence:
    """
    The context of direct super-resolution: `padding text` in fixed slots, then the low-resolution tokens, without a token between.

    Text sees text; image tokens see text and the whole image; padding sees padding and text. No row sees padding but padding.

    Args:
        texts (sequence of sequences of `int`): Token ids of each text, without `<start_of_image>`.
        image_tokens (`torch.Tensor` of shape `(batch_size, image_length)`): Low-resolution tokens in raster order.
        num_text_slots (`int`): Slots for text and padding (release: 96).
        layout (`SequenceLayout`): Where things stand.
    """
    ids, positions, is_text = pad_text(texts, num_text_slots)
    batch_size, image_length = len(texts), layout.image_length
    text, padding = _extend(is_text, image_length, False), _extend(~is_text, image_length, False)
    image = ~text & ~padding
    mask = text[:, None, :] | (image[:, :, None] & image[:, None, :]) | (padding[:, :, None] & padding[:, None, :])
    return TokenSequence(
        torch.cat([ids, image_tokens.reshape(batch_size, -1)], 1),
        torch.cat([positions, layout.image_positions.expand(batch_size, -1)], 1),
        mask,
        text,
        ~padding,
    )


def iterative_super_resolution(texts: Sequence[Sequence[int]], num_text_slots: int) -> TokenSequence:
    """
    The context of iterative super-resolution: the first `num_text_slots` tokens of each text (release: 16), right-aligned.

    Every row sees all text and no padding; with an empty text every key is masked, and the canvas sees itself only.
    """
    ids, positions, is_text = pad_text([list(text)[:num_text_slots] for text in texts], num_text_slots)
    mask = is_text[:, None, :].expand(-1, num_text_slots, -1)
    return TokenSequence(ids, positions, mask, is_text, is_text)
