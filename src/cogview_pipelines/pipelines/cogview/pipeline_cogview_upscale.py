"""Finer pictures with CogView: 16 x 16 tokens to 32 x 32, and 32 x 32 to 64 x 64 by nine sliding windows."""

import functools
from collections.abc import Sequence
from dataclasses import asdict

import torch

from ...generation.batching import run_in_batches, slices
from ...generation.sampling import Generators
from ...generation.tokens import TO_GENERATE, generate
from ...models.cogview import sequences
from ...pictures.pixels import Images
from ..common.arguments import (
    PromptTranslator,
    check_choice,
    check_counts,
    check_prompts,
    one_generator_per_image,
    translate,
)
from ..common.calls import Call, inference
from ..common.notifier import Callback, Notifier
from ..common.previews import PreviewMixin
from .base import CogViewPipelineBase
from .outputs import CogViewPipelineOutput
from .settings import UpscaleSettings

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STAGE = "super_resolution_transformer"


class CogViewUpscalePipeline(PreviewMixin, CogViewPipelineBase):
    """
    Pictures of twice as many tokens each way, token by token.

    A picture of 16 x 16 tokens (128 pixels) becomes one of 32 x 32 (256 pixels). One of 32 x 32 tokens becomes 64 x 64
    (512 pixels) in nine windows that overlap: each sees 16 x 16 tokens of the picture and the finer tokens that
    windows before it wrote in its place, which stay.

    Args:
        tokenizer ([`CogViewTokenizer`]): Text to ids.
        vqvae ([`CogViewVQModel`]): Pixels to tokens, and back.
        super_resolution_transformer ([`CogViewModel`]): Writes finer pictures (`cogview-sr`).
        transformer, caption_transformer ([`CogViewModel`], *optional*): Of the other pipelines.
        compression_rate, settings: As of [`CogViewPipeline`].

    Source: https://arxiv.org/abs/2105.13290, section 3.1.
    """

    _made_for = "upscaling"
    _needed = (STAGE,)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels: of what the first and the second step start from, and of what comes out."""
        rate, (rows, columns) = self.config.compression_rate, self.layout.image_grid
        return [(rows * rate * 2**step // 2, columns * rate * 2**step // 2) for step in range(3)]

    @inference
    def __call__(
        self,
        image: Images | None = None,
        prompt: str | Sequence[str] = "",
        *,
        tokens: torch.Tensor | None = None,
        size: int | None = None,
        generator: Generators = None,
        prompt_translator: PromptTranslator | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_statistics: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> CogViewPipelineOutput | tuple:
        """
        Make pictures finer.

        Args:
            image (PIL image, array, tensor, or list of them):
                Pictures of any size, of which the square in the middle is used; arrays `(height, width, 3)` and
                tensors `(3, height, width)` of bytes, or of floats in [0, 1]. Or give `tokens`.
            prompt (`str` or list of `str`): What the pictures show, one for all or one each (57 tokens with the
                released model); may be left out.
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`, *optional*):
                Tokens instead, such as `CogViewPipeline` makes: 16 x 16 or 32 x 32 with the released model.
            size (`int`, *optional*): Height in pixels that pictures are reduced or enlarged to before: one of the
                first two of `pipe.sizes`; default: the second.
            generator (`torch.Generator` or list of them, *optional*): One for all pictures, or one per picture. The
                picture of a generator is the same alone and in any batch.
            prompt_translator, max_batch_size, output_type, return_statistics, callback_on_step_end,
            callback_on_step_end_tensor_inputs: As for [`CogViewPipeline`]; tokens are those of the finer pictures.
            temperature (`float`, defaults to 1.02), top_k (`int`, defaults to 200), top_p (`float`, *optional*): How
                tokens are drawn.
            return_dict (`bool`): Return a [`CogViewPipelineOutput`] rather than a tuple.

        Raises:
            TypeError: If a picture is none.
            ValueError: If an argument cannot be used; the message says which and why.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        settings = UpscaleSettings.choose(self._preset, locals())
        check_choice("output_type", output_type, OUTPUT_TYPES)
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        (max_batch_size,) = check_counts(max_batch_size=max_batch_size)
        if (image is None) == (tokens is None):
            raise ValueError("Give either `image` or `tokens`.")
        if tokens is not None and size is not None:
            raise ValueError("`size` has no effect on `tokens`, which have a size of their own. Leave it out.")
        pixels = None if image is None else self._read_images(image, self._size(size))
        given = self._check_tokens(tokens) if pixels is None else pixels
        prompts = check_prompts(prompt, allow_empty=True)
        if len(prompts) not in (1, len(given)):
            raise ValueError(f"`prompt` must be one or one per picture ({len(given)}), but there are {len(prompts)}.")
        prompts = translate(prompts * (len(given) if len(prompts) == 1 else 1), prompt_translator)
        texts = self._encode_prompts(prompts, self.layout.max_super_resolution_text_tokens)
        generators = one_generator_per_image(generator, len(given))
        batch_size = self._batch_size(max_batch_size, self.super_resolution_transformer)
        with self._running(
            total=0,
            return_statistics=return_statistics,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        ) as call:
            if pixels is not None:
                with call.measure("vqvae"):
                    given = torch.cat([self._encode_pixels(part) for part in pixels.split(batch_size)])
            fine = self._enlarge(call, given.cpu(), texts, generators, settings, batch_size)
            with call.measure("vqvae"):
                images = self._decode(fine, output_type)
        output = CogViewPipelineOutput(
            images=images,
            tokens=fine,
            seeds=[generator.initial_seed() for generator in generators],
            prompts=prompts,
            statistics=call.statistics,
        )
        return output if return_dict else output.to_tuple()

    def check_inputs(self, prompt: str = "", *, size: int | None = None, **settings) -> dict:
        """
        Raise the error that a call with these arguments would raise, without computing anything.

        Args:
            prompt, size: As for `__call__`.
            settings: The call's settings of sampling.

        Returns:
            `dict`: The settings that the call would use.

        Raises:
            TypeError: If there is no such setting.
            ValueError: If an argument cannot be used; the message says which and why.
        """
        unknown = sorted(set(settings) - set(UpscaleSettings.declared()))
        if unknown:
            raise TypeError(f"There are no settings {unknown}. Known: {list(UpscaleSettings.declared())}.")
        used = UpscaleSettings.choose(self._preset, settings)
        self._size(size)
        self._encode_prompts(check_prompts(prompt, allow_empty=True), self.layout.max_super_resolution_text_tokens)
        return asdict(used)

    # Stages ----------------------------------------------------------------------------------------------------------

    def _enlarge(
        self,
        call: Call,
        tokens: torch.Tensor,
        texts: list[list[int]],
        generators: list[torch.Generator],
        settings: UpscaleSettings,
        batch_size: int,
    ) -> torch.Tensor:
        """`(num_pictures, rows, columns)` tokens to twice as many each way."""
        is_coarse = tuple(tokens.shape[1:]) == self.layout.coarse_grid
        num_steps = self.layout.image_length if is_coarse else self._num_window_steps()
        call.expect(num_steps * len(slices(len(tokens), batch_size)))
        enlarge = self._enlarge_coarse if is_coarse else self._enlarge_by_windows

        def work(part: slice) -> torch.Tensor:
            with call.batch(list(range(part.start, part.stop))) as notify, call.measure(STAGE):
                return enlarge(tokens[part], texts[part], generators[part], settings, notify)

        def expect_more(num_batches: int) -> None:
            call.expect(num_batches * num_steps)

        parts = run_in_batches(work, len(tokens), batch_size, generators=generators, on_more_batches=expect_more)
        return torch.cat(parts)

    def _enlarge_coarse(
        self,
        tokens: torch.Tensor,
        texts: list[list[int]],
        generators: list[torch.Generator],
        settings: UpscaleSettings,
        notify: Notifier,
    ) -> torch.Tensor:
        grid = self.layout.image_grid

        def report(step: int, entries: torch.Tensor) -> torch.Tensor | None:
            changed = notify(STAGE, step, entries.unflatten(1, grid))
            return None if changed is None else changed.flatten(1)

        entries = torch.full((len(tokens), self.layout.image_length), TO_GENERATE)
        return self._write(tokens.flatten(1), texts, entries, generators, settings, notify, report).unflatten(1, grid)

    def _enlarge_by_windows(
        self,
        tokens: torch.Tensor,
        texts: list[list[int]],
        generators: list[torch.Generator],
        settings: UpscaleSettings,
        notify: Notifier,
    ) -> torch.Tensor:
        """Window by window; those of one round side by side, for all pictures."""
        layout = self.layout
        windows, fine = sequences.sliding_windows(layout), sequences.unwritten(len(tokens), layout)
        for indices in sequences.window_rounds(layout):
            own = [windows[index] for index in indices]
            # picture by picture, so that each draws for its windows in their order, whatever the batch
            entries = _interleave([sequences.window_entries(fine, window, layout) for window in own])
            coarse = _interleave([tokens[_of_all(window.coarse(layout))].flatten(1) for window in own])
            repeated = [text for text in texts for _ in own]
            sources = [generator for generator in generators for _ in own]
            report = functools.partial(self._report_windows, notify, fine, own)
            written = self._write(coarse, repeated, entries, sources, settings, notify, report)
            fine = _placed(fine, own, written.cpu(), layout)
        return fine

    def _report_windows(
        self,
        notify: Notifier,
        fine: torch.Tensor,
        windows: list[sequences.SlidingWindow],
        step: int,
        written: torch.Tensor,
    ) -> torch.Tensor | None:
        """Show the whole finer pictures with what windows have written so far; what of it the caller changes."""
        changed = notify(STAGE, notify.step + 1, _placed(fine, windows, written, self.layout))
        if changed is None:
            return None
        return _interleave([sequences.window_entries(changed, window, self.layout) for window in windows])

    def _num_window_steps(self) -> int:
        """Tokens that are written one after another: of windows side by side, the longer ones'."""
        layout = self.layout
        windows, fine, num_steps = sequences.sliding_windows(layout), sequences.unwritten(1, layout), 0
        for indices in sequences.window_rounds(layout):
            entries = [sequences.window_entries(fine, windows[index], layout) for index in indices]
            num_steps += max(int((one == TO_GENERATE).sum()) for one in entries)
            for index in indices:
                fine[_of_all(windows[index].fine(layout))] = 0
        return num_steps

    def _write(
        self,
        coarse: torch.Tensor,
        texts: list[list[int]],
        entries: torch.Tensor,
        generators: list[torch.Generator],
        settings: UpscaleSettings,
        notify: Notifier,
        report,
    ) -> torch.Tensor:
        """What follows each of some coarse pictures, `(num_sequences, coarse_length)`."""
        model, layout = self.super_resolution_transformer, self.layout
        return generate(
            model,
            sequences.super_resolution(texts, coarse, layout),
            self._sampler(settings),
            entries,
            sequences.fine_positions(layout)[: entries.shape[1]],
            generator=generators,
            device=self._device_of(model),
            decoding=self._decoding,
            row_length=layout.image_grid[1],
            callback=report,
            on_pass=functools.partial(notify.call.count_pass, STAGE),
        )

    # Arguments -------------------------------------------------------------------------------------------------------

    def _size(self, size: int | None) -> tuple[int, int]:
        """Height and width in pixels that pictures are brought to."""
        possible = {height: (height, width) for height, width in self.sizes[:2]}
        if size is None:
            return self.sizes[1]
        if size not in possible:
            raise ValueError(f"`size` must be {' or '.join(map(str, possible))} with this model, but is {size}.")
        return possible[size]

    def _check_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of the caller, if they are codes in one of the two grids."""
        layout = self.layout
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"`tokens` must be a torch tensor, but is of type `{type(tokens).__name__}`.")
        grids = (layout.coarse_grid, layout.image_grid)
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) not in grids or not len(tokens):
            possible = " or ".join(f"{rows} x {columns}" for rows, columns in grids)
            raise ValueError(
                f"`tokens` must have the shape (num_images, rows, columns) with {possible} tokens, but have "
                f"{tuple(tokens.shape)}."
            )
        most = layout.num_image_tokens - 1
        if tokens.is_floating_point() or not 0 <= int(tokens.min()) <= int(tokens.max()) <= most:
            raise ValueError(
                f"`tokens` must be image codes, whole numbers in 0..{most}, but are {tokens.dtype} in "
                f"{tokens.min().item()}..{tokens.max().item()}."
            )
        return tokens.long()


def _of_all(cells: tuple[slice, slice]) -> tuple[slice, slice, slice]:
    """These rows and columns of every picture, as an index."""
    return (slice(None), *cells)


def _interleave(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of several tensors, row by row: first rows first."""
    return torch.stack(parts, 1).flatten(0, 1)


def _placed(
    fine: torch.Tensor, windows: list[sequences.SlidingWindow], written: torch.Tensor, layout: sequences.SequenceLayout
) -> torch.Tensor:
    """The finer tokens with what windows wrote, `(num_pictures * num_windows, cells)`, picture by picture."""
    fine = fine.to(written.device, copy=True)
    for window, cells in zip(windows, written.unflatten(0, (-1, len(windows))).unbind(1)):
        rows, columns = window.fine(layout)
        fine[:, rows, columns] = cells.unflatten(1, (rows.stop - rows.start, columns.stop - columns.start))
    return fine


CogViewUpscalePipeline.__module__ = "cogview_pipelines"
