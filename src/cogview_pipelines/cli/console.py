"""What all commands share in speaking with the user: one-line errors, exit codes, checks of where output goes."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer

BAD_INPUT = 2
FAILURE = 1


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print an error on stderr and end the command: code 2 where the input is at fault, 1 where something else is."""
    typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(code)


def fail_all(messages: list[str], shown: int = 20) -> NoReturn:
    """Print several errors, one a line."""
    for message in messages[:shown]:
        typer.echo(f"Error: {' '.join(message.split())}", err=True)
    if len(messages) > shown:
        typer.echo(f"Error: and {len(messages) - shown} more.", err=True)
    raise typer.Exit(BAD_INPUT)


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
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        fail(f"{reason}. Lower --max-batch-size, or pass --dtype float16 or --device cpu.", FAILURE)
    except OSError as error:
        fail(f"Could not write: {error}", FAILURE)


def make_writable_folder(folder: Path) -> None:
    """Make a folder where there is none, and try to write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"`--output`: cannot write in {folder} ({error.strerror or error}). Choose another folder.")
