"""`cogview2 generate`: pictures from prompts."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import bad_input, expand, fail, fail_all, failures, make_writable_folder, say, warn_of_unknown_in
from .loading import (
    DEVICE_OPTION,
    DTYPE_OPTION,
    INT8_OPTION,
    METADATA_OPTION,
    MODEL_OPTION,
    DType,
    ModelChoice,
    describe_model,
)
from .names import problem_of_name, same_file_key, slug
from .options import count_option, setting_option, split_numbers
from .requests import (
    ARGUMENTS,
    GENERATE,
    LARGEST_SEED,
    Request,
    check_arguments,
    check_prompt,
    check_seed,
    choose_seed,
    numbered,
    read_requests,
)
from .results import LineFailures, check_names, manifest_of, only_writer, refuse_others, save_with_line, sort_existing
from .terminal_pictures import SHOW_OPTION, Show, find_way, show_picture

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.common.base import PipelineBase

_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
_NOT_REMADE = ("num_images_per_prompt", "num_candidates", "max_batch_size")  # they say nothing of one picture


@dataclass
class Job:
    """
    What one set of random numbers makes: a picture, or the best of several candidates.

    Args:
        prompt (`str`): The text.
        seed (`int`): Of the picture, or of the first candidate.
        settings (`dict`): Style, size and settings: arguments of the pipeline's call, all that matter.
        paths (`list[Path]`): Where the pictures are saved.
        num_candidates (`int`, *optional*): Draw so many, and keep as many as there are paths.
        max_batch_size (`int`, *optional*): At most so many pictures are computed at a time.
        id (`str`): The id of the request.
    """

    prompt: str
    seed: int
    settings: dict
    paths: list[Path]
    num_candidates: int | None = None
    max_batch_size: int | None = None
    id: str = ""

    def metadata(self, seed: int, score: float | None = None) -> dict:
        """What the file of a picture says of it, with the picture's own seed."""
        from ..pipelines.common.picture_metadata import of_generation

        return of_generation(self.prompt, seed, self.settings, self.num_candidates, self.seed, score)


