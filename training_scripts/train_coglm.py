#!/usr/bin/env python
r"""
Train CogLM on pictures as tokens and their captions, by both of its mask strategies: text-to-image, and captioning
with mask prediction; and, where asked, on completion as inpainting reads it.

The small model of the demo, on a CPU (training_scripts/emoji/README.md says what goes before):
    python training_scripts/train_coglm.py --config training_scripts/emoji/coglm_small.yaml \
        --output_dir runs/coglm_small
Finetune a model on your own token folder, on one GPU:
    python training_scripts/train_coglm.py --init_from MODEL/transformer --tokenizer MODEL/tokenizer \
        --data data/mine --mixed_precision bf16 --learning_rate 1e-5 --output_dir runs/mine
On eight GPUs:
    accelerate launch --num_processes 8 training_scripts/train_coglm.py --config CONFIG.yaml --output_dir runs/coglm
"""

import functools
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from cogview_pipelines import CogLMConfig, CogLMModel, IcetkTokenizer
from cogview_pipelines.generation.sampling import sample_tokens
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL, TokenSequence, stack
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview2.sequences import SequenceLayout, text_to_image
from cogview_pipelines.models.image_tokenizers.auto import choose_rate, load_image_tokenizer
from cogview_pipelines.training.arguments import UNNOTICED, json_option, parse_config, run_script
from cogview_pipelines.training.data.captions import with_full_stop
from cogview_pipelines.training.data.draws import Draw, seeded_generator
from cogview_pipelines.training.data.tokens import TokenData, TokenTrainConfig
from cogview_pipelines.training.loop import train
from cogview_pipelines.training.new_tokens import NewTokenOptions
from cogview_pipelines.training.noise import exchange_tokens
from cogview_pipelines.training.processes import load_model, make_model_once
from cogview_pipelines.training.samples_cogview2 import (
    captioning_sample,
    completion_sample,
    draw_patch_corners,
    draw_rectangles,
    generation_sample,
)


@dataclass
class CogLMTrainConfig(NewTokenOptions, TokenTrainConfig):
    vqvae: str | None = field(default=None, metadata={"help": "Image tokenizer, for sample pictures."})
    init_from: str | None = field(default=None, metadata={"help": "Trained CogLM to go on from."})
    model: str = field(default="{}", metadata={"help": "Options of CogLMConfig: JSON, or a mapping in the YAML file."})
    embed_codes: bool = field(
        default=False,
        metadata={"help": "Start the image token embeddings of a new model from the code vectors of `vqvae`."},
    )
    caption_probability: float = field(default=0.3, metadata={"help": "Share of samples trained as captioning."})
    auxiliary_caption_probability: float | None = field(
        default=None,
        metadata={"help": "Likewise, of the samples of `auxiliary_data`; default: the same."},
    )
    whole_image_probability: float = field(
        default=0.0,
        metadata={"help": "Share of captioning samples in which no patch is masked, as captions are written."},
    )
    caption_noise_probability: float = field(
        default=0.0, metadata={"help": "Share of image tokens that captioning samples read wrong."}
    )
    text_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of a text label; of an image label 1. Captions have few labels."}
    )
    end_captions: bool = field(
        default=True,
        metadata={
            "help": "Texts that captioning writes end with a full stop, where the pipeline stops. CogLM has no other "
            "end of a text; the released samples had none, and the model writes on."
        },
    )
    completion_probability: float = field(
        default=0.0, metadata={"help": "Share of samples that fill rectangular holes, as inpainting does."}
    )
    noise_probability: float = field(
        default=0.0,
        metadata={"help": "Share of image tokens that text-to-image samples read wrong, so that text counts more."},
    )
    drop_text_probability: float = field(
        default=0.0, metadata={"help": "Share of text-to-image samples with an empty text, for guidance."}
    )
    patch_size: int = field(default=4, metadata={"help": "Edge of the image patches that are masked in captioning."})
    compression_rate: int | None = field(
        default=None,
        metadata={
            "help": "Pixels per token of `vqvae`, for sample pictures; default: its only rate, or 8.",
            "resume": UNNOTICED,
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})


