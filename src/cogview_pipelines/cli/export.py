"""`cogview2 export`: a model as files that programs without PyTorch run."""

import importlib.util
from pathlib import Path

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import bad_input, expand, fail, failures, say
from .loading import MODEL_OPTION, DType, find_model, load_pipeline

FORMATS = ("onnx",)


def export(
    format: str = typer.Option("onnx", "--format", help=f"What to write: {', '.join(FORMATS)}."),
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; it must not be there yet."),
    dtype: str = typer.Option("float16", "--dtype", help="Of the weights in the files: float16 or float32."),
) -> None:
    """
    Write a CogView2 model as files that programs without PyTorch run.

    With --format onnx: a graph for each stage with its weights beside it, the text tokenizer, and a description of the
    rest. The page for browsers draws with such a folder. Adapters are part of the weights in the files. Needs the
    extra `onnx`.

    \b
      cogview2 export --format onnx --output build/model
    """
    if format not in FORMATS:
        fail(f"`--format` must be one of {', '.join(FORMATS)}, but is {format!r}.")
    if importlib.util.find_spec("onnx") is None:
        fail("`--format` onnx needs the package onnx: pip install 'cogview_pipelines[onnx]'.")
    output = expand(output, "--output")
    if output.exists() or output.is_symlink():
        fail(f"`--output`: {output} exists already. Delete it, or choose another folder.")
    find_model(model, "cogview2")
    adapters = read_adapters(lora)
    from ..export.onnx_folder import DTYPES, export_onnx

    if dtype not in DTYPES:
        fail(f"`--dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    pipe = load_pipeline(model, "cpu", DType.float32, adapters=adapters)
    with failures(), bad_input((ValueError, TypeError, FileExistsError)):
        sizes = export_onnx(pipe, output, dtype)
    for name, size in sizes.items():
        say(f"{size / 1e6:9.2f} MB  {output / name}")
