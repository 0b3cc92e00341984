"""The words that sentences are made of: synonyms of things, the word lists of the grammar, traditional characters."""

import csv
import json
import re
from functools import lru_cache

from ..scenes import DATA_FOLDER, load_concepts

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
