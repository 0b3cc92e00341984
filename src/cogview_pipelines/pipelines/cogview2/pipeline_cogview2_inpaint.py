"""Paint a part of a picture anew, or around it, as a text says."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F

from ...generation.batching import run_in_batches
from ...generation.sampling import Generators
from ...generation.tokens import TO_GENERATE, generate
from ...models.cogview2 import sequences
from ...pictures.pixels import OUTPUT_TYPES, Images, Picture, read_masks, read_pictures, write_pictures
from ...pictures.sizes import resize
from ..common.arguments import (
    PromptTranslator,
    check_choice,
    check_counts,
    check_numbers_drawn,
    check_prompts,
    one_generator_per_image,
    translate,
)
from ..common.calls import inference
from ..common.notifier import Callback
from ..common.previews import PreviewMixin
from ..common.settings import whole_number
from .base import Batch, CogView2PipelineBase, Stage
from .completion_geometry import MASK_SHARE, Box, best_window, covering_token_mask, crop_box, token_mask
from .outputs import CogView2InpaintPipelineOutput
from .settings import SamplingSettings

MASK_RULES = {"cover": covering_token_mask, "nearest": token_mask}


@dataclass(frozen=True)
class _Manner:
    """How a call paints."""

    settings: SamplingSettings
    stages: list[Stage]
    super_resolve: bool | None
    mask_share: float
    max_side: int | None
    mask_rule: str


@dataclass
class _Task:
    """One picture with its mask and text, and how to paint it."""

    picture: Picture
    mask: torch.Tensor
    text: list[int]
    negative: list[int] | None
    min_side: int
    manner: _Manner

    def next_crop(self, remaining: torch.Tensor, grid: tuple[int, int]) -> Box:
        """
        The next square: all of the mask if it fits into one that shows something else, too; else a part of it.

        Raises:
            ValueError: If all tokens of all squares that could be next are masked.
        """
        limit = min(*remaining.shape, self.manner.max_side or max(remaining.shape))
        side = self.min_side
        while True:
            box = crop_box(remaining, self.manner.mask_share, side, limit)
            side = box[2] - box[0]
            if _cut(remaining, box).sum() == remaining.sum() and self._shows_something(remaining, box, grid):
                return box
            if side >= limit:
                break
            side = side * 5 // 4 + 1
        for share in (self.manner.mask_share, self.manner.mask_share / 2, self.manner.mask_share / 4):
            box = best_window(remaining, share, limit)
            if self._shows_something(remaining, box, grid):
                return box
        raise ValueError(
            f"`mask_image` leaves nothing to complete in a square of {limit} pixels: every token is masked in "
            "part at least. Make the mask smaller or `max_crop_size` larger."
        )

    def _shows_something(self, remaining: torch.Tensor, box: Box, grid: tuple[int, int]) -> bool:
        return not bool(self.tokens_of(_cut(remaining, box), grid).all())

    def tokens_of(self, mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The mask in tokens; at least one token is marked."""
        marked = MASK_RULES[self.manner.mask_rule](mask, grid)
        return marked if marked.any() else covering_token_mask(mask, grid)


def _cut(mask: torch.Tensor, box: Box) -> torch.Tensor:
    top, left, bottom, right = box
    return mask[top:bottom, left:right]


@dataclass
class _Painted:
    """Results of one task: the pictures, the crops `(num_images, 3, height, width)` of each piece, and their boxes."""

    pictures: list[Picture]
    crops: list[torch.Tensor]
    boxes: list[Box]


