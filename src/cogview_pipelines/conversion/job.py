"""
What the converters of all families do alike: components written into one folder, each whole or not at all, with a
record of what was made from what, by which an interrupted conversion goes on.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..foreign_files import describe_foreign_file
from .errors import ConversionError
from .output_folder import locked
from .shapes import check_shapes, expected_shapes
from .writer import PROGRESS_FILE, Tensors, content_hash, hash_file, partial_of, write_component, write_json

RECORD_FILE = "conversion.json"
RECORD_VERSION = 1
INDEX_FILE = "model_index.json"


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
    @contextlib.contextmanager
    def start(
        cls,
        output: str | Path,
        dtype: torch.dtype | None,
        max_shard_size: int,
        strict: bool,
        say: Callable[[str], None],
    ) -> Iterator["Job"]:
        """Begin, or go on, in a folder, which no other converter may use meanwhile."""
        if max_shard_size < 1:
            raise ConversionError(f"`max_shard_size` must be a number of bytes above 0, but is {max_shard_size}.")
        with locked(output) as output:
            record = read_record(output)
            there = {name: entry for name, entry in record["components"].items() if (output / name).is_dir()}
            yield cls(output, dtype, max_shard_size, strict, {**record, "components": there}, say)

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
        (folder / PROGRESS_FILE).unlink(missing_ok=True)  # killed after the last rename
        self.say(f"{component}: already converted, files are as written")
        return True

    def enter(self, component: str, entry: dict, files: Mapping[str, str]) -> None:
        """
        Let a component appear that is written, but still under its partial name.

        First comes the record, then the rename: a record without a folder is as good as none, but a folder without a
        record is not known.
        """
        self.record["components"][component] = {**entry, "files": dict(files)}
        self.save()
        folder = self.output / component
        partial_of(folder).replace(folder)
        (folder / PROGRESS_FILE).unlink(missing_ok=True)

    def save_small(self, component: str, save: Callable[[Path], object]) -> dict[str, str]:
        """Let a component save itself in a partial folder, which [`enter`] renames; returns hashes of its files."""
        partial = partial_of(self.output / component)
        if partial.exists():
            shutil.rmtree(partial)
        save(partial)
        return {path.name: hash_file(path) for path in sorted(partial.iterdir())}

    def save_constant(self, component: str, file: str, save: Callable[[Path], object]) -> None:
        """
        Write a component that is the same for all models of a kind, such as a scheduler, unless it is there.

        Args:
            component (`str`): Its folder.
            file (`str`): Without which it is not there.
            save: As in [`save_small`].
        """
        folder = self.output / component
        if component in self.record["components"] and (folder / file).is_file():
            return
        if folder.exists():
            shutil.rmtree(folder)
        self.enter(component, {"source_id": source_id(component)}, self.save_small(component, save))

    def load(self, component: str, component_class: Any):
        """A component, or its configuration, of the folder, which may have been damaged since it was written."""
        folder = self.output / component
        return load_component(folder, component_class, " Delete it, and convert it again.")

    def convert_text_tokenizer(self, path: Path, tokenizer_class: type, num_image_tokens: int) -> None:
        """Write the tokenizer of a SentencePiece file, unless it is there."""
        check_file(path, "text_tokenizer")
        sha256 = hash_file(path)
        source = source_id(tokenizer_class.__name__, sha256, num_image_tokens)
        if self.is_done("tokenizer", source):
            return
        try:
            tokenizer = tokenizer_class(path, num_image_tokens=num_image_tokens)
        except ValueError as error:
            raise ConversionError(str(error)) from error
        files = self.save_small("tokenizer", tokenizer.save_pretrained)
        pieces = tokenizer.num_pieces
        entry = {"source": path.name, "source_id": source, "sha256": sha256, "pieces": pieces}
        self.enter("tokenizer", entry, files)
        self.say(f"tokenizer: {path.name}, {pieces} pieces, sha256 {sha256}")

    def write_index(self, pipe) -> None:
        """Make a pipeline of the folder: its index appears whole, after all that it names."""
        partial = self.output / "index.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a converter that was killed
        pipe.save_config(partial)
        (partial / INDEX_FILE).replace(self.output / INDEX_FILE)
        shutil.rmtree(partial)
        self.say(f"{self.output} is a {type(pipe).__name__}.")

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
        """
        Check the tensors against the model, and write its folder, which [`enter`] renames; returns what the record
        says of it.
        """
        surplus = check_shapes(tensors, expected_shapes(model_class, config), name)
        if surplus and self.strict:
            raise ConversionError(f"{name} has tensors that the model does not know: {', '.join(surplus)}.")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in surplus}
        sizes: dict[torch.dtype, int] = {}
        for tensor in tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        if not sizes:
            raise ConversionError(f"{name} holds integers only, so it is no model.")
        main_dtype = dtype or max(sizes, key=lambda kind: sizes[kind])
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


def check_file(path: Path, argument: str) -> None:
    """
    See that a file is there, and is not one that stands for it.

    Raises:
        ConversionError: If not.
    """
    if not path.is_file():
        raise ConversionError(f"`{argument}` {path} does not exist.")
    if (foreign := describe_foreign_file(path)) is not None:
        raise ConversionError(f"`{argument}` {path} {foreign}")


def load_component(folder: Path, component_class: Any, what_to_do: str = ""):
    """
    What a class makes of a folder, whose files are not to be trusted.

    Raises:
        ConversionError: Whatever is wrong with them.
    """
    try:
        return component_class.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes the loaders raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(f"{folder} cannot be read ({reason[:300]}).{what_to_do}") from error


def verify(folder: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """
    Whether a converted pipeline is whole: hash every file again, and look for everything that its index names.

    Args:
        folder (`str` or `Path`): As converted.
        say: Called with a line for each component.

    Returns:
        `list[str]`: Files that are missing or differ from what was written, and `model_index.json` if the folder is
        no pipeline yet; empty if all is well.
    """
    folder, wrong = Path(folder), []
    if not (folder / RECORD_FILE).is_file():
        raise ConversionError(f"{folder} has no `{RECORD_FILE}`: it was not made by this converter.")
    components = read_record(folder)["components"]
    for component, entry in components.items():
        bad = [n for n, sha256 in entry["files"].items() if not _matches(folder / component / n, sha256)]
        wrong += [f"{component}/{name}" for name in bad]
        say(f"{component}: {len(entry['files'])} files, " + (f"WRONG: {', '.join(bad)}" if bad else "as written"))
    for partial in sorted(folder.glob("*.partial")):
        say(f"{partial.name}: an interrupted conversion; the same command goes on with it")
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        named = {name: value for name, value in index.items() if isinstance(value, list)}
    except FileNotFoundError:
        say(f"{INDEX_FILE}: MISSING, so the folder is no pipeline yet")
        return [*wrong, INDEX_FILE]
    except (OSError, ValueError, RecursionError, AttributeError):
        say(f"{INDEX_FILE}: WRONG, it cannot be read. Run the converter again")
        return [*wrong, INDEX_FILE]
    absent = [name for name, value in named.items() if any(value) and name not in components]
    # a super-resolution stage is a model and its scheduler
    for name, value in named.items():
        scheduler = name.removesuffix("_transformer") + "_scheduler"
        if name.endswith("_transformer") and any(value) and scheduler in named and not any(named[scheduler]):
            absent.append(scheduler)
    for name in absent:
        say(f"{name}: MISSING. Run the converter again")
    return wrong + absent


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_file(path) == sha256


def read_record(output: Path) -> dict:
    """What a folder's record says; of a folder without one, that there is nothing."""
    path = output / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"version": RECORD_VERSION, "components": {}}
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read ({str(error)[:200]}). Choose another output folder.") from None
    version = record.get("version") if isinstance(record, dict) else None
    if version != RECORD_VERSION:
        raise ConversionError(
            f"{path} must have `version` {RECORD_VERSION}, but has {str(version)[:40]}. It was written by another "
            "version of this converter, or by something else; choose another output folder."
        )
    components = record.get("components")
    if not isinstance(components, dict) or not all(map(_is_entry, components, components.values())):
        raise ConversionError(
            f"{path} must say of each component from what it was made and which files it has, but does not. Choose "
            "another output folder."
        )
    return record


def _is_entry(name: str, entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    files = entry.get("files")
    return (
        isinstance(files, dict)
        and isinstance(entry.get("source_id"), str)
        and all(Path(part).name == part for part in (name, *files))  # nothing beyond the folder
        and all(isinstance(sha256, str) for sha256 in files.values())
        and isinstance(entry.get("tensors", {}), dict)
        and all(isinstance(entry.get(key, ""), str) for key in ("content_hash", "dtype_option", "iteration"))
    )


def source_id(*parts: object) -> str:
    """A hash that identifies files and settings."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
