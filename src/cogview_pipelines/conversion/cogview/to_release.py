"""From a folder of CogView's pipelines to the files that the original code reads."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ...models.cogview.modeling_cogview import CogViewConfig, CogViewModel
from ...models.image_tokenizers.modeling_cogview_vq import CogViewVQConfig, CogViewVQModel
from ..job import read_record
from ..reader import ConversionError
from ..released_models import ITERATION, LATEST_FILES, WEIGHTS_FILE
from ..shapes import check_shapes, expected_shapes
from ..writer import load_tensors, new_path, save_state_dict
from . import layout

TEXT_MODEL = "cog-pretrain.model"
IMAGE_TOKENIZER = "vqvae.pt"


def convert_to_release(
    pipeline: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """
    Write the checkpoints and tokenizers of a saved pipeline in the format of the release, in one rank.

    Args:
        pipeline (`str` or `Path`): A folder with any of the components of CogView's pipelines.
        output (`str` or `Path`): Gets `cogview-base/`, `cogview-caption/`, `cogview-sr/`, `vqvae.pt` and
            `cog-pretrain.model`, as far as there is something to write; nothing of these may be there yet.
        iteration (`int`, *optional*): By default the one that was converted, else 1.
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
    for component, name in layout.STAGES.items():
        if (pipeline / component).is_dir():
            step = str(iteration) if iteration is not None else _iteration(pipeline, component)
            written.append(_write_transformer(pipeline / component, output / name, step, dtype, say))
    if (pipeline / "vqvae").is_dir():
        written.append(_write_image_tokenizer(pipeline / "vqvae", output / IMAGE_TOKENIZER, say))
    vocabulary = pipeline / "tokenizer" / TEXT_MODEL
    if vocabulary.is_file():
        target = new_path(output / TEXT_MODEL)
        shutil.copyfile(vocabulary, target)
        written.append(target)
        say(f"{target}")
    if not written:
        raise ConversionError(f"{pipeline} has no component of a CogView pipeline.")
    return written


def _iteration(pipeline: Path, component: str) -> str:
    try:
        iteration = read_record(pipeline)["components"][component]["iteration"]
    except (ConversionError, KeyError):
        return "1"
    return iteration if re.fullmatch(ITERATION, iteration) else "1"  # it is to be the name of a folder


def _write_transformer(folder: Path, target: Path, step: str, dtype: torch.dtype | None, say) -> Path:
    new_path(target)
    config = CogViewConfig.from_pretrained(folder)
    layout.check_released(config)
    tensors = load_tensors(folder)
    surplus = check_shapes(tensors, expected_shapes(CogViewModel, config), str(folder))
    tensors = {layout.released_transformer_key(key): value for key, value in tensors.items() if key not in surplus}
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / step).mkdir(parents=True)
    save_state_dict(tensors, partial / step / WEIGHTS_FILE)
    (partial / LATEST_FILES[1]).write_text(step)
    partial.replace(target)
    count = sum(tensor.numel() for tensor in tensors.values())
    say(f"{target}: iteration {step}, {len(tensors)} tensors, {count:,} parameters")
    return target


def _write_image_tokenizer(folder: Path, target: Path, say: Callable[[str], None]) -> Path:
    new_path(target)
    config = CogViewVQConfig.from_pretrained(folder)
    default = CogViewVQConfig()
    for name in ("num_halvings", "image_mean", "image_std"):
        if getattr(config, name) != getattr(default, name):
            raise ConversionError(
                f"{folder}: the original image tokenizer has another architecture: `{name}` is "
                f"{getattr(config, name)}, not {getattr(default, name)}."
            )
    tensors = load_tensors(folder)
    check_shapes(tensors, expected_shapes(CogViewVQModel, config), str(folder))
    tensors = {key: value.T if key in layout.TRANSPOSED else value for key, value in tensors.items()}
    tensors = {layout.released_image_tokenizer_key(key): value for key, value in tensors.items()}
    save_state_dict(tensors, target, entry=None)
    say(f"{target}: {len(tensors)} tensors, {config.num_embeddings} codes")
    return target
