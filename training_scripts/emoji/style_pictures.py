#!/usr/bin/env python
r"""
Pictures of a drawing style to teach a model, and the measure of what it learned (docs/style_learning.md).

Two hundred pictures of half of the things that the shipped model knows, in a style that it has never seen:
    python training_scripts/emoji/style_pictures.py make --style flat --output_dir flat_pictures
What the model makes of the other half, without and with an adapter:
    python training_scripts/emoji/style_pictures.py measure --style flat --lora my_style --output_dir flat_results
The same, asked as CogView's authors asked ("a tiger of flat style"):
    python training_scripts/emoji/style_pictures.py measure --prompts cogview --lora my_style --output_dir as_cogview
"""

import argparse
import json
import random
from pathlib import Path

from cogview_pipelines.demo import Request, Scene, Scope, Scorer, load_concepts, render
from cogview_pipelines.demo.captions.templates import with_article
from cogview_pipelines.demo.scenes import BACKGROUNDS, STYLES
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.json_lines import write_lines
from cogview_pipelines.training.samples_cogview import style_caption


def halves(scope: Scope) -> tuple[list[str], list[str]]:
    """The things whose pictures are trained on, and those that the style is to reach without."""
    return list(scope.concepts[::2]), list(scope.concepts[1::2])


def visible_backgrounds(hexcode: str, style: str) -> list[str]:
    """Those on which a drawing can be seen well."""
    return [name for name in BACKGROUNDS if name not in load_concepts()[hexcode].hidden.get(style, ())]


def names_of_style(style: str) -> dict[str, str]:
    """What a style is called."""
    return {"en": STYLES[style].english, "zh": STYLES[style].chinese}


def describe(hexcode: str, style: str, background: str) -> dict[str, str]:
    """What is drawn, on what, in which style."""
    concept = load_concepts()[hexcode]
    english, chinese = STYLES[style].english, STYLES[style].chinese
    return {
        "en": f"{with_article(concept.noun)} on a {background} background, {english} style",
        "zh": f"{concept.noun_zh}，{BACKGROUNDS[background].chinese}背景，{chinese}风格",
    }


def ask(scene: Scene, form: str) -> tuple[str, Request]:
    """A prompt, described as in training or in CogView's form, and what of the scene it says."""
    if form == "described":
        return describe(scene.objects[0], scene.style, scene.background)["en"], Request.of(scene)
    noun = with_article(load_concepts()[scene.objects[0]].noun)
    return f"{noun} of {STYLES[scene.style].english} style", Request(scene.objects, style=scene.style)


def make(args: argparse.Namespace) -> None:
    """Write pictures and captions.jsonl."""
    folder, rng = Path(args.output_dir), random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    things, _ = halves(Scope.small())
    rows, names = [], names_of_style(args.style)
    of_style = {language: style_caption(own, language) for language, own in names.items()}
    for index in range(args.num):
        hexcode = things[index % len(things)]
        background = rng.choice(visible_backgrounds(hexcode, args.style))
        name = f"{index:03d}.png"
        render(Scene(args.style, background, (hexcode,)), 240).save(folder / name)
        texts = {"named": of_style, "described": describe(hexcode, args.style, background)}
        chosen = [text for kind, text in texts.items() if args.captions in (kind, "both")]
        captions = {language: [text[language] for text in chosen] for language in ("en", "zh")}
        rows.append({"file": name, **captions, "style": names})
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
    results = {name: getattr(args, name) for name in ("style", "prompts", "scale")}
    results["lora"], folder = args.lora and Path(args.lora).name, Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, things in zip(("seen_things", "unseen_things"), halves(scope)):
        rng = random.Random(args.seed)
        scenes = [
            Scene(args.style, rng.choice(visible_backgrounds(hexcode, args.style)), (hexcode,))
            for hexcode in things
            for _ in range(args.num_each)
        ]
        prompts, requests = zip(*(ask(scene, args.prompts) for scene in scenes))
        generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        height = pipe.sizes[0 if args.low else -1][0]
        images = pipe(list(prompts), generator=generators, height=height, style="none").images
        read = [scorer.judge(*one) for one in zip(images, requests, scenes)]
        results[name] = {key: round(sum(one[key] for one in read) / len(read), 3) for key in read[0]}
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
    measuring.add_argument(
        "--prompts",
        choices=["described", "cogview"],
        default="described",
        help="described: 'a tiger on a blue background, flat style'; cogview: 'a tiger of flat style', on any "
        "background.",
    )
    measuring.add_argument("--num_each", type=int, default=4, help="Pictures of each thing.")
    measuring.add_argument("--low", action="store_true", help="Only the low-resolution pictures.")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
