"""Figures of an evaluation from what its blocks hold, each with what says how sure it is."""

import math
from functools import partial

from .blocks import Blocks
from .distances import (
    frechet_distance_with_error,
    inception_score,
    mean_with_error,
    precision_and_recall,
    share_with_error,
)
from .requirements import OVERALL, TASK

Figures = dict[str, dict[str, float | None]]


def figures_of(blocks: Blocks, radii: tuple[float, ...], with_precision: bool = False) -> tuple[Figures, list[str]]:
    """
    All figures, and notes on them.

    Args:
        blocks ([`Blocks`]): What was kept of the pictures.
        radii (tuple of `float`): Of the blur.
        with_precision (`bool`, defaults to `False`): Precision and recall, too; all features are in memory for them.
    """
    figures: Figures = {}
    notes: list[str] = []
    for radius in radii:
        true, made = f"true/{radius:g}", f"made/{radius:g}"
        if {true, made} <= blocks.names and blocks.count >= 2:
            value, error = frechet_distance_with_error(partial(blocks.chunks, true), partial(blocks.chunks, made))
            figures[f"fid_{radius:g}"] = {"value": value, "standard_error": error}
            width = next(blocks.chunks(made)).shape[1]
            note = (
                f"{blocks.count} pictures are fewer than the network's {width} features: FID is far too large, and "
                "can only be compared with that of as many pictures."
            )
            if blocks.count < width and note not in notes:
                notes.append(note)
    sides = f"true/{radii[0]:g}", f"made/{radii[0]:g}"
    if with_precision and blocks.names.issuperset(sides):
        shares = precision_and_recall(*map(blocks.values, sides))
        figures |= {name: share_with_error(share, blocks.count) for name, share in shares.items()}
    if "logits" in blocks.names and blocks.count >= 2:
        value, deviation = inception_score(blocks.chunks("logits"), blocks.count)
        figures["inception_score"] = {"value": value, "deviation_over_splits": deviation}
    for name in sorted(name for name in blocks.names if name.startswith("score/")):
        value, error = mean_with_error(blocks.values(name))
        figures[name.removeprefix("score/")] = {"value": value, "standard_error": error}
    return figures | _checked(blocks), notes


def _checked(blocks: Blocks) -> Figures:
    """Shares of the pictures that show what was asked for; over all, each task counts alike, as in GenEval."""
    names = sorted(name.removeprefix("check/") for name in blocks.names if name.startswith("check/"))
    shares: Figures = {}
    for name in names:
        values = blocks.values(f"check/{name}")
        shares[name] = {**share_with_error(float(values.mean()), len(values)), "pictures": len(values)}
    tasks = [share for name, share in shares.items() if name.startswith(TASK)]
    if not tasks:
        return shares
    errors = [share["standard_error"] for share in tasks]
    known = [error for error in errors if error is not None]
    overall = {
        "value": sum(share["value"] or 0.0 for share in tasks) / len(tasks),
        "standard_error": math.hypot(*known) / len(tasks) if len(known) == len(errors) else None,
    }
    return {OVERALL: overall, **shares}
