#!/usr/bin/env python
"""
Training steps: samples a second, and the share of the machine's matrix-product rate that they reach.

    python benchmarks/bench_training.py --device cuda --json      # layers of the 6B model, and the emoji models
    python benchmarks/bench_training.py --device cpu --cases small_coglm
    git worktree add /tmp/before COMMIT     # another state of this repository, with its kernels built, if it has any
    python benchmarks/bench_training.py --device cpu --against /tmp/before --json
    python benchmarks/bench_training.py --device cuda --cases 6b --layers 12 --sharded --json
    torchrun --nproc_per_node 8 benchmarks/bench_training.py --device cuda --cases 6b --layers 48 --sharded --json

A step is forward, backward and optimizer as the training scripts do it: float32 weights, bfloat16 autocast, the
optimizer that the scripts make. `6b_*` have `--layers` layers of the released width, since all of them with their
optimizer do not fit on one GPU; `emoji_*` are the models of `training_scripts/emoji/gpu`, `small_*` tiny ones. With
`--sharded`, weights, gradients and optimizer are shared out over the processes that torchrun started (FSDP2), as the
training scripts do it; one process alone then shows what that costs besides the exchange. Each process has a batch of
its own, and figures are of one of them.

`model_flops_utilisation` is the floating-point operations that the model needs (recomputation, if any, is not counted)
over the time, over the matrix-product rate measured in this run.

`--against` compares the training of the shipped CogLM, as its config says, in two states of the repository:
`train_coglm.py` of each, with all that belongs to a step (samples, forward and backward pass, clipping, optimizer,
moving average), one step of this and one of that in turn, so that both meet the same machine. Computing time of the
process is what counts where other programs run; on a machine at rest, samples a second do.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from checkouts import revision
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from cogview_pipelines import CogLMCanvasConfig, CogLMCanvasModel, CogLMConfig, CogLMModel
from cogview_pipelines.environment import SHIPPED_MODEL, stamp
from cogview_pipelines.generation.token_sequence import stack
from cogview_pipelines.models.cogview2.sequences import direct_super_resolution, iterative_super_resolution
from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.data.tokens import CanvasBatch, TokenData
from cogview_pipelines.training.distribution import computing_dtype, shard_layers
from cogview_pipelines.training.losses import canvas_loss, count_labels
from cogview_pipelines.training.optimizers import Optimizers
from cogview_pipelines.training.samples_cogview2 import generation_sample

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "training_scripts" / "emoji" / "gpu"
SMALL = {
    "vocab_size": 256,
    "num_image_tokens": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_grid": (4, 4),
    "fine_grid": (12, 12),
    "max_text_tokens": 15,
    "image_position": 16,
    "max_position_embeddings": 40,
    "num_text_slots": 8,
    "boi_token_id": 250,
    "start_of_english_token_id": 251,
    "start_of_chinese_token_id": 252,
    "pad_token_id": 131,
}

CANVAS_FIELDS = ("fine_grid", "num_text_slots", "kernel_size", "cross_kernel_size")


def make_config(stage: str | None, fields: dict) -> CogLMConfig:
    """The configuration of CogLM, or of the stage of super-resolution."""
    if stage is not None:
        return CogLMCanvasConfig(**fields, super_resolution=stage)
    return CogLMConfig(**{name: value for name, value in fields.items() if name not in CANVAS_FIELDS})


@dataclass
class Case:
    """A model, its batch, and which of its weights train. `stage` is None for CogLM."""

    name: str
    stage: str | None
    batch_size: int
    model: dict
    optimizer: str = "adamw"
    frozen_backbone: bool = False
    gradient_checkpointing: bool = False
    fields: dict = field(init=False)

    def __post_init__(self):
        self.fields = {"hidden_dropout": 0.0, "attention_dropout": 0.0, **self.model}


def all_cases(layers: int) -> list[Case]:
    released = {"num_hidden_layers": layers}
    cases = [
        Case("6b_coglm", None, 16, released),
        Case("6b_direct_sr", "direct", 2, released, frozen_backbone=True),
        Case("6b_iterative_sr", "iterative", 2, released),
        Case("small_coglm", None, 2, SMALL),
        Case("small_direct_sr", "direct", 2, SMALL, "muon", frozen_backbone=True),
        Case("small_iterative_sr", "iterative", 2, SMALL, gradient_checkpointing=True),
    ]
    # ids of a tokenizer with 2,048 image codes and about 800 pieces, as that of the emoji captions
    ids = {
        "vocab_size": 2900,
        "num_image_tokens": 2048,
        "boi_token_id": 2890,
        "start_of_english_token_id": 2891,
        "start_of_chinese_token_id": 2892,
        "pad_token_id": 2051,
    }
    coglm = yaml.safe_load((EMOJI / "coglm.yaml").read_text(encoding="utf-8"))
    for name, stage in (("coglm", None), ("direct_sr", "direct"), ("iterative_sr", "iterative")):
        config = yaml.safe_load((EMOJI / f"{name}.yaml").read_text(encoding="utf-8"))
        cases.append(
            Case(
                f"emoji_{name}",
                stage,
                config["batch_size"],
                {**ids, **coglm["model"], **config["model"]},
                config["optimizer"],
                frozen_backbone=stage == "direct",
                gradient_checkpointing=config.get("gradient_checkpointing", False),
            )
        )
    return cases


def make_model(case: Case, device: str) -> CogLMModel | CogLMCanvasModel:
    model_class = CogLMModel if case.stage is None else CogLMCanvasModel
    with torch.device(device):
        model = model_class(make_config(case.stage, case.fields)).train()
    if case.frozen_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("canvas_" in name)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def start_processes(device: str) -> None:
    """This process among those of torchrun, or alone."""
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def make_batch(case: Case, config: CogLMConfig):
    """Random samples of the shapes that training has, with texts of half the length that fits."""
    generator = torch.Generator().manual_seed(0)
    layout = config.layout

    def draw(*shape):
        return torch.randint(config.num_image_tokens, shape, generator=generator)

    low = draw(case.batch_size, layout.image_length)
    length = (config.max_text_tokens if case.stage is None else config.num_text_slots) // 2
    texts = (draw(case.batch_size, length) % 100 + config.pad_token_id + 1).tolist()
    if case.stage is None:
        padding = [config.pad_token_id] * (config.max_text_tokens + 1 - len(texts[0]))
        rows = [torch.cat([torch.tensor(text + padding), image]) for text, image in zip(texts, low)]
        return stack([generation_sample(row, layout, config.pad_token_id) for row in rows])
    if case.stage == "direct":
        context = direct_super_resolution(texts, low, config.num_text_slots, layout)
    else:
        context = iterative_super_resolution(texts, config.num_text_slots)
    labels = draw(case.batch_size, config.canvas_length)
    return CanvasBatch(context, torch.full_like(labels, config.boi_token_id), labels)


def model_flops(case: Case, config: CogLMConfig, batch) -> float:
    """Floating-point operations of the matrix products of a step; a multiplication and an addition are two."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention, mlp = 4 * hidden**2, 2 * hidden * config.intermediate_size

    def forward(positions: int, pairs: int) -> float:
        return 2 * layers * (positions * (attention + mlp) + 2 * hidden * pairs)

    context = batch if case.stage is None else batch.context
    positions = context.input_ids.numel()
    per_context = forward(positions, int(context.attention_mask.sum()))
    if case.stage is None:
        logits = 2 * int((batch.labels >= 0).sum()) * hidden * config.vocab_size  # with `full_vocabulary`
        return 3 * (per_context + logits)
    cells = batch.canvas_ids.numel()
    window = config.kernel_size[0] * config.kernel_size[1]
    if case.stage == "direct":
        window += config.cross_kernel_size[0] * config.cross_kernel_size[1]
    canvas = forward(cells, cells * (window + config.num_text_slots))
    logits = 2 * cells * hidden * config.num_image_tokens
    if not case.frozen_backbone:
        return 3 * (per_context + canvas + logits)
    # the context has no gradient; of the rest, only the canvas attention has gradients of weights
    return per_context + 2 * (canvas + logits) + 2 * layers * cells * (attention + 2 * hidden * window)


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of one large matrix product, the best of ten."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(measure(lambda: left @ right, device, repeats=10))


