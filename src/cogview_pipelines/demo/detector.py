"""
A detector of the things in the demo drawings, without a neural network: what is painted on the plain ground, named
after the nearest drawing. It serves checks of what pictures show (`evaluation/requirements.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from .rendering import slot_boxes
from .scenes import RELATIONS, Scene, load_concepts
from .scorer import full_scorer


def demo_detector(device: torch.device | str = "cpu") -> Callable[[Sequence[Image.Image]], list[list[dict[str, Any]]]]:
    """
    The detector.

    Args:
        device: Not used; detectors that are networks need one.

    Returns:
        A function of square pictures that gives `label` (the English noun) and `box` of every object in each.
    """
    return lambda images: [find_objects(image) for image in images]


def find_objects(image: Image.Image) -> list[dict[str, Any]]:
    """
    The objects of a picture: one in the middle, or two beside or above one another, whichever layout leaves nothing
    painted outside of its places.

    Args:
        image (`PIL.Image.Image`): A square picture.
    """
    for scene in _layouts():
        reading = full_scorer().read(image, scene)
        if reading.clean and all(reading.objects):
            places = slot_boxes(scene, image.width)
            return [
                {"label": load_concepts()[hexcode].noun, "box": (left, top, left + side, top + side)}
                for hexcode, (left, top, side) in zip(reading.objects, places, strict=True)
                if hexcode is not None
            ]
    return []


def _layouts() -> list[Scene]:
    """A scene of each layout; a pair also fits into the place of a single object, so pairs come first."""
    one, other = list(load_concepts())[:2]
    pairs = [Scene("noto", "white", (one, other), name) for name in RELATIONS if name in ("left of", "above")]
    return [*pairs, Scene("noto", "white", (one,))]


def requirements_of(scene: Scene) -> dict[str, Any]:
    """What a picture of a scene must show, for a list of captions, as GenEval's metadata have it."""
    nouns = [load_concepts()[hexcode].noun for hexcode in scene.objects]
    include: list[dict[str, Any]] = [{"class": noun, "count": 1} for noun in nouns]
    if scene.relation is None:
        return {"tag": "single_object", "include": include}
    first, second = include
    return {"tag": "position", "include": [second, {**first, "position": [scene.relation, 0]}]}
