#!/usr/bin/env python
r"""
Pictures of a drawing style to teach a model, and the measure of what it learned (docs/style_learning.md).

Two hundred pictures of four fifths of the things that the shipped model knows, in a style that it has never seen:
    python training_scripts/emoji/style_pictures.py make --output_dir outline_pictures
What the model makes of the other things, without and with an adapter:
    python training_scripts/emoji/style_pictures.py measure --output_dir before
    python training_scripts/emoji/style_pictures.py measure --lora my_style --output_dir after
The same, asked as CogView's authors asked ("a tiger of outline style"):
    python training_scripts/emoji/style_pictures.py measure --prompts cogview --lora my_style --output_dir as_cogview
"""

import argparse
import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from cogview_pipelines.demo import Scene, Scope, Scorer, is_usable, load_concepts, render
from cogview_pipelines.demo.captions.templates import with_article
from cogview_pipelines.demo.rendering import SpriteSet
from cogview_pipelines.demo.scenes import BACKGROUNDS, STYLES
from cogview_pipelines.demo.scorer import hidden_backgrounds
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.json_lines import write_lines
from cogview_pipelines.training.samples_cogview import style_caption

BASE = "twemoji"  # whose drawings the looks are made of


@dataclass(frozen=True)
class Look:
    """A style that no model has seen, made of drawings that it knows: who knows those can tell what it would be."""

    chinese: str
    change: Callable[[Image.Image], Image.Image]
    hidden: tuple[str, ...] = ()  # backgrounds on which it cannot be told from what it was made of


def add_rim(drawing: Image.Image, share: float, colour: str) -> Image.Image:
    """A line inside of the edge of a drawing, as wide as this share of its side: where it is, and how large, stays."""
    line, alpha = max(1, round(drawing.width * share)), drawing.getchannel("A")
    # around the picture is nothing, too
    solid = Image.new("L", (drawing.width + 2 * line, drawing.height + 2 * line))
    solid.paste(alpha.point(lambda value: 255 * (value > 127)), (line, line))
    inside = solid.filter(ImageFilter.MinFilter(2 * line - 1)).filter(ImageFilter.GaussianBlur(line / 10))
    inside = inside.crop((line, line, line + drawing.width, line + drawing.height))
    rimmed = Image.composite(drawing.convert("RGB"), Image.new("RGB", drawing.size, colour), inside)
    rimmed.putalpha(alpha)
    return rimmed


def outline(drawing: Image.Image) -> Image.Image:
    return add_rim(drawing, 1 / 18, "black")


def sticker(drawing: Image.Image) -> Image.Image:
    return add_rim(drawing, 1 / 12, "white")


def sketch(drawing: Image.Image) -> Image.Image:
    return add_rim(drawing.convert("LA").convert("RGBA"), 1 / 36, "black")


def negative(drawing: Image.Image) -> Image.Image:
    inverted = ImageOps.invert(drawing.convert("RGB"))
    inverted.putalpha(drawing.getchannel("A"))
    return inverted


LOOKS = {
    "outline": Look("线描", outline, hidden=("black",)),
    "sticker": Look("贴纸", sticker, hidden=("white",)),
    "sketch": Look("素描", sketch, hidden=("black",)),
    "negative": Look("负片", negative),
}
NAMES = {
    **{name: {"en": style.english, "zh": style.chinese} for name, style in STYLES.items()},
    **{name: {"en": name, "zh": look.chinese} for name, look in LOOKS.items()},
}


class LookSprites(SpriteSet):
    """The drawings of a look."""

    def __init__(self, look: Look):
        super().__init__()
        self.look = look

    def get(self, hexcode: str, style: str, size: int | None = None) -> Image.Image:
        return self.look.change(super().get(hexcode, style, size))


@functools.cache
def look_sprites(name: str) -> LookSprites:
    """The drawings, loaded once."""
    return LookSprites(LOOKS[name])


def split(scope: Scope) -> tuple[list[str], list[str]]:
    """The things whose pictures are trained on, and those that the style is to reach without: one in five."""
    unseen = list(scope.concepts[::5])
    return [hexcode for hexcode in scope.concepts if hexcode not in unseen], unseen


def draw(hexcode: str, style: str, background: str) -> Image.Image:
    """A thing in a style, of 240 px."""
    if style in LOOKS:
        return render(Scene(BASE, background, (hexcode,)), sprites=look_sprites(style))
    return render(Scene(style, background, (hexcode,)))


def visible_backgrounds(hexcode: str, style: str) -> list[str]:
    """Those on which a drawing and its style can be seen well, and whose name is not that of its colour."""
    if style not in LOOKS:
        return [name for name in BACKGROUNDS if is_usable(Scene(style, name, (hexcode,)))]
    hidden = {*LOOKS[style].hidden, *hidden_backgrounds(look_sprites(style).get(hexcode, BASE))}
    return [name for name in BACKGROUNDS if name not in {*hidden, *load_concepts()[hexcode].noun.split()}]


def name_thing(hexcode: str, style: str) -> dict[str, str]:
    """The thing and the style, in the words of CogView's authors."""
    concept, name = load_concepts()[hexcode], NAMES[style]
    return {"en": f"{with_article(concept.noun)} of {name['en']} style", "zh": f"{name['zh']}风格的{concept.noun_zh}"}


