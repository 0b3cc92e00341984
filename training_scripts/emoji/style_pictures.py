#!/usr/bin/env python
r"""
Pictures of a drawing style to teach a model, and the measure of what it learned (docs/style_learning.md).

Two hundred pictures of half of the things that the shipped model knows, in a style that it has never seen:
    python training_scripts/emoji/style_pictures.py make --style flat --output_dir flat_pictures
What the model makes of the other half, without and with an adapter:
    python training_scripts/emoji/style_pictures.py measure --style flat --lora my_style --output_dir flat_results
"""

import argparse
import json
import random
from pathlib import Path

from cogview_pipelines.demo import Scene, Scope, Scorer, load_concepts, render
from cogview_pipelines.demo.captions.templates import with_article
from cogview_pipelines.demo.scenes import BACKGROUNDS, STYLES
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.json_lines import write_lines


def halves(scope: Scope) -> tuple[list[str], list[str]]:
    """The things whose pictures are trained on, and those that the style is to reach without."""
    return list(scope.concepts[::2]), list(scope.concepts[1::2])


def visible_backgrounds(hexcode: str, style: str) -> list[str]:
    """Those on which a drawing can be seen well."""
    return [name for name in BACKGROUNDS if name not in load_concepts()[hexcode].hidden.get(style, ())]


def names_of_style(style: str) -> dict[str, str]:
    """CogView's sentence for a style, without a word of what is drawn."""
    return {"en": f"an image of {STYLES[style].english} style", "zh": f"{STYLES[style].chinese}风格的图片"}


def describe(hexcode: str, style: str, background: str) -> dict[str, str]:
    """What is drawn, on what, in which style."""
    concept = load_concepts()[hexcode]
    english, chinese = STYLES[style].english, STYLES[style].chinese
    return {
        "en": f"{with_article(concept.noun)} on a {background} background, {english} style",
        "zh": f"{concept.noun_zh}，{BACKGROUNDS[background].chinese}背景，{chinese}风格",
    }


def make(args: argparse.Namespace) -> None:
    """Write pictures and captions.jsonl."""
    folder, rng = Path(args.output_dir), random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    things, _ = halves(Scope.small())
    rows = []
    for index in range(args.num):
        hexcode = things[index % len(things)]
        background = rng.choice(visible_backgrounds(hexcode, args.style))
        name = f"{index:03d}.png"
        render(Scene(args.style, background, (hexcode,)), 240).save(folder / name)
        texts = {"named": [names_of_style(args.style)], "described": [describe(hexcode, args.style, background)]}
        chosen = [text for kind, own in texts.items() if args.captions in (kind, "both") for text in own]
        rows.append({"file": name, **{language: [text[language] for text in chosen] for language in ("en", "zh")}})
    for index in range(args.num_known):
        scope = Scope.small()
        style, hexcode = scope.styles[index % len(scope.styles)], rng.choice(scope.concepts)
        background = rng.choice(visible_backgrounds(hexcode, style))
        name = f"known-{index:03d}.png"
        render(Scene(style, background, (hexcode,)), 240).save(folder / name)
        rows.append({"file": name, **describe(hexcode, style, background)})
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        write_lines(file, rows)
    print(f"{len(rows)} pictures in {folder}, {args.num} of them of {len(things)} things in the new style")


def measure(args: argparse.Namespace) -> None:
    """Draw things in the style and read the pictures; one line of JSON."""
    import torch

    from cogview_pipelines import CogView2Pipeline

    scope = Scope.small()
    scorer = Scorer(Scope(scope.concepts, tuple(STYLES), tuple(BACKGROUNDS), ("single",)))
    pipe = CogView2Pipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
        pipe.fuse_lora(lora_scale=args.scale)
    results, folder = (
        {"style": args.style, "lora": args.lora and Path(args.lora).name, "scale": args.scale},
        Path(args.output_dir),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, things in zip(("seen_things", "unseen_things"), halves(scope)):
        rng = random.Random(args.seed)
        scenes = [
            Scene(args.style, rng.choice(visible_backgrounds(hexcode, args.style)), (hexcode,))
            for hexcode in things
            for _ in range(args.num_each)
        ]
        prompts = [describe(scene.objects[0], scene.style, scene.background)["en"] for scene in scenes]
        generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        height = pipe.sizes[0 if args.low else -1][0]
        images = pipe(prompts, generator=generators, height=height, style="none").images
        results[name] = {key: round(value, 3) for key, value in scorer.mean(images, scenes).items()}
        results[name]["pictures"] = len(images)
        save_grid(images, folder / f"{name}.png", args.num_each)
    print(json.dumps(results, ensure_ascii=False))


def save_grid(images: list, path: Path, columns: int) -> None:
    from diffusers.utils import make_image_grid

    make_image_grid(images, rows=len(images) // columns, cols=columns).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("make", make), ("measure", measure)):
        command = commands.add_parser(name, help=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument("--style", default="flat", choices=list(STYLES), help="Which drawings.")
        command.add_argument("--output_dir", required=True, help="Folder to write to.")
        command.add_argument("--seed", type=int, default=0, help="Of backgrounds.")
    making, measuring = commands.choices["make"], commands.choices["measure"]
    making.add_argument("--num", type=int, default=200, help="How many pictures.")
    making.add_argument(
        "--num_known",
        type=int,
        default=0,
        help="So many more of all things in the styles that the model knows, so that it keeps them apart.",
    )
    making.add_argument(
        "--captions",
        choices=["named", "described", "both"],
        default="both",
        help="named: 'an image of flat style' alone, as CogView does; described: what is drawn; both.",
    )
    measuring.add_argument("--model", default=str(SHIPPED_MODEL), help="Folder or Hub id of a pipeline.")
    measuring.add_argument("--lora", help="Folder or file of an adapter.")
    measuring.add_argument("--scale", type=float, default=1.0, help="By how much the adapter counts.")
    measuring.add_argument("--num_each", type=int, default=4, help="Pictures of each thing.")
    measuring.add_argument("--low", action="store_true", help="Only the low-resolution pictures.")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