def generate(
    context: typer.Context,
    prompt: list[str] = typer.Argument(None, help="One text or more, Chinese or English.", show_default=False),
    prompts: Path = typer.Option(
        None, "--prompts", "--requests", help="JSONL file: id, prompt, and optionally seed, style, ... on each line."
    ),
    remake: Path = typer.Option(
        None, help="A PNG file that this command wrote: make its picture again; options override its settings."
    ),
    output: Path = typer.Option("outputs", "--output", "-o", help="A .png file, or a folder."),
    seed: int = typer.Option(
        None,
        "--seed",
        "-s",
        min=0,
        max=LARGEST_SEED,
        help="Of the first picture of each prompt; picture i has seed + i.  [default: random]",
    ),
    num_images: int = count_option("--num-images", "-n", help="Pictures per prompt.  [default: 1]"),
    num_candidates: int = count_option("--num-candidates", help="How many to draw of each prompt, to keep the best."),
    style: str = typer.Option(None, help="A style of the model."),
    grid: bool = typer.Option(False, "--grid", help="Write all pictures into one."),
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    int8: bool = INT8_OPTION,
    height: int = typer.Option(
        None, min=1, help="In pixels: low-resolution or super-resolved.  [default: the largest]"
    ),
    width: int = typer.Option(None, min=1, help="In pixels, as for --height."),
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
    max_batch_size: int = typer.Option(None, min=1, help="Pictures computed at a time.  [default: 8]"),
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    metadata: bool = METADATA_OPTION,
    overwrite: bool = typer.Option(False, "--overwrite", help="With --prompts: replace pictures of other requests."),
    show: Show = SHOW_OPTION,
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress bar."),
) -> None:
    """
    Make pictures from prompts; the paths of the files are printed.

    With --prompts FILE.jsonl, each line is an object with "id" and "prompt", and optionally "seed", "style" and any
    other argument of the pipeline's call. Pictures are written as ID.png into the output folder, beside a manifest;
    pictures that exist already are not made again, so a long list can be stopped and resumed.

    Prompt, seed, settings and model are kept in the PNG files; --remake FILE.png makes such a picture again.

    \b
    Examples:
      cogview2 generate "a tiger on a blue background" --num-images 4 --grid -o tigers.png
      cogview2 generate "一只老虎，蓝色背景" --num-candidates 8 --seed 7
      cogview2 generate --requests prompts.jsonl --output pictures
      cogview2 generate --remake tiger.png --seed 8 -o other.png
    """
    given = {name: value for name, value in locals().items() if name in ARGUMENTS}
    given["num_images_per_prompt"] = num_images
    with bad_input():
        given["iterative_sr_top_k"] = split_numbers(iterative_sr_top_k)
        given = check_arguments(given)
    sources = {"PROMPT": bool(prompt), "--prompts": prompts is not None, "--remake": remake is not None}
    if sum(sources.values()) != 1:
        named = " and ".join(name for name, there in sources.items() if there) or "none of them"
        fail(f"Say what to make by one of PROMPT, --prompts and --remake; given: {named}.")
    choice = ModelChoice(model, device, dtype, read_adapters(lora), int8)
    if prompts is not None:
        if grid:
            fail("--grid needs prompts on the command line, not --prompts.")
        _List(choice, output, seed, metadata, overwrite, quiet).run(prompts, given)
        return

    way = find_way(show)
    with bad_input():
        if remake is not None:
            is_default = context.get_parameter_source("model").name == "DEFAULT"
            requests, dtype = _request_of_picture(expand(remake, "--remake"), given, seed, choice, is_default)
        else:
            seed = choose_seed(seed)
            requests = [Request(check_prompt(text), seed, given) for text in prompt]
        for request in requests:
            check_seed(request.seed, request.num_seeds)
    paths = _choose_paths(output, requests, grid)
    choice = replace(choice, dtype=dtype)
    pipe = choice.load()
    jobs, left = [], paths
    with bad_input():
        for request in requests:
            own, left = (
                (paths * request.num_images, paths)
                if grid
                else (left[: request.num_images], left[request.num_images :])
            )
            jobs += _plan(pipe, request, own)
    common = _common_metadata(pipe, choice)
    made = []
    with bad_input(), failures():
        for _, path, image, own in _make(pipe, jobs, quiet):
            if grid:
                made.append((image, own))
            else:
                _save(image, path, {**own, **common} if metadata else None)
                show_picture(image, way)
        if grid:
            show_picture(_save_grid(made, requests, paths[0], common if metadata else None), way)


# One prompt or a few -------------------------------------------------------------------------------------------------


def _request_of_picture(
    path: Path, given: dict, seed: int | None, choice: ModelChoice, is_default: bool
) -> tuple[list[Request], DType | None]:
    """
    The request and the number format that the metadata of a picture tell, unless options say otherwise.

    A picture may come from anybody: the model that it names is not loaded unless it is asked for.
    """
    from ..pictures.png import read_metadata

    metadata = read_metadata(path)
    if not isinstance(metadata.get("settings"), dict) or not {"prompt", "seed", "model"} <= set(metadata):
        fail(f"`--remake`: {path} does not say how one picture was made.")
    if "command" in metadata:
        fail(
            f"`--remake`: {path} was not made from its prompt alone, but by the command "
            f"{str(metadata['command'])[:200]!r} from other pictures. Call that one again, with its pictures."
        )
    own = describe_model(choice.model)
    if is_default and any(metadata.get(name) != value for name, value in own.items()):
        fail(
            f"`--remake`: {path} was made by the model {metadata['model'][:200]!r}, which is not loaded only because "
            "a file names it. Pass --model with its folder or Hub id."
        )
    if metadata.get("lora") and not choice.adapters:
        fail(
            f"`--remake`: {path} was made with adapters, which are not loaded only because a file names them. Pass "
            f"--lora for each: {str(metadata['lora'])[:200]}."
        )
    if metadata.get("int8") and not choice.int8:
        fail(f"`--remake`: {path} was made with --int8, without which it becomes another picture. Pass --int8.")
    saved = {
        name: value for name, value in metadata["settings"].items() if name in ARGUMENTS and name not in _NOT_REMADE
    }
    arguments = check_arguments({**saved, **given})
    request = Request(check_prompt(metadata["prompt"]), metadata["seed"] if seed is None else seed, arguments)
    dtype = choice.dtype
    if dtype is None and metadata.get("dtype") in list(DType.__members__):
        dtype = DType(metadata["dtype"])
    return [request], dtype


