#!/usr/bin/env python
r"""
Train CogView on pictures as tokens and their captions: pictures after texts, finer pictures after coarser ones, texts
after pictures, or a mix of these; with dense or sparse attention.

The small model of the demo, on a CPU (training_scripts/emoji_cogview/README.md says what goes before):
    python training_scripts/train_cogview.py --config training_scripts/emoji_cogview/cogview.yaml \
        --output_dir runs/cogview
Finetune a model to super-resolution on your own token folder, on one GPU:
    python training_scripts/train_cogview.py --init_from MODEL/transformer --tokenizer MODEL/tokenizer \
        --data data/mine --super_resolution_probability 1 --mixed_precision bf16 --learning_rate 1e-5 \
        --output_dir runs/mine_super_resolution
On eight GPUs:
    accelerate launch --num_processes 8 training_scripts/train_cogview.py --config CONFIG.yaml \
        --output_dir runs/cogview
"""

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from cogview_pipelines import CogViewConfig, CogViewModel, CogViewTokenizer
from cogview_pipelines.generation.sampling import sample_tokens
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview import sequences
from cogview_pipelines.models.image_tokenizers.auto import choose_rate, load_image_tokenizer
from cogview_pipelines.training.arguments import UNNOTICED, json_option, parse_config, run_script
from cogview_pipelines.training.data.captions import with_full_stop
from cogview_pipelines.training.data.draws import Draw, draw_index, released_index, seeded_generator
from cogview_pipelines.training.data.tokens import TokenData, TokenTrainConfig
from cogview_pipelines.training.loop import train
from cogview_pipelines.training.new_tokens import NewTokenOptions
from cogview_pipelines.training.noise import exchange_tokens
from cogview_pipelines.training.processes import load_model, make_model_once
from cogview_pipelines.training.samples_cogview import (
    CogViewBatch,
    label_weights,
    make_inputs_and_labels,
    picture_and_part,
    picture_and_text,
    position_ids,
    style_caption,
    text_and_picture,
)

SIZE = "[BASE]"  # what announces every picture while generating, whatever its side
BETWEEN = 8  # commands of a sample with two pictures: [ROI1] [BASE] [BOI1] [EOI1] [ROI2] [POS0] [BASE] [BOI2]


@dataclass
class CogViewTrainConfig(NewTokenOptions, TokenTrainConfig):
    vqvae: str | None = field(default=None, metadata={"help": "Image tokenizer, for sample pictures."})
    init_from: str | None = field(default=None, metadata={"help": "Trained CogView to go on from."})
    model: str = field(
        default="{}",
        metadata={"help": "Options of CogViewConfig, such as sparse_attention: JSON, or a mapping in the YAML file."},
    )
    max_text_tokens: int = field(default=62, metadata={"help": "The longest text of a new model."})
    text_loss_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of a label after a token that is no image token; else 1. CogView's tutorial: 5."},
    )
    super_resolution_probability: float = field(
        default=0.0,
        metadata={"help": "Share of samples that make a part of a picture finer: the fine tokens of a token folder."},
    )
    restart_on_roi2: bool = field(
        default=True,
        metadata={
            "help": "In super-resolution [ROI2] has position 0, as the released model was trained. Without, it counts "
            "on, as while generating: better for a model of one's own."
        },
    )
    caption_probability: float = field(default=0.0, metadata={"help": "Share of samples with the text last."})
    caption_image_weight: float = field(
        default=1.0, metadata={"help": "Weight of the labels after image tokens in samples with the text last."}
    )
    end_captions: bool = field(
        default=True,
        metadata={
            "help": "Texts that captioning writes end with a full stop, where the pipeline stops; the release "
            "has none, and writes on."
        },
    )
    style_probability: float = field(
        default=0.0,
        metadata={"help": "Share of pictures with a `style` whose text names the style instead: style learning."},
    )
    noise_probability: float = field(
        default=0.0, metadata={"help": "Share of image tokens that are read wrong, so that text counts more."}
    )
    data_order: str = field(
        default="weighted",
        metadata={
            "help": "weighted: pictures by their weights, with replacement. epochs: all pictures once, then again in "
            "another order. released: the sequence of CogView's release, no weights.",
            "choices": ["weighted", "epochs", "released"],
            "resume": "other samples are drawn from here on",
        },
    )
    compression_rate: int | None = field(
        default=None,
        metadata={
            "help": "Pixels per token of `vqvae`, for sample pictures; default: its only rate, or 8.",
            "resume": UNNOTICED,
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})

    @property
    def component(self) -> str:
        """What the trained model is called in a pipeline."""
        if self.super_resolution_probability == 1:
            return "super_resolution_transformer"
        return "caption_transformer" if self.caption_probability == 1 else "transformer"

    def check(self) -> None:
        super().check()
        shares = ("super_resolution_probability", "caption_probability", "style_probability", "noise_probability")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be from 0 to 1, but is {getattr(self, name)}.")
        if self.super_resolution_probability + self.caption_probability > 1:
            raise ValueError(
                "`super_resolution_probability` and `caption_probability` must not be more than 1 together, but are "
                f"{self.super_resolution_probability} and {self.caption_probability}."
            )
        for name in ("text_loss_weight", "caption_image_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, but is {getattr(self, name)}.")
        if self.new_token is not None and self.component != "transformer":
            task = "super_resolution" if self.super_resolution_probability == 1 else "caption"
            raise ValueError(
                f"`new_token` is learned by the `transformer`, which draws pictures, but `{task}_probability` is 1, "
                f"so that a `{self.component}` is trained. Lower it, or leave `new_token` out."
            )


