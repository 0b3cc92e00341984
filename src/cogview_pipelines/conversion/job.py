"""
What the converters of all families do alike: components written into one folder, each whole or not at all, with a
record of what was made from what, by which an interrupted conversion goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .reader import ConversionError
from .shapes import check_shapes, expected_shapes
from .writer import Tensors, content_hash, hash_file, write_component, write_json

RECORD_FILE = "conversion.json"
RECORD_VERSION = 1


@dataclass
class Job:
    """
    What one call converts, and where it stands.

    Args:
        output (`Path`): The folder of the pipeline.
        dtype (`torch.dtype`, *optional*): What transformers are converted to.
        max_shard_size (`int`): In bytes.
        strict (`bool`): Refuse files with tensors that the model does not know.
        record (`dict`): What is in the folder.
        say: Called with each line of the report.
    """

    output: Path
    dtype: torch.dtype | None
    max_shard_size: int
    strict: bool
    record: dict
    say: Callable[[str], None]

    @classmethod
    def start(cls, output: str | Path, dtype, max_shard_size: int, strict: bool, say: Callable[[str], None]) -> "Job":
        """Begin, or go on, in a folder."""
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        record = read_record(output)
        there = {name: entry for name, entry in record["components"].items() if (output / name).is_dir()}
        return cls(output, dtype, max_shard_size, strict, {**record, "components": there}, say)

    def save(self) -> None:
        """Write the record."""
        write_json(self.output / RECORD_FILE, self.record)

    def is_done(self, component: str, source: str) -> bool:
        """Whether the component is there already, from the same files and unharmed."""
        folder, entry = self.output / component, self.record["components"].get(component)
        if not folder.exists():
            return False
        if entry is None or entry["source_id"] != source:
            raise ConversionError(
                f"{folder} exists already and was made from other files or with other settings. Delete it, or choose "
                "another output folder."
            )
        if not all(_matches(folder / name, sha256) for name, sha256 in entry["files"].items()):
            raise ConversionError(f"{folder} has changed since it was converted. Delete it to convert it again.")
        self.say(f"{component}: already converted, files are as written")
        return True

    def enter(self, component: str, entry: dict, files: Mapping[str, str]) -> None:
        """Put a component that is whole into the record."""
        self.record["components"][component] = {**entry, "files": dict(files)}
        self.save()

    def save_small(self, component: str, save: Callable[[Path], object]) -> dict[str, str]:
        """Let a component save itself in a partial folder, then rename it; returns hashes of its files."""
        partial, folder = self.output / f"{component}.partial", self.output / component
        if partial.exists():
            shutil.rmtree(partial)
        save(partial)
        files = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
        if folder.exists():  # of schedulers only, whose settings are constants
            shutil.rmtree(folder)
        partial.replace(folder)
        return files

    def write_model(
        self,
        component: str,
        model_class: type,
        tensors: Tensors,
        config,
        source: str,
        name: str,
        dtype: torch.dtype | None,
    ) -> dict:
        """Check the tensors against the model, and write its folder; returns what the record says of it."""
        surplus = check_shapes(tensors, expected_shapes(model_class, config), name)
        if surplus and self.strict:
            raise ConversionError(f"{name} has tensors that the model does not know: {', '.join(surplus)}.")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in surplus}
        sizes: dict[torch.dtype, int] = {}
        for tensor in tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        main_dtype = dtype or max(sizes, key=sizes.get)
        config.architectures = [model_class.__name__]
        config.dtype = main_dtype
        total = sum(tensor.nbytes for tensor in tensors.values())
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=total, desc=component, unit="B", unit_scale=True, mininterval=0.5))
            written = write_component(
                self.output / component,
                tensors,
                json.loads(config.to_json_string(use_diff=True)),
                source,
                dtype=dtype,
                max_shard_size=self.max_shard_size,
                advance=bar.update,
            )
        return {
            "source_id": source,
            "dtypes": sorted(str(one) for one in sizes),
            "dtype": str(main_dtype),
            "num_tensors": len(tensors),
            "num_parameters": sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors.values()),
            "nbytes_read": total,
            "content_hash": content_hash(written["tensors"]),
            "shards_reused": written["reused"],
            "tensors": written["tensors"],
            "files": written["files"],
        }

    def report(self, component: str, entry: Mapping, others: list[str]) -> None:
        """Say what became of a component, and what of its file was left out."""
        what = ", ".join(entry["dtypes"])
        what += f" stored as {entry['dtype']}" if entry["dtypes"] != [entry["dtype"]] else ""
        iteration = f", iteration {entry['iteration']}" if entry.get("iteration") else ""
        self.say(
            f"{component}: {entry['source']}{iteration}, {entry['num_tensors']} tensors, "
            f"{entry['num_parameters']:,} parameters, {what}, "
            f"{entry['nbytes_read'] / 2**30:.2f} GiB, sha256 of the tensors {entry['content_hash']}"
        )
        if entry["shards_reused"]:
            self.say(f"{component}: {entry['shards_reused']} shards of an interrupted run were verified and kept")
        if others:
            self.say(f"{component}: left out: {', '.join(others[:12])}{', ...' if len(others) > 12 else ''}")


def verify(folder: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """
    Hash every file of a converted pipeline again.

    Args:
        folder (`str` or `Path`): As converted.
        say: Called with a line for each component.

    Returns:
        `list[str]`: Files that are missing or differ from what was written; empty if all is well.
    """
    folder, wrong = Path(folder), []
    if not (folder / RECORD_FILE).is_file():
        raise ConversionError(f"{folder} has no `{RECORD_FILE}`: it was not made by this converter.")
    for component, entry in read_record(folder)["components"].items():
        bad = [n for n, sha256 in entry["files"].items() if not _matches(folder / component / n, sha256)]
        wrong += [f"{component}/{name}" for name in bad]
        say(f"{component}: {len(entry['files'])} files, " + (f"WRONG: {', '.join(bad)}" if bad else "as written"))
    return wrong


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_file(path) == sha256


def read_record(output: Path) -> dict:
    """What a folder's record says; of a folder without one, that there is nothing."""
    try:
        record = json.loads((output / RECORD_FILE).read_text())
        assert record["version"] == RECORD_VERSION
        return record
    except FileNotFoundError:
        return {"version": RECORD_VERSION, "components": {}}
    except (ValueError, KeyError, AssertionError):
        raise ConversionError(f"{output / RECORD_FILE} cannot be read. Choose another output folder.") from None


def source_id(*parts: object) -> str:
    """A hash that identifies files and settings."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
