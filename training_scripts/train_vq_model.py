#!/usr/bin/env python
r"""
Train the image tokenizer: an encoder, one codebook and a decoder for each compression rate.

On a CPU, the small tokenizer of the demo (emoji scenes):
    python training_scripts/train_vq_model.py --config training_scripts/emoji/vq_small.yaml --output_dir runs/vq_small
On one GPU, on your own pictures:
    python training_scripts/train_vq_model.py --image_folder PICTURES --resolutions 256 --mixed_precision bf16 \
        --output_dir runs/vq
The decoder of a trained one alone, so that tokens and the models of them stay what they are:
    python training_scripts/train_vq_model.py --init_from MODEL/vqvae --decoder_only true --image_folder PICTURES \
        --resolutions 256 --learning_rate 1e-4 --output_dir runs/vq_decoder
CogView's image tokenizer, its codes learnt through Gumbel-softmax:
    python training_scripts/train_vq_model.py --family cogview --codebook_training gumbel --image_folder PICTURES \
        --resolutions 256 --output_dir runs/cogview_vq
On eight GPUs:
    accelerate launch --num_processes 8 training_scripts/train_vq_model.py --image_folder PICTURES --output_dir runs/vq
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig

from cogview_pipelines import CogViewVQConfig, CogViewVQModel, IcetkVQConfig, IcetkVQModel
from cogview_pipelines.evaluation.reconstruction import psnr
from cogview_pipelines.models.image_tokenizers.auto import IMAGE_TOKENIZERS
from cogview_pipelines.models.image_tokenizers.modeling_cogview_vq import CODEBOOK_TRAINING
from cogview_pipelines.training.adversary import SMALLEST_SIDE, PatchDiscriminator, WithAdversary
from cogview_pipelines.training.arguments import UNNOTICED, TrainConfig, json_option, parse_config, run_script
from cogview_pipelines.training.data.chances import WeightedIndex
from cogview_pipelines.training.data.draws import Draw, draw_index, seeded_generator
from cogview_pipelines.training.data.pictures import PictureFolder, PicturePool, check_pictures, to_bytes
from cogview_pipelines.training.data.prefetch import image_paths
from cogview_pipelines.training.data.selection import FIT_OF_FILES
from cogview_pipelines.training.loop import train
from cogview_pipelines.training.losses import content_weights, load_perceptual_network, reconstruction_loss
from cogview_pipelines.training.processes import load_model, make_model_once, start_processes

ImageTokenizer = IcetkVQModel | CogViewVQModel


@dataclass
class VQTrainConfig(TrainConfig):
    image_folder: str | None = field(default=None, metadata={"help": "Folder of pictures; without it: emoji scenes."})
    skip_unreadable: bool = field(
        default=False,
        metadata={"help": "Leave out pictures that cannot be read, with a warning, instead of stopping at the start."},
    )
    fit: str = field(default="crop", metadata=FIT_OF_FILES)
    validation_data: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures that are not trained on; the loss of some goes to metrics.jsonl, of all and "
            "by resolution and compression rate.",
            "resume": UNNOTICED,
        },
    )
    validation_samples: int = field(
        default=128, metadata={"help": "How many pictures of `validation_data`.", "resume": UNNOTICED}
    )
    scope: str | None = field(
        default=None, metadata={"help": "File with the scope of the emoji scenes; by default the small one."}
    )
    sprites: str | None = field(
        default=None, metadata={"help": "Folder of full-size drawings, for emoji scenes larger than 240 pixels."}
    )
    num_scenes: int = field(default=3000, metadata={"help": "Different emoji scenes, drawn once and kept in memory."})
    single_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of emoji scenes with one object, which are repeated for it; by default as they come: few."
        },
    )
    resolutions: list[int] = field(
        default_factory=lambda: [80, 240], metadata={"help": "Sides of the pictures in pixels; each step draws one."}
    )
    resolution_weights: list[float] = field(
        default_factory=list, metadata={"help": "Chances of the resolutions, by default equal."}
    )
    crop_size: int | None = field(default=None, metadata={"help": "Train on random squares of this side, in pixels."})
    family: str = field(
        default="cogview2", metadata={"help": "Whose image tokenizer.", "choices": ["cogview2", "cogview"]}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained image tokenizer to go on from."}
    )
    decoder_only: bool = field(
        default=False,
        metadata={
            "help": "Train the decoders alone: pictures keep their tokens, and models of tokens need no training."
        },
    )
    model: str = field(
        default="{}",
        metadata={"help": "Options of IcetkVQConfig, or CogViewVQConfig: JSON, or a mapping in the YAML file."},
    )
    codebook_training: str | None = field(
        default=None,
        metadata={
            "help": "CogView: how codes are learnt, by default as `model` says, else by moving averages.",
            "choices": list(CODEBOOK_TRAINING),
        },
    )
    final_gumbel_temperature: float = field(
        default=0.0625, metadata={"help": "Temperature that that of Gumbel-softmax falls to over the run."}
    )
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of absolute differences of pixels."})
    l2_weight: float = field(default=1.0, metadata={"help": "Weight of squared differences of pixels."})
    edge_weight: float = field(default=0.0, metadata={"help": "Weight of the steps between neighbouring pixels."})
    flat_weight: float = field(
        default=1.0, metadata={"help": "Weight of one-coloured squares, relative to the others."}
    )
    perceptual_network: str | None = field(
        default=None, metadata={"help": "'lpips' or 'module:factory' of a perceptual distance."}
    )
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual distance."})
    adversarial_weight: float = field(
        default=0.0, metadata={"help": "Weight of an adversary (PatchGAN), for sharp textures; VQGAN: about 0.1."}
    )
    adversarial_start: int = field(default=0, metadata={"help": "Steps before the adversary's opinion counts."})
    num_clusters: int | None = field(default=None, metadata={"help": "Clusters of codes, by default as in the model."})

    def check(self) -> None:
        super().check()
        if self.family == "cogview2" and self.codebook_training is not None:
            raise ValueError(
                "`codebook_training` must be left out for `family` cogview2, whose codes follow averages, but is "
                f"{self.codebook_training}."
            )
        if self.decoder_only and self.init_from is None:
            raise ValueError("`decoder_only` trains the decoder of a trained model. Name it by `init_from`.")
        if self.single_share is not None and not 0 < self.single_share < 1:
            raise ValueError(f"`single_share` must be between 0 and 1, but is {self.single_share}.")
        if self.single_share is not None and self.image_folder is not None:
            raise ValueError("`single_share` is about emoji scenes. Leave it out with `image_folder`.")
        side = min(self.crop_size or min(self.resolutions), *self.resolutions)
        if self.validation_samples < 1:
            raise ValueError(f"`validation_samples` must be at least 1, but is {self.validation_samples}.")
        if self.adversarial_weight and side < SMALLEST_SIDE:
            raise ValueError(
                f"`adversarial_weight` needs pictures of at least {SMALLEST_SIDE} pixels, but the smallest have "
                f"{side}."
            )
        if not self.adversarial_weight >= 0:
            raise ValueError(f"`adversarial_weight` must be at least 0, but is {self.adversarial_weight}.")
        if not self.final_gumbel_temperature > 0:
            raise ValueError(f"`final_gumbel_temperature` must be above 0, but is {self.final_gumbel_temperature}.")


@dataclass
class PixelBatch:
    """
    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, side, side)`): RGB in 0..1.
        rate (`int`): The compression rate to train.
    """

    pixel_values: torch.Tensor
    rate: int

    def __len__(self) -> int:
        return len(self.pixel_values)

    def to(self, device: torch.device | str) -> "PixelBatch":
        """The same batch on another device."""
        return PixelBatch(self.pixel_values.to(device), self.rate)


def make_model(config: VQTrainConfig) -> ImageTokenizer:
    """A new image tokenizer of the family, or a trained one."""
    options = json_option(config, "model") or {}
    if config.init_from is not None:
        return load_trained(config, options)
    if config.family == "cogview2":
        return IcetkVQModel(IcetkVQConfig(**options))
    if config.codebook_training is not None:
        options["codebook_training"] = config.codebook_training
    model = CogViewVQModel(CogViewVQConfig(**options))
    if model.config.codebook_training in ("moving_average", "fixed"):
        model.quantize.embed.requires_grad_(False)  # no gradient reaches the codes
    return model


def load_trained(config: VQTrainConfig, options: dict) -> ImageTokenizer:
    """The image tokenizer to go on from; its codes stay where they are until they are trained."""
    kind, _ = PreTrainedConfig.get_config_dict(config.init_from)
    model_class = IMAGE_TOKENIZERS.get(kind.get("model_type"))
    wanted = {"cogview2": IcetkVQModel, "cogview": CogViewVQModel}[config.family]
    if model_class is not wanted:
        found = "nothing of the kind" if model_class is None else f"a {model_class.__name__}"
        raise ValueError(f"`init_from` must be a {wanted.__name__}, for `family` {config.family}, but is {found}.")
    model = load_model(wanted, config.init_from, **options)
    quantize = model.quantize
    if config.decoder_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder"))
    elif hasattr(quantize, "embed_avg") and model.device.type != "meta" and not quantize.cluster_size.any():
        # a converted release brings no averages: without, the first batch would replace the codes
        quantize.cluster_size.fill_(1.0)
        quantize.embed_avg.copy_(quantize.embed.weight)
    return model


def make_sources(config: VQTrainConfig) -> list[PicturePool]:
    """Where the pictures of each resolution come from."""
    if config.image_folder is not None:
        record = Path(config.output_dir) / "pictures.jsonl"
        # one process reads all files and writes down which are good; those that share its folder need not
        with start_processes().main_process_first():
            is_main = start_processes().is_main_process
            paths = check_pictures(
                image_paths(config.image_folder), config.skip_unreadable, config.data_workers, record, is_main
            )
        return [
            PictureFolder(paths, resolution, config.skip_unreadable, config.fit) for resolution in config.resolutions
        ]
    from cogview_pipelines.demo import Scope, SpriteSet, sample_scenes

    scope = Scope.load(config.scope) if config.scope is not None else Scope.small()
    sprites = SpriteSet(config.sprites) if config.sprites is not None else None
    scenes = sample_scenes(scope, config.num_scenes, config.seed, split_name="train")
    if config.single_share is not None:
        scenes = with_single_share(scenes, config.single_share)
    draw = functools.partial(draw_scenes, sizes=config.resolutions, sprites=sprites)
    workers = config.data_workers if config.data_workers > 1 else 0  # one more process would not draw faster
    pictures = [[] for _ in config.resolutions]
    for group in DataLoader(scenes, 32, num_workers=workers, collate_fn=draw):
        for drawn, more in zip(pictures, group):
            drawn.append(more.clone())  # out of the memory shared with the worker
    return [PicturePool(torch.cat(drawn)) for drawn in pictures]


def with_single_share(scenes: list, share: float) -> list:
    """The scenes, those with one object as often as comes nearest to this share."""
    singles = [scene for scene in scenes if scene.relation is None]
    pairs = [scene for scene in scenes if scene.relation is not None]
    if not singles or not pairs:
        raise ValueError(
            f"`single_share` needs scenes with one object and with two, but there are {len(singles)} and {len(pairs)}."
        )
    return pairs + singles * max(1, round(share / (1 - share) * len(pairs) / len(singles)))


def tell_left_out(config: VQTrainConfig, sources: list[PicturePool]) -> None:
    """Say at the end how many pictures were not trained on, since they cannot be read."""
    folders = [source for source in sources if isinstance(source, PictureFolder)]
    if not folders or not start_processes().is_main_process:
        return
    found = len(image_paths(config.image_folder))
    num_left_out = found - len(folders[0].paths) + len(set().union(*(folder.left_out for folder in folders)))
    if num_left_out > 0:
        print(f"{num_left_out} of {found} pictures were left out: they cannot be read.")


@dataclass
class ValidationPictures(Sequence[PixelBatch]):
    """
    Batches of pictures, held as bytes.

    Args:
        pictures (`torch.Tensor` of shape `(num, 3, side, side)`): RGB bytes.
        rate (`int`): The compression rate to look at.
        batch_size (`int`): Pictures at a time.
    """

    pictures: torch.Tensor
    rate: int
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.batch_size)

    def __getitem__(self, index: int) -> PixelBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside of 0..{len(self) - 1}.")
        pictures = self.pictures[index * self.batch_size : (index + 1) * self.batch_size]
        return PixelBatch(pictures.float() / 255, self.rate)


def validation_batches(config: VQTrainConfig, rates: tuple[int, ...]) -> dict[str, ValidationPictures]:
    """
    Whole pictures that are not trained on, evenly from their folder, by resolution and compression rate; none without
    `validation_data`.
    """
    if config.validation_data is None:
        return {}
    paths = image_paths(config.validation_data)
    paths = check_pictures(paths[:: max(1, len(paths) // config.validation_samples)], config.skip_unreadable)
    batches = {}
    for resolution in config.resolutions:
        source = PictureFolder(paths[: config.validation_samples], resolution, config.skip_unreadable, config.fit)
        pictures = source.squares(range(len(source.paths)))
        for rate in rates:
            batches[f"{resolution}px/{rate}x"] = ValidationPictures(pictures, rate, config.batch_size)
    return batches


def draw_scenes(scenes: list, sizes: list[int], sprites) -> list[torch.Tensor]:
    """Scenes as RGB bytes `(num, 3, side, side)`, at each size."""
    from cogview_pipelines.demo import render

    return [torch.stack([to_bytes(render(scene, size, sprites)) for scene in scenes]) for size in sizes]


def make_batch(config: VQTrainConfig, sources: list[PicturePool], rates: tuple[int, ...], draw: Draw) -> PixelBatch:
    """Pictures and compression rate of one forward pass."""
    # All of a step take the same resolution and rate, so that no process waits for another.
    shared = draw.shared_generator(config.seed)
    weights = torch.tensor(config.resolution_weights or [1.0] * len(sources))
    source = sources[WeightedIndex(weights).draw(shared)]
    rate = rates[draw_index(len(rates), shared)]
    pictures = [source.batch(1, config.crop_size, max(rates), own) for own in draw.generators(config.seed)]
    return PixelBatch(torch.cat(pictures), rate)


def compute_loss(
    config: VQTrainConfig, model: ImageTokenizer, perceptual_distance, trained: torch.nn.Module, batch: PixelBatch
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, int]]]:
    """Reconstruction and commitment loss, summed over pictures; `trained` is `model` as it is distributed."""
    pixel_values = batch.pixel_values
    output = trained(pixel_values, compression_rate=batch.rate)
    fooling = telling = None
    if config.adversarial_weight:
        output, fooling, telling = output
    in_use = (model.quantize.cluster_size > 0.01).sum()
    if not in_use:  # CogView's codes that follow no averages: those of this batch
        in_use = output.tokens.unique().numel()
    weights = content_weights(pixel_values, config.flat_weight, batch.rate) if config.flat_weight != 1 else None
    reconstruction = reconstruction_loss(
        output.sample, pixel_values, config.l1_weight, config.l2_weight, config.edge_weight, weights
    )
    loss = reconstruction + output.commitment_loss
    if perceptual_distance is not None:
        with torch.autocast(pixel_values.device.type, enabled=False):
            loss = loss + config.perceptual_weight * perceptual_distance(output.sample, pixel_values).mean()
    count = len(batch)
    if fooling is not None:
        loss = loss + telling + config.adversarial_weight * model.adversary_counts * fooling
    metrics = {
        "psnr": (psnr(output.sample.detach(), pixel_values).sum(), count),
        "reconstruction_loss": (reconstruction * count, count),
        "commitment_loss": (output.commitment_loss * count, count),
        "codes_in_use": (in_use, 1),
    }
    return loss * count, metrics


def begin_step(config: VQTrainConfig, model: ImageTokenizer, step: int) -> None:
    """
    Late in the run codes stay where they are, so that the decoder can settle. With Gumbel-softmax, the temperature
    falls. The adversary counts from `adversarial_start` on.
    """
    model.adversary_counts = float(step >= config.adversarial_start)
    if config.decoder_only:
        model.quantize.eval()  # or codes would follow what they see
        return
    if getattr(model.config, "codebook_training", None) == "gumbel":
        first, last = model.config.gumbel_temperature, config.final_gumbel_temperature
        model.quantize.gumbel_temperature = first * (last / first) ** (step / config.max_steps)
        return
    settling = step >= config.max_steps - config.decay_steps // 2
    model.quantize.dead_code_threshold = 0.0 if settling else model.config.dead_code_threshold


def make_samples(
    config: VQTrainConfig, sources: list[PicturePool], model: ImageTokenizer, count: int = 8
) -> dict[str, torch.Tensor]:
    """Pictures above their reconstructions, the same pictures every time, at each resolution."""
    model = getattr(model, "tokenizer", model)
    rate, samples = model.config.compression_rates[-1], {}
    for source in sources:
        pixel_values = source.batch(count, None, rate, seeded_generator(config.seed, "pictures")).to(model.device)
        sample = model(pixel_values, compression_rate=rate).sample
        samples[f"{pixel_values.shape[-1]}px"] = torch.cat([pixel_values, sample.float()])
    return samples


def group_codes(config: VQTrainConfig, model: ImageTokenizer) -> None:
    """Group the codes into clusters, from which CogView2 draws."""
    model = getattr(model, "tokenizer", model)
    if config.family == "cogview2" and not config.decoder_only:
        model.compute_cluster_labels(config.num_clusters, config.seed)


def main(arguments: list[str] | None = None) -> ImageTokenizer | None:
    config = parse_config(VQTrainConfig, arguments, description=__doc__)
    set_seed(config.seed)
    model = make_model_once(functools.partial(make_model, config))
    sources = make_sources(config)
    perceptual_distance = load_perceptual_network(config.perceptual_network) if config.perceptual_network else None
    if config.compile:  # not the codebook, which changes under the hood
        decoders = model.decoders.values() if config.family == "cogview2" else [model.decoder]
        for part in (model.encoder, *decoders):
            part.compile()
    whole = model
    if config.adversarial_weight:
        whole = make_model_once(lambda: WithAdversary(model, PatchDiscriminator()))
    trained = train(
        dataclasses.replace(config, compile=False),
        whole,
        functools.partial(make_batch, config, sources, model.config.compression_rates),
        functools.partial(compute_loss, config, model, perceptual_distance),
        len,
        functools.partial(make_samples, config, sources),
        begin_step=functools.partial(begin_step, config, model),
        finish=functools.partial(group_codes, config),
        save=lambda final, folder: getattr(final, "tokenizer", final).save_pretrained(folder),
        validation=validation_batches(config, model.config.compression_rates),
    )
    tell_left_out(config, sources)
    return getattr(trained, "tokenizer", trained)


if __name__ == "__main__":
    run_script(main, resumable=True)
