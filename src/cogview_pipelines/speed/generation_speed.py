"""How fast a pipeline makes pictures, stage by stage, beside what its matrix products alone would take."""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from ..environment import stamp
from ..models.cogview.modeling_cogview import CogViewModel
from ..models.cogview2.modeling_coglm import CogLMModel
from ..models.cogview2.modeling_coglm_canvas import CogLMCanvasModel
from ..pipelines.common.base import PipelineBase
from ..schedulers.scheduling_lopar import LoPARScheduler
from .timing import PeakMemory, machine_speed, median_seconds

PROMPT = "a red cat under a blue sky"
STAGES = ("transformer", "direct_sr_transformer", "iterative_sr_transformer", "vqvae")
SUPER_RESOLUTION = STAGES[1:3]

# rows, the weight that they are multiplied with, its bias, and how often it is done
Product = tuple[int, torch.Tensor, torch.Tensor | None]


def _linears(module: nn.Module, without: str) -> list[nn.Linear]:
    return [part for name, part in module.named_modules() if isinstance(part, nn.Linear) and without not in name]


def step_products(model: CogLMModel | CogViewModel, num_sequences: int) -> list[Product]:
    """The matrix products of one token of `num_sequences` sequences: those of all layers, and the logits."""
    products = [(num_sequences, part.weight, part.bias) for part in _linears(model.layers, "canvas_")]
    return [*products, (num_sequences, model.word_embeddings.weight[: model.config.num_image_tokens], None)]


def canvas_products(model: CogLMCanvasModel, scheduler: LoPARScheduler, batch_size: int) -> list[Product]:
    """
    The matrix products of all passes of super-resolution over the canvas: every layer for every cell, but what follows
    the attention of the last layer, and the logits, only for cells that become final in the pass.
    """
    direct = model.config.super_resolution == "direct"
    products: list[Product] = []
    for timestep in scheduler.timesteps.tolist():
        final = batch_size * int(scheduler.final_positions(timestep, *model.config.fine_grid).sum())
        for layer in model.layers:
            attention = layer.canvas_attention if direct else layer.attention
            every = batch_size * model.config.canvas_length
            rest = final if layer.index == model.config.num_hidden_layers - 1 else every
            products.append((every, attention.query_key_value.weight, attention.query_key_value.bias))
            for part in (attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h):
                products.append((rest, part.weight, part.bias))
        products.append((final, model.word_embeddings.weight[: model.config.num_image_tokens], None))
    return products


def operations(products: list[Product]) -> int:
    """Additions and multiplications."""
    return sum(2 * rows * weight.numel() for rows, weight, _ in products)


def weight_bytes(products: list[Product]) -> int:
    """Bytes of the matrices."""
    return sum(weight.nbytes for _, weight, _ in products)


@torch.no_grad()
def product_seconds(products: list[Product], device: torch.device | str, limit: float) -> float:
    """Time of the products and nothing else, one after the other."""
    inputs = {
        (rows, weight.shape[1]): torch.randn(rows, weight.shape[1], device=device).to(weight.dtype)
        for rows, weight, _ in products
    }

    def run() -> None:
        for rows, weight, bias in products:
            F.linear(inputs[rows, weight.shape[1]], weight, bias)

    return median_seconds(run, device, limit)


