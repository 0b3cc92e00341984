"""What the converters from a pipeline to the files of a release do alike."""

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from .errors import ConversionError
from .job import read_record, source_id
from .output_folder import continued, locked
from .released_models import ITERATION, WEIGHTS_FILE
from .writer import save_state_dict


@contextlib.contextmanager
def release_folder(
    pipeline: Path, output: str | Path, targets: Collection[str], iteration: int | None, dtype: torch.dtype | None
) -> Iterator[tuple[Path, set[str]]]:
    """
    Hold the folder of a release, and continue what the same call wrote before it was interrupted.

    Args:
        pipeline (`Path`): What is converted.
        output (`str` or `Path`): The folder.
        targets: What is to be written.
        iteration, dtype: With what the call was made.

    Yields:
        `tuple[Path, set[str]]`: The folder, and those of the targets that an interrupted call has written.

    Raises:
        ConversionError: If something else has one of these names, or `iteration` is none.
    """
    if iteration is not None and not re.fullmatch(ITERATION, str(iteration)):
        raise ConversionError(f"`iteration` must be a number above 0, but is {iteration}.")
    # files by size and time of their last change
    files = sorted(path for path in pipeline.glob("*/*") if path.is_file())
    parts = [(str(path.relative_to(pipeline)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    source = source_id(parts, str(iteration), str(dtype))
    with locked(output) as output, continued(output, source, targets) as there:
        yield output, there


def choose_iteration(pipeline: Path, component: str, iteration: int | None) -> str:
    """What was asked for, else the iteration of the converted file, else 1."""
    if iteration is not None:
        return str(iteration)
    try:
        recorded = read_record(pipeline)["components"][component]["iteration"]
    except (ConversionError, KeyError):
        return "1"
    return recorded if re.fullmatch(ITERATION, recorded) else "1"  # it is to be the name of a folder


def write_checkpoint(target: Path, tensors: Mapping[str, torch.Tensor], step: str, texts: Mapping[str, str]) -> str:
    """
    A folder with the weights of an iteration and small files beside them, whole or not at all.

    Args:
        target (`Path`): The folder.
        tensors: By their released names.
        step (`str`): The iteration.
        texts: Contents of the small files by their names.

    Returns:
        `str`: A line for the report.
    """
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / step).mkdir(parents=True)
    save_state_dict(dict(tensors), partial / step / WEIGHTS_FILE)
    for name, text in texts.items():
        (partial / name).write_text(text)
    partial.replace(target)
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{target}: iteration {step}, {len(tensors)} tensors, {count:,} parameters"


def copy_file(source: Path, target: Path) -> str:
    """A copy that is whole or not there; returns a line for the report."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
    return str(target)
