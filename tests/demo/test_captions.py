import random

import pytest

from cogview_pipelines.demo import (
    CAPTION_VARIANT_KINDS,
    Scene,
    Scope,
    caption_variants,
    captions,
    load_concepts,
    sample_caption,
    sample_scenes,
)

TIGER, CAT, UNICORN, UMBRELLA = "1f42f", "1f431", "1f984", "2614"
SINGLE = Scene("noto", "blue", (TIGER,))
PAIR = Scene("twemoji", "pink", (UMBRELLA, UNICORN), "above")


def test_single_scene_has_exactly_the_templates():
    assert captions(SINGLE, "en") == [
        "a tiger on a blue background, painted style",
        "a painted style drawing of a tiger on blue",
        "painted style tiger, blue background",
    ]
    assert captions(SINGLE, "zh") == [
        "蓝色背景上的一只老虎，彩绘风格",
        "彩绘风格的老虎，蓝色背景",
        "一只老虎，蓝色背景，彩绘风格",
    ]


def test_pair_has_the_templates_of_both_true_readings_with_articles_by_sound():
    assert captions(PAIR, "en") == [
        "an umbrella above a unicorn, pink background, cartoon style",
        "a cartoon style drawing of an umbrella above a unicorn on pink",
        "a unicorn below an umbrella, pink background, cartoon style",
        "a cartoon style drawing of a unicorn below an umbrella on pink",
    ]
    assert captions(PAIR, "zh") == [
        "一把雨伞在一只独角兽的上面，粉色背景，卡通风格",
        "粉色背景，卡通风格，雨伞在独角兽上面",
        "一只独角兽在一把雨伞的下面，粉色背景，卡通风格",
        "粉色背景，卡通风格，独角兽在雨伞下面",
    ]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_both_readings_give_the_same_set_of_captions(language):
    for scene in sample_scenes(Scope.full(), 50, seed=1, layout="pair"):
        assert set(captions(scene, language)) == set(captions(scene.other_reading(), language))


def test_captions_stay_within_the_known_lengths():
    scenes = sample_scenes(Scope.full(), 2000, seed=2)
    assert max(len(text.split()) for scene in scenes for text in captions(scene, "en")) <= 20
    assert max(len(text) for scene in scenes for text in captions(scene, "zh")) <= 28


def test_captions_of_single_scenes_tell_all_scenes_apart():
    seen = {}
    for scene in sample_scenes(Scope.full(), 1500, seed=3, layout="single"):
        for language in ("en", "zh"):
            for text in captions(scene, language):
                assert seen.setdefault(text, scene) == scene


@pytest.mark.parametrize("language", ["en", "zh"])
def test_variants_are_never_templates_and_leave_out_what_they_say(language):
    style_words, ground_words = {"en": (" style", "pink"), "zh": ("风格", "粉色")}[language]
    for scene in (Scene("twemoji", "pink", (TIGER,)), PAIR):
        variants = caption_variants(scene, language)
        assert set(variants) <= set(CAPTION_VARIANT_KINDS)
        assert ("no_relation" in variants) == (scene.layout == "pair")
        texts = [text for kind in variants.values() for text in kind]
        assert len(texts) == len(set(texts))
        assert not set(texts) & set(captions(scene, language))
        for kind, written in variants.items():
            has_style = [style_words in text for text in written]
            has_ground = [ground_words in text for text in written]
            if kind in ("complete", "no_style", "no_relation"):
                assert all(has_ground), (kind, written)
            else:
                assert not any(has_ground), (kind, written)
            if kind in ("complete", "no_background"):
                assert all(has_style), (kind, written)
            elif kind != "no_relation":
                assert not any(has_style), (kind, written)
            nouns = [getattr(load_concepts()[key], "noun" if language == "en" else "noun_zh") for key in scene.objects]
            assert all(noun in text for noun in nouns for text in written)


def test_variants_hold_the_prompts_that_people_write():
    english, chinese = caption_variants(SINGLE, "en"), caption_variants(SINGLE, "zh")
    assert "a tiger on a blue background" in english["no_style"]
    assert "a painted style drawing of a tiger on a blue background" in english["complete"]
    assert "一只老虎，蓝色背景" in chinese["no_style"]
    orange = caption_variants(Scene("noto", "orange", (CAT,)), "en")
    assert "a cat on an orange background" in orange["no_style"]


def test_sampled_captions_are_templates_unless_variants_are_asked_for():
    rng = random.Random(0)
    assert {sample_caption(PAIR, "zh", rng) for _ in range(100)} == set(captions(PAIR, "zh"))
    weights = {"no_style": 0.5, "no_relation": 0.25}
    drawn = [sample_caption(PAIR, "en", rng, weights) for _ in range(1000)]
    variants = caption_variants(PAIR, "en")
    for kind, probability in weights.items():
        assert abs(sum(text in variants[kind] for text in drawn) / 1000 - probability) < 0.06
    assert abs(sum(text in captions(PAIR, "en") for text in drawn) / 1000 - 0.25) < 0.06
    single = {sample_caption(SINGLE, "en", rng, {"no_relation": 1.0}) for _ in range(50)}
    assert single == set(captions(SINGLE, "en"))


def test_unknown_language_or_kind_is_an_error():
    with pytest.raises(ValueError, match=r"`language` must be one of .* got 'de'"):
        captions(SINGLE, "de")
    with pytest.raises(ValueError, match="`variant_probabilities` must map kinds"):
        sample_caption(SINGLE, "en", random.Random(0), {"none": 0.5})
    with pytest.raises(ValueError, match="at most 1 together"):
        sample_caption(SINGLE, "en", random.Random(0), {"no_style": 0.7, "complete": 0.7})
