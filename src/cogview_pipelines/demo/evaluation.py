"""
The tiny GenEval: pictures made from captions of the demo data, read back and compared with their scenes.

Each measure takes a pipeline and returns plain values for JSON. Shares are between 0 and 1.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..pipelines.cogview.pipeline_cogview import CogViewPipeline
from ..pipelines.cogview.pipeline_cogview_caption import CogViewCaptionPipeline
from ..pipelines.cogview.pipeline_cogview_upscale import CogViewUpscalePipeline
from ..pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from ..pipelines.cogview2.pipeline_cogview2_caption import CogView2CaptionPipeline
from .captions import LANGUAGES, Request, captions, sample_sentence
from .rendering import SpriteSet, render
from .scenes import SPLITS, Scene, Scope, iterate_scenes, sample_scenes
from .scorer import full_scorer

Pipeline = CogView2Pipeline | CogViewPipeline
WORDING_SPLIT = "test_wording"  # scenes of the split "train" in sentences whose patterns are never trained
CASE_SPLITS = (*SPLITS, WORDING_SPLIT)
BASELINES = ("none", "ceiling", "shuffled")
_MAX_LISTED = 10_000  # scenes that are listed, where fewer exist than are asked for


@dataclass(frozen=True)
class Case:
    """A scene, a caption, the seed of the picture, and what the caption asks for (by default all of the scene)."""

    scene: Scene
    caption: str
    seed: int
    request: Request | None = None

    def score(self, image: Image.Image) -> dict[str, bool]:
        """Whether a picture shows what the caption asks for, as the [`Scorer`] reads it."""
        if self.request is None:
            return full_scorer()(image, self.scene)
        return full_scorer().judge(image, self.request, self.scene)


def choose_cases(
    scope: Scope, split: str, language: str, num_cases: int, seed: int = 0, layout: str | None = None
) -> list[Case]:
    """
    Different scenes of a split by chance, each with one of its captions; the same for a seed on every machine.

    Args:
        scope (`Scope`): What the model was trained on.
        split (`str`): One of `CASE_SPLITS`; `"train"` are the seen combinations, `"validation"` unseen scenes of such,
            `"test_wording"` seen combinations asked for as people would, in sentences that training never shows.
        language (`str`): `"en"` or `"zh"`.
        num_cases (`int`): How many; all that there are, where there are fewer.
        seed (`int`, defaults to 0): Decides scenes, captions and the seeds of the pictures.
        layout (`str`, *optional*): Only `"single"` or only `"pair"`.

    Raises:
        ValueError: If the scope has no such scene, or an argument is not known.
    """
    if split not in CASE_SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(CASE_SPLITS)}, but is {split!r}.")
    if language not in LANGUAGES:
        raise ValueError(f"`language` must be one of {', '.join(LANGUAGES)}, but is {language!r}.")
    if num_cases < 1:
        raise ValueError(f"`num_cases` must be at least 1, but is {num_cases}.")
    if layout is not None and layout not in scope.layouts:
        raise ValueError(f"`layout` must be one of {', '.join(scope.layouts)} with this model, but is {layout!r}.")
    scene_split = "train" if split == WORDING_SPLIT else split
    layouts = [
        name
        for name in (scope.layouts if layout is None else (layout,))
        if next(iterate_scenes(scope, name, scene_split), None) is not None
    ]
    if not layouts:
        what = "scenes" if layout is None else f"{layout} scenes"
        raise ValueError(f"`split` {split!r} has no {what} among those that the model was trained for (scope.json).")
    only = layouts[0] if len(layouts) == 1 else None
    try:
        scenes = sample_scenes(scope, num_cases, seed, only, scene_split)
    except ValueError:  # there are not so many
        scenes = [scene for name in layouts for scene in iterate_scenes(scope, name, scene_split)]
        assert len(scenes) <= max(num_cases, _MAX_LISTED)
    rng = random.Random(seed)
    if split == WORDING_SPLIT:
        sentences = [sample_sentence(scene, language, rng, "test") for scene in scenes]
        return [
            Case(scene, sentence.text, seed + index, sentence.request)
            for index, (scene, sentence) in enumerate(zip(scenes, sentences, strict=True))
        ]
    return [Case(scene, rng.choice(captions(scene, language)), seed + index) for index, scene in enumerate(scenes)]


def true_pictures(pipe: Pipeline, scenes: Sequence[Scene], size: int, sprites: SpriteSet | None = None):
    """The scenes drawn at `size` pixels: `(num_scenes, 3, size, size)` in [0, 1], where the image tokenizer is."""
    pixels = np.stack([np.asarray(render(scene, size, sprites)) for scene in scenes])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return pixels.to(pipe.vqvae.device, pipe.vqvae.dtype)


@torch.no_grad()
def _true_tokens(
    pipe: Pipeline, scenes: Sequence[Scene], size: int, batch_size: int, sprites: SpriteSet | None
) -> torch.Tensor:
    rate = pipe.config.compression_rate
    parts = [scenes[start : start + batch_size] for start in range(0, len(scenes), batch_size)]
    return torch.cat([pipe.vqvae.encode(true_pictures(pipe, part, size, sprites), rate).tokens for part in parts])


@torch.no_grad()
def decoded_pictures(
    pipe: Pipeline,
    scenes: Sequence[Scene],
    size: int,
    batch_size: int = 8,
    sprites: SpriteSet | None = None,
) -> list[Image.Image]:
    """The scenes drawn at `size` pixels, encoded and decoded by the image tokenizer: as good as it can show them."""
    tokens = _true_tokens(pipe, scenes, size, batch_size, sprites)
    rate = pipe.config.compression_rate
    pixels = torch.cat([pipe.vqvae.decode(part, rate).sample for part in tokens.split(batch_size)])
    return pipe.image_processor.postprocess(pixels.float().clamp(0, 1), "pil")


def generate_pictures(
    pipe: Pipeline, cases: Sequence[Case], batch_size: int = 8, finer: bool = False, **call
) -> list[Image.Image]:
    """
    Pictures of the cases, each from its own seed; `call`: further arguments of the pipeline's call. With `finer` those
    of a CogView go on through its super-resolution by windows.
    """
    prompts = [case.caption for case in cases]
    output = pipe(prompts, generator=generators(cases), max_batch_size=batch_size, **call)
    if finer:
        upscale = CogViewUpscalePipeline.from_pipe(pipe)
        upscale.set_progress_bar_config(disable=True)
        assert not isinstance(output, tuple)
        output = upscale(prompt=prompts, tokens=output.tokens, generator=generators(cases), max_batch_size=batch_size)
    assert not isinstance(output, tuple) and isinstance(output.images, list)
    return output.images


def generators(cases: Sequence[Case]) -> list[torch.Generator]:
    """One for each case, from its seed."""
    return [torch.Generator().manual_seed(case.seed) for case in cases]


def measure_pictures(
    pipe: Pipeline,
    cases: Sequence[Case],
    *,
    baseline: str = "none",
    batch_size: int = 8,
    finer: bool = False,
    sprites: SpriteSet | None = None,
    on_picture: Callable[[int, Case, Image.Image, dict[str, bool]], None] | None = None,
    **call,
) -> dict:
    """
    How many pictures show what their captions say, as the [`Scorer`] reads them against all 696 drawings.

    Args:
        pipe ([`CogView2Pipeline`] or [`CogViewPipeline`]): What is measured.
        cases (sequence of [`Case`]): From [`choose_cases`].
        baseline (`str`):
            `"none"`: pictures generated from the captions; `"ceiling"`: the true pictures, encoded and decoded by the
            image tokenizer (no picture can be better); `"shuffled"`: generated pictures, each scored against the scene
            of another case (what chance gives).
        batch_size (`int`, defaults to 8): Pictures that are computed at a time.
        finer (`bool`): Of a CogView: pictures after super-resolution by windows.
        sprites (`SpriteSet`, *optional*): Drawings for the ceiling of pictures beyond 240 px.
        on_picture (*optional*): Called with index, case, picture and its scores.
        call: Further arguments of the pipeline's call.

    Returns:
        `dict`: The shares `background`, `style`, `objects`, `position`, `all` and `clean`, and `seconds_per_image`. A
            share is over the cases whose caption asks for it.

    Raises:
        ValueError: If the baseline is not known, or there are too few cases for it.
    """
    if baseline not in BASELINES:
        raise ValueError(f"`baseline` must be one of {', '.join(BASELINES)}, but is {baseline!r}.")
    if baseline == "shuffled" and len(cases) < 2:
        raise ValueError(f"`baseline='shuffled'` needs at least 2 cases, but there are {len(cases)}.")
    scenes = [case.scene for case in cases]
    asked = list(cases)
    started = time.perf_counter()
    if baseline == "ceiling":
        given = {name: call[name] for name in ("height", "width") if call.get(name) is not None}
        sizes = CogViewUpscalePipeline.from_pipe(pipe).sizes if finer else pipe.sizes
        size = pipe.check_inputs("a", **given).get("height", sizes[-1][0])  # CogView has none to choose
        images = decoded_pictures(pipe, scenes, size, batch_size, sprites)
    else:
        images = generate_pictures(pipe, cases, batch_size, finer, **call)
    seconds = (time.perf_counter() - started) / len(cases)
    if baseline == "shuffled":
        asked = [*cases[1:], *cases[:1]]
    scores = [case.score(image) for image, case in zip(images, asked, strict=True)]
    for index, (case, image, score) in enumerate(zip(cases, images, scores)):
        if on_picture is not None:
            on_picture(index, case, image, score)
    return {**shares(scores), "seconds_per_image": round(seconds, 3)}


def measure_caption_loss(
    pipe: Pipeline,
    cases: Sequence[Case],
    *,
    batch_size: int = 16,
    sprites: SpriteSet | None = None,
) -> dict:
    """
    Whether captioning tells right from wrong: the loss of each true picture's caption against that of another one.

    Returns:
        `dict`: The mean losses `true_caption_loss` and `shuffled_caption_loss` in nats per text token, and
        `true_is_lower`, the share of pictures whose own caption has the lower loss.

    Raises:
        ValueError: If there are fewer than 2 cases.
    """
    if len(cases) < 2:
        raise ValueError(f"The caption loss needs at least 2 cases to exchange captions, but there are {len(cases)}.")
    size = pipe.sizes[0][0]
    tokens = _true_tokens(pipe, [case.scene for case in cases], size, batch_size, sprites)
    texts = [case.caption for case in cases]
    true, shuffled = (_caption_losses(pipe, tokens, own, batch_size) for own in (texts, texts[1:] + texts[:1]))
    return {
        "true_caption_loss": round(true.mean().item(), 4),
        "shuffled_caption_loss": round(shuffled.mean().item(), 4),
        "true_is_lower": share((true < shuffled).tolist()),
    }


def measure_post_selection(
    pipe: Pipeline,
    cases: Sequence[Case],
    *,
    num_candidates: int = 8,
    batch_size: int = 8,
    sampling: dict | None = None,
    **call,
) -> dict:
    """
    What choosing by caption loss gains: the best of several low-resolution candidates against the first one.

    Candidates of a case have neighbouring seeds, and no two cases share one. Where a model's own settings leave little
    to chance, candidates hardly differ, and there is nothing to choose from. With `sampling` they are drawn in another
    way; since that alone makes single pictures better or worse, pictures by the model's own settings are scored, too.

    Args:
        pipe ([`CogView2Pipeline`] or [`CogViewPipeline`]): What is measured.
        cases (sequence of [`Case`]): From [`choose_cases`].
        num_candidates (`int`, defaults to 8): Of each case.
        batch_size (`int`, defaults to 8): Pictures that are computed at a time.
        sampling (`dict`, *optional*): Settings of the candidates in place of those of `call` and of the style, such as
            `{"temperature": 1.0, "top_k_clusters": 16}`.
        call: Further arguments of the pipeline's call, for all pictures.

    Returns:
        `dict`: The shares of [`measure_pictures`] for `first` and `best` of the candidates; `gain`, their difference
        in `all`, and `gain_error`, its standard error over the cases; and `token_difference`, the mean share of
        low-resolution tokens in which the other candidates differ from the first. With `sampling`, also the shares
        `preset_first` of the first picture without it, and `gain_over_preset` and `gain_over_preset_error` of the best
        candidate over that.

    Raises:
        ValueError: If there are fewer than 2 candidates.
    """
    if num_candidates < 2:
        raise ValueError(f"`num_candidates` must be at least 2, but is {num_candidates}.")
    seeds = [cases[0].seed + number * num_candidates for number in range(len(cases))]
    of_candidates = {**call, **(sampling or {})}
    drafts, best = _choose_drafts(pipe, cases, seeds, num_candidates, batch_size, of_candidates)

    def pictures(places: Sequence[int], offsets: Sequence[int], settings: dict) -> dict[int, Image.Image]:
        """Of the cases at these places, those whose seeds are so far from the first ones."""
        chosen = [
            Case(cases[place].scene, cases[place].caption, seeds[place] + offset)
            for place, offset in zip(places, offsets, strict=True)
        ]
        return dict(zip(places, generate_pictures(pipe, chosen, batch_size, **settings) if chosen else ()))

    everywhere, none = range(len(cases)), [0] * len(cases)
    images = {"first": pictures(everywhere, none, of_candidates)}
    # the picture of a seed is the same in every call, so that only what was chosen is finished, and nothing twice
    others = [place for place in everywhere if best[place]]
    images["best"] = images["first"] | pictures(others, [best[place] for place in others], of_candidates)
    if sampling:
        images["preset_first"] = pictures(everywhere, none, call)
    scores = {name: [case.score(made[place]) for place, case in enumerate(cases)] for name, made in images.items()}
    differences = (drafts[:, 1:] != drafts[:, :1]).float().mean().item()
    return {
        **{name: shares(found) for name, found in scores.items()},
        **_gain("gain", scores["first"], scores["best"]),
        **(_gain("gain_over_preset", scores["preset_first"], scores["best"]) if sampling else {}),
        "token_difference": round(differences, 4),
    }


def _choose_drafts(
    pipe: Pipeline,
    cases: Sequence[Case],
    seeds: Sequence[int],
    num_candidates: int,
    batch_size: int,
    settings: dict,
) -> tuple[torch.Tensor, list[int]]:
    """
    Low-resolution candidates `(num_cases, num_candidates, rows, columns)`, and which of each case has the lowest
    caption loss, as `num_candidates` of the pipeline's call chooses.
    """
    size = {} if isinstance(pipe, CogViewPipeline) else dict(zip(("height", "width"), pipe.sizes[0]))
    prompts = [case.caption for case in cases]
    output = pipe(
        prompts,
        num_images_per_prompt=num_candidates,
        generator=[torch.Generator().manual_seed(seed + offset) for seed in seeds for offset in range(num_candidates)],
        max_batch_size=batch_size,
        **{**settings, **size, "output_type": "latent"},
    )
    assert not isinstance(output, tuple)
    drafts = output.tokens
    repeated = [pipe.tokenizer.known_text(prompt) for prompt in prompts for _ in range(num_candidates)]
    losses = _caption_losses(pipe, drafts, repeated, batch_size)
    best = losses.view(len(cases), num_candidates).argsort(dim=1, stable=True)[:, 0]
    return drafts.unflatten(0, (len(cases), num_candidates)), best.tolist()


def _caption_losses(pipe: Pipeline, tokens: torch.Tensor, texts: Sequence[str], batch_size: int) -> torch.Tensor:
    """The caption loss of each text given the tokens of its picture, by the model that the family judges with."""
    kind = CogViewCaptionPipeline if isinstance(pipe, CogViewPipeline) else CogView2CaptionPipeline
    return kind.from_pipe(pipe).caption_loss(None, texts, tokens=tokens, max_batch_size=batch_size)


def _gain(name: str, before: Sequence[dict[str, bool]], after: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The mean difference in `all`, and its standard error."""
    gains = np.array([new["all"] - old["all"] for old, new in zip(before, after, strict=True)], float)
    return {name: round(gains.mean(), 4), f"{name}_error": round(gains.std() / len(gains) ** 0.5, 4)}


def shares(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of each key, over the scores that have it."""
    names = dict.fromkeys(name for score in scores for name in score)
    return {name: share(score[name] for score in scores if name in score) for name in names}


def share(outcomes: Iterable[bool]) -> float:
    """The part of the outcomes that are true, to four places."""
    outcomes = list(outcomes)
    return round(sum(outcomes) / len(outcomes), 4)
