"""Where a model looks while it writes a picture: attention to words and cells, of every head of every layer."""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import nn

from ..generation.token_sequence import TokenSequence

MOST_ATTENDED = 0.25  # share of the cells that `segments` marks
_WORD_START = "▁"  # SentencePiece's mark of a space


@dataclass
class AttentionMaps:
    """
    Attention while the cells of a picture were written. A cell is written from the position before it.

    Args:
        words (`list[str]`): The words of the prompt; Chinese ones are as the tokenizer cuts them.
        maps (`torch.Tensor` of shape `(num_layers, num_heads, num_words, rows, columns)`): Share of its attention that
            a head gave to a word when it wrote a cell.
        offsets (`torch.Tensor` of shape `(num_layers, num_heads, 2 * rows - 1, 2 * columns - 1)`): Mean share that a
            head gave to the cell so many rows and columns away; the cell itself is in the middle.
        score_scales (`torch.Tensor` of shape `(num_layers, num_heads)`): Standard deviation of the scores before the
            softmax, without masks and biases.
        cells (`torch.Tensor` of shape `(num_layers, num_heads, rows, columns)`): How much attention a cell got from
            those written after it, as a multiple of what the head gives to cells so far away: 1 is what the
            place alone would give. The last cell has 0: nothing is written after it.
        tokens (`torch.Tensor` of shape `(rows, columns)`): The picture.
        image (`PIL.Image.Image`, *optional*): The same, decoded.

    Source: CogView (https://arxiv.org/abs/2105.13290), appendix C.
    """

    words: list[str]
    maps: torch.Tensor
    offsets: torch.Tensor
    score_scales: torch.Tensor
    cells: torch.Tensor
    tokens: torch.Tensor
    image: PIL.Image.Image | None = None

    def word_map(self, word: int | str, head: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Where a word was looked at: `(rows, columns)`, with a sum of 1 unless it was looked at nowhere.

        Args:
            word (`int` or `str`): Its index, or the word; the first of several.
            head (pair of `int`, *optional*): Layer and head; by default the mean of all.

        Raises:
            ValueError: If there is no such word.
        """
        if isinstance(word, str):
            if word not in self.words:
                raise ValueError(f"`word` must be one of {self.words}, but is {word!r}.")
            word = self.words.index(word)
        chosen = self.maps[:, :, word].mean((0, 1)) if head is None else self.maps[head[0], head[1], word]
        return chosen / chosen.sum().clamp_min(torch.finfo(chosen.dtype).tiny)

    def segments(self, head: tuple[int, int] | None = None, share: float = MOST_ATTENDED) -> torch.Tensor:
        """
        The words that the most attended cells belong to: implicit segmentation (figure 13 of the paper, whose dots
        are such cells).

        A cell belongs to the word whose `word_map` is largest there.

        Args:
            head (pair of `int`, *optional*): Layer and head; by default the mean of all.
            share (`float`, defaults to 0.25): Of the cells, how many count as the most attended.

        Returns:
            `torch.Tensor` of shape `(rows, columns)`: Index of the word, -1 for the cells that are attended less.

        Raises:
            ValueError: If `share` is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"`share` must be from 0 to 1, but is {share}.")
        attended = (self.cells.mean((0, 1)) if head is None else self.cells[head[0], head[1]]).flatten()
        most = attended.topk(round(share * len(attended))).indices
        found = torch.full_like(attended, -1, dtype=torch.long)
        if self.words:
            maps = torch.stack([self.word_map(word, head).flatten() for word in range(len(self.words))])
            found[most] = maps.argmax(0)[most]
        return found.reshape(self.cells.shape[-2:])


