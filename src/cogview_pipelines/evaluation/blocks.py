"""Files of an evaluation, one for each block of captions, with what its figures are computed from."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..pictures.png import remove_unfinished, write_whole


def write_block(
    path: Path, tensors: Mapping[str, torch.Tensor], key: str, excluded: Mapping[str, str], count: int
) -> None:
    """
    Write a block as a whole.

    Args:
        path (`Path`): The file.
        tensors (`dict`): Of each name a row or a value for each picture.
        key (`str`): Of the evaluation that it belongs to.
        excluded (`dict`): Why a caption is left out, by its id.
        count (`int`): Pictures that are not.
    """
    from safetensors.torch import save

    path.parent.mkdir(exist_ok=True)
    remove_unfinished(path.parent, [path.name])
    metadata = {"key": key, "excluded": json.dumps(excluded), "count": str(count)}
    # not `save_file`, whose files only their owner may read: shards may be of several users
    write_whole(path, save({name: values.contiguous() for name, values in tensors.items()}, metadata))


def block_key(path: Path) -> str | None:
    """The key of the evaluation that a block belongs to; `None` if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        with _open(path) as opened:
            return opened.metadata().get("key")
    except Exception:  # whatever a damaged file makes the reader raise
        return None


class Blocks:
    """
    What all blocks of an evaluation hold; one of them is in memory at a time.

    Args:
        files (list of `Path`): One for each block.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.count = 0  # of pictures
        self.excluded: dict[str, str] = {}
        self.names: set[str] = set()
        for file in files:
            with _open(file) as opened:
                metadata = opened.metadata()
                self.excluded |= json.loads(metadata["excluded"])
                self.names |= set(opened.keys())
                self.count += int(metadata["count"])

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a name, block by block."""
        for file in self.files:
            with _open(file) as opened:
                if name in set(opened.keys()):
                    # a copy: the tensor as it comes keeps the whole file mapped for as long as it lives
                    yield opened.get_tensor(name).clone()

    def values(self, name: str) -> torch.Tensor:
        """All values of a name."""
        return torch.cat(list(self.chunks(name)))


def _open(path: Path) -> contextlib.AbstractContextManager[Any]:
    from safetensors import safe_open

    return safe_open(path, "pt")
