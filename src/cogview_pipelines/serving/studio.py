"""What the server can do with a model: called in the worker's thread, stoppable at every step."""

import contextlib
import dataclasses
import functools
import inspect
import io
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image

from ..generation.batching import is_out_of_memory
from ..pictures.png import encode_png
from ..pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from ..pipelines.cogview2.pipeline_cogview2_caption import CogView2CaptionPipeline
from ..pipelines.cogview2.pipeline_cogview2_inpaint import CogView2InpaintPipeline
from ..pipelines.cogview2.pipeline_cogview2_upscale import CogView2UpscalePipeline
from ..pipelines.cogview2.staged import Order, StagedPipeline
from ..pipelines.common.arguments import check_taken
from ..pipelines.common.notifier import Callback
from ..pipelines.common.picture_metadata import chosen_settings, of_change, of_generation, of_maker
from ..pipelines.common.preview_budget import PreviewBudget
from ..pipelines.common.unknown_words import find_unknown, messages
from .errors import ApiError, bad_request
from .jobs import Job, Stage, Work, checkpoint
from .schemas import (
    CaptionRequest,
    EditRequest,
    GenerationRequest,
    MakesPictures,
    ScoreRequest,
    UpscaleRequest,
)
from .settings import ServerSettings

FOREIGN_STYLES = ("vivid", "natural")
KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
PREVIEWED = 4  # pictures of a batch that a preview shows
PREVIEW_SHARE = 0.1  # by which previews may make a job slower: more than in scripts, since somebody sits and watches
# The arguments of the pipelines by other names
PARAMS = {
    "mask_image": "mask",
    "num_images_per_prompt": "n",
    "num_captions_per_image": "n",
    "num_steps": "num_lopar_steps",
    "height": "size",
    "width": "size",
}
FIELDS = {
    name
    for kind in (GenerationRequest, EditRequest, UpscaleRequest, CaptionRequest, ScoreRequest)
    for name in kind.model_fields
} | {"image", "mask"}


@dataclasses.dataclass
class Made:
    """
    Args:
        image (`PIL.Image.Image`): The picture.
        seed (`int`): That makes it again.
        prompt (`str`): The text that was used.
        metadata (`dict`): How it was made, for its file.
        score (`float`, *optional*): Of post-selection; higher is better.
    """

    image: Image.Image
    seed: int
    prompt: str
    metadata: dict[str, Any]
    score: float | None = None


@dataclasses.dataclass
class Drawing:
    """
    A request for pictures of a prompt at work.

    Args:
        order ([`Order`]): The pictures, and how far they are.
        settings (`dict`): Style, size and settings: all that the pictures depend on beside prompt and seed.
        first_seed (`int`): That of the first picture or candidate.
    """

    order: Order
    settings: dict[str, Any]
    first_seed: int


@dataclasses.dataclass
class Preview:
    """
    Args:
        stage (`str`): `"transformer"`, `"direct_sr_transformer"` or `"iterative_sr_transformer"`.
        step (`int`): Of the stage, from 1 on.
        images (`list[PIL.Image.Image]`): The first pictures, as the latest step that there was time to decode left
            them; empty for tiles.
    """

    stage: str
    step: int
    images: list[Image.Image]


