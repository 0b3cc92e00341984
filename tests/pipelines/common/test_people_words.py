"""Words before words for people."""

import pytest

from cogview_pipelines import PeopleWords

ALWAYS = {"en": {"old": 1.0}, "zh": {"年老的": 1.0}}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a man", "an old man"),
        ("A woman and two boys.", "An old woman and two old boys."),
        ("a tall man", "a tall old man"),
        ("human, manly, man-made woman's", "human, manly, man-made old woman's"),
        ("一个男人和孩子", "一个年老的男人和年老的孩子"),
        ("机器人", "机器人"),
        ("a tiger", "a tiger"),
        ("", ""),
    ],
)
def test_words_stand_before_people_and_nothing_else(prompt, expected):
    assert PeopleWords(ALWAYS)(prompt) == expected


def test_an_article_agrees_with_the_word_after_it():
    words = PeopleWords({"en": {"young": 1.0}}, people={"en": ["elder"]})
    assert words("an elder, An elder") == "a young elder, A young elder"


def test_shares_are_those_given_and_the_rest_is_left_as_it_is():
    words = PeopleWords({"en": {"old": 0.5, "young": 0.2}})
    prompts = words.prompts("a man", range(4000))
    counts = [prompts.count(text) / 4000 for text in ("an old man", "a young man", "a man")]
    assert counts == pytest.approx([0.5, 0.2, 0.3], abs=0.03)


def test_a_picture_has_the_same_words_whichever_others_there_are():
    words = PeopleWords({"en": {"old": 0.5}})
    prompts = words.prompts("a man and a woman", range(30))
    assert prompts[7] == PeopleWords({"en": {"old": 0.5}}, seed=7)("a man and a woman")
    assert len(set(prompts)) == 4  # people of one picture are drawn apart


@pytest.mark.parametrize("shares", [{"en": {"old": 1.1}}, {"en": {"old": -0.1}}, {"en": {"a": 0.6, "b": 0.6}}])
def test_what_are_no_shares_is_refused(shares):
    with pytest.raises(ValueError, match="add up to 1 at most"):
        PeopleWords(shares)
    with pytest.raises(ValueError, match="'fr'"):
        PeopleWords({"fr": {"vieux": 1.0}})


def test_the_pipeline_uses_and_returns_the_words(pipe):
    words = PeopleWords(ALWAYS)
    assert pipe("a man", prompt_translator=words, height=pipe.sizes[0][0]).prompts == ["an old man"]
