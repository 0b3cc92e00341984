"""The words that sentences are made of: synonyms of things, the word lists of the grammar, traditional characters."""

import csv
import json
import re
from functools import lru_cache

from ..scenes import BACKGROUNDS, DATA_FOLDER, RELATIONS, STYLES, Scope, load_concepts

LANGUAGES = ("en", "zh")
LISTS = (  # tables of the grammar that are lists of words or of parts of sentences
    "adjectives",
    "mutual",
    "between",
    "single",
    "pair",
    "sided",
    "beside",
    "any",
    "ground",
    "lead",
    "attribute",
    "style",
    "style_lead",
    "head",
    "frame",
)
GRAMMAR_FOLDER = DATA_FOLDER / "grammar"


@lru_cache(maxsize=2)
def load_grammar(language: str) -> dict:
    """The tables of a language, as `data/grammar/<language>.json` holds them; `data/README.md` explains the keys."""
    return json.loads((GRAMMAR_FOLDER / f"{language}.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _synonyms() -> dict[str, dict[str, tuple[str, ...]]]:
    hexcodes = {concept.noun: hexcode for hexcode, concept in load_concepts().items()}
    with open(GRAMMAR_FOLDER / "synonyms.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {
        hexcodes[row["noun"]]: {
            language: tuple(word for word in re.split(", |、", row[language]) if word) for language in ("en", "zh")
        }
        for row in rows
    }


def nouns(hexcode: str, language: str) -> tuple[str, ...]:
    """
    What a thing is called: the noun of the templates first, then its synonyms.

    An English synonym that takes no article ("grapes") begins with `~`.
    """
    concept = load_concepts()[hexcode]
    first = concept.noun if language == "en" else concept.noun_zh
    return (first, *_synonyms().get(hexcode, {}).get(language, ()))


@lru_cache(maxsize=1)
def _traditional() -> tuple[dict[str, str], re.Pattern]:
    table = json.loads((GRAMMAR_FOLDER / "traditional.json").read_text(encoding="utf-8"))
    forms = {**table["words"], **dict(zip(*table["characters"], strict=True))}
    return forms, re.compile("|".join(sorted(map(re.escape, forms), key=len, reverse=True)))


def to_traditional(text: str) -> str:
    """
    The text in traditional characters.

    Only for the words of the captions: characters that none of them has stay as they are.
    """
    forms, pattern = _traditional()
    return pattern.sub(lambda match: forms[match[0]], text)


def template_words(scope: Scope) -> list[str]:
    """
    All words of captions, and of their variants, about the scenes of a scope, in both languages: what a model that was
    trained on templates alone can understand.
    """
    words = {"a an and background drawing in of on style", "一", "上的", "和", "在", "的", "背景", "风格"}
    for hexcode in scope.concepts:
        concept = load_concepts()[hexcode]
        words |= {concept.noun, concept.noun_zh, concept.measure}
    for name in scope.styles:
        words |= {STYLES[name].english, STYLES[name].chinese}
    for name in scope.backgrounds:
        words |= {name, BACKGROUNDS[name].chinese}
    if "pair" in scope.layouts:
        for relation in RELATIONS.values():
            words |= {relation.english, relation.chinese}
    return sorted({word for text in words for word in text.split()})


def _endings(parts: list[str], slot: str) -> set[str]:
    """Single Chinese characters that are a word only after a slot, such as 风 in "卡通风", but not in "风车"."""
    found = {ending for part in parts for ending in re.findall(rf"\{{{slot}\}}([^{{，：？、]+)", part)}
    return {ending for ending in found if len(ending) == 1} - {"的"}


def known_words(scope: Scope) -> list[str]:
    """
    All words of captions and sentences about the scenes of a scope, in both languages: what a model of that scope can
    understand, for the `known_words` of its tokenizer.
    """
    words: set[str] = set()
    for language in LANGUAGES:
        grammar, english = load_grammar(language), language == "en"
        parts = [part for key in LISTS if key in grammar for part in grammar[key]]
        styles = {STYLES[name].english if english else STYLES[name].chinese for name in scope.styles}
        styles |= {word for name in scope.styles for word in grammar["styles"][name]}
        colours = {word for name in scope.backgrounds for word in grammar["colours"][name]}
        for slot, own in (("ground", colours), ("style", styles)):
            endings = set() if english else _endings(parts, slot)
            words |= own | {word + ending for word in own for ending in endings}
            after_slot = rf"\{{{slot}\}}(?:{'|'.join(sorted(endings))})(?=[{{，：？、]|$)"
            parts = [re.sub(after_slot, f"{{{slot}}}", part) for part in parts] if endings else parts
        pieces = {piece for part in parts for piece in re.split(r"\{\w*\}|[，：？、]", part) if piece}
        words |= pieces
        for key in ("places", "sides"):
            words.update(word for synonyms in grammar[key].values() for word in synonyms)
        words.update(noun.removeprefix("~") for hexcode in scope.concepts for noun in nouns(hexcode, language))
        for relation in RELATIONS.values():
            words.add(relation.english if english else relation.chinese)
    words |= {"a an the one", "一", "个", "和", "在", "的", "上的", "风格", "背景", "图片"}
    words |= {load_concepts()[hexcode].measure for hexcode in scope.concepts}
    words |= set(map(to_traditional, words)) | {"隻"}
    return sorted({word for text in words for word in text.split()})
