"""What benchmarks measure: the products that they count, memory that they see, and the baseline they compare with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pipelines.generation.cache import KeyValueCache
from cogview_pipelines.schedulers.scheduling_lopar import LoPARScheduler
from cogview_pipelines.speed.generation_speed import (
    bench_pipeline,
    canvas_products,
    num_weight_bytes,
    operations,
    step_products,
    table,
)
from cogview_pipelines.speed.timing import PeakMemory, median_seconds, resident_bytes

from ..pipelines.conftest import build
from ..utils import FINE_GRID, make_coglm, make_image_tokens, make_texts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}


def counted(function):
    """Operations of all plain matrix products of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in PRODUCTS)


def test_the_products_of_a_step_are_those_that_a_step_computes():
    model = make_coglm()
    cache = KeyValueCache(model.config, 3, 4, model.dtype, model.device)
    ids = make_image_tokens(3, 1)
    assert operations(step_products(model, 3)) == counted(lambda: model(ids, torch.tensor([[7]] * 3), cache=cache))


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_the_products_of_the_canvas_are_those_that_its_passes_compute(kind):
    from cogview_pipelines.generation.canvas import refine
    from cogview_pipelines.models.cogview2.sequences import direct_super_resolution, iterative_super_resolution

    model, scheduler = make_coglm(kind), LoPARScheduler([[0, 1], [2, 1]], top_k=(10, 5))
    texts, slots = make_texts([2, 3]), model.config.num_text_slots
    sequence = (
        iterative_super_resolution(texts, slots)
        if kind == "iterative"
        else direct_super_resolution(texts, make_image_tokens(2), slots, model.config.layout)
    )
    with torch.no_grad():
        context = model.encode_context(sequence)
    canvas = make_image_tokens(2, FINE_GRID[0] * FINE_GRID[1]).unflatten(1, FINE_GRID)
    expected = counted(lambda: refine(model, scheduler, context, canvas))
    assert operations(canvas_products(model, scheduler, 2)) == expected


def test_weights_that_models_share_count_once(tokenizer):
    shared, own = build(tokenizer, shares_backbone=True), build(tokenizer)
    backbone = sum(p.nbytes for p in shared.transformer.parameters())
    assert num_weight_bytes(own) - num_weight_bytes(shared) == backbone


def test_a_pipeline_is_measured_in_all_stages(pipe):
    line = bench_pipeline(pipe, 2, limit=0.01)
    json.dumps(line)
    assert set(line["stage_seconds"]) == {
        "transformer",
        "direct_sr_transformer",
        "iterative_sr_transformer",
        "vqvae",
    }
    assert sum(line["stage_seconds"].values()) <= line["seconds"] * 1.5
    assert line["stage1_fraction_of_floor"] > 0 and line["super_resolution_fraction_of_floor"] > 0
    assert line["seconds_per_image"] == pytest.approx(line["seconds"] / 2)
    assert line["hardware"] and line["versions"]["torch"] and line["date"]
    assert "% of the floor" in table(line)


def test_guidance_counts_twice_the_sequences(pipe):
    assert bench_pipeline(pipe, 1, limit=0.01, height=32, guidance_scale=2.0)["sequences"] == 2


@pytest.mark.skipif(resident_bytes() is None, reason="the system does not tell the memory of a process")
def test_peak_memory_sees_what_was_there_for_a_while():
    with PeakMemory("cpu") as memory:
        blocks = [torch.ones(2**24)]
        median_seconds(blocks[0].sum, "cpu", 0.05)
        blocks.clear()
    assert memory.bytes >= 0.9 * 4 * 2**24


def test_the_original_way_makes_the_same_pictures(pipe, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from original_way import OriginalWay

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(5)]  # more than one chunk of super-resolution

    prompt = "a tiger on a blue background."
    ours = pipe(prompt, num_images_per_prompt=5, generator=generators(), output_type="latent", guidance_scale=1.0)
    original = OriginalWay(pipe)(prompt, 5, generators(), 1000)
    assert (ours.tokens == original["tokens"]).float().mean() > 0.99  # masked keys weigh e^-10000 instead of nothing
    assert set(original["seconds"]) == {
        "transformer",
        "direct_sr_transformer",
        "iterative_sr_transformer",
        "vqvae",
    }


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size():
    command = [sys.executable, str(BENCHMARKS / "bench_generation.py"), "--device", "cpu", "--cases", "tiny_b2"]
    result = subprocess.run(
        [*command, "--baseline", "--seconds", "0.1", "--json"], capture_output=True, text=True, check=True
    )
    line = json.loads(result.stdout)
    assert line["speedup_over_baseline"] > 0 and line["same_tokens"] > 0.99
    assert line["peak_memory_bytes"] > 0
