#!/usr/bin/env python
r"""
Turn captioned pictures into a token folder for train_coglm.py, train_direct_sr.py, train_iterative_sr.py and
train_cogview.py.

The emoji scenes of the demo, all that the training split has:
    python training_scripts/prepare_tokens.py --config training_scripts/emoji/tokens_small.yaml
Your own pictures; a line of captions.jsonl is {"file": "cat.jpg", "en": "a cat", "zh": ["一只猫", "猫"]}, with either
language or both, and perhaps a "weight" above or below 1 for pictures that shall be drawn more or less often, or a
"style", such as "oil painting":
    python training_scripts/prepare_tokens.py --image_folder PICTURES --captions PICTURES/captions.jsonl \
        --like MODEL --held_out_share 0.1 --output_dir data/mine
Without a pipeline, for the image tokenizer alone: --vqvae VQVAE --low_size 160 --fine_size 480 in place of --like.
Many pictures, in memory that does not grow: token shards, of a list of pictures with --shard_size, or one for each tar
or Parquet file of a folder:
    python training_scripts/prepare_tokens.py --image_folder TARS --like MODEL --skip_unreadable true \
        --output_dir data/many
Stopped or killed at any time, each of these goes on when it is run again.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from cogview_pipelines import (
    CogLMCanvasConfig,
    CogLMConfig,
    CogView2Pipeline,
    CogViewConfig,
    CogViewTokenizer,
    IcetkTokenizer,
)
from cogview_pipelines.json_lines import parse_object, read_lines
from cogview_pipelines.model_index import has_component
from cogview_pipelines.models.image_tokenizers.auto import DEFAULT_RATE, choose_rate, load_image_tokenizer
from cogview_pipelines.models.tokenization import CodesAndPiecesTokenizer
from cogview_pipelines.pictures.colours import on_white
from cogview_pipelines.pictures.files import find_file, read_picture
from cogview_pipelines.training.arguments import json_option, parse_config, run_script
from cogview_pipelines.training.data.captions import TextRows, parse_captions, tell_blank, tell_text_losses
from cogview_pipelines.training.data.draws import derived_seed
from cogview_pipelines.training.data.duplicates import drop_duplicates
from cogview_pipelines.training.data.inputs import (
    PICTURE_SUFFIXES,
    Part,
    PictureRow,
    find_parts,
    is_packed,
    listed_pictures,
)
from cogview_pipelines.training.data.pictures import MOST_SHOWN, check_pictures, to_bytes
from cogview_pipelines.training.data.prefetch import prefetch
from cogview_pipelines.training.data.selection import FITS, REASONS, Filters, Selected, select, to_square
from cogview_pipelines.training.data.shards import (
    ShardedCaptions,
    TokenShards,
    is_written,
    read_hashes,
    write_index,
    write_shard,
)
from cogview_pipelines.training.data.tokens import OneAfterAnother, TokenData
from cogview_pipelines.training.data.unfinished import UnfinishedTokens
from cogview_pipelines.training.run_folder import locked, remove_leftovers

logger = logging.getLogger(__name__)

# one order to write in is easier to learn; the other must not be strange to caption losses, either
TARGETS_REVERSED_SHARE = 0.1  # `reversed_share` says so, too
NEAR_COLOUR, FAR_COLOUR = 20, 60  # of 0..255: off in each channel and still called so; at least so far from any name
TEMPLATE_REPEATS = 4  # copies of each template caption beside one of each variant
UNFINISHED = ".unfinished"  # in the output folder: tokens of pictures, until there are those of all

# Of each family the models that say how large pictures are and how long texts may be; the first that is there does.
Sizes = dict[str, tuple[type[PreTrainedConfig], Callable[[Any], int]]]
SIZES: dict[str, Sizes] = {
    "CogView2": {
        "transformer": (CogLMConfig, lambda config: config.max_text_tokens),
        "direct_sr_transformer": (
            CogLMCanvasConfig,
            lambda config: min(config.num_text_slots - 1, config.max_text_tokens),
        ),
    },
    "CogView": {
        "transformer": (CogViewConfig, lambda config: config.layout.max_text_tokens),
        "caption_transformer": (CogViewConfig, lambda config: config.layout.max_caption_tokens),
        "super_resolution_transformer": (CogViewConfig, lambda config: config.layout.max_super_resolution_text_tokens),
    },
}

Reader = tuple[CodesAndPiecesTokenizer, int | None]  # who reads the captions, and how many tokens of each


@dataclass
class PrepareConfig:
    output_dir: str = field(metadata={"help": "The token folder to write."})
    like: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the pipeline that is to be trained: its image tokenizer and sizes are taken "
            "where no other option says them, and what it cannot read of the captions is told."
        },
    )
    vqvae: str | None = field(default=None, metadata={"help": "Folder or Hub id of the image tokenizer."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the text tokenizer of the model that is to be trained, where no `like` has "
            "it: nothing but the report needs it, which says what of the captions has no piece."
        },
    )
    max_text_tokens: int | None = field(
        default=None,
        metadata={
            "help": "So many tokens of a caption the model takes: the report says how many captions are longer. "
            "Default: as `like` says; else none is called too long."
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures, of WebDataset tars or of Parquet files; without it: emoji scenes. Tars, "
            "Parquet and folders with metadata.jsonl or metadata.csv need no `captions` and become token shards."
        },
    )
    captions: str | None = field(default=None, metadata={"help": "JSONL with `file` and captions by language."})
    scope: str | None = field(
        default=None, metadata={"help": "scope.json of the emoji scenes; default: the small one."}
    )
    single_share: float = field(default=0.15, metadata={"help": "Chance that a drawn emoji scene has one object."})
    reversed_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the captions of emoji pairs that name the right or lower object first. With fewer, a "
            "model soon learns that the first noun comes first in the picture, and then when it does not. Beside "
            "`sentences`, what captioning is to write names the left or upper object first in nine of ten."
        },
    )
    max_pairs: int | None = field(default=None, metadata={"help": "At most so many emoji scenes of two objects."})
    frequencies: str = field(
        default="{}",
        metadata={
            "help": "How much more often emoji scenes with a thing are drawn, for things that are hard to learn: by "
            "hexcode, JSON or a mapping in the YAML file. Of two things in a scene, the larger number counts."
        },
    )
    other_colours_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the emoji scenes on a colour by chance: half of them near that of the scene, and called "
            "so; half far from all that have a name, and captions leave it out. Captioning learns from them to tell a "
            "style on backgrounds that it never met a thing on."
        },
    )
    sentences: int = field(
        default=0,
        metadata={
            "help": "Sentences of the grammar for each emoji scene and language, which pictures are then drawn from, "
            "beside the templates; captioning writes the templates."
        },
    )
    templates: int | None = field(
        default=None,
        metadata={"help": "Captions by template beside so many sentences; default: a quarter as many, rounded up."},
    )
    sprites: str | None = field(
        default=None, metadata={"help": "Folder of full-size drawings, for emoji scenes larger than 240 pixels."}
    )
    low_size: int | None = field(
        default=None, metadata={"help": "Side of the low-resolution pictures in pixels; default: 160."}
    )
    fine_size: int | None = field(
        default=None, metadata={"help": "Side of the super-resolved pictures; 0: none; default: 480."}
    )
    compression_rate: int | None = field(
        default=None, metadata={"help": "Pixels per token along each side; default: the only rate of `vqvae`, or 8."}
    )
    fit: str = field(
        default="crop",
        metadata={
            "help": "How your pictures become squares: crop takes the middle, pad adds white at two sides, random "
            "takes a square at a place that the seed draws.",
            "choices": list(FITS),
        },
    )
    shard_size: int | None = field(
        default=None,
        metadata={"help": "Write token shards, of so many lines of `captions` each; of tars and Parquet, one a file."},
    )
    worker: str = field(
        default="1/1",
        metadata={
            "help": "With shards: I/N does every N-th shard from the I-th on, so that N processes, on any machines, "
            "do all. Whoever is last writes index.json."
        },
    )
    min_side: int = field(
        default=1, metadata={"help": "With shards: leave out pictures with a shorter side, in pixels."}
    )
    max_aspect: float | None = field(
        default=None, metadata={"help": "With shards: leave out pictures whose longer side is more times the shorter."}
    )
    min_caption_length: int = field(
        default=1, metadata={"help": "With shards: leave out captions of fewer characters."}
    )
    max_caption_length: int | None = field(
        default=None, metadata={"help": "With shards: leave out captions of more characters."}
    )
    drop_duplicates: bool = field(
        default=False,
        metadata={"help": "With shards: take of files with the same bytes the first."},
    )
    held_out_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the pictures, drawn by the seed, that goes to the token folder OUTPUT_DIR/held_out "
            "instead, to be told from what was trained on."
        },
    )
    skip_unreadable: bool = field(
        default=False,
        metadata={
            "help": "Leave out pictures that are missing or cannot be read, with a warning, instead of stopping."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Pictures at a time."})
    data_workers: int = field(
        default=0,
        metadata={
            "help": "Processes (with shards: threads) that read or draw pictures ahead; 0: none beside this one."
        },
    )
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."})
    seed: int = field(
        default=0, metadata={"help": "Which emoji pairs are taken if not all are, and which pictures are held out."}
    )
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )


class EmojiPictures(Dataset):
    """The training scenes of a scope, with captions in both languages; singles are drawn by their share."""

    def __init__(self, config: PrepareConfig, sizes: list[int]):
        from cogview_pipelines.demo import Scope, SpriteSet

        self.config, self.sizes = config, sizes
        self.sprites = SpriteSet(config.sprites) if config.sprites else None
        scope = Scope.load(config.scope) if config.scope else Scope.small()
        groups = [self._scenes(scope, layout) for layout in scope.layouts]
        # single objects are drawn less: there are few of them, and too many repeats are learned by heart
        shares = {"single": config.single_share, "pair": 1 - config.single_share}
        often = read_frequencies(config, scope)
        self.scenes = [
            (scene, shares[scene.layout] / len(group) * max(often.get(thing, 1.0) for thing in scene.objects))
            for group in groups
            for scene in group
        ]

    def _scenes(self, scope, layout):
        from cogview_pipelines.demo import iterate_scenes, sample_scenes

        if layout == "pair" and self.config.max_pairs is not None:
            try:
                return sample_scenes(scope, self.config.max_pairs, self.config.seed, layout, "train")
            except ValueError:  # there are fewer
                pass
        return list(iterate_scenes(scope, layout, "train"))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], dict]:
        from cogview_pipelines.demo import render

        scene, (colour, texts) = self.scenes[index][0], self._draw(index)
        return [render(scene, size, self.sprites, colour) for size in self.sizes], texts

    def texts(self, index: int) -> dict:
        """The captions of a picture, with its weight."""
        return self._draw(index)[1]

    def made_of(self) -> dict[str, Any]:
        """What tells these pictures from others."""
        scenes = "".join(f"{scene}\n" for scene, _ in self.scenes)
        options = {name: getattr(self.config, name) for name in ("sprites", "other_colours_share")}
        return {"pictures": hashlib.sha256(scenes.encode()).hexdigest(), **options}

    def _draw(self, index: int) -> tuple[tuple[int, int, int] | None, dict]:
        """The colour of a scene's background, if it is not its own, and its captions, with its weight."""
        from cogview_pipelines.demo import LANGUAGES, caption_variants

        scene, weight = self.scenes[index]
        rng = random.Random(f"{self.config.seed} {index}")
        colour, has_name = None, True
        if self.config.other_colours_share and rng.random() < self.config.other_colours_share:
            colour, has_name = draw_colour(scene.background, rng)
        if has_name:
            texts = {language: self._templates(scene, language) for language in LANGUAGES}
            if self.config.sentences:
                sentences = {language: self._sentences(scene, language, rng) for language in LANGUAGES}
                texts = {**sentences, "targets": texts}
        else:
            texts = {language: caption_variants(scene, language)["no_background"] for language in LANGUAGES}
        return colour, {**texts, "weight": weight}

    def _templates(self, scene, language) -> list[str]:
        """Mostly the templates, and other words for the same now and then."""
        from cogview_pipelines.demo import caption_variants, captions

        templates, variants = captions(scene, language), caption_variants(scene, language)
        full_stop = {"en": ".", "zh": "。"}[language]
        texts = templates * TEMPLATE_REPEATS + variants["complete"]
        if not self.config.sentences:  # what captioning is to write says all
            texts += [*variants["no_style"], *variants["no_background"], *variants["objects_only"]]
            texts += [text + full_stop for text in (templates[0], variants["complete"][0])]
        if scene.layout == "pair":
            share = self.config.reversed_share
            if self.config.sentences:
                share = min(share, TARGETS_REVERSED_SHARE)
            texts = thin_reversed(texts, language, share)
        return texts

    def _sentences(self, scene, language, rng) -> list[str]:
        """As people type them, and some of the templates."""
        from cogview_pipelines.demo import captions, sample_sentence

        count, share = self.config.sentences, self.config.reversed_share
        num_templates = -(-count // 4) if self.config.templates is None else self.config.templates
        texts = [sample_sentence(scene, language, rng, reversed_share=share).text for _ in range(count)]
        return texts + rng.choices(captions(scene, language), k=num_templates)


def read_frequencies(config: PrepareConfig, scope) -> dict[str, float]:
    """`frequencies`, which must be positive numbers by things of the scope."""
    often = json_option(config, "frequencies") or {}
    for thing, number in often.items():
        if thing not in scope.concepts:
            raise ValueError(f"`frequencies` must name things of `scope` by hexcode, but has {thing!r}.")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
            raise ValueError(f"`frequencies` must be numbers above 0, but that of {thing} is {number!r}.")
    return often


def draw_colour(background: str, rng: random.Random) -> tuple[tuple[int, int, int], bool]:
    """A colour near that of a background, or one far from all that have a name; and whether it has the name."""
    from cogview_pipelines.demo import BACKGROUNDS

    palette = [ground.rgb for ground in BACKGROUNDS.values()]
    if rng.random() < 0.5:
        red, green, blue = (
            min(max(value + rng.randint(-NEAR_COLOUR, NEAR_COLOUR), 0), 255) for value in BACKGROUNDS[background].rgb
        )
        return (red, green, blue), True
    while True:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if min(math.dist(colour, named) for named in palette) >= FAR_COLOUR:
            return colour, False


def thin_reversed(texts: list[str], language: str, share: float) -> list[str]:
    """Captions of a pair, with so many that name the right or lower object first that they make up `share` of all."""
    from cogview_pipelines.demo.scenes import CANONICAL_RELATIONS, RELATIONS

    relations = [relation for name, relation in RELATIONS.items() if name not in CANONICAL_RELATIONS]
    words = [relation.english if language == "en" else relation.chinese for relation in relations]
    is_reversed = [any(word in text for word in words) for text in texts]
    kept = [text for text, reverse in zip(texts, is_reversed) if not reverse]
    rest = [text for text, reverse in zip(texts, is_reversed) if reverse]
    count = min(round(len(kept) * share / (1 - share)), len(rest))
    return kept + [rest[index * len(rest) // count] for index in range(count)]


class FolderPictures(Dataset):
    """
    The user's files with their captions; all lines and pictures are checked before the first is used.

    What is left out is counted: lines whose picture is missing (`num_missing`) or cannot be read (`num_unreadable`),
    blank captions (`num_blank`), and pictures without a line (`num_unnamed`).
    """

    def __init__(self, config: PrepareConfig, sizes: list[int]):
        self.sizes, self.fit, self.seed = sizes, config.fit, config.seed
        captions, folder = Path(config.captions), Path(config.image_folder)
        self.folder = folder
        all_rows, self.num_blank = read_captions_file(captions, folder)
        self.num_unnamed = count_unnamed(folder, [path for _, path, _ in all_rows])
        rows = without_missing(all_rows, folder, config.skip_unreadable)
        self.num_missing = len(all_rows) - len(rows)
        places = {path: place for place, path, _ in reversed(rows)}  # of several lines, the first
        paths = list(places)
        record = Path(config.output_dir) / UNFINISHED / "pictures.jsonl"  # what was good is not read again
        readable = set(
            check_pictures(paths, config.skip_unreadable, config.data_workers, record, places=[*places.values()])
        )
        self.rows = [row for row in rows if row[1] in readable]
        self.num_unreadable = len(rows) - len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[Image.Image], dict]:
        _, path, texts = self.rows[index]
        image = on_white(read_picture(path))
        return [to_square(image, size, self.fit, (self.seed, index)) for size in self.sizes], texts

    def texts(self, index: int) -> dict:
        """The captions of a picture, with its weight."""
        return self.rows[index][2]

    def made_of(self) -> dict[str, Any]:
        """What tells these pictures from others: names, sizes and times of change, in order."""
        digest = hashlib.sha256()
        for _, path, _ in self.rows:
            name, stat = os.path.relpath(path, self.folder), path.stat()
            digest.update(os.fsencode(f"{name}\0{stat.st_size} {stat.st_mtime_ns}\0"))
        return {"pictures": digest.hexdigest()}


def read_captions_file(captions: Path, image_folder: Path) -> tuple[list[tuple[str, Path, dict]], int]:
    """
    Where each line stands, its picture, and its captions with their weight; and how many blank captions there were.

    Raises:
        ValueError: If a line is not as the docstring of this script says.
    """
    if not captions.is_file():
        raise ValueError(f"`captions` must be a JSONL file, but there is none at {captions}.")
    if not image_folder.is_dir():
        raise ValueError(f"`image_folder` must be a folder of pictures, but there is none at {image_folder}.")
    rows, num_blank = [], 0
    for number, line in read_lines(captions):
        place = f"Line {number} of {captions}"
        texts, weight, blank = parse_captions(line, place)
        num_blank += blank
        name = parse_object(line).get("file")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{place} must name a picture in `file`: {line.strip()[:80]!r}.")
        rows.append((place, find_file(image_folder / name), {**texts, "weight": weight}))
    if not rows:
        raise ValueError(f"`captions` must have a line for each picture, but {captions} is empty.")
    return rows, num_blank


def without_missing(
    rows: list[tuple[str, Path, dict]], image_folder: Path, skip: bool
) -> list[tuple[str, Path, dict]]:
    """
    The lines whose pictures are there; others are named in a warning each.

    Raises:
        ValueError: If some are not to be skipped, or none is left. The message names them.
    """
    missing = [(place, path) for place, path, _ in rows if not os.path.isfile(path)]
    if missing and not skip:
        shown = "; ".join(f"{place} names {os.fspath(path)!r}" for place, path in missing[:MOST_SHOWN])
        more = f"; and {len(missing) - MOST_SHOWN} more" if len(missing) > MOST_SHOWN else ""
        raise ValueError(
            f"{len(missing)} of {len(rows)} lines name pictures that are not in `image_folder` {image_folder}: "
            f"{shown}{more}. Add the pictures, take out the lines, or leave them out with `--skip_unreadable`."
        )
    if len(missing) == len(rows):
        raise ValueError(f"None of the {len(rows)} lines names a picture that is in `image_folder` {image_folder}.")
    for place, path in missing:
        logger.warning("Left out: %s names %r, which is not there.", place, os.fspath(path))
    gone = {place for place, _ in missing}
    return [row for row in rows if row[0] not in gone]


def count_unnamed(image_folder: Path, named: Iterable[Path]) -> int:
    """Pictures in a folder, and in those in it, that are not among these; hidden files are none."""
    # of very many, a number each is what memory holds
    known = np.unique(np.fromiter((hash(os.path.abspath(path)) for path in named), np.int64))
    count = 0
    for place, folders, names in os.walk(image_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [
            hash(os.path.abspath(os.path.join(place, name)))
            for name in names
            if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith(".")
        ]
        count += len(pictures) - int(np.isin(np.array(pictures, np.int64), known).sum())
    return count


def tell_unnamed(image_folder: str, count: int) -> None:
    """Say how many pictures are left out since no line names them."""
    if count:
        print(f"{count} pictures in {image_folder} were left out: no line names them.")


def check_config(config: PrepareConfig, vqvae: PreTrainedModel) -> None:
    """Raise `ValueError` for what cannot work, before any work is done."""
    if not 0 <= config.held_out_share < 1:
        raise ValueError(f"`held_out_share` must be at least 0 and below 1, but is {config.held_out_share}.")
    packed = config.image_folder is not None and config.captions is None and is_packed(config.image_folder)
    if bool(config.image_folder) != bool(config.captions) and not packed:
        missing = "captions" if config.image_folder else "image_folder"
        raise ValueError(f"`{missing}` is missing: pictures need captions, and captions need pictures.")
    if config.max_text_tokens is not None:
        if config.max_text_tokens < 1:
            raise ValueError(f"`max_text_tokens` must be at least 1, but is {config.max_text_tokens}.")
        if config.tokenizer is None and config.like is None:
            raise ValueError("`max_text_tokens` counts the tokens of `tokenizer`. Name it, or `like`.")
    if not 0 <= config.other_colours_share <= 1:
        raise ValueError(f"`other_colours_share` must be from 0 to 1, but is {config.other_colours_share}.")
    if not 0 <= config.reversed_share <= 0.5:
        raise ValueError(f"`reversed_share` must be from 0 to 0.5, but is {config.reversed_share}.")
    for name, size, unit in (
        ("low_size", config.low_size, config.compression_rate),
        ("fine_size", config.fine_size or 0, config.low_size),
    ):
        if size < 0 or size % unit:
            multiple = "compression_rate" if name == "low_size" else "low_size"
            raise ValueError(f"`{name}` must be a multiple of `{multiple}` {unit}, but is {size}.")
    if config.shard_size is not None and config.shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, but is {config.shard_size}.")
    if not makes_shards(config):
        for item in (
            "min_side",
            "max_aspect",
            "min_caption_length",
            "max_caption_length",
            "drop_duplicates",
            "worker",
        ):
            if getattr(config, item) != PrepareConfig.__dataclass_fields__[item].default:
                raise ValueError(f"`{item}` is for token shards. Give `shard_size`, too.")
    elif not config.image_folder:
        raise ValueError("`shard_size` is for pictures of your own. Turn the token folder into shards afterwards.")


def stack_pictures(rows: list[tuple]) -> tuple[list[torch.Tensor], list[dict]]:
    """The pictures of each size as one tensor of bytes, and the captions."""
    columns = zip(*(images for images, _ in rows))
    return [torch.stack([to_bytes(image) for image in images]) for images in columns], [texts for _, texts in rows]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    config = parse_config(PrepareConfig, arguments, description=__doc__)
    if config.vqvae is None and config.like is None:
        raise ValueError("`vqvae` must be given, or `like`, a pipeline that has one.")
    like = {} if config.like is None else dict(CogView2Pipeline.load_config(config.like))
    place = {"name_or_path": config.vqvae}
    if config.vqvae is None:
        if not has_component(like, "vqvae"):
            raise ValueError(f"`like` {config.like} has no image tokenizer (`vqvae`). Name one by `vqvae`.")
        place = {"name_or_path": config.like, "subfolder": "vqvae"}
    vqvae = load_image_tokenizer(**place, dtype=torch.float32).to(config.device).eval()
    reader = read_like(config, like, vqvae)
    check_config(config, vqvae)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # rather fail now than after hours of encoding
    sizes = {"low": config.low_size, **({"fine": config.fine_size} if config.fine_size else {})}
    if makes_shards(config):
        prepare_shards(config, vqvae, sizes, reader)
        return
    pictures = (FolderPictures if config.image_folder else EmojiPictures)(config, list(sizes.values()))
    with locked(config.output_dir):
        made_of = {**made_how(config, vqvae), **pictures.made_of()}
        unfinished = UnfinishedTokens(Path(config.output_dir) / UNFINISHED, made_of)
        captions = encode_pictures(config, vqvae, sizes, pictures, unfinished)
        tensors = unfinished.joined()
        kept, held_out = split(len(captions), config.held_out_share, config.seed)
        for folder, indices in ((Path(config.output_dir), kept), (Path(config.output_dir) / "held_out", held_out)):
            if indices:
                chosen = {name: value[indices] for name, value in tensors.items()}
                TokenData.save(folder, chosen, [captions[index] for index in indices])
        unfinished.remove()
    report(config, pictures, captions, len(held_out), reader)


def made_how(config: PrepareConfig, vqvae: PreTrainedModel) -> dict[str, Any]:
    """What tokens depend on beside the pictures; of how many are encoded at a time, and where, by near ties."""
    digest = hashlib.sha256(type(vqvae).__name__.encode())
    for name, value in sorted(vqvae.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.cpu().flatten().numpy())
    names = ("low_size", "fine_size", "compression_rate", "fit", "seed", "batch_size", "device")
    return {"image_tokenizer": digest.hexdigest(), **{name: getattr(config, name) for name in names}}


def encode_pictures(
    config: PrepareConfig,
    vqvae: PreTrainedModel,
    sizes: dict[str, int],
    pictures: "FolderPictures | EmojiPictures",
    unfinished: UnfinishedTokens,
) -> list[dict]:
    """Add the tokens of the pictures that have none yet; gives back the captions of all."""
    first = unfinished.count
    if first:
        print(f"{first} of {len(pictures)} pictures have tokens already: this goes on where it was stopped.")
    captions = [pictures.texts(index) for index in range(first)]
    rest = Subset(pictures, range(first, len(pictures)))
    batches = DataLoader(rest, config.batch_size, num_workers=config.data_workers, collate_fn=stack_pictures)
    with unfinished, tqdm(total=len(pictures), initial=first, unit="picture") as bar:
        for pixels, texts in batches:
            encoded = {}
            for name, values in zip(sizes, pixels):
                batch = values.to(config.device).float() / 255
                encoded[name] = vqvae.encode(batch, config.compression_rate).tokens
            unfinished.add(encoded)
            captions += texts
            bar.update(len(texts))
    return captions


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pictures to train on and of those that are held out, at least one of each if there is a share."""
    num_held_out = 0 if not share else min(max(1, round(share * count)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


def read_like(config: PrepareConfig, like: Mapping[str, Any], vqvae: PreTrainedModel) -> Reader | None:
    """
    Take what the options leave open from the pipeline that the tokens are for.

    Args:
        config ([`PrepareConfig`]): The options; those that are left open are set.
        like (mapping): What the `model_index.json` of the pipeline says, if there is one.
        vqvae: The image tokenizer.

    Returns:
        Its text tokenizer, or the one that is named, and how many tokens of a caption a model takes, if that is known;
        `None` where there is neither.

    Raises:
        ValueError: If no component of the pipeline says how large its pictures are.
    """
    found, tokenizer, longest = {}, None, config.max_text_tokens
    rate = choose_rate(vqvae, config.compression_rate, like.get("compression_rate", DEFAULT_RATE))
    if config.like is not None:
        family = "CogView2" if str(like.get("_class_name")).startswith("CogView2") else "CogView"
        name = next((name for name in SIZES[family] if has_component(like, name)), None)
        if name is None:
            raise ValueError(
                f"`like` {config.like}, a {like.get('_class_name')}, has none of {', '.join(SIZES[family])}, which "
                "say how large pictures are. Name another, or give `vqvae`, `low_size` and `fine_size` in its place."
            )
        config_class, count_tokens = SIZES[family][name]
        model = config_class.from_pretrained(config.like, subfolder=name)
        rows, columns = model.image_grid
        if rows != columns:
            raise ValueError(
                f"`like` makes pictures of {rows} x {columns} tokens, but this script makes squares only."
            )
        found = {"low_size": rows * rate, "fine_size": 0}
        if has_component(like, "direct_sr_transformer"):
            canvas = CogLMCanvasConfig.from_pretrained(config.like, subfolder="direct_sr_transformer")
            found["fine_size"] = canvas.fine_grid[0] * rate
        if has_component(like, "super_resolution_transformer"):
            found["fine_size"] = 2 * rows * rate
        if has_component(like, "tokenizer"):
            tokenizer_class = IcetkTokenizer if family == "CogView2" else CogViewTokenizer
            tokenizer = tokenizer_class.from_pretrained(config.like, subfolder="tokenizer")
        longest = count_tokens(model) if longest is None else longest
    for name, default in {"compression_rate": rate, "low_size": 160, "fine_size": 480}.items():
        if getattr(config, name) is None:
            setattr(config, name, found.get(name, default))
    if config.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        if not isinstance(tokenizer, CodesAndPiecesTokenizer):
            raise ValueError(
                "`tokenizer` must be a text tokenizer as train_tokenizer.py saves one, but "
                f"{config.tokenizer} holds a {type(tokenizer).__name__}."
            )
    return None if tokenizer is None else (tokenizer, longest)


def report(
    config: PrepareConfig,
    pictures: Dataset,
    captions: list[dict],
    num_held_out: int,
    reader: Reader | None,
) -> None:
    """Say what was written, and what was lost on the way."""
    print(f"{len(captions)} pictures are in {config.output_dir}, {num_held_out} of them held out.")
    if isinstance(pictures, FolderPictures):
        for number, said in (
            (pictures.num_missing, "lines were left out: their pictures are not there."),
            (pictures.num_unreadable, "lines were left out: their pictures cannot be read."),
        ):
            if number:
                print(f"{number} {said}")
        tell_unnamed(config.image_folder, pictures.num_unnamed)
        if pictures.num_blank:
            print(tell_blank(pictures.num_blank))
    if reader is not None:
        tell_text_losses(captions, *reader)


# Token shards --------------------------------------------------------------------------------------------------------


def makes_shards(config: PrepareConfig) -> bool:
    """Whether the output is token shards."""
    packed = config.image_folder is not None and config.captions is None
    return config.shard_size is not None or packed


def parse_worker(text: str) -> tuple[int, int]:
    """`"2/8"` as the numbers 2 and 8."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"`worker` must be I/N with I from 1 to N, such as 2/8, but is {text!r}.")
    return int(number), int(count)


def prepare_shards(
    config: PrepareConfig,
    vqvae: PreTrainedModel,
    sizes: dict[str, int],
    reader: Reader | None,
) -> None:
    """Make the shards of this worker that are not there yet, and the index if it is the last."""
    parts = find_parts(config.image_folder, config.captions, config.shard_size)
    worker, num_workers = parse_worker(config.worker)
    folders = {"train": Path(config.output_dir)}
    if config.held_out_share:
        folders["held_out"] = folders["train"] / "held_out"
    lock = folders["train"] if num_workers == 1 else folders["train"] / ".workers" / f"{worker}-of-{num_workers}"
    with locked(lock):
        if num_workers == 1:  # others may be writing
            for folder in folders.values():
                remove_leftovers(folder)
        maker = ShardMaker(config, vqvae, sizes, parts, folders)
        maker.make(range(worker - 1, len(parts), num_workers))
        # the last worker takes out what several have; those that end at the same time do so one after the other
        with FileLock(lock.parent / "index.lock") if num_workers > 1 else contextlib.nullcontext():
            if config.drop_duplicates and all(maker.is_made(number) for number in range(len(parts))):
                for folder in folders.values():
                    drop_duplicates(folder, len(parts))
            reports = {name: write_index(folder, len(parts), name == "train") for name, folder in folders.items()}
    print(f"This worker made {maker.num_made} shards with {maker.rate()}; {maker.num_found} were there already.")
    if any(found is None for found in reports.values()):
        print(f"Other workers have not finished theirs: there is no index of all {len(parts)} shards yet.")
        return
    held_out = reports.get("held_out") or {}
    print(
        f"{reports['train']['num_pictures'] + held_out.get('num_pictures', 0)} pictures of {reports['train']['rows']} "
        f"rows are in {config.output_dir}, {held_out.get('num_pictures', 0)} of them held out."
    )
    for reason, said in REASONS.items():
        count = reports["train"][reason] + held_out.get(reason, 0)
        if count:
            print(f"{count} left out: {said}.")
    listed = listed_pictures(parts)
    if listed is not None:
        tell_unnamed(config.image_folder, count_unnamed(Path(config.image_folder), listed))
    num_blank = reports["train"]["blank_captions"] + held_out.get("blank_captions", 0)
    if num_blank:
        print(tell_blank(num_blank))
    if reader is not None:
        written = [TokenShards(folders[name]) for name, found in reports.items() if found["num_pictures"]]
        kinds = ("captions", "targets", "style")
        rows = [TextRows(*(ShardedCaptions(shards, kind) for kind in kinds)) for shards in written]
        tell_text_losses(OneAfterAnother(rows), *reader)


class ShardMaker:
    """
    Makes token shards of parts of the input; pictures are read ahead, across the ends of parts, while the device
    encodes.
    """

    def __init__(self, config, vqvae, sizes, parts: list[Part], folders: dict[str, Path]):
        self.config, self.vqvae, self.sizes, self.parts, self.folders = config, vqvae, sizes, parts, folders
        self.num_made = self.num_found = self.num_pictures = 0
        self.seconds = 0.0
        self.filters = Filters(
            config.min_side, config.max_aspect, config.min_caption_length, config.max_caption_length
        )
        self.seen: set[int] = set()
        self.written: Future = Future()  # the last shard
        self.written.set_result(None)

    def rate(self) -> str:
        """Pictures and how many a second, in words."""
        return f"{self.num_pictures} pictures, {self.num_pictures / max(self.seconds, 1e-9):.1f} a second"

    def make(self, numbers: range) -> None:
        """Make those of the shards that are not there yet."""
        started = time.monotonic()
        choose = functools.partial(
            select, filters=self.filters, sizes=[*self.sizes.values()], fit=self.config.fit, seed=self.config.seed
        )

        def read(item: tuple[int, list[PictureRow] | None]) -> list[tuple[Selected, list[torch.Tensor]]]:
            chosen = [choose(row) for row in item[1] or ()]
            return [(one, [to_bytes(square) for square in one.squares]) for one in chosen]

        batches = prefetch(read, self.batches(numbers), self.config.data_workers)
        self.begin()
        with ThreadPoolExecutor(1) as self.writer:
            for (number, rows), chosen in tqdm(batches, unit="batch"):
                if rows is None:
                    self.end(number)
                else:
                    self.add(number, chosen)
            self.written.result()
        self.seconds = time.monotonic() - started

    def batches(self, numbers: range) -> Iterator[tuple[int, list[PictureRow] | None]]:
        """The number of a shard and some of its rows; `None` after its last ones."""
        for number in numbers:
            if self.is_made(number):
                self.num_found += 1
                if self.config.drop_duplicates:
                    yield number, []  # in its turn, so that what comes after knows its pictures
                continue
            rows = self.parts[number].rows()
            while batch := [row for _, row in zip(range(self.config.batch_size), rows)]:
                yield number, batch
            yield number, None

    def is_made(self, number: int) -> bool:
        """Whether a shard is there, of whichever worker."""
        return all(is_written(folder, number, self.made_of(number)) for folder in self.folders.values())

    def made_of(self, number: int) -> dict:
        """What a shard is made of, and how."""
        names = (
            "low_size",
            "fine_size",
            "compression_rate",
            "fit",
            "seed",
            "held_out_share",
            "min_side",
            "max_aspect",
        )
        names += ("min_caption_length", "max_caption_length", "drop_duplicates")
        options = {name: getattr(self.config, name) for name in names}
        image_tokenizer = self.config.vqvae or self.config.like
        return {"image_tokenizer": image_tokenizer, **options, **self.parts[number].made_of()}

    def begin(self) -> None:
        """Have nothing of the next shard yet."""
        self.encoded: tuple[dict[str, torch.Tensor], list[Selected]] | None = None
        self.report: Counter = Counter(dict.fromkeys(REASONS, 0))
        self.own = {name: ({size: [] for size in self.sizes}, [], []) for name in self.folders}

    def add(self, number: int, chosen: list[tuple[Selected, list[torch.Tensor]]]) -> None:
        """Encode those of some pictures that are taken, given with their bytes in each size."""
        if not chosen:  # it is there already
            for folder in self.folders.values():
                self.seen.update(read_hashes(folder, number).tolist())
            return
        kept = []
        for one, pixels in chosen:
            self.report["rows"] += 1
            if one.reason is None and self.config.drop_duplicates and one.digest in self.seen:
                one.reason = "duplicates"
            if one.reason is not None:
                self.report[one.reason] += 1
                if one.problem is not None:
                    if not self.config.skip_unreadable:
                        raise ValueError(f"{one.problem} Repair or remove it, or leave such out by --skip_unreadable.")
                    logger.warning("Left out: %s", one.problem)
                continue
            if self.config.drop_duplicates:
                self.seen.add(one.digest)
            self.report["blank_captions"] += one.num_blank
            kept.append((one, pixels))
        if not kept:
            return
        encoded = {}
        for index, name in enumerate(self.sizes):
            batch = torch.stack([pixels[index] for _, pixels in kept]).to(self.config.device).float() / 255
            encoded[name] = self.vqvae.encode(batch, self.config.compression_rate).tokens
        self.keep()  # what the device encoded before, while it encodes this
        self.encoded = (encoded, [one for one, _ in kept])

    def keep(self) -> None:
        """Take the tokens of the last batch from the device."""
        if self.encoded is None:
            return
        (tokens_of_sizes, kept), self.encoded = self.encoded, None
        encoded = {name: values.cpu().numpy() for name, values in tokens_of_sizes.items()}
        for row, one in enumerate(kept):
            share = derived_seed(self.config.seed, "held out", one.digest) / 2**56
            tokens, texts, digests = self.own["held_out" if share < self.config.held_out_share else "train"]
            for name, values in encoded.items():
                tokens[name].append(values[row])
            texts.append(one.texts)
            digests.append(one.digest)
        self.num_pictures += len(kept)

    def end(self, number: int) -> None:
        """Have a shard written while the next one is encoded; the one before is there, so that memory holds two."""
        self.keep()
        self.written.result()
        self.written = self.writer.submit(self.write, number, self.own, self.report)
        self.num_made += 1
        self.begin()

    def write(self, number: int, own: dict, report: Counter) -> None:
        """Write what there is of a shard."""
        for name, folder in self.folders.items():
            tokens, texts, digests = own[name]
            write_shard(
                folder,
                number,
                {size: np.stack(values) for size, values in tokens.items() if values},
                texts,
                made_of=self.made_of(number),
                num_codes=self.vqvae.config.num_embeddings,
                report=report if name == "train" else {},
                picture_hashes=digests,
            )


if __name__ == "__main__":
    run_script(main)
