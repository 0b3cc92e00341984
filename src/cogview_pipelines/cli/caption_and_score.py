"""`cogview2 caption` and `score`: texts about pictures that are there already."""

import contextlib
import enum
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import (
    bad_input,
    end_if_nobody_reads,
    expand,
    fail,
    fail_all,
    failures,
    make_writable_folder,
    say,
    say_json,
    warn_of_unknown,
)
from .families import is_cogview, pipeline_for
from .inputs import decode, describe_inputs, read_file, read_image, same_inputs
from .loading import (
    BATCH_OPTION,
    DEVICE_OPTION,
    DTYPE_OPTION,
    MODEL_OPTION,
    OVERWRITE_OPTION,
    QUIET_OPTION,
    REQUESTS_OPTION,
    DType,
    ModelChoice,
)
from .names import problem_of_name
from .options import count_option
from .requests import CAPTION, SCORE, Kind, Request, check_arguments, check_prompt, choose_seed, read_requests
from .results import LineFailures, only_writer, read_rows, replace_rows, write_row

JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object a line.")
OUTPUT_OPTION = typer.Option(
    None, "--output", "-o", help="With --requests: JSONL file for the results.  [default: print them]"
)
_NO_SETTINGS = ("max_batch_size",)
DEFAULT_CANDIDATES = 8


class Language(str, enum.Enum):
    """Languages of captions."""

    en = "en"
    zh = "zh"


class Strategy(str, enum.Enum):
    """Ways to write captions."""

    greedy = "greedy"
    sample = "sample"
    beam = "beam"
    best_of = "best-of"


def caption(
    images: list[Path] = typer.Argument(
        None, help="Pictures of any size; the model sees the square in the middle.", show_default=False
    ),
    language: Language = typer.Option(None, "--language", "-l", help="Of the captions.  [default: en]"),
    strategy: Strategy = typer.Option(
        None, help="greedy, sample, beam, or best-of: draw --candidates and keep the best.  [default: greedy]"
    ),
    num_captions: int = count_option(
        "--num-captions", "-n", help="Of each picture; more than one not greedy.  [default: 1]"
    ),
    candidates: int = count_option("--candidates", help=f"For best-of.  [default: {DEFAULT_CANDIDATES}]"),
    beams: int = count_option("--beams", help="For beam.  [default: 4]"),
    max_length: int = typer.Option(None, min=1, help="The most tokens of a caption."),
    requests: Path = REQUESTS_OPTION,
    output: Path = OUTPUT_OPTION,
    seed: int = typer.Option(
        None, "--seed", "-s", min=0, max=2**40, help="Seed of drawn captions.  [default: random]"
    ),
    max_batch_size: int = BATCH_OPTION,
    as_json: bool = JSON_OPTION,
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    quiet: bool = QUIET_OPTION,
) -> None:
    """
    Describe pictures, one line a caption.

    If there are several files, the name of the file and a tab stand before it.

    With --requests FILE.jsonl, each line is an object with "id" and "image", and optionally "seed" and any other
    argument of the pipeline's call. The output file gets one object a line; what is in it already is not made again.

    \b
    Examples:
      cogview2 caption tiger.png
      cogview2 caption tiger.png frog.jpg --language zh --strategy best-of --json
      cogview2 caption --requests pictures.jsonl --output captions.jsonl
    """
    given = {
        "language": None if language is None else language.value,
        "strategy": None if strategy is None else strategy.value,
        "num_captions_per_image": num_captions,
        "num_candidates": candidates,
        "num_beams": beams,
        "max_length": max_length,
        "max_batch_size": max_batch_size,
    }
    choice = ModelChoice(model, device, dtype, read_adapters(lora))
    with bad_input():
        given = check_arguments(given, CAPTION)
    if requests is not None:
        if images:
            fail("--requests says what to do in its lines; leave out FILE.")
        _List(CAPTION, _caption_batch, choice, output, seed, overwrite, quiet).run(requests, given)
        return
    _refuse_output(output)
    if not images:
        fail("Say what to describe: FILE, or --requests.")
    pictures = [read_image(path, "FILE") for path in images]
    pipe = _load(choice, quiet)
    count = given.get("num_captions_per_image", 1)
    with bad_input((ValueError, TypeError)), failures():
        captions = _captions(pipe, pictures, given, [choose_seed(seed)] * len(pictures))
    for path, own in zip(images, captions, strict=True):
        for entry in own[:count]:
            if as_json:
                say_json({"file": str(path), **_language(pipe, given), **entry})
            else:
                say(entry["caption"] if len(images) == 1 else f"{path}\t{entry['caption']}")


