"""
CogView beside CogView2: both systems with random weights of one width and depth, in one run; pictures of 512 pixels by
CogView (1,024 tokens, then 4,096 in nine windows) and of 480 pixels by CogView2 (400 tokens, then 3,600 in a few
passes), with the released settings.

    python benchmarks/bench_cogview_cogview2.py                                   # 6 layers of 256, on a CPU
    python benchmarks/bench_cogview_cogview2.py --device cuda --hidden_size 2560 --num_layers 48 --dtype float16
    python benchmarks/bench_cogview_cogview2.py --tiny                            # to try it out

Prints one JSON line: of each system the seconds and passes of each stage, and of both together how many times faster
CogView2 is. Seconds are medians of `--repeats` calls after one that warms up. With `--one_by_one` tokens are written
one a pass, as in the releases; otherwise each pipeline decodes as it does by default.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from cogview_pipelines import (
    CogLMCanvasConfig,
    CogLMCanvasModel,
    CogLMConfig,
    CogLMModel,
    CogView2Pipeline,
    CogViewConfig,
    CogViewModel,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
    CogViewVQConfig,
    CogViewVQModel,
    IcetkTokenizer,
    IcetkVQConfig,
    IcetkVQModel,
    LoPARScheduler,
)
from cogview_pipelines.environment import SHIPPED_MODEL, stamp

sys.path.insert(0, str(Path(__file__).parent))
from bench_generation import TINY, random_pipeline

PROMPT = "a red cat under a blue sky"


def make_cogview(options: argparse.Namespace) -> CogViewPipeline:
    """CogView of random weights: its released vocabularies and sequences, or tiny ones."""
    grid = (4, 4) if options.tiny else (32, 32)
    num_codes = 1024 if options.tiny else 8192
    tokenizer = CogViewTokenizer(SHIPPED_MODEL / "tokenizer" / "ice_text.model", num_codes)
    positions = grid[0] * grid[1] + 65
    config = CogViewConfig(
        vocab_size=len(tokenizer) if options.tiny else 58240,
        num_image_tokens=num_codes,
        command_token_id=tokenizer.command_token_id,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=positions,
        max_super_resolution_length=positions + grid[0] * grid[1] // 4,
        image_grid=grid,
    )
    with torch.device(options.device):
        models = [CogViewModel(config).to(getattr(torch, options.dtype)).eval() for _ in range(2)]
        vqvae = CogViewVQModel(CogViewVQConfig(num_embeddings=num_codes, hidden_channels=64 if options.tiny else 512))
    pipe = CogViewPipeline(
        tokenizer,
        vqvae.to(getattr(torch, options.dtype)).eval(),
        models[0],
        super_resolution_transformer=models[1],
    )
    return pipe.to(options.device)


def make_cogview2(options: argparse.Namespace) -> CogView2Pipeline:
    """CogView2 of random weights, as wide and deep: its released vocabulary and grids, or tiny ones."""
    size = {
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
    }
    if options.tiny:
        return random_pipeline(options.device, getattr(torch, options.dtype), **{**TINY, **size})
    with torch.device(options.device):
        transformer = CogLMModel(CogLMConfig(**size)).eval()
        iterative = CogLMCanvasModel(CogLMCanvasConfig(**size, super_resolution="iterative")).eval()
        direct = CogLMCanvasModel.from_transformer(
            transformer, "direct", iterative.config.fine_grid, shares_backbone=True
        ).eval()
        vqvae = IcetkVQModel(IcetkVQConfig()).eval()
    vqvae.cluster_labels.copy_(torch.arange(vqvae.config.num_embeddings) % vqvae.config.num_clusters)
    pipe = CogView2Pipeline(
        IcetkTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer"),
        transformer,
        vqvae,
        direct,
        iterative,
        LoPARScheduler(step_grid=((1,),), top_k=100, cluster_temperature=0.89),
        LoPARScheduler(),
    )
    return pipe.to(options.device, getattr(torch, options.dtype))


def stages(output) -> dict[str, dict]:
    """Seconds and passes of each stage of a call."""
    return {name: {"seconds": stage.seconds, "passes": stage.num_passes} for name, stage in output.statistics.items()}


def call_cogview(pipe: CogViewPipeline, upscale: CogViewUpscalePipeline, seed: int) -> dict[str, dict]:
    """A picture of 512 pixels."""
    common = {"return_statistics": True, "output_type": "pt"}
    first = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **common)
    second = upscale(prompt=PROMPT, tokens=first.tokens, generator=torch.Generator().manual_seed(seed), **common)
    found = stages(first)
    for name, own in stages(second).items():
        found[name if name != "vqvae" else "vqvae of the larger picture"] = own
    return found


def call_cogview2(pipe, seed: int) -> dict[str, dict]:
    """A picture of 480 pixels."""
    output = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), return_statistics=True, output_type="pt")
    found = stages(output)
    for name in ("direct_sr", "iterative_sr"):  # one pass of the model for each step of its scheduler
        stage = found.get(f"{name}_transformer")
        if stage is not None:
            stage["passes"] = len(getattr(pipe, f"{name}_scheduler").timesteps)
    return found


def measure(call, repeats: int) -> dict:
    """Median seconds of each stage and of all, and passes, of calls with different seeds."""
    call(0)
    runs = []
    for repeat in range(repeats):
        start = time.perf_counter()
        found = call(repeat + 1)
        runs.append((time.perf_counter() - start, found))
    names = runs[0][1]
    passes = [sum(stage["passes"] or 0 for stage in found.values()) for _, found in runs]
    return {
        "seconds": statistics.median(seconds for seconds, _ in runs),
        "passes": statistics.median(passes),
        "stages": {
            name: {
                "seconds": round(statistics.median(found[name]["seconds"] for _, found in runs), 4),
                "passes": names[name]["passes"] and statistics.median(found[name]["passes"] for _, found in runs),
            }
            for name in names
        },
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one_by_one", action="store_true", help="one token a pass in both")
    parser.add_argument("--tiny", action="store_true", help="pictures of 4 x 4 tokens")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cogview, cogview2 = make_cogview(options), make_cogview2(options)
    upscale = CogViewUpscalePipeline.from_pipe(cogview)
    for pipe in (cogview, upscale, cogview2):
        pipe.set_progress_bar_config(disable=True)
        if options.one_by_one:
            pipe.set_decoding(parallel=1)
    first = measure(lambda seed: call_cogview(cogview, upscale, seed), options.repeats)
    second = measure(lambda seed: call_cogview2(cogview2, seed), options.repeats)
    line = {
        "cogview": {**first, "pixels": upscale.sizes[-1][0]},
        "cogview2": {**second, "pixels": cogview2.sizes[-1][0]},
        "cogview2_is_faster_by": round(first["seconds"] / second["seconds"], 2),
        "fewer_passes_by": round(first["passes"] / second["passes"], 2),
        **{name: getattr(options, name) for name in ("hidden_size", "num_layers", "num_heads", "dtype", "one_by_one")},
        **stamp(options.device),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
