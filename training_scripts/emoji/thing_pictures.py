#!/usr/bin/env python
r"""
Twenty pictures of a thing to teach a model, and the measure of what it learned (docs/lora.md).

Twenty pictures of a heart, which the shipped model cannot draw, alone and with things that it knows:
    python training_scripts/emoji/thing_pictures.py make --output_dir heart_pictures
What the model makes of it where it was not shown, and of what it knew, without and with an adapter:
    python training_scripts/emoji/thing_pictures.py measure --output_dir before
    python training_scripts/emoji/thing_pictures.py measure --lora my_heart --output_dir after
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

from cogview_pipelines.demo import LANGUAGES, Scene, Scope, Scorer, captions, is_usable, render
from cogview_pipelines.demo.scenes import BACKGROUNDS, RELATIONS, STYLES, load_concepts
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.json_lines import write_lines

NUM_BACKGROUNDS = 6  # on which the thing is shown alone; the others are for measuring
NUM_COMPANIONS = 14  # in one picture each


class Plan(NamedTuple):
    """Scenes to learn from, and others to measure by."""

    learned: list[Scene]
    new_backgrounds: list[Scene]
    new_companions: list[Scene]
    without_it: list[Scene]


def plan(thing: str, style: str, seed: int) -> Plan:
    """The same scenes for the same arguments: what is measured was not learned."""
    rng, known = random.Random(seed), list(Scope.small().concepts)
    rng.shuffle(known)

    def scenes(objects: tuple[str, ...], relation: str | None = None) -> list[Scene]:
        found = [Scene(style, background, objects, relation) for background in BACKGROUNDS]
        found = [scene for scene in found if is_usable(scene)]
        rng.shuffle(found)
        return found

    alone = scenes((thing,))
    shown = {scene.background for scene in alone[:NUM_BACKGROUNDS]}

    def company(others: list[str], is_new: bool) -> list[Scene]:
        """With each of these things in turn, on backgrounds that the thing is shown on alone, or on new ones."""
        found, relations = [], itertools.cycle(RELATIONS)
        for other in others:
            all_of_them = scenes((thing, other), next(relations))
            found.append(next(scene for scene in all_of_them if (scene.background in shown) is not is_new))
        return found

    return Plan(
        alone[:NUM_BACKGROUNDS] + company(known[:NUM_COMPANIONS], False),
        alone[NUM_BACKGROUNDS:],
        company(known[NUM_COMPANIONS:] * 2, True),
        [scenes((other,))[0] for other in known],
    )


def make(args: argparse.Namespace) -> None:
    """Write pictures and captions.jsonl."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(plan(args.thing, args.style, args.seed).learned):
        name = f"{number:02d}.png"
        render(scene).save(folder / name)
        rows.append({"file": name, **{language: captions(scene, language) for language in LANGUAGES}})
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        write_lines(file, rows)
    print(f"{len(rows)} pictures in {folder}")


def measure(args: argparse.Namespace) -> None:
    """Draw scenes that were not learned, and read the pictures; one line of JSON."""
    import torch
    from diffusers.utils import make_image_grid

    from cogview_pipelines import CogView2Pipeline

    scope, folder = Scope.small(), Path(args.output_dir)
    concepts = tuple(dict.fromkeys((*scope.concepts, args.thing)))
    scorer = Scorer(Scope(concepts, tuple(STYLES), tuple(BACKGROUNDS), ("single", "pair")))
    pipe = CogView2Pipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
        pipe.fuse_lora(lora_scale=args.scale)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict = {"lora": args.lora and Path(args.lora).name, "scale": args.scale}
    for name, scenes in plan(args.thing, args.style, args.seed)._asdict().items():
        if name == "learned":
            continue
        prompts = [captions(scene, "en")[0] for scene in scenes]
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        images = pipe(prompts, generator=generators, max_batch_size=16).images
        result[name] = {key: round(value, 3) for key, value in scorer.mean(images, scenes).items()}
        result[name]["pictures"] = len(images)
        few = images[: min(len(images), args.num_shown)]
        make_image_grid(few, rows=1, cols=len(few)).save(folder / f"{name}.png")
    print(json.dumps(result, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("make", make), ("measure", measure)):
        command = commands.add_parser(name, help=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument(
            "--thing", default="2764", choices=list(load_concepts()), metavar="HEXCODE", help="Which; a red heart."
        )
        command.add_argument("--style", default="twemoji", choices=list(STYLES), help="Which drawing of it.")
        command.add_argument("--output_dir", required=True, help="Folder to write to.")
        command.add_argument("--seed", type=int, default=0, help="Of scenes.")
    measuring = commands.choices["measure"]
    measuring.add_argument("--model", default=str(SHIPPED_MODEL), help="Folder or Hub id of a pipeline.")
    measuring.add_argument("--lora", help="Folder or file of an adapter.")
    measuring.add_argument("--scale", type=float, default=1.0, help="By how much the adapter counts.")
    measuring.add_argument("--num_shown", type=int, default=5, help="Pictures in each of the grids.")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