class CogView2InpaintPipeline(PreviewMixin, CogView2PipelineBase):
    """
    Paint what a mask marks anew, as a text says; everything else stays as it is, bit for bit.

    A square around the mask is cut out and encoded; CogLM writes the masked tokens, seeing the text and all other
    tokens; super-resolution refines them, with the tokens of the original around them; the result goes back into the
    picture inside of the mask.

    Components and configuration are those of [`CogView2Pipeline`]; `from_pipe` shares them.

    Source: the paper (https://arxiv.org/abs/2204.14217) and the completion script of the release. Unlike the script,
    this takes pictures of any shape and leaves what is outside of the mask alone, and the prompt does not end with a
    second `<start_of_image>`.
    """

    _made_for = "inpainting"

    @inference
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Images,
        mask_image: Images,
        *,
        num_images_per_prompt: int = 1,
        style: str | None = None,
        super_resolve: bool | None = None,
        mask_share: float = MASK_SHARE,
        min_crop_size: int | None = None,
        max_crop_size: int | None = None,
        mask_rule: str = "cover",
        generator: Generators = None,
        prompt_translator: PromptTranslator | None = None,
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float | None = None,
        text_attention_bias: float | None = None,
        temperature: float | None = None,
        top_k_clusters: int | None = None,
        cluster_temperature: float | None = None,
        direct_sr_temperature: float | None = None,
        direct_sr_top_k_clusters: int | None = None,
        direct_sr_cluster_temperature: float | None = None,
        iterative_sr_temperature: float | None = None,
        iterative_sr_top_k: int | Sequence[int] | None = None,
        num_lopar_steps: int | None = None,
        max_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_statistics: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> CogView2InpaintPipelineOutput | tuple:
        """
        Complete pictures.

        The first prompt goes with the first picture and the first mask, and so on; a single one is used for all.

        Args:
            prompt (`str` or list of `str`): What the picture shows when it is done.
            image (PIL image, array, tensor, or list of them):
                Pictures of any size and shape; arrays `(height, width, 3)` and tensors `(3, height, width)` of bytes,
                or of floats in [0, 1]. Transparent parts count as white, and stay transparent outside of the mask.
            mask_image (PIL image, array, tensor, or list of them):
                White where to paint: mode `"1"` or `"L"`, or booleans, bytes or floats `(height, width)`, as large as
                the picture. Any shape, any number of holes.
            num_images_per_prompt (`int`): Results for each picture; they come picture by picture.
            style (`str`, *optional*): A name in `pipe.config.styles`; default: `pipe.config.default_style`.
            super_resolve (`bool`, *optional*): By default as in the release: if the square that is cut out is larger
                than the low resolution.
            mask_share (`float`, defaults to 14 / 20): The square is so large that the mask takes at most this part of
                its side, where the picture is large enough.
            min_crop_size, max_crop_size (`int`, *optional*):
                Bounds of the side of the square in pixels. By default at least half of the low resolution (with
                `whole_pictures` in `pipe.config`: the shorter side of the picture), and at most the shorter side of
                the picture. A mask that does not fit into the largest square is painted piece by
                piece; a smaller largest square gives more detail, and sees less of the picture.
            mask_rule (`str`): A token is painted if `"cover"`: any of its pixels is masked; `"nearest"`: its first
                pixel is, as in the release, which keeps parts of the old content along the edges.
            generator (`torch.Generator` or list of them, *optional*): One for all results, or one per result.
            prompt_translator, negative_prompt, guidance_scale, text_attention_bias, temperature, top_k_clusters,
            cluster_temperature, direct_sr_temperature, direct_sr_top_k_clusters, direct_sr_cluster_temperature,
            iterative_sr_temperature, iterative_sr_top_k, num_lopar_steps: As for [`CogView2Pipeline`].
            max_batch_size (`int`, *optional*): Results that are computed at a time; as for [`CogView2Pipeline`].
            output_type (`str`): `"pil"`, `"np"` or `"pt"`; the last two are float32 in [0, 1], one batch, or a list if
                the pictures differ in size.
            return_dict (`bool`): Return a [`CogView2InpaintPipelineOutput`] rather than a tuple.
            return_statistics, callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*): As for
                [`CogView2Pipeline`]; the tokens are those of the square.

        Raises:
            TypeError: If a picture or mask is none.
            ValueError: If an argument cannot be used; the message says which and why: a mask of another size than its
                picture, one that marks nothing, or one that leaves nothing to complete.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        settings = self._settings(style, locals())
        check_choice("output_type", output_type, OUTPUT_TYPES)
        check_choice("mask_rule", mask_rule, tuple(MASK_RULES))
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        prompts, pictures, masks = self._check_inputs(prompt, image, mask_image)
        (num_images_per_prompt,) = check_numbers_drawn(len(prompts), num_images_per_prompt=num_images_per_prompt)
        max_batch_size, min_crop_size, max_crop_size = check_counts(
            max_batch_size=max_batch_size, min_crop_size=min_crop_size, max_crop_size=max_crop_size
        )
        if not 0.01 <= mask_share <= 1:
            raise ValueError(f"`mask_share` must be from 0.01 to 1, but is {mask_share}.")
        if super_resolve and self.direct_sr_transformer is None:
            raise ValueError("`super_resolve` needs a pipeline with a `direct_sr_transformer`, which this one lacks.")
        has_fine = self.direct_sr_transformer is not None and super_resolve is not False
        stages = self._stages(settings) if has_fine else []
        negatives = self._encode_negative_prompts(negative_prompt, len(prompts), settings.guidance_scale)
        prompts = translate(prompts, prompt_translator)
        texts = self._encode_prompts(prompts, style, has_fine)
        manner = _Manner(settings, stages, has_fine and super_resolve, mask_share, max_crop_size, mask_rule)
        tasks = [
            _Task(picture, mask, text, negative, self._min_side(picture, min_crop_size), manner)
            for picture, mask, text, negative in zip(pictures, masks, texts, negatives or repeat(None))
        ]
        for task in tasks:
            task.next_crop(task.mask, self.layout.image_grid)  # or its error, before anything is computed
        generators = one_generator_per_image(generator, len(tasks) * num_images_per_prompt)
        sizes = [self._batch_size(max_batch_size, self.transformer, copies=1 if negatives is None else 2)]
        sizes += [self._batch_size(max_batch_size, getattr(self, stage.name)) for stage in stages]
        results, crops, boxes = [], [], []
        with self._running(
            total=0,
            return_statistics=return_statistics,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        ) as call:
            for index, task in enumerate(tasks):
                first = index * num_images_per_prompt
                own = generators[first : first + num_images_per_prompt]

                def paint(part: slice, task=task, first=first, own=own) -> _Painted:
                    with call.batch(list(range(first + part.start, first + part.stop))) as notify:
                        generators = own[part]
                        return self._paint(task, Batch([task.text] * len(generators), generators, notify))

                for painted in run_in_batches(paint, len(own), min(sizes), generators=own):
                    results += painted.pictures
                    crops += [
                        list(write_pictures([Picture(crop) for crop in steps], output_type))
                        for steps in zip(*painted.crops)
                    ]
                    boxes += [painted.boxes] * len(painted.pictures)
        output = CogView2InpaintPipelineOutput(
            images=write_pictures(results, output_type),
            crops=crops,
            crop_boxes=boxes,
            seeds=[generator.initial_seed() for generator in generators],
            prompts=[prompt for prompt in prompts for _ in range(num_images_per_prompt)],
            statistics=call.statistics,
        )
        return output if return_dict else output.to_tuple()

    @inference
    def outpaint(
        self,
        prompt: str | Sequence[str],
        image: Images,
        *,
        top: int = 0,
        bottom: int = 0,
        left: int = 0,
        right: int = 0,
        **call,
    ) -> CogView2InpaintPipelineOutput | tuple:
        """
        Paint around pictures: put them on a larger canvas, and complete that.

        Args:
            prompt, image: As for `__call__`.
            top, bottom, left, right (`int`): Pixels to add at each side.
            call: Further arguments of `__call__`. With a large margin, `max_crop_size=pipe.sizes[-1][0]` keeps the
                level of detail.

        Raises:
            TypeError, ValueError: As `__call__`, and if no side is to grow.
        """
        margins = {"top": top, "bottom": bottom, "left": left, "right": right}
        top, bottom, left, right = (whole_number(name, margin, least=0) for name, margin in margins.items())
        if not any(margins.values()):
            raise ValueError(
                "One of `top`, `bottom`, `left` and `right` must be above 0, or there is nothing to paint."
            )
        padding = (left, right, top, bottom)
        canvases, masks = [], []
        for picture in read_pictures(image):
            # the colours at the edges go on, so that the encoder sees no edge there
            pixels = F.pad(picture.pixels[None], padding, mode="replicate")[0]
            alpha = None if picture.alpha is None else F.pad(picture.alpha[None], padding, mode="replicate")[0]
            canvases.append(Picture(pixels, alpha))
            masks.append(F.pad(torch.zeros(picture.size, dtype=torch.bool), padding, value=True))
        return self(prompt, canvases, masks, **call)

    # Stages ----------------------------------------------------------------------------------------------------------

    def _paint(self, task: _Task, batch: Batch) -> _Painted:
        """Paint the whole mask, piece by piece."""
        num_images = len(batch.generators)
        pixels = task.picture.on_white()[None]  # one row until the first piece is painted: all results begin alike
        remaining = task.mask.clone()
        crops, boxes = [], []
        while remaining.any():
            top, left, bottom, right = box = task.next_crop(remaining, self.layout.image_grid)
            inside = (..., slice(top, bottom), slice(left, right))
            crop_mask = remaining[inside].clone()
            crop = self._complete(task, batch, pixels[inside], crop_mask).cpu()
            pixels = pixels.repeat(num_images, 1, 1, 1) if len(pixels) < num_images else pixels.clone()
            pixels[inside] = torch.where(crop_mask, resize(crop, crop_mask.shape), pixels[inside])
            remaining[inside] = False
            crops.append(crop)
            boxes.append(box)
        alpha = task.picture.alpha
        if alpha is not None:
            alpha = torch.where(task.mask, 1.0, alpha)
        painted = torch.where(task.mask, pixels, task.picture.pixels)
        return _Painted([Picture(one, alpha) for one in painted], crops, boxes)

    def _complete(self, task: _Task, batch: Batch, crop: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A crop with its masked part anew, one for each generator, at the resolution of the model."""
        low_size, fine_size = self.sizes[0], self.sizes[-1]
        stages, super_resolve = task.manner.stages, task.manner.super_resolve
        with batch.call.measure("vqvae"):
            known = self._encode_pixels(resize(crop, low_size))
        tokens = self._fill(task, batch, known, task.tokens_of(mask, self.layout.image_grid))
        if super_resolve is None:
            super_resolve = max(crop.shape[-2:]) > max(low_size)
        if super_resolve and stages:
            with batch.call.measure("vqvae"):
                fine = self._encode_pixels(resize(crop, fine_size)).expand(len(batch.generators), -1, -1)
            batch.call.expect(sum(stage.num_steps for stage in stages))
            tokens = self._super_resolve(stages, batch, tokens, fine, task.tokens_of(mask, fine.shape[-2:]))
        with batch.call.measure("vqvae"):
            return self._decode_pixels(tokens)

    def _fill(self, task: _Task, batch: Batch, known: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Low-resolution tokens with the masked ones written anew: `(num_images, rows, columns)`."""
        num_contexts, num_images = len(known), len(batch.generators)
        texts = [task.text] * num_contexts
        contexts = known.cpu()
        if task.negative is not None:
            texts += [task.negative] * num_contexts
            contexts = contexts.repeat(2, 1, 1)
        completion = sequences.completion(texts, contexts, mask, self.layout)
        grid = known.masked_fill(mask.to(known.device), -1).flatten(1).expand(num_images, -1)
        cells = completion.cells.to(known.device)
        entries = completion.entries[:num_contexts].expand(num_images, -1)
        batch.call.expect(int((entries[0] == TO_GENERATE).sum()))

        def place(entries: torch.Tensor) -> torch.Tensor:
            tokens = grid.clone()
            tokens[:, cells] = entries
            return tokens.unflatten(1, self.layout.image_grid)

        def report(step: int, entries: torch.Tensor) -> torch.Tensor | None:
            changed = batch.notify("transformer", step, place(entries))
            return None if changed is None else changed.flatten(1)[:, cells]

        settings = task.manner.settings
        with batch.call.measure("transformer"):
            entries = generate(
                self.transformer,
                completion.context,
                self._cluster_sampler(settings),
                entries,
                completion.positions,
                num_images_per_context=num_images // num_contexts,
                text_attention_bias=settings.text_attention_bias,
                guidance_scale=None if task.negative is None else settings.guidance_scale,
                generator=batch.generators,
                device=self._device_of(self.transformer),
                decoding=self._decoding,
                row_length=int(torch.bincount(cells // self.layout.image_grid[1]).max()),  # of a rectangle, its width
                callback=report,
                on_pass=functools.partial(batch.call.count_pass, "transformer"),
            )
        return place(entries)

    # Arguments -------------------------------------------------------------------------------------------------------

    def _min_side(self, picture: Picture, min_crop_size: int | None) -> int:
        """The least side of the square that is cut out of a picture."""
        if min_crop_size is not None:
            return min_crop_size
        return min(picture.size) if self.config.whole_pictures else max(self.sizes[0]) // 2

    def _check_inputs(
        self, prompt: str | Sequence[str], image: Images, mask_image: Images
    ) -> tuple[list[str], list[Picture], list[torch.Tensor]]:
        """Prompts, pictures and masks, as many of each."""
        prompts, pictures, masks = check_prompts(prompt), read_pictures(image), read_masks(mask_image)
        count = max(len(prompts), len(pictures), len(masks))
        for name, values in (("prompt", prompts), ("image", pictures), ("mask_image", masks)):
            if len(values) not in (1, count):
                raise ValueError(
                    f"`prompt`, `image` and `mask_image` must be as many, or one, but there are {len(prompts)}, "
                    f"{len(pictures)} and {len(masks)} (`{name}` fits neither)."
                )
        prompts, pictures, masks = (
            list(values) * (count if len(values) == 1 else 1) for values in (prompts, pictures, masks)
        )
        for picture, mask in zip(pictures, masks):
            if tuple(mask.shape) != picture.size:
                raise ValueError(
                    f"`mask_image` must be as large as its picture ({picture.size[0]} x {picture.size[1]} pixels), "
                    f"but is {mask.shape[0]} x {mask.shape[1]}. Resize it."
                )
            if not mask.any():
                raise ValueError("`mask_image` marks nothing to paint: no pixel is white. Mark at least one.")
            if mask.all():
                raise ValueError(
                    "`mask_image` marks the whole picture, so nothing is left to complete. Use `CogView2Pipeline`."
                )
        return prompts, pictures, masks


CogView2InpaintPipeline.__module__ = "cogview_pipelines"
