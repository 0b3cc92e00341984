"""From a `CogView2Pipeline` folder to the files that the original code reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..job import RECORD_FILE
from ..reader import ConversionError
from ..released_models import WEIGHTS_FILE
from ..writer import load_tensors, new_path, save_state_dict
from . import layout
from .layout import STAGES, Stage


def convert_to_release(
    pipeline: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """
    Write the checkpoints, tokenizers and cluster labels of a saved pipeline in the format of the release.

    Args:
        pipeline (`str` or `Path`): A folder with any of the components of a [`CogView2Pipeline`].
        output (`str` or `Path`): Gets `coglm/`, `cogview2-dsr/`, `cogview2-itersr/`, `ice_image.pt`, `ice_text.model`,
            `cluster_label.npy`, as far as the pipeline has them. None of these may exist yet.
        iteration (`int`, *optional*): Written to `latest`; by default the one that was converted, else 1.
        dtype (`torch.dtype`, *optional*): Convert the transformers; by default tensors stay as they are. The release
            runs in float16.
        say: Called with each line of the report.

    Returns:
        `list[Path]`: What was written.

    Raises:
        ConversionError: If the original code could not run the model, or something is there already.
    """
    pipeline, output = Path(pipeline), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for stage in STAGES:
        if (pipeline / stage.component).is_dir():
            written.append(_write_transformer(pipeline, output, stage, iteration, dtype, say))
    if (pipeline / "vqvae").is_dir():
        written += _write_image_tokenizer(pipeline / "vqvae", output, say)
    vocabulary = pipeline / "tokenizer" / "ice_text.model"
    if vocabulary.is_file():
        target = new_path(output / "ice_text.model")
        shutil.copyfile(vocabulary, target)
        written.append(target)
        say(f"{target}")
    if not written:
        raise ConversionError(f"{pipeline} has no component of a CogView2Pipeline.")
    return written


def _iteration(pipeline: Path, stage: Stage) -> str:
    try:
        return json.loads((pipeline / RECORD_FILE).read_text())["components"][stage.component]["iteration"]
    except (OSError, ValueError, KeyError):
        return "1"


def _read_config(folder: Path, config_class: type[layout.CogLMConfig], stage: Stage) -> layout.CogLMConfig:
    """The configuration of a component folder, which must be that of its stage."""
    try:
        config = config_class.from_pretrained(folder)
    except ValueError as error:
        raise ConversionError(f"{folder}: {error}") from None
    found = getattr(config, "super_resolution", None)
    if found != stage.super_resolution:
        raise ConversionError(
            f"{folder} must have `super_resolution` = {stage.super_resolution!r}, but has {found!r}."
        )
    return config


def _write_transformer(pipeline, output, stage, iteration, dtype, say) -> Path:
    folder, target = pipeline / stage.component, new_path(output / stage.released_name)
    model_class = layout.model_class_of(stage.component)
    config = _read_config(folder, model_class.config_class, stage)
    released_config = layout.released_config(config, stage)
    tensors = load_tensors(folder)
    if getattr(config, "shares_backbone", False):
        lender = pipeline / "transformer"
        if not lender.is_dir():
            raise ConversionError(
                f"{folder} has no backbone of its own, and {lender}, whose backbone it shares, is missing."
            )
        tensors |= load_tensors(lender)
        config.shares_backbone = False
    surplus = layout.check_shapes(tensors, layout.expected_shapes(model_class, config), str(folder))
    tensors = {layout.released_transformer_key(key): value for key, value in tensors.items() if key not in surplus}
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    step = str(iteration) if iteration is not None else _iteration(pipeline, stage)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / step).mkdir(parents=True)
    save_state_dict(tensors, partial / step / WEIGHTS_FILE)
    (partial / "model_config.json").write_text(json.dumps(released_config, indent=4) + "\n")
    (partial / "latest").write_text(step)
    partial.replace(target)
    say(
        f"{target}: iteration {step}, {len(tensors)} tensors, "
        f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters"
    )
    return target


def _write_image_tokenizer(folder: Path, output: Path, say: Callable[[str], None]) -> list[Path]:
    config = layout.IcetkVQConfig.from_pretrained(folder)
    released = layout.IcetkVQConfig(
        num_embeddings=config.num_embeddings, embedding_dim=config.embedding_dim, base_channels=config.base_channels
    )
    constants = (
        "encoder_channel_multipliers",
        "decoder_channel_multipliers",
        "decoder_attention_levels",
        "compression_rates",
        "num_res_blocks",
        "num_decoder_res_blocks",
        "norm_num_groups",
        "mid_attention",
        "encoder_patch_size",
        "decoder_patch_size",
        "local_encoder",
        "image_mean",
        "image_std",
    )
    wrong = [
        f"`{name}` is {getattr(config, name)}"
        for name in constants
        if getattr(config, name) != getattr(released, name)
    ]
    if wrong:
        raise ConversionError(f"{folder}: the original image tokenizer has another architecture: {'; '.join(wrong)}.")
    tensors = load_tensors(folder)
    labels = tensors.pop("cluster_labels")
    image, clusters = new_path(output / "ice_image.pt"), new_path(output / "cluster_label.npy")
    save_state_dict({layout.released_image_tokenizer_key(key): value for key, value in tensors.items()}, image)
    temporary = clusters.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, labels.numpy())
    temporary.replace(clusters)
    say(f"{image}: {len(tensors)} tensors, {config.num_embeddings} codes; {clusters}: {config.num_clusters} clusters")
    return [image, clusters]
