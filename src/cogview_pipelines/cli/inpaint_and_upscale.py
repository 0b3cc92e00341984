"""`cogview2 inpaint` and `upscale`: pictures from pictures that are there already."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import bad_input, expand, fail, fail_all, failures, make_writable_folder, say, warn_of_unknown_in
from .families import is_cogview, pipeline_for
from .inputs import MOST_PIXELS, decode, describe_inputs, read_file, same_inputs
from .loading import (
    BATCH_OPTION,
    DEVICE_OPTION,
    DTYPE_OPTION,
    INT8_OPTION,
    METADATA_OPTION,
    MODEL_OPTION,
    OVERWRITE_OPTION,
    QUIET_OPTION,
    REQUESTS_OPTION,
    DType,
    ModelChoice,
)
from .names import problem_of_name
from .options import count_option, setting_option
from .requests import (
    INPAINT,
    LARGEST_SEED,
    MARGINS,
    UPSCALE,
    Kind,
    Request,
    check_area,
    check_arguments,
    check_prompt,
    check_seed,
    choose_seed,
    numbered,
    read_requests,
)
from .results import LineFailures, check_names, manifest_of, only_writer, refuse_others, save_with_line, sort_existing

if TYPE_CHECKING:
    from PIL import Image

SEED_OPTION = typer.Option(
    None,
    "--seed",
    "-s",
    min=0,
    max=LARGEST_SEED,
    help="Of the first result; result i has seed + i.  [default: random]",
)
OUTPUT_OPTION = typer.Option(
    None,
    "--output",
    "-o",
    help="A .png file; with several results, -1, -2, ... are added. With --requests, a folder.  [required]",
)
STYLE_OPTION = typer.Option(None, help="A style of the model.")
_NO_SETTINGS = ("num_images_per_prompt", "max_batch_size")  # they do not change what a picture looks like


def inpaint(
    prompt: str = typer.Argument(None, help="What the picture shows when it is done.", show_default=False),
    image: Path = typer.Option(None, help="The picture."),
    mask: Path = typer.Option(None, help="White where to paint, as large as the picture."),
    top: int = typer.Option(None, min=0, help="Instead of a mask: pixels to add at the top."),
    bottom: int = typer.Option(None, min=0, help="The same, at the bottom."),
    left: int = typer.Option(None, min=0, help="The same, at the left."),
    right: int = typer.Option(None, min=0, help="The same, at the right."),
    requests: Path = REQUESTS_OPTION,
    output: Path = OUTPUT_OPTION,
    seed: int = SEED_OPTION,
    num_images: int = count_option("--num-images", "-n", help="Results.  [default: 1]"),
    style: str = STYLE_OPTION,
    guidance_scale: float = setting_option("guidance_scale"),
    temperature: float = setting_option("temperature"),
    num_lopar_steps: int = setting_option("num_lopar_steps"),
    max_crop_size: int = typer.Option(None, min=1, help="Largest square that is completed at a time, in pixels."),
    max_batch_size: int = BATCH_OPTION,
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    int8: bool = INT8_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    metadata: bool = METADATA_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    quiet: bool = QUIET_OPTION,
) -> None:
    """
    Paint a part of a picture anew, or paint around it.

    Everything else stays as it is, bit for bit.

    A mask is black and white; of grey, the brighter half counts as white. If it has transparent parts, these are
    painted, whatever its colours are.

    With --requests FILE.jsonl, each line is an object with "id", "prompt", "image" and "mask" (or "top", "bottom",
    "left", "right"), and optionally "seed" and any other argument of the pipeline's call. Results are written as
    ID.png into the output folder, with a manifest; results that exist already are not made again.

    \b
    Examples:
      cogview2 inpaint "a pizza on a blue background" --image apple.png --mask mask.png -o pizza.png
      cogview2 inpaint "a cat on a red background" --image cat.png --left 60 --right 60 -o wide.png
      cogview2 inpaint --requests edits.jsonl --output edited
    """
    given = {
        "num_images_per_prompt": num_images,
        "style": style,
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "num_lopar_steps": num_lopar_steps,
        "max_crop_size": max_crop_size,
        "max_batch_size": max_batch_size,
    }
    margins = {"top": top, "bottom": bottom, "left": left, "right": right}
    files = {name: path for name, path in (("image", image), ("mask", mask)) if path is not None}
    own = {"PROMPT": prompt, "--image": image, "--mask": mask, **{f"--{name}": margins[name] for name in MARGINS}}
    choice = ModelChoice(model, device, dtype, read_adapters(lora), int8)
    run = _Run("inpaint", INPAINT, output, seed, choice, metadata, quiet, _paint)
    with bad_input():
        given = check_arguments(given, INPAINT)
    if requests is not None:
        _refuse_both(own)
        run.list(requests, given, overwrite)
        return
    if prompt is None or image is None:
        fail("Say what to paint: PROMPT and --image, and --mask or margins; or --requests.")
    with bad_input():
        request = Request(check_prompt(prompt), arguments={**given, **check_arguments(margins, INPAINT)}, files=files)
        try:
            check_area(request)
        except ValueError:
            fail("Say what to paint: either --mask, or some of --top, --bottom, --left and --right.")
    run.one(request)


def upscale(
    image: Path = typer.Argument(None, help="The picture, of any size.", show_default=False),
    prompt: str = typer.Option(None, help="What it shows; may be left out."),
    requests: Path = REQUESTS_OPTION,
    output: Path = OUTPUT_OPTION,
    seed: int = SEED_OPTION,
    levels: int = typer.Option(
        None, min=1, max=3, help="How many times to enlarge: each time the result of the last.  [default: 1]"
    ),
    tile_overlap: float = typer.Option(
        None, min=0, max=0.75, help="How far tiles of large pictures overlap, as a share of a side.  [default: 0.25]"
    ),
    faithful: bool = typer.Option(
        None, "--faithful/--free", help="Whether the result, reduced, is the picture again.  [default: faithful]"
    ),
    style: str = STYLE_OPTION,
    num_lopar_steps: int = setting_option("num_lopar_steps"),
    size: int = typer.Option(
        None, min=1, help="CogView only: height in pixels that the picture is brought to before, 128 or 256."
    ),
    temperature: float = typer.Option(None, min=0, help="CogView only: lower is more regular.  [default: 1.02]"),
    top_k: int = setting_option("top_k"),
    top_p: float = setting_option("top_p"),
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    int8: bool = INT8_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    metadata: bool = METADATA_OPTION,
    overwrite: bool = OVERWRITE_OPTION,
    quiet: bool = QUIET_OPTION,
) -> None:
    """
    Enlarge a picture by super-resolution.

    With the released models of CogView2 it becomes three times as high and wide. A CogView brings the square in its
    middle to one of its two sizes, and makes twice as many pixels each way of that.

    With --requests FILE.jsonl, each line is an object with "id" and "image", and optionally "prompt", "seed" and any
    other argument of the pipeline's call. Results are written as ID.png into the output folder, beside a manifest;
    what is there already is not made again.

    \b
    Examples:
      cogview2 upscale small.png --prompt "a tiger on a blue background" --output large.png
      cogview2 upscale --requests pictures.jsonl --output large
    """
    given = {
        "num_levels": levels,
        "tile_overlap": tile_overlap,
        "faithful": faithful,
        "style": style,
        "num_lopar_steps": num_lopar_steps,
        "size": size,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    choice = ModelChoice(model, device, dtype, read_adapters(lora), int8)
    run = _Run("upscale", UPSCALE, output, seed, choice, metadata, quiet, _enlarge)
    with bad_input():
        given = check_arguments(given, UPSCALE)
    if requests is not None:
        _refuse_both({"FILE": image, "--prompt": prompt})
        run.list(requests, given, overwrite)
        return
    if image is None:
        fail("Say what to enlarge: FILE, or --requests.")
    with bad_input():
        request = Request(check_prompt(prompt) if prompt else "", arguments=given, files={"image": image})
    run.one(request)


# Both ----------------------------------------------------------------------------------------------------------------

Pictures = dict[str, "Image.Image"]


@dataclass
class _Job:
    """A request with its first seed and the files for its results."""

    request: Request
    seed: int
    paths: list[Path]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def settings(self) -> dict:
        """The arguments that decide what results look like."""
        return {name: value for name, value in self.request.arguments.items() if name not in _NO_SETTINGS}


@dataclass
class _Run:
    """One call of a command: what all of its results share, and how they are made."""

    command: str
    kind: Kind
    output: Path | None
    seed: int | None
    model: ModelChoice
    keeps_metadata: bool
    quiet: bool
    make: Callable

    def one(self, request: Request) -> None:
        """Do a single request; what is wrong with it is bad input."""
        output = self._output()
        if output.suffix.lower() != ".png" or os.path.isdir(output):
            fail(f"`--output` must be a .png file, but is {output}. Only PNG files keep every pixel, prompt and seed.")
        with bad_input():
            seed = choose_seed(self.seed)
            check_seed(seed, request.num_images)
            # read before the model is loaded, which takes longer than finding a mistake
            contents, pictures = _read(
                request, {"image": "--image" if "mask" in self.kind.own else "FILE", "mask": "--mask"}
            )
        make_writable_folder(output.parent)
        paths = [output.with_name(name) for name in numbered(output.name, request.num_images)]
        problem = problem_of_name(paths[-1])  # the longest
        if problem is not None:
            fail(f"`--output`: {problem}")
        job, pipe = _Job(request, seed, paths), self._load()
        warn_of_unknown_in(pipe, request)
        with bad_input((ValueError, TypeError)), failures():
            for path, image, metadata in self._results(pipe, job, contents, pictures):
                self._save(image, path, metadata)

    def list(self, path: Path, given: dict, overwrite: bool) -> None:
        """Do what a JSONL file asks for and the folder does not hold yet; a line that fails stops no other."""
        with bad_input():
            requests, errors = read_requests(expand(path, "--requests"), self.kind, given, self.seed)
        if errors:
            fail_all(errors)
        folder = self._output()
        if os.path.exists(folder) and not os.path.isdir(folder):
            fail(f"`--output` must be a folder with --requests, but {folder} is a file.")
        make_writable_folder(folder)
        jobs = [
            _Job(request, choose_seed(request.seed), [folder / name for name in request.file_names()])
            for request in requests
        ]
        errors = check_names((job.request.where, job.paths) for job in jobs)
        if errors:
            fail_all(errors)
        with only_writer(folder):
            self._do(jobs, folder, overwrite)

    def _do(self, jobs: Sequence[_Job], folder: Path, overwrite: bool) -> None:
        """Do the jobs of a list that are not done yet."""
        model = self.model.identity()

        def made_from(job: _Job, metadata: dict) -> bool:
            seeds = range(job.seed, job.seed + len(job.paths))
            wanted = {
                "command": self.command,
                "prompt": job.request.prompt,
                "settings": job.settings,
                **model,
            }
            return (
                all(metadata.get(name) == value for name, value in wanted.items())
                and (job.request.seed is None or metadata.get("seed") in seeds)
                and same_inputs(job.request.files, metadata.get("inputs"))
            )

        kept, missing, others = sort_existing(jobs, made_from)
        refuse_others(others, overwrite)
        pipe = self._load() if missing else None
        failed = LineFailures(len(jobs))
        with failures(), manifest_of(folder, jobs, kept) as add_line:
            for job in missing:
                assert pipe is not None
                warn_of_unknown_in(pipe, job.request)
                try:
                    for file, image, metadata in self._results(pipe, job, *_read(job.request)):
                        with failed.of_writing(job.request.where):
                            save_with_line(add_line, job.id, image, file, metadata, self.keeps_metadata)
                except (ValueError, TypeError) as error:
                    failed.add(job.request.where, error)
        failed.finish()

    def _output(self) -> Path:
        if self.output is None:
            fail("`--output` must say where results go: a .png file, or with --requests a folder.")
        return expand(self.output, "--output")

    def _save(self, image: "Image.Image", path: Path, metadata: dict) -> None:
        from ..pictures.png import save_png

        save_png(image, path, metadata if self.keeps_metadata else None)
        say(path)

    def _load(self):
        pipe = self.model.load(self.command)
        with bad_input():
            pipe = pipeline_for(pipe, self.command)
        pipe.set_progress_bar_config(disable=True if self.quiet else None)
        return pipe

    def _results(self, pipe, job: _Job, contents: dict[str, bytes], pictures: Pictures):
        """The pictures of a job, each with its file and metadata."""
        import torch

        from ..pipelines.common.picture_metadata import of_change, of_maker

        inputs, maker = describe_inputs(job.request.files, contents), of_maker(self.model.describe(), pipe)
        generators = [torch.Generator().manual_seed(job.seed + index) for index in range(len(job.paths))]
        images = self.make(pipe, job.request, pictures, generators)
        for index, (path, image) in enumerate(zip(job.paths, images, strict=True)):
            own = of_change(self.command, job.request.prompt, job.seed + index, job.settings, inputs)
            yield path, image, {**own, **maker}


def _paint(pipe, request: Request, pictures: Pictures, generators: list) -> list["Image.Image"]:
    from ..pictures.files import as_mask

    arguments = dict(request.arguments)
    margins = {name: arguments.pop(name) for name in MARGINS if name in arguments}
    arguments["generator"] = generators
    if "mask" in pictures:
        return pipe(request.prompt, pictures["image"], as_mask(pictures["mask"]), **arguments).images
    return pipe.outpaint(request.prompt, pictures["image"], **margins, **arguments).images


def _enlarge(pipe, request: Request, pictures: Pictures, generators: list) -> list["Image.Image"]:
    from ..pipelines.common.arguments import check_taken

    image = pictures["image"]
    check_taken(pipe, request.arguments)
    if is_cogview(pipe):  # it brings the picture to one of its sizes first
        return pipe(image, request.prompt, generator=generators, **request.arguments).images
    scale = (pipe.scale[0] * pipe.scale[1]) ** request.arguments.get("num_levels", 1)
    if image.width * image.height * scale > MOST_PIXELS:
        raise ValueError(
            f"The result would have more than {MOST_PIXELS // 10**6} million pixels. Reduce the picture, or the"
            " number of levels."
        )
    return pipe(image, request.prompt, generator=generators, **request.arguments).images


def _read(request: Request, names: dict[str, str] | None = None) -> tuple[dict[str, bytes], Pictures]:
    """The files of a request, and the pictures in them."""
    names = {name: (names or {}).get(name, f"`{name}`") for name in request.files}
    contents = {name: read_file(path, names[name]) for name, path in request.files.items()}
    return contents, {name: decode(contents[name], path, names[name]) for name, path in request.files.items()}


def _refuse_both(own: dict) -> None:
    given = [name for name, value in own.items() if value is not None]
    if given:
        fail(f"--requests says what to do in its lines; leave out {', '.join(given)}.")
