"""
Training samples of CogLM: what is masked and predicted in a row of training data.

A row is `text <pad> [text in another language <pad>] ... image tokens`, filled up with <pad> before the image, or text
only. The functions that make samples take the random choices as arguments; those named `draw_...` make them.

Source: the CogView2 release; the paper (https://arxiv.org/abs/2204.14217) describes the strategies in section 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..generation.token_sequence import IGNORED_LABEL, TokenSequence, extend_mask, prefix_causal_mask
from ..models.cogview2.sequences import SequenceLayout, completion

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
    return sequence.map(lambda value: value[None])


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
    return sequence.map(lambda value: value[None])


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
    keys = extend_mask(sequence.key_mask, rest, False)
    attention_mask = torch.cat([F.pad(sequence.attention_mask, (0, rest)), keys[:, None].expand(-1, rest, -1)], 1)
    return TokenSequence(
        F.pad(sequence.input_ids, (0, rest), value=pad_token_id),
        F.pad(sequence.position_ids, (0, rest)),
        attention_mask,
        extend_mask(sequence.text_mask, rest, False),
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
    return TokenSequence(ids, positions, mask, everything, everything, labels).map(lambda value: value[None])


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
