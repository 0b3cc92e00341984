"""
What lists leave behind: pictures beside a manifest, or lines of text; and what of it need not be made again.

A result is kept if it is there, complete, and was made from the same request.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import typer

from ..json_lines import dump_line, parse_object, write_lines
from .console import FAILURE, fail, fail_all, say
from .names import problem_of_name

if TYPE_CHECKING:
    from PIL import Image

MANIFEST = "manifest.jsonl"
_STARTS = b'{"id": '  # how every line of ours begins
# Errors of one file, beside those that stop every other one, too
_ERRORS_OF_ONE_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ENOENT, errno.ENOTEMPTY)


class PictureJob(Protocol):
    """What makes some pictures: the id of its request, and where they are saved."""

    paths: list[Path]

    @property
    def id(self) -> str:
        """Of the request."""


Job = TypeVar("Job", bound=PictureJob)


class LineFailures:
    """Counts the lines of a list that could not be done; the others are."""

    def __init__(self, num_lines: int):
        self.num_lines = num_lines
        self._failed: set[str] = set()

    def add(self, where: str, error: Exception | str) -> None:
        """Tell what is wrong with a line, and go on."""
        self._failed.add(where)
        say(f"Error: {where}: {' '.join(str(error).split())}", err=True)

    @contextlib.contextmanager
    def of_writing(self, where: str) -> Iterator[None]:
        """Go on after an error of one file; others, such as a full disk, end the command."""
        try:
            yield
        except OSError as error:
            if error.errno not in _ERRORS_OF_ONE_NAME:
                raise
            self.add(where, f"could not write: {error}")

    def finish(self) -> None:
        """End the command with code 1 if a line has failed."""
        if self._failed:
            say(f"Error: {len(self._failed)} of {self.num_lines} lines failed. The others are done.", err=True)
            raise typer.Exit(FAILURE)


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """
    See that no other command writes into the same folder, or the same file of results.

    Two at once would each write a manifest without the lines of the other.
    """
    from filelock import FileLock, Timeout

    path = output / ".lock" if os.path.isdir(output) else output.with_name(f".{output.name[:60]}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        fail(f"Another command writes into {output}. Wait until it is done, or choose another output.", FAILURE)
    except (OSError, NotImplementedError):  # file systems without locks
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


# Pictures ------------------------------------------------------------------------------------------------------------


def check_names(jobs: Iterable[tuple[str, Sequence[Path]]]) -> list[str]:
    """What is wrong with the names of files, by `(where, paths)` of each request: before anything is computed."""
    errors = []
    for where, paths in jobs:
        problem = next(filter(None, map(problem_of_name, paths)), None)
        if problem is not None:
            errors.append(f"{where}: {problem}")
    return errors


def sort_existing(
    jobs: Sequence[Job], made_from: Callable[[Job, dict], bool]
) -> tuple[list[tuple[str, Path, dict]], list[Job], list[Path]]:
    """
    What is there already and complete (id, file and metadata); what is to be made; and files of the same name that
    were made from something else. A damaged file is made again.

    Of a picture without metadata, the manifest beside it says how it was made.

    Args:
        jobs (sequence of jobs): What was asked for.
        made_from: Function of a job and the metadata of a file of its name: whether that is its result.
    """
    from ..pictures.png import read_metadata

    kept, missing, others, manifests = [], [], [], {}
    for job in jobs:
        found = []
        for path in job.paths:
            try:
                metadata = read_metadata(path)
            except ValueError:
                continue
            if not metadata:
                if path.parent not in manifests:
                    rows = read_rows(path.with_name(MANIFEST), ("id", "file"))
                    manifests[path.parent] = {row["file"]: row for row in rows if isinstance(row["file"], str)}
                metadata = _metadata_of_row(path, manifests[path.parent].get(path.name, {}))
            if made_from(job, metadata):
                found.append((job.id, path, metadata))
            else:
                others.append(path)
        if len(found) == len(job.paths):
            kept += found
        else:
            missing.append(job)
    return kept, missing, others


def _metadata_of_row(path: Path, row: dict) -> dict:
    """What a line of the manifest says of a picture, if it is of this very file."""
    if row.get("sha256") != _sha256(path):
        return {}
    return {name: value for name, value in row.items() if name not in ("id", "file")}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    come between a picture and its line, or in the middle of a line. What killed runs left of its pictures is removed.
    """
    from ..pictures.png import remove_unfinished

    path, files = folder / MANIFEST, {path.name for job in jobs for path in job.paths}
    remove_unfinished(folder, files)
    rows = []
    for row in read_rows(path, ("id", "file")):
        name = row.get("file")
        if isinstance(name, str) and name not in files and os.path.exists(folder / name):
            rows.append(row)
    rows += [
        _row(id, picture, {name: value for name, value in metadata.items() if name != "Software"})
        for id, picture, metadata in kept
    ]
    replace_rows(path, rows)
    if kept:
        say(f"{len(kept)} of {len(files)} pictures are there already.", err=True)
    with open(path, "a", encoding="utf-8") as lines:

        def add(id: str, picture: Path, metadata: dict) -> None:
            write_row(lines, _row(id, picture, metadata))

        yield add


def save_with_line(
    add_line: Callable[[str, Path, dict], None],
    id: str,
    image: "Image.Image",
    path: Path,
    metadata: dict,
    keeps_metadata: bool,
) -> None:
    """
    Save a picture of a list, and its line of the manifest; print the path.

    A stop may come between the two. If the file keeps its metadata, it is known by them; if not, by the line, which
    therefore comes first: a picture of which nothing is known would be refused as somebody else's.

    Args:
        add_line: What [`manifest_of`] gives.
        id (`str`): Of the request.
        image (`PIL.Image.Image`): The picture.
        path (`Path`): The file.
        metadata (`dict`): How it was made.
        keeps_metadata (`bool`): Whether the file holds them.
    """
    from ..pictures.png import encode_png, write_whole

    content = encode_png(image, metadata if keeps_metadata else None)
    if not keeps_metadata:
        add_line(id, path, {**metadata, "sha256": hashlib.sha256(content).hexdigest()})
    write_whole(path, content)
    if keeps_metadata:
        add_line(id, path, metadata)
    say(path)


def _row(id: str, picture: Path, metadata: dict) -> dict:
    return {"id": id, "file": picture.name, **metadata}


# Lines of text -------------------------------------------------------------------------------------------------------


def read_rows(path: Path, fields: Sequence[str] = ("id",)) -> list[dict]:
    """
    The objects of a file of results; none if there is no file. A last line that a stop cut off is left out.

    The file will be written anew from them: so a file that holds anything else ends the command.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n") if os.path.lexists(path) else [b""]
    except OSError as error:
        fail(f"`--output`: cannot read {path}: {error.strerror or error}.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line.decode("utf-8"))
            if not row.keys() >= set(fields):
                raise ValueError
        except ValueError:
            if number == len(lines) and (line.startswith(_STARTS) or _STARTS.startswith(line)):
                continue
            fail(
                f"`--output`: {path} is no file of results: line {number} is no JSON object with "
                f"{' and '.join(f'`{name}`' for name in fields)}. It stays as it is; name another file or folder."
            )
        rows.append(row)
    return rows


def replace_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write a JSONL file anew, whole or not at all."""
    unfinished = path.with_name(f".{path.name[:60]}.part")
    with open(unfinished, "w", encoding="utf-8") as lines:
        write_lines(lines, rows)
    os.replace(unfinished, path)


def write_row(lines, row: dict) -> None:
    """Add a line to an open JSONL file, now."""
    lines.write(dump_line(row))
    lines.flush()
