#!/usr/bin/env python
r"""
Turn captioned pictures into a token folder for train_coglm.py, train_direct_sr.py and train_iterative_sr.py.

The emoji scenes of the demo, all that the training split has:
    python training_scripts/prepare_tokens.py --vqvae runs/vq_small/final --low_size 80 --fine_size 240 \
        --output_dir data/tokens_small
Your own pictures; a line of captions.jsonl is {"file": "cat.jpg", "en": ["a cat"], "zh": ["一只猫"]}:
    python training_scripts/prepare_tokens.py --image_folder PICTURES --captions PICTURES/captions.jsonl \
        --vqvae VQVAE --output_dir data/mine
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from cogview_pipelines import IcetkVQModel
from cogview_pipelines.training.token_data import TokenData

TEMPLATE_REPEATS = 4  # copies of each template caption beside one of each variant


@dataclass
class PrepareConfig:
    vqvae: str = field(metadata={"help": "Folder or Hub id of the image tokenizer."})
    output_dir: str = field(metadata={"help": "The token folder to write."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder of pictures; without it: emoji scenes."})
    captions: str | None = field(default=None, metadata={"help": "JSONL with `file` and captions by language."})
    scope: str | None = field(
        default=None, metadata={"help": "scope.json of the emoji scenes; default: the small one."}
    )
    max_pairs: int | None = field(default=None, metadata={"help": "At most so many emoji scenes of two objects."})
    sprites: str | None = field(
        default=None, metadata={"help": "Folder of full-size drawings, for emoji scenes larger than 240 pixels."}
    )
    low_size: int = field(default=160, metadata={"help": "Side of the low-resolution pictures in pixels."})
    fine_size: int | None = field(default=480, metadata={"help": "Side of the super-resolved pictures; 0: none."})
    compression_rate: int = field(default=8, metadata={"help": "Pixels per token along each side."})
    batch_size: int = field(default=32, metadata={"help": "Pictures at a time."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."})
    seed: int = field(default=0, metadata={"help": "Which emoji pairs are taken if not all are."})


def emoji_rows(config: PrepareConfig, sizes: list[int]) -> tuple[int, Iterator[tuple[list[Image.Image], dict]]]:
    """Pictures at all sizes, and captions, of the training scenes; single objects as likely as pairs."""
    import random

    from cogview_pipelines.emoji import LANGUAGES, Scope, SpriteSet, caption_variants, captions, iterate_scenes, render

    scope = Scope.load(config.scope) if config.scope else Scope.small()
    sprites = SpriteSet(config.sprites) if config.sprites else None
    groups = [list(iterate_scenes(scope, layout, "train")) for layout in scope.layouts]
    if config.max_pairs is not None:
        groups = [
            random.Random(config.seed).sample(group, config.max_pairs)
            if group[0].layout == "pair" and len(group) > config.max_pairs
            else group
            for group in groups
        ]

    def rows():
        for scene, weight in ((scene, 1 / len(group)) for group in groups for scene in group):
            texts = {language: captions(scene, language) for language in LANGUAGES}
            for language in LANGUAGES:  # mostly the templates, and other words for the same now and then
                variants = caption_variants(scene, language)
                full_stop = {"en": ".", "zh": "。"}[language]
                sentences = [text + full_stop for text in (texts[language][0], variants["complete"][0])]
                texts[language] = texts[language] * TEMPLATE_REPEATS + [
                    *variants["complete"],
                    *variants["no_style"],
                    *sentences,
                ]
            yield [render(scene, size, sprites) for size in sizes], {**texts, "weight": weight}

    return sum(map(len, groups)), rows()


def folder_rows(config: PrepareConfig, sizes: list[int]) -> tuple[int, Iterator[tuple[list[Image.Image], dict]]]:
    """Pictures at all sizes, and captions, of the user's files."""
    lines = [
        json.loads(line) for line in Path(config.captions).read_text(encoding="utf-8").splitlines() if line.strip()
    ]

    def rows():
        for number, line in enumerate(lines, 1):
            path = Path(config.image_folder) / str(line.get("file"))
            if not path.is_file():
                raise ValueError(
                    f"Line {number} of `captions` names {line.get('file')!r}, which is not in `image_folder`."
                )
            image = Image.open(path).convert("RGB")
            texts = {key: [value] if isinstance(value, str) else value for key, value in line.items() if key != "file"}
            yield [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for size in sizes], texts

    return len(lines), rows()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PrepareConfig, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    (config,) = parser.parse_args_into_dataclasses(arguments)
    if config.image_folder and not config.captions:
        parser.error("`--image_folder` needs `--captions`.")
    vqvae = IcetkVQModel.from_pretrained(config.vqvae).to(config.device).eval()
    sizes = {"low": config.low_size, **({"fine": config.fine_size} if config.fine_size else {})}
    total, rows = (folder_rows if config.image_folder else emoji_rows)(config, list(sizes.values()))
    tokens, captions = {name: [] for name in sizes}, []
    with tqdm(total=total, unit="picture") as bar:
        while batch := list(itertools.islice(rows, config.batch_size)):
            for name, images in zip(sizes, zip(*(pictures for pictures, _ in batch))):
                pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).movedim(-1, 1)
                encoded = vqvae.encode(pixels.to(config.device).float() / 255, config.compression_rate).tokens
                tokens[name].append(encoded.cpu())
            captions += [texts for _, texts in batch]
            bar.update(len(batch))
    TokenData.save(config.output_dir, {name: torch.cat(parts) for name, parts in tokens.items()}, captions)


if __name__ == "__main__":
    main()
