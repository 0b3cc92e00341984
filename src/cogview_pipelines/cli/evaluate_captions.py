"""`cogview2 evaluate --captions`: the measures of the papers' tables, of any captions and pictures."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import read_adapters
from .console import (
    bad_input,
    expand,
    fail,
    fail_all,
    failures,
    first_line,
    make_writable_folder,
    say,
    say_json,
    warn_of_unknown,
    whole_numbers,
)
from .evaluate import CommonOptions
from .evaluate_candidates import evaluate_candidates, read_counts
from .families import pipeline_for
from .loading import describe_model, load_pipeline

if TYPE_CHECKING:
    from ..evaluation.embedding_scores import EmbeddingScorer
    from ..evaluation.picture_runs import PictureRun

# what the papers did: CogView2, section 5.2; CogView, section 4.1
PROTOCOLS = {
    "cogview2": {"num": 30_000, "candidates": 16, "contrast": 1.0},
    "cogview": {"num": 30_000, "candidates": 60, "contrast": 1.5},
}


@dataclass
class CaptionsOptions(CommonOptions):
    """The options of the command for captions, as given."""

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
    precision: bool
    detector: str | None
    shard: str | None
    candidate_counts: str | None
    select: str | None


def evaluate_captions(options: CaptionsOptions) -> None:
    """Do what [`CaptionsOptions`] ask for."""
    if options.output is None:
        fail("`--output` must name a folder: pictures, features and results are kept there, to go on after a stop.")
    chosen: dict[str, Any] = {"num": None, "candidates": None, "contrast": 1.0}
    chosen |= PROTOCOLS[options.protocol] if options.protocol is not None else {}
    for name in chosen:
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    shard = _read_shard(options.shard)
    counts = None
    if options.candidate_counts is not None:
        counts = read_counts(options.candidate_counts)
        if options.candidates is not None or options.pictures is not None:
            fail(
                "--candidate-counts is a number of candidates already, of pictures that are made here: leave "
                "--candidates and --pictures out."
            )
        chosen["candidates"] = counts[-1]
    _check_drawing(options, chosen["candidates"])
    from tqdm.auto import tqdm

    from ..evaluation.captioned import open_references, read_captions
    from ..evaluation.estimates import estimate, tell

    with bad_input():
        radii = _read_radii(options.radii)
        rows = read_captions(expand(options.captions, "--captions"), chosen["num"], options.seed)
        places = [expand(path, "--references") for path in options.references or ()]
        references = open_references(places) if places else None
        made = None if options.pictures is None else open_references(expand(options.pictures, "--pictures"))
    folder = expand(options.output, "--output")
    make_writable_folder(folder)
    with bad_input(), failures():
        run, pipe, call = _build_run(options, chosen, radii, rows, references, made, folder)
        if counts is not None:
            evaluate_candidates(run, pipe, call, counts, shard, options.batch_size, options.as_json)
            return
        run.begin()
        hidden = True if options.as_json else None
        own = sum(min(64, len(rows) - block * 64) for block in range(shard[0], run.num_blocks, shard[1]))
        say(_plan(own, chosen["candidates"], made is not None), err=True)
        expected = estimate(run, shard)
        if expected is not None:
            run.keep(estimate=expected)
            say(tell(expected), err=True)
        with tqdm(total=own, desc="pictures", disable=hidden) as progress:
            run.run(shard, progress.update)
        results = run.results()
    if results is None:
        say("This shard is done. Once the others are, the same command without --shard gives the figures.", err=True)
        return
    _report(results, options.as_json)


def _check_drawing(options: CaptionsOptions, candidates: int | None) -> None:
    """Refuse what says nothing: of pictures that are there already, and of candidates where there are none."""
    given = [*options.call, *(["candidates"] if options.candidates is not None else [])]
    if options.pictures is not None and given:
        name = given[0].replace("_", "-")
        fail(f"--{name} is for pictures that are made here: leave it out with --pictures.")
    if options.select is None:
        return
    if options.candidate_counts is not None:
        fail("--select is for one number of candidates; --candidate-counts compare the scorers.")
    if options.pictures is not None or not candidates:
        fail("--select needs candidates to choose from: --candidates, or a --protocol.")
    if options.select == "clip" and options.clip is None:
        fail("--select clip needs the model: --clip FOLDER.")


def _build_run(options, chosen, radii, rows, references, made, folder: Path) -> tuple["PictureRun", Any, dict]:
    """Load what is needed, and check everything before the first picture; also gives the pipeline and its call."""
    from ..environment import stamp
    from ..evaluation.picture_runs import PictureRun
    from ..evaluation.preparation import Preparation
    from ..pipelines.common.arguments import check_taken
    from .loading import choose_device

    device = choose_device(options.device)
    network = _load_network(options, device)
    if references is not None and network is None:
        fail("--references need a network that compares: --inception FILE or --network MODULE:FUNCTION.")
    detector = _load_detector(options.detector, device, rows)
    pipe = load_pipeline(
        options.model, options.device, options.dtype, adapters=read_adapters(options.lora), int8=options.int8
    )
    pipe.set_progress_bar_config(disable=True)
    captioner = pipeline_for(pipe, "caption")
    captioner.set_progress_bar_config(disable=True)
    _check_captions(rows, captioner.check_texts)
    make, call, used = None, {}, {}
    if made is None:
        call = dict(options.call)
        if chosen["candidates"] is not None:
            call["num_candidates"] = chosen["candidates"]
        check_taken(pipe, call)
        used = pipe.check_inputs("a", **call)  # what is wrong with all captions is said once
        _check_captions(rows, lambda caption: pipe.check_inputs(caption, **call))
        warn_of_unknown(pipe, [call.get("negative_prompt", "")], "the negative prompt")
    scores = {"caption_loss": _caption_loss(captioner)}
    clip = None if options.clip is None else _load_clip(options.clip, device)
    if clip is not None:
        scores["clip_score"] = _clip_score(clip)
    if made is None:
        make = _maker(pipe, call, options.batch_size, _load_scorer(options.select, clip, device))
    run = PictureRun(
        folder,
        rows,
        _settings(options, chosen, radii, len(rows), call, pipe),
        make=make,
        made=made,
        references=references,
        network=network,
        preparation=Preparation(options.size, radii, chosen["contrast"]),
        scores=scores,
        detector=detector,
        with_precision=options.precision,
        seed=options.seed,
        seeds_of_each=chosen["candidates"] or 1,
        batch_size=options.batch_size,
        stamp={**_used_settings(used), **stamp(str(pipe.device))},
    )
    return run, pipe, call


def _load_network(options: CaptionsOptions, device: str):
    """The network that compares pictures, or `None`."""
    from ..evaluation.distances import torch_fidelity, torchmetrics
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
            torchmetrics()
        if options.precision:
            if network is None or not options.references:
                fail("--precision needs --references and a network that compares.")
            torch_fidelity()
    except ImportError as error:
        fail(first_line(error))
    return network


def _load_detector(name: str | None, device: str, rows):
    """What finds objects in pictures, or `None`."""
    from ..evaluation.networks import load_network

    if name is None:
        return None
    if not any(row.shows for row in rows):
        fail('--detector needs captions that say what is to be seen: .jsonl with "include", as GenEval\'s.')
    return load_network(name, device, "detector")


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
        **({"precision": True} if options.precision else {}),
        **({} if options.detector is None else {"detector": options.detector}),
        **({} if options.select in (None, "caption-loss") else {"select": options.select}),
        **describe_model(options.model, read_adapters(options.lora), options.int8),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
    }


def _check_captions(rows, check: Callable[[str], object]) -> None:
    errors = []
    for row in rows:
        try:
            check(row.caption)
        except ValueError as error:
            errors.append(f"caption {row.id}: {error}")
    if errors:
        fail_all(errors)


def _used_settings(used: dict) -> dict:
    """All settings of the pictures, for the results: those given, else the model's, else the defaults."""
    return {"sampling": {name: value for name, value in used.items() if value not in (None, "")}} if used else {}


