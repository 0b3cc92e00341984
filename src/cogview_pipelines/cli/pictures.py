"""`cogview2 inpaint`, `upscale`, `caption` and `score`: what starts from pictures that are there already."""

import enum
import json
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .console import bad_input, fail, failures, make_writable_folder
from .loading import DEVICE_OPTION, DTYPE_OPTION, MODEL_OPTION, DType, load_pipeline
from .requests import LARGEST_SEED, check_prompt, check_seed, numbered

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 50_000_000
SEED_OPTION = typer.Option(
    None,
    "--seed",
    "-s",
    min=0,
    max=LARGEST_SEED,
    help="Of the first result; result i has seed + i.  [default: by chance]",
)
OUTPUT_OPTION = typer.Option(..., "--output", "-o", help="A .png file; with several results, -1, -2, ... are added.")
STYLE_OPTION = typer.Option(None, help="A style of the model.")
BATCH_OPTION = typer.Option(None, min=1, help="Results computed at a time.")
QUIET_OPTION = typer.Option(False, "--quiet", "-q", help="No progress bar.")
JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object a line.")


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


def read_image(path: Path, option: str) -> "Image.Image":
    """The picture in a file, upright as its camera says; what is wrong with the file is told in one line."""
    from PIL import Image, ImageOps

    path = path.expanduser()
    if not path.is_file():
        fail(f"{option}: there is no file {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            width, height = image.size
            if width * height > MOST_PIXELS:
                fail(
                    f"{option}: {path} has {width} x {height} pixels, but may have {MOST_PIXELS // 10**6} million. "
                    "Reduce it first."
                )
            if getattr(image, "n_frames", 1) > 1:
                fail(f"{option}: {path} is an animation of {image.n_frames} frames. Save one of them as a picture.")
            image.load()
            return ImageOps.exif_transpose(image)
    except typer.Exit:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        fail(f"{option}: {path} is too large. {error}")
    except Exception as error:  # whatever a damaged file makes the decoders raise
        fail(f"{option}: {path} is no picture that can be read, or is damaged ({type(error).__name__}: {error}).")


def inpaint(
    prompt: str = typer.Argument(..., help="What the picture shows when it is done."),
    image: Path = typer.Option(..., help="The picture."),
    mask: Path = typer.Option(None, help="White where to paint, as large as the picture."),
    top: int = typer.Option(0, min=0, help="Instead of a mask: pixels to add at the top."),
    bottom: int = typer.Option(0, min=0, help="Likewise, at the bottom."),
    left: int = typer.Option(0, min=0, help="Likewise, at the left."),
    right: int = typer.Option(0, min=0, help="Likewise, at the right."),
    output: Path = OUTPUT_OPTION,
    seed: int = SEED_OPTION,
    num_images: int = typer.Option(1, "--num-images", "-n", min=1, help="Results."),
    style: str = STYLE_OPTION,
    guidance_scale: float = typer.Option(None, help="Classifier-free guidance, 1 is none; twice the time."),
    temperature: float = typer.Option(None, help="Of the low-resolution tokens: lower is more regular."),
    num_lopar_steps: int = typer.Option(None, min=0, help="Passes of iterative super-resolution; 0 leaves it out."),
    max_crop_size: int = typer.Option(None, min=1, help="Largest square that is completed at a time, in pixels."),
    max_batch_size: int = BATCH_OPTION,
    model: str = MODEL_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    quiet: bool = QUIET_OPTION,
) -> None:
    """
    Paint what a mask marks anew, or around a picture.

    Everything else stays as it is, bit for bit.

    A mask is black and white, or grey, of which the brighter half counts as white. If it has transparent parts, these
    are painted, whatever its colours are.
    """
    margins = {"top": top, "bottom": bottom, "left": left, "right": right}
    if (mask is None) == (not any(margins.values())):
        fail("Say what to paint: either --mask, or some of --top, --bottom, --left and --right.")
    paths, seed = _prepare(output, num_images, seed, prompt)
    picture = read_image(image, "--image")
    white = None if mask is None else _as_mask(read_image(mask, "--mask"))
    from ..pipelines.pipeline_cogview2_inpaint import CogView2InpaintPipeline

    settings = {
        "style": style,
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "num_lopar_steps": num_lopar_steps,
        "max_crop_size": max_crop_size,
    }
    pipe = _load(CogView2InpaintPipeline, model, device, dtype, quiet)
    call = {
        **settings,
        "num_images_per_prompt": num_images,
        "generator": _generators(seed, num_images),
        "max_batch_size": max_batch_size,
    }
    with bad_input((ValueError, TypeError)), failures():
        if white is None:
            images = pipe.outpaint(prompt, picture, **margins, **call).images
        else:
            images = pipe(prompt, picture, white, **call).images
        used = {**settings, **({name: value for name, value in margins.items() if value} if white is None else {})}
        _save(images, paths, "inpaint", prompt, seed, used, model, pipe)


def upscale(
    image: Path = typer.Argument(..., help="The picture, of any size."),
    prompt: str = typer.Option("", help="What it shows; may be left out."),
    output: Path = OUTPUT_OPTION,
    seed: int = SEED_OPTION,
    levels: int = typer.Option(1, min=1, max=3, help="Enlarge again what came out, so many times in all."),
    tile_overlap: float = typer.Option(0.25, min=0, max=0.75, help="Of tiles of large pictures, as a part of a side."),
    style: str = STYLE_OPTION,
    num_lopar_steps: int = typer.Option(None, min=0, help="Passes of iterative super-resolution; 0 leaves it out."),
    model: str = MODEL_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    quiet: bool = QUIET_OPTION,
) -> None:
    """
    Enlarge a picture by super-resolution.

    With the released models it becomes three times as high and wide.
    """
    paths, seed = _prepare(output, 1, seed, prompt or "-")
    picture = read_image(image, "FILE")
    from ..pipelines.pipeline_cogview2_upscale import CogView2UpscalePipeline

    pipe = _load(CogView2UpscalePipeline, model, device, dtype, quiet)
    scale = (pipe.scale[0] * pipe.scale[1]) ** levels
    if picture.width * picture.height * scale > MOST_PIXELS:
        fail(
            f"The result would have more than {MOST_PIXELS // 10**6} million pixels. Reduce the picture, or --levels."
        )
    settings = {"style": style, "num_lopar_steps": num_lopar_steps, "num_levels": levels, "tile_overlap": tile_overlap}
    with bad_input((ValueError, TypeError)), failures():
        images = pipe(picture, prompt, generator=_generators(seed, 1), **settings).images
        _save(images, paths, "upscale", prompt, seed, settings, model, pipe)


def caption(
    images: list[Path] = typer.Argument(..., help="Pictures of any size; the square in the middle is seen."),
    language: Language = typer.Option(Language.en, "--language", "-l", help="Of the captions."),
    strategy: Strategy = typer.Option(
        Strategy.greedy, help="greedy, sample, beam, or best-of: draw --candidates and keep the best."
    ),
    num_captions: int = typer.Option(
        1, "--num-captions", "-n", min=1, help="Of each picture; more than one not greedy."
    ),
    candidates: int = typer.Option(8, min=1, help="For best-of."),
    beams: int = typer.Option(4, min=1, help="For beam."),
    max_length: int = typer.Option(None, min=1, help="The most tokens."),
    seed: int = typer.Option(None, "--seed", "-s", min=0, max=2**40, help="Of drawn captions.  [default: by chance]"),
    max_batch_size: int = BATCH_OPTION,
    as_json: bool = JSON_OPTION,
    model: str = MODEL_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    quiet: bool = QUIET_OPTION,
) -> None:
    """
    Describe pictures, one line a caption.

    If there are several files, the name of the file and a tab stand before it.
    """
    pictures = [read_image(path, "FILE") for path in images]
    import torch

    from ..pipelines.pipeline_cogview2_caption import CogView2CaptionPipeline

    pipe = _load(CogView2CaptionPipeline, model, device, dtype, quiet)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with bad_input((ValueError, TypeError)), failures():
        output = pipe(
            pictures,
            language=language.value,
            strategy=strategy.value.replace("-", "_"),
            num_captions_per_image=num_captions,
            num_candidates=candidates,
            num_beams=beams,
            max_length=max_length,
            generator=generator,
            max_batch_size=max_batch_size,
        )
    for index, (text, score) in enumerate(zip(output.captions, output.scores)):
        path = images[index // num_captions]
        if as_json:
            row = {"file": str(path), "language": language.value, "caption": text, "score": round(score, 4)}
            typer.echo(json.dumps(row, ensure_ascii=False))
        else:
            typer.echo(text if len(images) == 1 else f"{path}\t{text}")


def score(
    image: Path = typer.Argument(..., help="The picture."),
    prompts: list[str] = typer.Argument(..., help="Texts that may describe it, Chinese or English."),
    max_batch_size: int = BATCH_OPTION,
    as_json: bool = JSON_OPTION,
    model: str = MODEL_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
) -> None:
    """
    Say how well texts describe a picture, best first.

    Each line has the caption loss (lower is better), a tab and the text.
    """
    picture = read_image(image, "FILE")
    with bad_input():
        texts = [check_prompt(prompt) for prompt in prompts]
    from ..pipelines.pipeline_cogview2_caption import CogView2CaptionPipeline

    pipe = _load(CogView2CaptionPipeline, model, device, dtype, quiet=True)
    with bad_input((ValueError, TypeError)), failures():
        losses = pipe.score(picture, texts, max_batch_size=max_batch_size).tolist()
    for loss, text in sorted(zip(losses, texts), key=lambda pair: pair[0]):
        if as_json:
            typer.echo(json.dumps({"prompt": text, "caption_loss": round(loss, 4)}, ensure_ascii=False))
        else:
            typer.echo(f"{loss:.4f}\t{text}")


def _prepare(output: Path, count: int, seed: int | None, prompt: str) -> tuple[list[Path], int]:
    """Where the results go, and the first seed; or an error, before anything is loaded."""
    output = output.expanduser()
    if output.suffix.lower() != ".png" or output.is_dir():
        fail(f"`--output` must be a .png file, but is {output}. Only PNG files keep every pixel, prompt and seed.")
    with bad_input():
        check_prompt(prompt)
        seed = random.SystemRandom().randrange(2**31) if seed is None else check_seed(seed, count)
    make_writable_folder(output.parent)
    return [output.with_name(name) for name in numbered(output.name, count)], seed


def _load(kind, model: str, device: str | None, dtype: DType | None, quiet: bool):
    """A pipeline of a kind, from the folder of the text-to-image pipeline."""
    pipe = load_pipeline(model, device, dtype)
    with bad_input():
        pipe = kind.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True if quiet else None)
    return pipe


def _generators(seed: int, count: int) -> list:
    import torch

    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _as_mask(image: "Image.Image") -> "Image.Image":
    """A mask in grey; of a picture with transparency, what is transparent is white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opacity = image.convert("RGBA").getchannel("A")
        if opacity.getextrema()[0] < 255:
            return opacity.point(lambda value: 255 - value)
    return image.convert("L")


def _save(images, paths: list[Path], command: str, prompt: str, seed: int, settings: dict, model: str, pipe) -> None:
    from ..environment import versions
    from ..png import save_png

    for index, (image, path) in enumerate(zip(images, paths)):
        metadata = {
            "command": command,
            "prompt": prompt,
            "seed": seed + index,
            "settings": {name: value for name, value in settings.items() if value is not None},
            "model": model,
            "dtype": str(pipe.vqvae.dtype).removeprefix("torch."),
            "versions": versions(),
        }
        save_png(image, path, metadata)
        typer.echo(path)
