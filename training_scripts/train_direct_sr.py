#!/usr/bin/env python
r"""
Train direct super-resolution: from the low-resolution tokens and the text to all fine tokens in one pass.

Starts from a trained CogLM, whose weights stay as they are; only the canvas attention and the canvas positions train.
The released training code does not cover this stage: the recipe follows section 3.2 of the paper
(https://arxiv.org/abs/2204.14217).

The small model of the demo, on a CPU:
    python training_scripts/train_direct_sr.py --config training_scripts/emoji/direct_sr_small.yaml \
        --output_dir runs/direct_sr_small
On one GPU, for a CogLM of your own:
    python training_scripts/train_direct_sr.py --transformer runs/mine/final --tokenizer MODEL/tokenizer \
        --data data/mine --mixed_precision bf16 --output_dir runs/mine_direct_sr
On eight GPUs:
    accelerate launch --num_processes 8 training_scripts/train_direct_sr.py --config CONFIG.yaml \
        --output_dir runs/direct_sr
"""

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from cogview_pipelines import CogLMCanvasModel, CogLMModel, IcetkTokenizer, LoPARScheduler
from cogview_pipelines.generation.canvas import refine
from cogview_pipelines.generation.token_sequence import TokenSequence
from cogview_pipelines.models.cogview2.sequences import direct_super_resolution
from cogview_pipelines.models.image_tokenizers.auto import choose_rate, load_image_tokenizer
from cogview_pipelines.training.arguments import UNNOTICED, json_option, parse_config, run_script
from cogview_pipelines.training.data.draws import Draw, seeded_generator
from cogview_pipelines.training.data.tokens import CanvasBatch, TokenData, TokenTrainConfig, draw_language
from cogview_pipelines.training.loop import train
from cogview_pipelines.training.losses import canvas_loss, count_labels
from cogview_pipelines.training.processes import load_model, make_model_once


@dataclass
class DirectSRTrainConfig(TokenTrainConfig):
    transformer: str = field(kw_only=True, metadata={"help": "The trained CogLM to start from."})
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "This stage, trained on another CogLM or data, to go on from. `transformer` is lent as its "
            "backbone, unless it has one of its own, which it goes on with."
        },
    )
    lend_backbone: bool = field(
        default=False,
        metadata={
            "help": "Lend `transformer` to `init_from` even if it has a backbone of its own: one that borrowed the "
            "weights of another CogLM, and keeps a copy of them."
        },
    )
    vqvae: str | None = field(default=None, metadata={"help": "Image tokenizer, for sample pictures."})
    compression_rate: int | None = field(
        default=None,
        metadata={
            "help": "Pixels per token of `vqvae`, for sample pictures; default: its only rate, or 8.",
            "resume": UNNOTICED,
        },
    )
    model: str = field(
        default="{}",
        metadata={
            "help": "What differs from the CogLM's config, as JSON or a YAML mapping. Not used with `init_from`."
        },
    )
    train_backbone: bool = field(
        default=False, metadata={"help": "Train all weights; the stage is then stored with a backbone of its own."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})

    def check(self) -> None:
        super().check()
        # an adapter is for the stage as it is in its pipeline
        for name in ("train_backbone", "lora_rank"):
            if self.lend_backbone and getattr(self, name):
                raise ValueError(f"`lend_backbone` must not be with `{name}`: that needs the backbone of `init_from`.")
        if self.lend_backbone and self.init_from is None:
            raise ValueError("`lend_backbone` is about a trained stage. Name it by `init_from`.")


