"""LoPAR, local parallel autoregression: which cells of the canvas become final in which pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from ..generation.sampling import sample_cluster_tokens, sample_tokens

# Source: the released iterative super-resolution. Cells with an entry below 1 keep their token.
RELEASED_STEP_GRID = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)
RELEASED_TOP_K = (40, 40, 40, 20, 20, 10)


@dataclass
class LoPARSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, rows, columns)`): The canvas after the pass.
    """

    prev_sample: torch.Tensor


class LoPARScheduler(SchedulerMixin, ConfigMixin):
    """
    A small grid of step numbers, tiled over the canvas: a cell with entry `v` becomes final in pass `v`.

    In pass `t` the transformer sees every cell with an entry of `t` or more as unknown. An entry below 1 keeps its
    token always. Direct super-resolution is the grid `[[1]]`: all cells in one pass. There is no state between steps,
    so pipelines may share a scheduler.

    Args:
        step_grid (`Sequence[Sequence[int]]`): The grid; default: the released 6 x 6 grid of 6 passes.
        top_k (`Sequence[int]`): Of each pass, how many tokens (or clusters) stay in the draw; one number for all
            passes is also taken.
        temperature (`float`): Divides the logits.
        cluster_temperature (`float`, *optional*):
            If given, draw by cluster sampling: `top_k` counts clusters, and inside the cluster the logits are divided
            by this again.

    Source: section 3.2 of the paper (https://arxiv.org/abs/2204.14217); grid and top-k from the release.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        step_grid: Sequence[Sequence[int]] = RELEASED_STEP_GRID,
        top_k: Sequence[int] | int = RELEASED_TOP_K,
        temperature: float = 1.0,
        cluster_temperature: float | None = None,
    ):
        widths = {len(row) for row in step_grid}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"`step_grid` must have rows of one length, but they have lengths {sorted(widths)}.")
        num_steps = max(max(row) for row in step_grid)
        missing = set(range(1, num_steps + 1)) - {entry for row in step_grid for entry in row}
        if num_steps < 1 or missing:
            raise ValueError(
                f"`step_grid` must use every step from 1 to its largest ({num_steps}); missing: {sorted(missing)}."
            )
        if not isinstance(top_k, int) and len(top_k) != num_steps:
            raise ValueError(
                f"`top_k` must be one number or one per step ({num_steps}), but has {len(top_k)} entries."
            )
        if min([top_k] if isinstance(top_k, int) else top_k) < 1:
            raise ValueError(f"`top_k` must be at least 1, but is {top_k}.")
        for name, value in (("temperature", temperature), ("cluster_temperature", cluster_temperature)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, but is {value}.")
        self.timesteps = torch.arange(1, num_steps + 1)

    @classmethod
    def diagonal(cls, sigma: int, **kwargs) -> "LoPARScheduler":
        """The paper's schedule: anti-diagonals of `sigma` x `sigma` blocks, `2 * sigma - 1` passes."""
        if sigma < 1:
            raise ValueError(f"`sigma` must be at least 1, but is {sigma}.")
        kwargs.setdefault("top_k", RELEASED_TOP_K[0])
        return cls([[row + column + 1 for column in range(sigma)] for row in range(sigma)], **kwargs)

    def with_num_steps(self, num_steps: int) -> "LoPARScheduler":
        """
        The same schedule in another number of passes: fewer join neighbouring steps, more split steps in raster order.

        Raises:
            ValueError: If `num_steps` is not between 1 and the number of cells of the grid that are predicted at all.
        """
        cells = sorted(
            (entry, row, column)
            for row, entries in enumerate(self.config.step_grid)
            for column, entry in enumerate(entries)
            if entry >= 1
        )
        if not 1 <= num_steps <= len(cells):
            raise ValueError(f"`num_steps` must be from 1 to {len(cells)} with this `step_grid`, but is {num_steps}.")
        old_steps = len(self.timesteps)
        if num_steps <= old_steps:
            groups = [-(-entry * num_steps // old_steps) for entry, _, _ in cells]
        else:
            groups = _split_evenly([entry for entry, _, _ in cells], num_steps)
        grid = [list(row) for row in self.config.step_grid]
        top_k = [1] * num_steps
        for (entry, row, column), group in zip(cells, groups):
            grid[row][column] = group
            top_k[group - 1] = max(top_k[group - 1], self._top_k(entry))
        return self.with_settings(step_grid=grid, top_k=top_k)

    def with_settings(self, **changes) -> "LoPARScheduler":
        """The same scheduler with some arguments changed."""
        # not `from_config`, which takes arguments that were given by position for defaults
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return type(self)(**{**config, **changes})

    def step_map(self, height: int, width: int) -> torch.Tensor:
        """
        The grid tiled over a canvas.

        Returns:
            `torch.Tensor` of shape `(height, width)`: The pass in which each cell becomes final; below 1: never
                predicted.
        """
        grid = torch.tensor(self.config.step_grid)
        rows, columns = grid.shape
        if height % rows or width % columns:
            raise ValueError(
                f"The canvas must be tiled by the {rows} x {columns} step grid, but is {height} x {width}."
            )
        return grid.repeat(height // rows, width // columns)

    def masked_positions(self, timestep: int, height: int, width: int) -> torch.Tensor:
        """`(height, width)` mask, True where the transformer sees an unknown cell in pass `timestep`."""
        return self.step_map(height, width) >= timestep

    def final_positions(self, timestep: int, height: int, width: int) -> torch.Tensor:
        """`(height, width)` mask, True where pass `timestep` sets the token; later passes set the rest."""
        return self.step_map(height, width) == timestep

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        positions: torch.Tensor,
        noise: torch.Tensor,
        cluster_labels: torch.Tensor | None = None,
    ) -> LoPARSchedulerOutput:
        """
        Draw the tokens of one pass and put them on the canvas.

        Args:
            model_output, timestep, noise, cluster_labels: As for [`draw`], of the positions in raster order.
            sample (`torch.Tensor` of shape `(batch_size, rows, columns)`): The canvas before the pass.
            positions (`torch.Tensor` of shape `(rows, columns)`): True where a token is drawn.
        """
        sample = sample.clone()
        sample[:, positions] = self.draw(model_output, timestep, noise, cluster_labels)
        return LoPARSchedulerOutput(prev_sample=sample)

    def draw(
        self,
        model_output: torch.Tensor,
        timestep: int,
        noise: torch.Tensor,
        cluster_labels: torch.Tensor | None = None,
        num_clusters: int | None = None,
    ) -> torch.Tensor:
        """
        Draw tokens as a pass does.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_positions, num_tokens)`): Logits of some or all
                positions of the pass.
            timestep (`int`): The pass, counted from 1.
            noise (`torch.Tensor` of shape `(batch_size, num_positions, 2)`): Uniform numbers in [0, 1).
            cluster_labels (`torch.Tensor` of shape `(num_tokens,)`, *optional*): Needed for cluster sampling.
            num_clusters (`int`, *optional*): Number of clusters; by default read from the labels, which waits for the
                device.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_positions)`: Tokens.
        """
        temperature, top_k = self.config.temperature, self._top_k(timestep)
        if self.config.cluster_temperature is None:
            return sample_tokens(model_output, noise, temperature, top_k)
        if cluster_labels is None:
            raise ValueError(
                "`cluster_labels` must be given, because `cluster_temperature` asks for cluster sampling."
            )
        return sample_cluster_tokens(
            model_output, noise, cluster_labels, temperature, top_k, self.config.cluster_temperature, num_clusters
        )

    def _top_k(self, timestep: int) -> int:
        top_k = self.config.top_k
        return top_k if isinstance(top_k, int) else top_k[timestep - 1]


def _split_evenly(entries: list[int], num_steps: int) -> list[int]:
    """New step of each cell, given the sorted old ones, so that every old step is split into nearly equal parts."""
    sizes = [entries.count(entry) for entry in sorted(set(entries))]
    parts = [1] * len(sizes)
    while sum(parts) < num_steps:  # split next where the parts are largest
        parts[max(range(len(sizes)), key=lambda step: sizes[step] / parts[step])] += 1
    steps, first = [], 1
    for size, count in zip(sizes, parts):
        steps += [first + cell * count // size for cell in range(size)]
        first += count
    return steps


LoPARScheduler.__module__ = "cogview_pipelines"
