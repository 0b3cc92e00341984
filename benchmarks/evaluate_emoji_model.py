#!/usr/bin/env python
"""
Everything that a model of emoji scenes is scored by, one JSON line a measurement: every split, language and layout,
with the ceiling of the image tokenizer, the floor of exchanged pictures, caption losses and post-selection. Of a
CogView also pictures after super-resolution by windows, and its captions, read back.

    python benchmarks/evaluate_emoji_model.py --num 50 --output benchmarks/results/shipped_model.jsonl
    python benchmarks/evaluate_emoji_model.py --model src/cogview_pipelines/demo/models/cogview-emoji --num 60
"""

import json
from pathlib import Path

import torch
import typer

from cogview_pipelines import CogView2Pipeline, CogViewPipeline
from cogview_pipelines.demo import LANGUAGES, Scope, SpriteSet
from cogview_pipelines.demo.editing import measure_captions
from cogview_pipelines.demo.evaluation import (
    Pipeline,
    choose_cases,
    generators,
    measure_caption_loss,
    measure_pictures,
    measure_post_selection,
)
from cogview_pipelines.environment import SHIPPED_MODEL, stamp

FAMILIES = {kind.__name__: kind for kind in (CogView2Pipeline, CogViewPipeline)}
SPLITS = ("test_wording", "train", "test_background", "test_pair", "test_order", "test_style")


def load(model: str) -> Pipeline:
    """A saved pipeline of either family, in float32."""
    kind = FAMILIES[CogView2Pipeline.load_config(model)["_class_name"]]
    return kind.from_pretrained(model, dtype=torch.float32)


def measurements(pipe: Pipeline, scope: Scope, num: int, seed: int, batch_size: int, sprites: SpriteSet | None = None):
    """
    Yield what was measured, most wanted first. Scenes that a scope does not have are left out, and captions that are
    too long for the model: `n` counts those that were measured.
    """

    def cases(split, language, layout):
        try:
            found = choose_cases(scope, split, language, num, seed, layout)
        except ValueError:
            return []
        return [case for case in found if fits(case.caption)]

    def fits(caption: str) -> bool:
        try:
            pipe.check_inputs(caption)
        except ValueError:  # too long for the model, which says so
            return False
        return True

    cells = [(split, layout) for split in SPLITS for layout in scope.layouts if cases(split, "en", layout)]
    steps = [{}, {"finer": True}] if isinstance(pipe, CogViewPipeline) else [{}]
    for step in steps:
        for split, layout in cells:
            for language in LANGUAGES:
                chosen = cases(split, language, layout)
                what = {"split": split, "layout": layout, "language": language, **step, "n": len(chosen)}
                yield {**what, "baseline": "none", **measure_pictures(pipe, chosen, batch_size=batch_size, **step)}
    for step in steps:
        for split, layout in cells:
            chosen = cases(split, "en", layout)
            what = {"split": split, "layout": layout, "language": None, **step, "n": len(chosen)}
            yield {
                **what,
                "baseline": "ceiling",
                **measure_pictures(pipe, chosen, baseline="ceiling", sprites=sprites, **step),
            }
    if isinstance(pipe, CogViewPipeline):  # those of CogView2 are in evaluate_editing.py, with what else it can do
        for split in ("train", "test_background", "test_pair"):
            chosen = choose_cases(scope, split, "en", num, seed)
            what = {"split": split, "language": "either", "measure": "captions", "n": len(chosen)}
            yield {**what, **measure_captions(pipe, chosen, None, batch_size=batch_size, generator=generators(chosen))}
    for language in LANGUAGES:
        chosen = choose_cases(scope, "test_background", language, num, seed)
        what = {"split": "test_background", "language": language, "n": len(chosen)}
        yield {**what, "measure": "caption_loss", **measure_caption_loss(pipe, chosen, sprites=sprites)}
    chosen = choose_cases(scope, "test_background", "en", num, seed)
    what = {"split": "test_background", "language": "en", "n": len(chosen)}
    yield {
        **what,
        "baseline": "shuffled",
        **measure_pictures(pipe, chosen, baseline="shuffled", batch_size=batch_size),
    }
    # The presets of a small CogView leave little to choose from: drawn as in the release as well.
    released = [{"temperature": 1.0, "top_k": 200}] if isinstance(pipe, CogViewPipeline) else []
    for sampling in (None, *released):
        what |= {} if sampling is None else {"sampling": sampling}
        found = measure_post_selection(pipe, chosen, batch_size=batch_size, sampling=sampling)
        yield {**what, "measure": "best_of_8", **found}


def main(
    model: str = str(SHIPPED_MODEL),
    output: Path | None = None,
    num: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    sprites: Path | None = None,
    int8: bool = False,
) -> None:
    """
    `sprites` is a folder of full-size drawings, for models of pictures beyond 240 pixels; `int8` is about
    super-resolution.
    """
    pipe = load(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    if int8:
        if not isinstance(pipe, CogView2Pipeline):
            raise typer.BadParameter("`--int8` is about the super-resolution of CogView2.")
        pipe.set_super_resolution(int8=True)
    scope = Scope.load(model)
    drawings = None if sprites is None else SpriteSet(sprites)
    context = {**stamp(str(pipe.device)), **({"int8": True} if int8 else {})}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("", encoding="utf-8")
    for result in measurements(pipe, scope, num, seed, batch_size, drawings):
        line = json.dumps({**result, **context})
        print(line, flush=True)
        if output is not None:
            with output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    typer.run(main)
