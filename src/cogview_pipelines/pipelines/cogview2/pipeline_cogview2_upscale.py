"""Super-resolution by itself: of tokens, and of people's own pictures, of any size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizer

from ...generation.batching import run_in_batches
from ...generation.sampling import Generators
from ...models.cogview2 import sequences
from ...pictures.pixels import OUTPUT_TYPES, Images, Picture, read_pictures, write_pictures
from ...pictures.sizes import agree_with
from ...schedulers.scheduling_lopar import LoPARScheduler
from ..common.arguments import (
    PromptTranslator,
    check_choice,
    check_counts,
    check_prompts,
    check_tokens,
    one_generator_per_image,
    translate,
)
from ..common.calls import inference
from ..common.notifier import Callback, Notifier
from ..common.previews import PreviewMixin
from .base import Batch, CogView2PipelineBase, Stage
from .outputs import CogView2PipelineOutput

DEFAULT_TILE_OVERLAP = 0.25


@dataclass
class _Request:
    """What a call enlarges, and how: one entry of each list for each picture."""

    inputs: list[Picture] | list[torch.Tensor]
    texts: list[list[int]]
    generators: list[torch.Generator]
    stages: list[Stage]
    num_levels: int
    tile_overlap: float
    faithful: bool


@dataclass
class _Result:
    """An enlarged picture, and the tokens that it was decoded from."""

    picture: Picture
    tokens: torch.Tensor


class CogView2UpscalePipeline(PreviewMixin, CogView2PipelineBase):
    """
    Enlarge pictures as the last two stages of [`CogView2Pipeline`] do, with the released models from 160 to 480
    pixels.

    A picture larger than the low resolution is worked on in overlapping tiles. Each tile keeps the fine tokens that
    its neighbours have made and writes only what is new, seeing them: pictures go on across tiles without a seam. The
    whole is decoded in overlapping tiles, too, which are blended.

    Components and configuration are those of [`CogView2Pipeline`]; `from_pipe` shares them. `transformer` is only
    needed where direct super-resolution has no backbone of its own.

    Source: section 3.2 of the paper (https://arxiv.org/abs/2204.14217); tiles are our own.
    """

    _made_for = "upscaling"
    _optional_components = (
        "transformer",
        "iterative_sr_transformer",
        "iterative_sr_scheduler",
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        vqvae: PreTrainedModel,
        direct_sr_transformer: PreTrainedModel,
        direct_sr_scheduler: LoPARScheduler,
        transformer: PreTrainedModel | None = None,
        iterative_sr_transformer: PreTrainedModel | None = None,
        iterative_sr_scheduler: LoPARScheduler | None = None,
        compression_rate: int | None = None,
        styles: dict[str, dict] | None = None,
        default_style: str | None = None,
        whole_pictures: bool = False,
    ):
        super().__init__(
            tokenizer=tokenizer,
            transformer=transformer,
            vqvae=vqvae,
            direct_sr_transformer=direct_sr_transformer,
            iterative_sr_transformer=iterative_sr_transformer,
            direct_sr_scheduler=direct_sr_scheduler,
            iterative_sr_scheduler=iterative_sr_scheduler,
            compression_rate=compression_rate,
            styles=styles,
            default_style=default_style,
            whole_pictures=whole_pictures,
        )

    @property
    def layout(self) -> sequences.SequenceLayout:
        """Where things stand in the sequences of direct super-resolution."""
        return self.direct_sr_transformer.config.layout

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of a tile, before and after."""
        rate = self.config.compression_rate
        config = self.direct_sr_transformer.config
        return [(rows * rate, columns * rate) for rows, columns in (config.image_grid, config.fine_grid)]

    @property
    def scale(self) -> tuple[int, int]:
        """How many times as high and as wide pictures become."""
        low, fine = self.sizes
        return fine[0] // low[0], fine[1] // low[1]

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """
        Height and width that a picture is given before it is enlarged: a whole number of tokens, and a tile at least.

        Args:
            height, width (`int`): Of the picture, in pixels.
        """
        rate = self.config.compression_rate
        rows, columns = (max(least, -(-side // rate) * rate) for side, least in zip((height, width), self.sizes[0]))
        return rows, columns

    @inference
    def __call__(
        self,
        image: Images | None = None,
        prompt: str | Sequence[str] = "",
        *,
        tokens: torch.Tensor | None = None,
        num_levels: int = 1,
        tile_overlap: float = DEFAULT_TILE_OVERLAP,
        faithful: bool = True,
        style: str | None = None,
        generator: Generators = None,
        prompt_translator: PromptTranslator | None = None,
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
    ) -> CogView2PipelineOutput | tuple:
        """
        Enlarge pictures.

        Args:
            image (PIL image, array, tensor, or list of them):
                Pictures of any size; arrays `(height, width, 3)` and tensors `(3, height, width)` of bytes, or of
                floats in [0, 1]. Transparent parts become white. Or give `tokens`.
            prompt (`str` or list of `str`): What the pictures show, one for all or one each; may be left out.
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`, *optional*):
                Low-resolution tokens instead, such as `CogView2Pipeline` makes; at least as many as a tile has.
            num_levels (`int`): How many times to enlarge; each level enlarges the result of the one before.
            tile_overlap (`float`, defaults to 0.25): How much of a tile's side at least lies in the one before, for
                pictures larger than a tile; from 0 to 0.75.
            faithful (`bool`, defaults to `True`): Make up for what the tokens of a picture lost: the result, reduced
                again, is the picture that came in. It has no effect on what is made of `tokens`, which came from no
                picture. Without it, noise and small mistakes of the picture are painted over, and fine colours change.
            style (`str`, *optional*): A name in `pipe.config.styles`; default: `pipe.config.default_style`.
            generator (`torch.Generator` or list of them, *optional*): One for all pictures, or one per picture.
            prompt_translator, direct_sr_temperature, direct_sr_top_k_clusters, direct_sr_cluster_temperature,
            iterative_sr_temperature, iterative_sr_top_k, num_lopar_steps: As for [`CogView2Pipeline`].
            max_batch_size (`int`, *optional*): Pictures of one size that are computed at a time; as for
                [`CogView2Pipeline`].
            output_type (`str`): `"pil"`, `"np"` or `"pt"`; the last two are one batch, or a list if the pictures
                differ in size. Or `"latent"` for tokens: the images are then lists of `(rows, columns)` tensors.
            return_dict (`bool`): Return a [`CogView2PipelineOutput`] rather than a tuple. Its `tokens` are a list;
                they cover the picture and what was added to fill its last tile.
            return_statistics, callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*): As for
                [`CogView2Pipeline`]; the tokens are those of the current tile.

        Raises:
            TypeError: If a picture is none.
            ValueError: If an argument cannot be used; the message says which and why.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        settings = self._settings(style, locals())
        check_choice("output_type", output_type, (*OUTPUT_TYPES, "latent"))
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        (num_levels,) = check_counts(num_levels=num_levels)
        (max_batch_size,) = check_counts(max_batch_size=max_batch_size)
        if not 0 <= tile_overlap <= 0.75:
            raise ValueError(f"`tile_overlap` must be from 0 to 0.75, but is {tile_overlap}.")
        inputs = self._read_inputs(image, tokens)
        prompts = check_prompts(prompt, allow_empty=True)
        if len(prompts) not in (1, len(inputs)):
            raise ValueError(f"`prompt` must be one or one per picture ({len(inputs)}), but there are {len(prompts)}.")
        prompts = translate(prompts * (len(inputs) if len(prompts) == 1 else 1), prompt_translator)
        stages = self._stages(settings)
        request = _Request(
            inputs=inputs,
            texts=self._encode_prompts(prompts, style, super_resolve=True),
            generators=one_generator_per_image(generator, len(inputs)),
            stages=stages,
            num_levels=num_levels,
            tile_overlap=tile_overlap,
            faithful=faithful,
        )
        batch_size = min(self._batch_size(max_batch_size, getattr(self, stage.name)) for stage in stages)
        results: dict[int, _Result] = {}
        with self._running(
            total=0,
            return_statistics=return_statistics,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        ) as call:
            for group in _same_size(inputs):

                def enlarge(part: slice, group=group) -> None:
                    indices = group[part]
                    with call.batch(indices) as notify:
                        for index, result in zip(indices, self._enlarge_pictures(request, indices, notify)):
                            results[index] = result

                run_in_batches(
                    enlarge, len(group), batch_size, generators=[request.generators[index] for index in group]
                )
        in_order = [results[index] for index in range(len(inputs))]
        fine_tokens = [result.tokens for result in in_order]
        output = CogView2PipelineOutput(
            images=fine_tokens
            if output_type == "latent"
            else write_pictures([result.picture for result in in_order], output_type),
            tokens=fine_tokens,
            seeds=[generator.initial_seed() for generator in request.generators],
            prompts=prompts,
            statistics=call.statistics,
        )
        return output if return_dict else output.to_tuple()

    # Stages ----------------------------------------------------------------------------------------------------------

    def _enlarge_pictures(self, request: _Request, indices: list[int], notify: Notifier) -> list[_Result]:
        """What becomes of some pictures of one size, level by level."""
        batch = Batch(
            [request.texts[index] for index in indices], [request.generators[index] for index in indices], notify
        )
        inputs = [request.inputs[index] for index in indices]
        has_tokens = isinstance(inputs[0], torch.Tensor)
        pixels = None if has_tokens else torch.stack([picture.on_white() for picture in inputs])
        low = torch.stack(inputs) if has_tokens else None
        for _ in range(request.num_levels):
            if low is None:
                with batch.call.measure("vqvae"):
                    low = self._encode_pixels(self._fill_tiles(pixels))
            tiles = self._tiles(low.shape[-2:], request.tile_overlap)
            batch.call.expect(len(tiles) * sum(stage.num_steps for stage in request.stages))
            fine = self._enlarge(request.stages, batch, low, tiles)
            with batch.call.measure("vqvae"):
                enlarged = self._decode_tiles(fine)
            if pixels is not None:
                height, width = pixels.shape[-2:]
                enlarged = enlarged[..., : height * self.scale[0], : width * self.scale[1]]
                if request.faithful:
                    enlarged = agree_with(enlarged.cpu(), pixels.cpu())
            pixels, low = enlarged, None
        assert pixels is not None  # there is at least one level
        return [_Result(Picture(one), own) for one, own in zip(pixels.cpu(), fine.cpu())]

    def _fill_tiles(self, pixels: torch.Tensor) -> torch.Tensor:
        """Go on with the last row and column to the padded size."""
        height, width = pixels.shape[-2:]
        missing = [padded - size for padded, size in zip(self.padded_size(height, width), (height, width))]
        return F.pad(pixels, (0, missing[1], 0, missing[0]), mode="replicate")

    def _tiles(self, grid: tuple[int, int], overlap: float) -> list[tuple[int, int]]:
        """First row and column of each tile in a grid of low-resolution tokens, in raster order."""
        starts = [list(_starts(size, tile, overlap)) for size, tile in zip(grid, self.layout.image_grid)]
        return [(row, column) for row in starts[0] for column in starts[1]]

    def _enlarge(
        self, stages: list[Stage], batch: Batch, low: torch.Tensor, tiles: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Low-resolution tokens `(batch_size, rows, columns)` of any grid to fine tokens, tile by tile."""
        (tile_rows, tile_columns), (row_scale, column_scale) = self.layout.image_grid, self.scale
        fine = low.new_zeros(len(low), low.shape[1] * row_scale, low.shape[2] * column_scale)
        done = torch.zeros(fine.shape[1:], dtype=torch.bool)
        for tile in tiles:
            row, column = tile
            part = low[:, row : row + tile_rows, column : column + tile_columns]
            inside = (
                ...,
                slice(row * row_scale, (row + tile_rows) * row_scale),
                slice(column * column_scale, (column + tile_columns) * column_scale),
            )
            # Along the edges that meet a neighbour, half of what overlaps is written again: the neighbour has seen
            # less around it there.
            kept = done[inside] & self._kept(tile, tiles)
            seen = (fine[inside], ~kept) if kept.any() else ()
            fine[inside] = self._super_resolve(stages, batch, part, *seen)
            done[inside] = True
        return fine

    def _kept(self, tile: tuple[int, int], tiles: list[tuple[int, int]]) -> torch.Tensor:
        """Fine cells of a tile that an earlier tile has seen more around: those before the middle of the overlap."""
        rows, columns = self.direct_sr_transformer.config.fine_grid
        kept = []
        for axis, size in enumerate((rows, columns)):
            scale, length = self.scale[axis], self.layout.image_grid[axis]
            before = [start for start in {other[axis] for other in tiles} if start < tile[axis]]
            overlap = (max(before) + length - tile[axis]) * scale if before else 0
            kept.append(torch.arange(size) < overlap - overlap // 2)
        return kept[0][:, None] | kept[1][None]

    def _decode_tiles(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pixels of fine tokens of any grid, decoded in tiles that are blended over half of their side."""
        rate, grid = self.config.compression_rate, self.direct_sr_transformer.config.fine_grid
        rows, columns = (list(_starts(size, tile, 0.5)) for size, tile in zip(tokens.shape[1:], grid))
        if len(rows) == len(columns) == 1:
            return self._decode_pixels(tokens)
        height, width = (size * rate for size in tokens.shape[1:])
        total = torch.zeros(len(tokens), 3, height, width)
        weights = torch.zeros(height, width)
        ramps = [torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1)).float() for size in self.sizes[1]]
        window = ramps[0][:, None] * ramps[1][None]
        for row in rows:
            for column in columns:
                part = self._decode_pixels(tokens[:, row : row + grid[0], column : column + grid[1]])
                inside = (
                    ...,
                    slice(row * rate, (row + grid[0]) * rate),
                    slice(column * rate, (column + grid[1]) * rate),
                )
                total[inside] += part.cpu() * window
                weights[inside] += window
        return total / weights

    # Arguments -------------------------------------------------------------------------------------------------------

    def _read_inputs(self, image: Images | None, tokens: torch.Tensor | None) -> list[Picture] | list[torch.Tensor]:
        """The pictures, or the low-resolution tokens of each."""
        if (image is None) == (tokens is None):
            raise ValueError("Give either `image` or `tokens`.")
        if tokens is None:
            return read_pictures(image)
        layout = self.layout
        return list(check_tokens(tokens, layout.num_image_tokens, layout.image_grid, may_be_larger=True))


def _same_size(inputs: list[Picture] | list[torch.Tensor]) -> list[list[int]]:
    """Indices of the pictures of each size; tokens come in one."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(inputs):
        groups.setdefault(one.size if isinstance(one, Picture) else (), []).append(index)
    return list(groups.values())


def _starts(size: int, tile: int, overlap: float) -> Iterator[int]:
    """Where tiles start that cover `size`, overlap by a part of their length at least, and are evenly spread."""
    stride = max(int(tile * (1 - overlap)), 1)
    count = -(-(size - tile) // stride) + 1
    for index in range(count):
        yield round(index * (size - tile) / max(count - 1, 1))


CogView2UpscalePipeline.__module__ = "cogview_pipelines"
