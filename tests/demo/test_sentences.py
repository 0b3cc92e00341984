"""Sentences of the grammar: each is read back as what it asks for, and those of the test wording are never trained."""

import random
import re

import pytest

from cogview_pipelines.demo import (
    BACKGROUNDS,
    LANGUAGES,
    WORDINGS,
    Scene,
    Scope,
    load_concepts,
    read_caption,
    sample_scene,
    sample_sentence,
)
from cogview_pipelines.demo.captions import held_out_parts, load_grammar, nouns, to_traditional
from cogview_pipelines.demo.captions.sentences import SPLIT_PARTS

DOG, CAT = "1f436", "1f431"
THINGS = tuple(hexcode for hexcode, concept in load_concepts().items() if not concept.shape)
NAMES = {
    language: {
        thing: [form for noun in nouns(thing, language) for form in (noun, to_traditional(noun))]
        for thing in (DOG, CAT)
    }
    for language in LANGUAGES
}
SCOPE = Scope(THINGS, Scope.full().styles, Scope.full().backgrounds, Scope.full().layouts)


def some_sentences(language, wording, count=600, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        scene = sample_scene(SCOPE, rng)
        yield scene, sample_sentence(scene, language, rng, wording)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_is_read_as_what_it_asks_for_and_its_scene_is_a_right_picture(language, wording):
    for scene, sentence in some_sentences(language, wording):
        reading = read_caption(sentence.text, language)
        assert reading.is_readable, sentence.text
        assert reading.request().canonical() == sentence.request.canonical(), sentence.text
        assert sentence.request.is_met_by(scene)


@pytest.mark.parametrize("language", LANGUAGES)
def test_patterns_of_the_test_wording_are_no_patterns_of_training(language):
    patterns = {
        wording: {sentence.pattern for _, sentence in some_sentences(language, wording, 1500)} for wording in WORDINGS
    }
    assert not patterns["train"] & patterns["test"]
    assert len(patterns["train"]) > 700 and len(patterns["test"]) > 500


@pytest.mark.parametrize("language", LANGUAGES)
def test_whole_parts_of_the_grammar_are_held_out_and_their_words_are_known_from_others(language):
    held_out, grammar = held_out_parts(language), load_grammar(language)
    assert sum(map(len, held_out.values())) >= 8 and held_out["frame"]
    unit = r"[a-z'-]+" if language == "en" else r"[^\W_]"
    trained = {
        word
        for kind in SPLIT_PARTS
        for part in grammar.get(kind, ())
        if part not in held_out[kind]
        for word in re.findall(unit, re.sub(r"\{\w*\}", " ", part))
    }
    for parts in held_out.values():
        for part in parts:
            unknown = set(re.findall(unit, re.sub(r"\{\w*\}", " ", part))) - trained
            assert not unknown, (part, unknown)


@pytest.mark.parametrize("language", LANGUAGES)
def test_style_background_and_place_are_left_out_now_and_then(language):
    requests = [sentence.request for _, sentence in some_sentences(language, "train", 600)]
    for told in (True, False):
        assert any((request.style is not None) is told for request in requests)
        assert any((request.background is not None) is told for request in requests)
        assert any(request.tells_place is told for request in requests if len(request.objects) == 2)


def test_sentences_are_the_same_for_a_seed():
    twice = [[sentence.text for _, sentence in some_sentences("zh", "train", 40)] for _ in range(2)]
    assert twice[0] == twice[1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_share_of_pairs_names_the_right_or_lower_object_first(language):
    rng, scene, is_reversed = random.Random(0), Scene("noto", "blue", (DOG, CAT), "left of"), []
    for _ in range(600):
        text = sample_sentence(scene, language, rng, reversed_share=0.2).text.lower()
        first, second = (min(text.find(noun) % 1000 for noun in NAMES[language][thing]) for thing in (DOG, CAT))
        is_reversed.append(second < first)
    assert 0.12 < sum(is_reversed) / len(is_reversed) < 0.28


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_noun_stands_for_one_thing_and_names_no_colour_beyond_that_of_the_thing(language):
    meant = {}
    colours = {word for words in load_grammar(language)["colours"].values() for word in words}
    for hexcode in THINGS:
        for noun in nouns(hexcode, language)[1:]:
            word = noun.removeprefix("~")
            assert meant.setdefault(word, hexcode) == hexcode
            assert not colours & set(word.split() if language == "en" else word), word
    assert len(meant) > 150
    for hexcode in THINGS:
        assert meant.get(nouns(hexcode, language)[0], hexcode) == hexcode


def test_every_english_word_for_a_colour_is_of_one_background():
    for language in LANGUAGES:
        words = load_grammar(language)["colours"]
        assert set(words) == set(BACKGROUNDS)
        listed = [word for synonyms in words.values() for word in synonyms]
        assert len(listed) == len(set(listed))


def test_traditional_characters_of_words_that_share_a_simplified_one():
    assert to_traditional("上面的牛角面包") == "上面的牛角麵包"
    assert to_traditional("一只猫，蓝色背景") == "一隻貓，藍色背景"


@pytest.mark.parametrize(
    ("text", "language", "objects", "relation", "style", "background"),
    [
        ("Please draw a cute panda on a green background", "en", ("1f43c",), None, None, "green"),
        ("there is a rocket and a star under it, black background", "en", ("2b50", "1f680"), "below", None, "black"),
        ("I would like to see a tropical fish against a purple backdrop", "en", ("1f420",), None, None, "purple"),
        ("蓝色背景，老虎在左，蘑菇在右", "zh", ("1f42f", "1f344"), "left of", None, "blue"),
        ("請畫一隻可愛的熊貓，卡通風格", "zh", ("1f43c",), None, "twemoji", None),
        ("a kitten next to a puppy", "en", (CAT, DOG), "beside", None, None),
        ("a cat and a dog", "en", (CAT, DOG), None, None, None),
        ("狗的左边有一只猫", "zh", (CAT, DOG), "left of", None, None),
    ],
)
def test_sentences_of_strangers_are_read(text, language, objects, relation, style, background):
    reading = read_caption(text, language)
    assert (reading.objects, reading.relation) == (objects, relation)
    assert (reading.style, reading.background) == (style, background)


@pytest.mark.parametrize(("argument", "value"), [("language", "fr"), ("wording", "validation")])
def test_unknown_languages_and_wordings_are_refused(argument, value):
    arguments = {"language": "en", "wording": "train", argument: value}
    with pytest.raises(ValueError, match=argument):
        sample_sentence(Scene("noto", "blue", (DOG,)), rng=random.Random(0), **arguments)
