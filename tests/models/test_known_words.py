"""Which words of a text a model does not know."""

import random

import pytest

from cogview_pipelines import IcetkTokenizer
from cogview_pipelines.demo import LANGUAGES, WORDINGS, Scope, sample_scene, sample_sentence
from cogview_pipelines.demo.captions import known_words
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.models.known_words import KnownWords


def test_unknown_words_are_named_once_and_in_order():
    words = KnownWords(["a", "cat", "on", "Blue", "猫", "蓝色", "背景"])
    assert words.unknown("A cat on a BLUE piano, a piano!") == ["piano"]
    assert words.unknown("dogs and ＣＡＴ") == ["dogs", "and"]
    assert words.unknown("一只猫，蓝色背景") == ["一只"]
    assert words.unknown("") == words.unknown("... 。") == []


def test_what_stands_in_angle_brackets_is_a_word_of_its_own():
    words = KnownWords(["a", "my", "cat", "<Mine>", "<猫>", "猫"])
    text = "a <my-cat> cat, <mine>, ＜my-cat＞, <猫>猫, a < b >"
    assert words.unknown(text) == ["<my-cat>", "b"]
    assert words.without(text, {"<my-cat>"}) == "a cat, <mine>, <猫>猫, a < b >"
    assert KnownWords(["猫"]).unknown("<猫>猫") == ["<猫>"]


def test_those_chinese_words_count_that_leave_the_fewest_characters():
    assert KnownWords(["熊", "熊猫"]).unknown("熊猫猫") == ["猫"]
    assert KnownWords(["甲", "甲乙", "乙丙丁"]).unknown("甲乙丙丁") == []
    assert KnownWords(["甲乙", "乙丙"]).unknown("甲乙丙戊甲乙") == ["丙戊"]
    assert KnownWords(["甲"]).unknown("乙甲丙丁甲") == ["乙", "丙丁"]
    assert KnownWords([]).unknown("甲乙") == ["甲乙"]


def test_the_words_left_are_the_fewest_of_all_ways_to_cut():
    """Beside all ways, of random words and texts of three letters."""
    rng = random.Random(0)
    for _ in range(300):
        words = {"".join(rng.choices("甲乙丙", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 4))}
        text = "".join(rng.choices("甲乙丙", k=rng.randint(1, 7)))
        least = [0]
        for end in range(1, len(text) + 1):
            fits = [least[start] for start in range(end) if text[start:end] in words]
            least.append(min([least[-1] + 1, *fits]))
        parts = KnownWords(words).unknown(text)
        assert (not parts) is (not least[-1])
        assert all(part in text for part in parts) and len("".join(parts)) <= least[-1]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_a_scope_are_those_of_its_sentences(language, wording):
    rng, scope = random.Random(0), Scope.small()
    words = KnownWords(known_words(scope))
    for _ in range(800):
        text = sample_sentence(sample_scene(scope, rng), language, rng, wording).text
        assert not words.unknown(text), text


def test_things_outside_of_the_scope_are_not_known():
    words = KnownWords(known_words(Scope.small()))
    assert words.unknown("please draw a giraffe and a dog") == ["giraffe"]
    assert words.unknown("请画一只长颈鹿") == ["长颈鹿"]


COMPOUNDS = {
    "一辆风车": ["风"],
    "一輛風車": ["風"],
    "画蓝图": ["图"],
    "请画一只猫，版画": ["版"],
    "车底有一只猫": ["底"],
    "卡通风，一只猫在蓝底的图": [],
    "手绘版的猫，白底": [],
}


def test_characters_that_are_words_only_beside_a_colour_or_a_style_are_unknown_in_other_words():
    words = KnownWords(known_words(Scope.small()))
    shipped = IcetkTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer")
    for text, parts in COMPOUNDS.items():
        assert words.unknown(text) == shipped.unknown_parts(text) == parts, text
