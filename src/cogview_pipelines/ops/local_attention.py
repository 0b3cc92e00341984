"""
Local attention on a grid of tokens: every query cell attends to the keys near it, under one softmax.

The keys come from up to three sources: a window on the grid of the queries, a window on a coarser grid that covers
the same picture, and dense context keys (text) that all queries see. [`local_attention`] takes any of them and
normalises over all keys at once.

- [`in_window`] is the geometry, written once: the reference, the tests and the benchmarks build their masks from it,
  and the kernels are tested against it.
- [`reference_local_attention`] is plain PyTorch. It attends to each source by itself, which gives an output and the
  logsumexp of the scores, and [`merge_attention`] joins the parts into what one softmax over all keys would give.
- The fused kernels (`csrc/`, called through `ops/native.py`) do the same in one launch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .native import built_for, fused_local_attention, fused_refusals, say_that_kernels_are_missing

Grid = tuple[int, int]

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
    stacked = torch.stack([logsumexp for _, logsumexp in pieces])
    weights, logsumexp = _normalised_exponentials(stacked, dim=0)
    weights = weights.transpose(-1, -2).unsqueeze(-1)  # (pieces, batch_size, positions, num_heads, 1)
    output = sum(weight * output for weight, (output, _) in zip(weights, pieces, strict=True))
    return output, logsumexp


def _normalised_exponentials(scores: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax and logsumexp that stay finite, with finite gradients, where all scores are `-inf`: zeros and `-inf`."""
    largest = scores.detach().amax(dim, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(dim, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    logsumexp = (largest + total.log()).masked_fill(empty, -math.inf)
    return exponentials / total, logsumexp.squeeze(dim)


def _context_attention(query, key, value, bias, scale):
    """Dense attention of all queries to `context_key`: output and logsumexp."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key)
    if bias is not None:
        scores = scores + bias[:, None, None, :].to(scores.dtype)
    weights, logsumexp = _normalised_exponentials(scores, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), logsumexp


def _window_attention(query, key, value, query_grid, key_grid, kernel_size, causal, scale):
    """
    Attention of each query to its window: output and logsumexp.

    The queries are cut into tiles. A tile attends densely to the rectangle of keys that covers the windows of all
    its queries, and a mask removes what is not in the window of each. Scores therefore grow with the positions times
    the window and a constant border.
    """
    ratio = [size // coarse for size, coarse in zip(query_grid, key_grid, strict=True)]
    key_tile = [min(-(-_REFERENCE_TILE // r), coarse) for r, coarse in zip(ratio, key_grid, strict=True)]
    tile = [r * size for r, size in zip(ratio, key_tile, strict=True)]
    tiles = [-(-size // edge) for size, edge in zip(query_grid, tile, strict=True)]
    reach = [min(kernel // 2, coarse - 1) for kernel, coarse in zip(kernel_size, key_grid, strict=True)]
    covered = [edge + 2 * border for edge, border in zip(key_tile, reach, strict=True)]
    batch_size, _, num_heads, head_dim = query.shape

    def on_grid(tensor, grid, before, after):
        tensor = tensor.reshape(tensor.shape[0], *grid, num_heads, head_dim)
        return F.pad(tensor, (0, 0, 0, 0, before[1], after[1], before[0], after[0]))

    def key_tiles(tensor):
        after = [n * edge + border - size for n, edge, border, size in zip(tiles, key_tile, reach, key_grid)]
        tensor = on_grid(tensor, key_grid, reach, after)
        tensor = tensor.unfold(1, covered[0], key_tile[0]).unfold(2, covered[1], key_tile[1])
        return tensor.permute(0, 3, 1, 2, 5, 6, 4).reshape(-1, covered[0] * covered[1], head_dim)

    after = [n * edge - size for n, edge, size in zip(tiles, tile, query_grid, strict=True)]
    queries = on_grid(query * scale, query_grid, (0, 0), after)
    queries = queries.reshape(batch_size, tiles[0], tile[0], tiles[1], tile[1], num_heads, head_dim)
    queries = queries.permute(0, 5, 1, 3, 2, 4, 6).reshape(-1, tile[0] * tile[1], head_dim)
    scores = torch.bmm(queries, key_tiles(key).transpose(1, 2))

    def rows_and_columns(axis):
        """Coordinates along one axis: of the queries and of the keys of each tile."""
        start = torch.arange(tiles[axis], device=query.device)[:, None]
        query_cells = start * tile[axis] + torch.arange(tile[axis], device=query.device)
        key_cells = start * key_tile[axis] - reach[axis] + torch.arange(covered[axis], device=query.device)
        return query_cells, key_cells

    (query_rows, key_rows), (query_columns, key_columns) = rows_and_columns(0), rows_and_columns(1)
    mask = in_window(  # (tile rows, tile columns, query rows, query columns, key rows, key columns)
        query_rows[:, None, :, None, None, None],
        query_columns[None, :, None, :, None, None],
        key_rows[:, None, None, None, :, None],
        key_columns[None, :, None, None, None, :],
        query_grid,
        key_grid,
        kernel_size,
        causal,
    )
    mask = mask.reshape(1, tiles[0] * tiles[1], *scores.shape[1:])
    scores = scores.unflatten(0, (-1, tiles[0] * tiles[1])).masked_fill(~mask, -math.inf).flatten(0, 1)
    weights, logsumexp = _normalised_exponentials(scores, dim=-1)
    output = torch.bmm(weights, key_tiles(value))

    def untile(tensor, width):
        tensor = tensor.reshape(batch_size, num_heads, tiles[0], tiles[1], tile[0], tile[1], width)
        tensor = tensor.permute(0, 1, 2, 4, 3, 5, 6).reshape(
            batch_size, num_heads, tiles[0] * tile[0], tiles[1] * tile[1], width
        )
        return tensor[:, :, : query_grid[0], : query_grid[1]].flatten(2, 3)

    return untile(output, head_dim).transpose(1, 2), untile(logsumexp, 1).squeeze(-1)


def reference_local_attention(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    *,
    query_grid: Grid,
    kernel_size: Grid | None = None,
    causal: bool = False,
    cross_key: torch.Tensor | None = None,
    cross_value: torch.Tensor | None = None,
    cross_grid: Grid | None = None,
    cross_kernel_size: Grid | None = None,
    cross_causal: bool = False,
    context_key: torch.Tensor | None = None,
    context_value: torch.Tensor | None = None,
    context_bias: torch.Tensor | None = None,
    scale: float | None = None,
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
    dtype = query.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def wide(tensor):
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    query = wide(query)
    pieces = []
    with torch.autocast(query.device.type, enabled=False):
        if key is not None:
            window = (query_grid, query_grid, kernel_size, causal)
            pieces.append(_window_attention(query, wide(key), wide(value), *window, scale))
        if cross_key is not None:
            window = (query_grid, cross_grid, cross_kernel_size, cross_causal)
            pieces.append(_window_attention(query, wide(cross_key), wide(cross_value), *window, scale))
        if context_key is not None:
            pieces.append(_context_attention(query, wide(context_key), wide(context_value), context_bias, scale))
        output, logsumexp = merge_attention(pieces)
    return output.to(dtype).contiguous(), logsumexp


def _check_grid(name: str, grid, tensor_name: str, tensor: torch.Tensor) -> None:
    """Raise unless `grid` is two positive numbers whose product is the number of positions of `tensor`."""
    if grid is None or len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"`{name}` must be two positive numbers, rows and columns, but is {grid}.")
    if grid[0] * grid[1] != tensor.shape[1]:
        raise ValueError(
            f"`{name}` {tuple(grid)} needs {grid[0] * grid[1]} positions, but `{tensor_name}` has {tensor.shape[1]}."
        )


def _check_kernel(name: str, kernel_size) -> None:
    """Raise unless `kernel_size` is two odd positive numbers."""
    if kernel_size is None or len(kernel_size) != 2 or any(size < 1 or size % 2 == 0 for size in kernel_size):
        raise ValueError(
            f"`{name}` must be two odd positive numbers, height and width in key cells, but is {kernel_size}."
        )


def _check_pair(name: str, key, value, query: torch.Tensor) -> None:
    """Raise unless key and value fit each other and the query."""
    if key is None or value is None:
        missing, given = (f"{name}key", f"{name}value") if key is None else (f"{name}value", f"{name}key")
        raise ValueError(f"`{given}` was given without `{missing}`: give both or neither.")
    if key.shape != value.shape:
        raise ValueError(
            f"`{name}key` and `{name}value` must have one shape, but have {tuple(key.shape)} and {tuple(value.shape)}."
        )
    expected = (query.shape[0], query.shape[2], query.shape[3])
    if key.ndim != 4 or (key.shape[0], key.shape[2], key.shape[3]) != expected:
        raise ValueError(
            f"`{name}key` must have the shape (batch_size, positions, num_heads, head_dim) with the sizes of `query` "
            f"{tuple(query.shape)} in all but the positions, but has {tuple(key.shape)}."
        )
    for part, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"`{name}{part}` must have the dtype and device of `query` ({query.dtype} on {query.device}), but has "
                f"{tensor.dtype} on {tensor.device}."
            )


def _check_inputs(
    query,
    key,
    value,
    query_grid,
    kernel_size,
    cross_key,
    cross_value,
    cross_grid,
    cross_kernel_size,
    context_key,
    context_value,
    context_bias,
) -> None:
    """Raise `ValueError` on the first argument that does not fit the others."""
    if query.ndim != 4:
        raise ValueError(
            f"`query` must have the shape (batch_size, positions, num_heads, head_dim), but has {tuple(query.shape)}."
        )
    if not query.is_floating_point():
        raise ValueError(f"`query` must be of a floating dtype, but is {query.dtype}.")
    _check_grid("query_grid", query_grid, "query", query)
    if (
        key is None
        and value is None
        and cross_key is None
        and cross_value is None
        and context_key is None
        and context_value is None
    ):
        raise ValueError("No keys were given: pass `key`, `cross_key` or `context_key` with their values.")
    if key is not None or value is not None:
        _check_pair("", key, value, query)
        _check_grid("query_grid", query_grid, "key", key)
        _check_kernel("kernel_size", kernel_size)
    if cross_key is not None or cross_value is not None:
        _check_pair("cross_", cross_key, cross_value, query)
        _check_grid("cross_grid", cross_grid, "cross_key", cross_key)
        _check_kernel("cross_kernel_size", cross_kernel_size)
        if query_grid[0] % cross_grid[0] or query_grid[1] % cross_grid[1]:
            raise ValueError(
                f"Each side of `query_grid` must be a multiple of the same side of `cross_grid`, but they are "
                f"{tuple(query_grid)} and {tuple(cross_grid)}."
            )
    if context_key is not None or context_value is not None:
        _check_pair("context_", context_key, context_value, query)
        if context_key.shape[1] == 0:
            raise ValueError("`context_key` has no positions: leave it out if there is no context.")
    if context_bias is not None:
        if context_key is None:
            raise ValueError("`context_bias` was given without `context_key`: give both or neither.")
        if tuple(context_bias.shape) != (query.shape[0], context_key.shape[1]) or not context_bias.is_floating_point():
            raise ValueError(
                f"`context_bias` must be of a floating dtype and of shape (batch_size, context_positions) = "
                f"{(query.shape[0], context_key.shape[1])}, but is {context_bias.dtype} of shape "
                f"{tuple(context_bias.shape)}."
            )


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    *,
    query_grid: Grid,
    kernel_size: Grid | None = None,
    causal: bool = False,
    cross_key: torch.Tensor | None = None,
    cross_value: torch.Tensor | None = None,
    cross_grid: Grid | None = None,
    cross_kernel_size: Grid | None = None,
    cross_causal: bool = False,
    context_key: torch.Tensor | None = None,
    context_value: torch.Tensor | None = None,
    context_bias: torch.Tensor | None = None,
    scale: float | None = None,
    return_logsumexp: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Attention of every query cell to the keys near it and to the context, under one softmax.

    The keys are any of three sets, at least one: the window of `kernel_size` around the cell on the grid of the
    queries, the window of `cross_kernel_size` around the cell that contains it on a coarser grid, and all context
    keys. Windows are cut off at the border of their grid (see [`in_window`]). Inputs may be strided views, such as
    the three parts of one fused projection. Under autocast, query, keys and values are cast to the autocast dtype
    first.

    Args:
        query (`torch.Tensor` of shape `(batch_size, query_positions, num_heads, head_dim)`):
            Queries in row-major grid order, not yet scaled.
        key, value (`torch.Tensor` of the shape of `query`, *optional*): Keys and values on the grid of the queries.
        query_grid (`tuple[int, int]`): Rows and columns of the query grid, in cells.
        kernel_size (`tuple[int, int]`, *optional*): Height and width of the window on the query grid; both odd.
        causal (`bool`, defaults to `False`):
            Attend only up to the own cell, in raster order, in the window on the query grid.
        cross_key, cross_value (`torch.Tensor` of shape `(batch_size, cross_positions, num_heads, head_dim)`,
        *optional*):
            Keys and values on the coarser grid.
        cross_grid (`tuple[int, int]`, *optional*):
            Rows and columns of the coarser grid; they divide those of `query_grid`.
        cross_kernel_size (`tuple[int, int]`, *optional*):
            Height and width of the window on the coarser grid; both odd.
        cross_causal (`bool`, defaults to `False`): As `causal`, up to the coarse cell that contains the query.
        context_key, context_value (`torch.Tensor` of shape `(batch_size, context_positions, num_heads, head_dim)`,
        *optional*):
            Keys and values that every query sees.
        context_bias (`torch.Tensor` of shape `(batch_size, context_positions)`, *optional*):
            Added to the scores of the context keys; `-inf` hides a key.
        scale (`float`, *optional*): Factor of the scores, by default `head_dim ** -0.5`.
        return_logsumexp (`bool`, defaults to `False`): Return the logsumexp too.
        backend (`str`, *optional*): `"reference"` or `"fused"`; by default fused where it supports the inputs.

    Returns:
        `torch.Tensor` or `tuple[torch.Tensor, torch.Tensor]`: The output, shaped like `query`, and with
        `return_logsumexp` the logsumexp of the scaled scores, float32 (float64 for float64 inputs), of shape
        `(batch_size, num_heads, query_positions)`, which [`merge_attention`] needs. A query that sees no key at all
        (possible without a window) gets zeros and `-inf`.

    Raises:
        ValueError: If arguments do not fit each other, or `backend="fused"` cannot run these inputs.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        tensors = (query, key, value, cross_key, cross_value, context_key, context_value)
        query, key, value, cross_key, cross_value, context_key, context_value = (
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
        )
    _check_inputs(
        query,
        key,
        value,
        query_grid,
        kernel_size,
        cross_key,
        cross_value,
        cross_grid,
        cross_kernel_size,
        context_key,
        context_value,
        context_bias,
    )
    if backend not in (None, "reference", "fused"):
        raise ValueError(f'`backend` must be "reference", "fused" or None, but is {backend!r}.')
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    longest_side = max(*query_grid, context_key.shape[1] if context_key is not None else 0)
    reasons = [] if backend == "reference" else fused_refusals(query, context_bias, longest_side)
    if reasons and backend == "fused":
        listed = "".join(f"\n    {reason}" for reason in reasons)
        raise ValueError(
            f'`backend="fused"` cannot run these inputs:{listed}\nLeave `backend` out to let the package choose.'
        )
    if reasons and not torch.compiler.is_compiling() and not built_for():
        say_that_kernels_are_missing()
    if backend != "reference" and not reasons:
        output, logsumexp = fused_local_attention(
            query,
            key,
            value,
            cross_key,
            cross_value,
            context_key,
            context_value,
            context_bias,
            list(query_grid),
            list(kernel_size) if key is not None else [],
            list(cross_grid) if cross_key is not None else [],
            list(cross_kernel_size) if cross_key is not None else [],
            [bool(causal), bool(cross_causal)],
            float(scale),
        )
    else:
        output, logsumexp = reference_local_attention(
            query,
            key,
            value,
            query_grid=query_grid,
            kernel_size=kernel_size,
            causal=causal,
            cross_key=cross_key,
            cross_value=cross_value,
            cross_grid=cross_grid,
            cross_kernel_size=cross_kernel_size,
            cross_causal=cross_causal,
            context_key=context_key,
            context_value=context_value,
            context_bias=context_bias,
            scale=scale,
        )
    return (output, logsumexp) if return_logsumexp else output
