"""
Reads a caption of the demo data back: which objects, where, in which style, on which background. The inverse of
`captions`, for judging captions that a model wrote, and for knowing what a sentence asks for.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from ..models.known_words import has_chinese
from .captions import Request, check_language, load_grammar, nouns, to_traditional
from .captions.sentences import BESIDE
from .scenes import BACKGROUNDS, RELATIONS, STYLES, Scene, load_concepts

_ANY_WORD = {"en": re.compile(r"[\w'-]+|."), "zh": re.compile(".")}
_MARKS = " ,.:;?!、。，：？！'\""
_IT = re.compile(r"\s*it\b")
_SIDE_RELATIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}


@dataclass(frozen=True)
class CaptionReading:
    """
    What a caption says.

    Args:
        objects (`tuple[str, ...]`):
            Hexcodes in the order in which the caption compares them: the first is where `relation` says, seen from the
            second.
        relation (`str`, *optional*): A key of `RELATIONS`, or `"beside"`, or `None` if no place is told.
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
            `dict[str, bool]`: `objects` (these, and no others), `relation` (told from either object, and not as
            "beside"; true for a single object that has none), `background`, `style`, and `all`: all four, in words
            that can be read.
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

    def request(self) -> Request | None:
        """What the caption asks for, or `None` if it does not name one or two different things."""
        if len(self.objects) not in (1, 2) or len(set(self.objects)) < len(self.objects):
            return None
        relations: tuple[str, ...] = ()
        if len(self.objects) == 2 and self.relation is None:
            relations = tuple(RELATIONS)
        elif len(self.objects) == 2 and self.relation is not None:
            relations = BESIDE if self.relation == "beside" else (self.relation,)
        return Request(self.objects, relations, self.style, self.background)


def language_of(text: str) -> str:
    """The language of a caption: Chinese if there is a Chinese character in it."""
    return "zh" if has_chinese(text) else "en"


def read_caption(text: str, language: str) -> CaptionReading:
    """
    Read a caption in the words of `captions`, `caption_variants` and `sample_sentence`, in any order of its parts.

    Full-width and half-width punctuation, capitals and spaces make no difference, nor does the choice of article or
    measure word, nor that of simplified or traditional characters. Words that are no part of any caption are passed
    over, and `is_readable` is then `False`.

    Args:
        text (`str`): The caption.
        language (`str`): `"en"` or `"zh"`.

    Raises:
        ValueError: If the language is another one.
    """
    check_language(language)
    pattern, meanings = _lexer(language)
    text = _normalize(text, language)
    found: dict[str, list[str]] = {"style": [], "background": []}
    marks: list[tuple[str, str]] = []  # objects and words for places, in the order of the text
    readable, refers_back, place = True, False, 0
    while place < len(text):
        match = pattern.match(text, place)
        if match is None:
            readable = False
            match = _ANY_WORD[language].match(text, place)
            assert match is not None  # one character at least
        kind, name = meanings.get(match[0], ("", ""))
        if kind in found:
            found[kind].append(name)
        elif kind:
            marks.append((kind, name))
        place = match.end()
        refers_back |= kind == "place" and _IT.match(text, place) is not None
    objects, relation = _tell_places(marks, language, refers_back)
    return CaptionReading(objects, relation, _only(found["style"]), _only(found["background"]), readable)


def _tell_places(marks: list[tuple[str, str]], language: str, refers_back: bool) -> tuple[tuple[str, ...], str | None]:
    """
    Two objects and where the first one is, by the order in which objects and places are told.

    With one place: "A left of B", but "B with A left of it", "B, and left of it A", "left of B is A". In Chinese the
    place follows the object that it is seen from: "A 在 B 左边", "B 左边有 A". With two places, each belongs to an
    object: "A on the left, B on the right".
    """
    objects = tuple(name for kind, name in marks if kind == "object")
    places = [name for kind, name in marks if kind == "place"]
    if len(objects) != 2 or not places:
        return objects, None
    if "beside" in places:
        return objects, "beside" if set(places) == {"beside"} else None
    if len(places) == 2:
        opposite = RELATIONS[places[0]].inverse == places[1]
        return objects, places[0] if opposite else None
    if len(places) > 2:
        return objects, None
    index = [kind for kind, _ in marks].index("place")
    is_told_of_first = index == 2 if language == "zh" else index == 1 and not refers_back
    return objects if is_told_of_first else objects[::-1], places[0]


def _only(names: list[str]) -> str | None:
    """The name, if there is just one, however often it is said."""
    return names[0] if len(set(names)) == 1 else None


def _normalize(text: str, language: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(text.split()) if language == "zh" else " ".join(text.split())


def _words(language: str) -> dict[str, dict[str, str]]:
    """What says something, by kind, with what it means."""
    grammar, english = load_grammar(language), language == "en"
    words: dict[str, dict[str, str]] = {"object": {}, "place": {}, "style": {}, "background": {}}
    for hexcode in load_concepts():
        words["object"].update((noun.removeprefix("~"), hexcode) for noun in nouns(hexcode, language))
    for name, relation in RELATIONS.items():
        words["place"][relation.english if english else relation.chinese] = name
        words["place"].update((word, name) for word in grammar["places"][name])
    for slot, name in _SIDE_RELATIONS.items():
        for word in grammar["sides"][slot]:
            words["place"].setdefault(word, name)
    for word in (*grammar["places"]["beside"], *grammar["mutual"], *grammar.get("between", ())):
        words["place"][word] = "beside"
    for name, style in STYLES.items():
        words["style"].update(
            (word, name) for word in (style.english if english else style.chinese, *grammar["styles"][name])
        )
    for name, background in BACKGROUNDS.items():
        words["background"].update(
            (word, name) for word in (name if english else background.chinese, *grammar["colours"][name])
        )
    return words


def _fillers(language: str) -> set[str]:
    """Words of the grammar that say nothing by themselves, as long as they stand together."""
    grammar = load_grammar(language)
    fillers = set(grammar["adjectives"]) | set(grammar["places"]["any"])
    parts = [
        part
        for kind in (
            "frame",
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
        )
        for part in grammar.get(kind, ())
    ]
    for piece in (piece.strip(_MARKS) for part in parts for piece in re.split(r"\{\w*\}", part)):
        fillers |= {piece, *re.split(f"[{_MARKS}]+", piece)}
    if language == "en":
        fillers |= {"a", "an", "the", "one", "in", "on", "and", "it"}
    else:
        fillers |= {filler.removeprefix("的") for filler in fillers}  # the word before may have taken it
        fillers |= set("一在的和个吗图隻")
        fillers |= {concept.measure for concept in load_concepts().values()}
    return {filler.strip() for filler in fillers} - {""}


@lru_cache(maxsize=2)
def _lexer(language: str) -> tuple[re.Pattern, dict[str, tuple[str, str]]]:
    """A pattern of all words, the longest that fits first, and what those words mean that say something."""
    meanings = {word: (kind, name) for kind, table in _words(language).items() for word, name in table.items()}
    fillers = _fillers(language)
    if language == "zh":
        meanings |= {to_traditional(word): meaning for word, meaning in meanings.items()}
        fillers |= set(map(to_traditional, fillers))
    meanings = {_normalize(word, language): meaning for word, meaning in meanings.items()}
    words = sorted({*meanings, *(_normalize(filler, language) for filler in fillers)}, key=len, reverse=True)
    boundary = r"(?![\w-])" if language == "en" else ""
    pattern = f"(?:{'|'.join(map(re.escape, words))}){boundary}|[{_MARKS}]"
    return re.compile(pattern), meanings
