"""
Three-region sparse attention of CogView: a causal window of blocks, all text, and image positions drawn at random.

Both text and drawn positions are *pivots*: keys that every query sees which lies far enough behind them. One softmax
goes over window and pivots, and no key counts twice. Cost grows with the length times (window + pivots) instead of the
length squared.

Source: CogView (https://arxiv.org/abs/2105.13290), appendix B, and its release.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BACKENDS = ("reference", "blocked", "merged")


def three_region_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pivots: torch.Tensor,
    *,
    window_size: int = 128,
    num_windows: int = 6,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """
    Attention of every position to a window behind it and to the pivots left of this window.

    Positions stand in blocks of `window_size`. A query of block `r` sees the keys up to itself of the blocks
    `r - num_windows + 1 .. r`, and of the pivots those in blocks up to `r - num_windows`. Scores of pivots get
    `log(length // num_pivots)` added: a drawn position stands for several.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, length, num_heads, head_dim)`): Not yet scaled.
        pivots (`torch.Tensor` of shape `(batch_size, num_pivots)`): Different positions of each sequence, in any
            order; see [`draw_pivots`].
        window_size (`int`): Positions of a block (release: 128 by default, 64 in its scripts).
        num_windows (`int`): Blocks of the window, the query's own included (release: 6 by default, 4 in its scripts).
        dropout (`float`): Probability of dropping an attention weight.
        backend (`str`, *optional*): `"reference"` computes all scores and masks them. `"blocked"` lets PyTorch's fused
            attention run once for each block. `"merged"` does so for window and pivots apart, without copies of keys
            and without masks, and joins the results: on a CPU, without dropout. By default the fastest that can run.

    Returns:
        `torch.Tensor`: Shaped like `query`. Gradients reach query, key and value.

    Raises:
        ValueError: If shapes do not fit, a number is not positive, or the backend cannot run these inputs.
    """
    _check(query, key, value, pivots, window_size, num_windows)
    refusals = _merged_refusals(query, dropout)
    if backend is None:
        backend = "blocked" if refusals else "merged"
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, but is {backend!r}.")
    if backend == "merged" and refusals:
        raise ValueError(
            '`backend="merged"` cannot run these inputs:\n    '
            + "\n    ".join(refusals)
            + "\nLeave `backend` out to let the package choose."
        )
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    bonus = math.log(max(1, query.shape[2] // max(1, pivots.shape[1])))
    if backend == "reference":
        return _reference(query, key, value, pivots, window_size, num_windows, dropout, bonus).transpose(1, 2)
    pivots = pivots.sort(-1).values  # so that what a block sees is the first so many
    blocks = _plan(pivots, query.shape[2], window_size, num_windows)
    pivot_key, pivot_value = (_gather(tensor, pivots) for tensor in (key, value))
    if backend == "blocked":
        output = _blocked(query, key, value, pivot_key, pivot_value, blocks, dropout, bonus)
    else:
        output = _Merged.apply(query, key, value, pivot_key, pivot_value, blocks, bonus)
    return output.transpose(1, 2)


def draw_pivots(
    is_text: torch.Tensor,
    num_pivots: int,
    is_real: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    All text positions of each sequence, and others of it drawn without replacement, up to `num_pivots`.

    Args:
        is_text (`torch.Tensor` of shape `(batch_size, length)`): True at text and command tokens.
        num_pivots (`int`): How many of each sequence; at most `length`.
        is_real (`torch.Tensor` of shape `(batch_size, length)`, *optional*): False at padding, which comes in last.
        generator (`torch.Generator`, *optional*): On the device of `is_text`.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_pivots)`: Text first.

    Raises:
        ValueError: If a sequence has more text than pivots.
    """
    if not 0 < num_pivots <= is_text.shape[1]:
        raise ValueError(f"`num_pivots` must be in 1..{is_text.shape[1]} (the length), but is {num_pivots}.")
    most = int(is_text.sum(1).max())
    if most > num_pivots:
        raise ValueError(f"`num_pivots` must be at least {most}, the longest text here, but is {num_pivots}.")
    priority = torch.rand(is_text.shape, generator=generator, device=is_text.device)
    if is_real is not None:
        priority = torch.where(is_real, priority, priority - 2)
    # the earlier the text, the further in front
    order = torch.linspace(4, 3, is_text.shape[1], device=is_text.device).expand_as(priority)
    return torch.where(is_text, order, priority).topk(num_pivots, dim=1).indices


# The three backends --------------------------------------------------------------------------------------------------


def visible_keys(length: int, window_size: int, num_windows: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks `(length, length)`: which keys the window of each query has, and which lie left of it."""
    position = torch.arange(length, device=device)
    first = (position // window_size - num_windows + 1).clamp(min=0) * window_size
    left = position[None, :] < first[:, None]
    return (position[None, :] <= position[:, None]) & ~left, left


def _reference(query, key, value, pivots, window_size, num_windows, dropout, bonus):
    """All scores of both parts, masked, under one softmax."""
    length, num_pivots = query.shape[2], pivots.shape[1]
    window, left = visible_keys(length, window_size, num_windows, query.device)
    pivot_key, pivot_value = (_gather(tensor, pivots) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5
    seen = left[:, pivots].transpose(0, 1)[:, None]  # (batch, 1, length, num_pivots)
    scores = torch.cat(
        [
            ((query @ pivot_key.mT) * scale + bonus).masked_fill(~seen, float("-inf")),
            ((query @ key.mT) * scale).masked_fill(~window, float("-inf")),
        ],
        -1,
    )
    weights = F.dropout(scores.to(_sum_dtype(scores)).softmax(-1).to(value.dtype), dropout)
    return weights[..., :num_pivots] @ pivot_value + weights[..., num_pivots:] @ value


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What 16-bit numbers are added up in; wider ones in their own."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class _Block:
    """
    What the queries `start .. stop` see: keys from `first` on, and of the sorted pivots the first `num_pivots` (the
    most in the batch). `hidden` is True, `(batch_size, num_pivots)`, where a sequence has fewer; else `None`.
    """

    start: int
    stop: int
    first: int
    num_pivots: int
    hidden: torch.Tensor | None


def _plan(pivots: torch.Tensor, length: int, window_size: int, num_windows: int) -> list[_Block]:
    """The blocks of queries, given sorted pivots."""
    starts = range(0, length, window_size)
    firsts = [max(0, start // window_size - num_windows + 1) * window_size for start in starts]
    borders = torch.tensor(firsts, device=pivots.device).repeat(len(pivots), 1)
    counts = torch.searchsorted(pivots, borders).T
    most, equal = counts.amax(1).tolist(), (counts == counts[:, :1]).all(1).tolist()
    blocks = []
    for index, start in enumerate(starts):
        hidden = None
        if not equal[index]:
            hidden = torch.arange(most[index], device=pivots.device) >= counts[index, :, None]
        blocks.append(_Block(start, min(start + window_size, length), firsts[index], most[index], hidden))
    return blocks


def _gather(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, length, dim)` at `(batch, count)` positions: `(batch, heads, count, dim)`."""
    index = positions[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def _blocked(query, key, value, pivot_key, pivot_value, blocks, dropout, bonus):
    """One call of fused attention for each block of queries, over its pivots and its window side by side."""
    outputs = []
    for block in blocks:
        num_rows, num_pivots = block.stop - block.start, block.num_pivots
        keys = torch.cat([pivot_key[:, :, :num_pivots], key[:, :, block.first : block.stop]], 2)
        values = torch.cat([pivot_value[:, :, :num_pivots], value[:, :, block.first : block.stop]], 2)
        batch_size = len(query) if block.hidden is not None else 1
        bias = query.new_zeros(batch_size, 1, num_rows, keys.shape[2])
        bias[..., :num_pivots] = bonus
        if block.hidden is not None:
            bias[..., :num_pivots].masked_fill_(block.hidden[:, None, None], float("-inf"))
        later = torch.ones(num_rows, num_rows, dtype=torch.bool, device=query.device).triu(1)
        bias[..., -num_rows:].masked_fill_(later, float("-inf"))
        rows = query[:, :, block.start : block.stop]
        outputs.append(F.scaled_dot_product_attention(rows, keys, values, bias, dropout))
    return torch.cat(outputs, 2)


class _Merged(torch.autograd.Function):
    """
    Diagonal, earlier window and pivots of each block as three calls of fused attention without copies.

    Their results are joined by the logarithms of their sums. Backwards, each call gets the joined result and sum in
    place of its own: what fused attention computes from them are this part's gradients of the joint softmax.
    """

    @staticmethod
    def forward(ctx, query, key, value, pivot_key, pivot_value, blocks, bonus):
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=_sum_dtype(query))
        for block in blocks:
            rows = slice(block.start, block.stop)
            parts = _parts(block, key, value, pivot_key, pivot_value, bonus)
            results = [_fused(query[:, :, rows], part) for part in parts]
            total = results[0][1]
            for _, part_sum in results[1:]:
                total = torch.logaddexp(total, part_sum)
            joined = 0
            for part_output, part_sum in results:
                joined = joined + part_output * (part_sum - total).exp()[..., None]
            output[:, :, rows], sums[:, :, rows] = joined, total
        ctx.save_for_backward(query, key, value, pivot_key, pivot_value, output, sums)
        ctx.blocks, ctx.bonus = blocks, bonus
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, pivot_key, pivot_value, output, sums = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value, pivot_key, pivot_value)]
        query_gradient, *others = gradients
        for block in ctx.blocks:
            rows = slice(block.start, block.stop)
            own = [tensor[:, :, rows] for tensor in (gradient, query, output, sums)]
            parts = _parts(block, key, value, pivot_key, pivot_value, ctx.bonus)
            targets = _parts(block, *others, ctx.bonus)
            for part, target in zip(parts, targets):
                of_query, of_key, of_value = _fused_backward(*own, part)
                query_gradient[:, :, rows] += of_query
                target.key.add_(of_key)
                target.value.add_(of_value)
        return (*gradients, None, None)


@dataclass(frozen=True)
class _Part:
    """Views of some keys and values, what is added to their scores, and what is added to all of them alike."""

    key: torch.Tensor
    value: torch.Tensor
    is_causal: bool = False
    mask: torch.Tensor | None = None
    bonus: float = 0.0


def _parts(block: _Block, key, value, pivot_key, pivot_value, bonus: float) -> list[_Part]:
    """The diagonal of a block, the window before it, and its pivots, as far as there are any."""
    diagonal, earlier = slice(block.start, block.stop), slice(block.first, block.start)
    parts = [_Part(key[:, :, diagonal], value[:, :, diagonal], is_causal=True)]
    if block.first < block.start:
        parts.append(_Part(key[:, :, earlier], value[:, :, earlier]))
    if block.num_pivots:
        mask = None
        if block.hidden is not None:
            # not minus infinity: a sequence may have no pivot here, and then its sum must stay a number
            mask = torch.zeros(block.hidden.shape, dtype=key.dtype, device=key.device)
            mask.masked_fill_(block.hidden, torch.finfo(key.dtype).min / 2)
            mask = mask[:, None, None].expand(-1, key.shape[1], block.stop - block.start, -1)
        pivots = slice(0, block.num_pivots)
        parts.append(_Part(pivot_key[:, :, pivots], pivot_value[:, :, pivots], mask=mask, bonus=bonus))
    return parts


def _fused(query: torch.Tensor, part: _Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and logarithm of the sum of the exponentials of the scores, of the attention to a part alone."""
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, part.key, part.value, 0.0, part.is_causal, attn_mask=part.mask
    )
    return output, sums + part.bonus


def _fused_backward(gradient, query, output, sums, part: _Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value through a part, given output and sums of all parts together."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient,
        query,
        part.key,
        part.value,
        output,
        sums - part.bonus,
        0.0,
        part.is_causal,
        attn_mask=part.mask,
    )


def _merged_refusals(query: torch.Tensor, dropout: float) -> list[str]:
    """Why the merged backend cannot run; empty where it can."""
    reasons = []
    if query.device.type != "cpu":
        reasons.append(f"the inputs are on {query.device}, not on a CPU")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        reasons.append(f"the inputs are of {query.dtype}")
    if dropout:
        reasons.append(f"`dropout` is {dropout}, not 0")
    return reasons


def _check(query, key, value, pivots, window_size: int, num_windows: int) -> None:
    if query.ndim != 4 or query.shape != key.shape or key.shape != value.shape:
        raise ValueError(
            "`query`, `key` and `value` must have one shape (batch_size, length, num_heads, head_dim), but have "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if pivots.ndim != 2 or len(pivots) != len(query):
        raise ValueError(f"`pivots` must have the shape ({len(query)}, num_pivots), but has {tuple(pivots.shape)}.")
    for name, number in (("window_size", window_size), ("num_windows", num_windows)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {number}.")


# Generation ----------------------------------------------------------------------------------------------------------


def draw_inference_keys(
    is_text: torch.Tensor,
    *,
    window_size: int,
    num_windows: int,
    num_pivots: int,
    max_length: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    The keys that new tokens attend to while a sequence grows: pivots left of the window, then the whole window.

    The window is not aligned to blocks here, and the number of drawn positions grows with the length.

    Args:
        is_text (`torch.Tensor` of shape `(batch_size, num_keys)`): True at text and command tokens; the new tokens are
            the last keys.
        window_size, num_windows (`int`): Their product is the length of the window.
        num_pivots, max_length (`int`): So many pivots a sequence of the greatest length would have.
        generator (`torch.Generator`, *optional*): On the device of `is_text`.

    Returns:
        `torch.Tensor` of shape `(batch_size, count)`: Positions.
    """
    batch_size, num_keys = is_text.shape
    left = max(0, num_keys - window_size * num_windows)
    window = torch.arange(left, num_keys, device=is_text.device).expand(batch_size, -1)
    if not left:
        return window
    num_text = int(is_text[:, :left].sum(1).max())
    count = num_text + int((left - num_text) * num_pivots / max_length)
    if not count:
        return window
    return torch.cat([draw_pivots(is_text[:, :left], count, generator=generator), window], 1)


def attend_to_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """
    Attention of new tokens to some keys. The last keys are the new tokens themselves, which are causal.

    Args:
        query (`torch.Tensor` of shape `(batch_size, new, num_heads, head_dim)`): Of the new tokens.
        key, value (`torch.Tensor` of shape `(batch_size, num_keys, num_heads, head_dim)`): Of all tokens.
        positions (`torch.Tensor` of shape `(batch_size, count)`): As of [`draw_inference_keys`].

    Raises:
        ValueError: If there are more new tokens than keys.
    """
    new, count = query.shape[1], positions.shape[1]
    if new > count:
        raise ValueError(f"`query` may have {count} tokens, as many as `positions`, but has {new}.")
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    seen = torch.ones(new, count, dtype=torch.bool, device=query.device).tril(count - new)
    output = F.scaled_dot_product_attention(query, _gather(key, positions), _gather(value, positions), seen)
    return output.transpose(1, 2)
