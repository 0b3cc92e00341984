"""
What the sequences of every model family are written with: their columns, padding and masks.

Masks are boolean, True = the row may attend to the column. Left padding of shorter texts in a batch attends to itself,
so that no softmax is over nothing, and nothing else attends to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

IGNORED_LABEL = -100


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
        return self.map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> "TokenSequence":
        """The same sequences on another device."""
        return self.map(lambda value: value.to(device))

    def repeat_interleave(self, repeats: int) -> "TokenSequence":
        """Every sequence `repeats` times in a row."""
        return self.map(lambda value: value.repeat_interleave(repeats, 0))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenSequence":
        """The same sequences, with a function applied to every tensor."""
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
    # each row has a number up to which it sees columns: one comparison, where PyTorch's operations on booleans would
    # take several passes that are not vectorised on a CPU
    length = prefix.shape[-1]
    order = torch.arange(length, dtype=torch.int32, device=prefix.device)
    rows = torch.where(causal, order, -1)
    columns = torch.where(prefix, -2, torch.where(causal, order, length))
    return rows[..., :, None] >= columns[..., None, :]


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


def isolate_padding(mask: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Let rows of padding attend to themselves only, and nothing else to them."""
    real = (~padding).view(torch.uint8)  # operations on bytes are vectorised
    isolated = mask.view(torch.uint8) & real[..., :, None]
    isolated &= real[..., None, :]
    isolated.diagonal(dim1=-2, dim2=-1).bitwise_or_(padding.view(torch.uint8))
    return isolated.view(torch.bool)


def extend_mask(mask: torch.Tensor, columns: int, value: bool) -> torch.Tensor:
    """Append constant columns to a `(batch_size, length)` mask."""
    return torch.cat([mask, mask.new_full((mask.shape[0], columns), value)], 1)