def make_model(config: CogLMTrainConfig, tokenizer: IcetkTokenizer, data: TokenData) -> CogLMModel:
    """A new CogLM that fits tokenizer and pictures, or a trained one that must."""
    options = json_option(config, "model") or {}
    if config.init_from is not None:
        model = load_model(CogLMModel, config.init_from, "init_from", **options)
        data.require_fit(model.config, tokenizer)
        config.put_adapter(model, trained=True)
        config.learn_new_token(model, tokenizer)
        return model
    model = CogLMModel(
        CogLMConfig(
            **{
                "vocab_size": len(tokenizer),
                "num_image_tokens": tokenizer.num_image_tokens,
                "image_grid": tuple(data.low.shape[1:]),
                "pad_token_id": tokenizer.pad_token_id,
                "boi_token_id": tokenizer.boi_token_id,
                "start_of_english_token_id": tokenizer.start_of_english_id,
                "start_of_chinese_token_id": tokenizer.start_of_chinese_id,
                **options,
            }
        )
    )
    config.put_adapter(model, trained=False)
    return model


@torch.no_grad()
def embed_codes(model: CogLMModel, vqvae: PreTrainedModel) -> None:
    """
    Start image token embeddings from code vectors, turned into the model's width at random.

    Codes of similar patches then begin as similar tokens, so that the model can name a patch that it never met in its
    place, such as the edge of a known object on a background that it was never shown on.
    """
    codes = (vqvae.vq.quantize.embedding if hasattr(vqvae, "vq") else vqvae.quantize.embed).weight.float()
    codes = (codes - codes.mean(0)) / codes.std()
    turn = torch.linalg.qr(torch.randn(model.config.hidden_size, codes.shape[1])).Q
    weight = codes @ turn.T
    table = model.word_embeddings.weight[: len(codes)]
    table.mul_(0.3).add_(weight * (model.config.initializer_range / weight.std()))


def make_batch(
    config: CogLMTrainConfig, model_config: CogLMConfig, tokenizer: IcetkTokenizer, data: TokenData, draw: Draw
) -> TokenSequence:
    """The samples of one forward pass."""
    generators = list(draw.generators(config.seed))
    indices = data.draw_all(draw.samples, generators)
    pictures = data.low[indices].flatten(1).long()
    return stack(
        [
            make_sample(config, model_config, tokenizer, data, index, picture, generator)
            for index, picture, generator in zip(indices, pictures, generators)
        ]
    )


def draw_task(
    config: CogLMTrainConfig, data: TokenData, index: int, generator: torch.Generator
) -> tuple[str, str, list[int]]:
    """What a sample is, `"text_to_image"`, `"captioning"` or `"completion"`; its language and its text."""
    chance, drop = torch.rand(2, generator=generator).tolist()
    caption_probability = config.caption_probability
    if config.auxiliary_caption_probability is not None and data.is_auxiliary(index):
        caption_probability = config.auxiliary_caption_probability
    captioning = chance < caption_probability
    language, text = data.draw_language_and_caption(index, generator, to_write=captioning)
    if captioning:
        return "captioning", language, text
    completing = chance < caption_probability + config.completion_probability
    if drop < config.drop_text_probability:
        language, text = "no_text", []
    return "completion" if completing else "text_to_image", language, text


def draw_kind(config: CogLMTrainConfig, data: TokenData, draw: Draw, generator: torch.Generator) -> str:
    """Task and language of the one sample of a draw."""
    (index,) = data.draw_all(draw.samples, [generator])
    task, language, _ = draw_task(config, data, index, generator)
    return f"{task}/{language}"


def make_sample(
    config: CogLMTrainConfig,
    model_config: CogLMConfig,
    tokenizer: IcetkTokenizer,
    data: TokenData,
    index: int,
    picture: torch.Tensor,
    generator: torch.Generator,
) -> TokenSequence:
    """A sample of a picture, with its tokens, whose caption, task and masks the generator draws."""
    layout, pad_token_id = model_config.layout, tokenizer.pad_token_id
    task, language, text = draw_task(config, data, index, generator)
    if task == "captioning" and config.end_captions:
        text = with_full_stop(text, language, data.encode)
    text = text[: model_config.max_text_tokens]
    padding = model_config.max_text_tokens + 1 - len(text)
    row = torch.cat([torch.tensor(text + [pad_token_id] * padding), picture])
    if task == "captioning":
        chinese = tokenizer.language(text) == "zh"
        start = model_config.start_of_chinese_token_id if chinese else model_config.start_of_english_token_id
        corners = draw_patch_corners(layout, generator, config.patch_size)
        if torch.rand((), generator=generator) < config.whole_image_probability:
            corners = []
        sample = captioning_sample(row, layout, pad_token_id, [start], corners, config.patch_size)
        add_noise(sample, layout, config.caption_noise_probability, generator)
    elif task == "completion":
        sample = completion_sample(row, layout, pad_token_id, draw_rectangles(layout, generator))
    else:
        sample = generation_sample(row, layout, pad_token_id)
        add_noise(sample, layout, config.noise_probability, generator)
    return sample