def measure(function, device: str, repeats: int | None = None, seconds: float = 1.0) -> list[float]:
    """Seconds of each call after two to warm up: `repeats` calls, or as many as fit, at least three."""
    times = []

    def timed() -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(), timed()
    end = time.perf_counter() + seconds
    while len(times) < (repeats or 3) or (repeats is None and time.perf_counter() < end):
        times.append(timed())
    return times


def agreed_repeats(function, device: str, seconds: float) -> int:
    """As many calls as fit, the same number on all processes, which wait for one another in each of them."""
    longest = torch.tensor(max(measure(function, device, repeats=1)), device=device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    return max(3, int(seconds / longest.item()))


def run_case(case: Case, options: argparse.Namespace, rate: float) -> dict:
    device = options.device
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = make_model(case, device)
    batch = make_batch(case, model.config).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = computing_dtype("bf16", torch.device(device))
    if options.sharded:
        mesh = init_device_mesh(device, (distributed.get_world_size(),), mesh_dim_names=("shard",))
        shard_layers(model, mesh, dtype)
    optimizer = Optimizers(model, TrainConfig(output_dir="", optimizer=case.optimizer))
    trained = torch.compile(model) if options.compile else model

    def step():
        with torch.autocast(device, dtype, enabled=dtype is not None):
            if case.stage is None:
                ids = {
                    name: getattr(batch, name) for name in ("input_ids", "position_ids", "attention_mask", "labels")
                }
                loss = trained(**ids, full_vocabulary=True).loss
            else:
                loss = canvas_loss(trained, batch)[0] / count_labels(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    repeats = agreed_repeats(step, device, options.seconds) if options.sharded else None
    seconds = statistics.median(measure(step, device, repeats, options.seconds))
    flops = model_flops(case, model.config, batch)
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "layers": model.config.num_hidden_layers,
        "parameters": parameters,
        "optimizer": case.optimizer,
        "sharded_over": distributed.get_world_size() if options.sharded else None,
        "compiled": options.compile,
        "computes_in": str(dtype or torch.float32).removeprefix("torch."),
        "seconds_per_step": seconds,
        "samples_per_second": case.batch_size / seconds,
        "model_tflops": flops / seconds / 1e12,
        "matmul_tflops": rate / 1e12,
        "model_flops_utilisation": flops / seconds / rate,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


class PausedTraining:
    """
    `train_coglm.py` of a checkout, which waits after every step until it is told to go on.

    Args:
        checkout (`Path`): The state of the repository.
        config (`Path`): YAML file with the options.
        output_dir (`Path`): Of the run.
    """

    def __init__(self, checkout: Path, config: Path, output_dir: Path):
        script = [checkout / "training_scripts" / "train_coglm.py", "--config", config, "--output_dir", output_dir]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("paused_training.py"), *script],
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def wait(self) -> dict | None:
        """What the step took that is being computed; of the first one, nothing is known."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"{self.process.args[2]} ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def step(self) -> dict:
        """Another step; what it took."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def shipped_training(folder: Path, mixed_precision: str, optimizer: str) -> tuple[Path, dict]:
    """The config of the shipped CogLM's last run, on made-up tokens with captions of the demo: its file, and it."""
    from cogview_pipelines.demo import Scope, captions, sample_scenes

    options = yaml.safe_load((EMOJI.parent / "coglm_small.yaml").read_text(encoding="utf-8"))
    for name in ("auxiliary_data", "auxiliary_probability", "vqvae"):
        options.pop(name)
    tokens = torch.randint(1024, (256, 10, 10), generator=torch.Generator().manual_seed(0))
    scenes = sample_scenes(Scope.small(), 256, 0, split_name="train")
    rows = [{language: captions(scene, language) for language in ("en", "zh")} for scene in scenes]
    TokenData.save(folder / "tokens", {"low": tokens}, rows)
    options |= {
        "init_from": str(SHIPPED_MODEL / "transformer"),
        "tokenizer": str(SHIPPED_MODEL / "tokenizer"),
        "data": str(folder / "tokens"),
        "mixed_precision": mixed_precision,
        "optimizer": optimizer,
        "max_steps": 10**6,
        "checkpoint_every_minutes": 0,
        "sample_every_steps": 0,
        "data_workers": 0,  # batches are made when they are timed
    }
    (folder / "config.yaml").write_text(json.dumps(options), encoding="utf-8")  # which is YAML
    return folder / "config.yaml", options


def compare(options: argparse.Namespace) -> dict:
    """Medians of the steps of two checkouts, made in turn."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config, given = shipped_training(Path(folder), options.mixed_precision, options.optimizer)
        runs = {}
        for name, checkout in (("before", Path(options.against).resolve()), ("after", ROOT)):
            runs[name] = PausedTraining(checkout, config, Path(folder) / name)
            stack.callback(runs[name].close)
            runs[name].wait()
            runs[name].step()
        taken: dict[str, list[dict]] = {name: [] for name in runs}
        for _ in range(options.steps):
            for name, run in runs.items():
                taken[name].append(run.step())
    line = {"case": "shipped_coglm", "steps": options.steps, "threads": torch.get_num_threads()}
    line |= {name: given[name] for name in ("batch_size", "mixed_precision", "optimizer")}
    line["compared_with"] = revision(Path(options.against))
    for name, steps in taken.items():
        seconds = {key: statistics.median(step[key] for step in steps) for key in ("seconds", "cpu_seconds")}
        line[name] = {
            "cpu_seconds_per_step": seconds["cpu_seconds"],
            "seconds_per_step": seconds["seconds"],
            "samples_per_second": given["batch_size"] / seconds["seconds"],
        }
    for key in ("cpu_seconds", "seconds"):
        ratios = [before[key] / after[key] for before, after in zip(taken["before"], taken["after"])]
        line[f"speedup_in_{key}"] = statistics.median(ratios)
    return line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON line a case")
    parser.add_argument("--cases", nargs="*", help="beginnings of names; default: 6b and emoji on cuda, small on cpu")
    parser.add_argument("--layers", type=int, default=4, help="layers of the 6b cases (default: 4)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case, after warming up")
    parser.add_argument("--against", help="checkout to compare the training of the shipped CogLM with, on a CPU")
    parser.add_argument("--steps", type=int, default=8, help="with --against: steps of each (default: 8)")
    parser.add_argument("--mixed-precision", default="bf16", choices=("bf16", "no"), help="with --against")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"), help="with --against")
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    parser.add_argument("--sharded", action="store_true", help="share out the weights over the processes (FSDP2)")
    options = parser.parse_args(arguments)
    is_main = True
    if options.sharded:
        start_processes(options.device)
        is_main = distributed.get_rank() == 0
    chosen = tuple(options.cases or (("6b", "emoji") if options.device == "cuda" else ("small",)))
    about = stamp(options.device)
    if options.against:
        print(json.dumps(compare(options) | about), flush=True)
        return
    rate = matmul_rate(options.device, torch.bfloat16, 8192 if options.device == "cuda" else 512)
    for case in all_cases(options.layers):
        if not case.name.startswith(chosen):
            continue
        line = {}
        with contextlib.suppress(torch.OutOfMemoryError):
            line = run_case(case, options, rate)
        line = line or {"case": case.name, "batch_size": case.batch_size, "failed": "out of memory"}
        if not is_main:
            continue
        if options.json:
            print(json.dumps(line | about), flush=True)
        elif "failed" in line:
            print(f"{case.name:20} {line['failed']}", flush=True)
        else:
            print(
                f"{case.name:20} {line['seconds_per_step'] * 1000:9.1f} ms {line['samples_per_second']:9.1f} samples/s"
                f" {line['model_flops_utilisation']:6.1%} of {line['matmul_tflops']:.1f} TFLOP/s",
                flush=True,
            )
    if options.sharded:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
