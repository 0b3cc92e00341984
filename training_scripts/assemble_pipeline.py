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

from dataclasses import dataclass, field

import torch

from cogview_pipelines import (
    CogLMCanvasModel,
    CogLMModel,
    CogView2Pipeline,
    IcetkTokenizer,
    LoPARScheduler,
)
from cogview_pipelines.model_index import has_component
from cogview_pipelines.training.arguments import files_option, json_option, parse_config, run_script
from cogview_pipelines.training.assembly import AssembleOptions, Parts, write_pipeline

MODELS = {
    "transformer": CogLMModel,
    "direct_sr_transformer": CogLMCanvasModel,
    "iterative_sr_transformer": CogLMCanvasModel,
}


@dataclass
class AssembleConfig(AssembleOptions):
    transformer: str | None = field(default=None, metadata={"help": "The CogLM."})
    direct_sr_transformer: str | None = field(default=None, metadata={"help": "Direct super-resolution."})
    iterative_sr_transformer: str | None = field(default=None, metadata={"help": "Iterative super-resolution."})
    direct_sr_scheduler: str | None = field(
        default=None, metadata={"help": "JSON: options of its LoPARScheduler; default: one pass, top_k 5."}
    )
    iterative_sr_scheduler: str | None = field(
        default=None, metadata={"help": "JSON: options of its LoPARScheduler; default: those of the release."}
    )
    styles: str | None = field(default=None, metadata={"help": "JSON: style presets by name."})
    default_style: str | None = field(default=None, metadata={"help": "The preset used when a call names none."})
    whole_pictures: bool | None = field(
        default=None, metadata={"help": "CogLM knows whole pictures only: inpainting shows it as much as it can."}
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


# Of a model that is like no other.
DEFAULTS = {"styles": {}, "default_style": None, "whole_pictures": False}
SCHEDULERS = {"direct_sr": {"step_grid": [[1]], "top_k": 5}, "iterative_sr": {}}


def round_rows(weights: torch.Tensor) -> torch.Tensor:
    """Each row as 255 multiples, -127 to 127, of the least power of two that reaches its largest value."""
    largest = weights.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny)
    step = torch.exp2(torch.ceil(torch.log2(largest / 127.5)))
    return (weights / step).round().clamp(-127, 127) * step


class CogView2Parts(Parts):
    """With weights rounded where that is asked for, and what super-resolution has of its own."""

    def model(self, name: str):
        model = super().model(name)
        if self.config.round_to is not None:
            for weights in model.state_dict().values():
                is_matrix = weights.dim() == 2 and self.config.round_to == "int8"
                weights.copy_(round_rows(weights.float()) if is_matrix else weights.bfloat16())
        return model

    def direct_sr(self) -> CogLMCanvasModel:
        """Direct super-resolution; one that borrowed the weights of another CogLM than this one keeps those."""
        model = self.model("direct_sr_transformer")
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
        if options is None and has_component(self.like, f"{stage}_scheduler"):
            return LoPARScheduler.from_pretrained(self.config.like, subfolder=f"{stage}_scheduler")
        return LoPARScheduler(**(SCHEDULERS[stage] if options is None else options))


def main(arguments: list[str] | None = None) -> CogView2Pipeline:
    config = parse_config(AssembleConfig, arguments, description=__doc__)
    options = {name: json_option(config, f"{name}_scheduler") for name in SCHEDULERS}
    files = files_option(config)
    parts = CogView2Parts(config, CogView2Pipeline, MODELS, DEFAULTS, "assemble_cogview_pipeline.py")
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
            model = parts.direct_sr() if stage == "direct_sr" else parts.model(f"{stage}_transformer")
            stages[f"{stage}_transformer"] = model
            stages[f"{stage}_scheduler"] = parts.scheduler(stage, options[stage])
    tokenizer, vqvae = parts.tokenizer(IcetkTokenizer, styles=False), parts.image_tokenizer()
    pipeline = CogView2Pipeline(
        tokenizer,
        parts.model("transformer"),
        vqvae,
        **stages,
        compression_rate=parts.compression_rate(vqvae),
        **settings,
    )
    write_pipeline(pipeline, config.output_dir, files)
    return pipeline


if __name__ == "__main__":
    run_script(main)
