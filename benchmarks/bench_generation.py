"""
Seconds, memory and fractions of the floor of text to image: one JSON line for each case.

    python benchmarks/bench_generation.py --device cpu --baseline --json            # the shipped model
    python benchmarks/bench_generation.py --device cuda --baseline --json           # random weights of 6B shapes
    python benchmarks/bench_generation.py --device cuda --cases capped --folder /data/random6b --json
    python benchmarks/bench_generation.py --device cpu --cases tiny --baseline --seconds 1     # a rehearsal

`--baseline` makes the same pictures in the way of the original (`original_way.py`) on the same weights in the same
run, and adds `speedup_over_baseline` and `same_tokens`, the share of tokens that come out alike. Cases are named
`<model>_b<pictures at a time>`; `capped_<GB>_<setting>` saves the random pipeline in `--folder` (27 GB), loads it
again with a setting of `docs/memory.md`, and lets PyTorch take no more than so many GB of the GPU.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cogview_pipelines import (
    CogLMCanvasConfig,
    CogLMCanvasModel,
    CogLMConfig,
    CogLMModel,
    CogView2Pipeline,
    IcetkTokenizer,
    IcetkVQConfig,
    IcetkVQModel,
    LoPARScheduler,
)
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.speed.generation_speed import PROMPT, bench_pipeline, table
from cogview_pipelines.speed.timing import resident_bytes

sys.path.insert(0, str(Path(__file__).parent))
from original_way import OriginalWay

# a size for trying out: two layers, 4 x 4 to 12 x 12 tokens
TINY = {
    "vocab_size": 2000,
    "num_image_tokens": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "image_position": 40,
    "image_grid": (4, 4),
    "max_text_tokens": 31,
    "boi_token_id": 1742,
    "start_of_english_token_id": 1743,
    "start_of_chinese_token_id": 1744,
    "pad_token_id": 1027,
}
TINY_CANVAS = {"fine_grid": (12, 12)}
TINY_VQ = {"num_embeddings": 1024, "base_channels": 32, "embedding_dim": 64, "compression_rates": (8,)}
# the settings of docs/memory.md: gigabytes, weights, offload of models
CAPPED = {
    "capped_24_offload": (24, None, True),
    "capped_24_int8": (24, "int8", False),
    "capped_16_int8_offload": (16, "int8", True),
    "capped_12_int8_offload": (12, "int8", True),
    "capped_12_int4": (12, "int4", False),
}
DECODING = {
    "eager": {"fused": False},
    "fused": {},
    "graph": {"cuda_graph": True},
    "compile": {"compile": True},
    "compiled_graph": {"compile": True, "cuda_graph": True},
}
CASES = {
    "cpu": ["shipped_b1", "shipped_b4"],
    "cuda": ["released_b1", "released_b4", "released_b8", "released_b16"],
}


def random_pipeline(device: str, dtype: torch.dtype, **config) -> CogView2Pipeline:
    """
    A pipeline of random weights, made on the device: of the released shapes, or others. The shipped tokenizer takes
    the place of the real one: for random weights, its ids are as good as others.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = CogLMModel(CogLMConfig(**config)).eval()
            canvas = TINY_CANVAS if config else {}
            iterative = CogLMCanvasModel(CogLMCanvasConfig(**config, **canvas, super_resolution="iterative")).eval()
            vqvae = IcetkVQModel(IcetkVQConfig(**(TINY_VQ if config else {}))).eval()
            slots = {"num_text_slots": config["max_text_tokens"] + 1} if config else {}
            direct = CogLMCanvasModel.from_transformer(
                transformer, "direct", iterative.config.fine_grid, shares_backbone=True, **slots
            ).eval()
    finally:
        torch.set_default_dtype(before)
    vqvae.cluster_labels.copy_(torch.arange(vqvae.config.num_embeddings) % vqvae.config.num_clusters)
    return CogView2Pipeline(
        IcetkTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer"),
        transformer,
        vqvae,
        direct,
        iterative,
        LoPARScheduler(step_grid=((1,),), top_k=100, cluster_temperature=0.89),
        LoPARScheduler(),
    )


def quantization(name: str | None):
    """What the docs give to `from_pretrained`."""
    if name is None:
        return None
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))


def capped_pipeline(name: str, folder: Path, dtype: torch.dtype) -> CogView2Pipeline:
    """The random pipeline from files, with a setting for little memory, under a cap."""
    gigabytes, weights, offloads = CAPPED[name]
    torch.cuda.set_per_process_memory_fraction(1.0)
    if not (folder / "model_index.json").exists():
        random_pipeline("cuda", dtype).save_pretrained(folder)
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    where = {} if offloads else {"device_map": "cuda"}
    pipe = CogView2Pipeline.from_pretrained(folder, dtype=dtype, quantization_config=quantization(weights), **where)
    if offloads:
        pipe.enable_model_cpu_offload()
    return pipe


