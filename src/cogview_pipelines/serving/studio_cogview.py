"""What the server can do with a model of the first CogView."""

import functools
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..pipelines.cogview.pipeline_cogview import CogViewPipeline
from ..pipelines.cogview.pipeline_cogview_caption import CogViewCaptionPipeline
from ..pipelines.cogview.pipeline_cogview_upscale import CogViewUpscalePipeline
from ..pipelines.common.arguments import check_taken
from ..pipelines.common.picture_metadata import of_maker
from .errors import bad_request
from .jobs import Job, Stage, Work, checkpoint
from .schemas import CaptionRequest, EditRequest, GenerationRequest, UpscaleRequest
from .settings import ServerSettings
from .studio import Studio, explained, generators_of, made_of_prompt


class CogViewStudio(Studio):
    """
    The pipelines of one model of CogView, which share its weights.

    Args:
        pipe ([`CogViewPipeline`]): The model, on its device.
        name (`str`): What clients call it.
        settings ([`ServerSettings`]): Bounds.
        identity (`Mapping`, *optional*): What picture files say of the model; default: its name.
    """

    strategies = ("greedy", "sample")
    max_levels = 1
    has_languages = False

    def __init__(
        self,
        pipe: CogViewPipeline,
        name: str,
        settings: ServerSettings,
        identity: Mapping[str, Any] | None = None,
    ):
        self.name, self.bounds = name, settings
        self.maker = of_maker(identity or {"model": name}, pipe)
        self.text_to_image = pipe
        self.staged = self.inpainting = self.upscaling = None
        self.captioning = CogViewCaptionPipeline.from_pipe(pipe)
        if pipe.super_resolution_transformer is not None:
            self.upscaling = CogViewUpscalePipeline.from_pipe(pipe)
        for each in (self.text_to_image, self.captioning, self.upscaling):
            if each is not None:
                each.set_progress_bar_config(disable=True)

    @property
    def styles(self) -> list[str]:
        """None: CogView has no presets."""
        return []

    # Checks, before there is a job -----------------------------------------------------------------------------------

    def check_edit(self, request: EditRequest, image: Image.Image, mask: Image.Image) -> None:
        """Refuse it: this model writes whole pictures only."""
        raise bad_request("This model cannot paint a part of a picture.", "model", "unsupported")

    def check_upscale(self, request: UpscaleRequest, image: Image.Image) -> None:
        """As [`Studio.check_generation`]."""
        self._check_common(request.model, [request.prompt], 1)
        if self.upscaling is None:
            raise bad_request("This model has no super-resolution.", "model", "unsupported")
        if request.num_levels != 1:
            raise bad_request("`num_levels` must be 1 with this model: it enlarges to one size.", "num_levels")
        with explained():
            check_taken(self.upscaling, self._settings(request))
            self.upscaling.check_inputs(request.prompt, **self._settings(request))

    def check_caption(self, request: CaptionRequest, num_pictures: int) -> None:
        """As [`Studio.check_generation`]."""
        super().check_caption(request, num_pictures)
        if "language" in request.model_fields_set:
            raise bad_request("`language` has no meaning for this model. Leave it out.", "language")
        if request.strategy not in self.strategies:
            raise bad_request(f"`strategy` must be {' or '.join(self.strategies)} with this model.", "strategy")
        if request.strategy == "greedy" and request.n > 1:
            raise bad_request("`n` must be 1 unless `strategy` is sample: there is one greedy caption.", "n")

    # Work, in the thread of the worker -------------------------------------------------------------------------------

    def generation(self, request: GenerationRequest) -> Work:
        """What there is to do for pictures of a prompt, together with other requests whose settings are the same."""
        settings = self._settings(request)
        key = ("generation", request.n, request.num_candidates, repr(sorted(settings.items())))
        run = functools.partial(self._generate, count=request.n, num_candidates=request.num_candidates, **settings)
        with explained():
            used = self._used_settings(request)
        state = (request.prompt, request.seed, used)
        return Work([Stage(key, run)], state, size=request.num_candidates or request.n)

    def _generate(self, jobs: list[Job], count: int, num_candidates: int | None, **settings: Any) -> None:
        drawn = num_candidates or count
        prompts = [job.state[0] for job in jobs]
        generators = [generators_of(job.state[1], drawn) for job in jobs]
        first_seeds = [own[0].initial_seed() for own in generators]
        with self._stoppable(jobs), explained():
            output = self.text_to_image(
                prompts,
                num_images_per_prompt=count,
                num_candidates=num_candidates,
                generator=[generator for own in generators for generator in own],
                callback_on_step_end=self._watch(jobs, [job for job in jobs for _ in range(drawn)]),
                **settings,
            )
        scores = output.scores or [None] * len(output.images)
        made = list(zip(output.images, output.seeds, output.prompts, scores))
        for index, (job, first_seed) in enumerate(zip(jobs, first_seeds)):
            used = job.state[2]
            job.state = [
                made_of_prompt(image, seed, prompt, used, num_candidates, first_seed, score)
                for image, seed, prompt, score in made[index * count : (index + 1) * count]
            ]

    def enlargement(
        self, request: UpscaleRequest, image: Image.Image, inputs: Mapping[str, Mapping[str, str]]
    ) -> Work:
        """What there is to do for a picture enlarged, together with others whose settings are the same."""
        settings = self._settings(request)
        run = functools.partial(self._upscale, **settings)
        state = (image, request.prompt, request.seed, inputs)
        return Work([Stage(("upscale", repr(sorted(settings.items()))), run)], state)

    def caption(self, request: CaptionRequest, images: list[Image.Image], job: Job) -> list[list[dict]]:
        """Captions of each picture with their scores."""
        captions = []
        drawing = {} if request.strategy == "sample" else {"top_k": 1}
        for index, image in enumerate(images):
            checkpoint([job])
            seed = None if request.seed in (None, -1) else request.seed + index * request.n
            with self._stoppable([job]), explained():
                output = self.captioning(
                    image,
                    num_captions_per_image=request.n,
                    temperature=request.temperature,
                    generator=generators_of(seed, request.n),
                    **drawing,
                )
            captions.append([{"text": text, "score": score} for text, score in zip(output.captions, output.scores)])
        return captions

    # Parts -----------------------------------------------------------------------------------------------------------

    def _size(self, size: str) -> dict[str, int]:
        super()._size(size)
        return {}  # there is one
