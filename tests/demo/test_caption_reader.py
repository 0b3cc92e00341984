"""Captions of the demo data read back: every caption that the templates write says the scene that it was made of."""

import random

import pytest

from cogview_pipelines.demo import Scene, Scope, caption_variants, captions, read_caption, sample_scenes
from cogview_pipelines.demo.scenes import iterate_scenes

CAR, FISH, CAT = "1f697", "1f420", "1f431"
PAIR = Scene("noto", "orange", (CAR, FISH), "left of")


def says(reading, scene):
    """Whether a reading holds this very scene, told from this object."""
    return reading.is_readable and (reading.style, reading.background, reading.objects, reading.relation) == (
        scene.style,
        scene.background,
        scene.objects,
        scene.relation,
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_caption_of_every_concept_is_read_as_its_scene(language):
    for scene in iterate_scenes(Scope.full(), "single"):
        for caption in captions(scene, language):
            assert says(read_caption(caption, language), scene), caption


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_caption_of_a_pair_is_read_as_one_of_its_two_readings(language):
    for scene in sample_scenes(Scope.full(), 500, 1, "pair"):
        told = captions(scene, language)
        half = len(told) // 2
        for reading, own in ((scene, told[:half]), (scene.other_reading(), told[half:])):
            for caption in own:
                assert says(read_caption(caption, language), reading), caption
                assert all(read_caption(caption, language).compare(scene).values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_that_leave_something_out_are_read_without_it(language):
    left_out = {
        "complete": (),
        "no_style": ("style",),
        "no_background": ("background",),
        "objects_only": ("style", "background"),
        "no_relation": ("relation",),
    }
    for scene in sample_scenes(Scope.full(), 300, 2):
        for kind, told in caption_variants(scene, language).items():
            for caption in told:
                reading = read_caption(caption, language)
                assert reading.is_readable, caption
                found = reading.compare(scene)
                wrong = {name for name in ("objects", "relation", "style", "background") if not found[name]}
                allowed = set(left_out[kind]) | ({"style"} if kind == "no_relation" else set())
                assert wrong <= allowed, caption
                assert set(left_out[kind]) <= wrong, caption


@pytest.mark.parametrize("language", ["en", "zh"])
def test_punctuation_capitals_and_spaces_make_no_difference(language):
    scene = Scene("twemoji", "blue", (CAT,))
    for caption in captions(scene, language):
        half_width = caption.replace("，", ",").upper()
        for text in (half_width, f" {caption}. ", caption.replace(" ", "  ")):
            assert says(read_caption(text, language), scene), text


@pytest.mark.parametrize(
    "text, language, wrong",
    [
        ("a car to the right of a tropical fish, orange background, painted style", "en", {"relation"}),
        ("a car above a tropical fish, orange background, painted style", "en", {"relation"}),
        ("a car and a tropical fish, orange background, painted style", "en", {"relation"}),
        ("a car to the left of a cat, orange background, painted style", "en", {"objects", "relation"}),
        ("a car to the left of a car, orange background, painted style", "en", {"objects", "relation"}),
        ("a car, orange background, painted style", "en", {"objects", "relation"}),
        ("a car to the left of a tropical fish, blue background, painted style", "en", {"background"}),
        ("a car to the left of a tropical fish, blue background, painted style on orange", "en", {"background"}),
        ("a car to the left of a tropical fish, orange background, cartoon style", "en", {"style"}),
        ("a car to the left of a tropical fish on orange", "en", {"style"}),
        ("一辆汽车在一条热带鱼的右边，橙色背景，彩绘风格", "zh", {"relation"}),
        ("一辆汽车在一条热带鱼的左边，橙色背景，卡通风格", "zh", {"style"}),
        ("", "en", {"objects", "relation", "background", "style"}),
        ("", "zh", {"objects", "relation", "background", "style"}),
    ],
)
def test_only_what_is_said_wrong_counts_as_wrong(text, language, wrong):
    found = read_caption(text, language).compare(PAIR)
    assert {name for name in ("objects", "relation", "background", "style") if not found[name]} == wrong
    assert not found["all"]


def test_a_measure_word_or_article_of_another_noun_is_read():
    single = Scene("noto", "blue", (CAR,))
    assert says(read_caption("蓝色背景上的一只汽车，彩绘风格", "zh"), single)
    assert says(read_caption("an car on an blue background, painted style", "en"), single)


@pytest.mark.parametrize(
    "text", ["a car on a blue background, painted style, for sale", "a carton on a blue background, painted style"]
)
def test_words_of_no_caption_make_a_caption_wrong(text):
    reading = read_caption(text, "en")
    assert not reading.is_readable
    assert not reading.compare(Scene("noto", "blue", (CAR,)))["all"]


def test_an_exchanged_word_is_noticed():
    """Captions of other scenes never pass for that of a scene."""
    scenes = sample_scenes(Scope.small(), 60, 3)
    rng = random.Random(0)
    for language in ("en", "zh"):
        for scene in scenes:
            other = rng.choice([one for one in scenes if one.canonical() != scene.canonical()])
            caption = rng.choice(captions(other, language))
            assert not read_caption(caption, language).compare(scene)["all"], caption


def test_another_language_is_an_error():
    with pytest.raises(ValueError, match="`language` must be one of"):
        read_caption("ein Auto", "de")
