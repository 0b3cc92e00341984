"""
Local attention on a grid of tokens: every query cell attends to the keys near it, under one softmax.

The keys come in sets, each a [`KeySet`]: a window on the grid of the queries, a window on a coarser grid that covers
the same picture, or dense keys (text) that all queries see. [`local_attention`] takes any of them and normalises over
all keys at once.

- [`in_window`] is the geometry, written once: the reference, the tests and the benchmarks build their masks from it,
  and the kernels are tested against it.
- [`reference_local_attention`] is plain PyTorch. It attends to each set by itself and joins the parts into what one
  softmax over all keys would give; [`merge_attention`] does so for outputs and logsumexps.
- The fused kernels (`csrc/`, called through `ops/native.py`) do the same in one launch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .key_set import Grid, KeySet, bias_in, check_grid
from .native import built_for, fused_local_attention, fused_refusals, say_that_kernels_are_missing

# Edge of the reference's query tiles in cells: larger ones waste arithmetic, smaller ones copy more keys.
_REFERENCE_TILE = 6


def in_window(
    query_row: torch.Tensor,
    query_column: torch.Tensor,
    key_row: torch.Tensor,
    key_column: torch.Tensor,
    query_grid: Grid,
    key_grid: Grid,
    kernel_size: Grid,
    causal: bool = False,
) -> torch.Tensor:
    """
    Whether a key cell lies in the window of a query cell.

    If the query grid is `r` times finer than the key grid, query cell `(y, x)` is centred on key cell
    `(y // r, x // r)`. The window is cut off at the border of the key grid, not shifted inwards. `causal` keeps the
    keys up to and including the centre, in raster order.

    Args:
        query_row, query_column, key_row, key_column (`torch.Tensor` of integers):
            Coordinates in cells, of shapes that broadcast. Keys may lie outside `key_grid`.
        query_grid, key_grid (`tuple[int, int]`): Rows and columns, in cells.
        kernel_size (`tuple[int, int]`): Height and width of the window in key cells, both odd.
        causal (`bool`, defaults to `False`): Leave out the keys behind the centre in raster order.

    Returns:
        `torch.Tensor`: bool, of the broadcast shape.

    Source: CogView2 (https://arxiv.org/abs/2204.14217), the local attention of the super-resolution modules.
    """
    center_row = query_row // (query_grid[0] // key_grid[0])
    center_column = query_column // (query_grid[1] // key_grid[1])
    inside = (key_row >= 0) & (key_row < key_grid[0]) & (key_column >= 0) & (key_column < key_grid[1])
    near = ((key_row - center_row).abs() <= kernel_size[0] // 2) & (
        (key_column - center_column).abs() <= kernel_size[1] // 2
    )
    if causal:
        near = near & ((key_row < center_row) | ((key_row == center_row) & (key_column <= center_column)))
    return inside & near


def window_mask(
    query_grid: Grid, key_grid: Grid, kernel_size: Grid, causal: bool = False, device: torch.device | None = None
) -> torch.Tensor:
    """
    The dense mask `(query_positions, key_positions)` of a window, True where a query attends to a key, both in
    row-major order.

    It grows with the square of the grid and serves tests and small dense attention only. The arguments are those of
    [`in_window`].
    """
    query = torch.arange(query_grid[0] * query_grid[1], device=device)[:, None]
    key = torch.arange(key_grid[0] * key_grid[1], device=device)[None, :]
    cells = (query // query_grid[1], query % query_grid[1], key // key_grid[1], key % key_grid[1])
    return in_window(*cells, query_grid, key_grid, kernel_size, causal)


def merge_attention(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Join attention over disjoint sets of keys into what one softmax over all of them gives.

    Args:
        pieces (`list[tuple[torch.Tensor, torch.Tensor]]`):
            For each set of keys the output, of shape `(batch_size, positions, num_heads, head_dim)`, and the
            logsumexp of the scores, of shape `(batch_size, num_heads, positions)`; `-inf` where a query has no key
            in the set.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Output and logsumexp of the same shapes. A query without any key gets
        zeros and `-inf`.
    """
    if len(pieces) == 1:
        return pieces[0]
    output, *sums = _join([(output, *_shifted(logsumexp)) for output, logsumexp in pieces])
    return output, _logsumexp(*sums)


# What the reference knows of a row of scores is their largest and the sum of the exponentials relative to it. Their
# logarithm in one number, the logsumexp, has forgotten the sum where scores are large.
Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, largest (a constant), sum


def _shifted(logsumexp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A logsumexp as the largest score and a sum of about one, through which its gradient passes."""
    largest = logsumexp.detach()
    return largest, (logsumexp - _or_zero(largest)).exp()


def _or_zero(largest: torch.Tensor) -> torch.Tensor:
    """The largest score of each row, and zero where a row has none."""
    return largest.masked_fill(largest == -math.inf, 0.0)


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, largest score and sum of each row; finite, with finite gradients, in rows where all are `-inf`."""
    largest = scores.detach().amax(-1)
    exponentials = (scores - _or_zero(largest).unsqueeze(-1)).exp()
    total = exponentials.sum(-1)
    return exponentials / total.masked_fill(total == 0, 1.0).unsqueeze(-1), largest, total


def _join(pieces: list[Piece]) -> Piece:
    """Attention over disjoint sets of keys as one piece."""
    if len(pieces) == 1:
        return pieces[0]
    largest = torch.stack([piece[1] for piece in pieces]).amax(0)
    shares = [total * (most - _or_zero(largest)).exp() for _, most, total in pieces]
    total = sum(shares)
    divisor = total.masked_fill(total == 0, 1.0)
    weights = [(share / divisor).transpose(-1, -2).unsqueeze(-1) for share in shares]  # as heads last
    return sum(weight * piece[0] for weight, piece in zip(weights, pieces, strict=True)), largest, total


def _logsumexp(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    empty = total == 0
    return (_or_zero(largest) + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -math.inf)


def _dense_attention(query, key, value, bias) -> Piece:
    """Dense attention of scaled queries to all keys."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
    if bias is not None:
        scores = scores + bias[:, None, None, :]
    weights, *sums = _softmax(scores)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), *sums


def _window_attention(query, keys: KeySet, bias, query_grid) -> Piece:
    """
    Attention of each scaled query to its window.

    The queries are cut into tiles. A tile attends densely to the rectangle of keys that covers the windows of all
    its queries, and a mask removes what is not in the window of each. Scores therefore grow with the positions times
    the window and a constant border.
    """
    tiles = _Tiles(query_grid, keys)
    cut = (len(query), query.shape[2], tiles.count)
    scores = torch.bmm(tiles.of_queries(query), tiles.of_keys(keys.key).transpose(1, 2))
    mask = tiles.mask(keys, query.device).reshape(tiles.count, *scores.shape[1:])
    scores = scores.unflatten(0, cut)
    if bias is not None:
        scores = scores + tiles.of_keys(bias[:, :, None, None]).reshape(len(query), 1, tiles.count, 1, -1)
    scores = scores.masked_fill(~mask, -math.inf).flatten(0, 2)
    weights, *sums = _softmax(scores)
    output = torch.bmm(weights, tiles.of_keys(keys.value))

    def joined(tensor):
        return tiles.joined(tensor.unflatten(0, cut))

    return joined(output).transpose(1, 2), *(joined(each.unsqueeze(-1)).squeeze(-1) for each in sums)


class _Tiles:
    """
    Tiles of a grid of queries, and the rectangles of keys that their windows cover. All pairs are rows and columns.

    Attributes:
        tile, key_tile: Size of a tile, in queries and in the keys on which its windows are centred.
        reach: How far windows go beyond that, in keys.
        covered: Size of a rectangle of keys.
        tiles, count: How many tiles there are, down and across, and in all.
    """

    def __init__(self, query_grid, keys: KeySet):
        assert keys.grid is not None and keys.kernel_size is not None
        self.query_grid, self.key_grid, self.kernel_size = query_grid, keys.grid, keys.kernel_size
        ratio = [size // coarse for size, coarse in zip(query_grid, keys.grid, strict=True)]
        self.key_tile = [min(-(-_REFERENCE_TILE // r), coarse) for r, coarse in zip(ratio, keys.grid, strict=True)]
        self.tile = [r * size for r, size in zip(ratio, self.key_tile, strict=True)]
        self.tiles = [-(-size // edge) for size, edge in zip(query_grid, self.tile, strict=True)]
        self.reach = [min(size // 2, coarse - 1) for size, coarse in zip(keys.kernel_size, keys.grid, strict=True)]
        self.covered = [edge + 2 * border for edge, border in zip(self.key_tile, self.reach, strict=True)]
        self.count = math.prod(self.tiles)

    def of_queries(self, query):
        """`(batch_size, positions, heads, width)` as `(batch_size * heads * count, queries, width)`."""
        after = [n * edge - size for n, edge, size in zip(self.tiles, self.tile, self.query_grid, strict=True)]
        query = _padded(query, self.query_grid, (0, 0), after)
        query = query.unflatten(2, (self.tiles[1], self.tile[1])).unflatten(1, (self.tiles[0], self.tile[0]))
        return query.permute(0, 5, 1, 3, 2, 4, 6).reshape(-1, math.prod(self.tile), query.shape[-1])

    def of_keys(self, tensor):
        """`(batch_size, keys, heads, width)` as `(batch_size * heads * count, keys, width)`."""
        sizes = zip(self.tiles, self.key_tile, self.reach, self.key_grid, strict=True)
        after = [n * edge + border - size for n, edge, border, size in sizes]
        tensor = _padded(tensor, self.key_grid, self.reach, after)
        for axis in range(2):
            tensor = _unfolded(tensor, 1 + axis, self.tiles[axis], self.covered[axis], self.key_tile[axis])
        # to (batch_size, heads, tiles down and across, rows, columns, width)
        return tensor.permute(0, 3, 1, 2, 5, 6, 4).reshape(-1, math.prod(self.covered), tensor.shape[4])

    def mask(self, keys: KeySet, device):
        """
        Which keys of its rectangle each query sees, of shape `(tiles down, tiles across, query rows, query columns,
        key rows, key columns)`.
        """

        def coordinates(axis):
            start = torch.arange(self.tiles[axis], device=device)[:, None]
            query_cells = start * self.tile[axis] + torch.arange(self.tile[axis], device=device)
            key_cells = start * self.key_tile[axis] - self.reach[axis]
            return query_cells, key_cells + torch.arange(self.covered[axis], device=device)

        (query_rows, key_rows), (query_columns, key_columns) = coordinates(0), coordinates(1)
        return in_window(
            query_rows[:, None, :, None, None, None],
            query_columns[None, :, None, :, None, None],
            key_rows[:, None, None, None, :, None],
            key_columns[None, :, None, None, None, :],
            self.query_grid,
            self.key_grid,
            self.kernel_size,
            keys.causal,
        )

    def joined(self, tensor):
        """`(batch_size, heads, count, queries, width)` as `(batch_size, heads, positions, width)`."""
        tensor = tensor.unflatten(3, self.tile).unflatten(2, self.tiles)
        tensor = tensor.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return tensor[:, :, : self.query_grid[0], : self.query_grid[1]].flatten(2, 3)


def _padded(tensor, grid, before, after):
    """`(batch_size, positions, ...)` on its grid, with so many rows and columns of zeros before and after it."""
    tensor = tensor.unflatten(1, tuple(grid))
    return F.pad(tensor, (0, 0, 0, 0, before[1], after[1], before[0], after[0]))


def _unfolded(tensor, axis, count, size, step):
    """`tensor.unfold(axis, size, step)`, which gives `count` pieces."""
    if not torch.jit.is_tracing():
        return tensor.unfold(axis, size, step)
    # as operators that ONNX has
    places = torch.arange(count, device=tensor.device)[:, None] * step + torch.arange(size, device=tensor.device)
    return tensor.index_select(axis, places.flatten()).unflatten(axis, (count, size)).movedim(axis + 1, -1)


def _float_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of a dtype are computed in: half precision in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def reference_local_attention(
    query: torch.Tensor, key_sets: Sequence[KeySet], query_grid: Grid, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`local_attention`] in plain PyTorch: any floating dtype (half precision is computed in float32), any device,
    differentiable.

    The arguments are those of [`local_attention`] and are not checked again. Its memory grows with the positions
    times the window.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The output in the dtype of `query`, and the logsumexp, float32 (float64
        for float64).
    """
    dtype, wide = query.dtype, _float_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.to(wide) * scale
    with _without_autocast(query.device.type):
        pieces = [
            _attend(query, keys.with_keys(keys.key.to(wide), keys.value.to(wide)), query_grid) for keys in key_sets
        ]
        output, *sums = _join(pieces)
        return output.to(dtype).contiguous(), _logsumexp(*sums)


def _attend(query: torch.Tensor, keys: KeySet, query_grid: Grid) -> Piece:
    """Attention of scaled queries to one set of keys."""
    bias = None if keys.bias is None else bias_in(keys.bias, query.dtype)
    if keys.grid is None:
        return _dense_attention(query, keys.key, keys.value, bias)
    return _window_attention(query, keys, bias, query_grid)


def _without_autocast(device_type: str):
    """A context without autocast; devices that know none (`meta`) need none."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def _cast_by_autocast(query: torch.Tensor, key_sets: Sequence[KeySet]) -> tuple[torch.Tensor, list[KeySet]]:
    """Query, keys and values in the dtype of autocast, where it is on; float64 stays, as do biases."""
    device_type = query.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return query, list(key_sets)
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor):
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(query), [keys.with_keys(cast(keys.key), cast(keys.value)) for keys in key_sets]


def _check_inputs(query: torch.Tensor, key_sets: Sequence[KeySet], query_grid: Grid, backend: str | None) -> None:
    """Raise `ValueError` on the first argument that does not fit the others."""
    if query.ndim != 4:
        raise ValueError(
            f"`query` must have the shape (batch_size, positions, num_heads, head_dim), but has {tuple(query.shape)}."
        )
    if not query.is_floating_point():
        raise ValueError(f"`query` must be of a floating dtype, but is {query.dtype}.")
    check_grid("`query_grid`", query_grid, "`query`", query)
    if not key_sets:
        raise ValueError("`key_sets` is empty: pass at least one `KeySet`.")
    for index, keys in enumerate(key_sets):
        keys.check("the key set" if len(key_sets) == 1 else f"key set {index}", query, query_grid)
    if backend not in (None, "reference", "fused"):
        raise ValueError(f'`backend` must be "reference", "fused" or None, but is {backend!r}.')


def local_attention(
    query: torch.Tensor,
    key_sets: KeySet | Sequence[KeySet],
    query_grid: Grid,
    *,
    scale: float | None = None,
    return_logsumexp: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Attention of every query cell to the keys near it and to others, under one softmax.

    Each [`KeySet`] is a grid of keys, of which a query sees the window around its own place (cut off at the border,
    see [`in_window`]), or keys that all queries see. The softmax is over the keys of all sets. Inputs may be strided
    views, such as the three parts of one fused projection. Under autocast, query, keys and values are cast to the
    autocast dtype first. Under transforms of `torch.func` and in forward-mode differentiation PyTorch operations
    compute it, since the kernels have a backward pass for ordinary autograd only.

    Args:
        query (`torch.Tensor` of shape `(batch_size, query_positions, num_heads, head_dim)`):
            Queries in row-major grid order, not yet scaled.
        key_sets (`KeySet` or sequence of `KeySet`): What they attend to.
        query_grid (`tuple[int, int]`): Rows and columns of the grid of the queries, in cells.
        scale (`float`, *optional*): Factor of the scores, by default `head_dim ** -0.5`.
        return_logsumexp (`bool`, defaults to `False`): Return the logsumexp too.
        backend (`str`, *optional*): `"reference"` or `"fused"`; by default fused where it supports the inputs.

    Returns:
        `torch.Tensor` or `tuple[torch.Tensor, torch.Tensor]`: The output, shaped like `query`, and with
        `return_logsumexp` the logsumexp of the scaled scores, float32 (float64 for float64 inputs), of shape
        `(batch_size, num_heads, query_positions)`, which [`merge_attention`] needs. A query that sees no key at all
        (all are hidden by their bias) gets zeros and `-inf`.

    Raises:
        ValueError: If arguments do not fit each other, or `backend="fused"` cannot run these inputs.
    """
    query, key_sets = _cast_by_autocast(query, [key_sets] if isinstance(key_sets, KeySet) else key_sets)
    _check_inputs(query, key_sets, query_grid, backend)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    reasons = [] if backend == "reference" else fused_refusals(query, key_sets, query_grid)
    if reasons and backend == "fused":
        listed = "".join(f"\n    {reason}" for reason in reasons)
        raise ValueError(
            f'`backend="fused"` cannot run these inputs:{listed}\nLeave `backend` out to let the package choose.'
        )
    if reasons and not torch.compiler.is_compiling() and not built_for():
        say_that_kernels_are_missing()
    if backend == "reference" or reasons:
        output, logsumexp = reference_local_attention(query, key_sets, query_grid, scale)
    else:
        output, logsumexp = fused_local_attention(query, key_sets, query_grid, scale)
    return (output, logsumexp) if return_logsumexp else output
