"""Which words of a text a model does not know."""

import random

import pytest

from cogview_pipelines.demo import LANGUAGES, WORDINGS, Scope, sample_scene, sample_sentence
from cogview_pipelines.demo.captions import known_words
from cogview_pipelines.models.known_words import KnownWords


def test_unknown_words_are_named_once_and_in_order():
    words = KnownWords(["a", "cat", "on", "Blue", "猫", "蓝色", "背景"])
    assert words.unknown("A cat on a BLUE piano, a piano!") == ["piano"]
    assert words.unknown("dogs and ＣＡＴ") == ["dogs", "and"]
    assert words.unknown("一只猫，蓝色背景") == ["一只"]
    assert words.unknown("") == words.unknown("... 。") == []


def test_the_longest_chinese_word_that_fits_counts():
    assert KnownWords(["熊", "熊猫"]).unknown("熊猫猫") == ["猫"]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_a_scope_are_those_of_its_sentences(language, wording):
    rng, scope = random.Random(0), Scope.small()
    words = KnownWords(known_words(scope))
    for _ in range(400):
        text = sample_sentence(sample_scene(scope, rng), language, rng, wording).text
        assert not words.unknown(text), text


def test_things_outside_of_the_scope_are_not_known():
    words = KnownWords(known_words(Scope.small()))
    assert words.unknown("please draw a giraffe and a dog") == ["giraffe"]
    assert words.unknown("请画一只长颈鹿") == ["长颈鹿"]
