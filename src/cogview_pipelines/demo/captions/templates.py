"""
The words of a scene, in English and Chinese. Templates are fixed, so that scores can be compared; variants are for
training only.
"""

import random
from collections.abc import Mapping

from ..scenes import BACKGROUNDS, RELATIONS, STYLES, Scene, load_concepts
from .words import LANGUAGES

CAPTION_VARIANT_KINDS = ("complete", "no_style", "no_background", "objects_only", "no_relation")


def with_article(words: str) -> str:
    """`a` or `an` by sound: a unicorn, an umbrella."""
    vowel = words[0] in "aeiou" and not words.startswith(("uni", "use"))
    return f"an {words}" if vowel else f"a {words}"


def _counted(concept) -> str:
    return f"一{concept.measure}{concept.noun_zh}"


def check_language(language: str) -> None:
    """Raise an error unless there are captions in this language."""
    if language not in LANGUAGES:
        raise ValueError(f"`language` must be one of {list(LANGUAGES)}, got {language!r}.")


def _readings(scene: Scene) -> tuple[Scene, ...]:
    return (scene,) if scene.relation is None else (scene, scene.other_reading())


def captions(scene: Scene, language: str) -> list[str]:
    """
    Every caption that the templates give a scene: three for a single object, two for each of the two true readings of
    a pair.

    Args:
        scene (`Scene`): What is shown; for a pair, its own reading comes first.
        language (`str`): `"en"` or `"zh"`.

    Raises:
        ValueError: If the language is another one.
    """
    check_language(language)
    template = _english if language == "en" else _chinese
    return [caption for reading in _readings(scene) for caption in template(reading)]


def _english(scene: Scene) -> list[str]:
    style, ground = STYLES[scene.style].english, scene.background
    nouns = [load_concepts()[hexcode].noun for hexcode in scene.objects]
    if scene.relation is None:
        noun = nouns[0]
        return [
            f"{with_article(noun)} on a {ground} background, {style} style",
            f"{with_article(style)} style drawing of {with_article(noun)} on {ground}",
            f"{style} style {noun}, {ground} background",
        ]
    story = f" {RELATIONS[scene.relation].english} ".join(map(with_article, nouns))
    return [
        f"{story}, {ground} background, {style} style",
        f"{with_article(style)} style drawing of {story} on {ground}",
    ]


def _chinese(scene: Scene) -> list[str]:
    style, ground = STYLES[scene.style].chinese, BACKGROUNDS[scene.background].chinese
    first, *rest = [load_concepts()[hexcode] for hexcode in scene.objects]
    if scene.relation is None:
        return [
            f"{ground}背景上的{_counted(first)}，{style}风格",
            f"{style}风格的{first.noun_zh}，{ground}背景",
            f"{_counted(first)}，{ground}背景，{style}风格",
        ]
    where, second = RELATIONS[scene.relation].chinese, rest[0]
    return [
        f"{_counted(first)}在{_counted(second)}的{where}，{ground}背景，{style}风格",
        f"{ground}背景，{style}风格，{first.noun_zh}在{second.noun_zh}{where}",
    ]


def caption_variants(scene: Scene, language: str) -> dict[str, list[str]]:
    """
    More ways to say a scene, for training only: never scored, and none is a template of [`captions`].

    Args:
        scene (`Scene`): What is shown.
        language (`str`): `"en"` or `"zh"`.

    Returns:
        `dict[str, list[str]]`: By kind. `complete` says all that the templates say; `no_style`, `no_background` and
        `objects_only` leave out what their name says, so that several pictures fit; `no_relation` (pairs only) names
        two objects but not their places.
    """
    check_language(language)
    write = _english_variants if language == "en" else _chinese_variants
    variants: dict[str, list[str]] = {}
    for reading in _readings(scene):
        for kind, written in write(reading).items():
            variants.setdefault(kind, []).extend(written)
    return variants


