"""
Tokens of pictures that a run left when it was stopped, and that the next one goes on from.

They are in a folder of their own, with `made_of.json`, which says what they were made of, and files
`FIRST-END.safetensors` with the tokens of the pictures from one number up to another. A file is whole or not there,
whenever the power fails.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..run_folder import partial_path, read_json, remove, set_modes, write_json
from .shards import differences

NOTE_FILE = "made_of.json"
SAVE_SECONDS = 10.0  # what is kept in memory alone: so much work, or one batch, is done again after a kill

logger = logging.getLogger(__name__)


class UnfinishedTokens:
    """
    Tokens of the first pictures, and those that are added to them; at the end of the context all are in the folder.

    Args:
        folder (`Path`): Where they are kept until all are there, perhaps beside other files of the same purpose.
        made_of (mapping): What they are made of, and how. Of what is no option, digests: `pictures`,
            `image_tokenizer`.

    Raises:
        ValueError: If the folder has tokens that were made otherwise.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]):
        self.folder, self._saved_at = folder, time.monotonic()
        self._saved: list[dict[str, torch.Tensor]] = []
        self._unsaved: list[dict[str, torch.Tensor]] = []
        before = read_json(folder / NOTE_FILE)
        if before:
            self._require_same(before, made_of)
            self._read()
        else:  # no run came so far, or one that was done ended while it removed this
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.safetensors"):
                path.unlink()
            write_json(folder / NOTE_FILE, dict(made_of))

    def __enter__(self) -> "UnfinishedTokens":
        return self

    def __exit__(self, *_: object) -> None:
        self._save()

    @property
    def count(self) -> int:
        """So many pictures have tokens."""
        return _count(self._saved) + _count(self._unsaved)

    def add(self, tokens: Mapping[str, torch.Tensor]) -> None:
        """Add the tokens of the next pictures, `(num_pictures, rows, columns)` by size."""
        self._unsaved.append({name: value.to("cpu", torch.int32) for name, value in tokens.items()})
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def joined(self) -> dict[str, torch.Tensor]:
        """All tokens by size."""
        return _join([*self._saved, *self._unsaved])

    def remove(self) -> None:
        """Remove what was kept, once it is elsewhere. Tokens without the note are nothing, so it goes first."""
        (self.folder / NOTE_FILE).unlink()
        remove(self.folder)

    def _require_same(self, before: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
        said = differences(before, made_of)
        for name, what in (("pictures", "the pictures"), ("image_tokenizer", "the image tokenizer")):
            if name in said:
                said[name] = f"{what} changed"
        if said:
            raise ValueError(
                f"`output_dir` {self.folder.parent} has tokens of a run that was stopped, and this one would make "
                f"others: {'; '.join(said.values())}. Go on with what that one had, choose another folder, or remove "
                f"{self.folder} to begin anew."
            )

    def _read(self) -> None:
        """Take the files that follow one another from the first picture on, and remove others."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name.startswith(f"{self.count:09d}-"):
                try:
                    self._saved.append(load_file(path))
                    continue
                except SafetensorError as error:
                    logger.warning("%s is damaged (%s): tokens of these pictures are made again.", path, error)
            path.unlink()

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if not self._unsaved:
            return
        joined = _join(self._unsaved)
        path = self.folder / f"{_count(self._saved):09d}-{self.count:09d}.safetensors"
        partial = partial_path(path)
        save_file(joined, partial)
        set_modes(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        self._saved, self._unsaved = [*self._saved, joined], []


def _count(parts: list[dict[str, torch.Tensor]]) -> int:
    return sum(len(next(iter(part.values()))) for part in parts)


def _join(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
