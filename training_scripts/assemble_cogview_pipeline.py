#!/usr/bin/env python
r"""
Join trained parts of CogView into a pipeline folder.

The model of the demo:
    python training_scripts/assemble_cogview_pipeline.py --config training_scripts/emoji_cogview/pipeline.yaml \
        --output_dir runs/cogview_emoji
A base model alone:
    python training_scripts/assemble_cogview_pipeline.py --tokenizer TOKENIZER --vqvae VQVAE --transformer COGVIEW \
        --output_dir MODEL
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from cogview_pipelines import (
    CogViewCaptionPipeline,
    CogViewModel,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
)
from cogview_pipelines.models.image_tokenizers.auto import load_image_tokenizer
from cogview_pipelines.training.adapters import warn_of_adapters
from cogview_pipelines.training.arguments import files_option, json_option, parse_config, read_words, run_script
from cogview_pipelines.training.run_folder import filling

# The stages, and the pipeline that a folder names which has none of those before.
STAGES = {
    "transformer": CogViewPipeline,
    "super_resolution_transformer": CogViewUpscalePipeline,
    "caption_transformer": CogViewCaptionPipeline,
}


@dataclass
class AssembleConfig:
    tokenizer: str = field(metadata={"help": "Folder or Hub id of the tokenizer."})
    vqvae: str = field(metadata={"help": "The image tokenizer."})
    output_dir: str = field(metadata={"help": "The pipeline folder to write."})
    transformer: str | None = field(default=None, metadata={"help": "Pictures after texts."})
    super_resolution_transformer: str | None = field(
        default=None, metadata={"help": "Finer pictures after coarser ones."}
    )
    caption_transformer: str | None = field(default=None, metadata={"help": "Texts after pictures."})
    compression_rate: int | None = field(
        default=None, metadata={"help": "Pixels per token along each side; default: the only rate of `vqvae`, or 8."}
    )
    settings: str = field(
        default="{}", metadata={"help": "JSON: settings of the calls in place of the released ones, by pipeline."}
    )
    words_file: str | None = field(
        default=None,
        metadata={"help": "Text file with all words that the model knows: prompts with others are warned about."},
    )
    dtype: str = field(
        default="float16",
        metadata={"help": "Type of the stored weights.", "choices": ["float32", "float16", "bfloat16"]},
    )
    files: str = field(default="{}", metadata={"help": "JSON: files to copy beside, by their names there."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )


def main(arguments: list[str] | None = None) -> CogViewPipeline | CogViewUpscalePipeline | CogViewCaptionPipeline:
    config = parse_config(AssembleConfig, arguments, description=__doc__)
    settings, files = json_option(config, "settings"), files_option(config)
    given = [name for name in STAGES if getattr(config, name) is not None]
    if not given:
        raise ValueError(f"One of {', '.join(f'`{name}`' for name in STAGES)} must be given.")
    for name in given:
        warn_of_adapters(name, getattr(config, name))
    dtype = getattr(torch, config.dtype)
    words = {}
    if config.words_file is not None:
        words["known_words"] = read_words(config.words_file)
    pipeline = STAGES[given[0]](
        CogViewTokenizer.from_pretrained(config.tokenizer, **words),
        load_image_tokenizer(config.vqvae, dtype=dtype),
        **{name: CogViewModel.from_pretrained(getattr(config, name), dtype=dtype) for name in given},
        compression_rate=config.compression_rate,
        settings=settings,
    )
    with filling(Path(config.output_dir), DiffusionPipeline.config_name) as partial:
        pipeline.save_pretrained(partial)
        for name, source in files.items():
            shutil.copyfile(source, partial / name)
    return pipeline


if __name__ == "__main__":
    run_script(main)
