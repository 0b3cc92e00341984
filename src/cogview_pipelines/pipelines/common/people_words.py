"""Words put in front of words for people: appendix D of CogView's paper."""

import random
import re
from collections.abc import Mapping, Sequence
from functools import partial

# Words that are nothing but people. Letters of longer words do not count: "human" is no "man".
PEOPLE = {
    "en": (
        *("man", "men", "woman", "women", "person", "people", "boy", "boys", "girl", "girls", "child", "children"),
        *("kid", "kids", "gentleman", "gentlemen", "lady", "ladies", "guy", "guys", "baby", "babies"),
    ),
    "zh": (
        *("男人", "女人", "男子", "女子", "男士", "女士", "男孩", "女孩", "小孩", "孩子", "儿童", "婴儿"),
        *("人们", "行人", "路人"),
    ),
}
_ARTICLE = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)
_VOWELS = "aeiou"


class PeopleWords:
    """
    A `prompt_translator` that puts sampled words, such as adjectives, in front of words for people, so that what a
    model shows of people without being told follows shares that you choose.

    The same seed and prompt always give the same text. For several pictures of a prompt that differ in these words,
    pass `words.prompts(prompt, seeds)` to the pipeline; its output has the text of each picture in `prompts`.

    Args:
        shares (`dict[str, dict[str, float]]`): For `"en"` and `"zh"`: words and the share of people that each is put
            before. What is missing to 1 is left as it is.
        seed (`int`, defaults to 0): Of the picture.
        people (`dict[str, list of str]`, *optional*): The words for people, in place of [`PEOPLE`].

    Raises:
        ValueError: If shares are no shares, or a language is none of the two.

    Source: https://arxiv.org/abs/2105.13290, appendix D.
    """

    __module__ = "cogview_pipelines"

    def __init__(
        self,
        shares: Mapping[str, Mapping[str, float]],
        seed: int = 0,
        people: Mapping[str, Sequence[str]] | None = None,
    ):
        people = PEOPLE if people is None else people
        for language, own in shares.items():
            if language not in PEOPLE:
                raise ValueError(f"`shares` must be for {' and '.join(PEOPLE)}, but are for {language!r}.")
            if (
                not all(word.strip() and 0 <= share <= 1 for word, share in own.items())
                or sum(own.values()) > 1 + 1e-9
            ):
                raise ValueError(
                    f"`shares` must be words with numbers from 0 on that add up to 1 at most, not {own!r}."
                )
        self.shares, self.seed = shares, seed
        self._patterns = {name: _pattern(name, people[name]) for name in shares if people.get(name)}

    def __call__(self, prompt: str) -> str:
        """The prompt with words put in."""
        return self._with_words(prompt, self.seed)

    def prompts(self, prompt: str, seeds: Sequence[int]) -> list[str]:
        """A prompt for each picture, by its seed."""
        return [self._with_words(prompt, seed) for seed in seeds]

    def _with_words(self, prompt: str, seed: int) -> str:
        rng = random.Random(f"{seed}/{prompt}")
        for language, pattern in self._patterns.items():
            parts, end = [], 0
            for found in pattern.finditer(prompt):
                parts.append(prompt[end : found.start()])
                word = self._draw(language, rng)
                if word is not None:
                    if language == "en":
                        parts[-1] = _ARTICLE.sub(partial(_agree, word=word), parts[-1])
                    parts.append(f"{word} " if language == "en" else word)
                parts.append(found[0])
                end = found.end()
            prompt = "".join([*parts, prompt[end:]])
        return prompt

    def _draw(self, language: str, rng: random.Random) -> str | None:
        point = rng.random()
        for word, share in self.shares[language].items():
            point -= share
            if point < 0:
                return word
        return None


def _pattern(language: str, words: Sequence[str]) -> re.Pattern[str]:
    choices = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{choices})(?![\w-])" if language == "en" else choices, re.IGNORECASE)


def _agree(article: re.Match[str], word: str) -> str:
    """`a` or `an`, as the word after it wants it, in the case that it had."""
    wanted = "an" if word[0].lower() in _VOWELS else "a"
    return (wanted.capitalize() if article[1][0].isupper() else wanted) + article[2]
