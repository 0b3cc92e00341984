#!/usr/bin/env python
"""
What a model of emoji scenes can do with pictures that are there, one JSON line a measurement: inpainting ("replace
the apple by a pizza"), captions of three strategies, read back, best of 8 by caption loss, and upscaling beside
its ceiling.

    python benchmarks/evaluate_editing.py --num 100 --output benchmarks/results/shipped_model_editing_cpu.jsonl
    python benchmarks/evaluate_editing.py --num 8 --measures captions,upscaling
    python benchmarks/evaluate_editing.py --measures post_selection --temperature 1 --top-k-clusters 16

`seconds` is the time that passed, `cpu_seconds` what this process computed: the former alone grows on a busy machine.
"""

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import typer

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.demo import LANGUAGES, Scope
from cogview_pipelines.demo.editing import (
    PICTURES,
    choose_edits,
    measure_captions,
    measure_inpainting,
    measure_upscaling,
)
from cogview_pipelines.demo.evaluation import choose_cases, measure_post_selection
from cogview_pipelines.environment import SHIPPED_MODEL, stamp

CAPTION_SPLITS = ("train", "test_background", "test_pair")
CAPTION_STRATEGIES = ("greedy", "beam", "best_of")
SELECTION_SPLITS = ("test_background", "test_order")
NUM_CANDIDATES = 8
UPSCALING_SPLITS = ("train", "test_background")


def inpainting(pipe: CogView2Pipeline, scope: Scope, num: int, seed: int, batch_size: int) -> Iterator[dict]:
    for language in LANGUAGES:
        edits = choose_edits(scope, language, num, seed)
        for pictures in PICTURES:
            what = {"language": language, "pictures": pictures, "n": len(edits)}
            yield {**what, **measure_inpainting(pipe, edits, pictures=pictures)}


def captions(pipe: CogView2Pipeline, scope: Scope, num: int, seed: int, batch_size: int) -> Iterator[dict]:
    for strategy in CAPTION_STRATEGIES:
        for split in CAPTION_SPLITS:
            for language in LANGUAGES:
                cases = choose_cases(scope, split, language, num, seed)
                layouts = {name: sum(case.scene.layout == name for case in cases) for name in scope.layouts}
                what = {"split": split, "language": language, "strategy": strategy, "n": len(cases)}
                what["layouts"] = layouts
                own = torch.Generator().manual_seed(seed) if strategy == "best_of" else None
                call = {"batch_size": batch_size, "strategy": strategy, "generator": own}
                yield {**what, **measure_captions(pipe, cases, language, **call)}


def post_selection(
    pipe: CogView2Pipeline, scope: Scope, num: int, seed: int, batch_size: int, sampling: dict | None = None
) -> Iterator[dict]:
    for split in SELECTION_SPLITS:
        for language in LANGUAGES:
            cases = choose_cases(scope, split, language, num, seed)
            what = {"split": split, "language": language, "candidates": NUM_CANDIDATES, "n": len(cases)}
            what["sampling"] = sampling or "preset"
            yield {
                **what,
                **measure_post_selection(
                    pipe, cases, num_candidates=NUM_CANDIDATES, batch_size=batch_size, sampling=sampling
                ),
            }


def upscaling(pipe: CogView2Pipeline, scope: Scope, num: int, seed: int, batch_size: int) -> Iterator[dict]:
    for split in UPSCALING_SPLITS:
        cases = choose_cases(scope, split, "en", num, seed)
        for with_prompt in (True, False):
            what = {"split": split, "with_prompt": with_prompt, "n": len(cases)}
            yield {**what, **measure_upscaling(pipe, cases, batch_size=batch_size, with_prompt=with_prompt)}


MEASURES = {
    "inpainting": inpainting,
    "captions": captions,
    "post_selection": post_selection,
    "upscaling": upscaling,
}


def main(
    model: str = typer.Option(str(SHIPPED_MODEL), help="Folder of a saved pipeline with its scope.json."),
    output: Path = typer.Option(None, help="JSONL file; lines are added."),
    num: int = typer.Option(100, min=2, help="Cases of each measurement."),
    measures: str = typer.Option(",".join(MEASURES), help="Which ones, joined by commas."),
    seed: int = typer.Option(0, min=0, help="Of scenes, captions and results."),
    batch_size: int = typer.Option(16, min=1, help="Pictures that are computed at a time."),
    temperature: float = typer.Option(None, min=0.01, help="Of the candidates of post_selection."),
    top_k_clusters: int = typer.Option(None, min=1, help="Likewise."),
    cluster_temperature: float = typer.Option(None, min=0.01, help="Likewise."),
    guidance_scale: float = typer.Option(None, min=0, help="Likewise.  [default of all four: the model's own]"),
) -> None:
    chosen = measures.split(",")
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown:
        raise typer.BadParameter(f"`--measures` must be among {', '.join(MEASURES)}, but names {', '.join(unknown)}.")
    sampling = {
        "temperature": temperature,
        "top_k_clusters": top_k_clusters,
        "cluster_temperature": cluster_temperature,
        "guidance_scale": guidance_scale,
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and "post_selection" not in chosen:
        raise typer.BadParameter(f"{', '.join(sampling)} of candidates have no effect without post_selection.")
    functions = {**MEASURES, "post_selection": functools.partial(post_selection, sampling=sampling)}
    pipe = CogView2Pipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scope = Scope.load(model)
    context = {"seed": seed, "model": "shipped" if Path(model) == SHIPPED_MODEL else model, **stamp(str(pipe.device))}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        started = _clocks()
        for result in functions[name](pipe, scope, num, seed, batch_size):
            seconds, cpu_seconds = (round(now - before, 1) for now, before in zip(_clocks(), started))
            line = json.dumps({"measure": name, **result, "seconds": seconds, "cpu_seconds": cpu_seconds, **context})
            print(line, flush=True)
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            started = _clocks()


def _clocks() -> tuple[float, float]:
    """Seconds that passed, and those that this process computed in all of its threads."""
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    typer.run(main)
