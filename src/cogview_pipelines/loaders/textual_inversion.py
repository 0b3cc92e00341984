"""Learned words of pipelines (textual inversion): files as diffusers writes them, and what loads them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..models.learned_tokens import check_new_token, initial_row, set_token
from ..pictures.png import write_whole
from .lora_files import EMBEDDING_NAME, check_hub_options, damaged, find_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Mixed  # what the mixin is part of
else:
    Mixed = object

INITIALIZER_KEY = "initializer"


def write_learned_token(folder: str | os.PathLike, token: str, row: torch.Tensor, initializer: str = "") -> Path:
    """
    Write the embedding of a token into `learned_embeds.safetensors`.

    Args:
        folder: Where; it is made.
        token (`str`): The token.
        row (`torch.Tensor` of shape `(hidden_size,)`): Its embedding.
        initializer (`str`): The text that it began with, for models that did not learn it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {token: row.detach().float().cpu().contiguous()}
    write_whole(folder / EMBEDDING_NAME, save(tensors, {"format": "pt", INITIALIZER_KEY: initializer}))
    return folder / EMBEDDING_NAME


def is_learned_token(path: Path) -> bool:
    """Whether a file holds the embedding of a token, rather than an adapter or something else."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):  # whoever loads it says what is wrong
        return path.name == EMBEDDING_NAME
    return len(names) == 1 and ".lora_" not in names[0]


class TextualInversionLoaderMixin(Mixed):
    """A pipeline that takes learned words, as those of diffusers do."""

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        token: str | None = None,
        *,
        weight_name: str | None = None,
        **hub_options,
    ) -> None:
        """
        Add a learned word: the tokenizer knows it, and all models have an embedding of it.

        Models that did not learn it, such as those of super-resolution, read the words that it began with in its
        place. `save_pretrained` saves it with the pipeline.

        Args:
            pretrained_model_name_or_path: A folder, a file, or a Hub id.
            token (`str`, *optional*): What it is called in prompts; default: as in the file.
            weight_name (`str`, *optional*): The file in the folder, where it holds several.
            hub_options: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ValueError: If it is damaged, of another model, or the tokenizer knows such a token; or if the pipeline has
                no `transformer`.
            TypeError: If there is no such argument.
            OSError: If there is no such file.
        """
        check_hub_options("load_textual_inversion", hub_options)
        if getattr(self, "transformer", None) is None:
            raise ValueError(
                f"A learned word is of the `transformer`, which this {type(self).__name__} does not have."
            )
        path = find_weights(os.fspath(pretrained_model_name_or_path), weight_name, EMBEDDING_NAME, **hub_options)
        name, row, initializer = _read(path)
        token = name if token is None else token
        check_new_token(self.tokenizer, token)
        width = self.transformer.config.hidden_size
        if row.shape != (width,):
            raise ValueError(f"{path} is of a model of width {row.numel()}, but this one has {width}.")
        self.tokenizer.add_tokens([token])
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        lent = []
        for model in self._text_models():
            if getattr(model.config, "shares_backbone", False):
                lent.append(model)
            elif model is self.transformer:
                set_token(model, token_id, row)
            else:
                set_token(model, token_id, initial_row(model, self.tokenizer, initializer))
        for model in lent:
            model.share_backbone(self.transformer)

    def _text_models(self) -> list[nn.Module]:
        names = self.model_cpu_offload_seq.split("->")
        return [getattr(self, name) for name in names if getattr(self, name, None) is not None]


def _read(path: Path) -> tuple[str, torch.Tensor, str]:
    if path.suffix != ".safetensors":
        raise ValueError(f"Learned words are read from .safetensors files only, but this is {path.name}.")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            row = file.get_tensor(names[0]) if len(names) == 1 else None
            initializer = (file.metadata() or {}).get(INITIALIZER_KEY, "")
    except SafetensorError as error:
        raise damaged(path, error, "it") from error
    if row is None or row.ndim not in (1, 2) or (row.ndim == 2 and len(row) != 1) or not row.is_floating_point():
        raise ValueError(f"{path} must hold one embedding of one token, but holds {names[:3]}.")
    if not row.float().isfinite().all():
        raise ValueError(
            f"{path} holds an embedding of {names[0]!r} whose numbers are not all finite. Train it again."
        )
    return names[0], row.reshape(-1), initializer
