"""The folder that a converter writes into: held by one at a time, and continued after an interruption."""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ConversionError
from .writer import write_json

LOCK_FILE = ".conversion.lock"
PROGRESS_FILE = ".release_progress.json"


@contextlib.contextmanager
def locked(output: str | Path) -> Iterator[Path]:
    """
    Hold a folder, which is made if it is not there, so that no other converter writes into it.

    Raises:
        ConversionError: If another one does, or the folder cannot be made.
    """
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise ConversionError(
            f"Another conversion is writing into {output}. Wait until it ends, or choose another output folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"The output folder {str(output)[:200]} cannot be written: {error}.") from error
    try:
        for left in output.glob(".unpacked-*"):  # of a converter that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield output
    finally:
        lock.release()


@contextlib.contextmanager
def continued(output: Path, source: str, targets: Collection[str]) -> Iterator[set[str]]:
    """
    Write files of which nothing may be there yet, unless the same conversion was interrupted.

    Args:
        output (`Path`): The folder.
        source (`str`): Identifies the conversion: what is converted, and how.
        targets: Names in the folder; each must appear at once, by a rename.

    Yields:
        Those that an interrupted run has written.

    Raises:
        ConversionError: If one is there that it did not write.
    """
    progress = output / PROGRESS_FILE
    try:
        is_continued = json.loads(progress.read_text(encoding="utf-8")) == {"source": source}
    except (OSError, ValueError, RecursionError):
        is_continued = False
    there = {name for name in targets if (output / name).exists()}
    if there and not is_continued:
        raise ConversionError(f"{output / min(there)} exists already. Delete it, or choose another output folder.")
    write_json(progress, {"source": source})
    try:
        yield there
    except Exception:
        if not any((output / name).exists() for name in targets):
            progress.unlink()
        raise
    progress.unlink()
