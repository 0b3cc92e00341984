"""
What a picture can show: concepts, styles, backgrounds and relations; scenes made of them; scopes, sampling and
held-out splits.
"""

import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

DATA_FOLDER = Path(__file__).parent / "data"


class Style(NamedTuple):
    """An artwork set: its words in captions and the licence of the drawings."""

    english: str
    chinese: str
    licence: str


class Background(NamedTuple):
    """A plain ground; its key is the English colour word."""

    rgb: tuple[int, int, int]
    chinese: str


class Relation(NamedTuple):
    """Where the first object of a pair is, seen from the second, and the same picture told from the second object."""

    english: str
    chinese: str
    slots: tuple[str, str]
    inverse: str


STYLES = {
    "noto": Style("painted", "彩绘", "Apache-2.0"),
    "fluent": Style("glossy 3D", "立体", "MIT"),
    "flat": Style("flat", "扁平", "MIT"),
    "twemoji": Style("cartoon", "卡通", "CC-BY-4.0"),
}
BACKGROUNDS = {
    "white": Background((250, 250, 250), "白色"),
    "pink": Background((255, 182, 205), "粉色"),
    "red": Background((205, 45, 50), "红色"),
    "orange": Background((250, 140, 30), "橙色"),
    "yellow": Background((255, 225, 90), "黄色"),
    "green": Background((90, 175, 90), "绿色"),
    "blue": Background((75, 135, 225), "蓝色"),
    "purple": Background((140, 90, 190), "紫色"),
    "brown": Background((135, 90, 60), "棕色"),
    "gray": Background((150, 155, 160), "灰色"),
    "black": Background((25, 25, 30), "黑色"),
}
RELATIONS = {
    "left of": Relation("to the left of", "左边", ("left", "right"), "right of"),
    "right of": Relation("to the right of", "右边", ("right", "left"), "left of"),
    "above": Relation("above", "上面", ("top", "bottom"), "below"),
    "below": Relation("below", "下面", ("bottom", "top"), "above"),
}
CANONICAL_RELATIONS = ("left of", "above")  # every picture of a pair has exactly one reading with one of these
LAYOUTS = ("single", "pair")
SHAPES = ("circle", "square", "heart")
SHAPE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
SPLITS = ("train", "validation", "test_background", "test_colour_shape", "test_pair", "test_order", "test_style")
_POOL_LIMIT = 100_000  # up to so many candidates a sampler lists them all; beyond, it draws and rejects


@dataclass(frozen=True)
class Concept:
    """
    A thing that can be drawn.

    Args:
        hexcode (`str`): Unicode code points, lower case, joined by `-`, without the variation selector `fe0f`.
        emoji (`str`): The character itself.
        name (`str`): English short name of the Unicode CLDR.
        noun, noun_zh (`str`): The words used in captions.
        measure (`str`): Chinese measure word.
        shape (`str`): `"circle"`, `"square"` or `"heart"` for the glyphs that are a colour times a shape, else empty.
        hidden (`dict[str, tuple[str, ...]]`): For a style, the backgrounds on which its drawing can hardly be seen.
    """

    hexcode: str
    emoji: str
    name: str
    noun: str
    noun_zh: str
    measure: str
    shape: str
    hidden: dict[str, tuple[str, ...]]


