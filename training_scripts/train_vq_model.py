#!/usr/bin/env python
"""
Train the image tokenizer: an encoder, one codebook and a decoder for each compression rate.

On a CPU, the small tokenizer of the demo (emoji scenes):
    python training_scripts/train_vq_model.py --config training_scripts/emoji/vq_small.yaml --output_dir runs/vq_small
On one GPU, on your own pictures:
    python training_scripts/train_vq_model.py --image_folder PICTURES --resolutions 256 --mixed_precision bf16
    --output_dir runs/vq
On eight GPUs:
    accelerate launch --num_processes 8 training_scripts/train_vq_model.py --image_folder PICTURES --output_dir runs/vq
"""

import json
import logging
from dataclasses import dataclass, field

import torch

from cogview_pipelines import IcetkVQConfig, IcetkVQModel
from cogview_pipelines.training.arguments import TrainConfig, parse_config
from cogview_pipelines.training.checkpoints import Clock, resume, save_checkpoint
from cogview_pipelines.training.data import image_paths, prefetch, step_generator
from cogview_pipelines.training.logs import MetricsLog, save_samples
from cogview_pipelines.training.losses import content_weights, load_perceptual_network, reconstruction_loss
from cogview_pipelines.training.pictures import PictureFolder, PicturePool
from cogview_pipelines.training.setup import make_accelerator, make_averaged_model, make_optimizer, make_scheduler

logger = logging.getLogger(__name__)