def make_model(config: DirectSRTrainConfig, data: TokenData) -> CogLMCanvasModel:
    """
    The CogLM with a canvas; unless asked otherwise, its backbone is frozen and saved with the CogLM only.

    A trained stage that has a backbone of its own keeps it, since the canvas has learned to read by it.
    """
    if config.init_from is not None:
        model = load_model(CogLMCanvasModel, config.init_from, "init_from")
        found = (model.config.super_resolution, model.config.fine_grid)
        wanted = ("direct", tuple(data.fine.shape[1:]))
        if found != wanted:
            raise ValueError(f"`init_from` must have `super_resolution` and `fine_grid` {wanted}, but has {found}.")
        if model.config.shares_backbone or config.lend_backbone:
            take = model.keep_backbone if config.train_backbone else model.share_backbone
            take(load_model(CogLMModel, config.transformer))
    else:
        model = CogLMCanvasModel.from_transformer(
            load_model(CogLMModel, config.transformer),
            "direct",
            tuple(data.fine.shape[1:]),
            shares_backbone=not config.train_backbone,
            **(json_option(config, "model") or {}),
        )
    if config.lora_rank is not None:
        config.put_adapter(model, trained=config.init_from is not None)
        model.layers[-1].attention.dense.requires_grad_(False)  # as below
    elif not config.train_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("canvas_" in name)
    else:
        # The canvas reads only keys and values of the last layer's context: what comes after never gets a gradient,
        # and distributed training would wait for one.
        model.layers[-1].attention.dense.requires_grad_(False)
    return model


def read_context(
    model: CogLMCanvasModel, data: TokenData, indices: list[int], texts: list[list[int]]
) -> TokenSequence:
    """The low-resolution tokens of pictures, each with a caption, as long as generation takes it."""
    slots = model.config.num_text_slots
    longest = min(slots - 1, model.config.max_text_tokens)
    tokens = data.low[indices].flatten(1).long()
    return direct_super_resolution([text[:longest] for text in texts], tokens, slots, model.config.layout)


def make_batch(config: DirectSRTrainConfig, model: CogLMCanvasModel, data: TokenData, draw: Draw) -> CanvasBatch:
    """The samples of one forward pass."""
    generators = list(draw.generators(config.seed))
    indices = data.draw_all(draw.samples, generators)
    texts = [data.draw_caption(index, generator) for index, generator in zip(indices, generators)]
    context = read_context(model, data, indices, texts)
    labels = data.fine[indices].flatten(1).long()
    return CanvasBatch(context, torch.full_like(labels, model.config.boi_token_id), labels)


def make_samples(
    config: DirectSRTrainConfig, vqvae: PreTrainedModel, data: TokenData, model: CogLMCanvasModel, count: int = 8
) -> torch.Tensor:
    """True low-resolution pictures, enlarged, above their super-resolution: `(2 * count, 3, height, width)`."""
    generator = seeded_generator(config.seed, "pictures")
    indices = [data.draw(generator) for _ in range(count)]
    context = read_context(model, data, indices, [data.draw_caption(index, generator) for index in indices])
    tokens = refine(model, LoPARScheduler(step_grid=((1,),), top_k=5), context, generator=generator)
    vqvae = vqvae.to(model.device)
    fine = vqvae.decode(tokens, config.compression_rate).sample
    low = vqvae.decode(data.low[indices].long().to(model.device), config.compression_rate).sample
    return torch.cat([F.interpolate(low, fine.shape[-2:], mode="nearest"), fine])


def main(arguments: list[str] | None = None) -> CogLMCanvasModel | None:
    config = parse_config(DirectSRTrainConfig, arguments, description=__doc__)
    set_seed(config.seed)
    tokenizer = IcetkTokenizer.from_pretrained(config.tokenizer)
    data = config.load_data(tokenizer).require_fine()
    model = make_model_once(functools.partial(make_model, config, data))
    data.require_fit(model.config, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vqvae = None
    if config.vqvae is not None:
        vqvae = load_image_tokenizer(config.vqvae, dtype=torch.float32).eval()
        config.compression_rate = choose_rate(vqvae, config.compression_rate)
    result = train(
        config,
        model,
        functools.partial(make_batch, config, model, data),
        canvas_loss,
        count_labels,
        None if vqvae is None else functools.partial(make_samples, config, vqvae, data),
        save=config.saving("direct_sr_transformer"),
        validation=config.validation_batches(
            tokenizer,
            lambda validation, draw: make_batch(config, model, validation.require_fine(), draw),
            draw_language,
        ),
    )
    config.tell_losses(data, tokenizer, min(model.config.num_text_slots - 1, model.config.max_text_tokens))
    return result


if __name__ == "__main__":
    run_script(main, resumable=True)
