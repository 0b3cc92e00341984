#!/usr/bin/env python
r"""
Train iterative super-resolution: predict masked fine tokens from the visible ones around them and the text.

All weights train, starting from a trained CogLM. The share of masked cells is drawn from `mask_ratios` for each
sample. The released training code does not cover this stage: the recipe follows section 3.2 of the paper
(https://arxiv.org/abs/2204.14217).

The small model of the demo, on a CPU:
    python training_scripts/train_iterative_sr.py --config training_scripts/emoji/iterative_sr_small.yaml \
        --output_dir runs/iterative_sr_small
On one GPU, for a CogLM of your own:
    python training_scripts/train_iterative_sr.py --transformer runs/mine/final --tokenizer MODEL/tokenizer \
        --data data/mine --mixed_precision bf16 --output_dir runs/mine_iterative_sr
On eight GPUs:
    accelerate launch --num_processes 8 training_scripts/train_iterative_sr.py --config CONFIG.yaml \
        --output_dir runs/iterative_sr
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from cogview_pipelines import (
    CogLMCanvasConfig,
    CogLMCanvasModel,
    CogLMConfig,
    CogLMModel,
    IcetkTokenizer,
    LoPARScheduler,
)
from cogview_pipelines.generation.canvas import refine
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.models.cogview2.sequences import iterative_super_resolution
from cogview_pipelines.models.image_tokenizers.auto import choose_rate, load_image_tokenizer
from cogview_pipelines.training.arguments import UNNOTICED, json_option, parse_config, run_script
from cogview_pipelines.training.data.draws import Draw, draw_index, seeded_generator
from cogview_pipelines.training.data.tokens import CanvasBatch, TokenData, TokenTrainConfig, draw_language
from cogview_pipelines.training.loop import train
from cogview_pipelines.training.losses import canvas_loss, count_labels
from cogview_pipelines.training.noise import exchange_tokens
from cogview_pipelines.training.processes import load_model, make_model_once


@dataclass
class IterativeSRTrainConfig(TokenTrainConfig):
    transformer: str = field(
        kw_only=True,
        metadata={"help": "The trained CogLM to start from, or whose shape to take; or this stage itself, to go on."},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Take only the shape of `transformer`, not its weights."}
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
        metadata={"help": "Options of CogLMConfig that differ from the CogLM: JSON, or a mapping in the YAML file."},
    )
    mask_ratios: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 0.9],
        metadata={"help": "Shares of masked cells, one drawn per sample."},
    )
    noise_probability: float = field(
        default=0.0, metadata={"help": "Share of visible cells with a random token, like errors of the stage before."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})


def make_model(config: IterativeSRTrainConfig, data: TokenData) -> CogLMCanvasModel:
    """The CogLM with a canvas that sees the text."""
    options, fine_grid = (json_option(config, "model") or {}), tuple(data.fine.shape[1:])
    if config.from_scratch:
        options |= {"super_resolution": "iterative", "fine_grid": fine_grid}
        coglm_config = CogLMConfig.from_pretrained(config.transformer)
        config.put_adapter(None, trained=False)
        return CogLMCanvasModel(CogLMCanvasConfig.of_transformer(coglm_config, **options))
    found, _ = CogLMConfig.get_config_dict(config.transformer)
    if found.get("super_resolution") == "iterative":  # go on with it
        model = load_model(CogLMCanvasModel, config.transformer, "transformer")
        config.put_adapter(model, trained=True)
        return model
    config.put_adapter(None, trained=False)
    transformer = load_model(CogLMModel, config.transformer, "transformer")
    return CogLMCanvasModel.from_transformer(transformer, "iterative", fine_grid, **options)


def make_batch(
    config: IterativeSRTrainConfig, model_config: CogLMCanvasConfig, data: TokenData, draw: Draw
) -> CanvasBatch:
    """The samples of one forward pass."""
    texts, canvases, labels = [], [], []
    generators = list(draw.generators(config.seed))
    indices = data.draw_all(draw.samples, generators)
    for index, picture, generator in zip(indices, data.fine[indices], generators):
        texts.append(data.draw_caption(index, generator))
        tokens = picture.flatten().long()
        ratio = config.mask_ratios[draw_index(len(config.mask_ratios), generator)]
        masked = torch.rand(tokens.shape, generator=generator) < ratio
        masked[draw_index(len(masked), generator)] |= not masked.any()  # or there is nothing to learn from
        visible = exchange_tokens(tokens, config.noise_probability, model_config.num_image_tokens, generator)
        canvases.append(visible.masked_fill(masked, model_config.boi_token_id))
        labels.append(tokens.masked_fill(~masked, IGNORED_LABEL))
    context = iterative_super_resolution(texts, model_config.num_text_slots)
    return CanvasBatch(context, torch.stack(canvases), torch.stack(labels))


def sample_scheduler(rows: int, columns: int) -> LoPARScheduler:
    """The released schedule where its 6 x 6 grid tiles the canvas, else the paper's in blocks that do."""
    if rows % 6 == columns % 6 == 0:
        return LoPARScheduler()
    return LoPARScheduler.diagonal(math.gcd(rows, columns, 60))


def make_samples(
    config: IterativeSRTrainConfig, vqvae: PreTrainedModel, data: TokenData, model: CogLMCanvasModel, count: int = 16
) -> torch.Tensor:
    """True pictures with every cell that the schedule may change written anew: `(count, 3, height, width)` in 0..1."""
    generator = seeded_generator(config.seed, "pictures")
    indices = [data.draw(generator) for _ in range(count)]
    texts = [data.draw_caption(index, generator) for index in indices]
    context = iterative_super_resolution(texts, model.config.num_text_slots)
    scheduler = sample_scheduler(*model.config.fine_grid)
    tokens = refine(model, scheduler, context, data.fine[indices].long(), generator=generator)
    return vqvae.to(model.device).decode(tokens, config.compression_rate).sample


def main(arguments: list[str] | None = None) -> CogLMCanvasModel | None:
    config = parse_config(IterativeSRTrainConfig, arguments, description=__doc__)
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
        functools.partial(make_batch, config, model.config, data),
        canvas_loss,
        count_labels,
        None if vqvae is None else functools.partial(make_samples, config, vqvae, data),
        save=config.saving("iterative_sr_transformer"),
        validation=config.validation_batches(
            tokenizer,
            lambda validation, draw: make_batch(config, model.config, validation.require_fine(), draw),
            draw_language,
        ),
    )
    config.tell_losses(data, tokenizer, model.config.num_text_slots)
    return result


if __name__ == "__main__":
    run_script(main, resumable=True)
