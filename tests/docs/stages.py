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
from cogview_pipelines.conversion.cogview2.to_pipeline import released_styles
from cogview_pipelines.demo import Scene, render
from cogview_pipelines.environment import SHIPPED_MODEL, SHIPPED_MODELS

from .pages import run_command, run_script

Stage = tuple[dict, dict[str, str]]
STAGES: dict[str, Callable[[Path], Stage]] = {}
# fewer of the same, on every page
FEWER = {"--num 200": "--num 2", "--num-images 4": "--num-images 2"}
FEW_STEPS = {
    **{f"--max_steps {number}": "--max_steps 2" for number in (200, 300, 500, 1000, 2000, 20000)},
    **{f"--warmup_steps {number}": "--warmup_steps 1" for number in (15, 20, 2000)},
    "--decay_steps 150": "--decay_steps 1",
    "--batch_size 16": "--batch_size 2",
}
FEW_STEPS = dict(
    sorted(FEW_STEPS.items(), key=lambda one: -len(one[0]))
)  # "--max_steps 20000" before "--max_steps 200"
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


def tiny_model(folder: Path) -> None:
    """A pipeline of all stages with random weights."""
    from ..pipelines.conftest import build
    from ..utils import make_tokenizer

    (folder / "words").mkdir()
    build(make_tokenizer(folder / "words"), shares_backbone=True, whole_pictures=True).save_pretrained(
        folder / "MODEL"
    )


def tiny_cogview(folder: Path) -> None:
    """A pipeline of the first CogView with random weights, and no model that only describes, as the shipped one."""
    from ..pipelines.conftest import build_cogview
    from ..utils_cogview import make_cogview_tokenizer

    (folder / "pieces").mkdir()
    pipe = build_cogview(make_cogview_tokenizer(folder / "pieces"))
    pipe.register_modules(caption_transformer=None)
    pipe.save_pretrained(folder / "COGVIEW")


def save_pictures(folder: Path, word: str = "car") -> None:
    """Twelve of them, with captions."""
    folder.mkdir()
    colours = {"red": "红色", "green": "绿色", "blue": "蓝色"}
    rows = []
    for number in range(12):
        colour, chinese = list(colours.items())[number % 3]
        Image.new("RGB", (96, 96), colour).save(folder / f"{number}.png")
        rows.append({"file": f"{number}.png", "en": f"a {word} on a {colour} background.", "zh": f"{chinese}背景。"})
    save_lines(folder / "captions.jsonl", *rows)


@stage("docs/training.md")
@stage("docs/zh/training.md")
def training(folder: Path) -> Stage:
    tiny_model(folder)
    tiny_cogview(folder)
    save_pictures(folder / "PICTURES")
    few = "--model MODEL --steps 2 --batch-size 2"
    large = '{"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16}'
    return {}, {
        "finetune PICTURES --output my_model ": f"finetune PICTURES {few} --output my_finetuned_model ",
        "finetune PICTURES --lora": f"finetune PICTURES {few} --lora",
        "--model COGVIEW --output": "--model COGVIEW --steps 2 --batch-size 2 --output",
        f"'{large}'": "'" + json.dumps({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}) + "'",
        " --mixed_precision fp16 --loss_scale_patience 2": "",
        "--resolution 240": "--resolution 96",
        "--resolutions 240": "--resolutions 96",
        "runs/vq_decoder/final --output_dir my_model": "runs/vq_decoder/final --output_dir my_decoder",
        **FEW_STEPS,
    }


@stage("docs/style_learning.md")
def style_learning(folder: Path) -> Stage:
    (folder / "COGVIEW").symlink_to(SHIPPED_MODELS["cogview-emoji"])
    few = {"make --output_dir": "make --num 6 --output_dir", "measure": "measure --low --num_each 1"}
    few |= {"make --style": "make --num 6 --style", "make --captions": "make --num 6 --captions"}
    steps = dict.fromkeys(("--steps 120 --batch-size 8", "--steps 200 --batch-size 4"), "--steps 2 --batch-size 2")
    return {}, {**few, **steps, "_pictures --lora-rank": "_pictures --stage coglm --lora-rank"}


@stage("docs/new_thing.md")
def new_thing(folder: Path) -> Stage:
    return {}, {"--steps 100 --batch-size 8": "--stage coglm --steps 2 --batch-size 2"}


