#!/usr/bin/env python
r"""
How well an image tokenizer keeps pictures: PSNR, SSIM and, where their weights are at hand, LPIPS and rFID; one JSON
line.

    python training_scripts/evaluate_vq_model.py --vqvae MODEL/vqvae --image_folder PICTURES --resolution 240
    python training_scripts/evaluate_vq_model.py --vqvae MODEL/vqvae --image_folder PICTURES --resolution 256 \
        --perceptual_network lpips \
        --feature_network cogview_pipelines.evaluation.networks:efficientnet_lite0
The pictures themselves, coded and decoded, for people to judge beside those of models:
    python training_scripts/evaluate_vq_model.py --vqvae MODEL/vqvae --image_folder PICTURES --resolution 240 \
        --save recovered
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from tqdm.auto import tqdm

from cogview_pipelines.evaluation.distances import frechet_distance
from cogview_pipelines.evaluation.networks import features_of, load_network
from cogview_pipelines.evaluation.reconstruction import psnr, ssim
from cogview_pipelines.models.image_tokenizers.auto import load_image_tokenizer
from cogview_pipelines.pictures.png import read_metadata, save_png
from cogview_pipelines.training.arguments import parse_config, run_script
from cogview_pipelines.training.data.pictures import PictureFolder, check_pictures
from cogview_pipelines.training.data.prefetch import image_paths
from cogview_pipelines.training.data.selection import FIT_OF_FILES
from cogview_pipelines.training.losses import load_perceptual_network


@dataclass
class EvaluateConfig:
    vqvae: str = field(metadata={"help": "Folder or Hub id of the image tokenizer."})
    image_folder: str = field(metadata={"help": "Folder of pictures that it was not trained on."})
    resolution: int = field(default=256, metadata={"help": "Side of the pictures in pixels."})
    fit: str = field(default="crop", metadata=FIT_OF_FILES)
    save: str | None = field(
        default=None,
        metadata={"help": "Folder for the pictures as the image tokenizer gives them back: PNG, named as they are."},
    )
    compression_rate: int | None = field(default=None, metadata={"help": "Pixels per token; default: its last."})
    perceptual_network: str | None = field(
        default=None, metadata={"help": "LPIPS: 'lpips' or 'module:factory' of a perceptual distance."}
    )
    feature_network: str | None = field(
        default=None, metadata={"help": "rFID: 'module:function' of a network of features."}
    )
    batch_size: int = field(default=16, metadata={"help": "Pictures at a time."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."})
    config: str | None = field(default=None, metadata={"help": "YAML file with any of these options."})


def saved_paths(config: EvaluateConfig, paths: Sequence[Path]) -> list[Path]:
    """
    Where the pictures are saved.

    Raises:
        ValueError: If two would have the same name, or a file is there that is none of this script.
    """
    if config.save is None:
        return []
    folder, source = Path(config.save), Path(config.image_folder)
    if folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"`save` must be outside of `image_folder`, whose pictures it would add to, but is {folder}.")
    files = [folder / path.relative_to(source).with_suffix(".png") for path in paths]
    owners: dict[str, Path] = {}
    for file, path in zip(files, paths, strict=True):
        other = owners.setdefault(str(file).casefold(), path)
        if other is not path:
            raise ValueError(f"`save`: {other} and {path} would both become {file}. Give them different names.")
        if os.path.lexists(file) and not is_own(file):
            raise ValueError(f"`save`: {file} is there already, and not of this script. Name another folder.")
    return files


def is_own(file: Path) -> bool:
    """Whether this script wrote a file."""
    try:
        return "recovered_by" in read_metadata(file)
    except ValueError:
        return False


def save_pictures(config: EvaluateConfig, files: Sequence[Path], rate: int, sample: torch.Tensor) -> None:
    """Write pictures, `(num, 3, side, side)` in 0..1."""
    for file, image in zip(files, VaeImageProcessor(do_normalize=False).postprocess(sample), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_png(image, file, {"recovered_by": config.vqvae, "compression_rate": rate})


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict:
    config = parse_config(EvaluateConfig, arguments, description=__doc__)
    vqvae = load_image_tokenizer(config.vqvae, dtype=torch.float32).to(config.device).eval()
    rate = vqvae.config.compression_rates[-1] if config.compression_rate is None else config.compression_rate
    distance = load_perceptual_network(config.perceptual_network) if config.perceptual_network else None
    network = load_network(config.feature_network, config.device) if config.feature_network else None
    paths = check_pictures(image_paths(config.image_folder))
    files = saved_paths(config, paths)
    pictures = PictureFolder(paths, config.resolution, fit=config.fit)
    scores, features, codes = {"psnr": [], "ssim": [], "lpips": []}, ([], []), set()
    for start in tqdm(range(0, len(paths), config.batch_size), unit="batch", disable=None):
        target = pictures.read(range(start, min(start + config.batch_size, len(paths)))).to(config.device)
        tokens = vqvae.encode(target, rate).tokens
        sample = vqvae.decode(tokens, rate).sample.float().clamp(0, 1)
        codes.update(tokens.flatten().tolist())
        if files:
            save_pictures(config, files[start : start + len(sample)], rate, sample)
        scores["psnr"] += psnr(sample, target).tolist()
        scores["ssim"] += ssim(sample, target).tolist()
        if distance is not None:
            scores["lpips"] += distance(sample, target).flatten().tolist()
        if network is not None:
            for kept, pixels in zip(features, (target, sample)):
                kept.append(features_of(network, pixels)[0].cpu())
    report = {"vqvae": config.vqvae, "pictures": len(paths), "resolution": config.resolution, "compression_rate": rate}
    report["fit"] = config.fit
    report |= {name: round(sum(values) / len(values), 4) for name, values in scores.items() if values}
    if network is not None:
        report["rfid"] = round(frechet_distance(*features), 4)
    report["codes_used"] = f"{len(codes)} of {vqvae.config.num_embeddings}"
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    run_script(main)
