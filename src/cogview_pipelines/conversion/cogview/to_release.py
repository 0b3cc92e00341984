"""From a folder of CogView's pipelines to the files that the original code reads."""

from collections.abc import Callable
from pathlib import Path

import torch

from ...models.cogview.modeling_cogview import CogViewConfig, CogViewModel
from ...models.image_tokenizers.modeling_cogview_vq import CogViewVQConfig, CogViewVQModel
from ..job import load_component
from ..reader import ConversionError
from ..release_folder import choose_iteration, copy_file, release_folder, write_checkpoint
from ..released_models import LATEST_FILES
from ..shapes import check_shapes, expected_shapes
from ..writer import load_tensors, save_state_dict
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
            `cog-pretrain.model`, as far as there is something to write; nothing of these may be there yet, but what
            the same call wrote before it was interrupted.
        iteration (`int`, *optional*): By default the one that was converted, else 1.
        dtype (`torch.dtype`, *optional*): Convert the transformers; by default tensors stay as they are. The release
            runs in float16.
        say: Called with each line of the report.

    Returns:
        `list[Path]`: What is there now.

    Raises:
        ConversionError: If the original code could not run the model, or something is there already.
    """
    pipeline = Path(pipeline)
    stages = {component: name for component, name in layout.STAGES.items() if (pipeline / component).is_dir()}
    targets = list(stages.values())
    if (pipeline / "vqvae").is_dir():
        targets.append(IMAGE_TOKENIZER)
    if (pipeline / "tokenizer" / TEXT_MODEL).is_file():
        targets.append(TEXT_MODEL)
    if not targets:
        raise ConversionError(f"{pipeline} has no component of a CogView pipeline.")
    with release_folder(pipeline, output, targets, iteration, dtype) as (output, there):
        for component, name in stages.items():
            if name not in there:
                step = choose_iteration(pipeline, component, iteration)
                say(_write_transformer(pipeline / component, output / name, step, dtype))
        if IMAGE_TOKENIZER in targets and IMAGE_TOKENIZER not in there:
            say(_write_image_tokenizer(pipeline / "vqvae", output / IMAGE_TOKENIZER))
        if TEXT_MODEL in targets and TEXT_MODEL not in there:
            say(copy_file(pipeline / "tokenizer" / TEXT_MODEL, output / TEXT_MODEL))
        for name in sorted(there):
            say(f"{output / name}: already written by a run that was interrupted")
    return [output / name for name in targets]


def _write_transformer(folder: Path, target: Path, step: str, dtype: torch.dtype | None) -> str:
    config = load_component(folder, CogViewConfig)
    layout.check_released(config)
    tensors = load_tensors(folder)
    surplus = check_shapes(tensors, expected_shapes(CogViewModel, config), str(folder))
    tensors = {layout.released_transformer_key(key): value for key, value in tensors.items() if key not in surplus}
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return write_checkpoint(target, tensors, step, {LATEST_FILES[1]: step})


def _write_image_tokenizer(folder: Path, target: Path) -> str:
    config = load_component(folder, CogViewVQConfig)
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
    return f"{target}: {len(tensors)} tensors, {config.num_embeddings} codes"
