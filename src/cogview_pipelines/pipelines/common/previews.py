"""Pictures while they are being made."""

import contextvars
import functools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
import torch.nn.functional as F

from .arguments import check_counts
from .calls import GenerationInterrupted, inference
from .code_patches import code_patches
from .cpu_threads import release_cpu_threads
from .notifier import Callback
from .outputs import PreviewOutput
from .preview_budget import PreviewBudget, check_share

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Mixed  # what the mixin is part of
else:
    Mixed = object

NEUTRAL = 0.5  # grey


@dataclass
class _End:
    """What a call returned or raised."""

    output: Any = None
    error: BaseException | None = None


class PreviewMixin(Mixed):
    """`preview` and `stream` for pipelines whose call reports tokens to `callback_on_step_end`."""

    _preview_output: type[PreviewOutput]  # of the family

    @inference
    def preview(self, tokens: torch.Tensor) -> list[PIL.Image.Image]:
        """
        Decode tokens into pictures that are grey where tokens are not known yet.

        Args:
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`): As a callback gets them, -1 where unknown.
        """
        tokens, rate = tokens.cpu(), self.config.compression_rate
        known = (tokens >= 0) & (tokens < self.vqvae.config.num_embeddings)
        rows = known.flatten(2).any(2).any(0).nonzero()
        height = int(rows.max()) + 1 if len(rows) else 0  # what lies below is not worth decoding
        pixels = torch.full((len(tokens), 3, tokens.shape[1] * rate, tokens.shape[2] * rate), NEUTRAL)
        if height:
            tokens, known = tokens[:, :height], known[:, :height]
            if not known.all():
                tokens = torch.where(known, tokens, self._neutral_code())
            is_known = known.repeat_interleave(rate, 1).repeat_interleave(rate, 2)[:, None]
            pixels[:, :, : height * rate] = torch.where(is_known, self._decode_pixels(tokens).cpu(), NEUTRAL)
        return self.image_processor.postprocess(pixels, "pil")

    @inference
    def sketch(self, tokens: torch.Tensor) -> list[PIL.Image.Image]:
        """
        As [`preview`], a little coarser, from one patch of pixels for each code instead of the decoder: in a hundredth
        of the time. The first call makes the patches.

        Args:
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`): As a callback gets them, -1 where unknown.
        """
        patches, rate = self.code_patches(), self.config.compression_rate
        tokens = tokens.cpu()
        known = (tokens >= 0) & (tokens < len(patches))
        cells = torch.where(known[..., None, None, None], patches[torch.where(known, tokens, 0)], NEUTRAL)
        pixels = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        pixels = F.interpolate(pixels, scale_factor=rate / patches.shape[-1], mode="nearest")
        return self.image_processor.postprocess(pixels, "pil")

    def code_patches(self) -> torch.Tensor:
        """A patch of pixels for each code, `(num_codes, 3, side, side)`: float32 in [0, 1]; made once for a model."""
        return code_patches(self.vqvae, self.config.compression_rate, self._device_of(self.vqvae))

    def _neutral_code(self) -> torch.Tensor:
        """The code next to the middle of the codebook, for the decoder to see where nothing is known."""
        quantize = self.vqvae.quantize
        return quantize.nearest(quantize.embed.weight.mean(0, keepdim=True))[0].cpu()

    def stream(
        self,
        *args,
        rows_per_preview: int = 1,
        max_preview_share: float | None = 0.05,
        full_previews: bool = False,
        callback_on_step_end: Callback | None = None,
        **call,
    ) -> Iterator[PreviewOutput | Any]:
        """
        Make pictures as a call does, and watch: yields previews, and at last what the call returns.

        A preview of each batch comes every `rows_per_preview` rows of low-resolution tokens and after each pass of
        super-resolution, as far as there is time. A thread makes the pictures and does not wait for the reader of the
        previews. Closing the iterator stops the thread at its next step. The iterator raises what the call raises.

        Args:
            args, call: As for `__call__`.
            rows_per_preview (`int`, defaults to 1): Rows of low-resolution tokens from one preview to the next.
            max_preview_share (`float`, *optional*, defaults to 0.05): By which share previews may make the call
                slower, from 0 (no previews) to 1. A preview is left out if it would take more of the time so far,
                judged by the one before; the first is made. Tokens and pictures do not depend on it. A small model
                on a CPU leaves many out; with the released one on a GPU, a preview takes so little beside the steps
                before it that none should be. `None`: every preview is made.
            full_previews (`bool`, defaults to `False`): Decode previews as pictures are, instead of putting them
                together from a patch for each code: finer, and so much dearer that few may have time.
            callback_on_step_end (*optional*): As for `__call__`; called in that thread.

        Raises:
            ValueError: At once if one of the arguments above cannot be used.
        """
        check_counts(rows_per_preview=rows_per_preview)
        check_share(max_preview_share)
        tensor_inputs = call.pop("callback_on_step_end_tensor_inputs", self._callback_tensor_inputs)
        self._check_tensor_inputs(tensor_inputs)
        reports: queue.SimpleQueue[PreviewOutput | _End] = queue.SimpleQueue()
        closed = threading.Event()
        num_unseen = 0

        def watch(budget: PreviewBudget, pipe, step: int, timestep: int, kwargs: dict) -> dict | None:
            nonlocal num_unseen
            returned = None
            if closed.is_set():
                raise GenerationInterrupted(f"Stopped before step {step}, because the stream was closed.")
            if callback_on_step_end is not None:
                unwanted = set(self._callback_tensor_inputs) - set(tensor_inputs)
                own = {name: value for name, value in kwargs.items() if name not in unwanted}
                returned = callback_on_step_end(pipe, step, timestep, own)
            stage, tokens = kwargs["stage"], kwargs["tokens"]
            num_unseen += 1
            if stage != "transformer" or num_unseen >= rows_per_preview * tokens.shape[-1]:
                num_unseen = 0
                if not budget.allows(tokens):
                    return returned
                tokens = tokens.to("cpu", copy=True)  # the loop goes on writing into it
                about = (stage, step, timestep, kwargs["image_indices"])
                reports.put(self._preview_output(budget.make(self, tokens, full_previews), tokens, *about))
            return returned

        def work() -> None:
            inputs = {
                "callback_on_step_end": functools.partial(watch, PreviewBudget(max_preview_share)),
                "callback_on_step_end_tensor_inputs": self._callback_tensor_inputs,
            }
            try:
                reports.put(_End(output=self(*args, **call, **inputs)))
            except BaseException as error:  # raised again where the previews are read
                reports.put(_End(error=error))

        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
        return _read(thread, reports, closed)


def _read(thread: threading.Thread, reports: queue.SimpleQueue, closed: threading.Event) -> Iterator:
    """Reports of a thread up to its end, which comes at once if nobody reads on."""
    release_cpu_threads()
    thread.start()
    try:
        while not isinstance(report := reports.get(), _End):
            yield report
        if report.error is not None:
            raise report.error
        yield report.output
    finally:
        closed.set()
        thread.join()