def score(
    image: Path = typer.Argument(None, help="The picture.", show_default=False),
    prompts: list[str] = typer.Argument(
        None, help="Texts that may describe it, Chinese or English.", show_default=False
    ),
    requests: Path = REQUESTS_OPTION,
    output: Path = OUTPUT_OPTION,
    max_batch_size: int = BATCH_OPTION,
    as_json: bool = JSON_OPTION,
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
) -> None:
    """
    Say how well texts describe a picture, best first.

    Each line has the caption loss (lower is better), a tab and the text.

    With --requests FILE.jsonl, each line is an object with "id", "image" and "prompts", a list of texts. The output
    file gets one object a line, with all losses, best first; what is in it already is not made again.

    \b
    Examples:
      cogview2 score tiger.png "a tiger on a blue background" "a red car"
      cogview2 score --requests pairs.jsonl --output scores.jsonl
    """
    choice = ModelChoice(model, device, dtype, read_adapters(lora))
    with bad_input():
        given = check_arguments({"max_batch_size": max_batch_size}, SCORE)
    if requests is not None:
        if image is not None:
            fail("--requests says what to do in its lines; leave out FILE and PROMPT.")
        _List(SCORE, _score_batch, choice, output, None, overwrite, quiet=True).run(requests, given)
        return
    _refuse_output(output)
    if image is None or not prompts:
        fail("Say what to compare: FILE and PROMPT..., or --requests.")
    picture = read_image(image, "FILE")
    with bad_input():
        texts = [check_prompt(prompt) for prompt in prompts]
    pipe = _load(choice, quiet=True)
    _warn_of_unknown(pipe, texts)
    with bad_input((ValueError, TypeError)), failures():
        rows = _scores(pipe, picture, texts, max_batch_size)
    for row in rows:
        if as_json:
            say_json(row)
        else:
            say(f"{row['caption_loss']:.4f}\t{row['prompt']}")


# Lists ---------------------------------------------------------------------------------------------------------------

Batch = Callable[[object, Sequence[Request], list], Iterator[dict]]


