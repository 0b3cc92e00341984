"""The page: text to image, a brush, enlarging, captions and ranking, in English and Chinese."""

import asyncio
import base64
import binascii
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import anyio.to_thread
import gradio as gr
from PIL import Image

from ..pictures.files import as_mask
from ..pipelines.common import unknown_words
from ..pipelines.common.picture_metadata import of_input
from . import page_errors, page_html, schemas
from .errors import ApiError, bad_request, internal_error
from .forms import decode_picture
from .jobs import Job, JobCancelled, Work, alone
from .metrics import Metrics
from .page_texts import LANGUAGES, preferred_language, text
from .settings import ServerSettings
from .studio import Made, Studio
from .worker import Worker

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# Gradio notices only between two states of the page that its reader has left: show one this often at least.
REPEAT_SECONDS = 1.0
LEASE_SECONDS = 30.0  # in case that it does not notice at all
FONTS = ["system-ui", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
DATA_URL = "data:image/png;base64,"


class Page:
    """
    The page of a server.

    Args:
        studio ([`Studio`]), worker ([`Worker`]), metrics ([`Metrics`]), settings ([`ServerSettings`]): Those of its
            API: both stand in the same queue and have the same bounds.
    """

    def __init__(self, studio: Studio, worker: Worker, metrics: Metrics, settings: ServerSettings):
        self.studio, self.worker, self.metrics, self.settings = studio, worker, metrics, settings
        self._labels: list[tuple[gr.blocks.Block, dict[str, Callable[[str], Any]]]] = []

    def build(self) -> gr.Blocks:
        """The page, to be mounted."""
        with gr.Blocks(title="CogView2", analytics_enabled=False, fill_width=False) as blocks:
            self._named(gr.Markdown, value=lambda language: f"# {text('title', language)}")
            self._language = self._named(
                gr.Radio,
                label="interface_language",
                choices=list(LANGUAGES.items()),
                value="en",
                elem_id="cv-language",
            )
            with gr.Tabs():
                self._create_tab()
                if self.studio.inpainting is not None:
                    self._edit_tab()
                if self.studio.upscaling is not None:
                    self._upscale_tab()
                self._caption_tab()
                self._score_tab()
            gr.HTML(page_html.gallery())
            outputs = [component for component, _ in self._labels]
            self._language.change(
                self._relabel,
                self._language,
                outputs,
                js="(language) => { window.cogview2.setLanguage(language); return [language]; }",
                api_visibility="private",
                show_progress="hidden",
                trigger_mode="always_last",
            )
            blocks.load(_first_language, None, self._language, api_visibility="private", show_progress="hidden")
        blocks.queue(max_size=2 * self.settings.queue_limit, api_open=False)
        # what Gradio keeps for visits that ended without a word: not thousands of them
        blocks.state_session_capacity = self.settings.queue_limit
        blocks._queue.pending_messages_per_session.max_size = self.settings.max_connections
        return blocks

    # Tabs ------------------------------------------------------------------------------------------------------------

    def _create_tab(self) -> None:
        with self._tab("create"), gr.Row():
            with gr.Column(scale=2):
                prompt = self._prompt("prompt", "cv-create-prompt")
                with gr.Row():
                    count = self._slider("n", 1, self.settings.max_images, 1)
                    candidates = self._slider("candidates", 1, self.settings.max_candidates, 1)
                seed = self._seed()
                with self._named(gr.Accordion, label="settings", open=False):
                    sizes = self.studio.sizes
                    size = self._named(gr.Radio, label="size", choices=sizes, value=sizes[-1])
                    style = self._style()
                    temperature, guidance, negative = self._sampling()
                    steps = self._named(
                        gr.Textbox, label="steps", max_length=20, visible=self.studio.takes("num_lopar_steps")
                    )
                start, stop = self._buttons("make", "cv-create")
            with gr.Column(scale=3):
                result = gr.HTML()
        inputs = [prompt, count, candidates, seed, size, style, temperature, guidance, negative, steps]
        self._on_click(start, stop, self.create, inputs, result)

    def _edit_tab(self) -> None:
        with self._tab("edit"), gr.Row():
            with gr.Column(scale=2):
                gr.HTML(page_html.picture_field("edit", has_mask=True))
                sent = [_sent("picture"), _sent("mask")]
                prompt = self._prompt("edit_prompt", "cv-edit-prompt")
                count = self._slider("n", 1, self.settings.max_images, 1)
                seed = self._seed()
                with self._named(gr.Accordion, label="settings", open=False):
                    style = self._style()
                    temperature, guidance, negative = self._sampling()
                start, stop = self._buttons("paint", "cv-edit")
            with gr.Column(scale=3):
                result = gr.HTML()
        inputs = [*sent, prompt, count, seed, style, temperature, guidance, negative]
        self._on_click(start, stop, self.edit, inputs, result, picture="edit", has_mask=True)

    def _upscale_tab(self) -> None:
        with self._tab("upscale"), gr.Row():
            with gr.Column(scale=2):
                gr.HTML(page_html.picture_field("upscale"))
                sent = _sent("picture")
                prompt = self._prompt("upscale_prompt", "cv-upscale-prompt")
                levels = self._slider("levels", 1, 2, 1, visible=self.studio.max_levels > 1)
                seed = self._seed()
                start, stop = self._buttons("enlarge", "cv-upscale")
            with gr.Column(scale=3):
                result = gr.HTML()
        self._on_click(start, stop, self.upscale, [sent, prompt, levels, seed], result, picture="upscale")

    def _caption_tab(self) -> None:
        with self._tab("caption"), gr.Row():
            with gr.Column(scale=2):
                gr.HTML(page_html.picture_field("caption"))
                sent = _sent("picture")
                language = self._named(
                    gr.Radio,
                    label="caption_language",
                    choices=list(LANGUAGES.items()),
                    value="en",
                    visible=self.studio.has_languages,
                )
                strategy = self._named(
                    gr.Radio,
                    label="strategy",
                    choices=lambda chosen: [(text(name, chosen), name) for name in self.studio.strategies],
                    value="greedy",
                )
                start, stop = self._buttons("describe", "cv-caption")
            with gr.Column(scale=3):
                result = gr.HTML()
        self._on_click(start, stop, self.caption, [sent, language, strategy], result, picture="caption")

    def _score_tab(self) -> None:
        with self._tab("score"), gr.Row():
            with gr.Column(scale=2):
                gr.HTML(page_html.picture_field("score"))
                sent = _sent("picture")
                texts = self._named(gr.Textbox, label="texts", lines=5, elem_id="cv-score-texts")
                start, stop = self._buttons("rank", "cv-score")
            with gr.Column(scale=3):
                result = gr.HTML()
        self._on_click(start, stop, self.score, [sent, texts], result, picture="score")

    # What the buttons do ---------------------------------------------------------------------------------------------

    async def create(
        self, prompt, count, candidates, seed, size, style, temperature, guidance, negative, steps, language
    ) -> AsyncIterator[str]:
        """Pictures of a prompt."""
        fields = _given(
            prompt=prompt,
            n=count,
            num_candidates=candidates if candidates > count else None,
            seed=seed,
            size=size,
            style=style,
            temperature=temperature,
            guidance_scale=guidance,
            negative_prompt=negative,
            num_lopar_steps=steps,
        )

        async def prepare() -> Work:
            wanted = schemas.parse(schemas.GenerationRequest, fields, strict=False)
            self.studio.check_generation(wanted)
            return self.studio.generation(wanted)

        answer = functools.partial(self._show_pictures, negative=negative)
        async for state in self._follow("generation", prepare, answer, language):
            yield state

    async def edit(
        self, picture, mask, prompt, count, seed, style, temperature, guidance, negative, language
    ) -> AsyncIterator[str]:
        """The marked part of a picture, painted anew."""
        fields = _given(
            prompt=prompt,
            n=count,
            seed=seed,
            style=style,
            temperature=temperature,
            guidance_scale=guidance,
            negative_prompt=negative,
        )

        async def prepare() -> Work:
            wanted = schemas.parse(schemas.EditRequest, fields, strict=False)
            image, image_file = await self._picture(picture, "image")
            marked, mask_file = await self._picture(mask, "mask")
            white, inputs = as_mask(marked), {"image": image_file, "mask": mask_file}
            self.studio.check_edit(wanted, image, white)
            return alone(functools.partial(self.studio.edit, wanted, image, white, inputs))

        answer = functools.partial(self._show_pictures, negative=negative)
        async for state in self._follow("edit", prepare, answer, language):
            yield state

    async def upscale(self, picture, prompt, levels, seed, language) -> AsyncIterator[str]:
        """A picture, enlarged."""
        fields = _given(prompt=prompt, num_levels=levels, seed=seed)

        async def prepare() -> Work:
            wanted = schemas.parse(schemas.UpscaleRequest, fields, strict=False)
            image, image_file = await self._picture(picture, "image")
            self.studio.check_upscale(wanted, image)
            return self.studio.enlargement(wanted, image, {"image": image_file})

        async for state in self._follow("upscale", prepare, self._show_pictures, language):
            yield state

    async def caption(self, picture, caption_language, strategy, language) -> AsyncIterator[str]:
        """Captions of a picture."""
        fields = {"strategy": strategy, "n": 1 if strategy == "greedy" else 3}
        if self.studio.has_languages:
            fields["language"] = caption_language

        async def prepare() -> Work:
            wanted = schemas.parse(schemas.CaptionRequest, fields, strict=False)
            self.studio.check_caption(wanted, 1)
            image, _ = await self._picture(picture, "image")
            return alone(functools.partial(self.studio.caption, wanted, [image]))

        async def show(found: list[list[dict]], kind: str, language: str) -> str:
            rows = [(entry["text"], entry["score"]) for entry in found[0]]
            return page_html.table(["caption", "caption_score"], rows, language)

        async for state in self._follow("caption", prepare, show, language):
            yield state

    async def score(self, picture, texts, language) -> AsyncIterator[str]:
        """Texts, the one that describes a picture best first."""
        fields = {"prompt": [line.strip() for line in texts.splitlines() if line.strip()]}

        async def prepare() -> Work:
            wanted = schemas.parse(schemas.ScoreRequest, fields, strict=False)
            self.studio.check_scores(wanted)
            image, _ = await self._picture(picture, "image")
            return alone(functools.partial(self.studio.score, wanted, image))

        async def show(found: list[dict], kind: str, language: str) -> str:
            rows = [(entry["prompt"], entry["caption_loss"]) for entry in found]
            notes = self._notes([entry["prompt"] for entry in found], language, scored=True)
            return page_html.table(["text", "loss"], rows, language, notes)

        async for state in self._follow("score", prepare, show, language):
            yield state

    async def _follow(self, kind: str, prepare: Callable, show: Callable, language: str) -> AsyncIterator[str]:
        """States of the result from the queue to the end; closing this cancels the work."""
        language = "zh" if language == "zh" else "en"
        try:
            with self.worker.place() as place:
                yield page_html.waiting(language)
                work = await prepare()
                name = f"page-{uuid.uuid4().hex[:11]}"
                job = Job(kind, work, request_id=name, wants_previews=True, lease=LEASE_SECONDS)
                place.submit(job)
                shown, at = None, time.monotonic()
                while not job.future.done():
                    job.renew()
                    await asyncio.sleep(POLL_SECONDS)
                    preview = job.preview
                    if preview is not shown or time.monotonic() > at + REPEAT_SECONDS:
                        shown, at = preview, time.monotonic()
                        yield self._progress(job, preview, language)
                yield await show(job.future.result(), kind, language)
        except ApiError as error:
            yield page_html.failure(page_errors.explain(error, language), language)
        except JobCancelled:
            yield page_html.failure(text("stopped", language), language)
        except Exception:
            logger.exception("The page failed")
            yield page_html.failure(page_errors.explain(internal_error(), language), language)

    def _progress(self, job: Job, preview: Any, language: str) -> str:
        if not job.has_started:
            return page_html.waiting(language)
        return page_html.progress(preview, self.studio.columns, language)

    async def _show_pictures(self, made: list[Made], kind: str, language: str, negative: str = "") -> str:
        self.metrics.pictures.labels(kind).inc(len(made))
        contents = await anyio.to_thread.run_sync(lambda: [self.studio.encode(one) for one in made])
        notes = self._notes([*(one.prompt for one in made), negative or ""], language)
        missing = {"edit": self.studio.inpainting, "upscale": self.studio.upscaling}
        targets = [name for name in page_html.TARGETS if missing.get(name, self.studio) is not None]
        return page_html.pictures(made, contents, notes, language, targets)

    def _notes(self, texts: Iterable[str], language: str, scored: bool = False) -> list[str]:
        """What the model does not know of texts, each part once."""
        found = self.studio.find_unknown(texts, scored)
        return [text(f"unknown_{kind}", language, parts=unknown_words.show(parts)) for kind, parts in found.items()]

    async def _picture(self, url: Any, name: str) -> tuple[Image.Image, dict[str, str]]:
        """What page.js sent, and what the files of results say of it."""
        if not isinstance(url, str) or not url.startswith(DATA_URL):
            raise bad_request(f"`{name}` must be given: choose a picture.", name, "missing_parameter")
        try:
            content = base64.b64decode(url.removeprefix(DATA_URL), validate=True)
        except binascii.Error:
            raise bad_request(f"`{name}` is damaged.", name, "invalid_image") from None
        image = await decode_picture(content, name, self.settings.max_pixels)
        return image, await anyio.to_thread.run_sync(of_input, content)

    # Parts -----------------------------------------------------------------------------------------------------------

    def _named(self, kind: type, **arguments: Any) -> Any:
        """A component whose label, value or choices depend on the language."""
        changes: dict[str, Callable[[str], Any]] = {}
        for name, value in arguments.items():
            if name == "label":
                changes[name] = functools.partial(text, value)
            elif callable(value):
                changes[name] = value
        component = kind(**{**arguments, **{name: change("en") for name, change in changes.items()}})
        self._labels.append((component, changes))
        return component

    def _relabel(self, language: str) -> list[dict]:
        language = "zh" if language == "zh" else "en"
        return [
            gr.update(**{name: change(language) for name, change in changes.items()}) for _, changes in self._labels
        ]

    def _tab(self, name: str) -> gr.Tab:
        return self._named(gr.Tab, label=f"tab_{name}", id=name, elem_id=f"cv-tab-{name}", render_children=True)

    def _prompt(self, label: str, elem_id: str) -> gr.Textbox:
        return self._named(
            gr.Textbox, label=label, lines=2, max_length=self.settings.max_prompt_length, elem_id=elem_id
        )

    def _slider(self, label: str, least: int, most: int, value: int, visible: bool = True) -> gr.Slider:
        bounds = {"minimum": least, "maximum": most, "step": 1}
        return self._named(gr.Slider, label=label, **bounds, value=value, visible=visible)

    def _seed(self) -> gr.Textbox:
        # a text: a field for numbers cannot be empty, nor hold all seeds
        return self._named(gr.Textbox, label="seed", max_length=20)

    def _style(self) -> gr.Dropdown:
        return self._named(
            gr.Dropdown,
            label="style",
            choices=lambda language: [(text("default", language), ""), *self.studio.styles],
            value="",
            visible=bool(self.studio.styles),
        )

    def _sampling(self) -> tuple[gr.Textbox, gr.Textbox, gr.Textbox]:
        return (
            self._named(gr.Textbox, label="temperature", max_length=20),
            self._named(gr.Textbox, label="guidance", max_length=20, visible=self.studio.takes("guidance_scale")),
            self._named(
                gr.Textbox,
                label="negative_prompt",
                max_length=self.settings.max_prompt_length,
                visible=self.studio.takes("negative_prompt"),
            ),
        )

    def _buttons(self, start: str, elem_id: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            return (
                self._named(
                    gr.Button, value=functools.partial(text, start), variant="primary", elem_id=f"{elem_id}-start"
                ),
                self._named(gr.Button, value=functools.partial(text, "stop"), elem_id=f"{elem_id}-stop"),
            )

    def _on_click(
        self,
        start: gr.Button,
        stop: gr.Button,
        work: Callable,
        inputs: list,
        result: gr.HTML,
        picture: str | None = None,
        has_mask: bool = False,
    ) -> None:
        """Pictures come from page.js at the click: no component of Gradio holds them."""
        js = None
        if picture is not None:
            sent = [f"window.cogview2.picture('{picture}')"]
            if has_mask:
                sent.append(f"window.cogview2.mask('{picture}')")
            js = f"(...values) => [{', '.join(sent)}, ...values.slice({len(sent)})]"
        event = start.click(
            work,
            [*inputs, self._language],
            result,
            js=js,
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=self.settings.queue_limit,
            concurrency_id="work",
        )
        stop.click(None, None, None, cancels=[event], api_visibility="private")


def _sent(name: str) -> gr.Textbox:
    """A place among the inputs for what page.js sends."""
    return gr.Textbox(visible=False, label=name)


def _given(**fields: Any) -> dict[str, Any]:
    """Fields that were filled in."""
    fields = {name: value.strip() if isinstance(value, str) else value for name, value in fields.items()}
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _first_language(request: gr.Request) -> str:
    return preferred_language(request.headers.get("accept-language", ""))
