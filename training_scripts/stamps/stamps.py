#!/usr/bin/env python
r"""
Photographs with texts in both languages, from a package that anyone can install, to teach the shipped model
(docs/photographs.md).

Pictures, captions and a model that knows their characters, from `apt-get install tuxpaint-stamps-default`:
    python training_scripts/stamps/stamps.py make --output_dir stamps
How many pictures a model draws right, of animals on backgrounds that it did not see them on:
    python training_scripts/stamps/stamps.py measure --data stamps --model my_animals --output_dir results
What can be reached with its image tokenizer:
    python training_scripts/stamps/stamps.py measure --data stamps --model my_animals --ceiling --output_dir ceiling
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from cogview_pipelines.demo.scenes import BACKGROUNDS
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.json_lines import write_lines

PACKAGE_FOLDER = Path("/usr/share/tuxpaint/stamps")
SIDE = 240  # pixels of a picture
SHARE = 0.8  # of the side, of the longer side of what is shown
MOST_WORDS = 3  # of an English text: names, no remarks
_NAME = re.compile(r"(?:an?|the|some) [a-z][a-z' -]*", re.IGNORECASE)


class Stamp(NamedTuple):
    """A cut-out photograph, and what it shows."""

    path: Path
    english: str
    chinese: str


def find_stamps(folder: Path, largest_file: int = 2**22) -> list[Stamp]:
    """
    Cut-outs whose texts are the name of a thing in both languages, one for each name in either.

    Args:
        folder: Where the package put them, or a part of it.
        largest_file: In bytes; larger files are left out.
    """
    found: dict[str, Stamp] = {}
    chinese_names: set[str] = set()
    for path in sorted(folder.rglob("*.png"), key=lambda path: (path.parent, path.stem)):
        text = path.with_suffix(".txt")
        if not text.is_file() or path.stat().st_size > largest_file:
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        names = dict(line.split(".utf8=", 1) for line in lines if ".utf8=" in line)
        english = (lines[0] if lines else "").strip(" .!").lower()
        chinese = names.get("zh_CN", "").strip(" 。！.!")
        chinese = re.sub(r"^一[只条头个匹群]", "", chinese)
        is_name = _NAME.fullmatch(english) and chinese and len(english.split()) <= MOST_WORDS
        if is_name and english not in found and chinese not in chinese_names:
            found[english] = Stamp(path, english, chinese)
            chinese_names.add(chinese)
    return list(found.values())


def compose(stamp: Stamp, colour: tuple[int, int, int], mirrored: bool = False) -> Image.Image:
    """The photograph in the middle of a picture of one colour."""
    with Image.open(stamp.path) as file:
        cut_out = file.convert("RGBA")
    if mirrored:
        cut_out = ImageOps.mirror(cut_out)
    cut_out = cut_out.crop(cut_out.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    scale = SHARE * SIDE / max(cut_out.size)
    cut_out = cut_out.resize([max(1, round(side * scale)) for side in cut_out.size], Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (SIDE, SIDE), colour)
    picture.alpha_composite(cut_out, ((SIDE - cut_out.width) // 2, (SIDE - cut_out.height) // 2))
    return picture.convert("RGB")


def captions(stamp: Stamp, background: str | None) -> dict[str, list[str]]:
    """What one would say of it; on a colour without a name, its name alone."""
    if background is None:
        return {"en": [stamp.english], "zh": [stamp.chinese]}
    colour = BACKGROUNDS[background].chinese
    return {
        "en": [f"{stamp.english} on a {background} background", f"{background} background, {stamp.english}"],
        "zh": [f"{stamp.chinese}，{colour}背景", f"{colour}背景，{stamp.chinese}"],
    }


def choose_stamps(args: argparse.Namespace) -> list[Stamp]:
    """So many of those that are there, evenly spread."""
    stamps = find_stamps(Path(args.stamps))
    count = min(args.num_things, len(stamps))
    return [stamps[index * len(stamps) // count] for index in range(count)]


def make(args: argparse.Namespace) -> None:
    """Write pictures, captions.jsonl for training, test.jsonl, and a model that knows the characters."""
    folder, rng = Path(args.output_dir), random.Random(args.seed)
    stamps = choose_stamps(args)
    if not stamps:
        raise SystemExit(f"{args.stamps} holds no stamps: apt-get install tuxpaint-stamps-default, or pass --stamps.")
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {"captions": [], "test": []}
    for index, stamp in enumerate(stamps):
        backgrounds = rng.sample(list(BACKGROUNDS), len(BACKGROUNDS))
        for number, background in enumerate(backgrounds):
            is_test = number >= args.num_backgrounds
            for mirrored in (False,) if is_test else (False, True):
                name = f"{index:03d}-{background}{'-mirrored' if mirrored else ''}.png"
                compose(stamp, BACKGROUNDS[background].rgb, mirrored).save(folder / name)
                texts = captions(stamp, background)
                if is_test:
                    first = {language: choices[0] for language, choices in texts.items()}
                    rows["test"].append({"file": name, "stamp": index, "background": background, **first})
                else:
                    rows["captions"].append({"file": name, **texts})
        for number in range(args.num_colours):
            name = f"{index:03d}-{number}.png"
            colour = rng.randrange(256), rng.randrange(256), rng.randrange(256)
            compose(stamp, colour, mirrored=number % 2 == 1).save(folder / name)
            rows["captions"].append({"file": name, **captions(stamp, None)})
    for name, own in rows.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            write_lines(file, own)
    added = widen(args.model, [text for stamp in stamps for text in stamp[1:]], folder / "model")
    print(f"{len(rows['captions'])} pictures of {len(stamps)} things in {folder}; {len(added)} characters are new")


def widen(model: str, texts: list[str], folder: Path) -> list[str]:
    """Save a model that is to learn the words of these texts; characters that it had no piece for are returned."""
    from cogview_pipelines import CogView2Pipeline

    pipe = CogView2Pipeline.from_pretrained(model)
    pipe.tokenizer.add_known_words(texts)
    unknown = sorted({part for text in texts for part in pipe.tokenizer.unknown_parts(text)})
    pipe.tokenizer.add_tokens(unknown)
    for name, component in pipe.components.items():
        if name.endswith("transformer") and component is not None:
            component.resize_token_embeddings(len(pipe.tokenizer))
    pipe.save_pretrained(folder)
    return unknown


def measure(args: argparse.Namespace) -> None:
    """Draw the test captions; of which photograph each picture is nearest is counted. One line of JSON."""
    import torch
    from diffusers.utils import make_image_grid

    from cogview_pipelines import CogView2Pipeline

    data, folder = Path(args.data), Path(args.output_dir)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = random.Random(args.seed).sample(rows, min(args.num, len(rows)))
    stamps = choose_stamps(args)
    pipe = CogView2Pipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict = {"pictures": len(rows), "of": len(stamps), "model": Path(args.model).name, "low": args.low}
    height = pipe.sizes[0 if args.low else -1][0]
    truth = [Image.open(data / row["file"]).convert("RGB") for row in rows]
    for language in ("ceiling",) if args.ceiling else ("en", "zh"):
        if args.ceiling:
            images = [through_tokens(pipe, image, height) for image in truth]
        else:
            generators = [torch.Generator().manual_seed(index) for index in range(len(rows))]
            prompts = [row[language] for row in rows]
            images = pipe(prompts, generator=generators, height=height, max_batch_size=16).images
        result[language] = read(images, rows, stamps)
        shown = [image.resize((height, height)) for pair in zip(truth[:6], images[:6]) for image in pair]
        make_image_grid(shown, rows=len(shown) // 2, cols=2).save(folder / f"{language}.png")
    print(json.dumps(result, ensure_ascii=False))


def through_tokens(pipe, image: Image.Image, height: int) -> Image.Image:
    """A true picture as the image tokenizer keeps it."""
    import torch

    pixels = torch.from_numpy(np.array(image.resize((height, height), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    with torch.no_grad():
        rate = pipe.config.compression_rate
        tokens = pipe.vqvae.encode(pixels[None].float() / 255, rate).tokens
        decoded = pipe.vqvae.decode(tokens, rate).sample[0]
    return Image.fromarray((decoded.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def read(images: list[Image.Image], rows: list[dict], stamps: list[Stamp]) -> dict[str, float]:
    """
    Shares of the pictures that are nearer to their photograph than to all others (on their own background, mirrored
    or not, by squared error at 40 x 40 pixels), among the five nearest, and whose border has the colour asked for.
    """
    references = {
        background: np.stack(
            [
                [small(compose(stamp, BACKGROUNDS[background].rgb, mirrored)) for mirrored in (False, True)]
                for stamp in stamps
            ]
        )
        for background in sorted({row["background"] for row in rows})
    }
    right, among_five, ground = 0, 0, 0
    for image, row in zip(images, rows, strict=True):
        pixels = small(image)
        distances = np.square(references[row["background"]] - pixels).mean((2, 3, 4)).min(1)
        order = distances.argsort()
        right += order[0] == row["stamp"]
        among_five += row["stamp"] in order[:5]
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colour = np.median(border, axis=0)
        nearest = min(BACKGROUNDS, key=lambda name: np.square(colour - BACKGROUNDS[name].rgb).sum())
        ground += nearest == row["background"]
    shares = {"right": right, "among_five": among_five, "background": ground}
    return {name: round(count / len(rows), 3) for name, count in shares.items()}


def small(image: Image.Image) -> np.ndarray:
    """`(40, 40, 3)` values in 0..255."""
    return np.array(image.convert("RGB").resize((40, 40), Image.Resampling.BOX), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("make", make), ("measure", measure)):
        command = commands.add_parser(name, help=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument(
            "--stamps", default=str(PACKAGE_FOLDER / "animals"), help="Where the package put them, or a part of it."
        )
        command.add_argument("--num_things", type=int, default=24, help="How many of them.")
        command.add_argument("--output_dir", required=True, help="Folder to write to.")
        command.add_argument("--seed", type=int, default=0, help="Of backgrounds, and of what is measured.")
    making, measuring = commands.choices["make"], commands.choices["measure"]
    making.add_argument(
        "--num_backgrounds",
        type=int,
        default=9,
        help=f"So many of the {len(BACKGROUNDS)} backgrounds are for training, each photograph as it is and mirrored.",
    )
    making.add_argument(
        "--num_colours",
        type=int,
        default=12,
        help="Further pictures of each thing, on colours by chance, with its name alone: so that the model tells the "
        "thing from what is behind it.",
    )
    making.add_argument("--model", default=str(SHIPPED_MODEL), help="Folder or Hub id of the model to begin with.")
    measuring.add_argument("--data", required=True, help="The folder that `make` wrote.")
    measuring.add_argument("--model", required=True, help="Folder or Hub id of a pipeline.")
    measuring.add_argument("--num", type=int, default=40, help="At most so many captions.")
    measuring.add_argument("--low", action="store_true", help="Only the low-resolution pictures.")
    measuring.add_argument("--ceiling", action="store_true", help="True pictures, encoded and decoded, instead.")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
