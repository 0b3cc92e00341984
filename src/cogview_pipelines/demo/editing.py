"""
What the other pipelines do with pictures of the demo data: objects replaced by inpainting, captions read back, and
small pictures enlarged.

Each measure takes a pipeline and returns plain values for JSON. Shares are between 0 and 1.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pipelines.cogview.pipeline_cogview import CogViewPipeline
from ..pipelines.cogview.pipeline_cogview_caption import CogViewCaptionPipeline
from ..pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from ..pipelines.cogview2.pipeline_cogview2_caption import CogView2CaptionPipeline
from ..pipelines.cogview2.pipeline_cogview2_inpaint import CogView2InpaintPipeline
from ..pipelines.cogview2.pipeline_cogview2_upscale import CogView2UpscalePipeline
from .caption_reader import language_of, read_caption
from .evaluation import Case, Pipeline, choose_cases, decoded_pictures, generators, share, true_pictures
from .rendering import render, slot_boxes
from .scenes import Scene, Scope, is_usable
from .scorer import Scorer, full_scorer

HELD_OUT_CELLS = (
    ("test_background", "single"),
    ("test_background", "pair"),
    ("test_pair", "pair"),
    ("test_order", "pair"),
)
PICTURES = ("true", "decoded")


@dataclass(frozen=True)
class Edit:
    """
    One object of a picture, to be replaced.

    Args:
        before (`Scene`): What the picture shows.
        after (`Scene`): What it is to show: another object in one place, all else the same.
        index (`int`): Which of the objects is replaced.
        prompt (`str`): A caption of what it is to show.
        seed (`int`): Of the result.
        cell (`str`): Split and layout of `after`.
    """

    before: Scene
    after: Scene
    index: int
    prompt: str
    seed: int
    cell: str

    def mask(self, size: int) -> Image.Image:
        """The square that the object fills, white on black, in a picture of `size` pixels."""
        left, top, side = map(round, slot_boxes(self.before, size)[self.index])
        mask = Image.new("L", (size, size), 0)
        mask.paste(255, (left, top, left + side, top + side))
        return mask


def choose_edits(scope: Scope, language: str, num_edits: int, seed: int = 0) -> list[Edit]:
    """
    Edits whose results training never showed: a held-out scene of each layout and split in turn, and a picture that
    differs from it in one object.

    Args:
        scope (`Scope`): What the model was trained on.
        language (`str`): Of the prompts, `"en"` or `"zh"`.
        num_edits (`int`): How many.
        seed (`int`, defaults to 0): Decides scenes, objects, captions and the seeds of the results.

    Raises:
        ValueError: If the scope has no held-out scenes, or an argument is not known.
    """
    cells = {}
    for split, layout in HELD_OUT_CELLS:
        if layout in scope.layouts:
            try:
                cells[f"{split} {layout}"] = choose_cases(scope, split, language, num_edits, seed, layout)
            except ValueError:  # the scope has no such scene
                continue
    if not cells:
        raise ValueError("`scope` has no held-out scenes to edit.")
    rng = random.Random(seed)
    edits: list[Edit] = []
    rows = ((cell, cases[row]) for row in range(num_edits) for cell, cases in cells.items() if row < len(cases))
    for cell, case in rows:
        if len(edits) == num_edits:
            break
        index = rng.randrange(len(case.scene.objects))
        others = [scene for scene in _replacements(case.scene, index, scope) if is_usable(scene)]
        if others:
            edits.append(Edit(rng.choice(others), case.scene, index, case.caption, seed + len(edits), cell))
    return edits


def _replacements(scene: Scene, index: int, scope: Scope) -> list[Scene]:
    """The scene with every other concept in one place."""
    free = [hexcode for hexcode in scope.concepts if hexcode not in scene.objects]
    return [replace(scene, objects=(*scene.objects[:index], hexcode, *scene.objects[index + 1 :])) for hexcode in free]


def measure_inpainting(
    pipe: CogView2Pipeline,
    edits: Sequence[Edit],
    *,
    pictures: str = "true",
    on_picture: Callable[[int, Edit, Image.Image, dict[str, bool]], None] | None = None,
    **call,
) -> dict:
    """
    Whether inpainting replaces one object and keeps all else, as the [`Scorer`] reads it against all 696 drawings.

    Args:
        pipe ([`CogView2Pipeline`]): What is measured, as [`CogView2InpaintPipeline`].
        edits (sequence of [`Edit`]): From [`choose_edits`].
        pictures (`str`): What is painted in: `"true"` drawings, or drawings `"decoded"` from the tokens of the
            pipeline's image tokenizer, as generated pictures are.
        on_picture (*optional*): Called with index, edit, result and its scores.
        call: Further arguments of the inpainting call.

    Returns:
        `dict`: The shares `object` (the concept asked for is in the masked place), `style` (of that object), `rest`
        (background and other object are those of before), `all` of these three, and `untouched`: no pixel outside of
        the mask has changed; `objects_by_cell` and `all_by_cell` by split and layout.

    Raises:
        ValueError: If there are no edits, or `pictures` is not known.
    """
    if pictures not in PICTURES:
        raise ValueError(f"`pictures` must be one of {PICTURES}, but is {pictures!r}.")
    if not edits:
        raise ValueError("`edits` must be at least one.")
    inpaint = CogView2InpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    size = pipe.sizes[-1][0]
    scenes = [edit.before for edit in edits]
    before = [render(scene, size) for scene in scenes] if pictures == "true" else decoded_pictures(pipe, scenes, size)
    scorer, results = full_scorer(), []
    for number, (edit, image) in enumerate(zip(edits, before, strict=True)):
        mask = edit.mask(size)
        generator = torch.Generator().manual_seed(edit.seed)
        painted = inpaint(edit.prompt, image, mask, generator=generator, **call).images[0]
        result = _judge_edit(scorer, edit, image, painted, np.asarray(mask) > 0)
        results.append(result)
        if on_picture is not None:
            on_picture(number, edit, painted, result)
    return {
        **{name: share(result[name] for result in results) for name in results[0]},
        **{
            f"{name}_by_cell": _by_cell([edit.cell for edit in edits], [result[name] for result in results])
            for name in ("object", "all")
        },
    }


def _judge_edit(
    scorer: Scorer, edit: Edit, before: Image.Image, after: Image.Image, mask: np.ndarray
) -> dict[str, bool]:
    reading, scene = scorer.read(after, edit.after), edit.after
    kept = [place for place in range(len(scene.objects)) if place != edit.index]
    result = {
        "object": reading.objects[edit.index] == scene.objects[edit.index],
        "style": reading.styles[edit.index] == scene.style,
        "rest": reading.background == scene.background
        and all(
            (reading.objects[place], reading.styles[place]) == (scene.objects[place], scene.style) for place in kept
        ),
    }
    untouched = np.array_equal(np.asarray(after)[~mask], np.asarray(before)[~mask])
    return {**result, "all": all(result.values()), "untouched": untouched}


def measure_captions(
    pipe: Pipeline, cases: Sequence[Case], language: str | None, *, batch_size: int = 16, **call
) -> dict:
    """
    Whether captions of true pictures say what these show, read back by [`read_caption`].

    Args:
        pipe ([`CogView2Pipeline`] or [`CogViewPipeline`]): What is measured, as the caption pipeline of its family.
        cases (sequence of [`Case`]): From [`choose_cases`]; only their scenes count.
        language (`str`, *optional*): `"en"` or `"zh"`; `None` for a CogView, which writes in the one or the other as
            it comes.
        batch_size (`int`, defaults to 16): Captions that are written at a time.
        call: Further arguments of the caption pipeline's call.

    Returns:
        `dict`: The shares `objects`, `relation` (of pictures of two objects; left out if there are none), `background`
        and `style` that captions name right, `named`: objects, background and style, and `all` of the four; and
        `named_by_layout`, for pictures of a single object and of a pair.

    Raises:
        ValueError: If there are no cases, or the family cannot be told a language.
    """
    if not cases:
        raise ValueError("`cases` must be at least one.")
    chooses = isinstance(pipe, CogViewPipeline)
    if chooses != (language is None):
        raise ValueError(
            f"`language` must be {'None' if chooses else 'en or zh'} with this model, but is {language!r}."
        )
    caption = (CogViewCaptionPipeline if chooses else CogView2CaptionPipeline).from_pipe(pipe)
    caption.set_progress_bar_config(disable=True)
    if not chooses:
        call["language"] = language
    size = pipe.sizes[-1][0]
    images = [render(case.scene, size) for case in cases]
    texts = caption(images, max_batch_size=batch_size, **call).captions
    results = [
        read_caption(text, language or language_of(text)).compare(case.scene)
        for text, case in zip(texts, cases, strict=True)
    ]
    pairs = [result["relation"] for result, case in zip(results, cases) if case.scene.relation is not None]
    shares = {name: share(result[name] for result in results) for name in ("objects", "background", "style")}
    named = [result["objects"] and result["background"] and result["style"] for result in results]
    return {
        **shares,
        **({"relation": share(pairs)} if pairs else {}),
        "named": share(named),
        "all": share(result["all"] for result in results),
        "named_by_layout": _by_cell([case.scene.layout for case in cases], named),
    }


def measure_upscaling(
    pipe: CogView2Pipeline, cases: Sequence[Case], *, batch_size: int = 8, with_prompt: bool = True, **call
) -> dict:
    """
    How near an enlarged picture comes to the true one, in dB of PSNR (mean over pictures).

    Args:
        pipe ([`CogView2Pipeline`]): What is measured, as [`CogView2UpscalePipeline`].
        cases (sequence of [`Case`]): From [`choose_cases`].
        batch_size (`int`, defaults to 8): Pictures that are computed at a time.
        with_prompt (`bool`): Whether super-resolution is told the caption.
        call: Further arguments of the upscaling call.

    Returns:
        `dict`: `psnr` of true low-resolution pictures enlarged; `ceiling_psnr` of the true large ones, encoded and
        decoded by the image tokenizer; `difference`, the first less the second; and `bicubic_psnr`, of the same
        pictures enlarged without any model.

    Raises:
        ValueError: If the pipeline has no super-resolution, or there are no cases.
    """
    if len(pipe.sizes) < 2 or not cases:
        raise ValueError("Upscaling needs a pipeline with super-resolution, and at least one case.")
    upscale = CogView2UpscalePipeline.from_pipe(pipe)
    upscale.set_progress_bar_config(disable=True)
    (low, _), (size, _) = pipe.sizes
    scenes = [case.scene for case in cases]
    small = [render(scene, low) for scene in scenes]
    enlarged = upscale(
        small,
        [case.caption for case in cases] if with_prompt else "",
        generator=generators(cases),
        max_batch_size=batch_size,
        **call,
    ).images
    true = true_pictures(pipe, scenes, size).float().cpu()
    found = {
        "psnr": enlarged,
        "ceiling_psnr": decoded_pictures(pipe, scenes, size, batch_size),
        "bicubic_psnr": [image.resize((size, size), Image.Resampling.BICUBIC) for image in small],
    }
    means = {name: _mean_psnr(images, true) for name, images in found.items()}
    return {
        **{name: round(value, 2) for name, value in means.items()},
        "difference": round(means["psnr"] - means["ceiling_psnr"], 2),
    }


def _mean_psnr(images: Sequence[Image.Image], true: torch.Tensor) -> float:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    errors = F.mse_loss(pixels, true, reduction="none").flatten(1).mean(1)
    return float((-10 * errors.clamp_min(1e-10).log10()).mean())


def _by_cell(cells: Sequence[str], outcomes: Sequence[bool]) -> dict[str, float]:
    return {
        name: share(outcome for cell, outcome in zip(cells, outcomes) if cell == name) for name in dict.fromkeys(cells)
    }
