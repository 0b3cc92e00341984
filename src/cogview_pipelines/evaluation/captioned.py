"""
What pictures are evaluated with: lists of captions and the true pictures of these, as files of the field hold them.

Captions come from JSON lines, COCO's `captions_*.json`, or tab-separated values; pictures from folders, WebDataset
tars, or the tab-separated values themselves.
"""

import base64
import binascii
import json
import os
import random
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..json_lines import is_unicode, parse_object, read_lines
from ..pictures.files import FORMATS, open_picture, read_picture
from .requirements import Requirements

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_CAPTION_FIELDS = ("caption", "prompt", "text")
_PICTURE_FIELDS = ("image", "file_name", "picture", "file")


@dataclass(frozen=True)
class Captioned:
    """
    A caption and the true picture that it describes.

    Args:
        id (`str`): Its name in the list, unlike all others.
        caption (`str`): The text.
        picture (`str`, *optional*): Name of the true picture; by default `id` with the suffix of a picture.
        shows ([`Requirements`], *optional*): Objects that the caption asks for.
    """

    id: str
    caption: str
    picture: str | None = None
    shows: Requirements | None = None


class References(Protocol):
    """Where true pictures are."""

    def read(self, row: Captioned) -> Image.Image:
        """
        The true picture of a caption.

        Raises:
            ValueError: If there is none, or it cannot be read; the message names it.
        """
        ...


# Captions ------------------------------------------------------------------------------------------------------------


def read_captions(path: str | Path, num: int | None = None, seed: int = 0) -> list[Captioned]:
    """
    The captions of a file: `.jsonl` (`id`, `caption`, `image` where it is not named after the id, and `include`, as
    GenEval has it, where objects are to be checked), COCO's `.json`, or `.tsv` (id and caption; or id, anything,
    caption and a picture in URL-safe base64, as CogView's).

    Captions that describe the same picture count once: one of them is taken by chance.

    Args:
        path (`str` or `Path`): The file.
        num (`int`, *optional*): Take so many by chance, in the order of the file; by default all.
        seed (`int`, defaults to 0): Decides which; on every machine the same.

    Raises:
        ValueError: If the file is no such list, an id is given twice, or there are fewer than `num`.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_coco, ".tsv": _read_tsv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} must be a {', '.join(readers)} file of captions.")
    rng = random.Random(seed)
    rows = _one_for_each_picture(readers[path.suffix.lower()](path), rng)
    if not rows:
        raise ValueError(f"{path} holds no captions.")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{path} has the id {row.id!r} twice. Ids name the pictures: give each caption its own.")
        seen.add(row.id)
    if num is None:
        return rows
    if num > len(rows):
        raise ValueError(f"{path} has captions of {len(rows)} different pictures, but {num} are asked for.")
    return [rows[index] for index in sorted(rng.sample(range(len(rows)), num))]


def _one_for_each_picture(rows: Iterator[Captioned], rng: random.Random) -> list[Captioned]:
    groups: dict[str | int, list[Captioned]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.picture or number, []).append(row)
    return [group[0] if len(group) == 1 else rng.choice(group) for group in groups.values()]


def _check_caption(caption: object) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError('must have a text as "caption".')
    if not is_unicode(caption):
        raise ValueError(f'must have Unicode text as "caption", but {caption[:80]!r} holds half of a surrogate pair.')
    return caption


def _read_jsonl(path: Path) -> Iterator[Captioned]:
    for number, line in read_lines(path):
        try:
            row = parse_object(line)
            caption = next((row[name] for name in _CAPTION_FIELDS if name in row), None)
            caption = _check_caption(caption)
            picture = next((row[name] for name in _PICTURE_FIELDS if name in row), None)
            if picture is not None and not isinstance(picture, str):
                raise ValueError(f'must have a name as "image", but has {picture!r}.')
            yield Captioned(str(row.get("id", f"{number:06d}")), caption, picture, Requirements.from_row(row))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} {error}") from None


def _read_coco(path: Path) -> Iterator[Captioned]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [
            Captioned(str(row["id"]), " ".join(row["caption"].split()), names[row["image_id"]])
            for row in sorted(content["annotations"], key=lambda row: row["id"])
        ]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no list of captions as COCO has them (`images` with `id` and `file_name`, `annotations` with "
            f"`id`, `image_id` and `caption`): {type(error).__name__}: {error}."
        ) from None
    for row in rows:
        try:
            _check_caption(row.caption)
        except ValueError as error:
            raise ValueError(f"{path}: annotation {row.id} {error}") from None
    yield from rows


def _read_tsv(path: Path) -> Iterator[Captioned]:
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) not in (2, 4):
            raise ValueError(f"{path}: line {number} must have 2 or 4 columns, but has {len(columns)}.")
        caption = columns[2 if len(columns) == 4 else 1]
        if not caption.strip():
            raise ValueError(f"{path}: line {number} has no caption.")
        yield Captioned(columns[0], caption)


# True pictures -------------------------------------------------------------------------------------------------------


def open_references(path: str | Path | Sequence[str | Path]) -> References:
    """
    The true pictures in a folder (of pictures, or of tars), in tars, or in tab-separated values.

    Raises:
        ValueError: If there are none.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(part) for part in path]
    if len(paths) == 1 and os.path.isdir(paths[0]):
        tars = sorted(paths[0].glob("*.tar"))
        return TarReferences(tars) if tars else FolderReferences(paths[0])
    if len(paths) == 1 and paths[0].suffix.lower() == ".tsv":
        return TsvReferences(paths[0])
    if all(part.suffix.lower() == ".tar" for part in paths):
        return TarReferences(paths)
    raise ValueError(f"true pictures must be in a folder, in .tar files or in a .tsv file, but are in {paths[0]}.")


