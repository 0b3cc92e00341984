"""`--lora`: adapters and learned words from files or the Hub, added to a model that was just loaded."""

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
    help="An adapter, a learned word, or both: a file, folder or Hub id; =0.7 behind it lets the adapter count that "
    "much. May be repeated.",
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
        """What results say of it: its name, of files a hash of what is in them, and its weight; not where it is."""
        if not os.path.exists(self.source):
            return {"name": self.source, "weight": self.weight}
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in _files_of(self.source))).hexdigest()[:16]
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
            _files_of(source)
        elif not is_hub_id(source):
            fail(f"`--lora`: there is no file or folder {source}, and it is not a Hub id (owner/name) either.")
        found.append(Adapter(source, number))
    return tuple(found)


def _files_of(source: str) -> list[Path]:
    """The files of weights in a file or folder that is there."""
    from ..loaders.lora_files import find_trained

    try:
        return find_trained(source)
    except OSError as error:
        fail(f"`--lora`: {first_line(error)}")


def add_adapters(pipe: "PipelineBase", adapters: Sequence[Adapter]) -> None:
    """
    Load learned words, and adapters beside those that the model was saved with and that count; these are all added to
    the weights, so that a step takes as long as without.
    """
    if not adapters:
        return
    from ..loaders.lora_files import find_trained
    from ..loaders.textual_inversion import is_learned_token

    own = {name: _weights_of(pipe, name) for name in pipe.get_active_adapters()}
    taken = {name for names in pipe.get_list_adapters().values() for name in names}
    names = [name for name in (f"lora_{index}" for index in range(len(adapters) + len(taken))) if name not in taken]
    loaded: dict[str, float] = {}
    for name, adapter in zip(names, adapters, strict=False):
        try:
            for file in find_trained(adapter.source):
                if is_learned_token(file):
                    pipe.load_textual_inversion(file)
                else:
                    pipe.load_lora_weights(file, adapter_name=name)
                    loaded[name] = adapter.weight
        except ImportError as error:
            fail(first_line(error))
        except Exception as error:  # also whatever the Hub's client raises
            fail(f"`--lora` {adapter.source}: {first_line(error)}")
    if loaded:
        pipe.set_adapters([*own, *loaded], [*own.values(), *loaded.values()])
        pipe.fuse_lora()


def _weights_of(pipe: "PipelineBase", name: str) -> dict[str, float]:
    """By how much an adapter counts in each component that has it."""
    from ..models.adapters import active_adapters, adapter_names, adapter_scale

    models = {part: model for part, model in pipe.components.items() if name in adapter_names(model)}
    return {
        part: adapter_scale(model, name) if name in active_adapters(model) else 0.0 for part, model in models.items()
    }
