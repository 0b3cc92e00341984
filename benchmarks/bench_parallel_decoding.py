#!/usr/bin/env python
"""
Passes and time of the first stage, one by one and with several positions at once: the tokens are the same.

    python benchmarks/bench_parallel_decoding.py                              # the shipped model, its presets
    python benchmarks/bench_parallel_decoding.py --settings temperature3 --num 20 --windows 32,default
    python benchmarks/bench_parallel_decoding.py --dtype bfloat16 --no-fused --num 200 --windows 32
    python benchmarks/bench_parallel_decoding.py --num 50 --windows 32 --code-order similarity
    python benchmarks/bench_parallel_decoding.py --case width                 # a pass over W positions against one

Prompts are captions of held-out pairs of the demo data, half of them in each language, one picture at a time. `passes`
counts the passes of the model over new tokens; the first token follows from the prompt without one. Seconds are of the
process, on all of its threads (`cpu_seconds`), and of the clock. The window `default` is 32 at most, and narrowed on a
CPU where hardly a guess holds. With `--no-fused`, steps run operation by operation, as wherever there is no kernel for
them: there, tokens in 16 bits may differ from those written one by one where two are nearly tied, in
`share_of_differing_pictures`. `--code-order similarity` numbers clusters, and codes inside of them, along the first
principal component of their vectors: a study of whether more guesses hold if a draw that shifts lands on a similar
code.
"""

import functools
import json
import statistics
import time
from enum import Enum
from pathlib import Path

import torch
import typer

from cogview_pipelines import CogLMConfig, CogLMModel, CogView2Pipeline
from cogview_pipelines.demo import Scope
from cogview_pipelines.demo.evaluation import choose_cases
from cogview_pipelines.environment import SHIPPED_MODEL, stamp
from cogview_pipelines.generation.decoders import Decoding, encode_context
from cogview_pipelines.models.cogview2.sequences import text_to_image

SETTINGS = {
    "presets": {},
    "released": {"temperature": 1.15, "top_k_clusters": 16, "cluster_temperature": 1.0, "guidance_scale": 1.0},
    "temperature3": {"temperature": 3.0, "top_k_clusters": 16, "cluster_temperature": 1.0, "guidance_scale": 1.0},
}


DEFAULT = "default"  # the window that is chosen where none is given


class Case(str, Enum):
    """What is measured."""

    passes = "passes"
    width = "width"


class Settings(str, Enum):
    """Of sampling."""

    presets = "presets"
    released = "released"
    temperature3 = "temperature3"


class CodeOrder(str, Enum):
    """How codes and clusters are numbered where one is drawn."""

    number = "number"
    similarity = "similarity"


class DType(str, Enum):
    """Number formats of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def along_first_component(vectors: torch.Tensor) -> torch.Tensor:
    """Places of `(n, dim)` vectors along their first principal component: `(n,)`."""
    centred = vectors - vectors.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]


class BySimilarity(CogView2Pipeline):
    """Draws from the same distributions, with clusters and codes in an order of similarity."""

    def _cluster_sampler(self, settings):
        sampler, labels = super()._cluster_sampler(settings), self.vqvae.cluster_labels
        vectors = self.vqvae.quantize.embed.weight.detach().float()
        numbers = labels.unique()
        centres = torch.stack([vectors[labels == cluster].mean(0) for cluster in numbers])
        places = torch.zeros(len(vectors), device=vectors.device)
        for cluster in numbers:
            places[labels == cluster] = along_first_component(vectors[labels == cluster])
        rank = along_first_component(centres).argsort().argsort()
        renumbered = numbers[rank][torch.searchsorted(numbers, labels)]
        codes = places.argsort(stable=True)
        ordered = functools.partial(sampler, cluster_labels=renumbered[codes])
        return lambda logits, noise: codes[ordered(logits[..., codes], noise)]


def draft(pipe: CogView2Pipeline, prompt: str, seed: int, settings: dict) -> tuple[torch.Tensor, int, float, float]:
    """Low-resolution tokens of one picture, the passes that they took, and the call's seconds: clock and process."""
    clock, process = time.perf_counter(), time.process_time()
    output = pipe(
        prompt,
        height=pipe.sizes[0][0],
        width=pipe.sizes[0][1],
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_statistics=True,
        **settings,
    )
    seconds = time.perf_counter() - clock, time.process_time() - process
    return output.tokens, output.statistics["transformer"].num_passes, *seconds


