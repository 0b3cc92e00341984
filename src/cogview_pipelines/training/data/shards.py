"""
Token shards: pictures as tokens with their captions, in files that are read at any place and never as a whole.

A folder of shards holds `index.json` and, for each shard, `NAME.safetensors` and `NAME.json`:

- `NAME.safetensors` has the arrays `low` and perhaps `fine`, `(num_pictures, rows, columns)`, uint16 where all codes
  fit and else int32; `captions`, all lines of JSON one after the other in UTF-8, and `caption_starts`,
  `(num_pictures + 1,)` int64, where each begins; `weight_ends`, `(num_pictures,)` float64, the sum of the weights up
  to and with each picture, where weights differ; and `picture_hashes`, `(num_pictures,)` uint64, where duplicates are
  looked for. A line holds what one of `captions.jsonl` does, without its weight (see [`TokenData`]).
- `NAME.json` says how many pictures are in it, of what size, and what the file's checksum is; what it was made of; and
  what was left out on the way. A shard of which nothing was left has this alone.
- `index.json` gathers that when all shards are there: without it the folder is not finished.

Shards are read by plain reads at places (`pread`), not through mapped memory: mapped pages count as memory of the
process, more of them the longer it runs, and a file that is cut off would end it with a bus error.
"""

import functools
import itertools
import json
import logging
import os
import re
import struct
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ...json_lines import dump_line
from ..run_folder import file_digest, partial_path, set_modes, write_json
from .captions import parse_captions
from .chances import Chances
from .object_stores import DEFAULT_CACHE, CannotFetch, ObjectStore, ShardCache, is_url

INDEX_FILE = "index.json"
VERSION = 1
TOKEN_ARRAYS = ("low", "fine")
MOST_OPEN_FILES = 256
MOST_WEIGHTS = 64  # shards whose weights are in memory
MOST_LINES = 1024  # lines of captions that are kept as they were parsed: of a batch, or of what comes again soon
_DTYPES = {"U8": "<u1", "U16": "<u2", "I32": "<i4", "I64": "<i8", "U64": "<u8", "F64": "<f8"}
_ARRAYS = ("low", "fine", "captions", "caption_starts", "weight_ends", "picture_hashes")
MOST_FETCHED_OPEN = 4  # of shards from an object store: an open file takes room when the cache has given it up
DEFAULT_CACHE_GB = 100.0
_LARGEST_HEADER = 1 << 20
_TWO_PLACES = struct.Struct("<qq")

_place_in_file = threading.Lock()
logger = logging.getLogger(__name__)


class DamagedShard(OSError):
    """A shard that cannot be read; the message names it."""


# Writing -------------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    """What a shard is called: by its number, so that names are in order."""
    return f"{number:05d}"


