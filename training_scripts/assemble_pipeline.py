#!/usr/bin/env python
r"""
Join trained parts into a CogView2Pipeline folder.

The model of the demo:
    python training_scripts/assemble_pipeline.py --config training_scripts/emoji/pipeline_small.yaml \
        --output_dir src/cogview_pipelines/demo/models/cogview2-emoji
A finetuned CogLM, and all else as in the model that it was finetuned from:
    python training_scripts/assemble_pipeline.py --like MODEL --transformer runs/mine/final --data data/mine \
        --output_dir my_model
Without super-resolution:
    python training_scripts/assemble_pipeline.py --tokenizer TOKENIZER --vqvae VQVAE --transformer COGLM \
        --output_dir MODEL
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from cogview_pipelines import (
    CogLMCanvasModel,
    CogLMModel,
    CogView2Pipeline,
    IcetkTokenizer,
    LoPARScheduler,
)
from cogview_pipelines.loaders.lora import read_saved_adapters
from cogview_pipelines.models.image_tokenizers.auto import DEFAULT_RATE, choose_rate, load_image_tokenizer
from cogview_pipelines.training.adapters import LEFT_OUT, warn_of_adapters
from cogview_pipelines.training.arguments import files_option, json_option, parse_config, read_words, run_script
from cogview_pipelines.training.data.tokens import TokenData
from cogview_pipelines.training.run_folder import filling

logger = logging.getLogger(__name__)


@dataclass
class AssembleConfig:
    output_dir: str = field(metadata={"help": "The pipeline folder to write."})
    like: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pipeline: what no other option says (parts, schedulers, styles, known "
            "words) is as there; adapters that were saved with it are left out, with a warning."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id of the tokenizer."})
    vqvae: str | None = field(default=None, metadata={"help": "The image tokenizer."})
    transformer: str | None = field(default=None, metadata={"help": "The CogLM."})
    direct_sr_transformer: str | None = field(default=None, metadata={"help": "Direct super-resolution."})
    iterative_sr_transformer: str | None = field(default=None, metadata={"help": "Iterative super-resolution."})
    direct_sr_scheduler: str | None = field(
        default=None, metadata={"help": "JSON: options of its LoPARScheduler; default: one pass, top_k 5."}
    )
    iterative_sr_scheduler: str | None = field(
        default=None, metadata={"help": "JSON: options of its LoPARScheduler; default: those of the release."}
    )
    compression_rate: int | None = field(
        default=None, metadata={"help": "Pixels per token along each side; default: the only rate of `vqvae`, or 8."}
    )
    styles: str | None = field(default=None, metadata={"help": "JSON: style presets by name."})
    default_style: str | None = field(default=None, metadata={"help": "The preset used when a call names none."})
    whole_pictures: bool | None = field(
        default=None, metadata={"help": "CogLM knows whole pictures only: inpainting shows it as much as it can."}
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
    round_to: str | None = field(
        default=None,
        metadata={
            "help": "Round the weights of the transformers before they are stored, so that files compress better. "
            "bfloat16, which mixed precision trained them in: to four fifths of float16. int8: each row of a matrix "
            "to 255 multiples of a power of two, and the rest to bfloat16: to three fifths.",
            "choices": ["bfloat16", "int8"],
        },
    )
    files: str = field(default="{}", metadata={"help": "JSON: files to copy beside, by their names there."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )


# Of a model that is like no other.
DEFAULTS = {"styles": {}, "default_style": None, "whole_pictures": False}
SCHEDULERS = {"direct_sr": {"step_grid": [[1]], "top_k": 5}, "iterative_sr": {}}


def round_rows(weights: torch.Tensor) -> torch.Tensor:
    """Each row as 255 multiples, -127 to 127, of the least power of two that reaches its largest value."""
    largest = weights.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny)
    step = torch.exp2(torch.ceil(torch.log2(largest / 127.5)))
    return (weights / step).round().clamp(-127, 127) * step


class Parts:
    """Where the parts of the pipeline come from: the options, else the model that it is like."""

    def __init__(self, config: AssembleConfig):
        self.config, self.dtype = config, getattr(torch, config.dtype)
        self.like = {} if config.like is None else dict(CogView2Pipeline.load_config(config.like))

    def place(self, name: str) -> dict[str, str] | None:
        """Arguments of `from_pretrained` for a part, or `None` where there is none."""
        own = getattr(self.config, name, None)
        if own is not None:
            return {"pretrained_model_name_or_path": own}
        if self.like.get(name, [None])[0] is None:
            return None
        return {"pretrained_model_name_or_path": self.config.like, "subfolder": name}

    def require(self, name: str) -> dict[str, str]:
        place = self.place(name)
        if place is None:
            raise ValueError(f"`{name}` must be given, or `like`, a pipeline that has one.")
        return place

    def setting(self, name: str, own):
        return self.like.get(name, DEFAULTS[name]) if own is None else own

    def model(self, model_class, name: str):
        model = model_class.from_pretrained(**self.require(name), dtype=self.dtype)
        if self.config.round_to is not None:
            for weights in model.state_dict().values():
                is_matrix = weights.dim() == 2 and self.config.round_to == "int8"
                weights.copy_(round_rows(weights.float()) if is_matrix else weights.bfloat16())
        return model

    def image_tokenizer(self):
        place = self.require("vqvae")
        return load_image_tokenizer(place.pop("pretrained_model_name_or_path"), **place, dtype=self.dtype)

    def direct_sr(self) -> CogLMCanvasModel:
        """Direct super-resolution; one that borrowed the weights of another CogLM than this one keeps those."""
        model = self.model(CogLMCanvasModel, "direct_sr_transformer")
        replaced = self.config.transformer is not None and self.config.direct_sr_transformer is None
        if model.config.shares_backbone and replaced:
            print(
                "Direct super-resolution is that of `like`, which reads tokens by the weights of its CogLM: it keeps "
                "a copy of them. Train it on the new CogLM (train_direct_sr.py --init_from, with --lend_backbone true "
                "if from this copy) to teach it what is new."
            )
            options = {"subfolder": "transformer", "dtype": self.dtype}
            model.keep_backbone(CogLMModel.from_pretrained(self.config.like, **options))
        return model

    def scheduler(self, stage: str, options: dict | None) -> LoPARScheduler:
        if options is None and self.like.get(f"{stage}_scheduler", [None])[0] is not None:
            return LoPARScheduler.from_pretrained(self.config.like, subfolder=f"{stage}_scheduler")
        return LoPARScheduler(**(SCHEDULERS[stage] if options is None else options))


def main(arguments: list[str] | None = None) -> CogView2Pipeline:
    config = parse_config(AssembleConfig, arguments, description=__doc__)
    options = {name: json_option(config, f"{name}_scheduler") for name in SCHEDULERS}
    files = files_option(config)
    parts = Parts(config)
    adapters = [] if config.like is None else [*read_saved_adapters(config.like)[0]]
    if adapters:
        logger.warning("The adapters %s of `like` %s", adapters, LEFT_OUT)
    for name in ("transformer", "direct_sr_transformer", "iterative_sr_transformer"):
        if getattr(config, name) is not None:
            warn_of_adapters(name, getattr(config, name))
    settings = {name: parts.setting(name, getattr(config, name)) for name in DEFAULTS if name != "styles"}
    settings["styles"] = parts.setting("styles", json_option(config, "styles"))
    if settings["default_style"] is not None and settings["default_style"] not in settings["styles"]:
        raise ValueError(
            f"`default_style` must be one of the `styles` {list(settings['styles'])}, but is "
            f"{settings['default_style']!r}."
        )
    stages = {}
    for stage in SCHEDULERS:
        if parts.place(f"{stage}_transformer") is not None:
            is_direct = stage == "direct_sr"
            model = parts.direct_sr() if is_direct else parts.model(CogLMCanvasModel, f"{stage}_transformer")
            stages[f"{stage}_transformer"] = model
            stages[f"{stage}_scheduler"] = parts.scheduler(stage, options[stage])
    words = {}
    if config.words_file is not None:
        words["known_words"] = read_words(config.words_file)
    tokenizer = IcetkTokenizer.from_pretrained(**parts.require("tokenizer"), **words)
    if config.data is not None:
        tokenizer.add_known_words(TokenData.load(config.data, tokenizer).texts(styles=False))
    vqvae = parts.image_tokenizer()
    pipeline = CogView2Pipeline(
        tokenizer,
        parts.model(CogLMModel, "transformer"),
        vqvae,
        **stages,
        compression_rate=choose_rate(vqvae, config.compression_rate, parts.like.get("compression_rate", DEFAULT_RATE)),
        **settings,
    )
    with filling(Path(config.output_dir), DiffusionPipeline.config_name) as partial:
        pipeline.save_pretrained(partial)
        for name, source in files.items():
            shutil.copyfile(source, partial / name)
    return pipeline


if __name__ == "__main__":
    run_script(main)
