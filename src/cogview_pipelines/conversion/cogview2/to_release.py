"""From a `CogView2Pipeline` folder to the files that the original code reads."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import ConversionError
from ..job import load_component
from ..release_folder import choose_iteration, copy_file, release_folder, write_checkpoint
from ..writer import load_tensors, save_state_dict
from . import layout
from .layout import STAGES, Stage

IMAGE_FILE, LABELS_FILE, TEXT_FILE = "ice_image.pt", "cluster_label.npy", "ice_text.model"


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
            `cluster_label.npy`, as far as there is something to write; nothing of these may be there yet, but what
            the same call wrote before it was interrupted.
        iteration (`int`, *optional*): Written to `latest`; by default the one that was converted, else 1.
        dtype (`torch.dtype`, *optional*): Convert the transformers; by default tensors stay as they are. The release
            runs in float16.
        say: Called with each line of the report.

    Returns:
        `list[Path]`: What is there now.

    Raises:
        ConversionError: If the original code could not run the model, or something is there already.
    """
    pipeline = Path(pipeline)
    stages = [stage for stage in STAGES if (pipeline / stage.component).is_dir()]
    targets = [stage.released_name for stage in stages]
    if (pipeline / "vqvae").is_dir():
        targets += [IMAGE_FILE, LABELS_FILE]
    if (pipeline / "tokenizer" / TEXT_FILE).is_file():
        targets.append(TEXT_FILE)
    if not targets:
        raise ConversionError(f"{pipeline} has no component of a CogView2Pipeline.")
    with release_folder(pipeline, output, targets, iteration, dtype) as (output, there):
        for stage in stages:
            if stage.released_name not in there:
                step = choose_iteration(pipeline, stage.component, iteration)
                say(_write_transformer(pipeline, output / stage.released_name, stage, step, dtype))
        if IMAGE_FILE in targets and not {IMAGE_FILE, LABELS_FILE} <= there:
            say(_write_image_tokenizer(pipeline / "vqvae", output))
        if TEXT_FILE in targets and TEXT_FILE not in there:
            say(copy_file(pipeline / "tokenizer" / TEXT_FILE, output / TEXT_FILE))
        for name in sorted(there):
            say(f"{output / name}: already written by a run that was interrupted")
    return [output / name for name in targets]


def _read_config(folder: Path, config_class: type[layout.CogLMConfig], stage: Stage) -> layout.CogLMConfig:
    """The configuration of a component folder, which must be that of its stage."""
    config = load_component(folder, config_class)
    found = getattr(config, "super_resolution", None)
    if found != stage.super_resolution:
        raise ConversionError(
            f"{folder} must have `super_resolution` = {stage.super_resolution!r}, but has {found!r}."
        )
    return config


def _write_transformer(pipeline: Path, target: Path, stage: Stage, step: str, dtype: torch.dtype | None) -> str:
    folder = pipeline / stage.component
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
    texts = {"model_config.json": json.dumps(released_config, indent=4) + "\n", "latest": step}
    return write_checkpoint(target, tensors, step, texts)


def _write_image_tokenizer(folder: Path, output: Path) -> str:
    config = load_component(folder, layout.IcetkVQConfig)
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
    layout.check_shapes(tensors, layout.expected_shapes(layout.IcetkVQModel, config), str(folder))
    labels = tensors.pop("cluster_labels")
    image, clusters = output / IMAGE_FILE, output / LABELS_FILE
    save_state_dict({layout.released_image_tokenizer_key(key): value for key, value in tensors.items()}, image)
    temporary = clusters.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, labels.numpy())
    temporary.replace(clusters)
    return (
        f"{image}: {len(tensors)} tensors, {config.num_embeddings} codes; {clusters}: {config.num_clusters} clusters"
    )
