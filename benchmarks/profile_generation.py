#!/usr/bin/env python
"""
Where the time goes: tables of `torch.profiler` for tokens of stage 1 and for one pass of direct super-resolution.

    python benchmarks/profile_generation.py --device cuda            # random weights of the released shape, bfloat16
    python benchmarks/profile_generation.py --device cpu --small
"""

import argparse

import torch
from bench_training import SMALL, make_config
from torch.profiler import ProfilerActivity, profile

from cogview_pipelines import CogLMCanvasModel, CogLMModel, LoPARScheduler
from cogview_pipelines.generation.canvas import refine
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview2.sequences import direct_super_resolution, text_to_image


def make_model(device: str, stage: str | None, fields: dict) -> CogLMModel | CogLMCanvasModel:
    """Random weights, made on the device in the type they are used in."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model_class = CogLMModel if stage is None else CogLMCanvasModel
            return model_class(make_config(stage, fields)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def show(what: str, function, device: str, rows: int) -> None:
    """Profile the second call."""
    function()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"\n{what}\n")
    print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=rows, max_name_column_width=70))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model instead of the released shape")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of stage 1")
    parser.add_argument("--rows", type=int, default=25, help="rows of each table")
    options = parser.parse_args(arguments)
    fields = SMALL if options.small else {}

    model = make_model(options.device, None, fields)
    config, layout = model.config, model.config.layout
    text = list(range(config.pad_token_id + 1, config.pad_token_id + 8))
    entries = torch.full((1, min(options.tokens, layout.image_length)), TO_GENERATE)

    def write():
        positions = layout.image_positions[: entries.shape[1]]
        generate(model, text_to_image([text], layout), lambda logits, noise: logits.argmax(-1), entries, positions)

    show(f"Stage 1, {entries.shape[1]} tokens", write, options.device, options.rows)
    del model

    model = make_model(options.device, "direct", fields)
    low = torch.zeros(1, layout.image_length, dtype=torch.long)
    context = direct_super_resolution([text], low, model.config.num_text_slots, model.config.layout)
    scheduler = LoPARScheduler(step_grid=((1,),), top_k=5)
    show("Direct super-resolution", lambda: refine(model, scheduler, context), options.device, options.rows)


if __name__ == "__main__":
    main()
