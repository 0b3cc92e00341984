"""
A setting of the calls is declared once, as a field of a dataclass: default, bounds, help, and which pipelines take it.

Checks, options of the command line and fields of the server's requests are made from these fields; tests hold the
signatures and docstrings of the calls against them. Standard library only, so that the command line starts at once.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

# More pictures or texts of one prompt, and of one call, would not fit into any memory.
MOST_COUNT = 10_000
MOST_PER_CALL = 100_000
Chosen = TypeVar("Chosen", bound="Settings")


@dataclass(frozen=True)
class Setting:
    """
    What a setting may be.

    Args:
        least, most (`float`): Its bounds, both allowed.
        help (`str`): What it does, in a few words.
        pipelines (`tuple[str, ...]`): Names of the classes whose call takes it.
        is_whole (`bool`): Whether it counts something.
        is_per_pass (`bool`): Whether a list is taken, too.
    """

    least: float
    most: float
    help: str
    pipelines: tuple[str, ...]
    is_whole: bool = False
    is_per_pass: bool = False

    @property
    def wanted(self) -> str:
        """What it must be, in words."""
        kind = (
            f"a whole number from {self.least:.0f} to {self.most:.0f}"
            if self.is_whole
            else (f"a number from {self.least:g} to {self.most:g}")
        )
        return f"{kind}, or a list of them, one per pass" if self.is_per_pass else kind

    def check(self, name: str, value: Any) -> Any:
        """
        The value as plain Python numbers.

        Raises:
            ValueError: If it is of another kind, or out of bounds.
        """
        if self.is_per_pass and isinstance(value, (list, tuple)) and value:
            return [self.check(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
        is_number = isinstance(value, numbers.Integral if self.is_whole else numbers.Real)
        # the comparison is false for nan, too
        if not is_number or isinstance(value, bool) or not self.least <= value <= self.most:
            raise ValueError(f"`{name}` must be {self.wanted}, but is {value!r}.")
        return int(value) if self.is_whole else float(value)


def setting(default: float | None, least: float, most: float, help: str, pipelines: tuple[str, ...], **more) -> Any:
    """A field of a [`Settings`] dataclass; the arguments are those of [`Setting`]."""
    return dataclasses.field(default=default, metadata={"setting": Setting(least, most, help, pipelines, **more)})


@dataclass(frozen=True)
class Settings:
    """What the calls of a family can be told; each value is checked when one is made. `None` is left to others."""

    def __post_init__(self):
        for name, declared in self.declared().items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, declared.check(name, value))

    @classmethod
    def declared(cls, pipeline: str | None = None) -> dict[str, Setting]:
        """The settings by name, in order: all, or those that one pipeline takes."""
        found = {field.name: field.metadata["setting"] for field in dataclasses.fields(cls)}
        return {name: one for name, one in found.items() if pipeline is None or pipeline in one.pipelines}

    @classmethod
    def choose(cls: type[Chosen], preset: Mapping[str, Any], given: Mapping[str, Any]) -> Chosen:
        """
        Settings of a call: what is given and not `None`, else the preset's, else the defaults.

        Args:
            preset (mapping): Settings by name; there may be no others.
            given (mapping): Settings by name, among other things.

        Raises:
            ValueError: If one cannot be used.
        """
        names = cls.declared()
        given = {name: given[name] for name in names if given.get(name) is not None}
        return cls(**{**preset, **given})


def whole_number(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """
    The value as an `int`, whichever library it is from.

    Raises:
        ValueError: If it is no whole number, or out of bounds.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        bounds = f"of at least {least}" if value is not None and most == math.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be a whole number {bounds}, but is {value!r}.")
    return int(value)
