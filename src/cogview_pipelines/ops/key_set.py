"""Keys with their values, and which queries see them: `local_attention` takes a few such sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

Grid = tuple[int, int]


@dataclass(frozen=True)
class KeySet:
    """
    Keys and values for [`local_attention`], and which queries see them.

    With `grid` and `kernel_size` a query sees the keys in the window around its own place on the grid (see
    [`in_window`]); without them every query sees every key.

    Args:
        key, value (`torch.Tensor` of shape `(batch_size, positions, num_heads, head_dim)`):
            Keys and values, in row-major order of `grid`. They may be strided views.
        grid (`tuple[int, int]`, *optional*):
            Rows and columns, in cells; they divide those of the query grid. By default there is no grid, and all
            queries see all keys (text, for example).
        kernel_size (`tuple[int, int]`, *optional*):
            Height and width of the window, in cells of `grid`; both odd. Given exactly where `grid` is.
        causal (`bool`, defaults to `False`):
            Leave out the keys behind the cell that contains the query, in raster order. Needs a grid.
        bias (`torch.Tensor` of shape `(batch_size, positions)`, *optional*):
            Added to the scores of the keys, in any floating dtype; `-inf` hides a key.
    """

    __module__ = "cogview_pipelines"

    key: torch.Tensor
    value: torch.Tensor
    grid: Grid | None = None
    kernel_size: Grid | None = None
    causal: bool = False
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Key, value and, if there is one, the bias."""
        return (self.key, self.value) if self.bias is None else (self.key, self.value, self.bias)

    @property
    def longest_side(self) -> int:
        """The most cells in a row or column; without a grid, all keys are one row."""
        return max(self.grid) if self.grid else self.key.shape[1]

    def with_keys(self, key: torch.Tensor, value: torch.Tensor) -> KeySet:
        """The same set with other keys and values."""
        return replace(self, key=key, value=value)

    def check(self, name: str, query: torch.Tensor, query_grid: Grid) -> None:
        """
        Raise unless everything fits together and the queries.

        Args:
            name (`str`): What errors call this set.
            query (`torch.Tensor` of shape `(batch_size, query_positions, num_heads, head_dim)`): The queries.
            query_grid (`tuple[int, int]`): Their grid, checked before.

        Raises:
            ValueError: On the first field that does not fit.
        """
        self._check_tensors(name, query)
        if (self.grid is None) != (self.kernel_size is None):
            given, missing = ("grid", "kernel_size") if self.kernel_size is None else ("kernel_size", "grid")
            raise ValueError(
                f"`{given}` of {name} was given without `{missing}`: a window needs both, and keys that all queries "
                f"see have neither."
            )
        if self.grid is not None:
            self._check_window(name, query_grid)
        elif self.causal:
            raise ValueError(f"`causal` of {name} needs a `grid` and a `kernel_size`: without them there is no order.")
        elif self.key.shape[1] == 0:
            raise ValueError(f"`key` of {name} has no positions: leave the set out.")

    def _check_tensors(self, name: str, query: torch.Tensor) -> None:
        key, value, bias = self.key, self.value, self.bias
        if key.shape != value.shape:
            raise ValueError(
                f"`key` and `value` of {name} must have one shape, but have {tuple(key.shape)} and "
                f"{tuple(value.shape)}."
            )
        expected = (query.shape[0], *query.shape[2:])
        if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != expected:
            raise ValueError(
                f"`key` of {name} must have the shape (batch_size, positions, num_heads, head_dim) with the sizes of "
                f"`query` {tuple(query.shape)} in all but the positions, but has {tuple(key.shape)}."
            )
        for part, tensor in (("key", key), ("value", value)):
            if tensor.dtype != query.dtype or tensor.device != query.device:
                raise ValueError(
                    f"`{part}` of {name} must have the dtype and device of `query` ({query.dtype} on "
                    f"{query.device}), but has {tensor.dtype} on {tensor.device}."
                )
        if bias is None:
            return
        if tuple(bias.shape) != tuple(key.shape[:2]) or not bias.is_floating_point() or bias.device != query.device:
            raise ValueError(
                f"`bias` of {name} must be of a floating dtype, on {query.device}, and of the shape (batch_size, "
                f"positions) = {tuple(key.shape[:2])}, but is {bias.dtype} on {bias.device} of the shape "
                f"{tuple(bias.shape)}."
            )

    def _check_window(self, name: str, query_grid: Grid) -> None:
        grid, kernel_size = self.grid, self.kernel_size
        assert grid is not None
        assert kernel_size is not None
        if len(kernel_size) != 2 or any(size < 1 or size % 2 == 0 for size in kernel_size):
            raise ValueError(
                f"`kernel_size` of {name} must be two odd positive numbers, height and width in cells, but is "
                f"{kernel_size}."
            )
        check_grid(f"`grid` of {name}", grid, "its `key`", self.key)
        if query_grid[0] % grid[0] or query_grid[1] % grid[1]:
            raise ValueError(
                f"Each side of `query_grid` must be a multiple of the same side of the `grid` of {name}, but they are "
                f"{tuple(query_grid)} and {tuple(grid)}."
            )


def check_grid(name: str, grid: Grid, tensor_name: str, tensor: torch.Tensor) -> None:
    """Raise unless `grid` is two positive numbers whose product is the number of positions of `tensor`."""
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"{name} must be two positive numbers, rows and columns, but is {grid}.")
    if grid[0] * grid[1] != tensor.shape[1]:
        raise ValueError(
            f"{name} {tuple(grid)} needs {grid[0] * grid[1]} positions, but {tensor_name} has {tensor.shape[1]}."
        )


def bias_in(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias in another dtype, in which what was finite stays finite: else the lowest number would hide a key."""
    limits = torch.finfo(dtype)
    if torch.finfo(bias.dtype).max <= limits.max:
        return bias.to(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(limits.min, limits.max)).to(dtype)
