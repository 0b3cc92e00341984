"""
Reads a caption of the demo data back: which objects, where, in which style, on which background. The inverse of
`captions`, for judging captions that a model wrote.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from .captions import check_language
from .scenes import BACKGROUNDS, RELATIONS, STYLES, Scene, load_concepts


@dataclass(frozen=True)
class CaptionReading:
    """
    What a caption says.

    Args:
        objects (`tuple[str, ...]`): Hexcodes in the order in which they are named.
        relation (`str`, *optional*): Where the first of two objects is: a key of `RELATIONS`.
        style (`str`, *optional*): A key of `STYLES`; `None` if none is named, or several are.
        background (`str`, *optional*): A key of `BACKGROUNDS`, likewise.
        is_readable (`bool`): Whether every word belongs to the language of the captions.
    """

    objects: tuple[str, ...]
    relation: str | None
    style: str | None
    background: str | None
    is_readable: bool

    def compare(self, scene: Scene) -> dict[str, bool]:
        """
        Whether the caption describes a scene.

        Returns:
            `dict[str, bool]`: `objects` (these, and no others), `relation` (told from either object; true for a single
            object that has none), `background`, `style`, and `all`: all four, in words that can be read.
        """
        same_objects = sorted(self.objects) == sorted(scene.objects)
        told = (self.objects, self.relation)
        readings = (scene, scene.other_reading())
        result = {
            "objects": same_objects,
            "relation": any(told == (reading.objects, reading.relation) for reading in readings),
            "background": self.background == scene.background,
            "style": self.style == scene.style,
        }
        return {**result, "all": all(result.values()) and self.is_readable}


def read_caption(text: str, language: str) -> CaptionReading:
    """
    Read a caption in the words of `captions` and `caption_variants`, in any order of its parts.

    Full-width and half-width punctuation, capitals and spaces make no difference, nor does the choice of article or
    measure word. Words that are no part of any caption are passed over, and `is_readable` is then `False`.

    Args:
        text (`str`): The caption.
        language (`str`): `"en"` or `"zh"`.

    Raises:
        ValueError: If the language is another one.
    """
    check_language(language)
    pattern, tables = _lexer(language)
    text = _normalize(text, language)
    found: dict[str, list[str]] = {kind: [] for kind in tables}
    readable, place = True, 0
    while place < len(text):
        match = pattern.match(text, place)
        if match is None:
            readable, place = False, place + 1
            continue
        place = match.end()
        for kind, words in match.groupdict().items():
            if words is not None:
                kind = kind.rstrip("_")
                found[kind].append(tables[kind][words])
    return CaptionReading(
        tuple(found["object"]),
        _only(found["relation"]) if len(found["object"]) == 2 else None,
        _only(found["style"]),
        _only(found["background"]),
        readable,
    )


def _only(names: list[str]) -> str | None:
    """The name, if there is just one, however often it is said."""
    return names[0] if len(set(names)) == 1 else None


def _normalize(text: str, language: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(text.split()) if language == "zh" else " ".join(text.split())


@lru_cache(maxsize=2)
def _lexer(language: str) -> tuple[re.Pattern, dict[str, dict[str, str]]]:
    """One pattern whose named groups are words that say something, and what those words mean, by group."""
    concepts = load_concepts()
    if language == "en":
        words = {
            "object": {concept.noun: hexcode for hexcode, concept in concepts.items()},
            "relation": {relation.english: name for name, relation in RELATIONS.items()},
            "style": {style.english: name for name, style in STYLES.items()},
            "background": {name: name for name in BACKGROUNDS},
        }
    else:
        words = {
            "object": {concept.noun_zh: hexcode for hexcode, concept in concepts.items()},
            "relation": {relation.chinese: name for name, relation in RELATIONS.items()},
            "style": {style.chinese: name for name, style in STYLES.items()},
            "background": {background.chinese: name for name, background in BACKGROUNDS.items()},
        }
    tables = {
        kind: {_normalize(word, language): name for word, name in table.items()} for kind, table in words.items()
    }

    def one_of(kind: str, group: str | None = None) -> str:
        """Any word of a kind, the longest that fits."""
        choices = sorted(map(re.escape, tables[kind]), key=len, reverse=True)
        return f"(?P<{group or kind}>{'|'.join(choices)})"

    if language == "en":
        parts = [
            rf"{one_of('style')} style(?: drawing of)?\b",
            rf"(?:on )?(?:an? )?{one_of('background')} background\b",
            rf"on (?:an? )?{one_of('background', 'background_')}\b",
            rf"{one_of('relation')}\b",
            rf"{one_of('object')}\b",
            r"(?:an?|in|and)\b",
            r"[ ,.]",
        ]
    else:
        measures = "|".join(sorted({re.escape(concept.measure) for concept in concepts.values()}))
        parts = [
            f"{one_of('style')}风格的?",
            f"{one_of('background')}背景(?:上的)?",
            f"的?{one_of('relation')}",
            one_of("object"),
            f"一(?:{measures})",
            "[在和,.。]",
        ]
    return re.compile("|".join(parts)), tables
