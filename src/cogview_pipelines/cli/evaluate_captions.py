"""`cogview2 evaluate --captions`: the measures of the papers' tables, of any captions and pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .console import bad_input, expand, fail, fail_all, failures, make_writable_folder, say, say_json
from .families import pipeline_for
from .loading import DType, describe_model, load_pipeline

if TYPE_CHECKING:
    from ..evaluation.picture_runs import PictureRun

# what the papers did: CogView2, section 5.2; CogView, section 4.1
PROTOCOLS = {
    "cogview2": {"num": 30_000, "candidates": 16, "contrast": 1.0},
    "cogview": {"num": 30_000, "candidates": 60, "contrast": 1.5},
}


@dataclass
class CaptionsOptions:
    """The options of the command, as given."""

    captions: Path
    references: list[Path] | None
    pictures: Path | None
    output: Path | None
    protocol: str | None
    num: int | None
    candidates: int | None
    contrast: float | None
    radii: str | None
    size: int
    inception: Path | None
    network: str | None
    clip: str | None
    shard: str | None
    seed: int
    batch_size: int
    height: int | None
    style: str | None
    model: str
    device: str | None
    dtype: DType | None
    as_json: bool


def evaluate_captions(options: CaptionsOptions) -> None:
    """Do what [`CaptionsOptions`] ask for."""
    if options.output is None:
        fail("`--output` must name a folder: pictures, features and results are kept there, to go on after a stop.")
    chosen = {"num": None, "candidates": None, "contrast": 1.0}
    chosen |= PROTOCOLS[options.protocol] if options.protocol is not None else {}
    for name in chosen:
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    shard = _read_shard(options.shard)
    from tqdm.auto import tqdm

    from ..evaluation.captioned import open_references, read_captions

    with bad_input():
        radii = _read_radii(options.radii)
        rows = read_captions(expand(options.captions, "--captions"), chosen["num"], options.seed)
        references = open_references(options.references) if options.references else None
        made = open_references(options.pictures) if options.pictures is not None else None
    folder = expand(options.output, "--output")
    make_writable_folder(folder)
    with bad_input(), failures():
        run = _build_run(options, chosen, radii, rows, references, made, folder)
        run.begin()
        hidden = True if options.as_json else None
        own = sum(min(64, len(rows) - block * 64) for block in range(shard[0], run.num_blocks, shard[1]))
        say(_plan(own, chosen["candidates"], made is not None), err=True)
        with tqdm(total=own, desc="pictures", disable=hidden) as progress:
            run.run(shard, progress.update)
        results = run.results()
    if results is None:
        say("This shard is done. Once the others are, the same command without --shard gives the figures.", err=True)
        return
    _report(results, options.as_json)


def _build_run(options, chosen, radii, rows, references, made, folder: Path) -> "PictureRun":
    """Load what is needed, and check everything before the first picture."""
    from ..environment import stamp
    from ..evaluation.embedding_scores import EmbeddingScorer
    from ..evaluation.picture_runs import PictureRun, Preparation
    from .loading import choose_device

    device = choose_device(options.device)
    network = _load_network(options, device)
    if references is not None and network is None:
        fail("--references need a network that compares: --inception FILE or --network MODULE:FUNCTION.")
    pipe = load_pipeline(options.model, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    make, call = None, {}
    if made is None:
        call = {"height": options.height, "style": options.style, "num_candidates": chosen["candidates"]}
        call = {name: value for name, value in call.items() if value is not None}
        _check_captions(pipe, rows, call)
        make = _maker(pipe, call, options.batch_size)
    scores = {"caption_loss": _caption_loss(pipe)}
    if options.clip is not None:
        scores["clip_score"] = _clip_score(options.clip, device, EmbeddingScorer)
    return PictureRun(
        folder,
        rows,
        _settings(options, chosen, radii, len(rows), call, pipe),
        make=make,
        made=made,
        references=references,
        network=network,
        preparation=Preparation(options.size, radii, chosen["contrast"]),
        scores=scores,
        seed=options.seed,
        seeds_of_each=chosen["candidates"] or 1,
        batch_size=options.batch_size,
        stamp=stamp(str(pipe.device)),
    )


def _load_network(options: CaptionsOptions, device: str):
    """The network that compares pictures, or `None`."""
    from ..evaluation.networks import Inception, load_network

    network = None
    if options.inception is not None and options.network is not None:
        fail("Give --inception or --network, not both.")
    try:
        if options.inception is not None:
            network = Inception(expand(options.inception, "--inception"), device)
        elif options.network is not None:
            network = load_network(options.network, device)
        if network is not None:
            import torchmetrics  # noqa: F401
    except ImportError as error:
        fail(f'{error}. FID and the Inception score need `pip install "cogview_pipelines[evaluation]"`.')
    return network


def _settings(options: CaptionsOptions, chosen: dict, radii, num: int, call: dict, pipe) -> dict:
    """All that makes figures comparable: another value is another run."""
    return {
        "protocol": options.protocol,
        "captions": Path(options.captions).name,
        "num": num,
        "seed": options.seed,
        "pictures": None if options.pictures is None else str(options.pictures),
        "references": None if not options.references else [Path(path).name for path in options.references],
        "call": call,
        "size": options.size,
        "radii": list(radii),
        "contrast": chosen["contrast"],
        "network": "inception-2015-12-05" if options.inception is not None else options.network,
        "clip": options.clip,
        **describe_model(options.model),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
    }


def _check_captions(pipe, rows, call: dict) -> None:
    errors = []
    for row in rows:
        try:
            pipe.check_inputs(row.caption, **call)
        except ValueError as error:
            errors.append(f"caption {row.id}: {error}")
    if errors:
        fail_all(errors)


def _maker(pipe, call: dict, batch_size: int):
    import torch

    count = call.get("num_candidates") or 1

    def make(rows, seeds):
        generators = [torch.Generator().manual_seed(seed + index) for seed in seeds for index in range(count)]
        prompts = [row.caption for row in rows]
        return pipe(prompts, generator=generators, max_batch_size=batch_size, **call).images

    return make


def _caption_loss(pipe):
    captioner = pipeline_for(pipe, "caption")
    captioner.set_progress_bar_config(disable=True)
    return lambda images, rows: captioner.score(list(images), [row.caption for row in rows]).tolist()


def _clip_score(folder: str, device: str, scorer_class):
    from transformers import AutoModel, AutoProcessor

    try:
        model = AutoModel.from_pretrained(folder).eval().to(device)
        scorer = scorer_class(model, AutoProcessor.from_pretrained(folder))
    except (OSError, ValueError, ImportError) as error:
        fail(f"`--clip`: {folder} is no model of pictures and texts: {str(error).splitlines()[0]}")
    return lambda images, rows: scorer(images, [row.caption for row in rows])


def _read_radii(text: str | None) -> tuple[float, ...]:
    from ..evaluation.picture_runs import RADII

    if text is None:
        return RADII
    try:
        radii = tuple(float(part) for part in text.split(","))
        if not all(0 <= radius < 1000 for radius in radii) or len(set(radii)) != len(radii):
            raise ValueError
    except ValueError:
        raise ValueError(f"`--radii` must be different numbers from 0 on, as in 0,1,2,4,8, but is {text!r}.") from None
    return radii


def _read_shard(text: str | None) -> tuple[int, int]:
    """`"1/4"`, the first of four, to `(0, 4)`."""
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        fail(f"`--shard` must be like 1/4, the first of four, but is {text!r}.")
    return int(index) - 1, int(count)


def _plan(num: int, candidates: int | None, exist: bool) -> str:
    if exist:
        return f"{num} pictures are compared."
    drawn = f", the best of {candidates} each: {num * candidates} are drawn" if candidates else ""
    return f"{num} pictures are made{drawn}. A stop loses a batch at most: the same command goes on."


def _report(results: dict, as_json: bool) -> None:
    if results["excluded"]:
        say(f"{results['excluded']} captions are left out on both sides:", err=True)
        for id, reason in results["excluded_pictures"].items():
            say(f"  {id}: {reason}", err=True)
    for note in results["notes"]:
        say(f"Note: {note}", err=True)
    if as_json:
        say_json(results)
        return
    say(f"{'pictures':18}{results['pictures']}")
    for name, figure in results["figures"].items():
        value, *spread = figure.values()
        shown = "" if spread[0] is None else f" ± {spread[0]:.3g}"
        say(f"{name:18}{value:.4f}{shown}")