def _choose_paths(output: Path, requests: list[Request], grid: bool) -> list[Path]:
    """A file for each picture (one for all, if they become a grid), in a folder that can be written in."""
    output = expand(output, "--output")
    is_file = output.suffix.lower() == ".png" and not os.path.isdir(output)
    if not is_file and output.suffix.lower() in _OTHER_FORMATS:
        fail(f"`--output` must be a .png file or a folder, but is {output}. Only PNG files keep prompt and seed.")
    if not is_file and os.path.exists(output) and not os.path.isdir(output):
        fail(f"`--output` must be a .png file or a folder, but {output} is another file.")
    make_writable_folder(output.parent if is_file else output)
    if is_file:
        count = 1 if grid else sum(request.num_images for request in requests)
        paths = [output.with_name(name) for name in numbered(output.name, count)]
        problem = problem_of_name(paths[-1])  # the longest
        if problem is not None:
            fail(f"`--output`: {problem}")
        return paths
    if grid:
        return [_free(output, f"{slug(requests[0].prompt)}-{requests[0].seed}-grid", set())]
    taken: set[str] = set()
    return [
        _free(output, f"{slug(request.prompt)}-{choose_seed(request.seed) + index}", taken)
        for request in requests
        for index in range(request.num_images)
    ]


def _free(folder: Path, stem: str, taken: set[str]) -> Path:
    """
    `<stem>.png`, or with a number after it, if that is there already or was given away.

    Names that differ in upper and lower case count as one, as they do on many file systems.
    """
    path, number = folder / f"{stem}.png", 2
    while same_file_key(path.name) in taken or os.path.lexists(path):
        path, number = folder / f"{stem}-{number}.png", number + 1
    taken.add(same_file_key(path.name))
    return path