@stage("docs/photographs.md")
def photographs(folder: Path) -> Stage:
    from ..training_scripts.test_stamps import save_stamps

    save_stamps(folder / "package" / "animals")
    few = "--max_steps 2 --warmup_steps 1 --decay_steps 1 --batch_size 2"
    here, configs = "training_scripts/stamps", Path(__file__).parents[2] / "training_scripts" / "stamps"
    return {}, {
        "stamps.py make": "stamps.py make --stamps package --num_colours 1",
        "stamps.py measure --num 48": "stamps.py measure --stamps package --num 2",
        **{f"{here}/{name}.yaml": f"{configs}/{name}.yaml {few}" for name in ("coglm", "direct_sr", "iterative_sr")},
        f"{here}/vq_decoder.yaml": f"{configs}/vq_decoder.yaml --max_steps 2 --batch_size 2",
    }


@stage("docs/command_line.md")
def command_line(folder: Path) -> Stage:
    tiny_model(folder)
    save_pictures(folder / "PICTURES")
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
    few = "--model MODEL --steps 2 --batch-size 2"
    return {}, {
        "finetune PICTURES --output my_model": f"finetune PICTURES {few} --output my_finetuned_model",
        "finetune PICTURES --lora": f"finetune PICTURES {few} --lora",
    }


@stage("docs/conversion.md")
def conversion(folder: Path) -> Stage:
    shipped_model(folder, "cogview2")
    return {}, {}


@stage("docs/original_scripts.md")
def original_scripts(folder: Path) -> Stage:
    """Tiny models, of which the one of CogView2 has what a converted one has of its own: the released styles."""
    from ..pipelines.conftest import build
    from ..utils import make_tokenizer

    cogview(folder)
    (folder / "words").mkdir()
    pipe = build(make_tokenizer(folder / "words"))
    CogView2Pipeline(**pipe.components, **released_styles()).save_pretrained(folder / "cogview2")
    for name, size in (("small", 64), ("large", 64), ("photo", 300)):
        Image.effect_noise((size, size), 50).convert("RGB").save(folder / f"{name}.png")
    lines = {"input.txt": "001\t一只老虎\n", "input_comp.txt": "一只猫\tphoto.png\t0.2\t0.2\t0.8\t0.7\n"}
    lines["input_select.txt"] = "一只老虎\tsmall.png\tlarge.png\n"
    for name, text in lines.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {}, {
        "--height 160": "--height 32",
        "--num-images 16 --max-batch-size 8": "--num-images 3 --max-batch-size 2",
        "--num-candidates 16": "--num-candidates 4",
        "--size 128": "--size 16",
        "--size 256": "--size 32",
    }


@stage("docs/evaluation.md")
def evaluation(folder: Path) -> Stage:
    for name in ("a", "b"):
        (folder / "runs" / name).mkdir(parents=True)
        rows = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 40)]
        save_lines(folder / "runs" / name / "metrics.jsonl", *rows)
    for name in ("coco_before", "coco_after"):
        (folder / name).mkdir()
        figures = {"caption_loss": {"value": 2.0, "standard_error": 0.1}}
        (folder / name / "evaluation.json").write_text(json.dumps({"figures": figures}), encoding="utf-8")
    save_lines(folder / "benchmark.jsonl", *({"batch_size": size, "images_per_minute": 3.0} for size in (1, 4)))
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
    tiny_model(folder)
    save_pictures(folder / "PICTURES", "<my-car>")
    tiny_cogview(folder)
    pictures = ["--image_folder", "PICTURES", "--captions", "PICTURES/captions.jsonl"]
    for model, data in (("MODEL", "data/mine"), ("COGVIEW", "data/mine_cogview")):
        run_script("training_scripts/prepare_tokens.py", ["--like", model, *pictures, "--output_dir", data])
    return {}, {
        "--lora_rank 8": "--lora_rank 8 --batch_size 2",
        "--new_token": "--batch_size 2 --new_token",
        **FEW_STEPS,
    }


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

    query, key, value = torch.randn(3, 1, 1024, 2, 16).unbind(0)
    is_text = torch.arange(1024)[None] < 40
    names = {"query": query, "key": key, "value": value, "is_text": is_text}
    return {**names, "generator": torch.Generator().manual_seed(1), "CogViewConfig": CogViewConfig}, {}


@stage("docs/text_to_image.md")
def text_to_image(folder: Path) -> Stage:
    return {}, {}


@stage("src/cogview_pipelines/demo/models/cogview2-emoji/README.md")
@stage("training_scripts/emoji/model_card.md")
def model_card(folder: Path) -> Stage:
    return {"FOLDER_OR_HUB_ID": SHIPPED_MODEL}, {}


@stage("src/cogview_pipelines/demo/models/cogview-emoji/README.md")
@stage("training_scripts/emoji_cogview/model_card.md")
def cogview_model_card(folder: Path) -> Stage:
    return {"FOLDER_OR_HUB_ID": SHIPPED_MODELS["cogview-emoji"]}, {}


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
