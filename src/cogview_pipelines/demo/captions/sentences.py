"""
Sentences that people would type for a scene, from the grammar of a language.

A *pattern* is a sentence without its words, such as `"please draw {a} {place} {b} on {an_ground} background"`. It is
put together from a skeleton, a frame (what stands around), a story (what is to be seen) and the parts that tell style
and background, or not. Patterns are split by their own text: those of the wording `"test"` are never trained.
"""

import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

from ..scenes import RELATIONS, Scene, load_concepts
from .requests import BESIDE, Request
from .templates import check_language, with_article
from .words import load_grammar, nouns, to_traditional

WORDINGS = ("train", "test")
KINDS = {"ground style": 0.45, "ground": 0.27, "style": 0.13, "": 0.15}  # what is told, and how often
PLACES = {"pair": 0.62, "sided": 0.16, "beside": 0.12, "any": 0.1}  # how the place of two objects is told
PLAIN_SHARE = 0.12  # of sentences stand alone, beside those for which chance draws the first frame
TERSE_SHARE = 0.12  # of sentences have bare nouns: "tiger, guitar, red background"
SPLIT_PARTS = ("frame", "pair", "sided", "ground", "lead", "attribute", "style", "style_lead", "head")
_HELD_OUT_PARTS = 8  # percent of the parts, and of the patterns without such a part
_SLOT = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Sentence:
    """
    Args:
        text (`str`): What someone types.
        request ([`Request`]): What it asks for.
        pattern (`str`): The sentence without its words.
    """

    text: str
    request: Request
    pattern: str


def _chosen(*what: str) -> bool:
    return zlib.crc32("|".join(what).encode()) % 100 < _HELD_OUT_PARTS


def held_out_parts(language: str) -> dict[str, tuple[str, ...]]:
    """Parts of the grammar that no training sentence has, by their table; the first of each table is never one."""
    grammar = load_grammar(language)
    return {
        kind: tuple(dict.fromkeys(part for part in grammar.get(kind, ())[1:] if _is_held_out(language, kind, part)))
        for kind in SPLIT_PARTS
    }


@cache
def _is_held_out(language: str, kind: str, part: str) -> bool:
    return part != load_grammar(language)[kind][0] and _chosen(language, kind, part)


def _draw_pattern(language: str, told: str, story_kind: str, rng: random.Random) -> tuple[str, str]:
    """A pattern by chance, and the wording that it belongs to."""
    grammar, held_out = load_grammar(language), False

    def draw(kind: str) -> str:
        nonlocal held_out
        is_plain = kind == "frame" and rng.random() < PLAIN_SHARE
        part = grammar[kind][0] if is_plain else rng.choice(grammar[kind])
        held_out |= kind in SPLIT_PARTS and _is_held_out(language, kind, part)
        return part

    skeleton = rng.choice(grammar["sentence"][told])
    frame, story = draw("frame"), draw(story_kind)
    filled = _SLOT.sub(lambda slot: story if slot[1] == "story" else draw(slot[1]), skeleton)
    parts = re.fullmatch(r"(.*)\[(.*)\](.*)", filled)
    assert parts is not None  # every skeleton has brackets
    before, inside, after = parts.groups()
    pattern = before + frame.replace("{}", inside) + after
    pattern = pattern.replace(" ,", ",")
    return pattern, "test" if held_out or _chosen(language, pattern) else "train"


def _weighted(table: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(table), list(table.values()))[0]


def sample_sentence(
    scene: Scene, language: str, rng: random.Random, wording: str = "train", reversed_share: float = 0.5
) -> Sentence:
    """
    A sentence by chance for which the scene is a right picture.

    Args:
        scene (`Scene`): What is shown.
        language (`str`): `"en"` or `"zh"`.
        rng (`random.Random`): Source of chance.
        wording (`str`, defaults to `"train"`): `"test"` for patterns that are never trained.
        reversed_share (`float`, defaults to 0.5): How often a pair's right or lower object is named first.

    Raises:
        ValueError: If language or wording is another one.
    """
    check_language(language)
    if wording not in WORDINGS:
        raise ValueError(f"`wording` must be one of {list(WORDINGS)}, but is {wording!r}.")
    told = _weighted(KINDS, rng)
    story_kind = "single"
    relations: tuple[str, ...] = ()
    if scene.relation is not None:
        story_kind = _weighted(PLACES, rng)
        if story_kind == "beside" and scene.relation not in BESIDE:
            story_kind = "pair"
    while True:
        pattern, belongs_to = _draw_pattern(language, told, story_kind, rng)
        if belongs_to == wording:
            break
    if scene.relation is not None:
        names_b_first = pattern.index("{b}") < pattern.index("{a}")
        is_reversed = rng.random() < reversed_share
        scene = scene.canonical() if is_reversed == names_b_first else scene.canonical().other_reading()
        told_as = {"beside": BESIDE, "any": tuple(RELATIONS)}
        relations = told_as[story_kind] if story_kind in told_as else (str(scene.relation),)
    text = _fill(pattern, story_kind, scene, language, rng)
    request = Request(
        scene.objects,
        relations,
        scene.style if "style" in told else None,
        scene.background if "ground" in told else None,
    )
    return Sentence(_vary(text, language, rng), request, pattern)