def _english_variants(scene: Scene) -> dict[str, list[str]]:
    style, ground = STYLES[scene.style].english, scene.background
    nouns = [load_concepts()[hexcode].noun for hexcode in scene.objects]
    counted = [with_article(noun) for noun in nouns]
    story = counted[0] if scene.relation is None else f" {RELATIONS[scene.relation].english} ".join(counted)
    drawing = f"{with_article(style)} style drawing of {story}"
    on_ground = f"on {with_article(ground)} background"
    variants = {
        "complete": [
            f"{drawing} {on_ground}",
            f"{story} in {style} style {on_ground}",
            f"{story}, {style} style, {ground} background",
        ],
        "no_style": [f"{story} {on_ground}", f"{story} on {ground}", f"{story}, {ground} background"],
        "no_background": [drawing, f"{story}, {style} style"],
        "objects_only": [story],
    }
    if scene.relation is None:
        variants["no_style"].append(f"{nouns[0]}, {ground} background")
        variants["no_background"].append(f"{style} style {nouns[0]}")
        variants["objects_only"].append(nouns[0])
    else:
        both = " and ".join(counted)
        variants["no_relation"] = [f"{both} {on_ground}", f"{both}, {ground} background, {style} style"]
    return variants


def _chinese_variants(scene: Scene) -> dict[str, list[str]]:
    style, ground = STYLES[scene.style].chinese, BACKGROUNDS[scene.background].chinese
    concepts = [load_concepts()[hexcode] for hexcode in scene.objects]
    if scene.relation is None:
        story, noun = _counted(concepts[0]), concepts[0].noun_zh
        return {
            "complete": [
                f"{story}，{style}风格，{ground}背景",
                f"{style}风格，{ground}背景，{story}",
                f"{ground}背景，{style}风格的{noun}",
            ],
            "no_style": [f"{story}，{ground}背景", f"{ground}背景上的{story}", f"{noun}，{ground}背景"],
            "no_background": [f"{style}风格的{noun}", f"{story}，{style}风格"],
            "objects_only": [story, noun],
        }
    where = RELATIONS[scene.relation].chinese
    story = f"{_counted(concepts[0])}在{_counted(concepts[1])}的{where}"
    both = "和".join(map(_counted, concepts))
    return {
        "complete": [f"{story}，{style}风格，{ground}背景", f"{ground}背景，{style}风格，{story}"],
        "no_style": [f"{story}，{ground}背景", f"{ground}背景，{story}"],
        "no_background": [f"{story}，{style}风格"],
        "objects_only": [story],
        "no_relation": [f"{both}，{ground}背景", f"{both}，{ground}背景，{style}风格"],
    }


def sample_caption(
    scene: Scene, language: str, rng: random.Random, variant_probabilities: Mapping[str, float] | None = None
) -> str:
    """
    One caption by chance; of a pair, either true reading.

    Args:
        scene (`Scene`): What is shown.
        language (`str`): `"en"` or `"zh"`.
        rng (`random.Random`): Source of chance.
        variant_probabilities (`Mapping[str, float]`, *optional*):
            For kinds of [`caption_variants`], how often a caption of that kind is taken; otherwise, and for a kind
            that the scene does not have, a template is. By default always a template.

    Raises:
        ValueError: If a kind is not known, or the probabilities are negative or exceed 1 together.
    """
    if variant_probabilities:
        unknown = [kind for kind in variant_probabilities if kind not in CAPTION_VARIANT_KINDS]
        if unknown or min(variant_probabilities.values()) < 0 or sum(variant_probabilities.values()) > 1 + 1e-9:
            raise ValueError(
                f"`variant_probabilities` must map kinds among {list(CAPTION_VARIANT_KINDS)} to probabilities that are"
                f" at most 1 together, got {dict(variant_probabilities)}."
            )
        left = rng.random()
        for kind, probability in variant_probabilities.items():
            left -= probability
            if left < 0:
                return rng.choice(caption_variants(scene, language).get(kind) or captions(scene, language))
    return rng.choice(captions(scene, language))