def load_data(config: CogViewTrainConfig, tokenizer: CogViewTokenizer) -> TokenData:
    """The pictures to train on, if they are as the samples need them."""
    config.add_new_token(tokenizer, trained=config.init_from is not None)
    data = config.load_data(tokenizer)
    config.require_new_token(data, styles=config.style_probability > 0)
    if config.super_resolution_probability:
        rows, columns = data.require_fine().low.shape[1:]
        if tuple(data.fine.shape[1:]) != (2 * rows, 2 * columns):
            raise ValueError(
                f"`data` must have fine tokens twice as high and wide as {rows} x {columns} for super-resolution, but "
                f"they are {data.fine.shape[1]} x {data.fine.shape[2]}. Make it with twice the `--low_size` as "
                "`--fine_size`."
            )
    if config.style_probability and not data.has_styles:
        raise ValueError("`style_probability` needs pictures with a `style` in captions.jsonl, but there are none.")
    return data


def make_model(config: CogViewTrainConfig, tokenizer: CogViewTokenizer, data: TokenData) -> CogViewModel:
    """A new CogView that fits tokenizer and pictures, or a trained one that must."""
    options = json_option(config, "model") or {}
    if config.init_from is not None:
        model = load_model(CogViewModel, config.init_from, "init_from", **options)
        data.require_fit(model.config, tokenizer)
        config.put_adapter(model, trained=True)
        config.learn_new_token(model, tokenizer)
        return model
    rows, columns = data.low.shape[1:]
    positions = rows * columns + 3 + config.max_text_tokens
    model = CogViewModel(
        CogViewConfig(
            **{
                "vocab_size": len(tokenizer),
                "num_image_tokens": tokenizer.num_image_tokens,
                "command_token_id": tokenizer.command_token_id,
                "image_grid": (rows, columns),
                "max_position_embeddings": positions,
                "max_super_resolution_length": positions - 3 + BETWEEN + rows // 2 * (columns // 2),
                **options,
            }
        )
    )
    config.put_adapter(model, trained=False)
    return model


