"""
Token order, position ids, attention masks and labels of every task, for generation and for training alike.

Masks are boolean, True = the row may attend to the column. Left padding of shorter texts in a batch attends to itself,
so that no softmax is over nothing, and nothing else attends to it.

Source: the CogView2 release; the paper (https://arxiv.org/abs/2204.14217) describes the strategies in section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100


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


@dataclass
class TokenSequence:
    """
    What the transformer reads.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, length)`): Token ids.
        position_ids (`torch.Tensor` of shape `(batch_size, length)`): Position ids.
        attention_mask (`torch.Tensor` of shape `(batch_size, length, length)`): True = row may attend to column.
        text_mask (`torch.Tensor` of shape `(batch_size, length)`): True at the text keys, which `text_attention_bias`
            strengthens.
        key_mask (`torch.Tensor` of shape `(batch_size, length)`): True where later tokens may attend: all but padding.
        labels (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            What each position is trained to predict (the token after it, not shifted again), -100 where there is no
            loss.
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
    The mask of text-to-image and captioning: all see the prefix, causal rows also causal columns up to themselves.

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
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Ids, position ids (0, 1, ... from the first token of each
            text, padding 0) and the mask of real tokens, each of shape `(batch_size, num_slots)`.
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
            _extend(context.text_mask, num_entries, False),
            _extend(context.key_mask, num_entries, True),
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
    The context of iterative super-resolution: the first `num_text_slots` tokens of each text (release: 16).

    Texts are right-aligned. Every row sees all text and no padding; with an empty text every key is masked, and the
    canvas sees itself only.
    """
    ids, positions, is_text = pad_text([list(text)[:num_text_slots] for text in texts], num_text_slots)
    mask = is_text[:, None, :].expand(-1, num_text_slots, -1)
    return TokenSequence(ids, positions, mask, is_text, is_text)


# Training samples of CogLM -------------------------------------------------------------------------------------------
#
# A row of training data is `text <pad> [text in another language <pad>] ... image tokens`, filled up with <pad> before
# the image, or text only. The functions below take the random choices as arguments; `draw_patch_corners` and
# `draw_text_spans` make them.

MASKED_IMAGE_SHARE = 0.8
MASKED_TEXT_SHARE = 0.15


def split_row(row: torch.Tensor, layout: SequenceLayout, pad_token_id: int) -> tuple[list[slice], slice]:
    """
    Find the texts and the image in a row of training data.

    Args:
        row (`torch.Tensor` of shape `(length,)`): Token ids; the last `layout.image_length` are the image.
        layout (`SequenceLayout`): Where things stand.
        pad_token_id (`int`): Ends each text.

    Returns:
        `tuple[list[slice], slice]`: One or two texts, and the image.

    Raises:
        ValueError: If no `<pad>` stands before the image, or image tokens stand where text belongs or the reverse.
    """
    image_start = len(row) - layout.image_length
    if image_start < 1:
        raise ValueError(f"`row` must have more than {layout.image_length} tokens, but has {len(row)}.")
    if (row[image_start:] >= layout.num_image_tokens).any() or (row[:image_start] < layout.num_image_tokens).any():
        raise ValueError(
            f"`row` must hold text ids ({layout.num_image_tokens} and above), then {layout.image_length} image tokens."
        )
    ends = (row[:image_start] == pad_token_id).nonzero()[:, 0].tolist()
    if not ends:
        raise ValueError(f"`row` must have <pad> ({pad_token_id}) after each text, but has none before the image.")
    texts = [slice(0, ends[0])]
    if len(ends) > 1 and ends[1] > ends[0] + 1:
        texts.append(slice(ends[0] + 1, ends[1]))
    return texts, slice(image_start, len(row))


def generation_sample(
    row: torch.Tensor, layout: SequenceLayout, pad_token_id: int, second_text: bool = False
) -> TokenSequence:
    """
    Text-to-image: the chosen text is the prefix of `<start_of_image>` and the image; another text stays unseen.

    Args:
        row, layout, pad_token_id: As for `split_row`.
        second_text (`bool`): Train on the second text, if there is one.
    """
    texts, image = split_row(row, layout, pad_token_id)
    text = texts[-1] if second_text else texts[0]
    ids = row.clone().long()
    ids[image.start - 1] = layout.boi_token_id
    positions, prefix, causal = _empty_row(ids)
    positions[text] = torch.arange(text.stop - text.start)
    positions[image.start - 1] = layout.image_position
    positions[image] = layout.image_positions
    prefix[text] = True
    causal[image.start - 1 :] = True
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[image.start - 1 : -1] = ids[image]
    sequence = TokenSequence(ids, positions, prefix_causal_mask(prefix, causal), prefix, prefix | causal, labels)
    return sequence._map(lambda value: value[None])


def captioning_sample(
    row: torch.Tensor,
    layout: SequenceLayout,
    pad_token_id: int,
    start_token_ids: Sequence[int],
    corners: Sequence[tuple[int, int]],
    patch_size: int = 4,
) -> TokenSequence:
    """
    Captioning and mask prediction at once: texts are predicted from the image, and image patches from its rest.

    Args:
        row, layout, pad_token_id: As for `split_row`.
        start_token_ids (sequence of `int`): The start token of each text, by its language.
        corners (sequence of `tuple[int, int]`): Row and column of the first cell of each masked patch; patches may
            overlap.
        patch_size (`int`): Edge of the patches in cells. In each row of a patch all cells but the first are predicted.
    """
    texts, image = split_row(row, layout, pad_token_id)
    ids = row.clone().long()
    ids[1 : image.start] = row[: image.start - 1]
    positions, _, _ = _empty_row(ids)
    positions[image] = layout.image_positions
    labels = torch.full_like(ids, IGNORED_LABEL)

    in_patch = torch.zeros(layout.image_grid, dtype=torch.bool)
    predicts = torch.zeros(layout.image_grid, dtype=torch.bool)  # the label of a cell is the next one
    for corner_row, corner_column in corners:
        patch_rows = slice(corner_row, corner_row + patch_size)
        in_patch[patch_rows, corner_column : corner_column + patch_size] = True
        predicts[patch_rows, corner_column : corner_column + patch_size - 1] = True
    context = torch.zeros_like(ids, dtype=torch.bool)
    context[image] = ~in_patch.flatten()
    patches = torch.zeros_like(context)
    patches[image] = in_patch.flatten()
    mask = prefix_causal_mask(context, patches)
    next_ids = ids.roll(-1)
    labels[image][predicts.flatten()] = next_ids[image][predicts.flatten()]

    is_text = torch.zeros_like(context)
    for start_token_id, text in zip(start_token_ids, texts):
        # everything before the image has moved by one: the start token stands where the text began
        with_start = slice(text.start, text.stop + 1)
        ids[text.start] = start_token_id
        positions[with_start] = torch.arange(text.stop + 1 - text.start)
        labels[text] = row[text].long()
        rows = torch.zeros_like(context)
        rows[with_start] = True
        is_text |= rows
        mask |= prefix_causal_mask(torch.zeros_like(rows), rows)
        mask[with_start, image] = True
    sequence = TokenSequence(ids, positions, mask, is_text, is_text | context | patches, labels)
    return sequence._map(lambda value: value[None])


def completion_sample(
    row: torch.Tensor, layout: SequenceLayout, pad_token_id: int, mask: torch.Tensor
) -> TokenSequence:
    """
    Completion, in the order in which `completion` fills holes: masked cells are predicted from text and known cells.

    The release was not trained in this order; a small model has to be.

    Args:
        row, layout, pad_token_id: As for `split_row`; the first text is the one that counts.
        mask (`torch.Tensor` of shape `(rows, columns)`): True = predict this cell.
    """
    texts, image = split_row(row, layout, pad_token_id)
    task = completion([row[texts[0]].tolist()], row[image][None], mask, layout)
    sequence, tokens = task.whole_sequence(), row[image].long()[task.cells]
    first = sequence.input_ids.shape[1] - len(tokens)
    sequence.input_ids[0, first:] = tokens
    sequence.labels = torch.full_like(sequence.input_ids, IGNORED_LABEL)
    sequence.labels[0, first - 1 : -1] = tokens.masked_fill(~mask.flatten()[task.cells], IGNORED_LABEL)
    # what the text leaves free of the row follows the image: it sees what is there, and nothing sees it
    rest = len(row) - sequence.input_ids.shape[1]
    keys = _extend(sequence.key_mask, rest, False)
    attention_mask = torch.cat([F.pad(sequence.attention_mask, (0, rest)), keys[:, None].expand(-1, rest, -1)], 1)
    return TokenSequence(
        F.pad(sequence.input_ids, (0, rest), value=pad_token_id),
        F.pad(sequence.position_ids, (0, rest)),
        attention_mask,
        _extend(sequence.text_mask, rest, False),
        keys,
        F.pad(sequence.labels, (0, rest), value=IGNORED_LABEL),
    )


def text_sample(row: torch.Tensor, spans: Sequence[tuple[int, int]]) -> TokenSequence:
    """
    Text only: spans are predicted causally from the text around them.

    What lies between spans is open: open rows see all open columns, and all rows see open columns. From a span's first
    token to the token after its last, and behind the last span, rows are causal.

    Args:
        row (`torch.Tensor` of shape `(length,)`): Text ids.
        spans (sequence of `tuple[int, int]`): Start and length of each span in ascending order: the loss is on these
            positions, whose labels are the tokens after them.
    """
    ids = row.clone().long()
    positions = torch.arange(len(ids))
    labels = torch.full_like(ids, IGNORED_LABEL)
    is_open = torch.zeros_like(ids, dtype=torch.bool)
    before = 0
    for start, length in spans:
        is_open[before:start] = True
        labels[start : start + length] = ids.roll(-1)[start : start + length]
        before = start + length + 1
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask = torch.where(is_open[:, None], is_open[None], mask | is_open[None])
    everything = torch.ones_like(is_open)
    return TokenSequence(ids, positions, mask, everything, everything, labels)._map(lambda value: value[None])


def draw_patch_corners(
    layout: SequenceLayout, generator: torch.Generator, patch_size: int = 4
) -> list[tuple[int, int]]:
    """
    Corners of the masked patches: as many as cover 80 % of the image if none overlapped, all different.

    Unlike the release, whose patches never reach the last row and column, corners are drawn from all places where a
    patch fits.
    """
    rows, columns = (side - patch_size + 1 for side in layout.image_grid)
    count = min(int(MASKED_IMAGE_SHARE * layout.image_length / patch_size**2), rows * columns)
    chosen = torch.randperm(rows * columns, generator=generator)[:count].tolist()
    return [(corner // columns, corner % columns) for corner in chosen]


def draw_rectangles(layout: SequenceLayout, generator: torch.Generator) -> torch.Tensor:
    """
    A mask `(rows, columns)` for `completion_sample`: one or two rectangles, each side up to 7 tenths of the image's.

    Completion crops pictures so that masks are no larger than that.
    """
    mask = torch.zeros(layout.image_grid, dtype=torch.bool)
    for _ in range(1 + int(torch.rand((), generator=generator) < 0.2)):
        edges = []
        for side in layout.image_grid:
            length = int(torch.randint(1, max(side * 7 // 10, 1) + 1, (), generator=generator))
            start = int(torch.randint(side - length + 1, (), generator=generator))
            edges.append(slice(start, start + length))
        mask[edges[0], edges[1]] = True
    return mask


def draw_text_spans(length: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Spans of Poisson(3) tokens, at least one token each, that cover at most 15 % of a text of `length` tokens."""
    count = int(length / 3 * MASKED_TEXT_SHARE) + 10
    lengths = torch.poisson(torch.full((count,), 3.0), generator=generator).long().tolist()
    starts = torch.randperm(length, generator=generator)
    return place_text_spans(length, lengths, starts)


def place_text_spans(length: int, lengths: Sequence[int], starts: torch.Tensor) -> list[tuple[int, int]]:
    """
    Turn drawn lengths and starts into spans that neither overlap nor leave the text.

    Args:
        length (`int`): Tokens of the text.
        lengths (sequence of `int`): Drawn lengths, of which those stay whose sum is at most 15 % of the text.
        starts (`torch.Tensor`): Distinct drawn starts; of those small enough, one per span is used, in drawing order.
    """
    kept, total = [], 0
    for span in (max(int(value), 1) for value in lengths):
        if total + span > MASKED_TEXT_SHARE * length:
            break
        kept.append(span)
        total += span
    chosen = sorted(starts[starts < length - total][: len(kept)].tolist())
    spans, shift = [], 0
    for start, span in zip(chosen, kept):
        spans.append((start + shift, span))
        shift += span
    return spans


def _empty_row(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of zero and two empty masks for a row."""
    empty = torch.zeros_like(ids, dtype=torch.bool)
    return torch.zeros_like(ids), empty, empty.clone()
