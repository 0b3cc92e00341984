"""
What the pages take for granted: files, models and names, and what stands in for what is not at hand.

A stage fills an empty folder. It gives back the names that the first block finds, and texts of the
page with what is run in their place.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.demo import Scene, render
from cogview_pipelines.environment import SHIPPED_MODEL

from .pages import run_command

Stage = tuple[dict, dict[str, str]]
STAGES: dict[str, Callable[[Path], Stage]] = {}
# fewer of the same, on every page
FEWER = {"--num 200": "--num 2", "--num-images 4": "--num-images 2"}
PROMPT = "a tiger on a blue background"


def stage(page: str):
    def register(function):
        STAGES[page] = function
        return function

    return register


def shipped_model(folder: Path, name: str) -> None:
    """The shipped model under another name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(SHIPPED_MODEL)


def shipped_pipe() -> CogView2Pipeline:
    pipe = CogView2Pipeline.from_pretrained(SHIPPED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_mask(size: tuple[int, int], path: Path) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    mask.save(path)


def save_lines(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@stage("README.md")
def readme(folder: Path) -> Stage:
    picture = render(Scene("noto", "blue", ("1f34e",)))
    picture.save(folder / "apple.png")
    save_mask(picture.size, folder / "mask.png")
    save_lines(folder / "prompts.jsonl", {"id": "tiger", "prompt": PROMPT, "seed": 7})
    return {}, {}


@stage("docs/captioning.md")
def captioning(folder: Path) -> Stage:
    shipped_model(folder, "path/to/model")
    save_clip(folder / "clip")
    return {}, {"openai/clip-vit-base-patch32": "clip"}


def save_clip(folder: Path) -> None:
    """A small random one."""
    from ..utils import make_clip

    model, processor = make_clip()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@stage("docs/cogview.md")
def cogview(folder: Path) -> Stage:
    from ..pipelines.conftest import build_cogview
    from ..utils_cogview import make_cogview_tokenizer

    (folder / "tokenizer").mkdir()
    build_cogview(make_cogview_tokenizer(folder / "tokenizer")).save_pretrained(folder / "cogview")
    return {}, {'"cuda"': '"cpu"', "torch.float16": "torch.float32"}


@stage("docs/command_line.md")
def command_line(folder: Path) -> Stage:
    run_command(["cogview2", "generate", PROMPT, "--seed", "7", "--output", "picture.png", "--quiet"])
    with Image.open(folder / "picture.png") as picture:
        picture.convert("RGB").save(folder / "other.jpg")
        picture.convert("RGB").resize((80, 80)).save(folder / "small.png")
        save_mask(picture.size, folder / "mask.png")
        for name in ("apple", "cat"):
            picture.save(folder / f"{name}.png")
    (folder / "mine.png").write_bytes((folder / "picture.png").read_bytes())
    shipped_model(folder, "my_model")
    save_lines(folder / "prompts.jsonl", {"id": "tiger", "prompt": PROMPT, "seed": 7})
    edit = {"id": "apple", "prompt": "a red apple on a blue background", "image": "apple.png", "mask": "mask.png"}
    save_lines(folder / "edits.jsonl", edit)
    save_lines(folder / "pictures.jsonl", {"id": "tiger", "image": "small.png"})
    save_lines(folder / "pairs.jsonl", {"id": "tiger", "image": "picture.png", "prompts": [PROMPT, "a red car"]})
    return {}, {}


@stage("docs/conversion.md")
def conversion(folder: Path) -> Stage:
    shipped_model(folder, "cogview2")
    return {}, {}


@stage("docs/evaluation.md")
def evaluation(folder: Path) -> Stage:
    objects = ("1f42f", "1f34e", "1f438", "1f436", "1f431", "1f680")
    colours = ("blue", "green", "red", "white")
    scenes = [Scene("noto", colour, (thing,)) for thing in objects for colour in colours]
    for name in ("pictures", "true_pictures"):
        (folder / name).mkdir()
        for number, scene in enumerate(scenes):
            render(scene, 64 if name == "pictures" else 80).save(folder / name / f"{number}.png")
    save_lines(folder / "captions.jsonl", *({"id": str(number), "caption": PROMPT} for number in range(len(scenes))))
    return {}, {"size=256, radii=(0, 1, 2)": "size=64, radii=(0, 1)"}


@stage("docs/lora.md")
def lora(folder: Path) -> Stage:
    from cogview_pipelines.loaders.textual_inversion import write_learned_token

    from ..loaders.conftest import random_adapter

    shipped_model(folder, "MODEL")
    pipe = shipped_pipe()
    for name, part in (("style", "transformer"), ("style_iterative", "iterative_sr_transformer")):
        random_adapter({part: getattr(pipe, part)}, folder / "runs" / name / "final", scale=0.01)
    row = pipe.transformer.get_input_embeddings().weight[pipe.tokenizer.encode("car")[0]]
    write_learned_token(folder / "runs/my_car/final", "<my-car>", row, "a red car")
    return {}, {}


@stage("docs/memory.md")
def memory(folder: Path) -> Stage:
    shipped_model(folder, "folder")
    return {}, {'device_map="cuda"': 'device_map="cpu"'}


@stage("docs/performance.md")
def performance(folder: Path) -> Stage:
    return {"pipe": shipped_pipe()}, {}


@stage("docs/sampling.md")
def sampling(folder: Path) -> Stage:
    return {"pipe": shipped_pipe(), "torch": torch}, {}


@stage("docs/sparse_attention.md")
def sparse_attention(folder: Path) -> Stage:
    from cogview_pipelines import CogViewConfig

    query, key, value = torch.randn(3, 1, 256, 2, 16).unbind(0)
    is_text = torch.arange(256)[None] < 40
    names = {"query": query, "key": key, "value": value, "is_text": is_text}
    return {**names, "generator": torch.Generator().manual_seed(1), "CogViewConfig": CogViewConfig}, {}


@stage("docs/text_to_image.md")
def text_to_image(folder: Path) -> Stage:
    return {}, {}


@stage("src/cogview_pipelines/demo/models/cogview2-emoji/README.md")
@stage("training_scripts/emoji/model_card.md")
def model_card(folder: Path) -> Stage:
    return {"FOLDER_OR_HUB_ID": SHIPPED_MODEL}, {}


@stage("docs/hub.md")
def hub(folder: Path) -> Stage:
    """In a process that knows the stand-in for the Hub alone, with the right to write below `someone/`."""
    from ..pipelines.conftest import build
    from ..utils import make_tokenizer

    (folder / "words").mkdir()
    pipe = build(make_tokenizer(folder / "words"))
    for options in ({}, {"revision": "v2"}, {"revision": "v2", "variant": "fp16"}):
        pipe.push_to_hub("someone/model", **options)
    return {}, {'"hf_..."': "True", "me/my-model": "someone/my-model"}