def _mostly_first(words, rng: random.Random, share: float) -> str:
    return words[0] if len(words) == 1 or rng.random() < share else rng.choice(words[1:])


def _fill(pattern: str, story_kind: str, scene: Scene, language: str, rng: random.Random) -> str:
    grammar, things = load_grammar(language), dict(zip("ab", scene.objects))
    name_thing = _english_thing if language == "en" else _chinese_thing
    is_terse = rng.random() < TERSE_SHARE
    words = {letter: name_thing(hexcode, rng, is_terse) for letter, hexcode in things.items()}
    words["ground"] = _mostly_first(grammar["colours"][scene.background], rng, 0.75)
    words["style"] = _mostly_first(grammar["styles"][scene.style], rng, 0.8)
    if language == "en":
        words["an_ground"], words["an_style"] = with_article(words["ground"]), with_article(words["style"])
    if story_kind in ("pair", "beside", "any"):
        table = grammar["places"][scene.relation if story_kind == "pair" else story_kind]
        words["place"] = _mostly_first(table, rng, 0.35)
    if story_kind == "sided":
        number = rng.randrange(len(grammar["sides"]["left"]))  # "on the left ... on the right", not "... at the right"
        for letter, slot in zip("ab", scene.slots, strict=True):
            words[f"side_{letter}"] = grammar["sides"][slot][number]
    for kind in ("mutual", "between"):
        words[kind] = rng.choice(grammar.get(kind, [""]))
    return pattern.format(**words)


def _english_thing(hexcode: str, rng: random.Random, is_terse: bool) -> str:
    noun = _mostly_first(nouns(hexcode, "en"), rng, 0.55)
    is_mass, noun = noun.startswith("~"), noun.removeprefix("~")
    if rng.random() < 0.2:
        noun = f"{rng.choice(load_grammar('en')['adjectives'])} {noun}"
    chance = rng.random()
    if is_terse:
        return noun
    if is_mass or chance < 0.1:
        return f"the {noun}" if is_mass and chance < 0.1 else noun
    return f"the {noun}" if chance < 0.18 else f"one {noun}" if chance < 0.21 else with_article(noun)


def _chinese_thing(hexcode: str, rng: random.Random, is_terse: bool) -> str:
    noun = _mostly_first(nouns(hexcode, "zh"), rng, 0.55)
    adjective = rng.choice(load_grammar("zh")["adjectives"]) if rng.random() < 0.2 else ""
    if adjective and _begins_with_another(adjective + noun, adjective):
        adjective = ""
    chance = rng.random()
    measure = load_concepts()[hexcode].measure if chance < 0.55 else "个"
    return adjective + noun if is_terse or chance > 0.65 else f"一{measure}{adjective}{noun}"


def _begins_with_another(words: str, adjective: str) -> bool:
    """Whether an adjective and a noun begin with the word for a thing: 小熊, a bear, would be read in 小熊猫."""
    return any(words != noun and words.startswith(noun) for noun in _chinese_nouns() if noun.startswith(adjective))


@cache
def _chinese_nouns() -> tuple[str, ...]:
    return tuple(noun for hexcode in load_concepts() for noun in nouns(hexcode, "zh"))


def _vary(text: str, language: str, rng: random.Random) -> str:
    """Case and punctuation as they come, and traditional characters."""
    case, stop, commas, characters = (rng.random() for _ in range(4))
    if language == "en":
        text = text[0].upper() + text[1:] if case < 0.35 else text
        text = text.replace(",", "") if commas < 0.1 else text
        ends = {".": 0.2, "!": 0.25}
    else:
        text = text.replace("，", ",") if commas < 0.08 else text.replace("，", " ") if commas < 0.12 else text
        text = to_traditional(text) if characters < 0.12 else text
        ends = {"。": 0.2, "！": 0.23}
    if text[-1] in "?？":
        return text[:-1] if stop < 0.3 else text
    return text + next((end for end, limit in ends.items() if stop < limit), "")
