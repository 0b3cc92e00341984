"""What a sentence asks for: less than a scene says, or as much."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..scenes import RELATIONS, Scene

BESIDE = ("left of", "right of")


@dataclass(frozen=True)
class Request:
    """
    What a sentence asks for, so that a picture can be judged by that and nothing else.

    Args:
        objects (`tuple[str, ...]`): Hexcodes of one or two concepts.
        relations (`tuple[str, ...]`):
            Where the first of two objects may be: keys of `RELATIONS`, one where the place is told, two for "beside",
            all four where no place is asked for; empty for a single object.
        style (`str`, *optional*): A key of `STYLES`, if one is asked for.
        background (`str`, *optional*): A key of `BACKGROUNDS`, if one is asked for.
    """

    objects: tuple[str, ...]
    relations: tuple[str, ...] = ()
    style: str | None = None
    background: str | None = None

    @classmethod
    def of(cls, scene: Scene) -> "Request":
        """All that the scene says."""
        relations = () if scene.relation is None else (scene.relation,)
        return cls(scene.objects, relations, scene.style, scene.background)

    @property
    def tells_place(self) -> bool:
        """Whether two objects may not stand in just any place."""
        return 0 < len(self.relations) < len(RELATIONS)

    def canonical(self) -> "Request":
        """The same request for all ways to name the objects in the other order."""
        if len(self.objects) < 2:
            return self
        turned = replace(
            self, objects=self.objects[::-1], relations=tuple(RELATIONS[name].inverse for name in self.relations)
        )
        both = [replace(one, relations=tuple(sorted(one.relations))) for one in (self, turned)]
        return min(both, key=lambda one: (one.objects, one.relations))

    def is_met_by(self, scene: Scene) -> bool:
        """Whether a picture of the scene is what was asked for."""
        told = {(reading.objects, reading.relation) for reading in (scene, scene.other_reading())}
        wanted = {(self.objects, relation) for relation in self.relations or (None,)}
        return bool(
            told & wanted and self.style in (None, scene.style) and self.background in (None, scene.background)
        )

    def layouts(self, scene: Scene) -> Iterator[Scene]:
        """Scenes with these objects in each place where they may stand; style and background are those of `scene`."""
        for relation in self.relations or (None,):
            yield Scene(self.style or scene.style, self.background or scene.background, self.objects, relation)
