"""
Checks in the manner of GenEval (https://arxiv.org/abs/2310.11513): does a picture show the objects that its caption
asks for, so many of them, in these colours, where they should be? A detector of your own says what is in a picture.

A caption's line of the list says what is to be seen, in GenEval's own form (`evaluation_metadata.jsonl`):

    {"prompt": "a red dog right of a bench", "tag": "position",
     "include": [{"class": "bench", "count": 1},
                 {"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]}],
     "exclude": [{"class": "bench", "count": 3}]}
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # detections less sure than this do not count
COUNTING_THRESHOLD = 0.9  # nor those, where it is the number that is asked for
MOST_OF_A_CLASS = 16
OVERALL, TASK = "geneval", "geneval/"
_COUNTING = "counting"
_TOUCHING = 0.1  # how much of the sizes of two objects their distance must exceed

# What is in each picture: `{"label": ..., "box": ..., "score": ..., "color": ...}`, the last two where they are known.
# A box is (left, top, right, bottom), or as object detection in transformers has it (`{"xmin": ..., "ymin": ...}`).
Detector = Callable[[Sequence[Image.Image]], Sequence[Sequence[Mapping[str, Any]]]]


@dataclass(frozen=True)
class Wanted:
    """
    Objects of a kind that a picture must show.

    Args:
        label (`str`): What a detector calls them.
        count (`int`): How many, at least. Of more, the surest so many are looked at.
        colour (`str`, *optional*): Of all of them, as the detector calls it.
        relation (`str`, *optional*): Where they are, one of `RELATIONS`, seen from the objects that `target` wants.
        target (`int`, *optional*): Index of those objects among what the picture must show.
    """

    label: str
    count: int = 1
    colour: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Requirements:
    """
    What a picture must show.

    Args:
        task (`str`): A name for captions of this kind: figures are given for each.
        include (tuple of [`Wanted`]): All of these must be there.
        exclude (tuple of [`Wanted`]): So many of these must not.
    """

    task: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Requirements | None":
        """
        What a line of a list asks for; `None` if it says nothing of objects.

        Raises:
            ValueError: If it says it in another form than GenEval's.
        """
        if "include" not in row:
            return None
        task = row.get("tag", "all")
        if not isinstance(task, str) or not task:
            raise ValueError(f'must have a name as "tag", but has {task!r}.')
        include = _read_list(row, "include")
        for wanted in include:
            if wanted.target is not None and not 0 <= wanted.target < len(include):
                raise ValueError(f'has a "position" beside object {wanted.target}, but there are {len(include)}.')
        return cls(task, include, _read_list(row, "exclude"))


def check(requirements: Requirements, found: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """
    Compare what a detector found in a picture with what the caption asks for.

    Args:
        requirements ([`Requirements`]): What must be there.
        found (list of `dict`): What a [`Detector`] gives for the picture.

    Returns:
        `dict` of `bool`: `geneval/<task>`, whether all is right; `geneval_objects`, whether all kinds are there;
        `geneval_counts`, in these numbers; and where the caption asks for them, `geneval_colors` and
        `geneval_positions`.

    Source: the rules of GenEval (https://arxiv.org/abs/2310.11513).
    """
    threshold = COUNTING_THRESHOLD if requirements.task == _COUNTING else THRESHOLD
    sure = sorted((one for one in found if _score(one) >= threshold), key=_score, reverse=True)

    def of(label: str) -> list[Mapping[str, Any]]:
        return [one for one in sure if one["label"] == label][:MOST_OF_A_CLASS]

    groups = [of(wanted.label)[: wanted.count] for wanted in requirements.include]
    kinds: dict[str, list[bool]] = {
        "objects": [bool(group) for group in groups],
        "counts": [len(group) >= wanted.count for group, wanted in zip(groups, requirements.include)],
        "colors": [],
        "positions": [],
    }
    kinds["counts"] += [len(of(unwanted.label)) < unwanted.count for unwanted in requirements.exclude]
    for group, wanted in zip(groups, requirements.include):
        if wanted.colour is not None:
            alike = [one for one in group if one.get("color") == wanted.colour]
            kinds["colors"].append(len(alike) >= wanted.count)
        if wanted.relation is not None and wanted.target is not None:
            others = groups[wanted.target]
            placed = [wanted.relation in relations(one, other) for one in group for other in others]
            kinds["positions"].append(bool(placed) and all(placed))
    result = {f"geneval_{kind}": all(values) for kind, values in kinds.items() if values}
    return {f"{TASK}{requirements.task}": all(result.values()), **result}


def relations(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Where one object is, seen from another: one or two of `RELATIONS`, or none if they overlap too much."""
    boxes = read_box(one["box"]), read_box(other["box"])
    offset = []
    for axis in (0, 1):
        centres = [(box[axis] + box[axis + 2]) / 2 for box in boxes]
        sizes = [abs(box[axis + 2] - box[axis]) for box in boxes]
        offset.append((centres[0] - centres[1], _TOUCHING * sum(sizes)))
    length = math.hypot(*(distance for distance, _ in offset))
    if length == 0:
        return set()
    found: set[str] = set()
    for names, (distance, margin) in zip((RELATIONS[:2], RELATIONS[2:]), offset, strict=True):
        beyond = max(abs(distance) - margin, 0.0) / length
        if beyond > 0.5:
            found.add(names[distance > 0])
    return found


def read_box(box: Any) -> tuple[float, float, float, float]:
    """
    Left, top, right and bottom of a detector's box.

    Raises:
        ValueError: If it is something else than four finite numbers.
    """
    try:
        values = [box[name] for name in ("xmin", "ymin", "xmax", "ymax")] if isinstance(box, Mapping) else list(box)
        left, top, right, bottom = (float(value) for value in values)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the detector must give boxes of four numbers, but gave {box!r}.") from None
    if not all(math.isfinite(value) for value in (left, top, right, bottom)):
        raise ValueError(f"the detector gave a box that is no place: {box!r}.")
    return left, top, right, bottom


def detect(detector: Detector, images: Sequence[Image.Image]) -> list[list[dict[str, Any]]]:
    """
    What a detector finds in pictures, checked.

    Raises:
        ValueError: If it gives something else than a list of labels and boxes for each picture.
    """
    found = list(detector(list(images)))
    if len(found) != len(images):
        raise ValueError(f"the detector must give a list for each of {len(images)} pictures, but gave {len(found)}.")
    checked = []
    for own in found:
        try:
            checked.append([{**one, "label": str(one["label"]), "box": read_box(one["box"])} for one in own])
        except (KeyError, TypeError) as error:
            raise ValueError(
                'the detector must give {"label": ..., "box": ...} for each object: '
                f"{type(error).__name__}: {error}."
            ) from None
        for one in checked[-1]:
            _score(one)
    return checked


def _score(found: Mapping[str, Any]) -> float:
    score = found.get("score")
    try:
        value = 1.0 if score is None else float(score)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"the detector must give a number as score, but gave {score!r}.")
    return value


