#!/usr/bin/env python
r"""
Join trained parts of CogView into a pipeline folder.

The model of the demo:
    python training_scripts/assemble_cogview_pipeline.py --config training_scripts/emoji_cogview/pipeline.yaml \
        --output_dir runs/cogview_emoji
Finetuned pictures after texts, and all else as in the model that they were finetuned from:
    python training_scripts/assemble_cogview_pipeline.py --like COGVIEW --transformer runs/mine/final \
        --data data/mine_cogview --output_dir my_cogview
A base model alone:
    python training_scripts/assemble_cogview_pipeline.py --tokenizer TOKENIZER --vqvae VQVAE \
        --transformer runs/cogview/final --output_dir my_cogview
"""

from dataclasses import dataclass, field

from cogview_pipelines import (
    CogViewCaptionPipeline,
    CogViewModel,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
)
from cogview_pipelines.training.arguments import files_option, json_option, parse_config, run_script
from cogview_pipelines.training.assembly import AssembleOptions, Parts, write_pipeline

# The stages, and the pipeline that a folder names which has none of those before.
STAGES = {
    "transformer": CogViewPipeline,
    "super_resolution_transformer": CogViewUpscalePipeline,
    "caption_transformer": CogViewCaptionPipeline,
}


# Of a model that is like no other.
DEFAULTS = {"settings": {}}


@dataclass
class AssembleConfig(AssembleOptions):
    transformer: str | None = field(default=None, metadata={"help": "Pictures after texts."})
    super_resolution_transformer: str | None = field(
        default=None, metadata={"help": "Finer pictures after coarser ones."}
    )
    caption_transformer: str | None = field(default=None, metadata={"help": "Texts after pictures."})
    settings: str | None = field(
        default=None, metadata={"help": "JSON: settings of the calls in place of the released ones, by pipeline."}
    )


def main(arguments: list[str] | None = None) -> CogViewPipeline | CogViewUpscalePipeline | CogViewCaptionPipeline:
    config = parse_config(AssembleConfig, arguments, description=__doc__)
    settings = json_option(config, "settings")
    files = files_option(config)
    parts = Parts(config, CogViewPipeline, dict.fromkeys(STAGES, CogViewModel), DEFAULTS, "assemble_pipeline.py")
    given = [name for name in STAGES if parts.place(name) is not None]
    if not given:
        names = ", ".join(f"`{name}`" for name in STAGES)
        raise ValueError(f"One of {names} must be given, or `like`, a pipeline that has one.")
    tokenizer, vqvae = parts.tokenizer(CogViewTokenizer, styles=True), parts.image_tokenizer()
    pipeline = STAGES[given[0]](
        tokenizer,
        vqvae,
        **{name: parts.model(name) for name in given},
        compression_rate=parts.compression_rate(vqvae),
        settings=parts.setting("settings", settings),
    )
    write_pipeline(pipeline, config.output_dir, files)
    return pipeline


if __name__ == "__main__":
    run_script(main)