def make_batch(config: CogViewTrainConfig, model_config: CogViewConfig, data: TokenData, draw: Draw) -> CogViewBatch:
    """The samples of one forward pass, as long as the longest; with sparse attention a multiple of its blocks."""
    layout = model_config.layout
    generators = list(draw.generators(config.seed))
    tasks = [draw_task(config, generator) for generator in generators]
    samples = []
    indices = data.draw_all(draw.samples, generators)
    if config.data_order == "released":
        indices = [released_index(number, len(data)) for number in draw.samples]
    for index, task, generator in zip(indices, tasks, generators):
        # the longest text leaves no room for the last command, as in the release
        most = layout.max_super_resolution_length if task == "super_resolution" else layout.max_length
        samples.append(make_sample(config, layout, data, index, task, generator)[:most])
    length = max(map(len, samples)) - 1
    if model_config.sparse_attention is not None:
        block = model_config.sparse_attention["window_size"]
        length = -(-length // block) * block
    input_ids, labels = make_inputs_and_labels(samples, length, layout)
    positions = position_ids(input_ids, layout, config.restart_on_roi2)
    is_picture = input_ids < layout.num_image_tokens
    weights = label_weights(input_ids, layout, config.text_loss_weight)
    is_caption = torch.tensor([task == "caption" for task in tasks])
    weights[is_caption[:, None] & is_picture] = config.caption_image_weight
    if config.noise_probability:
        for row, (sample, generator) in enumerate(zip(samples, generators)):
            read = torch.as_tensor(sample)
            read = exchange_tokens(read, config.noise_probability, layout.num_image_tokens, generator)[:length]
            own = is_picture[row, : len(read)]
            input_ids[row, : len(read)][own] = read[own]
    return CogViewBatch(input_ids, positions, labels, weights)


def tasks(config: CogViewTrainConfig) -> list[str]:
    """What samples there are, as [`draw_task`] draws them."""
    shares = {"super_resolution": config.super_resolution_probability, "caption": config.caption_probability}
    shares["pretraining"] = 1 - sum(shares.values())
    return [task for task, share in shares.items() if share > 0]


def longest_text(layout: sequences.SequenceLayout, task: str) -> int:
    """So many tokens of a text a sample of a task has room for."""
    if task == "super_resolution":
        return layout.max_super_resolution_text_tokens
    return layout.max_caption_tokens if task == "caption" else layout.max_text_tokens


def draw_task(config: CogViewTrainConfig, generator: torch.Generator) -> str:
    """What a sample is: `"pretraining"`, `"super_resolution"` or `"caption"`."""
    chance = float(torch.rand((), generator=generator))
    if chance < config.super_resolution_probability:
        return "super_resolution"
    return "caption" if chance < config.super_resolution_probability + config.caption_probability else "pretraining"


def draw_kind(config: CogViewTrainConfig, data: TokenData, draw: Draw, generator: torch.Generator) -> str:
    """Task and language of the one sample of a draw."""
    task = draw_task(config, generator)
    (index,) = data.draw_all(draw.samples, [generator])
    if config.data_order == "released":
        index = released_index(draw.samples[0], len(data))
    language, _ = draw_text(config, data, index, generator, to_write=task == "caption")
    return f"{task}/{language}"


def make_sample(
    config: CogViewTrainConfig,
    layout: sequences.SequenceLayout,
    data: TokenData,
    index: int,
    task: str,
    generator: torch.Generator,
) -> list[int]:
    """One sample of a picture, with the text, and the part of the picture, that the generator draws."""
    language, text = draw_text(config, data, index, generator, to_write=task == "caption")
    if task == "caption" and config.end_captions:
        text = with_full_stop(text, language, data.encode)
    text, picture = text[: longest_text(layout, task)], data.low[index]
    if task == "super_resolution":
        coarse, part = draw_part(layout, picture, data.fine[index], generator)
        return picture_and_part(text, coarse.flatten().tolist(), part.flatten().tolist(), 0, layout, SIZE)
    if task == "caption":
        return picture_and_text(picture.flatten().tolist(), text, layout, SIZE)
    return text_and_picture(text, picture.flatten().tolist(), layout, SIZE)


def draw_text(
    config: CogViewTrainConfig, data: TokenData, index: int, generator: torch.Generator, to_write: bool
) -> tuple[str, list[int]]:
    """A language, and a caption of a picture in it, or what its style is called."""
    style = data.styles[index]
    if style and float(torch.rand((), generator=generator)) < config.style_probability:
        language = list(style)[draw_index(len(style), generator)]
        names = style[language]
        return language, data.encode(style_caption(names[draw_index(len(names), generator)], language))
    return data.draw_language_and_caption(index, generator, to_write=to_write)


def draw_part(
    layout: sequences.SequenceLayout, picture: torch.Tensor, fine: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of a picture's tokens, half as many each way, and the finer tokens of the same part."""
    rows, columns = layout.coarse_grid
    top = draw_index(picture.shape[0] - rows + 1, generator)
    left = draw_index(picture.shape[1] - columns + 1, generator)
    coarse = picture[top : top + rows, left : left + columns]
    part = fine[2 * top : 2 * (top + rows), 2 * left : 2 * (left + columns)]
    return coarse, part


def loss_weight(batch: CogViewBatch) -> float:
    """By how much the loss of a batch is divided: its labels by their weights."""
    return float(batch.label_weights[batch.labels != IGNORED_LABEL].sum(dtype=torch.float64))


def compute_loss(
    num_image_tokens: int, model: torch.nn.Module, batch: CogViewBatch
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """
    Weighted sum of the cross-entropy of all labels; and sum and number of those after image tokens, and of the others.
    """
    output = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, full_vocabulary=True
    )
    losses, labelled = output.label_losses, batch.labels != IGNORED_LABEL
    loss, losses = (losses * batch.label_weights[labelled]).sum(), losses.detach()
    is_image = batch.input_ids[labelled] < num_image_tokens
    metrics = {
        "image_loss": ((losses * is_image).sum(), is_image.sum()),
        "text_loss": ((losses * ~is_image).sum(), (~is_image).sum()),
    }
    return loss, metrics


def make_samples(
    config: CogViewTrainConfig, vqvae, data: TokenData, model: CogViewModel, count: int = 8
) -> dict[str, torch.Tensor]:
    """
    Pictures of texts of the training data, and parts of its pictures, enlarged, above what super-resolution makes of
    them: the same each time, `(pictures, 3, height, width)` in 0..1.
    """
    layout, vqvae = model.config.layout, vqvae.to(model.device)
    generator = seeded_generator(config.seed, "pictures")
    indices = [data.draw(generator) for _ in range(count)]
    texts = [data.draw_caption(index, generator) for index in indices]
    samples = {}

    def draw(context, positions: torch.Tensor) -> torch.Tensor:
        entries = torch.full((count, layout.image_length), TO_GENERATE)
        sampler = functools.partial(sample_tokens, top_k=10)
        tokens = generate(model, context, sampler, entries, positions, generator=generator)
        return vqvae.decode(tokens.unflatten(1, layout.image_grid), config.compression_rate).sample

    if config.super_resolution_probability < 1:
        context = sequences.text_to_image([text[: layout.max_text_tokens] for text in texts], layout)
        samples["pictures"] = draw(context, sequences.image_positions(context, layout.image_length))
    if config.super_resolution_probability:
        coarse = torch.stack([draw_part(layout, data.low[i], data.fine[i], generator)[0] for i in indices]).long()
        texts = [text[: layout.max_super_resolution_text_tokens] for text in texts]
        context = sequences.super_resolution(texts, coarse.flatten(1), layout)
        fine = draw(context, sequences.fine_positions(layout))
        before = vqvae.decode(coarse.to(model.device), config.compression_rate).sample
        samples["super_resolution"] = torch.cat([F.interpolate(before, fine.shape[-2:], mode="nearest"), fine])
    return samples


def main(arguments: list[str] | None = None) -> CogViewModel | None:
    config = parse_config(CogViewTrainConfig, arguments, description=__doc__)
    set_seed(config.seed)
    tokenizer = CogViewTokenizer.from_pretrained(config.tokenizer)
    data = load_data(config, tokenizer)
    model = make_model_once(functools.partial(make_model, config, tokenizer, data))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vqvae = None
    if config.vqvae is not None:
        vqvae = load_image_tokenizer(config.vqvae, dtype=torch.float32).eval()
        config.compression_rate = choose_rate(vqvae, config.compression_rate)
    words = []
    if config.component != "super_resolution_transformer":
        words = config.learned_words(data, tokenizer, config.component, styles=config.style_probability > 0)
    trained = train(
        config,
        model,
        functools.partial(make_batch, config, model.config, data),
        functools.partial(compute_loss, model.config.num_image_tokens),
        loss_weight,
        None if vqvae is None else functools.partial(make_samples, config, vqvae, data),
        save=config.saving(config.component, words),
        validation=config.validation_batches(
            tokenizer, functools.partial(make_batch, config, model.config), functools.partial(draw_kind, config)
        ),
    )
    longest = min(longest_text(model.config.layout, task) for task in tasks(config))
    writes, names_styles = config.caption_probability > 0, config.style_probability > 0
    config.tell_losses(data, tokenizer, longest, targets=writes, styles=names_styles)
    return trained


if __name__ == "__main__":
    run_script(main, resumable=True)
