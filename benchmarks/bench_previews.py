#!/usr/bin/env python
"""
What previews cost: the same pictures made by a call, by `stream` with its limit on previews, and by `stream` with
every preview, in turns, for previews put together from patches and for decoded ones; and one of each by itself.

    python benchmarks/bench_previews.py --device cpu
    python benchmarks/bench_previews.py --model FOLDER --device cuda --dtype bfloat16 --num-images 4 --json
"""

import functools
import json
import statistics
import time
from enum import Enum
from pathlib import Path

import torch
import typer

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.environment import SHIPPED_MODEL, stamp


class DType(str, Enum):
    """Number formats of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def seconds(work, device: str) -> float:
    """How long something takes, all of its work on the device included."""
    start = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(
    model: Path = typer.Option(SHIPPED_MODEL, help="A saved pipeline."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    dtype: DType = typer.Option(DType.float32, help="Number format of the weights."),
    num_images: int = typer.Option(1, min=1, help="Pictures at a time."),
    rows_per_preview: int = typer.Option(1, min=1, help="Rows of low-resolution tokens from one preview to the next."),
    max_preview_share: float = typer.Option(0.05, min=0, max=1, help="By which share previews may slow a call down."),
    repeats: int = typer.Option(9, min=1, help="Times that each is measured, after one that is not."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON line."),
) -> None:
    """Measure what previews cost."""
    pipe = CogView2Pipeline.from_pretrained(model, dtype=getattr(torch, dtype.value)).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_images_per_prompt": num_images, "max_batch_size": num_images, "output_type": "latent"}

    def plain():
        pipe("a tiger", generator=torch.Generator().manual_seed(1), **call)

    def watched(share: float | None, full: bool, counts: list[int]):
        generator = torch.Generator().manual_seed(1)
        settings = {"rows_per_preview": rows_per_preview, "max_preview_share": share, "full_previews": full}
        *previews, _ = pipe.stream("a tiger", generator=generator, **settings, **call)
        counts.append(len(previews))

    shares = {"limited": max_preview_share, "all": None}
    names = {f"{kind}_{name}": (name, kind == "full") for kind in ("patches", "full") for name in shares}
    counts: dict[str, list[int]] = {name: [] for name in names}
    ways = {"none": plain}
    for key, (name, full) in names.items():
        ways[key] = functools.partial(watched, shares[name], full, counts[key])
    seconds_for_patches = seconds(pipe.code_patches, device)  # before they are needed
    for work in ways.values():
        work()
    for made in counts.values():
        made.clear()
    # in turns, so that whatever else the machine does meets them all, and each turn compared by itself
    turns = [{name: seconds(work, device) for name, work in ways.items()} for _ in range(repeats)]
    drafts = torch.zeros(num_images, *pipe.transformer.config.image_grid, dtype=torch.long)
    result = {
        "benchmark": "previews",
        **stamp(device),
        "dtype": dtype.value,
        "num_images": num_images,
        "rows_per_preview": rows_per_preview,
        "max_preview_share": max_preview_share,
        "repeats": repeats,
        "num_possible_previews": statistics.median(counts["full_all"]),
        "seconds_without_previews": statistics.median(turn["none"] for turn in turns),
        "seconds_for_patches": seconds_for_patches,
    }
    for key in names:
        result[f"num_previews_{key}"] = statistics.median(counts[key])
        result[f"share_of_previews_{key}"] = statistics.median(turn[key] / turn["none"] for turn in turns) - 1
    for kind, draw in (("patches", pipe.sketch), ("full", pipe.preview)):
        costs = [seconds(functools.partial(draw, drafts), device) for _ in range(repeats)]
        result[f"seconds_per_draft_preview_{kind}"] = statistics.median(costs)
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>26}  {value:.4g}" if isinstance(value, float) else f"{name:>26}  {value}")


if __name__ == "__main__":
    typer.run(main)