@dataclass
class VQTrainConfig(TrainConfig):
    image_folder: str | None = field(default=None, metadata={"help": "Folder of pictures; without it: emoji scenes."})
    scope: str | None = field(
        default=None, metadata={"help": "File with the scope of the emoji scenes; by default the small one."}
    )
    sprites: str | None = field(
        default=None, metadata={"help": "Folder of full-size drawings, for emoji scenes larger than 240 pixels."}
    )
    num_scenes: int = field(default=3000, metadata={"help": "Different emoji scenes, drawn once and kept in memory."})
    resolutions: list[int] = field(
        default_factory=lambda: [80, 240], metadata={"help": "Sides of the pictures in pixels; each step draws one."}
    )
    resolution_weights: list[float] = field(
        default_factory=list, metadata={"help": "Chances of the resolutions, by default equal."}
    )
    crop_size: int | None = field(default=None, metadata={"help": "Train on random squares of this side, in pixels."})
    model: str = field(
        default="{}", metadata={"help": "Options of IcetkVQConfig: JSON, or a mapping in the YAML file."}
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
    num_clusters: int | None = field(default=None, metadata={"help": "Clusters of codes, by default as in the model."})


def make_sources(config: VQTrainConfig) -> list[PicturePool]:
    """Where the pictures of each resolution come from."""
    if config.image_folder is not None:
        paths = image_paths(config.image_folder)
        return [PictureFolder(paths, resolution) for resolution in config.resolutions]
    from cogview_pipelines.emoji import Scope, SpriteSet, render, sample_scenes

    scope = Scope.load(config.scope) if config.scope is not None else Scope.small()
    sprites = SpriteSet(config.sprites) if config.sprites is not None else None
    scenes = sample_scenes(scope, config.num_scenes, config.seed, split_name="train")
    return [PicturePool.from_images([render(scene, size, sprites) for scene in scenes]) for size in config.resolutions]


def make_batch(config: VQTrainConfig, sources: list[PicturePool], rates: tuple[int, ...], draw: tuple[int, int, int]):
    """Pixel values and compression rate of one forward pass; `draw` is (step, micro step, process)."""
    # All processes take the same resolution and rate, so that none waits for another.
    shared = step_generator(config.seed, draw[0], draw[1])
    weights = torch.tensor(config.resolution_weights or [1.0] * len(sources))
    source = sources[int(torch.multinomial(weights, 1, generator=shared))]
    rate = rates[int(torch.randint(len(rates), (1,), generator=shared))]
    own = step_generator(config.seed, draw[0], draw[1], draw[2] + 1)
    return source.batch(config.batch_size, config.crop_size, max(rates), own), rate


def main(arguments: list[str] | None = None) -> IcetkVQModel:
    config = parse_config(VQTrainConfig, arguments, description=__doc__)
    accelerator = make_accelerator(config)
    model = IcetkVQModel(IcetkVQConfig(**json.loads(config.model)))
    rates = model.config.compression_rates
    sources = make_sources(config)
    perceptual_distance = load_perceptual_network(config.perceptual_network) if config.perceptual_network else None

    averaged = make_averaged_model(model.to(accelerator.device), config)
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config)
    if config.compile:  # not the codebook, which changes under the hood
        for part in (model.encoder, *model.decoders.values()):
            part.compile()
    trained, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler, *([] if averaged is None else [averaged]))
    start_step = resume(accelerator, config)
    log, clock = MetricsLog(accelerator, config, start_step), Clock(accelerator, config)

    draws = [
        (step, micro_step, accelerator.process_index)
        for step in range(start_step, config.max_steps)
        for micro_step in range(config.gradient_accumulation_steps)
    ]
    batches = prefetch(lambda draw: make_batch(config, sources, rates, draw), draws, config.data_workers)
    trained.train()
    for (step, _, _), (pixel_values, rate) in batches:
        pixel_values = pixel_values.to(accelerator.device)
        # Late in the run codes stay where they are, so that the decoder can settle.
        settling = step >= config.max_steps - config.decay_steps // 2
        model.quantize.dead_code_threshold = 0.0 if settling else model.config.dead_code_threshold
        with accelerator.accumulate(trained):
            output = trained(pixel_values, compression_rate=rate)
            weights = content_weights(pixel_values, config.flat_weight, rate) if config.flat_weight != 1 else None
            reconstruction = reconstruction_loss(
                output.sample, pixel_values, config.l1_weight, config.l2_weight, config.edge_weight, weights
            )
            loss = reconstruction + output.commitment_loss
            if perceptual_distance is not None:
                loss = loss + config.perceptual_weight * perceptual_distance(output.sample, pixel_values).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        log.add(
            len(pixel_values),
            loss=loss,
            reconstruction_loss=reconstruction,
            commitment_loss=output.commitment_loss,
            codes_in_use=(model.quantize.cluster_size > 0.01).float().sum(),
        )
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)
        num_steps = step + 1
        log.end_step(num_steps, scheduler.get_last_lr()[0])
        if config.sample_every_steps and num_steps % config.sample_every_steps == 0 and accelerator.is_main_process:
            save_reconstructions(model, sources, config, num_steps, accelerator)
        if clock.checkpoint_due(num_steps):
            save_checkpoint(accelerator, config, num_steps)
        if num_steps < config.max_steps and clock.time_is_over():
            save_checkpoint(accelerator, config, num_steps)
            logger.warning(
                "Stopped at `max_minutes` after %d steps; resume with --resume_from_checkpoint latest.", num_steps
            )
            log.close()
            return model

    log.close()
    final = model if averaged is None else averaged.module
    final.eval()
    final.compute_cluster_labels(config.num_clusters, config.seed)
    if accelerator.is_main_process:
        final.save_pretrained(f"{config.output_dir}/final")
    return final


@torch.no_grad()
def save_reconstructions(model, sources, config, step, accelerator, count: int = 4):
    """Pictures above their reconstructions, the same pictures every time, at each resolution."""
    model.eval()
    rate = model.config.compression_rates[-1]
    for source in sources:
        pixel_values = source.batch(count, None, rate, step_generator(config.seed, -1)).to(accelerator.device)
        with accelerator.autocast():
            sample = model(pixel_values, compression_rate=rate).sample
        path = save_samples(torch.cat([pixel_values, sample.float()]), config, step, columns=count)
        path.rename(path.with_name(f"{path.stem}_{pixel_values.shape[-1]}px{path.suffix}"))
    model.train()


if __name__ == "__main__":
    main()
