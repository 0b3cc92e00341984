"""`cogview2 attend`: where the model looks while it draws."""

import importlib.util
import os
import random
import re
from pathlib import Path

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import bad_input, expand, fail, failures, make_writable_folder, say, warn_of_unknown, whole_numbers
from .loading import DEVICE_OPTION, DTYPE_OPTION, MODEL_OPTION, DType, describe_model, load_pipeline
from .names import slug

_SIDE = 240  # pixels of a map
_TILE = 63  # of a head in the table of heads
_NUMBERS = "attention.json"
_SCALES, _SEGMENTS = "scales.png", "segments.png"
_FIXED = (_NUMBERS, "picture.png", "heads.png", _SCALES, _SEGMENTS)
_WORD = re.compile(r"word-\d{2,}-.*\.png", re.DOTALL)


def attend(
    prompt: str = typer.Argument(help="One text, Chinese or English."),
    output: Path = typer.Option("attention", "--output", "-o", help="Folder for the pictures."),
    seed: int = typer.Option(None, "--seed", "-s", min=0, max=2**63 - 1, help="Of the picture.  [default: random]"),
    style: str = typer.Option(None, help="A style of the model."),
    head: str = typer.Option(None, help="Only this head, as LAYER,HEAD from 0.  [default: the mean of all]"),
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
) -> None:
    """
    Show where each word of a prompt was looked at.

    A picture of low resolution is made, and written into the folder with a map for each word (bright: looked at while
    this part was drawn), a table of heads (each by how far away in the picture it looks; a row for each layer), and
    attention.json with the numbers. With matplotlib (the extra "plots"): the scales of scores by layer and head
    (scales.png), and the words that the most attended cells belong to (segments.png).

    \b
    Example:
      cogview2 attend "a tiger to the left of a mushroom, blue background" --seed 1 -o attention
    """
    chosen = _read_head(head)
    folder = expand(output, "--output")
    make_writable_folder(folder)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    earlier = _earlier_files(folder)
    adapters = read_adapters(lora)
    pipe = load_pipeline(model, device, dtype, adapters=adapters)
    if not hasattr(pipe, "attention_maps"):
        fail(f"`--model`: a {type(pipe).__name__} does not write pictures from texts.")
    config = pipe.transformer.config
    if chosen is not None and not (chosen[0] < config.num_hidden_layers and chosen[1] < config.num_attention_heads):
        fail(f"`--head` must be below {config.num_hidden_layers},{config.num_attention_heads}, but is {head}.")
    warn_of_unknown(pipe, [prompt])
    pipe.set_progress_bar_config(disable=None)
    import torch

    call = {} if style is None else {"style": style}
    with bad_input((ValueError, TypeError)), failures():
        maps = pipe.attention_maps(prompt, generator=torch.Generator().manual_seed(seed), **call)
        _write(folder, maps, chosen, {"prompt": prompt, "seed": seed, **describe_model(model, adapters)}, earlier)


def _read_head(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = whole_numbers(text, 2)
    if numbers is None:
        fail(f"`--head` must be LAYER,HEAD, as in 3,0, but is {text!r}.")
    return numbers[0], numbers[1]


def _earlier_files(folder: Path) -> list[Path]:
    """
    The files of an earlier call in a folder, which this one replaces. Files of the same names that are not its are an
    error: they are somebody's pictures.
    """
    import json

    path = folder / _NUMBERS
    there = [each for each in sorted(folder.iterdir()) if each.name in _FIXED or _WORD.fullmatch(each.name)]
    if not os.path.lexists(path):
        names = []
    else:
        try:
            numbers = json.loads(path.read_text(encoding="utf-8"))
            names = [*_FIXED, *(row["file"] for row in numbers["words"])]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            fail(f"`--output`: {path} was not written by this command. Name another folder.")
    others = [each for each in there if each.name not in names]
    if others:
        fail(f"`--output`: {others[0]} is there already, and would be replaced. Name another folder.")
    return there


def _write(folder: Path, maps, head: tuple[int, int] | None, metadata: dict, earlier: list[Path]) -> None:
    from ..json_lines import dump_file
    from ..pictures.png import save_png, write_whole

    names = [f"word-{index:02d}-{slug(word)}.png" for index, word in enumerate(maps.words)]
    numbers = {
        **metadata,
        "words": [{"word": word, "file": name} for word, name in zip(maps.words, names, strict=True)],
        "share_of_words": maps.maps.mean((-1, -2)).tolist(),
        "score_scales": maps.score_scales.tolist(),
        "segments": maps.segments(head).tolist(),
    }
    for path in earlier:
        if path.name != _NUMBERS:
            path.unlink(missing_ok=True)
    # first, so that pictures after which a stop came are known as this command's
    write_whole(folder / _NUMBERS, dump_file(numbers).encode())
    picture = maps.image.resize((_SIDE, _SIDE))
    save_png(picture, folder / "picture.png", metadata)
    for index, (word, name) in enumerate(zip(maps.words, names, strict=True)):
        save_png(_overlay(picture, maps.word_map(index, head)), folder / name, {**metadata, "word": word})
    save_png(_table_of_heads(maps.offsets), folder / "heads.png", metadata)
    plots = _plot(folder, numbers, maps)
    for name in ("picture.png", *names, "heads.png", *plots, _NUMBERS):
        say(folder / name)


def _plot(folder: Path, numbers: dict, maps) -> list[str]:
    """The pictures that take matplotlib; their names."""
    if importlib.util.find_spec("matplotlib") is None:
        say(f'No {_SCALES} and {_SEGMENTS}: they need `pip install "cogview_pipelines[plots]"`.', err=True)
        return []
    from ..plots.drawing import draw_marks, draw_table, save

    title = "deviation of the scores before the softmax"
    save(draw_table(numbers["score_scales"], title, "layer", "head"), folder / _SCALES)
    save(draw_marks(maps.image, numbers["segments"], maps.words), folder / _SEGMENTS)
    return [_SCALES, _SEGMENTS]


def _grey(values, size: tuple[int, int], resample):
    """Values as a picture from black, 0, to white, the largest."""
    from PIL import Image

    scaled = (values / values.max().clamp_min(1e-30) * 255).round().byte()
    image = Image.frombytes("L", (scaled.shape[1], scaled.shape[0]), bytes(scaled.flatten().tolist()))
    return image.resize(size, resample)


def _overlay(picture, values):
    """The picture, dark where nobody looked."""
    from PIL import Image

    mask = _grey(values, picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.eval(picture, lambda value: value // 6), mask)


def _table_of_heads(offsets):
    """A row for each layer, a tile for each head: the cell itself is in the middle."""
    from PIL import Image

    num_layers, num_heads = offsets.shape[:2]
    table = Image.new("L", (num_heads * (_TILE + 1), num_layers * (_TILE + 1)), 64)
    for layer in range(num_layers):
        for head in range(num_heads):
            tile = _grey(offsets[layer, head].sqrt(), (_TILE, _TILE), Image.Resampling.NEAREST)
            table.paste(tile, (head * (_TILE + 1), layer * (_TILE + 1)))
    return table.convert("RGB")
