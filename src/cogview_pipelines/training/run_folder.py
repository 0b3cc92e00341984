"""
The folder of a run: one run at a time in it, nothing of an earlier one overwritten.

It holds `run.json` (state and options), `metrics.jsonl`, `samples/`, `checkpoint-<step>/` and, at the end, `final/`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..json_lines import dump_file
from .arguments import TrainConfig

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
FINAL = "final"
NEXT_FINAL = "next_final_step"  # in RUN_FILE, while a model of more updates takes the place of one that is kept
PARTIAL, OLD = ".partial-", ".old-"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """
    Hold the folder of a run, so that no other run writes into it.

    Raises:
        ValueError: If another process holds it; it is named.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`output_dir` {folder} cannot be made: {error.strerror or error}.") from error
    lock = FileLock(folder / LOCK_FILE, timeout=0, mode=0o666 & ~umask())
    holder = folder / f"{LOCK_FILE}.holder"
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
        raise ValueError(
            f"`output_dir` {folder} is in use by {who}. Wait until it ends, or choose another folder."
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def remove_leftovers(folder: str | Path) -> None:
    """
    Remove what interrupted saves left: `.partial-NAME`, and `.old-NAME` where `NAME` took its place.

    Where it did not, the old one gets its name back.
    """
    folder = Path(folder)
    for path in folder.glob(f"{OLD}*"):
        name = folder / path.name[len(OLD) :]
        if name.exists():
            remove(path)
        else:
            path.rename(name)
    for path in folder.glob(f"{PARTIAL}*"):
        remove(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    A path beside `path` to write a folder or file to, which takes its place on success and is removed on failure.
    """
    partial = partial_path(path)
    remove(partial)
    try:
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            remove(partial)
        raise
    take_place(partial, path)


@contextlib.contextmanager
def filling(folder: Path, last: str) -> Iterator[Path]:
    """
    A path beside `folder` to write a folder to, whose files get into `folder` on success; others stay in it.

    The file `last`, without which the folder is nothing, is gone before and comes at the end: a folder in which a stop
    came does not look whole.
    """
    folder = Path(os.path.abspath(folder))
    partial = partial_path(folder)
    remove(partial)
    try:
        yield partial
        set_modes(partial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / last).unlink(missing_ok=True)
        names = [path.relative_to(partial) for path in sorted(partial.rglob("*")) if path.is_file()]
        for name in sorted(names, key=lambda name: name == Path(last)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, folder / name)
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


def partial_path(path: Path) -> Path:
    """Where a file or folder is written until it is whole."""
    return path.with_name(PARTIAL + path.name)


def take_place(partial: Path, path: Path) -> None:
    """
    Give what is whole now its name, in place of what has it.

    `path` is never half written; if this is interrupted between its renames, [`remove_leftovers`] mends it.
    """
    set_modes(partial)
    if not path.is_dir():
        os.replace(partial, path)
        return
    old = path.with_name(OLD + path.name)
    remove(old)
    path.rename(old)
    partial.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def umask() -> int:
    """The bits that this process takes from the mode of new files."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)  # other systems tell by setting it, for all threads
    os.umask(mask)
    return mask


def set_modes(path: Path) -> None:
    """
    Give a file, or all files and folders in a folder, the mode that new files have here.

    safetensors and `tempfile` write files that only their owner may read.
    """
    mask = umask()
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if not each.is_symlink():
            each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


def file_digest(path: Path) -> dict[str, int | str]:
    """Size (`bytes`) and checksum (`sha256`) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is whole or as it was before, on the disk when this returns."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(dump_file(content))
        file.flush()
        os.fsync(file.fileno())


def write_run(config: TrainConfig, state: str, step: int, final_step: int | None = None) -> None:
    """
    Note the state of a run in `run.json`.

    Args:
        config ([`TrainConfig`]): Its options, written down as they are now.
        state (`str`): `"running"`, `"interrupted"` (a checkpoint was saved, resume), `"failed"` or `"finished"`.
        step (`int`): Updates so far.
        final_step (`int`, *optional*): Updates of the model in `final/`; by default what was noted before.
    """
    content = {"state": state, "step": step, "final_step": final_step, "options": asdict(config)}
    if final_step is None:
        before = read_run(config.output_dir)
        content["final_step"] = before.get("final_step")
        content |= {NEXT_FINAL: before[NEXT_FINAL]} if NEXT_FINAL in before else {}
    write_json(Path(config.output_dir) / RUN_FILE, content)


def read_run(folder: str | Path) -> dict:
    """What `run.json` says; empty if there is none that can be read."""
    return read_json(Path(folder) / RUN_FILE)


def read_json(path: Path) -> dict:
    """What a file that [`write_json`] wrote says; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def save_final(folder: str | Path, step: int, save: Callable[[Path], object]) -> None:
    """
    Write `final/` by `save(path)`; one of fewer updates that is there already is kept, as `final-<step>`.

    Args:
        folder: Of the run.
        step (`int`): Updates of the model that is saved.
        save (`Callable[[Path], None]`): Saves the model in a folder.
    """
    folder, run = Path(folder), read_run(folder)
    final, before = folder / FINAL, run.get("final_step")
    if final.exists() and before != step:
        kept = final.with_name(f"{FINAL}-{'earlier' if before is None else before}")
        if run.get(NEXT_FINAL) != step:
            remove(kept)
            write_json(folder / RUN_FILE, run | {NEXT_FINAL: step})
        if not kept.exists():  # else this was interrupted, and `final` may be the new one
            final.rename(kept)
    with disk_errors(folder, "the final model"), replacing(final) as partial:
        save(partial)


def require_room(folder: Path, what: str, needed: int) -> None:
    """Raise `OSError` (`errno.ENOSPC`) if the disk of a folder has fewer than `needed` bytes for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _full(folder, what, needed, free)


@contextlib.contextmanager
def disk_errors(folder: Path, what: str, needed: int = 0) -> Iterator[None]:
    """
    Say in plain words that a disk is full.

    Raises:
        OSError: If it is: with `errno.ENOSPC`, what was to be written where, and how many bytes are free.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        numbers = {getattr(each, "errno", None) for each in _causes(error)}
        free = shutil.disk_usage(folder).free
        # libraries that write through C++ say what happened, if at all, in a text
        full = "No space left" in str(error) or free < max(needed, 1 << 16)
        if full or numbers & {errno.ENOSPC, errno.EDQUOT}:
            raise _full(folder, what, needed, free) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full(folder: Path, what: str, needed: int, free: int) -> OSError:
    size = f" ({needed / 1e9:.2f} GB)" if needed else ""
    return OSError(
        errno.ENOSPC,
        f"The disk of {folder} has no room for {what}{size}: {free / 1e9:.2f} GB are free. What was saved before is "
        "whole; make room, then go on with --resume_from_checkpoint latest",
    )
