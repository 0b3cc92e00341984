"""A CogView2 pipeline as a folder that programs without PyTorch can draw with."""

import contextlib
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from .._version import __version__
from ..models.cogview2.modeling_coglm_canvas import CogLMCanvasModel
from ..pipelines.cogview2.base import Stage
from ..pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from ..pipelines.cogview2.settings import SamplingSettings
from .graphs import canvas_graph, pixel_graph, text_graph
from .tokenizer_tables import tokenizer_tables
from .weights import WeightFiles

if TYPE_CHECKING:
    import onnx

DESCRIPTION, TOKENIZER = "model.json", "tokenizer.json"
FORMAT, FORMAT_VERSION = "cogview2-onnx", 1
DTYPES = ("float16", "float32")
_LOCK = ".lock"


def export_onnx(pipe: CogView2Pipeline, output: str | Path, dtype: str = "float16") -> dict[str, int]:
    """
    Write a pipeline as ONNX graphs with their weights, its text tokenizer, and a description of all that the loop
    around the graphs needs.

    The folder appears whole, or not at all.

    Args:
        pipe ([`CogView2Pipeline`]): The pipeline; its models are in float32, on the CPU.
        output (`str` or `Path`): A folder that is not there yet.
        dtype (`str`): `"float16"` or `"float32"`: of the weights in the files. The graphs compute in float32.

    Returns:
        `dict[str, int]`: Names and sizes of the files, in bytes.

    Raises:
        FileExistsError: If `output` is there, or another export is writing it.
        ImportError: If onnx is not installed.
        TypeError: If `pipe` is another kind of pipeline.
        ValueError: If `dtype` is unknown or cannot hold the weights, or a model is in another number format.
    """
    if not isinstance(pipe, CogView2Pipeline):
        raise TypeError(f"`pipe` must be a CogView2Pipeline, but is a {type(pipe).__name__}, which is not exported.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, but is {dtype!r}.")
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("Exporting to ONNX needs the package onnx: pip install 'cogview_pipelines[onnx]'.")
    for name, model in _models(pipe).items():
        if model.dtype != torch.float32 or model.device.type != "cpu":
            raise ValueError(
                f"`{name}` must be in float32 on the CPU to be exported, but is in {model.dtype} on {model.device}. "
                "Load the pipeline with `dtype=torch.float32`."
            )
    output = Path(output)
    with _whole_folder(output) as folder:
        weights, graphs = WeightFiles(folder, dtype), {}
        for name, make in _graphs(pipe).items():
            graphs[name] = _write_graph(folder, name, make(), weights)
        _write_json(folder / TOKENIZER, tokenizer_tables(pipe.tokenizer))
        files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir()) if path.name != _LOCK}
        _write_json(folder / DESCRIPTION, {**describe(pipe), "dtype": dtype, "graphs": graphs, "files": files})
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _LOCK}
    return sizes


def describe(pipe: CogView2Pipeline) -> dict[str, Any]:
    """What the loop needs to know: sizes, positions, clusters, schedules, and the settings of each style."""
    config = pipe.transformer.config
    styles = {name: _describe_style(pipe, name) for name in pipe.config.styles}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "cogview_pipelines": __version__,
        "text": {
            "boi_token_id": config.boi_token_id,
            "max_text_tokens": config.max_text_tokens,
            "image_position": config.image_position,
            "image_grid": list(config.image_grid),
            "num_image_tokens": config.num_image_tokens,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "masked_score": torch.finfo(torch.float32).min / 2,
        },
        "canvases": {
            name: {
                "super_resolution": model.config.super_resolution,
                "fine_grid": list(model.config.fine_grid),
                "num_text_slots": model.config.num_text_slots,
            }
            for name, model in _models(pipe).items()
            if isinstance(model, CogLMCanvasModel)
        },
        "compression_rate": pipe.config.compression_rate,
        "sizes": [list(size) for size in pipe.sizes],
        "num_clusters": pipe.vqvae.config.num_clusters,
        "cluster_labels": pipe.vqvae.cluster_labels.tolist(),
        "default_style": pipe.config.default_style,
        "styles": styles,
        "plain": _describe_style(pipe, None) if pipe.config.default_style is None else None,
    }


def _describe_style(pipe: CogView2Pipeline, name: str | None) -> dict[str, Any]:
    """Suffixes, settings and schedules, with every default filled in."""
    settings, suffix = pipe._settings(name, {}), pipe._preset(name).get("suffix", "")
    stages = pipe._stages(settings) if pipe.direct_sr_transformer is not None else []
    text = ("guidance_scale", "text_attention_bias", "temperature", "top_k_clusters", "cluster_temperature")
    assert set(text) <= set(SamplingSettings.declared())
    return {
        "suffix": {"en": suffix, "zh": suffix} if isinstance(suffix, str) else suffix,
        **{key: getattr(settings, key) for key in text},
        "stages": [_describe_stage(stage) for stage in stages],
    }


def _describe_stage(stage: Stage) -> dict[str, Any]:
    config = stage.scheduler.config
    top_k = [config.top_k] * stage.num_steps if isinstance(config.top_k, int) else list(config.top_k)
    return {
        "name": stage.name,
        "step_grid": [list(row) for row in config.step_grid],
        "top_k": top_k,
        "temperature": config.temperature,
        "cluster_temperature": config.cluster_temperature,
    }


def _models(pipe: CogView2Pipeline) -> dict[str, nn.Module]:
    names = ("transformer", "direct_sr_transformer", "iterative_sr_transformer", "vqvae")
    return {name: model for name in names if (model := getattr(pipe, name)) is not None}


def _graphs(pipe: CogView2Pipeline) -> dict[str, Callable[[], "onnx.ModelProto"]]:
    """What makes the graph of each model, in the order in which a picture needs them."""

    def maker(model: nn.Module) -> Callable[[], "onnx.ModelProto"]:
        if model is pipe.transformer:
            return lambda: text_graph(model)
        if model is pipe.vqvae:
            return lambda: pixel_graph(model, pipe.config.compression_rate)
        return lambda: canvas_graph(model)

    return {name: maker(model) for name, model in _models(pipe).items()}


def _write_graph(folder: Path, name: str, model: "onnx.ModelProto", weights: WeightFiles) -> dict[str, Any]:
    """A graph and its weights as files; their names."""
    needed = weights.move_out(model, f"{name}.weights")
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    return {"graph": f"{name}.onnx", "weights": needed}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
    digest = hashlib.sha256(path.read_bytes()) if digest is None else digest  # before Python 3.11
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """
    A folder beside `output` that takes its place at the end, if nothing goes wrong. What a killed run has left there
    is removed by the next.
    """
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"`output` {output} exists already. Delete it, or choose another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.parent / f".{output.name}.unfinished"
    unfinished.mkdir(exist_ok=True)
    lock = FileLock(unfinished / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"Another export is writing {output}. Wait for it, or choose another folder.") from None
    try:
        for left in unfinished.iterdir():
            if left.name != _LOCK:
                left.unlink()
        yield unfinished
    except BaseException:
        lock.release()
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    lock.release()
    (unfinished / _LOCK).unlink(missing_ok=True)
    unfinished.rename(output)