def _save_grid(
    made: list[tuple["Image.Image", dict]], requests: list[Request], path: Path, common: dict | None
) -> "Image.Image":
    """Save and return one picture: a row for each prompt; the pictures of a single prompt nearly in a square."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    images = [image for image, _ in made]
    columns = math.ceil(len(images) ** 0.5) if len(requests) == 1 else requests[0].num_images
    rows = math.ceil(len(images) / columns)
    images += [Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    metadata = None if common is None else {**common, "pictures": [metadata for _, metadata in made]}
    grid = make_image_grid(images, rows, columns)
    _save(grid, path, metadata)
    return grid


# A list of prompts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _List:
    """One call of the command with `--prompts`: what all of its pictures have in common."""

    model: ModelChoice
    output: Path
    seed: int | None
    keeps_metadata: bool
    overwrite: bool
    quiet: bool

    def run(self, path: Path, given: dict) -> None:
        """Make what a JSONL file asks for and the folder does not hold yet."""
        with bad_input():
            requests, errors = read_requests(expand(path, "--prompts"), GENERATE, given, self.seed, "--prompts")
        if errors:
            fail_all(errors)
        folder = expand(self.output, "--output")
        if os.path.exists(folder) and not os.path.isdir(folder):
            fail(f"`--output` must be a folder with --prompts, but {folder} is a file.")
        make_writable_folder(folder)
        paths = {request.id: [folder / name for name in request.file_names()] for request in requests}
        errors = check_names((request.where, paths[request.id]) for request in requests)
        if errors:
            fail_all(errors)
        with only_writer(folder):
            pipe = self.model.load()
            jobs = []
            for request in requests:
                try:
                    jobs += _plan(pipe, request, paths[request.id])
                except ValueError as error:
                    errors.append(f"{request.where}: {error}")
            if errors:
                fail_all(errors)
            self._make(pipe, requests, jobs, folder)

    def _make(self, pipe: "PipelineBase", requests: list[Request], jobs: list[Job], folder: Path) -> None:
        """Do the jobs that are not done yet."""
        common = _common_metadata(pipe, self.model)
        where = {request.id: request.where for request in requests}
        seeded = {request.id for request in requests if request.seed is not None}

        def made_from(job: Job, metadata: dict) -> bool:
            selection = metadata.get("post_selection") or {}
            wanted: dict[str, Any] = {"prompt": job.prompt, "settings": job.settings}
            wanted |= {name: common.get(name) for name in ("model", "model_fingerprint", "lora", "int8")}
            return (
                selection.get("num_candidates") == job.num_candidates
                and (job.id not in seeded or selection.get("seed", metadata.get("seed")) == job.seed)
                and all(metadata.get(name) == value for name, value in wanted.items())
            )

        kept, missing, others = sort_existing(jobs, made_from)
        refuse_others(others, self.overwrite)
        failed = LineFailures(len(requests))
        with bad_input(), failures(), manifest_of(folder, jobs, kept) as add_line:
            for job, path, image, metadata in _make(pipe, missing, self.quiet):
                metadata = {**metadata, **common}
                with failed.of_writing(where[job.id]):
                    save_with_line(add_line, job.id, image, path, metadata, self.keeps_metadata)
        failed.finish()


# Pictures ------------------------------------------------------------------------------------------------------------


def _plan(pipe: "PipelineBase", request: Request, paths: list[Path]) -> list[Job]:
    """
    The jobs that make the pictures of a request.

    Raises:
        ValueError: If the model cannot do what is asked.
    """
    from ..pipelines.common.arguments import check_taken
    from ..pipelines.common.picture_metadata import chosen_settings

    check_taken(pipe, request.arguments)
    settings = pipe.check_inputs(request.prompt, **request.arguments)
    warn_of_unknown_in(pipe, request)
    settings = chosen_settings(settings)
    seed = choose_seed(request.seed)
    candidates, batch_size = (request.arguments.get(name) for name in ("num_candidates", "max_batch_size"))
    if candidates is not None:
        return [Job(request.prompt, seed, settings, paths, candidates, batch_size, request.id)]
    return [
        Job(request.prompt, seed + index, settings, [path], None, batch_size, request.id)
        for index, path in enumerate(paths)
    ]


def _make(pipe: "PipelineBase", jobs: list[Job], quiet: bool) -> Iterator[tuple[Job, Path, "Image.Image", dict]]:
    """
    Do jobs with the same settings together, batch by batch, and hand out each picture as soon as it is there: with its
    job, the path for it, and its metadata.
    """
    import torch
    from tqdm.auto import tqdm

    from ..pipelines.common.memory import DEFAULT_MAX_BATCH_SIZE

    groups: dict[str, list[Job]] = {}
    for job in jobs:
        same = [job.settings, job.num_candidates, len(job.paths), job.max_batch_size]
        groups.setdefault(json.dumps(same), []).append(job)
    batches = []
    for group in groups.values():
        size = group[0].max_batch_size or DEFAULT_MAX_BATCH_SIZE
        size = max(1, size // (group[0].num_candidates or 1))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    hidden = True if quiet else None  # None: hidden where stderr is no terminal
    pipe.set_progress_bar_config(disable=hidden, leave=len(batches) == 1, desc="tokens")
    count = sum(len(job.paths) for job in jobs)
    with tqdm(total=count, desc="pictures", disable=True if len(batches) == 1 else hidden) as progress:
        for batch in batches:
            first = batch[0]
            seeds = [job.seed + index for job in batch for index in range(first.num_candidates or 1)]
            output = pipe(
                [job.prompt for job in batch],
                num_images_per_prompt=len(first.paths),
                num_candidates=first.num_candidates,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                max_batch_size=first.max_batch_size,
                **first.settings,
            )
            slots = [(job, path) for job in batch for path in job.paths]
            scores = output.scores or [None] * len(slots)
            for (job, path), image, seed, score in zip(slots, output.images, output.seeds, scores):
                yield job, path, image, job.metadata(seed, score)
            progress.update(len(slots))


def _common_metadata(pipe: "PipelineBase", choice: ModelChoice) -> dict:
    from ..pipelines.common.picture_metadata import of_maker

    return of_maker(choice.describe(), pipe)


def _save(image: "Image.Image", path: Path, metadata: dict | None) -> None:
    from ..pictures.png import save_png

    save_png(image, path, metadata)
    say(path)