def stage_seconds(
    pipe: PipelineBase, batch_size: int, limit: float, prompt: str = PROMPT, **settings
) -> tuple[dict[str, float], int]:
    """
    Median seconds of each stage, and of all (`"all"`), of calls that make `batch_size` pictures, and the number of
    calls. One call before them warms up.
    """
    calls: list[dict[str, float]] = []
    device = pipe._execution_device

    def call(seed: int) -> dict[str, float]:
        start = time.perf_counter()
        output = pipe(
            prompt,
            num_images_per_prompt=batch_size,
            max_batch_size=batch_size,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            return_statistics=True,
            **settings,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {name: stage.seconds for name, stage in output.statistics.items()} | {
            "all": time.perf_counter() - start
        }

    call(0)
    begin = time.perf_counter()
    while len(calls) < 3 or (time.perf_counter() - begin < limit and len(calls) < 20):
        calls.append(call(len(calls) + 1))
        if time.perf_counter() - begin > 4 * limit:
            break
    return {name: statistics.median(one[name] for one in calls) for name in calls[0]}, len(calls)


def num_weight_bytes(pipe: PipelineBase) -> int:
    """Bytes of all weights; those that models share count once."""
    weights = {
        id(p): p.nbytes
        for model in pipe.components.values()
        if isinstance(model, nn.Module)
        for p in model.parameters()
    }
    return sum(weights.values())


def bench_pipeline(
    pipe: PipelineBase, batch_size: int, limit: float = 30.0, *, before: int | None = None, **settings
) -> dict:
    """
    Measure a pipeline that is ready to be called.

    Args:
        pipe (`CogView2Pipeline` or `CogViewPipeline`): What is measured.
        batch_size (`int`): Pictures of one call.
        limit (`float`): Seconds for the calls, after the one that warms up. Three calls are made if they take no
            longer than four times as much.
        before (`int`, *optional*): Main memory of the process before the weights were loaded, see `PeakMemory`.
        settings: Further arguments of the calls.

    Returns:
        `dict`: Seconds, rates, memory, and fractions of the floor. The floor of a stage is its matrix products alone:
            on a CPU those of the same shapes, measured; on a GPU, for the low-resolution tokens, reading the weights
            once per token at the measured rate of a copy, and for super-resolution their operations at the measured
            rate of a large product. A fraction of 1 is as fast as the floor; `None` where weights are quantised or
            move.
    """
    device = pipe._execution_device
    with PeakMemory(device, before) as memory:
        seconds, num_calls = stage_seconds(pipe, batch_size, limit, **settings)
    model = pipe.transformer
    bandwidth, rate = machine_speed(device, model.dtype, min(1.0, limit / 4))
    num_tokens = pipe.layout.image_length
    guided = pipe.check_inputs(PROMPT, **settings).get("guidance_scale", 1) != 1  # CogView has none
    sequences = batch_size * (2 if guided else 1)
    per_token = seconds["transformer"] / num_tokens
    refined = sum(seconds.get(stage, 0.0) for stage in SUPER_RESOLUTION)
    line = {
        "device": device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "sequences": sequences,
        "calls": num_calls,
        "seconds": seconds["all"],
        "seconds_per_image": seconds["all"] / batch_size,
        "images_per_minute": 60 * batch_size / seconds["all"],
        "stage_seconds": {stage: seconds[stage] for stage in STAGES if stage in seconds},
        "stage1_tokens_per_second": batch_size / per_token,
        "stage1_seconds_per_token": per_token,
        "stage1_floor_seconds_per_token": None,
        "stage1_fraction_of_floor": None,
        "super_resolution_floor_seconds": None,
        "super_resolution_fraction_of_floor": None,
        "bandwidth_gb_s": bandwidth / 1e9,
        "matmul_tflops": rate / 1e12,
        "weight_bytes": num_weight_bytes(pipe),
        "peak_memory_bytes": memory.bytes,
        **stamp(str(device)),
    }
    if not _has_plain_weights(pipe, device):
        return line
    steps = step_products(model, sequences)
    refining = [
        product
        for stage in SUPER_RESOLUTION
        if stage in seconds
        for product in canvas_products(
            getattr(pipe, stage), getattr(pipe, stage.replace("transformer", "scheduler")), batch_size
        )
    ]
    if device.type == "cuda":
        step_floor, refine_floor = weight_bytes(steps) / bandwidth, operations(refining) / rate
    else:
        step_floor = product_seconds(steps, device, min(1.0, limit / 4))
        refine_floor = product_seconds(refining, device, min(1.0, limit / 4))
    line["stage1_floor_seconds_per_token"] = step_floor
    line["stage1_fraction_of_floor"] = step_floor / per_token
    if refined:
        line["super_resolution_floor_seconds"] = refine_floor
        line["super_resolution_fraction_of_floor"] = refine_floor / refined
    return line


def _has_plain_weights(pipe: PipelineBase, device: torch.device) -> bool:
    """Whether all weights are ordinary tensors on the device where the models compute."""
    models = [getattr(pipe, stage, None) for stage in STAGES[:3]]
    weights = [weight for model in models if model is not None for weight in model.parameters()]
    return all(type(w.data) is torch.Tensor and w.is_floating_point() and w.device == device for w in weights)


def table(line: dict) -> str:
    """A measurement for people."""
    rows = [(stage, f"{seconds:9.3f} s") for stage, seconds in line["stage_seconds"].items()]
    rows += [
        ("all of it", f"{line['seconds']:9.3f} s"),
        ("per picture", f"{line['seconds_per_image']:9.3f} s"),
        ("pictures per minute", f"{line['images_per_minute']:9.1f}"),
        ("low-resolution tokens", f"{line['stage1_tokens_per_second']:9.0f} per second"),
    ]
    for name, key in (("low-resolution tokens", "stage1"), ("super-resolution", "super_resolution")):
        fraction = line[f"{key}_fraction_of_floor"]
        if fraction is not None:
            rows.append((name, f"{100 * fraction:9.0f} % of the floor"))
    rows += [
        ("copying memory", f"{line['bandwidth_gb_s']:9.1f} GB/s"),
        ("matrix products", f"{line['matmul_tflops']:9.3f} TFLOP/s"),
        ("weights", f"{line['weight_bytes'] / 1e6:9.0f} MB"),
    ]
    if line["peak_memory_bytes"] is not None:
        rows.append(("most memory", f"{line['peak_memory_bytes'] / 1e6:9.0f} MB"))
    head = f"{line['batch_size']} pictures at a time, {line['dtype']}, {line['hardware']}"
    return "\n".join([head, *(f"  {name:24}{value}" for name, value in rows)])
