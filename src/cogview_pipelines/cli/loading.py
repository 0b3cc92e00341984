"""Options that several commands have; from `--model`, `--device` and `--dtype` to a pipeline."""

import enum
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..environment import SHIPPED, SHIPPED_MODELS, model_identity
from ..foreign_files import describe_foreign_file
from .adapters import Adapter, add_adapters
from .console import expand, fail, first_line
from .families import SAVED_AS, pipeline_class
from .models import complete_model
from .names import is_hub_id

if TYPE_CHECKING:
    from ..pipelines.common.base import PipelineBase

_SAVED = {".safetensors", ".json", ".model"}


class DType(str, enum.Enum):
    """Number formats of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


MODEL_OPTION = typer.Option(
    SHIPPED,
    "--model",
    "-m",
    help="Folder or Hub id of a saved pipeline, or a name that `cogview2 models` lists.",
    autocompletion=complete_model,
)
DEVICE_OPTION = typer.Option(
    None, "--device", help="cpu, cuda, cuda:1, mps, ...  [default: an accelerator if there is one]"
)
DTYPE_OPTION = typer.Option(
    None, "--dtype", help="Number format.  [default: float32 on CPU and mps, bfloat16 or else float16 on CUDA]"
)
INT8_OPTION = typer.Option(
    False,
    "--int8",
    help="On a CPU: super-resolution in whole numbers of 8 bits. Faster; pictures are slightly others.",
    show_default=False,
)
REQUESTS_OPTION = typer.Option(None, "--requests", help="JSONL file: what to do, one object on each line.")
OVERWRITE_OPTION = typer.Option(
    False, "--overwrite", help="With --requests: replace results of other requests.", show_default=False
)
METADATA_OPTION = typer.Option(
    True, "--metadata/--no-metadata", help="Whether the PNG files keep prompt, seed, settings and model."
)
BATCH_OPTION = typer.Option(None, min=1, help="Results computed at a time.")
QUIET_OPTION = typer.Option(False, "--quiet", "-q", help="No progress bar.")


def choose_device(device: str | None) -> str:
    """The device asked for, if it is there; else the best one."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"`--device` {device!r} cannot be used here: {first_line(error)}")
    if kind == "meta":
        fail("`--device` 'meta' has shapes, but no numbers. Name a device that computes, such as cpu.")
    return device


def choose_dtype(dtype: DType | None, device: str) -> str:
    """The number format asked for; else one that the device is good at."""
    import torch

    if dtype is not None:
        return dtype.value
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "float32"


def find_model(model: str, family: str | None = None) -> str:
    """
    The folder or Hub id behind `--model`; a folder is checked for being a saved pipeline (of a family).
    """
    shipped = None if os.path.exists(model) else SHIPPED_MODELS.get(model)
    folder = shipped or expand(Path(model), "--model")
    if not os.path.exists(folder):
        if shipped is not None:
            fail(f"This installation holds no shipped model {model!r}. Name one: `--model FOLDER_OR_HUB_ID`.")
        if is_hub_id(model):
            return model
        fail(f"`--model`: there is no folder {model}, and it is not a Hub id (owner/name) either.")
    name = _read_index(folder)["_class_name"]
    if family not in (None, SAVED_AS[name]):
        fail(f"`--model`: {folder} holds a {name}; this command takes models of {family} only.")
    return os.fspath(folder)