@dataclass(frozen=True)
class _List:
    """One call of a command with `--requests`: how its lines are done, and what they have in common."""

    kind: Kind
    work: Batch
    model: ModelChoice
    output: Path | None
    seed: int | None
    overwrite: bool
    quiet: bool

    def run(self, path: Path, given: dict) -> None:
        """Do what a JSONL file asks for and the output does not hold yet; a line that fails stops no other."""
        with bad_input():
            requests, errors = read_requests(expand(path, "--requests"), self.kind, given, self.seed)
        if errors:
            fail_all(errors)
        output = None if self.output is None else expand(self.output, "--output")
        if output is not None:
            _check_output(output, path)
        with contextlib.nullcontext() if output is None else only_writer(output):
            missing, rows = self._sort_rows(requests, output)
            pipe = _load(self.model, self.quiet) if missing else None
            failed = LineFailures(len(requests))
            with failures(), contextlib.ExitStack() as stack:
                write = say_json
                if output is not None:
                    replace_rows(output, rows)
                    write = functools.partial(write_row, stack.enter_context(open(output, "a", encoding="utf-8")))
                for batch in _batches(missing, self.kind):
                    for row in self._rows(pipe, batch, failed):
                        write(row)
                        if output is None:
                            end_if_nobody_reads()
        failed.finish()

    def _sort_rows(self, requests: Sequence[Request], output: Path | None) -> tuple[list[Request], list[dict]]:
        """The requests that are to be done, and the rows of the output that stay."""
        rows = [] if output is None else read_rows(output)
        by_id = {row["id"]: row for row in rows if isinstance(row["id"], str)}
        model_there = self.model.identity()
        missing, others = [], []
        for request in requests:
            row = by_id.get(request.id)
            if row is None or not _made_from(request, row, model_there):
                missing.append(request)
                if row is not None:
                    others.append(request)
        if others and not self.overwrite:
            fail_all(
                [
                    f"{request.where}: {output} holds a result of another request with the `id` {request.id!r}. Pass "
                    "--overwrite or name another file."
                    for request in others
                ]
            )
        if len(missing) < len(requests):
            say(f"{len(requests) - len(missing)} of {len(requests)} results are there already.", err=True)
        replaced = {request.id for request in missing}
        return missing, [row for row in rows if not (isinstance(row["id"], str) and row["id"] in replaced)]

    def _rows(self, pipe, batch: Sequence[Request], failed: LineFailures) -> Iterator[dict]:
        """The rows of a batch; if it fails, of its lines one by one, so that only those fail that must."""
        readable, pictures, inputs = [], [], []
        for request in batch:
            try:
                contents = {name: read_file(path, f"`{name}`") for name, path in request.files.items()}
                pictures.append(decode(contents["image"], request.files["image"], "`image`"))
            except ValueError as error:
                failed.add(request.where, error)
                continue
            readable.append(request)
            inputs.append(describe_inputs(request.files, contents))
        if not readable:
            return
        common = {**self.model.describe(), "dtype": str(pipe.vqvae.dtype).removeprefix("torch.")}
        try:
            results = list(self.work(pipe, readable, pictures))
        except (ValueError, TypeError) as error:
            if len(readable) == 1:
                failed.add(readable[0].where, error)
            else:
                for request in readable:
                    yield from self._rows(pipe, [request], failed)
            return
        for request, own_inputs, result in zip(readable, inputs, results, strict=True):
            yield {
                "id": request.id,
                "image": str(request.files["image"]),
                **result,
                "settings": _settings(request),
                "inputs": own_inputs,
                **common,
            }


def _check_output(output: Path, requests: Path) -> None:
    """See that results can be written into a file, and destroy nothing."""
    if os.path.isdir(output):
        fail(f"`--output` must be a JSONL file with --requests, but {output} is a folder.")
    if os.path.exists(output) and os.path.samefile(output, requests.expanduser()):
        fail(f"`--output` must not be the list of requests itself, {output}.")
    make_writable_folder(output.parent)
    problem = problem_of_name(output)
    if problem is not None:
        fail(f"`--output`: {problem}")


def _made_from(request: Request, row: dict, model: dict[str, str]) -> bool:
    return (
        row.get("settings") == _settings(request)
        and all(row.get(name) == value for name, value in model.items())
        and (request.seed is None or row.get("seed", request.seed) == request.seed)
        and same_inputs(request.files, row.get("inputs"))
    )


def _settings(request: Request) -> dict:
    """The arguments that decide what results are."""
    return {name: value for name, value in request.arguments.items() if name not in _NO_SETTINGS}


def _batches(requests: Sequence[Request], kind: Kind) -> list[list[Request]]:
    """Requests with the same arguments together, as many as are computed at a time; of scores one by one."""
    from ..pipelines.cogview2.pipeline_cogview2_caption import DEFAULT_MAX_BATCH_SIZE

    if kind is SCORE:
        return [[request] for request in requests]
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(json.dumps(request.arguments, sort_keys=True), []).append(request)
    batches = []
    for group in groups.values():
        size = group[0].arguments.get("max_batch_size", DEFAULT_MAX_BATCH_SIZE)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _caption_batch(pipe, requests: Sequence[Request], pictures: list) -> Iterator[dict]:
    arguments = requests[0].arguments
    seeds = [choose_seed(request.seed) for request in requests]
    drawn = arguments.get("strategy") in ("sample", "best_of")
    for seed, captions in zip(seeds, _captions(pipe, pictures, arguments, seeds), strict=True):
        yield {
            **_language(pipe, arguments),
            **({"seed": seed} if drawn else {}),
            "captions": captions,
        }


