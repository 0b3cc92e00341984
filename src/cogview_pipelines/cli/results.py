"""
What lists leave behind: pictures beside a manifest, or lines of text; and what of it need not be made again.

A result is kept if it is there, complete, and was made from the same request.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import typer

from .console import FAILURE, fail_all

MANIFEST = "manifest.jsonl"


class PictureJob(Protocol):
    """What makes some pictures: the id of its request, and where they are saved."""

    id: str
    paths: list[Path]


Job = TypeVar("Job", bound=PictureJob)


class LineFailures:
    """Counts the lines of a list that could not be done; the others are."""

    def __init__(self, num_lines: int):
        self.num_lines, self.count = num_lines, 0

    def add(self, where: str, error: Exception | str) -> None:
        """Tell what is wrong with a line, and go on."""
        self.count += 1
        typer.echo(f"Error: {where}: {' '.join(str(error).split())}", err=True)

    def finish(self) -> None:
        """End the command with code 1 if a line has failed."""
        if self.count:
            typer.echo(f"Error: {self.count} of {self.num_lines} lines failed. The others are done.", err=True)
            raise typer.Exit(FAILURE)


# Pictures ------------------------------------------------------------------------------------------------------------


def sort_existing(
    jobs: Sequence[Job], made_from: Callable[[Job, dict], bool]
) -> tuple[list[tuple[str, Path, dict]], list[Job], list[Path]]:
    """
    What is there already and complete (id, file and metadata); what is to be made; and files of the same name that
    were made from something else. A damaged file is made again.

    Args:
        jobs (sequence of jobs): What was asked for.
        made_from: Function of a job and the metadata of a file of its name: whether that is its result.
    """
    from ..pictures.png import read_metadata

    kept, missing, others = [], [], []
    for job in jobs:
        found = []
        for path in job.paths:
            try:
                metadata = read_metadata(path)
            except ValueError:
                continue
            if made_from(job, metadata):
                found.append((job.id, path, metadata))
            else:
                others.append(path)
        if len(found) == len(job.paths):
            kept += found
        else:
            missing.append(job)
    return kept, missing, others


def refuse_others(others: Sequence[Path], overwrite: bool) -> None:
    """End the command if results of other requests would be replaced, unless that is wanted."""
    if others and not overwrite:
        fail_all(
            [f"{path} was made from another request. Pass --overwrite or name another folder." for path in others]
        )


@contextlib.contextmanager
def manifest_of(
    folder: Path, jobs: Sequence[PictureJob], kept: Sequence[tuple[str, Path, dict]]
) -> Iterator[Callable[[str, Path, dict], None]]:
    """
    The manifest of a folder, open for lines: gives a function of id, file and metadata that adds one.

    It keeps what other lists wrote into the folder, and gets a line for each picture that is kept: a stop may have
    come between a picture and its line, or in the middle of a line.
    """
    path, files = folder / MANIFEST, {path.name for job in jobs for path in job.paths}
    rows = []
    for row in read_rows(path):
        name = row.get("file")
        if isinstance(name, str) and name not in files and (folder / name).exists():
            rows.append(row)
    rows += [
        _row(id, picture, {name: value for name, value in metadata.items() if name != "Software"})
        for id, picture, metadata in kept
    ]
    replace_rows(path, rows)
    if kept:
        typer.echo(f"{len(kept)} of {len(files)} pictures are there already.", err=True)
    with open(path, "a", encoding="utf-8") as lines:

        def add(id: str, picture: Path, metadata: dict) -> None:
            write_row(lines, _row(id, picture, metadata))

        yield add


def _row(id: str, picture: Path, metadata: dict) -> dict:
    return {"id": id, "file": picture.name, **metadata}


# Lines of text -------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSONL file, without lines that are none, such as one that a stop cut off; none if no file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def replace_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write a JSONL file anew, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    with open(unfinished, "w", encoding="utf-8") as lines:
        for row in rows:
            write_row(lines, row, flush=False)
    os.replace(unfinished, path)


def write_row(lines, row: dict, flush: bool = True) -> None:
    """Add a line to an open JSONL file."""
    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    if flush:
        lines.flush()
