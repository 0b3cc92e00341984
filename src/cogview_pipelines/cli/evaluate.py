"""`cogview2 evaluate`: how many pictures show what their prompts say; and the papers' measures of any captions."""

import enum
from dataclasses import dataclass, fields
from pathlib import Path

import typer

from .adapters import LORA_OPTION
from .console import bad_input, fail, finite
from .loading import DEVICE_OPTION, DTYPE_OPTION, INT8_OPTION, MODEL_OPTION, DType
from .options import DECLARED, setting_option, split_numbers
from .requests import check_arguments


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


@dataclass
class CommonOptions:
    """
    The options that count for the demo scenes and for captions alike, as given; `call` are arguments of the pipeline's
    call.
    """

    seed: int
    batch_size: int
    call: dict
    model: str
    lora: list[str] | None
    int8: bool
    device: str | None
    dtype: DType | None
    as_json: bool


# Options of only one of the two: the demo data, or captions of one's own
_DEMO = ("split", "language", "layout", "measure", "baseline", "sprites", "save", "export")
_CAPTIONS = (
    *("references", "pictures", "output", "protocol", "contrast", "radii", "size", "inception", "network", "clip"),
    *("shard", "candidate_counts", "select", "detector", "precision"),
)
# Arguments of the pipeline's call, as those of `cogview2 generate`
_CALL = ("height", "width", "style", "negative_prompt", *DECLARED)


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
    width: int = typer.Option(None, min=1, help="In pixels, as for --height."),
    style: str = typer.Option(None, help="A style preset of the model, on top of what the prompts say."),
    guidance_scale: float = setting_option("guidance_scale"),
    negative_prompt: str = typer.Option(None, help="What guidance leads away from."),
    text_attention_bias: float = setting_option("text_attention_bias"),
    temperature: float = setting_option("temperature"),
    top_k_clusters: int = setting_option("top_k_clusters"),
    cluster_temperature: float = setting_option("cluster_temperature"),
    direct_sr_temperature: float = setting_option("direct_sr_temperature"),
    direct_sr_top_k_clusters: int = setting_option("direct_sr_top_k_clusters"),
    direct_sr_cluster_temperature: float = setting_option("direct_sr_cluster_temperature"),
    iterative_sr_temperature: float = setting_option("iterative_sr_temperature"),
    iterative_sr_top_k: str = setting_option("iterative_sr_top_k"),
    num_lopar_steps: int = setting_option("num_lopar_steps"),
    top_k: int = setting_option("top_k"),
    top_p: float = setting_option("top_p"),
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    int8: bool = INT8_OPTION,
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
    contrast: float = typer.Option(
        None, min=0, max=100, callback=finite, help="Factor for the pictures that were made.  [default: 1]"
    ),
    radii: str = typer.Option(None, help="Of the blur of both sides, a FID for each.  [default: 0,1,2,4,8]"),
    size: int = typer.Option(256, min=1, max=4096, help="Both sides are resized to this many pixels."),
    inception: Path = typer.Option(
        None, help="Weights of Inception for FID and the Inception score: torch-fidelity's."
    ),
    network: str = typer.Option(None, help="Another network, as MODULE:FUNCTION; see docs/evaluation.md."),
    clip: str = typer.Option(None, help="Folder or Hub id of CLIP or the like, for the CLIP score."),
    precision: bool = typer.Option(False, "--precision", help="Precision and recall, too; needs torch-fidelity."),
    detector: str = typer.Option(
        None,
        help="What finds objects in pictures, as MODULE:FUNCTION, for captions that say what is to be seen as GenEval"
        " does.",
    ),
    select: str = typer.Option(
        None,
        help="What decides on the best of --candidates: caption-loss, clip (as --clip), or a scorer of yours, as"
        " MODULE:FUNCTION.  [default: caption-loss]",
    ),
    shard: str = typer.Option(None, help="Like 1/4: only this part, of as many processes or machines."),
    candidate_counts: str = typer.Option(
        None,
        help="Like 1,2,4,8: all measures against the number of candidates, chosen by caption loss and by --clip; a"
        " table and a plot.",
    ),
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
    given = dict(locals())
    choices = (Split, Language, Layout, Measure, Baseline, Protocol)  # the names are what the rest is written for
    own = {name: value.value if isinstance(value, choices) else value for name, value in given.items()}
    _check_combination(context, captions is not None)
    with bad_input():
        call = {name: own[name] for name in _CALL}
        own["call"] = check_arguments({**call, "iterative_sr_top_k": split_numbers(iterative_sr_top_k)})
    if captions is not None:
        from .evaluate_captions import CaptionsOptions, evaluate_captions

        evaluate_captions(CaptionsOptions(**{field.name: own[field.name] for field in fields(CaptionsOptions)}))
        return
    from .evaluate_scenes import ScenesOptions, evaluate_scenes

    own |= {"num": num or 100, "candidates": candidates or 8}
    evaluate_scenes(ScenesOptions(**{field.name: own[field.name] for field in fields(ScenesOptions)}))


def _check_combination(context: typer.Context, has_captions: bool) -> None:
    """Refuse options of the other kind."""
    others = _DEMO if has_captions else _CAPTIONS
    sources = {name: context.get_parameter_source(name) for name in others}
    given = [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if given:
        which = "is for the demo data, not for --captions" if has_captions else "is for --captions"
        fail(f"--{given[0].replace('_', '-')} {which}.")
