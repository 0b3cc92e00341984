"""What all commands share in speaking with the user: reports, one-line errors, exit codes, where output goes."""

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from ..reports import Reports

if TYPE_CHECKING:
    from ..pipelines.common.base import PipelineBase
    from .requests import Request

BAD_INPUT = 2
FAILURE = 1


def say(message: object, err: bool = False) -> None:
    """Print a line, on stderr if it is no result; a failure stops nothing."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream = stream if isinstance(stream, Reports) else Reports(stream)
        stream.write(f"{message}\n")
        stream.flush()


def say_json(row: dict) -> None:
    """Print an object as one line of JSON, whatever letters the console has."""
    from ..json_lines import dump_line

    text = dump_line(row).rstrip("\n")
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    say(text)


def end_if_nobody_reads() -> None:
    """End the command if its results are printed, and nobody reads them any more."""
    if getattr(sys.stdout, "is_closed", False):
        raise typer.Exit(FAILURE)


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print an error on stderr and end the command: code 2 where the input is at fault, 1 where something else is."""
    say(f"Error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(code)


def fail_all(messages: list[str], shown: int = 20) -> NoReturn:
    """Print several errors, one a line."""
    for message in messages[:shown]:
        say(f"Error: {' '.join(message.split())}", err=True)
    if len(messages) > shown:
        say(f"Error: and {len(messages) - shown} more.", err=True)
    raise typer.Exit(BAD_INPUT)


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as it fits on a line; its kind, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def finite(value: float | None) -> float | None:
    """Callback of options: a number that can be counted with. Not all versions of bounds keep `nan` out."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number that can be counted with.")
    return value


def whole_numbers(text: str, count: int) -> tuple[int, ...] | None:
    """So many whole numbers from 0 on, parted by commas; `None` if the text is something else."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != count or not all(part.isdecimal() and len(part) < 19 for part in parts):
        return None
    return tuple(map(int, parts))


def warn_of_unknown(
    pipe: "PipelineBase", texts: Sequence[str], name: str = "the prompt", place: str = "", scored: bool = False
) -> None:
    """
    Say on stderr which parts of texts that are drawn, or scored, the model does not know, each part once in a command:
    with the place of the text that has it first.
    """
    from ..pipelines.common.unknown_words import messages

    where = f"{name} of {place}" if place else name
    for told in messages(pipe.find_unknown(texts, name, scored), where):
        say(f"Warning: {told[0].lower()}{told[1:]}", err=True)


def warn_of_unknown_in(pipe: "PipelineBase", request: "Request") -> None:
    """The same of all texts of a request that is drawn."""
    warn_of_unknown(pipe, [request.prompt], "the prompt", request.where)
    warn_of_unknown(pipe, [request.arguments.get("negative_prompt", "")], "the negative prompt", request.where)


@contextlib.contextmanager
def bad_input(exceptions: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Report these exceptions as bad input."""
    try:
        yield
    except exceptions as error:
        fail(str(error))


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Report what can go wrong while working, through no fault of the program: full disk, too little memory."""
    from ..generation.batching import is_out_of_memory

    try:
        yield
    except typer.Exit:  # a RuntimeError, too
        raise
    except OSError as error:
        fail(f"Could not write: {error}", FAILURE)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "Memory ran out").splitlines()[0].split(". ")[0].rstrip(".")
        fail(
            f"{reason}. Lower --max-batch-size or the number of candidates or beams, or pass --dtype float16 or "
            "--device cpu.",
            FAILURE,
        )


def expand(path: Path, option: str) -> Path:
    """The path with `~` and `~user` replaced."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        fail(f"`{option}`: {path} cannot be found ({error}) Name it without `~`.")


def make_writable_folder(folder: Path, option: str = "--output") -> None:
    """Make a folder where there is none, try to write in it, and remove what killed runs have left there."""
    from ..pictures.png import remove_unfinished

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_unfinished(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(f"`{option}`: cannot write in {folder} ({reason}). Choose another folder.")