def _read_list(row: Mapping[str, Any], name: str) -> tuple[Wanted, ...]:
    given = row.get(name, [])
    if (
        not isinstance(given, list)
        or not all(isinstance(one, Mapping) for one in given)
        or (name == "include" and not given)
    ):
        raise ValueError(f'must have a list of objects as "{name}", but has {given!r}.')
    return tuple(_read_wanted(one, name) for one in given)


def _read_wanted(given: Mapping[str, Any], name: str) -> Wanted:
    label, count, colour = given.get("class"), given.get("count", 1), given.get("color")
    if not isinstance(label, str) or not label:
        raise ValueError(f'must have a name as "class" in "{name}", but has {label!r}.')
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_OF_A_CLASS:
        raise ValueError(f'must have 1 to {MOST_OF_A_CLASS} as "count" of {label!r}, but has {count!r}.')
    if colour is not None and not isinstance(colour, str):
        raise ValueError(f'must have a name as "color" of {label!r}, but has {colour!r}.')
    position = given.get("position")
    if position is None:
        return Wanted(label, count, colour)
    is_pair = isinstance(position, list) and len(position) == 2
    if not is_pair or position[0] not in RELATIONS or type(position[1]) is not int:
        raise ValueError(
            f'must have one of {", ".join(RELATIONS)} and the number of an object as "position" of {label!r}, but '
            f"has {position!r}."
        )
    return Wanted(label, count, colour, *position)