def _read_index(folder: Path) -> dict:
    """What the `model_index.json` of a folder says, if it is that of a pipeline of this package."""
    index = folder / "model_index.json"
    if not os.path.isfile(index):
        fail(f"`--model`: {folder} is not a saved pipeline: it has no model_index.json.")
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        name = saved["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"`--model`: {index} is damaged ({type(error).__name__}: {error}). Copy or save the model again.")
    if name not in SAVED_AS:
        fail(f"`--model`: {folder} holds a {name}, not a CogView2Pipeline or CogViewPipeline.")
    return saved


def describe_model(model: str, adapters: Sequence[Adapter] = (), int8: bool = False) -> dict[str, Any]:
    """
    What results say of the model that made them: its name, and of a folder the fingerprint, but not where it is; the
    same of its adapters; and `int8` where it computed so.

    Args:
        model (`str`): As in `--model`; it is there.
        adapters: As in `--lora`; they are there.
        int8: As in `--int8`.
    """
    added: dict[str, Any] = {"lora": [adapter.describe() for adapter in adapters]} if adapters else {}
    added |= {"int8": True} if int8 else {}
    return {**model_identity(model, find_model(model)), **added}


def load_pipeline(
    model: str,
    device: str | None = None,
    dtype: DType | None = None,
    work: str = "generate",
    adapters: Sequence[Adapter] = (),
    int8: bool = False,
) -> "PipelineBase":
    """
    Load a model: of CogView2 all of it as its first pipeline, of CogView a pipeline that does the work. What is wrong
    with the model is told in one line.

    Args:
        model, device, dtype: As in `--model`, `--device` and `--dtype`.
        work (`str`): What it is for: `"generate"`, `"inpaint"`, `"upscale"` or `"caption"`; see `pipeline_for`.
        adapters: As in `--lora`; they are added to the weights.
        int8: As in `--int8`.
    """
    source = find_model(model)
    import diffusers
    import torch
    import transformers

    from ..pipelines.common.base import unknown_words

    unknown_words.setLevel("ERROR")  # commands tell it themselves
    device = choose_device(device)
    if int8 and torch.device(device).type != "cpu":
        fail(f"`--int8` computes on a CPU, but the device is {device}. Leave it out, or pass --device cpu.")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        kind = _class_for(source, work)
        pipe = kind.from_pretrained(source, dtype=getattr(torch, choose_dtype(dtype, device)))
    except typer.Exit:
        raise
    except Exception as error:  # whatever a damaged file makes the loaders raise
        reason = first_line(error)
        if os.path.exists(source):
            for path in sorted(Path(source).glob("*/*.*")):
                if path.suffix in _SAVED and (foreign := describe_foreign_file(path)) is not None:
                    fail(f"`--model`: {path} {foreign}")
            fail(f"`--model`: {source} is incomplete or damaged ({type(error).__name__}: {reason})")
        fail(f"`--model`: there is no folder {source}, and it could not be fetched from the Hub either: {reason}")
    finally:
        diffusers.utils.logging.enable_progress_bar()
        transformers.utils.logging.enable_progress_bar()
    add_adapters(pipe, adapters)
    if int8:
        _compute_in_int8(pipe)
    return pipe.to(device)


def _compute_in_int8(pipe: "PipelineBase") -> None:
    if not hasattr(pipe, "set_super_resolution"):
        fail("`--int8` is about the super-resolution of CogView2. Leave it out for a CogView.")
    try:
        pipe.set_super_resolution(int8=True)
    except ValueError as error:
        fail(f"`--int8`: {error}")


def _class_for(source: str, work: str) -> type["PipelineBase"]:
    """
    What is loaded for some work. Of CogView2 that is the whole model, of CogView only a pipeline that does the work:
    a folder may hold one of its models alone.
    """
    from ..pipelines.common.base import PipelineBase

    saved = _read_index(Path(source)) if os.path.exists(source) else dict(PipelineBase.load_config(source))
    saved_as = saved.get("_class_name")
    if saved_as not in SAVED_AS:
        fail(f"`--model`: {source} holds a {saved_as}, not a CogView2Pipeline or CogViewPipeline.")
    try:
        kind = pipeline_class(saved_as, work)
        if SAVED_AS[saved_as] == "cogview2":
            return pipeline_class(saved_as, "generate")
        kind.check_needed({name for name, value in saved.items() if isinstance(value, list) and value[0] is not None})
    except ValueError as error:
        fail(f"`--model`: {source}: {error}")
    return kind


@dataclass(frozen=True)
class ModelChoice:
    """
    What `--model`, `--device`, `--dtype`, `--lora` and `--int8` say, for commands that first see whether there is work
    for a model.
    """

    model: str
    device: str | None
    dtype: DType | None
    adapters: tuple[Adapter, ...] = ()
    int8: bool = False

    def load(self, work: str = "generate") -> "PipelineBase":
        """As [`load_pipeline`]."""
        return load_pipeline(self.model, self.device, self.dtype, work, self.adapters, self.int8)

    def describe(self) -> dict[str, Any]:
        """As [`describe_model`]."""
        return describe_model(self.model, self.adapters, self.int8)

    def identity(self) -> dict[str, Any]:
        """What metadata must say if their result came from this model with these adapters, or with none."""
        return {"lora": None, "int8": None, **self.describe()}