def build(model: str, options: argparse.Namespace, dtype: torch.dtype) -> CogView2Pipeline:
    """The pipeline of a case."""
    if model in CAPPED:
        if options.folder is None:
            raise ValueError("`--folder` must be given for capped cases: the weights are saved there, 27 GB.")
        return capped_pipeline(model, options.folder, dtype)
    builders: dict[str, Callable[[], CogView2Pipeline]] = {
        "shipped": lambda: CogView2Pipeline.from_pretrained(SHIPPED_MODEL, dtype=dtype).to(options.device),
        "released": lambda: random_pipeline(options.device, dtype),
        "tiny": lambda: random_pipeline(options.device, dtype, **TINY),
    }
    return builders[model]()


def measure_baseline(pipe: CogView2Pipeline, batch_size: int, limit: float) -> dict:
    """What the original way takes, and how many tokens come out alike from the same seeds."""

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(batch_size)]

    original = OriginalWay(pipe)
    begin = time.perf_counter()
    results = [original(PROMPT, batch_size, generators(), max(120.0, 10 * limit))]
    while len(results) < 4 and time.perf_counter() - begin < limit:
        results.append(original(PROMPT, batch_size, generators(), max(120.0, 10 * limit)))
    # the first call warms up, where there is time for another
    counted = sorted(sum(one["seconds"].values()) for one in (results[1:] or results))
    ours = pipe(
        PROMPT,
        num_images_per_prompt=batch_size,
        max_batch_size=batch_size,
        generator=generators(),
        output_type="latent",
    )
    return {
        "baseline_seconds": counted[len(counted) // 2],
        "baseline_stage_seconds": results[-1]["seconds"],
        "baseline_calls": len(results),
        "same_tokens": float((ours.tokens == results[-1]["tokens"]).float().mean()),
    }


def run_case(name: str, pipe: CogView2Pipeline, before: int | None, options: argparse.Namespace) -> dict:
    batch_size = 1 if name in CAPPED else int(name.rsplit("_b", 1)[1])
    line = {"case": name, "decoding": options.decoding, "int8": options.int8}
    pipe.set_decoding(**DECODING[options.decoding])
    pipe.set_super_resolution(int8=options.int8)
    line |= bench_pipeline(pipe, batch_size, options.seconds, before=before)
    line["speedup_over_baseline"] = None
    if options.baseline and name not in CAPPED:
        pipe.set_decoding()
        pipe.set_super_resolution()
        line |= measure_baseline(pipe, batch_size, options.seconds)
        line["speedup_over_baseline"] = line["baseline_seconds"] / line["seconds"]
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16")
    add("--cases", nargs="*", help="names, or beginnings of names; `tiny` for a rehearsal")
    add("--baseline", action="store_true", help="measure the original way, too")
    add("--decoding", choices=list(DECODING), help="how tokens are written (default: fused on a CPU, graph on a GPU)")
    add("--int8", action="store_true", help="linear layers of super-resolution in int8 (CPU)")
    add("--seconds", type=float, default=30.0, help="time for each measurement (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--folder", type=Path, help="where capped cases save their weights")
    add("--json", action="store_true", help="print one JSON line a case")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.decoding = options.decoding or ("fused" if options.device == "cpu" else "graph")
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    every = ["released_b1", "released_b4", "released_b8", "released_b16", "shipped_b1", "shipped_b4", *CAPPED]
    every += ["tiny_b1", "tiny_b2"]
    chosen = [name for name in every if name.startswith(tuple(options.cases or CASES[options.device]))]
    if not chosen:
        parser.error(f"`--cases` must name some of {every}.")
    built, pipe, before = None, None, None
    for name in chosen:
        model = name if name in CAPPED else name.rsplit("_b", 1)[0]
        try:
            if model != built:  # the batch sizes of a model share its weights
                built = pipe = None
                gc.collect()
                before = resident_bytes()
                pipe = build(model, options, dtype)
                pipe.set_progress_bar_config(disable=True)
                built = model
            line = run_case(name, pipe, before, options)
        except (RuntimeError, ValueError, ImportError, OSError) as error:
            # out of memory, a backend that is not there, the time of the baseline is over
            line = {"case": name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        if options.device == "cuda":
            torch.cuda.empty_cache()
        text = json.dumps(line) if options.json or "failed" in line else f"{name}: {table(line)}"
        if not options.json and line.get("speedup_over_baseline"):
            text += f"\n  {'over the original way':24}{line['speedup_over_baseline']:9.1f} x"
        print(text, flush=True)


if __name__ == "__main__":
    main()