class FolderReferences:
    """The pictures of a folder and of those in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str | None] = {}  # by name and by stem; `None` where that is not one
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and not name.startswith("."):
                    found = os.path.relpath(os.path.join(parent, name), folder)
                    for key in {_key(found), _key(name), _key(stem)}:
                        self._files[key] = found if self._files.get(key, found) == found else None
        if not self._files:
            raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")

    def read(self, row: Captioned) -> Image.Image:
        """See [`References`]."""
        name = row.picture or row.id
        found = self._files.get(_key(name))
        if found is None:
            state = "several pictures" if _key(name) in self._files else "no picture"
            raise ValueError(f"{self.folder} has {state} of the name {name}.")
        return read_picture(self.folder / found)


class TarReferences:
    """The pictures of WebDataset tars, as img2dataset writes them: `<key>.jpg` beside `<key>.txt`."""

    def __init__(self, paths: Sequence[Path]):
        self._places: dict[str, tuple[Path, int, int]] = {}
        for path in paths:
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        key, suffix = os.path.splitext(member.name)
                        if member.isfile() and suffix.lower() in SUFFIXES:
                            place = (path, member.offset_data, member.size)
                            for name in {_key(member.name), _key(key), _key(os.path.basename(key))}:
                                self._places.setdefault(name, place)
            except (OSError, tarfile.TarError) as error:
                raise ValueError(f"cannot read {path}: {error}.") from None
        if not self._places:
            raise ValueError(f"{', '.join(str(path) for path in paths)} hold no pictures.")

    def read(self, row: Captioned) -> Image.Image:
        """See [`References`]."""
        name = row.picture or row.id
        if _key(name) not in self._places:
            raise ValueError(f"the tars have no picture of the name {name}.")
        path, offset, size = self._places[_key(name)]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
            return open_picture(content, formats=FORMATS)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {name} {error}") from None


class TsvReferences:
    """The pictures of tab-separated values in URL-safe base64, as CogView's data."""

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        try:
            with open(path, "rb") as file:
                offset = 0
                for line in file:
                    columns = line.rstrip(b"\r\n").split(b"\t")
                    if len(columns) == 4:
                        self._places[columns[0].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")] = offset
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}.") from None
        if not self._places:
            raise ValueError(f"{path} has no column of pictures: id, anything, caption, picture.")

    def read(self, row: Captioned) -> Image.Image:
        """See [`References`]."""
        if row.id not in self._places:
            raise ValueError(f"{self.path} has no picture of the id {row.id}.")
        try:
            with open(self.path, "rb") as file:
                file.seek(self._places[row.id])
                data = file.readline().rstrip(b"\r\n").split(b"\t")[3]
            return open_picture(base64.urlsafe_b64decode(data), formats=FORMATS)
        except (OSError, ValueError, binascii.Error) as error:
            raise ValueError(f"{self.path}: {row.id} {error}") from None


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace(os.sep, "/"))
