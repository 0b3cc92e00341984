"""`cogview2 evaluate`: how many pictures show what their prompts say; and the papers' measures of any captions."""

import enum
from pathlib import Path

import typer

from .console import bad_input, expand, fail, failures, make_writable_folder, say, say_json
from .loading import DEVICE_OPTION, DTYPE_OPTION, MODEL_OPTION, DType, describe_model, find_model, load_pipeline


class Split(str, enum.Enum):
    """Parts of the demo data."""

    train = "train"
    validation = "validation"
    test_background = "test_background"
    test_colour_shape = "test_colour_shape"
    test_pair = "test_pair"
    test_order = "test_order"
    test_style = "test_style"
    test_wording = "test_wording"


class Language(str, enum.Enum):
    """Languages of the prompts."""

    en = "en"
    zh = "zh"


class Layout(str, enum.Enum):
    """One object or two."""

    single = "single"
    pair = "pair"


class Baseline(str, enum.Enum):
    """What the pictures are."""

    none = "none"
    ceiling = "ceiling"
    shuffled = "shuffled"


class Protocol(str, enum.Enum):
    """What the papers did."""

    cogview2 = "cogview2"
    cogview = "cogview"


class Measure(str, enum.Enum):
    """What is measured."""

    pictures = "pictures"
    caption_loss = "caption-loss"
    post_selection = "post-selection"


# Options of only one of the two: the demo data, or captions of one's own
_DEMO = ("split", "language", "layout", "measure", "baseline", "sprites", "save", "export")
_CAPTIONS = (
    *("references", "pictures", "output", "protocol", "contrast", "radii", "size", "inception", "network", "clip"),
    "shard",
)