@torch.no_grad()
def read_attention(
    model: nn.Module,
    sequence: TokenSequence,
    grid: tuple[int, int],
    words: Sequence[tuple[str, Sequence[int]]],
    *,
    text_attention_bias: float = 0.0,
    device: torch.device | str | None = None,
) -> AttentionMaps:
    """
    Read one finished sequence, and keep what its attention was.

    One pass over the whole sequence gives what the steps that wrote it saw, since no position sees later ones. Scores
    are computed once more beside the model's own attention, layer by layer, which changes nothing of it.

    Args:
        model ([`CogLMModel`] or [`CogViewModel`]): The model.
        sequence ([`TokenSequence`] of one): Text and all image tokens, the last `rows * columns` of it.
        grid (pair of `int`): Rows and columns of the picture.
        words (sequence of `(str, columns)`): Which columns of the sequence are which word.
        text_attention_bias (`float`): That which the picture was written with.
        device (*optional*): Where the model computes, if hooks move it.
    """
    rows, columns = grid
    num_cells = rows * columns
    length = sequence.input_ids.shape[1]
    writing, written = slice(length - num_cells - 1, length - 1), slice(length - num_cells, length)
    maps, offsets, scales, cells = [], [], [], []
    places = _offset_index(rows, columns).flatten()
    later = torch.ones(num_cells, num_cells).tril(-1)  # written, looked at
    pairs = torch.zeros((2 * rows - 1) * (2 * columns - 1)).index_add_(0, places, later.flatten())

    def read(module: nn.Module, arguments: tuple) -> None:
        states, bias = arguments[:2]
        query, key, _ = (part.float().transpose(1, 2) for part in module.project(states))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (1, heads, length, length)
        allowed = sequence.attention_mask.to(scores.device)[:, None]
        scales.append(_deviation(scores, allowed)[0].cpu())
        masked = scores.masked_fill(~allowed, float("-inf")) if bias is None else scores + bias.float()
        shares = masked[:, :, writing].softmax(-1)[0]
        parts = [shares[:, :, list(own)].sum(-1) for _, own in words]
        maps.append(torch.stack(parts, 1).unflatten(-1, grid).cpu() if parts else shares.new_zeros(()).cpu())
        sums = shares.new_zeros(len(shares), (2 * rows - 1) * (2 * columns - 1))
        sums.index_add_(1, places.to(shares.device), shares[:, :, written].flatten(1))
        offsets.append((sums / num_cells).unflatten(1, (2 * rows - 1, 2 * columns - 1)).cpu())
        usual = (sums.cpu() / pairs.clamp_min(1))[:, places].unflatten(1, later.shape) * later
        got, expected = shares[:, :, written].sum(1).cpu(), usual.sum(1)
        cells.append((got / expected.clamp_min(torch.finfo(got.dtype).tiny)).unflatten(1, grid))

    device = next(model.parameters()).device if device is None else device
    handles = [layer.attention.register_forward_pre_hook(read) for layer in model.layers]
    try:
        own = sequence.to(device)
        model(own.input_ids, own.position_ids, own.attention_mask, own.text_mask, text_attention_bias)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sequence.input_ids[0, written].reshape(grid)
    return AttentionMaps(
        [word for word, _ in words],
        torch.stack(maps),
        torch.stack(offsets),
        torch.stack(scales),
        torch.stack(cells),
        tokens,
    )


def words_of(pieces: Sequence[str], whole: Collection[str] = ()) -> list[tuple[str, list[int]]]:
    """
    Words, each with the indices of its pieces: a word ends at a space, at punctuation, and with every Chinese piece.

    Args:
        pieces (sequence of `str`): Of a SentencePiece tokenizer.
        whole (collection of `str`): Pieces that are a word each, such as those that were added to the tokenizer.
    """
    words: list[tuple[str, list[int]]] = []
    for index, piece in enumerate(pieces):
        text = piece.replace(_WORD_START, "")
        before = words[-1][0] if words else ""
        stands_alone = _is_chinese(text[:1]) or _is_chinese(before[-1:]) or piece in whole or before in whole
        begins = piece.startswith(_WORD_START) or stands_alone or _is_mark(text[:1]) != _is_mark(before[-1:])
        if words and (not before or not begins):
            words[-1] = (before + text, [*words[-1][1], index])
        else:
            words.append((text, [index]))
    return words


def _is_chinese(letter: str) -> bool:
    return bool(letter) and unicodedata.name(letter, "").startswith("CJK")


def _is_mark(letter: str) -> bool:
    return bool(letter) and unicodedata.category(letter).startswith("P")


def _deviation(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    count = allowed.sum((-1, -2))
    mean = scores.masked_fill(~allowed, 0).sum((-1, -2)) / count
    return ((scores - mean[..., None, None]).masked_fill(~allowed, 0).square().sum((-1, -2)) / count).sqrt()


def _offset_index(rows: int, columns: int) -> torch.Tensor:
    """For each pair of cells, written and looked at, the index of their distance in the flattened `offsets`."""
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    down = row[None] - row[:, None] + rows - 1
    across = column[None] - column[:, None] + columns - 1
    return down * (2 * columns - 1) + across