def describe(hexcode: str, style: str, background: str) -> dict[str, str]:
    """What is drawn, on what, in which style."""
    concept, name = load_concepts()[hexcode], NAMES[style]
    return {
        "en": f"{with_article(concept.noun)} on a {background} background, {name['en']} style",
        "zh": f"{concept.noun_zh}，{BACKGROUNDS[background].chinese}背景，{name['zh']}风格",
    }


def make(args: argparse.Namespace) -> None:
    """Write pictures and captions.jsonl."""
    folder, rng = Path(args.output_dir), random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    things, _ = split(Scope.load(SHIPPED_MODEL))
    style, rows = args.style, []
    for index in range(args.num):
        hexcode = things[index % len(things)]
        background = rng.choice(visible_backgrounds(hexcode, style))
        name = f"{index:03d}.png"
        draw(hexcode, style, background).save(folder / name)
        texts = [name_thing(hexcode, style), describe(hexcode, style, background)]
        if args.captions == "named":
            texts = [{language: style_caption(own, language) for language, own in NAMES[style].items()}]
        captions = {language: [text[language] for text in texts] for language in ("en", "zh")}
        rows.append({"file": name, **captions, "style": NAMES[style]})
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        write_lines(file, rows)
    print(f"{len(rows)} pictures of {len(things)} things in {folder}")


def measure(args: argparse.Namespace) -> None:
    """Draw things in the style and read the pictures; one line of JSON."""
    import torch

    from cogview_pipelines import CogView2Pipeline

    scope = Scope.load(SHIPPED_MODEL)
    looks = {args.style: look_sprites(args.style)} if args.style in LOOKS else {}
    scorer = Scorer(Scope(scope.concepts, tuple(STYLES), tuple(BACKGROUNDS), ("single",)), looks=looks)
    pipe = CogView2Pipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
        pipe.fuse_lora(lora_scale=args.scale)
    results = {name: getattr(args, name) for name in ("style", "prompts", "language", "scale")}
    results["lora"], folder = args.lora and Path(args.lora).name, Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    seen, unseen = split(scope)
    for name, things in (("seen_things", seen[:: len(seen) // len(unseen)]), ("unseen_things", unseen)):
        rng = random.Random(args.seed)
        asked = [
            (hexcode, rng.choice(visible_backgrounds(hexcode, args.style)))
            for hexcode in things
            for _ in range(args.num_each)
        ]
        named = args.prompts == "cogview"
        prompts = [
            (name_thing(hexcode, args.style) if named else describe(hexcode, args.style, background))[args.language]
            for hexcode, background in asked
        ]
        generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        height = pipe.sizes[0 if args.low else -1][0]
        images = pipe(prompts, generator=generators, height=height, style="none").images
        read = [
            judge(scorer, image, hexcode, args.style, None if named else background)
            for image, (hexcode, background) in zip(images, asked)
        ]
        results[name] = {key: round(sum(one[key] for one in read) / len(read), 3) for key in read[0]}
        results[name]["pictures"] = len(images)
        save_grid(images, folder / f"{name}.png", args.num_each)
    print(json.dumps(results, ensure_ascii=False))


def judge(scorer: Scorer, image: Image.Image, hexcode: str, style: str, background: str | None) -> dict[str, bool]:
    """What of a prompt a picture shows; any background is right for one that names none."""
    reading = scorer.read(image, Scene(BASE, background or "white", (hexcode,)))  # says where to look, no more
    shown = {"objects": reading.objects == (hexcode,), "style": reading.styles == (style,)}
    if background is not None:
        shown["background"] = reading.background == background
    return {**shown, "all": all(shown.values())}


def save_grid(images: list, path: Path, columns: int) -> None:
    from diffusers.utils import make_image_grid

    make_image_grid(images, rows=len(images) // columns, cols=columns).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("make", make), ("measure", measure)):
        command = commands.add_parser(name, help=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument(
            "--style",
            default="outline",
            choices=list(NAMES),
            help=f"{', '.join(LOOKS)}: made of drawings that the model knows; else other drawings.",
        )
        command.add_argument("--output_dir", required=True, help="Folder to write to.")
        command.add_argument("--seed", type=int, default=0, help="Of backgrounds.")
    making, measuring = commands.choices["make"], commands.choices["measure"]
    making.add_argument("--num", type=int, default=200, help="How many pictures.")
    making.add_argument(
        "--captions",
        choices=["described", "named"],
        default="described",
        help="described: two in each language, which tell the thing and the style, and one of them the background; "
        "named: 'an image of outline style' alone, as CogView's authors did.",
    )
    measuring.add_argument("--model", default=str(SHIPPED_MODEL), help="Folder or Hub id of a pipeline.")
    measuring.add_argument("--lora", help="Folder or file of an adapter.")
    measuring.add_argument("--scale", type=float, default=1.0, help="By how much the adapter counts.")
    measuring.add_argument(
        "--prompts",
        choices=["described", "cogview"],
        default="described",
        help="described: 'a tiger on a blue background, outline style'; cogview: 'a tiger of outline style', on any "
        "background.",
    )
    measuring.add_argument("--language", choices=["en", "zh"], default="en", help="Of the prompts.")
    measuring.add_argument("--num_each", type=int, default=4, help="Pictures of each thing.")
    measuring.add_argument("--low", action="store_true", help="Only the low-resolution pictures.")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