def evaluate(
    context: typer.Context,
    split: Split = typer.Option(
        Split.train,
        help="Which scenes: train are the seen combinations, the rest held out; test_wording: seen combinations in"
        " sentences as people type them, whose patterns are held out.",
    ),
    language: Language = typer.Option(Language.en, help="Of the prompts."),
    num: int = typer.Option(
        None,
        "--num",
        "-n",
        min=1,
        help="How many scenes; if there are fewer, all of them; or captions.  [default: 100; all captions]",
    ),
    layout: Layout = typer.Option(None, help="Only scenes of one object, or only of two.  [default: both]"),
    measure: Measure = typer.Option(
        Measure.pictures,
        help="pictures: do they show what the prompts say; caption-loss: of true against shuffled captions of true"
        " pictures; post-selection: best of several by caption loss against the first.",
    ),
    baseline: Baseline = typer.Option(
        Baseline.none,
        help="For pictures. ceiling: true pictures, encoded and decoded; shuffled: pictures of other prompts.",
    ),
    candidates: int = typer.Option(
        None, min=2, help="How many to draw, to keep the best: for post-selection, or of captions.  [default: 8; one]"
    ),
    seed: int = typer.Option(0, min=0, max=2**40, help="Of scenes, prompts and pictures."),
    batch_size: int = typer.Option(8, min=1, help="Pictures computed at a time."),
    height: int = typer.Option(None, min=1, help="Of the pictures, in pixels.  [default: the largest]"),
    style: str = typer.Option(None, help="A style preset of the model, on top of what the prompts say."),
    model: str = MODEL_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    sprites: Path = typer.Option(None, help="Folder of full-size drawings, for the ceiling beyond 240 px."),
    save: Path = typer.Option(None, help="Folder for the pictures, with what was read from them in the PNG metadata."),
    export: Path = typer.Option(
        None,
        help="Write captions.jsonl and the true pictures of the scenes into this folder, for --captions; no more.",
    ),
    captions: Path = typer.Option(
        None, help="Captions of your own: .jsonl, COCO's .json, or .tsv. The options below are for them."
    ),
    references: list[Path] = typer.Option(
        None, help="The true pictures: a folder, WebDataset .tar files (several times), or a .tsv file."
    ),
    pictures: Path = typer.Option(None, help="Pictures that were made already, named like the captions: a folder."),
    output: Path = typer.Option(None, "--output", "-o", help="Folder for pictures, features and evaluation.json."),
    protocol: Protocol = typer.Option(
        None,
        help="What the papers did: 30000 captions, and the best of 16 (cogview2), or of 60 with contrast 1.5"
        " (cogview). Options given beside it override.",
    ),
    contrast: float = typer.Option(None, min=0, max=100, help="Factor for the pictures that were made.  [default: 1]"),
    radii: str = typer.Option(None, help="Of the blur of both sides, a FID for each.  [default: 0,1,2,4,8]"),
    size: int = typer.Option(256, min=1, max=4096, help="Both sides are resized to this many pixels."),
    inception: Path = typer.Option(
        None, help="Weights of Inception for FID and the Inception score: torch-fidelity's."
    ),
    network: str = typer.Option(None, help="Another network, as MODULE:FUNCTION; see docs/evaluation.md."),
    clip: str = typer.Option(None, help="Folder or Hub id of CLIP or the like, for the CLIP score."),
    shard: str = typer.Option(None, help="Like 1/4: only this part, of as many processes or machines."),
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON."),
) -> None:
    """
    Measure how many pictures show what was asked for.

    With --captions, the papers' measures of any captions and pictures. Without it, the prompts are captions of scenes
    that the model was trained for (scope.json): one object or two on a plain background, in a drawing style. A scorer
    without a neural network reads the pictures: background, style, objects, position are the shares of pictures that
    show each of these as the prompt says; all is the share that shows all four; clean is the share with nothing else
    on the background. Compare with --baseline ceiling and shuffled.

    \b
    Examples:
      cogview2 evaluate --split test_pair --language zh --num 200 --json
      cogview2 evaluate --split test_background --baseline ceiling
      cogview2 evaluate --measure post-selection --candidates 8 --num 50
      cogview2 evaluate --captions captions_val2014.json --references val2014 --inception weights.pth -o coco
    """
    _check_combination(context, captions is not None)
    if captions is not None:
        from .evaluate_captions import CaptionsOptions, evaluate_captions

        protocol = None if protocol is None else protocol.value
        own = locals()
        evaluate_captions(CaptionsOptions(**{name: own[name] for name in CaptionsOptions.__dataclass_fields__}))
        return
    num, candidates = num or 100, candidates or 8
    source = Path(find_model(model))
    if not (source / "scope.json").is_file():
        fail(f"`--model`: {source} has no scope.json, which lists the scenes that the model was trained on.")
    if measure is not Measure.pictures and (baseline is not Baseline.none or save is not None):
        fail(f"--baseline and --save are for --measure pictures, not {measure.value}.")
    from ..demo import Scope, SpriteSet, evaluation

    try:
        scope = Scope.load(source)
    except (OSError, ValueError, TypeError) as error:
        fail(f"`--model`: {source / 'scope.json'} is damaged: {error}")
    with bad_input():
        cases = evaluation.choose_cases(
            scope, split.value, language.value, num, seed, None if layout is None else layout.value
        )
        drawings = None if sprites is None else SpriteSet(sprites)
    if export is not None:
        _export(expand(export, "--export"), cases, height or 240)
        return
    if save is not None:
        make_writable_folder(save)
    pipe = load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=None, leave=False)
    common = {"batch_size": batch_size}
    call = {name: value for name, value in (("height", height), ("style", style)) if value is not None}
    from ..pipelines.common.arguments import check_taken

    with bad_input():
        check_taken(pipe, call)
        settings = pipe.check_inputs("a", **call)
        for case in cases:
            pipe.check_inputs(case.caption, **call)
    if len(cases) < num:
        say(f"There are {len(cases)} such scenes; all of them are used.", err=True)
    with bad_input(), failures():
        if measure is Measure.caption_loss:
            result = evaluation.measure_caption_loss(pipe, cases, sprites=drawings, **common)
        elif measure is Measure.post_selection:
            result = evaluation.measure_post_selection(pipe, cases, num_candidates=candidates, **common, **call)
        else:
            saver = None if save is None else _saver(save, settings, model)
            result = evaluation.measure_pictures(
                pipe, cases, baseline=baseline.value, sprites=drawings, on_picture=saver, **common, **call
            )
    asked = {"measure": measure.value, "split": split.value, "language": language.value, "n": len(cases)}
    settings_of = {Measure.pictures: {"baseline": baseline.value}, Measure.post_selection: {"candidates": candidates}}
    repeats = {"layout": None if layout is None else layout.value, "seed": seed, "model": model}
    _print({**asked, **result, **settings_of.get(measure, {}), **repeats, **_conditions(pipe, cases)}, as_json)


def _check_combination(context: typer.Context, has_captions: bool) -> None:
    """Refuse options of the other kind."""
    others = _DEMO if has_captions else _CAPTIONS
    given = [name for name in others if context.get_parameter_source(name).name != "DEFAULT"]
    if given:
        which = "is for the demo data, not for --captions" if has_captions else "is for --captions"
        fail(f"--{given[0].replace('_', '-')} {which}.")


def _export(folder: Path, cases: list, size: int) -> None:
    """Scenes as a list of captions with true pictures."""
    from ..demo import render
    from ..json_lines import write_lines
    from ..pictures.png import save_png

    make_writable_folder(folder)
    rows = [{"id": f"{index:05d}", "caption": case.caption} for index, case in enumerate(cases)]
    with failures():
        for row, case in zip(rows, cases, strict=True):
            save_png(render(case.scene, size), folder / f"{row['id']}.png", None)
        with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
            write_lines(file, rows)
    say(folder / "captions.jsonl")


def _conditions(pipe, cases: list) -> dict:
    """What else is needed to measure the same again: which scenes there were, and on what machine."""
    from ..environment import stamp

    return {
        "layouts": {name: sum(case.scene.layout == name for case in cases) for name in ("single", "pair")},
        "device": pipe.device.type,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        **stamp(str(pipe.device)),
    }


def _saver(folder: Path, settings: dict, model: str):
    from ..pictures.png import save_png

    def save(index: int, case, image, scores: dict) -> None:
        metadata = {
            "prompt": case.caption,
            "seed": case.seed,
            **describe_model(model),
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
