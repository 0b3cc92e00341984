"""`refine` rewrites a canvas in a few passes, as a schedule says. Tensors only."""

from collections.abc import Callable

import torch

from ..models.cogview2.modeling_coglm_canvas import CogLMCanvasModel, CogLMContext
from ..schedulers.scheduling_lopar import LoPARScheduler
from .sampling import FiniteCheck, Generators, draw_noise
from .token_sequence import TokenSequence

# Bytes of float32 logits that super-resolution draws from at a time; drawing takes a few times as much memory.
LOGITS_BYTES = 128 * 2**20


@torch.no_grad()
def refine(
    model: CogLMCanvasModel,
    scheduler: LoPARScheduler,
    context: TokenSequence | CogLMContext,
    tokens: torch.Tensor | None = None,
    *,
    cluster_labels: torch.Tensor | None = None,
    cell_mask: torch.Tensor | None = None,
    generator: Generators = None,
    device: torch.device | str | None = None,
    callback: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """
    Predict the cells of a canvas pass by pass, as the scheduler says.

    In each pass only the cells that become final are drawn: the others would be masked again before the next pass, so
    the result has the same distribution as drawing all of them.

    Args:
        model (`CogLMCanvasModel`): Direct or iterative super-resolution.
        scheduler (`LoPARScheduler`): Which cells in which pass, and how they are drawn.
        context (`TokenSequence` or `CogLMContext`): What the canvas sees; encoded once, in the first pass.
        tokens (`torch.Tensor` of shape `(batch_size, rows, columns)`, *optional*): The canvas to start from; by
            default all unknown.
        cluster_labels (`torch.Tensor` of shape `(num_image_tokens,)`, *optional*): Needed for cluster sampling.
        cell_mask (`torch.Tensor` of shape `(rows, columns)`, *optional*): Cells outside it keep their tokens.
        generator: One generator, or one per image.
        device (`torch.device`, *optional*): Where to compute if hooks move the model; default: where it is.
        callback: Called with the number of passes done and the canvas after each pass; what is not final yet has its
            token of before. If it returns a canvas, that one goes on.

    Returns:
        `torch.Tensor` of shape `(batch_size, rows, columns)`.

    Raises:
        ValueError: If `tokens` is left out although some cells are never predicted, or the logits are not finite.
    """
    device = model.device if device is None else device
    rows, columns = model.config.fine_grid
    if isinstance(context, TokenSequence):
        context = context.to(device)
    batch_size = len(context)
    boi = model.config.boi_token_id
    canvas = torch.full((batch_size, rows, columns), boi, device=device) if tokens is None else tokens.to(device)
    noise = draw_noise((batch_size, rows, columns, 2), generator, device)
    allowed = torch.ones(rows, columns, dtype=torch.bool) if cell_mask is None else cell_mask.cpu()
    kept = ~(scheduler.masked_positions(1, rows, columns) & allowed)
    if tokens is None and kept.any():
        raise ValueError(
            f"`tokens` must be given, because {int(kept.sum())} of {kept.numel()} cells keep theirs with this "
            "`scheduler` and `cell_mask`."
        )
    check = FiniteCheck()
    num_clusters = None if cluster_labels is None else int(cluster_labels.max()) + 1
    num_cells = max(1, LOGITS_BYTES // (4 * batch_size * model.config.num_image_tokens))
    for timestep in scheduler.timesteps.tolist():
        masked = (scheduler.masked_positions(timestep, rows, columns) & allowed).to(device)
        drawn = scheduler.final_positions(timestep, rows, columns) & allowed
        cells = drawn.flatten().nonzero()[:, 0].to(device)
        if len(cells):
            visible = canvas.masked_fill(masked, boi).flatten(1)
            output = model(visible, context, logits_positions=cells, output_logits=False)
            context = output.context  # encoded in the first pass
            canvas = canvas.clone()
            for part, some in zip(cells.split(num_cells), output.last_hidden_state.split(num_cells, 1)):
                logits = model.logits(some)
                check.see(logits)
                canvas.view(batch_size, -1)[:, part] = scheduler.draw(
                    logits, timestep, noise.flatten(1, 2)[:, part], cluster_labels, num_clusters
                )
        if callback is not None and (changed := callback(timestep, canvas)) is not None:
            canvas = changed
    check.finish()
    return canvas