def _score_batch(pipe, requests: Sequence[Request], pictures: list) -> Iterator[dict]:
    (request,), (picture,) = requests, pictures
    arguments = request.arguments
    _warn_of_unknown(pipe, arguments["prompts"], request.where)
    yield {"scores": _scores(pipe, picture, arguments["prompts"], arguments.get("max_batch_size"))}


def _warn_of_unknown(pipe, texts: Sequence[str], place: str = "") -> None:
    """Say which parts of texts that are scored the model does not know."""
    warn_of_unknown(pipe, texts, "the prompt" if len(texts) == 1 else "the prompts", place, scored=True)


# Both ----------------------------------------------------------------------------------------------------------------


def _language(pipe, arguments: dict) -> dict[str, str]:
    """The language that was asked for; CogView's captions have the one that the model chooses."""
    return {} if is_cogview(pipe) else {"language": arguments.get("language", "en")}


def _captions(pipe, pictures: list, arguments: dict, seeds: list[int]) -> list[list[dict]]:
    """The captions of each picture with their scores; those drawn have seeds from that of the picture on."""
    import torch

    from ..pipelines.common.arguments import check_taken

    count = arguments.get("num_captions_per_image", 1)
    if is_cogview(pipe):
        drawn, arguments = _for_cogview(arguments)
    else:
        arguments = {"num_candidates": DEFAULT_CANDIDATES, **arguments}
        drawn = {"sample": count, "best_of": arguments["num_candidates"]}.get(str(arguments.get("strategy")), 0)
    check_taken(pipe, arguments)
    generators = [torch.Generator().manual_seed(seed + index) for seed in seeds for index in range(drawn)]
    output = pipe(pictures, generator=generators or None, **arguments)
    entries = [
        {"caption": text, "score": round(score, 4)} for text, score in zip(output.captions, output.scores, strict=True)
    ]
    return [entries[start : start + count] for start in range(0, len(entries), count)]


def _for_cogview(arguments: dict) -> tuple[int, dict]:
    """How many captions of each picture are drawn, and the arguments as CogView's pipeline calls them."""
    count, strategy = arguments.get("num_captions_per_image", 1), arguments.get("strategy", "greedy")
    own = {name: value for name, value in arguments.items() if name != "strategy"}
    if strategy == "sample":
        return count, own
    if strategy != "greedy":
        raise ValueError(f"`strategy` must be greedy or sample with this model, but is {strategy}.")
    if count > 1 or "top_k" in own:
        raise ValueError("`strategy` must be sample for `num_captions_per_image` or `top_k` with this model.")
    return count, {**own, "top_k": 1}


def _scores(pipe, picture, prompts: list[str], max_batch_size: int | None) -> list[dict]:
    """The caption loss of each prompt, best first."""
    losses = pipe.caption_loss(picture, prompts, max_batch_size=max_batch_size).tolist()
    rows = [{"prompt": text, "caption_loss": round(loss, 4)} for text, loss in zip(prompts, losses, strict=True)]
    return sorted(rows, key=lambda row: row["caption_loss"])


def _load(choice: ModelChoice, quiet: bool):
    pipe = choice.load("caption")
    with bad_input():
        pipe = pipeline_for(pipe, "caption")
    pipe.set_progress_bar_config(disable=True if quiet else None)
    return pipe


def _refuse_output(output: Path | None) -> None:
    if output is not None:
        fail("--output is for --requests; of files on the command line, results are printed.")