class Studio:
    """
    The pipelines of one model, which share its weights.

    Args:
        pipe ([`CogView2Pipeline`]): The model, on its device.
        name (`str`): What clients call it.
        settings ([`ServerSettings`]): Bounds.
        identity (`Mapping`, *optional*): What picture files say of the model; default: its name.
    """

    def __init__(
        self,
        pipe: CogView2Pipeline,
        name: str,
        settings: ServerSettings,
        identity: Mapping[str, Any] | None = None,
    ):
        self.name, self.bounds = name, settings
        self.maker = of_maker(identity or {"model": name}, pipe)
        self.text_to_image: Any = pipe
        self.staged: Any = StagedPipeline(pipe)
        # what a model has no parts for is None, and is refused before there is a job
        self.inpainting: Any = CogView2InpaintPipeline.from_pipe(pipe)
        self.captioning: Any = CogView2CaptionPipeline.from_pipe(pipe)
        self.upscaling: Any = None
        if pipe.direct_sr_transformer is not None:
            self.upscaling = CogView2UpscalePipeline.from_pipe(pipe)
        for each in (self.text_to_image, self.inpainting, self.captioning, self.upscaling):
            if each is not None:
                each.set_progress_bar_config(disable=True)

    @property
    def sizes(self) -> list[str]:
        """WIDTHxHEIGHT of the pictures it makes, smallest first."""
        return [f"{width}x{height}" for height, width in self.text_to_image.sizes]

    @property
    def columns(self) -> int:
        """Low-resolution tokens in a row."""
        return self.text_to_image.layout.image_grid[1]

    @property
    def styles(self) -> list[str]:
        """Names of the style presets."""
        return sorted(self.text_to_image.config.styles)

    # What the page offers, besides what all models can.
    strategies = ("greedy", "best_of")
    max_levels = 2
    has_languages = True

    def takes(self, name: str) -> bool:
        """Whether text to image takes an argument."""
        return name in inspect.signature(type(self.text_to_image).__call__).parameters

    def describe(self) -> dict[str, Any]:
        """The entry of `GET /v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "cogview_pipelines",
            "sizes": self.sizes,
            "styles": self.styles,
        }

    # Checks, before there is a job -----------------------------------------------------------------------------------

    def check_generation(self, request: GenerationRequest) -> None:
        """Raise the error that the work would end with, before it is queued."""
        bounds = self.bounds
        self._check_common(request.model, [request.prompt, request.negative_prompt or ""], request.n)
        if request.num_candidates is not None:
            self._check_count("num_candidates", request.num_candidates, bounds.max_candidates)
        with explained():
            check_taken(self.text_to_image, self._settings(request))
            self._used_settings(request)

    def check_edit(self, request: EditRequest, image: Image.Image, mask: Image.Image) -> None:
        """As [`Studio.check_generation`]."""
        self._check_common(request.model, [request.prompt, request.negative_prompt or ""], request.n)
        size = f"{image.width}x{image.height}"
        if request.size not in ("auto", size):
            raise bad_request(f"`size` must be auto or that of the picture, {size}: results are as large.", "size")
        with explained():
            check_taken(self.inpainting, self._settings(request))
            self.text_to_image.check_inputs(request.prompt, **self._settings(request))
            self.inpainting._check_inputs(request.prompt, image, mask)

    def check_upscale(self, request: UpscaleRequest, image: Image.Image) -> None:
        """As [`Studio.check_generation`]."""
        self._check_common(request.model, [request.prompt], 1)
        if self.upscaling is None:
            raise bad_request("This model has no super-resolution.", "model", "unsupported")
        self._check_pixels(image, request.num_levels)
        with explained():
            check_taken(self.upscaling, self._settings(request))
            self.text_to_image.check_inputs(request.prompt.strip() or "a", **self._settings(request))

    def check_caption(self, request: CaptionRequest, num_pictures: int) -> None:
        """As [`Studio.check_generation`]."""
        self._check_model(request.model)
        self._check_count("image", num_pictures, self.bounds.max_images)
        self._check_count("n", request.n, self.bounds.max_candidates)
        self._check_count("num_candidates", request.num_candidates, self.bounds.max_candidates)

    def check_scores(self, request: ScoreRequest) -> None:
        """As [`Studio.check_generation`]."""
        self._check_model(request.model)
        self._check_count("prompt", len(request.prompt), self.bounds.max_texts)
        for text in request.prompt:
            self._check_length(text)
            with explained():
                self.captioning.check_texts([text])

    # Work, in the thread of the worker -------------------------------------------------------------------------------

    def generation(self, request: GenerationRequest) -> Work:
        """
        What there is to do for pictures of a prompt, best first if there are candidates: stage by stage, together with
        other requests whose settings are the same.

        Raises:
            ApiError: If the request cannot be served.
        """
        count = request.num_candidates or request.n
        with explained():
            settings = self._used_settings(request)
            order = self.staged.order(
                request.prompt,
                generators_of(request.seed, count),
                num_images=request.n,
                num_candidates=request.num_candidates,
                **self._size(request.size),
                **self._settings(request),
            )
        draft, *refinements, decode = order.keys
        stages = [Stage(draft, self._draft)]
        stages += [Stage(key, self._refine) for key in refinements]
        drawing = Drawing(order, settings, first_seed=order.seeds[0])
        return Work([*stages, Stage(decode, self._decode)], drawing, size=count)

    def _draft(self, jobs: list[Job]) -> None:
        orders = [job.state.order for job in jobs]
        with self._stoppable(jobs), explained():
            self.staged.draft(orders, self._watch(jobs, _owners(jobs, orders)))

    def _refine(self, jobs: list[Job]) -> None:
        orders = [job.state.order for job in jobs]
        with self._stoppable(jobs), explained():
            self.staged.refine(orders, self._watch(jobs, _owners(jobs, orders)))

    def _decode(self, jobs: list[Job]) -> None:
        orders = [job.state.order for job in jobs]
        with self._stoppable(jobs), explained():
            found = self.staged.decode(orders)
        for job, order, images in zip(jobs, orders, found):
            chosen = (order.num_candidates, job.state.first_seed)
            job.state = [
                made_of_prompt(image, seed, order.prompt, job.state.settings, *chosen, score)
                for image, seed, score in zip(images, order.seeds, order.scores or [None] * len(images))
            ]

    def edit(
        self,
        request: EditRequest,
        image: Image.Image,
        mask: Image.Image,
        inputs: Mapping[str, Mapping[str, str]],
        job: Job,
    ) -> list[Made]:
        """Pictures with the masked part painted anew."""
        settings = self._settings(request)
        with self._stoppable([job]), explained():
            output = self.inpainting(
                request.prompt,
                image,
                mask,
                num_images_per_prompt=request.n,
                **settings,
                generator=generators_of(request.seed, request.n),
                callback_on_step_end=self._watch([job]),
            )
        return [
            Made(image, seed, prompt, of_change("inpaint", prompt, seed, settings, inputs))
            for image, seed, prompt in zip(output.images, output.seeds, output.prompts)
        ]

    def enlargement(
        self, request: UpscaleRequest, image: Image.Image, inputs: Mapping[str, Mapping[str, str]]
    ) -> Work:
        """What there is to do for a picture enlarged, together with others of its size whose settings are the same."""
        settings = {"num_levels": request.num_levels, **self._settings(request)}
        key = ("upscale", image.size, repr(sorted(settings.items())))
        run = functools.partial(self._upscale, **settings)
        return Work([Stage(key, run)], (image, request.prompt, request.seed, inputs))

    def _upscale(self, jobs: list[Job], **settings: Any) -> None:
        states = [job.state for job in jobs]
        images, prompts, seeds, inputs = (list(each) for each in zip(*states))
        with self._stoppable(jobs), explained():
            output = self.upscaling(
                images,
                prompts,
                **settings,
                generator=[generator for seed in seeds for generator in generators_of(seed, 1)],
                callback_on_step_end=self._watch(jobs, owners=jobs),
            )
        for job, image, seed, prompt, own in zip(jobs, output.images, output.seeds, output.prompts, inputs):
            job.state = [Made(image, seed, prompt, of_change("upscale", prompt, seed, settings, own))]

    def caption(self, request: CaptionRequest, images: list[Image.Image], job: Job) -> list[list[dict]]:
        """Captions of each picture with their scores, best first."""
        captions = []
        drawn = {"sample": request.n, "best_of": request.num_candidates}.get(request.strategy, 0)
        for index, image in enumerate(images):
            checkpoint([job])
            seed = None if request.seed in (None, -1) else request.seed + index * drawn
            with self._stoppable([job]), explained():
                output = self.captioning(
                    image,
                    language=request.language,
                    strategy=request.strategy,
                    num_captions_per_image=request.n,
                    num_candidates=request.num_candidates,
                    temperature=request.temperature,
                    generator=generators_of(seed, drawn) if drawn else None,
                )
            captions.append([{"text": text, "score": score} for text, score in zip(output.captions, output.scores)])
        return captions

    def score(self, request: ScoreRequest, image: Image.Image, job: Job) -> list[dict]:
        """Each text with its caption loss, best first."""
        with self._stoppable([job]), explained():
            losses = self.captioning.caption_loss(image, request.prompt).tolist()
        ranked = sorted(zip(losses, range(len(losses))))
        return [{"prompt": request.prompt[index], "index": index, "caption_loss": loss} for loss, index in ranked]

    def encode(self, made: Made, kind: str = "png", quality: int = 100) -> bytes:
        """
        A file of a picture; a PNG file says how its picture was made, unless the server is to leave that out.

        Args:
            made ([`Made`]): The picture.
            kind (`str`): `"png"`, `"jpeg"` or `"webp"`.
            quality (`int`): Of JPEG and WebP, from 0 to 100.
        """
        if kind == "png":
            return encode_png(made.image, {**made.metadata, **self.maker} if self.bounds.metadata else None)
        content = io.BytesIO()
        made.image.convert("RGB" if kind == "jpeg" else made.image.mode).save(content, KINDS[kind], quality=quality)
        return content.getvalue()

    def find_unknown(self, texts: Iterable[str], scored: bool = False) -> dict[str, list[str]]:
        """What the model does not know of texts that are drawn, or scored, by what becomes of it; each part once."""
        pipe = self.text_to_image
        return find_unknown(pipe.tokenizer, texts, pipe.caption_component if scored else None)

    def warnings(self, scored: bool = False, **texts: str | list[str] | None) -> list[dict[str, str]]:
        """
        What an answer is to say about the texts of its request, by their fields: what the model does not know of
        those that are drawn, or are `scored`.
        """
        told = {
            name: messages(self.find_unknown([own] if isinstance(own, str) else own, scored), f"`{name}`")
            for name, own in texts.items()
            if own
        }
        return [
            {"message": each, "code": "unreadable_text", "param": name} for name, own in told.items() for each in own
        ]

    # Parts -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stoppable(self, jobs: list[Job]) -> Iterator[None]:
        """Look for an end before each layer of the image tokenizer, too: a large picture takes long in there."""

        def look(*_: Any) -> None:
            checkpoint(jobs)

        layers = [layer for layer in self.text_to_image.vqvae.modules() if next(layer.children(), None) is None]
        handles = [layer.register_forward_pre_hook(look) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, jobs: list[Job], owners: list[Job] | None = None) -> Callback:
        """
        A callback that ends what is to stop, and says how far the others are.

        Args:
            jobs (`list[Job]`): Whose work it is.
            owners (`list[Job]`, *optional*): Whose each of its pictures is, if there are several jobs.
        """
        watched = [job for job in jobs if job.wants_previews]
        for job in watched:
            job.budget = job.budget or PreviewBudget(PREVIEW_SHARE)
            job.budget.max_share = PREVIEW_SHARE / len(watched)

        def on_step(pipe: Any, step: int, timestep: int, kwargs: dict) -> None:
            checkpoint(jobs)
            stage, tokens, indices = kwargs["stage"], kwargs["tokens"], kwargs["image_indices"]
            if stage == "transformer" and timestep % tokens.shape[-1]:
                return  # a row is not complete
            for job in watched:
                rows = [row for row, index in enumerate(indices) if owners is None or owners[index] is job]
                if job.has_ended or not rows:
                    continue
                images, own = job.preview.images if job.preview else [], tokens[rows[:PREVIEWED]]
                if pipe is not self.upscaling and job.budget.allows(own):
                    images = job.budget.make(pipe, own.cpu())
                job.preview = Preview(stage, timestep, images)

        return on_step

    def _size(self, size: str) -> dict[str, int]:
        if size == "auto":
            return {}
        if size not in self.sizes:
            raise bad_request(f"`size` must be auto, {' or '.join(self.sizes)} with this model.", "size")
        width, height = map(int, size.split("x"))
        return {"width": width, "height": height}

    def _settings(self, request: MakesPictures) -> dict[str, Any]:
        """Style and settings of sampling that a request names, without what only other servers know."""
        settings = request.settings()
        if settings.get("style") in FOREIGN_STYLES and settings["style"] not in self.styles:
            del settings["style"]
        return settings

    def _used_settings(self, request: GenerationRequest) -> dict[str, Any]:
        """All settings that the pictures of a request depend on, as their files name them; it is checked with them."""
        return chosen_settings(
            self.text_to_image.check_inputs(
                request.prompt,
                num_images_per_prompt=request.n,
                num_candidates=request.num_candidates,
                **self._size(request.size),
                **self._settings(request),
            )
        )

    def _check_pixels(self, image: Image.Image, num_levels: int) -> None:
        """Whether a picture is small enough to be enlarged, with what is added to fill its tiles."""
        width, height = image.size
        for _ in range(num_levels):
            rows, columns = self.upscaling.padded_size(height, width)
            row_scale, column_scale = self.upscaling.scale
            pixels = rows * row_scale * columns * column_scale
            if pixels > self.bounds.max_output_pixels:
                raise bad_request(
                    f"The enlarged picture may have {self.bounds.max_output_pixels:,} pixels, with what fills its "
                    f"tiles, but would have {pixels:,}. Send a smaller one or ask for fewer levels.",
                    "image",
                )
            width, height = width * column_scale, height * row_scale

    def _check_common(self, model: str | None, texts: list[str], count: int) -> None:
        self._check_model(model)
        for text in texts:
            self._check_length(text)
        self._check_count("n", count, self.bounds.max_images)

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise ApiError(404, f"There is no such model. This server has `{self.name}`.", "model_not_found", "model")

    def _check_length(self, text: str) -> None:
        if len(text) > self.bounds.max_prompt_length:
            raise bad_request(
                f"`prompt` may have {self.bounds.max_prompt_length} characters, but has {len(text)}. Shorten it.",
                "prompt",
                "prompt_too_long",
            )

    @staticmethod
    def _check_count(name: str, count: int, most: int) -> None:
        if count > most:
            raise bad_request(f"`{name}` may be {most} on this server, but is {count}.", name)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """
    Turn what a pipeline says about an argument into an answer.

    The pipelines name the argument in backticks. Other errors are ours, and stay what they are.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        for name, own in PARAMS.items():
            message = message.replace(f"`{name}`", f"`{own}`")
        found = re.search(r"`(\w+)(?:\[\d+\])?`", message)
        if found is None or found[1] not in FIELDS:
            raise
        raise bad_request(message, found[1]) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ApiError(
            503, "There is not enough memory for this. Ask for fewer or smaller pictures.", "out_of_memory"
        ) from None


def _owners(jobs: list[Job], orders: list[Order]) -> list[Job]:
    """Whose each of the pictures of some orders is."""
    return [job for job, order in zip(jobs, orders) for _ in order.seeds]


def made_of_prompt(
    image: Image.Image,
    seed: int,
    prompt: str,
    settings: dict[str, Any],
    num_candidates: int | None,
    first_seed: int,
    score: float | None,
) -> Made:
    """A picture that was made from its prompt alone; see [`of_generation`]."""
    metadata = of_generation(prompt, seed, settings, num_candidates, first_seed, score)
    return Made(image, seed, prompt, metadata, score)


def generators_of(seed: int | None, count: int) -> list[torch.Generator]:
    first = random.SystemRandom().randrange(2**31) if seed in (None, -1) else seed
    return [torch.Generator().manual_seed(first + index) for index in range(count)]