def write_shard(
    folder: str | Path,
    number: int,
    tensors: Mapping[str, np.ndarray],
    rows: Sequence[dict],
    *,
    made_of: Mapping[str, Any],
    num_codes: int | None = None,
    dtype: type | None = None,
    report: Mapping[str, int] | None = None,
    picture_hashes: Sequence[int] | np.ndarray | None = None,
) -> None:
    """
    Write a shard, which is there when it is whole, and not before: as far as `NAME.json` is, the last of its files.

    Args:
        folder (`str` or `Path`): The folder of shards.
        number (`int`): Of the shard, from 0 on.
        tensors (mapping): `low` and perhaps `fine`, `(num_pictures, rows, columns)`; may be empty where `rows` is.
        rows (sequence of `dict`): Captions of each picture by language, and what else a line of `captions.jsonl` has.
        made_of (mapping): What the shard was made of, and how; [`is_written`] compares it.
        num_codes (`int`, *optional*): How many codes the image tokenizer has.
        dtype (`type`, *optional*): Of the tokens, the same in all shards: `np.uint16` or `np.int32`; by default what
            holds `num_codes`, or these tokens.
        report (mapping, *optional*): What was counted on the way.
        picture_hashes (sequence of `int`, *optional*): 64 bits of a hash of each picture.
    """
    folder, name = Path(folder), shard_name(number)
    folder.mkdir(parents=True, exist_ok=True)
    note: dict[str, Any] = {
        "format": "token shard",
        "version": VERSION,
        "made_of": dict(made_of),
        "num_codes": num_codes,
        "report": dict(report or {}),
        "num_pictures": len(rows),
    }
    receipt, path = folder / f"{name}.json", folder / f"{name}.safetensors"
    receipt.unlink(missing_ok=True)  # of a shard that was made otherwise
    if rows:
        arrays = _arrays(tensors, rows, num_codes, dtype)
        if picture_hashes is not None:
            arrays["picture_hashes"] = np.array(picture_hashes, dtype=np.uint64)
        partial = partial_path(path)
        save_file(arrays, partial)
        set_modes(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        digest = file_digest(partial)
        os.replace(partial, path)
        ends = arrays.get("weight_ends")
        note |= {
            "file": path.name,
            **digest,
            "arrays": {
                key: {"dtype": str(arrays[key].dtype), "shape": list(arrays[key].shape[1:])}
                for key in TOKEN_ARRAYS
                if key in arrays
            },
            "largest_codes": {key: int(arrays[key].max()) for key in TOKEN_ARRAYS if key in arrays},
            "equal_weights": ends is None,
            "weight": float(ends[-1]) if ends is not None else float(len(rows) * rows[0].get("weight", 1.0)),
            "num_styles": sum("style" in row for row in rows),
        }
    else:
        path.unlink(missing_ok=True)
    write_json(receipt, note)


def _arrays(
    tensors: Mapping[str, np.ndarray], rows: Sequence[dict], num_codes: int | None, dtype: type | None
) -> dict[str, np.ndarray]:
    largest = max(int(value.max()) for value in tensors.values()) if num_codes is None else num_codes - 1
    dtype = dtype or (np.uint16 if largest < 1 << 16 else np.int32)
    arrays = {}
    for name, value in tensors.items():
        if len(value) != len(rows) or value.min() < 0 or value.max() > largest:
            raise ValueError(
                f"`{name}` must have {len(rows)} pictures of tokens in 0..{largest}, but has {len(value)} in "
                f"{value.min()}..{value.max()}."
            )
        arrays[name] = np.ascontiguousarray(value.astype(dtype))
    lines = [
        dump_line({key: value for key, value in row.items() if key != "weight"}).rstrip("\n").encode() for row in rows
    ]
    arrays["captions"] = np.frombuffer(b"".join(lines), dtype=np.uint8)
    arrays["caption_starts"] = np.array([0, *itertools.accumulate(map(len, lines))], dtype=np.int64)
    weights = np.array([row.get("weight", 1.0) for row in rows], dtype=np.float64)
    if (weights != weights[0]).any():
        arrays["weight_ends"] = weights.cumsum()
    return arrays


def is_written(folder: str | Path, number: int, made_of: Mapping[str, Any]) -> bool:
    """
    Whether a shard is whole.

    Raises:
        ValueError: If it is, but was made of something else, or otherwise.
    """
    note = _read_receipt(Path(folder) / f"{shard_name(number)}.json")
    if note is None:
        return False
    changed = differences(note["made_of"], made_of)
    if changed:
        raise ValueError(
            f"`output_dir` {folder} has shards that were made otherwise ({'; '.join(changed.values())}). Choose "
            "another folder, or remove it."
        )
    path = Path(folder) / (note.get("file") or f"{shard_name(number)}.json")
    return path.is_file() and (not note["num_pictures"] or path.stat().st_size == note["bytes"])


def differences(before: Mapping[str, Any], made_of: Mapping[str, Any]) -> dict[str, str]:
    """What tokens that are there were made of otherwise than others would be: a clause for each name, in order."""
    wanted = json.loads(json.dumps(dict(made_of)))  # as it would be read from a file
    changed = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
    return {key: f"`{key}` was {before.get(key)!r} and is {wanted.get(key)!r}" for key in changed}


def _read_receipt(path: Path) -> dict | None:
    """What `NAME.json` says; `None` if there is none, or it is none of ours."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(note, dict) and note.get("format") == "token shard" and note.get("version") == VERSION
    return note if is_ours else None


def write_index(folder: str | Path, num_shards: int, required: bool = True) -> Counter | None:
    """
    Gather what the shards say of themselves in `index.json`, if all are there.

    Args:
        folder (`str` or `Path`): The folder of shards.
        num_shards (`int`): How many there must be.
        required (`bool`, defaults to `True`): Whether it is an error if no shard has a picture; else there is no
            index.

    Returns:
        `Counter` or `None`: What was counted while the shards were made, with `num_pictures`; `None` if some are
        missing.

    Raises:
        ValueError: If no shard has a picture, or they do not fit each other.
    """
    folder, notes = Path(folder), []
    for number in range(num_shards):
        note = _read_receipt(folder / f"{shard_name(number)}.json")
        if note is None:
            return None
        notes.append(note)
    report: Counter = Counter()
    for note in notes:
        report.update(note["report"])
    filled = [note for note in notes if note["num_pictures"]]
    if not filled and not required:
        return report
    if not filled:
        raise ValueError(f"None of the {num_shards} shards in {folder} has a picture. Counted: {dict(report)}.")
    for note in filled:
        for key in ("arrays", "num_codes"):
            if note[key] != filled[0][key]:
                raise ValueError(
                    f"The shards in {folder} do not fit each other: {note['file']} has {key} {note[key]}, "
                    f"{filled[0]['file']} has {filled[0][key]}."
                )
    keys = ("file", "num_pictures", "weight", "equal_weights", "num_styles", "largest_codes", "bytes", "sha256")
    sizes = {
        key: filled[0]["made_of"][key]
        for key in ("low_size", "fine_size", "compression_rate")
        if key in filled[0]["made_of"]
    }
    report["num_pictures"] = sum(note["num_pictures"] for note in filled)
    content = {
        "format": "token shards",
        "version": VERSION,
        "num_pictures": report["num_pictures"],
        "num_codes": filled[0]["num_codes"],
        "arrays": filled[0]["arrays"],
        "picture_sizes": sizes,
        "report": dict(report),
        "shards": [{key: note[key] for key in keys} for note in filled],
    }
    write_json(folder / INDEX_FILE, content)
    return report


# Reading -------------------------------------------------------------------------------------------------------------


def read_hashes(folder: str | Path, number: int) -> np.ndarray:
    """The hashes of the pictures of a shard, where they were noted: `(num_pictures,)` uint64."""
    path = Path(folder) / f"{shard_name(number)}.safetensors"
    if path.is_file():
        with safe_open(path, "np") as file:
            if "picture_hashes" in list(file.keys()):
                return file.get_tensor("picture_hashes")
    return np.empty(0, dtype=np.uint64)


def drop_pictures(folder: str | Path, number: int, dropped: Sequence[int], reason: str) -> None:
    """
    Write a shard anew without some of its pictures.

    Args:
        folder (`str` or `Path`): The folder of shards.
        number (`int`): Of the shard.
        dropped (sequence of `int`): The numbers of these pictures in it.
        reason (`str`): What they are counted as in its report.
    """
    path = Path(folder) / f"{shard_name(number)}.safetensors"
    note, arrays = _read_receipt(path.with_suffix(".json")), load_file(path)
    assert note is not None
    text, starts = arrays["captions"].tobytes(), arrays["caption_starts"].tolist()
    weights = [note["weight"] / note["num_pictures"]] * note["num_pictures"]
    if not note["equal_weights"]:
        weights = np.diff(arrays["weight_ends"], prepend=0.0).tolist()
    gone = set(dropped)
    kept = [each for each in range(note["num_pictures"]) if each not in gone]
    write_shard(
        folder,
        number,
        {name: arrays[name][kept] for name in TOKEN_ARRAYS if name in arrays},
        [{**json.loads(text[starts[each] : starts[each + 1]]), "weight": weights[each]} for each in kept],
        made_of=note["made_of"],
        num_codes=note["num_codes"],
        dtype=arrays["low"].dtype.type,
        report={**note["report"], reason: note["report"].get(reason, 0) + len(gone)},
        picture_hashes=arrays["picture_hashes"][kept],
    )


def is_shard_folder(folder: str | Path) -> bool:
    """Whether a folder has shards, finished or not."""
    if is_url(folder):
        return True
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file():
        return True
    receipt = next(folder.glob("[0-9]*.json"), None)
    return receipt is not None and _read_receipt(receipt) is not None


def read_index(folder: str | Path) -> dict:
    """
    What `index.json` says.

    Raises:
        ValueError: If it is missing or none of ours.
    """
    if not is_url(folder) and not (Path(folder) / INDEX_FILE).is_file():
        raise ValueError(
            f"`data` {folder} has shards, but no {INDEX_FILE}: they are not finished. Run what makes them again."
        )
    if is_url(folder):
        try:
            text = ObjectStore(os.fspath(folder)).read(INDEX_FILE)
        except OSError as error:
            raise ValueError(f"`data` {folder} has no {INDEX_FILE} that can be read ({error!r}).") from error
    else:
        text = (Path(folder) / INDEX_FILE).read_bytes()
    try:
        content = json.loads(text)
        if content["format"] != "token shards":
            raise KeyError("format")
        version = content["version"]
        for entry in content["shards"]:
            if not re.fullmatch(r"[\w.-]+", entry["file"]) or entry["num_pictures"] < 1 or not entry["weight"] >= 0:
                raise ValueError(f"a shard with {entry}")
            entry["bytes"], entry["sha256"], entry["equal_weights"]
        content["arrays"]["low"]["shape"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`data` has a damaged {INDEX_FILE} in {folder} ({error!r}). Make it again.") from error
    if version != VERSION:
        raise ValueError(f"`data` has shards of version {version} in {folder}, but this package reads {VERSION}.")
    return content


def find_damaged(folder: str | Path, verify: bool = False, part: int = 0, num_parts: int = 1) -> dict[str, str]:
    """
    The shards of a folder that are missing or damaged.

    Args:
        folder (`str` or `Path`): The folder of shards.
        verify (`bool`, defaults to `False`): Read all of them and compare checksums; else sizes alone. Shards on an
            object store are compared when they are fetched in any case.
        part, num_parts (`int`): Which part of the shards to read where several processes share them.

    Returns:
        `dict[str, str]`: What is wrong, by the names of the files.
    """
    damaged = {}
    store = ObjectStore(os.fspath(folder)) if is_url(folder) else None
    sizes = store.sizes() if store is not None else None
    for number, entry in enumerate(read_index(folder)["shards"]):
        name, path = entry["file"], None if store is not None else Path(folder) / entry["file"]
        if path is not None:
            size = path.stat().st_size if path.is_file() else None
        else:
            size = entry["bytes"] if sizes is None else sizes.get(name)
        if size is None:
            damaged[name] = "it is missing"
        elif size != entry["bytes"]:
            damaged[name] = f"it has {size} bytes instead of {entry['bytes']}"
        elif verify and number % num_parts == part:
            if path is not None:
                digest = file_digest(path)["sha256"]
            else:
                assert store is not None
                digest = store.digest(name)
            if digest != entry["sha256"]:
                damaged[name] = "it has the right size, but not what was written"
    return damaged


class _File:
    """An open file, closed when nobody reads from it any more, and where each of its arrays begins."""

    __slots__ = ("descriptor", "path", "starts")

    def __init__(self, path: str, descriptor: int | None = None):
        self.path = path
        try:
            self.descriptor = (
                os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if descriptor is None else descriptor
            )
        except OSError as error:
            raise DamagedShard(f"{path} cannot be read: {error.strerror}.") from error
        self.starts: dict[str, int] = {}

    def read(self, start: int, size: int) -> bytes:
        """Bytes from a place on."""
        content = _read_at(self.descriptor, size, start)
        while len(content) < size:  # of very large reads a system gives a part
            more = _read_at(self.descriptor, size - len(content), start + len(content))
            if not more:
                raise DamagedShard(f"{self.path} was cut off while it was read. Resume: it is left out then.")
            content += more
        return content

    def start(self, name: str) -> int:
        """Where an array begins."""
        try:
            return self.starts[name]
        except KeyError:
            raise DamagedShard(f"{self.path} has no array `{name}`.") from None

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _read_at_place(descriptor: int, size: int, start: int) -> bytes:
    """What `os.pread` does, where there is none (Windows): one place for all threads."""
    with _place_in_file:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)


_read_at = getattr(os, "pread", _read_at_place)


class _Place:
    """Where a picture stands, in words: they are made for a message only."""

    __slots__ = ("number", "shard", "shards")

    def __init__(self, shards: "TokenShards", shard: int, number: int):
        self.shards, self.shard, self.number = shards, shard, number

    def __str__(self) -> str:
        return f"Picture {self.number} of {self.shards.path(self.shard)}"


class TokenShards:
    """
    The pictures of a folder of shards, read when they are asked for.

    What is in memory: a few numbers for each shard, `MOST_OPEN_FILES` open files, and the weights of `MOST_WEIGHTS`
    shards where they differ. Threads and forked processes may share it.

    Args:
        folder (`str` or `Path`): The folder, or the URL of one on an object store.
        excluded (collection of `str`): Names of shards to leave out.
        cache (`str` or `Path`, *optional*): Where shards from an object store are kept.
        cache_gb (`float`): What they may take there, in GB.

    Raises:
        ValueError: If `index.json` is missing or damaged, or nothing is left.
    """

    def __init__(
        self,
        folder: str | Path,
        excluded: Sequence[str] | Mapping[str, str] = (),
        cache: str | Path | None = None,
        cache_gb: float = DEFAULT_CACHE_GB,
    ):
        self.folder, index = folder, read_index(folder)
        self._prefix = f"{os.fspath(folder).rstrip('/')}/" if is_url(folder) else os.path.join(os.fspath(folder), "")
        entries = [entry for entry in index["shards"] if entry["file"] not in excluded]
        if not entries:
            raise ValueError(f"`data` has no shard that is whole in {folder}.")
        self.files = [entry["file"] for entry in entries]
        self._cache, self._digests = None, []
        if is_url(folder):
            self._cache = ShardCache(ObjectStore(os.fspath(folder)), cache or DEFAULT_CACHE, int(cache_gb * 1e9))
            self._digests = [(entry["bytes"], entry["sha256"]) for entry in entries]
            total = sum(size for size, _ in self._digests)
            if total > self._cache.max_bytes:
                logger.warning(
                    "`data` %s has %.3g GB, but `data_cache_gb` is %g: samples are drawn from all shards, which are "
                    "fetched again and again.",
                    folder,
                    total / 1e9,
                    cache_gb,
                )
        self.counts = [entry["num_pictures"] for entry in entries]
        self.first = [0, *itertools.accumulate(self.counts)]
        self.arrays, self.num_codes = index["arrays"], index["num_codes"]
        self.largest_codes = {name: max(entry["largest_codes"][name] for entry in entries) for name in self.arrays}
        self.num_styles = sum(entry["num_styles"] for entry in entries)
        self.weights = [float(entry["weight"]) for entry in entries]
        self.equal_weights = [bool(entry["equal_weights"]) for entry in entries]
        # where each array begins in each file, once its header was read
        self._starts: np.ndarray = np.full((len(entries), len(_ARRAYS)), -1, dtype=np.int64)
        self._first = np.array(self.first)
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._add_caches()

    def _add_caches(self) -> None:
        self._weight_ends = functools.lru_cache(MOST_WEIGHTS)(self._read_weight_ends)
        self.texts = functools.lru_cache(MOST_LINES)(self._read_texts)

    def __len__(self) -> int:
        return self.first[-1]

    def __getstate__(self) -> dict:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_weight_ends", "texts")}
        return state | {"_open": OrderedDict()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._add_caches()

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a picture, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is outside of 0..{len(self) - 1}.")
        shard = bisect_right(self.first, index) - 1
        return shard, index - self.first[shard]

    def tokens(self, name: str, indices: Sequence[int]) -> np.ndarray:
        """The tokens of pictures: `(len(indices), rows, columns)`, uint16 or int32."""
        shape, dtype = self.arrays[name]["shape"], np.dtype(self.arrays[name]["dtype"]).newbyteorder("<")
        rows = np.empty((len(indices), *shape), dtype)
        size = rows[:1].nbytes
        target = rows.reshape(len(indices), -1).view(np.uint8)
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{indices} are outside of 0..{len(self) - 1}.")
        shards = self._first.searchsorted(wanted, "right") - 1
        starts = (wanted - self._first[shards]) * size
        order = shards.argsort(kind="stable")  # each file is opened once
        for row, shard, start in zip(order.tolist(), shards[order].tolist(), starts[order].tolist()):
            file = self._file(shard)
            target[row] = np.frombuffer(file.read(file.start(name) + start, size), np.uint8)
        return rows

    def line(self, index: int) -> tuple[str, _Place]:
        """The line of captions of a picture, and where it stands, for messages."""
        shard, number = self.locate(index)
        place, file = _Place(self, shard, number), self._file(shard)
        first, end = _TWO_PLACES.unpack(file.read(file.start("caption_starts") + 8 * number, 16))
        if not 0 <= first <= end <= first + _LARGEST_HEADER:
            raise DamagedShard(f"{place} has damaged captions.")
        content = file.read(file.start("captions") + first, end - first)
        try:
            return content.decode("utf-8"), place
        except UnicodeDecodeError as error:
            raise DamagedShard(f"{place} has damaged captions ({error}).") from error

    def _read_texts(self, index: int) -> dict[str, dict[str, list[str]]]:
        """What the line of a picture says: its `captions`, the `targets` of captioning, and its `style`."""
        captions = parse_captions(*self.line(index)).texts
        style = captions.pop("style", {})
        targets = captions.pop("targets", captions)
        return {"captions": captions, "targets": targets, "style": style}

    def weight_ends(self, shard: int) -> np.ndarray:
        """The sums of the weights of a shard in which they differ, up to and with each picture."""
        return self._weight_ends(shard)

    def _read_weight_ends(self, shard: int) -> np.ndarray:
        file = self._file(shard)
        return np.frombuffer(file.read(file.start("weight_ends"), 8 * self.counts[shard]), "<f8")

    # Files ---------------------------------------------------------------------------------------------------------

    def _file(self, shard: int) -> _File:
        """The open file of a shard."""
        try:
            return self._open[shard]
        except KeyError:
            file = self._opened(shard)
        if self._starts[shard, 0] < 0:
            self._starts[shard] = self._read_header(shard, file)
        file.starts = {name: start for name, start in zip(_ARRAYS, self._starts[shard].tolist()) if start >= 0}
        self._open[shard] = file
        while len(self._open) > (MOST_OPEN_FILES if self._cache is None else MOST_FETCHED_OPEN):
            try:
                self._open.popitem(last=False)
            except KeyError:  # another thread was faster
                break
        return file

    def path(self, shard: int) -> str:
        """The file of a shard, as its folder was named."""
        return f"{self._prefix}{self.files[shard]}"

    def _opened(self, shard: int) -> _File:
        if self._cache is None:
            return _File(self.path(shard))
        try:
            return _File(self.path(shard), self._cache.open(self.files[shard], *self._digests[shard]))
        except CannotFetch as error:
            raise DamagedShard(str(error)) from error

    def _read_header(self, shard: int, file: _File) -> list[int]:
        """Where arrays begin, by the header of a safetensors file, which is compared with what the index says."""
        path, count = self.path(shard), self.counts[shard]
        (length,) = struct.unpack("<Q", file.read(0, 8))
        if length > _LARGEST_HEADER:
            raise DamagedShard(f"{path} is no shard: its header would have {length} bytes.")
        wanted = {name: [value["dtype"], [count, *value["shape"]]] for name, value in self.arrays.items()}
        wanted |= {"caption_starts": ["int64", [count + 1]]}
        if not self.equal_weights[shard]:
            wanted["weight_ends"] = ["float64", [count]]
        try:
            header = json.loads(file.read(8, length))
            starts = {name: 8 + length + int(header[name]["data_offsets"][0]) for name in (*wanted, "captions")}
            found = {name: [np.dtype(_DTYPES[header[name]["dtype"]]).name, header[name]["shape"]] for name in wanted}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedShard(f"{path} is no shard: {error!r} in its header.") from error
        if found != wanted:
            raise DamagedShard(f"{path} is another shard than {INDEX_FILE} says: {found} instead of {wanted}.")
        return [starts.get(name, -1) for name in _ARRAYS]


class ShardedTokens:
    """
    The tokens of one size of all pictures, indexed like a tensor `(num_pictures, rows, columns)` by a number, a slice
    or numbers; what comes is int32.
    """

    def __init__(self, shards: TokenShards, name: str):
        self.shards, self.name = shards, name
        self.shape = (len(shards), *shards.arrays[name]["shape"])

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int]) -> torch.Tensor:
        if isinstance(index, int):
            return self._read([index])[0]
        return self._read(range(len(self))[index] if isinstance(index, slice) else [int(one) for one in index])

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.shards.tokens(self.name, indices).astype(np.int32, copy=False))


class ShardedCaptions(Sequence):
    """
    What the lines of captions say of all pictures: `"captions"` to draw from, `"targets"` of captioning, `"style"`.

    A line is read and parsed when it is asked for; what comes is not to be changed.
    """

    def __init__(self, shards: TokenShards, kind: str = "captions"):
        self.shards, self.kind = shards, kind

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        return self.shards.texts(index)[self.kind]


class ShardChances(Chances):
    """
    The chances of the pictures of shards, by the weights that `index.json` and the shards hold.

    Args:
        shards ([`TokenShards`]): The shards.

    Raises:
        ValueError: If no weight is above 0.
    """

    def __init__(self, shards: TokenShards):
        self.shards = shards
        self.ends = np.cumsum(shards.weights).tolist()
        self.total = self.ends[-1]
        if not 0 < self.total < np.inf:
            raise ValueError(f"`data` has no pictures of a `weight` above 0 in {shards.folder}.")
        self.last = int(np.flatnonzero(shards.weights)[-1])
        each = {weight / count for weight, count in zip(shards.weights, shards.counts)}
        self.equal = all(shards.equal_weights) and len(each) == 1

    def __len__(self) -> int:
        return len(self.shards)

    def find(self, place: float) -> int:
        """See [`Chances`]."""
        shards = self.shards
        shard = min(bisect_right(self.ends, place), self.last)
        place -= self.ends[shard] - shards.weights[shard]
        count = shards.counts[shard]
        if shards.equal_weights[shard]:
            number = int(max(place, 0.0) / shards.weights[shard] * count)
        else:
            ends = shards.weight_ends(shard)
            place = min(place, np.nextafter(ends[-1], 0))  # never one of weight 0 at the end
            number = int(ends.searchsorted(place, "right"))
        return shards.first[shard] + min(number, count - 1)
