"""`--lora`: adapters from files or the Hub, added to the weights of a model that was just loaded."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .console import expand, fail, first_line
from .names import is_hub_id

if TYPE_CHECKING:
    from ..pipelines.common.base import PipelineBase

LORA_OPTION = typer.Option(
    None,
    "--lora",
    help="An adapter: a file, folder or Hub id; =0.7 behind it lets it count that much. May be repeated.",
    metavar="SOURCE[=WEIGHT]",
)


@dataclass(frozen=True)
class Adapter:
    """
    One `--lora`.

    Args:
        source (`str`): A file, a folder, or a Hub id.
        weight (`float`): By how much it counts.
    """

    source: str
    weight: float = 1.0

    def describe(self) -> dict[str, str | float]:
        """What results say of it: its name, of a file a hash of what is in it, and its weight; not where it is."""
        if not os.path.exists(self.source):
            return {"name": self.source, "weight": self.weight}
        digest = hashlib.sha256(_file_of(self.source).read_bytes()).hexdigest()[:16]
        name = os.path.basename(os.path.abspath(self.source))
        return {"name": name, "fingerprint": digest, "weight": self.weight}


def read_adapters(texts: Sequence[str] | None) -> tuple[Adapter, ...]:
    """What the values of `--lora` say."""
    found = []
    for text in texts or ():
        source, equals, weight = text.rpartition("=")
        if not equals or os.path.exists(expand(Path(text), "--lora")):
            source, weight = text, "1"
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not source or not math.isfinite(number):
            fail(f"`--lora` must be SOURCE or SOURCE=WEIGHT with a number as weight, but is {text!r}.")
        path = expand(Path(source), "--lora")
        if os.path.exists(path):
            source = os.fspath(path)
            _file_of(source)
        elif not is_hub_id(source):
            fail(f"`--lora`: there is no file or folder {source}, and it is not a Hub id (owner/name) either.")
        found.append(Adapter(source, number))
    return tuple(found)


def _file_of(source: str) -> Path:
    """The file of weights in a file or folder that is there."""
    from ..loaders.lora_files import find_weights

    try:
        return find_weights(source)
    except OSError as error:
        fail(f"`--lora`: {first_line(error)}")


def add_adapters(pipe: "PipelineBase", adapters: Sequence[Adapter]) -> None:
    """
    Load adapters beside those that the model was saved with and that count, and add all to the weights, so that a step
    takes as long as without.
    """
    if not adapters:
        return
    own = {name: _weights_of(pipe, name) for name in pipe.get_active_adapters()}
    taken = {name for names in pipe.get_list_adapters().values() for name in names}
    names = [name for name in (f"lora_{index}" for index in range(len(adapters) + len(taken))) if name not in taken]
    names = names[: len(adapters)]
    for name, adapter in zip(names, adapters, strict=True):
        try:
            pipe.load_lora_weights(adapter.source, adapter_name=name)
        except ImportError as error:
            fail(first_line(error))
        except Exception as error:  # also whatever the Hub's client raises
            fail(f"`--lora` {adapter.source}: {first_line(error)}")
    pipe.set_adapters([*own, *names], [*own.values(), *(adapter.weight for adapter in adapters)])
    pipe.fuse_lora()


def _weights_of(pipe: "PipelineBase", name: str) -> dict[str, float]:
    """By how much an adapter counts in each component that has it."""
    from ..models.adapters import active_adapters, adapter_names, adapter_scale

    models = {part: model for part, model in pipe.components.items() if name in adapter_names(model)}
    return {
        part: adapter_scale(model, name) if name in active_adapters(model) else 0.0 for part, model in models.items()
    }
