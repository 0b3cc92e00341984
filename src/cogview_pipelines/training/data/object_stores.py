"""
Token shards on an object store (S3, GCS, a web server, ...): fetched whole through fsspec when they are asked for,
into a cache on the disk that is checked, bounded, and shared by all processes of a machine.

A file of the cache is called by the checksum of its content, so that shards that were made anew are others. While it
is fetched it is a `.partial` file of its whole size, which counts for the bound, under a lock of its own: one whose
lock is free was left by a process that died.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

DEFAULT_CACHE = os.path.join(HF_HOME, "cogview_shards")
ATTEMPTS = 3
_BLOCK = 1 << 22
_MOST_SECONDS = 600  # to wait for room, while other processes fetch


class CannotFetch(OSError):
    """A file that does not come whole; the message names it."""


def is_url(folder: str | os.PathLike) -> bool:
    """Whether a folder is on an object store: `s3://...`, `gs://...`, `https://...`."""
    return "://" in os.fspath(folder)


class ObjectStore:
    """
    A folder of an object store.

    Args:
        url (`str`): The folder, as fsspec reads it.

    Raises:
        ValueError: If fsspec does not know the store, or its package is missing.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._filesystem()

    def _filesystem(self):
        # looked up each time: fsspec keeps one of each process, and a forked one must not use that of its parent
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"`data` {self.url} cannot be opened: {error} (s3:// needs the package s3fs, gs:// gcsfs, "
                "https:// aiohttp)"
            ) from error

    def read(self, name: str) -> bytes:
        """A small file; raises `OSError` if it cannot be read."""
        filesystem, root = self._filesystem()
        try:
            return filesystem.cat_file(f"{root}/{name}")
        except OSError:
            raise
        except Exception as error:  # each store has errors of its own
            raise OSError(f"{type(error).__name__}: {error}") from error

    def sizes(self) -> dict[str, int] | None:
        """The files of the folder, with their bytes; `None` where the store does not tell."""
        filesystem, root = self._filesystem()
        if self.url.startswith(("http://", "https://")):
            return None  # a page that lists files is no listing to rely on
        filesystem.invalidate_cache(root)
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in filesystem.ls(root, detail=True)}

    def open(self, name: str):
        """A file, to read from its beginning."""
        filesystem, root = self._filesystem()
        return filesystem.open(f"{root}/{name}", "rb", cache_type="none")

    def digest(self, name: str) -> str:
        """The SHA-256 of a file, which is not kept."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()


class ShardCache:
    """
    Files of an object store on the disk.

    Args:
        store ([`ObjectStore`]): Where they come from.
        folder (`str` or `Path`): Where they are kept; other stores and processes may share it.
        max_bytes (`int`): What the files in it, with those that are being fetched, may take. Those that were not used
            for the longest time go first.
    """

    def __init__(self, store: ObjectStore, folder: str | Path, max_bytes: int):
        self.store, self.folder, self.max_bytes = store, Path(folder), max_bytes

    def open(self, name: str, size: int, sha256: str) -> int:
        """
        The descriptor of a file whose content is what the checksum says, fetched if it is not there.

        Raises:
            CannotFetch: If it does not come whole, several times.
            ValueError: If it is larger than the cache may be.
        """
        if size > self.max_bytes:
            raise ValueError(
                f"`data_cache_gb` must have room for a shard, but is {self.max_bytes / 1e9:g}, and "
                f"{self.store.url}/{name} has {size / 1e9:g} GB."
            )
        path = self.folder / f"{sha256}.shard"
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except FileNotFoundError:
                self._fetch(name, size, sha256, path)
                continue  # another process may need the room at once
            if os.fstat(descriptor).st_size == size:
                with contextlib.suppress(OSError):  # another process may have removed it: what is open stays readable
                    os.utime(path)
                return descriptor
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def _fetch(self, name: str, size: int, sha256: str, path: Path) -> None:
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with FileLock(self._lock_of(path)):
            if path.exists():  # another process was faster
                return
            problem = ""
            for attempt in range(ATTEMPTS):
                time.sleep(attempt)
                self._reserve(partial, size)
                try:
                    problem = self._copy(name, partial, size, sha256)
                    if not problem:
                        os.replace(partial, path)
                        return
                finally:
                    partial.unlink(missing_ok=True)
        raise CannotFetch(
            f"{self.store.url}/{name} cannot be fetched ({problem}; tried {ATTEMPTS} times). Mend it, or leave it out "
            f"by --excluded_shards {self.store.url}/{name}."
        )

    def _copy(self, name: str, partial: Path, size: int, sha256: str) -> str:
        """Fetch a file; what is wrong with it, or nothing."""
        digest, done = hashlib.sha256(), 0
        with open(partial, "rb+") as target:
            try:
                source = self.store.open(name)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            with source:
                while done <= size:
                    try:
                        block = source.read(_BLOCK)
                    except Exception as error:  # each store has errors of its own
                        return f"{type(error).__name__} after {done} bytes: {error}"
                    if not block:
                        break
                    digest.update(block)
                    done += len(block)
                    if done <= size:
                        target.write(block)
        if done != size:
            return f"{done} bytes came instead of {size}" if done < size else f"more than {size} bytes came"
        return "" if digest.hexdigest() == sha256 else "its checksum is not the one in index.json"

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a file, and take it."""
        until = time.monotonic() + _MOST_SECONDS
        while True:
            with FileLock(self.folder / "locks" / "room"):
                if self._make_room(size):
                    with open(partial, "wb") as file:
                        file.truncate(size)
                    return
            if time.monotonic() > until:
                raise CannotFetch(
                    f"`data_cache_gb` {self.max_bytes / 1e9:g} has no room for {size / 1e9:g} GB beside what other "
                    f"processes fetch into {self.folder}. Give more."
                )
            time.sleep(0.05)

    def _make_room(self, size: int) -> bool:
        found = []
        for path in self.folder.iterdir():
            if path.suffix in (".shard", ".partial"):
                try:
                    found.append((path.stat(), path))
                except FileNotFoundError:
                    continue
        total = sum(stat.st_size for stat, _ in found)
        found.sort(key=lambda item: (item[1].suffix == ".shard", item[0].st_mtime_ns))
        for stat, path in found:
            if total + size <= self.max_bytes:
                return True
            if path.suffix == ".shard" or self._was_left(path):
                path.unlink(missing_ok=True)
                total -= stat.st_size
        return total + size <= self.max_bytes

    def _was_left(self, partial: Path) -> bool:
        """Whether the process that fetched a file is gone."""
        lock = FileLock(self._lock_of(partial), timeout=0)
        try:
            with lock:
                return True
        except Timeout:
            return False

    def _lock_of(self, path: Path) -> Path:
        return self.folder / "locks" / path.stem
