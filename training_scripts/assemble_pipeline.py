#!/usr/bin/env python
r"""
Join trained parts into a CogView2Pipeline folder.

The model of the demo:
    python training_scripts/assemble_pipeline.py --config training_scripts/emoji/pipeline_small.yaml \
        --output_dir src/cogview_pipelines/demo/models/cogview2-emoji
Without super-resolution:
    python training_scripts/assemble_pipeline.py --tokenizer TOKENIZER --vqvae VQVAE --transformer COGLM \
        --output_dir MODEL
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cogview_pipelines import (
    CogLMCanvasModel,
    CogLMModel,
    CogView2Pipeline,
    IcetkTokenizer,
    IcetkVQModel,
    LoPARScheduler,
)
from cogview_pipelines.training.arguments import parse_config, run_script


@dataclass
class AssembleConfig:
    tokenizer: str = field(metadata={"help": "Folder or Hub id of the tokenizer."})
    vqvae: str = field(metadata={"help": "The image tokenizer."})
    transformer: str = field(metadata={"help": "The CogLM."})
    output_dir: str = field(metadata={"help": "The pipeline folder to write."})
    direct_sr_transformer: str | None = field(default=None, metadata={"help": "Direct super-resolution."})
    iterative_sr_transformer: str | None = field(default=None, metadata={"help": "Iterative super-resolution."})
    direct_sr_scheduler: str = field(default="{}", metadata={"help": "JSON: options of its LoPARScheduler."})
    iterative_sr_scheduler: str = field(default="{}", metadata={"help": "JSON: options of its LoPARScheduler."})
    compression_rate: int = field(default=8, metadata={"help": "Pixels per token along each side."})
    styles: str = field(default="{}", metadata={"help": "JSON: style presets by name."})
    default_style: str | None = field(default=None, metadata={"help": "The preset used when a call names none."})
    whole_pictures: bool = field(
        default=False, metadata={"help": "CogLM knows whole pictures only: inpainting shows it as much as it can."}
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


def read_json(config: AssembleConfig, name: str) -> dict:
    """The object that an option holds as JSON."""
    try:
        value = json.loads(getattr(config, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON, but is {getattr(config, name)!r}: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object, but is {value!r}.")
    return value


def main(arguments: list[str] | None = None) -> CogView2Pipeline:
    config = parse_config(AssembleConfig, arguments, description=__doc__)
    options = {name: read_json(config, name) for name in ("direct_sr_scheduler", "iterative_sr_scheduler")}
    styles, files = read_json(config, "styles"), read_json(config, "files")
    if config.default_style is not None and config.default_style not in styles:
        raise ValueError(
            f"`default_style` must be one of the `styles` {list(styles)}, but is {config.default_style!r}."
        )
    for source in files.values():
        if not Path(source).is_file():
            raise ValueError(f"`files` names {source}, which is no file.")
    dtype = getattr(torch, config.dtype)
    transformer = CogLMModel.from_pretrained(config.transformer, dtype=dtype)
    parts = {}
    for stage in ("direct_sr", "iterative_sr"):
        folder = getattr(config, f"{stage}_transformer")
        if folder is not None:
            parts[f"{stage}_transformer"] = CogLMCanvasModel.from_pretrained(folder, dtype=dtype)
            parts[f"{stage}_scheduler"] = LoPARScheduler(**options[f"{stage}_scheduler"])
    words = {}
    if config.words_file is not None:
        words["known_words"] = Path(config.words_file).read_text(encoding="utf-8").split()
    pipeline = CogView2Pipeline(
        IcetkTokenizer.from_pretrained(config.tokenizer, **words),
        transformer,
        IcetkVQModel.from_pretrained(config.vqvae, dtype=dtype),
        **parts,
        compression_rate=config.compression_rate,
        styles=styles,
        default_style=config.default_style,
        whole_pictures=config.whole_pictures,
    )
    pipeline.save_pretrained(config.output_dir)
    for name, source in files.items():
        shutil.copyfile(source, Path(config.output_dir) / name)
    return pipeline


if __name__ == "__main__":
    run_script(main)
