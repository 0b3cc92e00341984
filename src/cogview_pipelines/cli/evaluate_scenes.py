"""`cogview2 evaluate` without captions: how many pictures of the demo scenes show what their prompts say."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .adapters import read_adapters
from .console import bad_input, expand, fail, failures, make_writable_folder, say, say_json, warn_of_unknown
from .evaluate import CommonOptions
from .loading import describe_model, find_model, load_pipeline

if TYPE_CHECKING:
    from ..demo import Scope
    from ..demo.evaluation import Case
    from ..pipelines.cogview2.base import CogView2PipelineBase


@dataclass
class ScenesOptions(CommonOptions):
    """The options of the command for scenes, as given."""

    split: str
    language: str
    num: int
    layout: str | None
    measure: str
    baseline: str
    candidates: int
    sprites: Path | None
    save: Path | None
    export: Path | None


def evaluate_scenes(options: ScenesOptions) -> None:
    """Do what [`ScenesOptions`] ask for."""
    if options.measure != "pictures" and (options.baseline != "none" or options.save is not None):
        fail(f"--baseline and --save are for --measure pictures, not {options.measure}.")
    sampling = [name for name in options.call if name not in ("height", "style")]
    if sampling and (options.measure == "caption-loss" or options.baseline == "ceiling"):
        fail(f"--{sampling[0].replace('_', '-')} is for pictures that are drawn; none are here. Leave it out.")
    scope = _load_scope(options.model)
    from ..demo import SpriteSet, evaluation

    with bad_input():
        cases = evaluation.choose_cases(
            scope, options.split, options.language, options.num, options.seed, options.layout
        )
        sprites = None if options.sprites is None else SpriteSet(expand(options.sprites, "--sprites"))
    if options.export is not None:
        _export(expand(options.export, "--export"), cases, options.call.get("height", 240))
        return
    save = None if options.save is None else expand(options.save, "--save")
    if save is not None:
        make_writable_folder(save, "--save")
    pipe = load_pipeline(
        options.model, options.device, options.dtype, adapters=read_adapters(options.lora), int8=options.int8
    )
    pipe.set_progress_bar_config(disable=None, leave=False)
    settings = _check_call(pipe, cases, options.call)
    if len(cases) < options.num:
        say(f"There are {len(cases)} such scenes; all of them are used.", err=True)
    saver = None if save is None else _saver(save, settings, options)
    with bad_input(), failures():
        result = _measure(pipe, cases, options, sprites, saver)
    _print(_report(options, pipe, cases, result), options.as_json)


def _load_scope(model: str) -> "Scope":
    from ..demo import Scope

    source = Path(find_model(model))
    if not (source / "scope.json").is_file():
        fail(f"`--model`: {source} has no scope.json, which lists the scenes that the model was trained on.")
    try:
        return Scope.load(source)
    except (OSError, ValueError, TypeError) as error:
        fail(f"`--model`: {source / 'scope.json'} is damaged: {error}")


def _check_call(pipe: "CogView2PipelineBase", cases: list["Case"], call: dict) -> dict:
    """All settings of the calls; what a call would refuse is refused before the first one."""
    from ..pipelines.common.arguments import check_taken

    with bad_input():
        check_taken(pipe, call)
        settings = pipe.check_inputs("a", **call)
        for case in cases:
            pipe.check_inputs(case.caption, **call)
    warn_of_unknown(pipe, [call.get("negative_prompt", "")], "the negative prompt")
    return settings


def _measure(pipe, cases: list["Case"], options: ScenesOptions, sprites, saver) -> dict:
    from ..demo import evaluation

    size, call = options.batch_size, options.call
    if options.measure == "caption-loss":
        return evaluation.measure_caption_loss(pipe, cases, sprites=sprites, batch_size=size)
    if options.measure == "post-selection":
        count = options.candidates
        return evaluation.measure_post_selection(pipe, cases, num_candidates=count, batch_size=size, **call)
    return evaluation.measure_pictures(
        pipe, cases, baseline=options.baseline, sprites=sprites, on_picture=saver, batch_size=size, **call
    )


def _report(options: ScenesOptions, pipe, cases: list["Case"], result: dict) -> dict:
    """The result, and what is needed to measure the same again: what was asked, which scenes, on what machine."""
    from ..environment import stamp

    of_measure: dict[str, dict] = {
        "pictures": {"baseline": options.baseline},
        "post-selection": {"candidates": options.candidates},
    }
    return {
        "measure": options.measure,
        "split": options.split,
        "language": options.language,
        "n": len(cases),
        **result,
        **of_measure.get(options.measure, {}),
        "layout": options.layout,
        "seed": options.seed,
        **({"call": options.call} if options.call else {}),
        "model": options.model,
        **({"lora": options.lora} if options.lora else {}),
        **({"int8": True} if options.int8 else {}),
        "layouts": {name: sum(case.scene.layout == name for case in cases) for name in ("single", "pair")},
        "device": pipe.device.type,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        **stamp(str(pipe.device)),
    }


def _export(folder: Path, cases: list, size: int) -> None:
    """Scenes as a list of captions with true pictures. What is there already must be the same."""
    from ..demo import render
    from ..demo.detector import requirements_of
    from ..json_lines import dump_line
    from ..pictures.png import encode_png, write_whole

    make_writable_folder(folder, "--export")
    rows = [
        {"id": f"{index:05d}", "caption": case.caption, **requirements_of(case.scene)}
        for index, case in enumerate(cases)
    ]

    def write(name: str, content: bytes) -> None:
        path = folder / name
        if not os.path.lexists(path):
            write_whole(path, content)
        elif not path.is_file() or path.read_bytes() != content:
            fail(f"`--export`: {path} is there already, and something else. Name another folder.")

    with failures():
        if os.path.lexists(folder / "captions.jsonl"):  # before any picture
            write("captions.jsonl", "".join(map(dump_line, rows)).encode())
        for row, case in zip(rows, cases, strict=True):
            write(f"{row['id']}.png", encode_png(render(case.scene, size), None))
        write("captions.jsonl", "".join(map(dump_line, rows)).encode())
    say(folder / "captions.jsonl")


def _saver(folder: Path, settings: dict, options: ScenesOptions):
    from ..pictures.png import save_png

    def save(index: int, case, image, scores: dict) -> None:
        metadata = {
            "prompt": case.caption,
            "seed": case.seed,
            **describe_model(options.model, read_adapters(options.lora), options.int8),
            "settings": {name: value for name, value in settings.items() if value is not None},
            "scene": case.scene.to_dict(),
            "scores": scores,
        }
        save_png(image, folder / f"{index:04d}-{'right' if scores['all'] else 'wrong'}.png", metadata)

    return save


def _print(report: dict, as_json: bool) -> None:
    if as_json:
        say_json(report)
        return
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        say(f"{name:22} {value}")