@lru_cache(maxsize=1)
def load_concepts() -> dict[str, Concept]:
    """The 174 concepts by hexcode, in the order of the hexcodes."""
    table = json.loads((DATA_FOLDER / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    return {
        hexcode: Concept(hexcode, **{**row, "hidden": {style: tuple(v) for style, v in row["hidden"].items()}})
        for hexcode, row in table.items()
    }


def _check_known(argument: str, values: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown:
        listing = ", ".join(known) if len(known) < 20 else f"one of the {len(known)} hexcodes of `load_concepts()`"
        raise ValueError(f"`{argument}` has {unknown[0]!r}, which is not known. Known: {listing}.")


@dataclass(frozen=True)
class Scene:
    """
    What one picture shows: one object, or two and how they stand to each other, in a style on a background.

    Args:
        style (`str`): A key of `STYLES`.
        background (`str`): A key of `BACKGROUNDS`.
        objects (`tuple[str, ...]`): Hexcodes of one or two different concepts.
        relation (`str`, *optional*): For two objects, where the first one is: a key of `RELATIONS`.

    Raises:
        ValueError: If a name is not known, or objects and relation do not go together.
    """

    style: str
    background: str
    objects: tuple[str, ...]
    relation: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "objects", tuple(self.objects))
        _check_known("style", [self.style], tuple(STYLES))
        _check_known("background", [self.background], tuple(BACKGROUNDS))
        _check_known("objects", self.objects, tuple(load_concepts()))
        if len(self.objects) not in (1, 2) or len(set(self.objects)) != len(self.objects):
            raise ValueError(f"`objects` must be one concept or two different ones, got {self.objects}.")
        if self.layout == "single" and self.relation is not None:
            raise ValueError(f"`relation` must be left out for one object, got {self.relation!r}.")
        if self.layout == "pair":
            _check_known("relation", [self.relation], tuple(RELATIONS))

    @property
    def layout(self) -> str:
        """`"single"` or `"pair"`."""
        return LAYOUTS[len(self.objects) - 1]

    @property
    def slots(self) -> tuple[str, ...]:
        """The place of each object, in the order of the objects."""
        return RELATIONS[self.relation].slots if self.relation else ("centre",)

    def other_reading(self) -> "Scene":
        """
        The same picture told from its second object ("A left of B" is "B right of A"); a single scene is its own.
        """
        if self.relation is None:
            return self
        return Scene(self.style, self.background, self.objects[::-1], RELATIONS[self.relation].inverse)

    def canonical(self) -> "Scene":
        """The reading that stands for the picture: pairs told from the left or from the upper object."""
        return self if self.relation in (None, *CANONICAL_RELATIONS) else self.other_reading()

    def to_dict(self) -> dict:
        """Plain values for JSON; `Scene(**scene.to_dict())` is the scene again."""
        return {**asdict(self), "objects": list(self.objects)}


@dataclass(frozen=True)
class Scope:
    """
    The scenes that a model was trained on, as kept in the `scope.json` of its folder.

    Args:
        concepts (`tuple[str, ...]`): Hexcodes.
        styles (`tuple[str, ...]`): Keys of `STYLES`.
        backgrounds (`tuple[str, ...]`): Keys of `BACKGROUNDS`.
        layouts (`tuple[str, ...]`): `"single"`, `"pair"` or both.

    Raises:
        ValueError: If a list is empty, repeats itself or has an unknown name.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    layouts: tuple[str, ...]

    def __post_init__(self):
        known = {"concepts": load_concepts(), "styles": STYLES, "backgrounds": BACKGROUNDS, "layouts": LAYOUTS}
        for name, names in known.items():
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            _check_known(name, values, tuple(names))
            if not values or len(set(values)) != len(values):
                raise ValueError(f"`{name}` must be a list of different names with at least one, got {list(values)}.")

    @classmethod
    def full(cls) -> "Scope":
        """All 174 concepts in all four styles."""
        return cls(tuple(load_concepts()), tuple(STYLES), tuple(BACKGROUNDS), LAYOUTS)

    @classmethod
    def small(cls) -> "Scope":
        """The 24 concepts in two styles that the shipped model learned first."""
        return cls.load(DATA_FOLDER / "scope_small.json")

    @classmethod
    def load(cls, path: str | Path) -> "Scope":
        """Read a scope file, or the `scope.json` of a folder; keys other than the four are left to their owner."""
        path = Path(path)
        path = path / "scope.json" if path.is_dir() else path
        values = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise ValueError(
                f"`path` must be a scope file with the keys {list(cls.__dataclass_fields__)}; {path} lacks {missing}."
            )
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def save(self, path: str | Path) -> None:
        """Write the scope to a file, or as `scope.json` into an existing folder."""
        path = Path(path)
        path = path / "scope.json" if path.is_dir() else path
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __contains__(self, scene: Scene) -> bool:
        return (
            set(scene.objects) <= set(self.concepts)
            and scene.style in self.styles
            and scene.background in self.backgrounds
            and scene.layout in self.layouts
        )


def is_usable(scene: Scene) -> bool:
    """Whether every object can be seen on the background and no noun names the background's colour."""
    concepts = [load_concepts()[hexcode] for hexcode in scene.objects]
    return not any(
        scene.background in concept.hidden.get(scene.style, ()) or scene.background in concept.noun.split()
        for concept in concepts
    )


def _chosen(percent: int, *what: str) -> bool:
    """A fixed pseudo-random choice, the same on every machine."""
    return zlib.crc32("|".join(what).encode()) % 100 < percent


def split(scene: Scene, validation: bool = False) -> str:
    """
    Which part of the data a scene belongs to; the parts of every held-out combination are themselves seen in training.

    The first that applies: `test_colour_shape` (9 of the 27 colour and shape glyphs), `test_style` (5 % of the concept
    and style combinations), `test_background` (10 % of the concept and background combinations), `test_pair` (10 % of
    the unordered pairs of concepts), `test_order` (20 % of the pairs are trained in one order only), `train`. Glyphs
    and drawings that training never shows come first, because nobody can know what they look like: the other parts
    would otherwise ask for them, too. Both readings of a picture are in the same part.

    Args:
        scene (`Scene`): Any scene; it need not be usable.
        validation (`bool`, defaults to `False`):
            Whether to set 2 % of the training scenes apart as `"validation"`: unseen scenes of seen combinations.

    Returns:
        `str`: One of `SPLITS`.
    """
    concepts = load_concepts()
    objects = scene.objects
    for hexcode in objects:
        concept = concepts[hexcode]
        if concept.shape:
            colour = SHAPE_COLOURS.index(concept.noun.split()[0])
            if colour % len(SHAPES) == SHAPES.index(concept.shape):
                return "test_colour_shape"
    if any(_chosen(5, "style", hexcode, scene.style) for hexcode in objects):
        return "test_style"
    if any(_chosen(10, "bg", hexcode, scene.background) for hexcode in objects):
        return "test_background"
    if scene.layout == "pair":
        pair = sorted(objects)
        if _chosen(10, "pair", *pair):
            return "test_pair"
        if _chosen(20, "order", *pair) and scene.canonical().objects[0] == pair[1]:
            return "test_order"
    if validation:
        told = scene.canonical()
        if _chosen(2, "validation", told.style, told.background, *told.objects, str(told.relation)):
            return "validation"
    return "train"


def iterate_scenes(scope: Scope, layout: str | None = None, split_name: str | None = None) -> Iterator[Scene]:
    """
    Every usable picture of a scope once, in a fixed order: singles first; pairs told from the left or upper object.

    Args:
        scope (`Scope`): What may be shown.
        layout (`str`, *optional*): Only `"single"` or only `"pair"`.
        split_name (`str`, *optional*): Only scenes of this split, with `"validation"` set apart from `"train"`.
    """
    _check_choice(scope, layout, split_name)
    stories: Iterable[tuple[tuple[str, ...], str | None]]
    for chosen in scope.layouts if layout is None else (layout,):
        if chosen == "single":
            stories = (((hexcode,), None) for hexcode in scope.concepts)
        else:
            stories = product(permutations(scope.concepts, 2), CANONICAL_RELATIONS)
        for (objects, relation), style, background in product(stories, scope.styles, scope.backgrounds):
            scene = Scene(style, background, objects, relation)
            if is_usable(scene) and (split_name is None or split(scene, validation=True) == split_name):
                yield scene


def sample_scene(
    scope: Scope,
    rng: random.Random,
    layout: str | None = None,
    split_name: str | None = None,
    pair_probability: float = 0.5,
) -> Scene:
    """
    One usable scene by chance; a pair is told in one of its two readings.

    Args:
        scope (`Scope`): What may be shown.
        rng (`random.Random`): Source of chance.
        layout (`str`, *optional*): Only `"single"` or only `"pair"`; by default any layout of the scope.
        split_name (`str`, *optional*): Only scenes of this split, with `"validation"` set apart from `"train"`.
        pair_probability (`float`, defaults to 0.5):
            Share of pairs, where the scope has both layouts and `layout` is left out.

    Raises:
        ValueError: If there is no such scene.
    """
    _check_choice(scope, layout, split_name)
    if layout is None:
        layout = scope.layouts[0]
        if len(scope.layouts) > 1:
            layout = "pair" if rng.random() < pair_probability else "single"
    if _num_candidates(scope, layout) <= _POOL_LIMIT:
        pool = _pool(scope, layout, split_name)
        if not pool:
            raise ValueError(f"`scope` has no {layout} scene in the split {split_name!r}.")
        scene = rng.choice(pool)
    else:
        scene = _draw(scope, rng, layout, split_name)
    return rng.choice((scene, scene.other_reading()))


def sample_scenes(
    scope: Scope,
    num_scenes: int,
    seed: int,
    layout: str | None = None,
    split_name: str | None = None,
    pair_probability: float = 0.5,
) -> list[Scene]:
    """
    Different pictures by chance, the same for a seed on every machine; arguments as for [`sample_scene`].

    Raises:
        ValueError: If there are not so many different pictures.
    """
    rng, missed = random.Random(seed), 0
    scenes: dict[Scene, Scene] = {}
    if layout is not None and _num_candidates(scope, layout) <= _POOL_LIMIT:
        _check_choice(scope, layout, split_name)
        pool = _pool(scope, layout, split_name)
        if num_scenes > len(pool):
            raise ValueError(
                f"`num_scenes` is {num_scenes}, but there are only {len(pool)} different {layout} pictures"
                f" in the split {split_name!r} of this scope."
            )
        return [rng.choice((scene, scene.other_reading())) for scene in rng.sample(pool, num_scenes)]
    while len(scenes) < num_scenes:
        scene = sample_scene(scope, rng, layout, split_name, pair_probability)
        missed = missed + 1 if scene.canonical() in scenes else 0
        scenes.setdefault(scene.canonical(), scene)
        if missed > 10_000:
            raise ValueError(
                f"`num_scenes` is {num_scenes}, but only {len(scenes)} different pictures were found"
                f" in the split {split_name!r} of this scope. Ask for fewer."
            )
    return list(scenes.values())


def _check_choice(scope: Scope, layout: str | None, split_name: str | None) -> None:
    if layout is not None:
        _check_known("layout", [layout], scope.layouts)
    if split_name is not None:
        _check_known("split_name", [split_name], SPLITS)


def _num_candidates(scope: Scope, layout: str) -> int:
    count = len(scope.concepts)
    stories = count if layout == "single" else count * (count - 1) * len(CANONICAL_RELATIONS)
    return stories * len(scope.styles) * len(scope.backgrounds)


@lru_cache(maxsize=64)
def _pool(scope: Scope, layout: str, split_name: str | None) -> tuple[Scene, ...]:
    return tuple(iterate_scenes(scope, layout, split_name))


def _draw(scope: Scope, rng: random.Random, layout: str, split_name: str | None) -> Scene:
    """Draw until a scene fits; only for scopes so large that every split has its share."""
    for _ in range(_POOL_LIMIT):
        objects = rng.sample(scope.concepts, 1 if layout == "single" else 2)
        relation = None if layout == "single" else rng.choice(CANONICAL_RELATIONS)
        scene = Scene(rng.choice(scope.styles), rng.choice(scope.backgrounds), tuple(objects), relation)
        if is_usable(scene) and (split_name is None or split(scene, validation=True) == split_name):
            return scene
    raise ValueError(f"`scope` has no {layout} scene in the split {split_name!r}, or hardly any.")