def add_noise(sample: TokenSequence, layout: SequenceLayout, probability: float, generator: torch.Generator) -> None:
    """Exchange image tokens that are read, and stand last, for random ones; what is predicted stays."""
    tokens = sample.input_ids[:, -layout.image_length :]
    tokens.copy_(exchange_tokens(tokens, probability, layout.num_image_tokens, generator))


def loss_weight(num_image_tokens: int, text_loss_weight: float, batch: TokenSequence) -> float:
    """The labels of a batch, of which those of text count `text_loss_weight`."""
    num_text = int((batch.labels >= num_image_tokens).sum())
    return int((batch.labels != IGNORED_LABEL).sum()) + (text_loss_weight - 1) * num_text


def compute_loss(
    num_image_tokens: int, text_loss_weight: float, model: torch.nn.Module, batch: TokenSequence
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Weighted sum of the cross-entropy of all labels; and sum and number of image labels and of text labels."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        full_vocabulary=True,
    )
    losses, labels = output.label_losses, batch.labels[batch.labels != IGNORED_LABEL]
    is_image = labels < num_image_tokens
    loss, losses = (losses * torch.where(is_image, 1.0, text_loss_weight)).sum(), losses.detach()
    metrics = {
        "image_loss": ((losses * is_image).sum(), is_image.sum()),
        "text_loss": ((losses * ~is_image).sum(), (~is_image).sum()),
    }
    return loss, metrics


def make_samples(
    config: CogLMTrainConfig, vqvae: PreTrainedModel, data: TokenData, model: CogLMModel, count: int = 16
) -> torch.Tensor:
    """Pictures from captions of the training data, the same each time: `(count, 3, height, width)` in 0..1."""
    generator = seeded_generator(config.seed, "pictures")
    layout, longest = model.config.layout, model.config.max_text_tokens
    texts = [data.draw_caption(data.draw(generator), generator)[:longest] for _ in range(count)]
    tokens = generate(
        model,
        text_to_image(texts, layout),
        functools.partial(sample_tokens, top_k=10),
        torch.full((count, layout.image_length), TO_GENERATE),
        layout.image_positions,
        generator=generator,
    )
    return vqvae.to(model.device).decode(tokens.unflatten(1, layout.image_grid), config.compression_rate).sample


def main(arguments: list[str] | None = None) -> CogLMModel | None:
    config = parse_config(CogLMTrainConfig, arguments, description=__doc__)
    set_seed(config.seed)
    tokenizer = IcetkTokenizer.from_pretrained(config.tokenizer)
    config.add_new_token(tokenizer, trained=config.init_from is not None)
    data = config.load_data(tokenizer)
    config.require_new_token(data)
    model = make_model_once(functools.partial(make_model, config, tokenizer, data))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vqvae = None
    if config.vqvae is not None:
        vqvae = load_image_tokenizer(config.vqvae, dtype=torch.float32).eval()
        config.compression_rate = choose_rate(vqvae, config.compression_rate)
    if config.embed_codes and config.init_from is None:
        if vqvae is None:
            raise ValueError("`embed_codes` takes code vectors from `vqvae`, which is not given.")
        if model.device.type != "meta":
            embed_codes(model, vqvae)
    result = train(
        config,
        model,
        functools.partial(make_batch, config, model.config, tokenizer, data),
        functools.partial(compute_loss, model.config.num_image_tokens, config.text_loss_weight),
        functools.partial(loss_weight, model.config.num_image_tokens, config.text_loss_weight),
        None if vqvae is None else functools.partial(make_samples, config, vqvae, data),
        save=config.saving("transformer", config.learned_words(data, tokenizer)),
        validation=config.validation_batches(
            tokenizer,
            functools.partial(make_batch, config, model.config, tokenizer),
            functools.partial(draw_kind, config),
        ),
    )
    writes = config.caption_probability > 0 or bool(config.auxiliary_caption_probability)
    config.tell_losses(data, tokenizer, model.config.max_text_tokens, targets=writes)
    return result


if __name__ == "__main__":
    run_script(main, resumable=True)