def _load_scorer(name: str | None, clip: "EmbeddingScorer | None", device: str):
    """What decides on the best of several candidates; `None` is the caption loss."""
    from ..evaluation.networks import load_network

    if name in (None, "caption-loss"):
        return None
    return clip if name == "clip" else load_network(name, device, "scorer of --select")


def _maker(pipe, call: dict, batch_size: int, scorer=None):
    import torch

    count = call.get("num_candidates") or 1
    call = call if scorer is None else {**call, "scorer": scorer}

    def make(rows, seeds):
        generators = [torch.Generator().manual_seed(seed + index) for seed in seeds for index in range(count)]
        prompts = [row.caption for row in rows]
        return pipe(prompts, generator=generators, max_batch_size=batch_size, **call).images

    return make


def _caption_loss(captioner):
    return lambda images, rows: captioner.caption_loss(list(images), [row.caption for row in rows]).tolist()


def _clip_score(clip: "EmbeddingScorer"):
    return lambda images, rows: clip(images, [row.caption for row in rows])


def _load_clip(folder: str, device: str) -> "EmbeddingScorer":
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    from ..evaluation.embedding_scores import EmbeddingScorer

    source = os.fspath(expand(Path(folder), "--clip"))
    logging.disable_progress_bar()
    try:
        options = {"trust_remote_code": False}  # else it asks, in the middle of the work
        model, info = AutoModel.from_pretrained(source, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"it lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...")
        return EmbeddingScorer(model.eval().to(device), AutoProcessor.from_pretrained(source, **options))
    except Exception as error:  # whatever a damaged file or the Hub makes the loaders raise
        fail(f"`--clip`: {folder} is no model of pictures and texts: {first_line(error)}")
    finally:
        logging.enable_progress_bar()


def _read_radii(text: str | None) -> tuple[float, ...]:
    from ..evaluation.preparation import RADII

    if text is None:
        return RADII
    try:
        radii = tuple(float(part) for part in text.split(","))
        names = {f"{radius:g}" for radius in radii}
        if not all(0 <= radius < 1000 for radius in radii) or len(names) != len(radii):
            raise ValueError
    except ValueError:
        raise ValueError(f"`--radii` must be different numbers from 0 on, as in 0,1,2,4,8, but is {text!r}.") from None
    return radii


def _read_shard(text: str | None) -> tuple[int, int]:
    """`"1/4"`, the first of four, to `(0, 4)`."""
    if text is None:
        return 0, 1
    index, count = whole_numbers(text.replace("/", ",", 1), 2) or (0, 0)
    if "/" not in text or not 1 <= index <= count:
        fail(f"`--shard` must be like 1/4, the first of four, but is {text!r}.")
    return index - 1, count


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
    say(f"{'pictures':24}{results['pictures']}")
    for name, figure in results["figures"].items():
        value, spread, *_ = figure.values()
        shown = "" if spread is None else f" ± {spread:.3g}"
        say(f"{name:24}{value:.4f}{shown}")
