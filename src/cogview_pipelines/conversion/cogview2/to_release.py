"""From a `CogView2Pipeline` folder to the files that the original code reads."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import ConversionError
from ..job import read_record, source_id
from ..output_folder import continued, locked
from ..released_models import ITERATION, WEIGHTS_FILE
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
    if iteration is not None and not re.fullmatch(ITERATION, str(iteration)):
        raise ConversionError(f"`iteration` must be a number above 0, but is {iteration}.")
    pipeline = Path(pipeline)
    stages = [stage for stage in STAGES if (pipeline / stage.component).is_dir()]
    targets = [stage.released_name for stage in stages]
    if (pipeline / "vqvae").is_dir():
        targets += [IMAGE_FILE, LABELS_FILE]
    if (pipeline / "tokenizer" / TEXT_FILE).is_file():
        targets.append(TEXT_FILE)
    if not targets:
        raise ConversionError(f"{pipeline} has no component of a CogView2Pipeline.")
    source = _source_id(pipeline, iteration, dtype)
    with locked(output) as output, continued(output, source, targets) as there:
        for stage in stages:
            if stage.released_name not in there:
                _write_transformer(pipeline, output, stage, iteration, dtype, say)
        if IMAGE_FILE in targets and not {IMAGE_FILE, LABELS_FILE} <= there:
            _write_image_tokenizer(pipeline / "vqvae", output, say)
        if TEXT_FILE in targets and TEXT_FILE not in there:
            temporary = output / f"{TEXT_FILE}.tmp"
            shutil.copyfile(pipeline / "tokenizer" / TEXT_FILE, temporary)
            temporary.replace(output / TEXT_FILE)
            say(f"{output / TEXT_FILE}")
        for name in sorted(there):
            say(f"{output / name}: already written by a run that was interrupted")
    return [output / name for name in targets]


def _source_id(pipeline: Path, *settings: object) -> str:
    """Identifies what is converted and how: files by size and time of their last change."""
    files = sorted(path for path in pipeline.glob("*/*") if path.is_file())
    parts = [(str(path.relative_to(pipeline)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return source_id(parts, *map(str, settings))


def _iteration(pipeline: Path, stage: Stage) -> str:
    try:
        iteration = read_record(pipeline)["components"][stage.component]["iteration"]
    except (ConversionError, KeyError):
        return "1"
    return iteration if re.fullmatch(ITERATION, iteration) else "1"  # it is to be the name of a folder


def _read_config(folder: Path, config_class: type[layout.CogLMConfig], stage: Stage) -> layout.CogLMConfig:
    """The configuration of a component folder, which must be that of its stage."""
    try:
        config = config_class.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes the loaders raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{folder}: {reason[:300]}") from None
    found = getattr(config, "super_resolution", None)
    if found != stage.super_resolution:
        raise ConversionError(
            f"{folder} must have `super_resolution` = {stage.super_resolution!r}, but has {found!r}."
        )
    return config


def _write_transformer(pipeline, output, stage, iteration, dtype, say) -> Path:
    folder, target = pipeline / stage.component, output / stage.released_name
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
    try:
        config = layout.IcetkVQConfig.from_pretrained(folder)
    except Exception as error:  # as above
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{folder}: {reason[:300]}") from None
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
    say(f"{image}: {len(tensors)} tensors, {config.num_embeddings} codes; {clusters}: {config.num_clusters} clusters")
    return [image, clusters]
