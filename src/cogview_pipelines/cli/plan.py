"""`cogview2 plan`: what a training run needs on each device, and how long a step takes at least."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .console import bad_input, fail, finite, say, say_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAMED = {"cogview2-6b": "CogLMConfig", "cogview-4b": "CogViewConfig"}  # their defaults are the released sizes
GIGABYTE = 1e9
PARTS = ("weights", "gradients", "moments", "average", "activations", "buffers", "total")


class Optimizer(str, Enum):
    """What `--optimizer` of the training scripts takes."""

    adamw = "adamw"
    muon = "muon"


class Moments(str, Enum):
    """What `--moments` of the training scripts takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Precision(str, Enum):
    """What `--mixed_precision` of the training scripts takes."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class PlannedDevice(str, Enum):
    """Whose way of computing in 16 bits is counted."""

    cuda = "cuda"
    cpu = "cpu"


def plan(
    model: str = typer.Argument(
        ..., help="cogview2-6b, cogview-4b, or a folder with the config.json of a CogLM or a CogView."
    ),
    devices: int = typer.Option(1, min=1, help="Devices of all machines together."),
    shard_size: int | None = typer.Option(None, min=1, help="Devices of one machine, if there are several machines."),
    batch_size: int = typer.Option(16, "--batch-size", "-b", min=1, help="Samples on a device in a forward pass."),
    memory: float | None = typer.Option(None, min=0, callback=finite, help="Memory of a device in GB (10^9 bytes)."),
    optimizer: Optimizer = typer.Option(Optimizer.adamw, help="Of the training scripts."),
    moments: Moments = typer.Option(Moments.float32, help="Of the training scripts."),
    ema: bool = typer.Option(False, "--ema", help="Keep a moving average of the weights."),
    mixed_precision: Precision = typer.Option(Precision.bf16, help="Of the training scripts."),
    tflops: float | None = typer.Option(
        None, min=0, callback=finite, help="Rate of matrix products on a device, in TFLOP/s."
    ),
    measure: bool = typer.Option(False, "--measure", help="Measure that rate on this machine."),
    utilisation: float = typer.Option(1.0, min=0.001, max=1, help="Share of the rate that a step reaches."),
    device: PlannedDevice = typer.Option(PlannedDevice.cuda, help="Kind of device."),
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON for each layout."),
) -> None:
    """
    Plan the memory and time of a training run.

    For each way to spread a model over devices: bytes on a device, and what fits.
    """
    from ..training.planning import layouts_of, report
    from ..training.planning import plan as plan_layout

    if measure and tflops is not None:
        fail("Pass either `--tflops` or `--measure`.")
    config = _read_config(model)
    rate = None if tflops is None else tflops * 1e12
    if measure:
        rate = _measured_rate(device.value, mixed_precision.value)
    with bad_input():
        layouts = layouts_of(devices, shard_size)
        rows = []
        for layout in layouts:
            need = plan_layout(
                config,
                layout,
                batch_size,
                optimizer.value,
                ema,
                mixed_precision.value,
                device.value,
                moments.value,
            )
            rows.append(
                {"model": model, "devices": devices, "batch_size": batch_size, "tflops": rate and rate / 1e12}
                | report(
                    need,
                    layout,
                    None if memory is None else memory * GIGABYTE,
                    rate and rate * utilisation,
                )
            )
    if as_json:
        for row in rows:
            say_json(row)
        return
    say(f"GB on each device ({batch_size} samples at a time on each of {devices})\n")
    say(f"{'layout':26}" + "".join(f"{name:>12}" for name in PARTS) + ("" if memory is None else "   fits"))
    for row in rows:
        fits = "" if memory is None else f"{'yes' if row['fits'] else 'no':>7}"
        say(f"{_name(row):26}" + "".join(f"{row[part] / GIGABYTE:12.2f}" for part in PARTS) + fits)
    if rate:
        say("")
        for name, again in (("without checkpointing", False), ("with checkpointing", True)):
            seconds = next(row["seconds_per_step"] for row in rows if row["gradient_checkpointing"] is again)
            speed = f"{batch_size * devices / seconds:.3g} samples/s"
            say(f"{name}: {seconds:.3g} s a step, {speed} at {utilisation:.0%} of {rate / 1e12:.3g} TFLOP/s")


def _name(row: dict) -> str:
    name = row["sharding"] if row["sharding"] != "hybrid" else f"hybrid by {row['shard_size']}"
    name += "" if row["reshard_after_forward"] else ", kept"
    return name + (", checkpointing" if row["gradient_checkpointing"] else "")


def _read_config(model: str) -> "PreTrainedConfig":
    import cogview_pipelines

    if model in NAMED:
        return getattr(cogview_pipelines, NAMED[model])()
    folder = Path(model).expanduser()
    folder = folder.parent if folder.name == "config.json" else folder
    if (folder / "transformer" / "config.json").is_file():  # of a pipeline
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        fail(f"`MODEL` must be one of {', '.join(NAMED)} or a folder with a config.json, but is {model}.")
    with bad_input((ValueError, OSError, TypeError)):
        found, _ = cogview_pipelines.CogLMConfig.get_config_dict(folder, local_files_only=True)
        kinds = {"coglm": "CogLMConfig", "cogview": "CogViewConfig"}
        kind = kinds.get(found.get("model_type"))
        if kind is None:
            raise ValueError(
                f"`MODEL` must be a CogLM or a CogView, but {folder} is a {found.get('model_type')!r}. Memory of "
                "super-resolution is not planned: its fused attention saves other things than PyTorch's."
            )
        return getattr(cogview_pipelines, kind).from_dict(found)


def _measured_rate(device: str, mixed_precision: str) -> float:
    import torch

    from ..speed.timing import machine_speed

    if device == "cuda" and not torch.cuda.is_available():
        fail("`--measure`: there is no CUDA device here. Pass `--tflops` instead, or `--device cpu`.")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    return machine_speed(device, dtype)[1]
