"""Joining trained parts into a pipeline folder: the options of the scripts, where parts come from, what is written."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from ..loaders.lora import read_saved_adapters
from ..model_index import has_component
from ..models.image_tokenizers.auto import DEFAULT_RATE, choose_rate, load_image_tokenizer
from ..models.tokenization import CodesAndPiecesTokenizer
from .adapters import LEFT_OUT, warn_of_adapters
from .arguments import read_words
from .data.tokens import TokenData
from .run_folder import filling

logger = logging.getLogger(__name__)


@dataclass
class AssembleOptions:
    """What the scripts that join parts have in common; the models are options of their own."""

    output_dir: str = field(metadata={"help": "The pipeline folder to write."})
    like: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pipeline: what no other option says (parts, settings, known words) is as "
            "there; adapters that were saved with it are left out, with a warning."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id of the tokenizer."})
    vqvae: str | None = field(default=None, metadata={"help": "The image tokenizer."})
    compression_rate: int | None = field(
        default=None, metadata={"help": "Pixels per token along each side; default: the only rate of `vqvae`, or 8."}
    )
    words_file: str | None = field(
        default=None,
        metadata={"help": "Text file with all words that the model knows: prompts with others are warned about."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Token folder that it was trained on: where the model has a list of all words that it knows, the "
            "words of these captions are added."
        },
    )
    dtype: str = field(
        default="float16",
        metadata={"help": "Type of the stored weights.", "choices": ["float32", "float16", "bfloat16"]},
    )
    files: str = field(default="{}", metadata={"help": "JSON: files to copy beside, by their names there."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )


class Parts:
    """
    Where the parts of a pipeline come from: the options, else the pipeline that it is like. Adapters that are left
    out with them are named in a warning.

    Args:
        config ([`AssembleOptions`]): The options.
        pipeline_class (`type`): What reads the index of `like`.
        models (`dict[str, type]`): The models that the pipeline may have, and their classes.
        defaults (`dict[str, Any]`): Settings of a pipeline that is like no other.
        other_script (`str`): What joins parts of the other family.

    Raises:
        ValueError: If `like` is a pipeline of another family, or the list of its adapters is damaged.
    """

    def __init__(
        self,
        config: AssembleOptions,
        pipeline_class: type[DiffusionPipeline],
        models: Mapping[str, type[PreTrainedModel]],
        defaults: Mapping[str, Any],
        other_script: str,
    ):
        self.config, self.models, self.defaults = config, models, defaults
        self.dtype = getattr(torch, config.dtype)
        self.like: dict[str, Any] = {}
        if config.like is not None:
            self.like = dict(pipeline_class.load_config(config.like))
            for name, kind in models.items():
                found = self.like.get(name, [None])
                if found[0] is not None and found[1] != kind.__name__:
                    raise ValueError(
                        f"`like` must have a {kind.__name__} as `{name}`, but {config.like} has a {found[1]}. "
                        f"{other_script} joins parts of the other family."
                    )
            adapters = [*read_saved_adapters(config.like)[0]]
            if adapters:
                logger.warning("The adapters %s of `like` %s", adapters, LEFT_OUT)
        for name in models:
            if getattr(config, name) is not None:
                warn_of_adapters(name, getattr(config, name))

    def place(self, name: str) -> dict[str, str] | None:
        """Arguments of `from_pretrained` for a part, or `None` where there is none."""
        own = getattr(self.config, name, None)
        if own is not None:
            return {"pretrained_model_name_or_path": own}
        like = self.config.like
        if like is None or not has_component(self.like, name):
            return None
        return {"pretrained_model_name_or_path": like, "subfolder": name}

    def require(self, name: str) -> dict[str, str]:
        """The same; raises `ValueError` where there is none."""
        place = self.place(name)
        if place is None:
            raise ValueError(f"`{name}` must be given, or `like`, a pipeline that has one.")
        return place

    def setting(self, name: str, own: Any) -> Any:
        """A setting of the pipeline: the option's value, or `None` where it is not given."""
        return self.like.get(name, self.defaults[name]) if own is None else own

    def model(self, name: str) -> PreTrainedModel:
        """One of the models."""
        return self.models[name].from_pretrained(**self.require(name), dtype=self.dtype)

    def image_tokenizer(self) -> PreTrainedModel:
        """The image tokenizer, of whichever kind."""
        place = self.require("vqvae")
        return load_image_tokenizer(place.pop("pretrained_model_name_or_path"), **place, dtype=self.dtype)

    def compression_rate(self, vqvae: PreTrainedModel) -> int:
        """Pixels per token along each side, which the image tokenizer must have."""
        return choose_rate(vqvae, self.config.compression_rate, self.like.get("compression_rate", DEFAULT_RATE))

    def tokenizer(self, kind: type[CodesAndPiecesTokenizer], styles: bool) -> CodesAndPiecesTokenizer:
        """The text tokenizer, with the words of `words_file` and `data`, and of its styles where models read those."""
        words: dict[str, Any] = {}
        if self.config.words_file is not None:
            words = {"known_words": read_words(self.config.words_file), "component_words": None}
        tokenizer = kind.from_pretrained(**self.require("tokenizer"), **words)
        if self.config.data is not None:
            tokenizer.add_known_words(TokenData.load(self.config.data, tokenizer).texts(styles=styles))
        return tokenizer


def write_pipeline(pipeline: DiffusionPipeline, folder: str | Path, files: Mapping[str, str]) -> None:
    """
    Write a pipeline into a folder, which is one at the end alone.

    Args:
        pipeline (`DiffusionPipeline`): What is written.
        folder (`str` or path): Where; it is made.
        files (`dict[str, str]`): Files to copy beside, by their names there.
    """
    with filling(Path(folder), DiffusionPipeline.config_name) as partial:
        pipeline.save_pretrained(partial)
        for name, source in files.items():
            shutil.copyfile(source, partial / name)