def measure_passes(
    pipe: CogView2Pipeline, scope: Scope, windows: list[str], settings: dict, num: int, fused: bool = True
) -> dict:
    """Of every window: passes and seconds a picture, and the share of pictures whose tokens differ from one by one."""
    cases = {lang: choose_cases(scope, "test_pair", lang, -(-num // 2)) for lang in ("en", "zh")}
    results: dict[str, dict] = {}
    expected: dict[tuple[str, int], torch.Tensor] = {}
    for window in ["1", *windows]:
        pipe.set_decoding(parallel=None if window == DEFAULT else int(window), fused=fused)
        draft(pipe, cases["en"][0].caption, 0, settings)
        passes: dict[str, list[int]] = {language: [] for language in cases}
        clock, process, differing = [], [], 0
        for language, chosen in cases.items():
            for seed, case in enumerate(chosen):
                tokens, count, *seconds = draft(pipe, case.caption, seed, settings)
                passes[language].append(count)
                clock.append(seconds[0])
                process.append(seconds[1])
                differing += not torch.equal(tokens, expected.setdefault((language, seed), tokens))
        results[window] = {
            **{f"passes_{language}": round(statistics.mean(counts), 2) for language, counts in passes.items()},
            "most_passes": max(map(max, passes.values())),
            "seconds": statistics.median(clock),
            "cpu_seconds": statistics.median(process),
            "share_of_differing_pictures": differing / len(clock),
        }
    return results


@torch.no_grad()
def measure_width(device: str, dtype: torch.dtype, widths: list[int], hidden_size: int, num_layers: int) -> dict:
    """Of random weights: seconds of a pass over several positions in the middle of a picture, the median of ten."""
    config = CogLMConfig(hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64)
    torch.manual_seed(0)
    model = CogLMModel(config).to(device, dtype).eval()
    context = text_to_image([[30000, 30001, 30002]], config.layout).to(device)
    results: dict[int, float] = {}
    for width in [1, *widths]:
        cache, bias, _ = encode_context(model, context, 0.0, False, device)
        longest = cache.length + config.layout.image_length
        decoder = Decoding(parallel=width).decoder(model, 1, longest, False, device)
        decoder.begin(cache, bias, torch.ones(1, dtype=torch.long, device=device))
        ids = torch.zeros(1, width, dtype=torch.long, device=device)
        positions = config.layout.image_positions[:width].to(device)
        seconds = []
        for _ in range(12):
            decoder.cache.length = cache.length + config.layout.image_length // 2
            start = time.process_time() if device == "cpu" else time.perf_counter()
            decoder.append_all(ids, positions) if width > 1 else decoder.append(ids, positions)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((time.process_time() if device == "cpu" else time.perf_counter()) - start)
        results[width] = statistics.median(seconds[2:])
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "seconds_per_pass": results,
        "ratio_to_one": {width: round(value / results[1], 2) for width, value in results.items()},
    }


def main(
    case: Case = typer.Option(Case.passes, help="Passes and time of pictures, or the time of one pass by its width."),
    model: Path = typer.Option(SHIPPED_MODEL, help="A saved pipeline with its scope."),
    settings: Settings = typer.Option(Settings.presets, help="Of sampling."),
    num: int = typer.Option(100, min=2, help="Prompts, half of them in each language."),
    windows: str = typer.Option("4,8,16,32,100", help="Positions that a pass predicts at once, and `default`."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    dtype: DType = typer.Option(DType.float32, help="Number format of the weights."),
    hidden_size: int = typer.Option(1024, help="`width`: of the random weights, a multiple of 64."),
    num_layers: int = typer.Option(12, help="`width`: of the random weights."),
    fused: bool = typer.Option(True, help="On a CPU, all of a step in one kernel where there is one."),
    code_order: CodeOrder = typer.Option(
        CodeOrder.number, help="`passes`: how codes are numbered where one is drawn."
    ),
) -> None:
    """Measure how many passes pictures take."""
    sizes = windows.split(",")
    if unknown := [size for size in sizes if not size.isdecimal() and (size != DEFAULT or case is Case.width)]:
        raise typer.BadParameter(f"`--windows` must be whole numbers, or `default` for passes, but has {unknown}.")
    number_format = getattr(torch, dtype.value)
    result = {"benchmark": f"parallel_decoding_{case.value}", **stamp(device), "dtype": dtype.value}
    if case is Case.passes:
        result |= {"settings": settings.value, "num_prompts": num, "fused": fused, "code_order": code_order.value}
        kind = CogView2Pipeline if code_order is CodeOrder.number else BySimilarity
        pipe = kind.from_pretrained(model, dtype=number_format).to(device)
        pipe.set_progress_bar_config(disable=True)
        result["windows"] = measure_passes(pipe, Scope.load(model), sizes, SETTINGS[settings.value], num, fused)
    else:
        result |= measure_width(device, number_format, [int(size) for size in sizes], hidden_size, num_layers)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
