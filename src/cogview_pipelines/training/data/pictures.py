"""Pictures to train the image tokenizer on."""

import functools
import logging
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...json_lines import parse_object, read_lines, write_lines
from ...pictures.colours import on_white
from ...pictures.files import find_file, read_picture
from .prefetch import draw_indices
from .selection import to_square

MOST_SHOWN = 50  # of pictures that cannot be used, in an error
logger = logging.getLogger(__name__)


class PicturePool:
    """
    Pictures of one size in memory.

    Args:
        pictures (`torch.Tensor` of shape `(num, 3, height, width)`): RGB bytes.
    """

    def __init__(self, pictures: torch.Tensor):
        self.pictures = pictures

    @classmethod
    def from_images(cls, images: Sequence[Image.Image]) -> "PicturePool":
        """A pool of equally large PIL images."""
        return cls(torch.stack([to_bytes(image) for image in images]))

    def batch(self, count: int, crop_size: int | None, multiple: int, generator: torch.Generator) -> torch.Tensor:
        """
        Random windows of random pictures.

        Args:
            count (`int`): Number of windows.
            crop_size (`int`, *optional*): Side of the windows in pixels; by default whole pictures.
            multiple (`int`): Windows begin at multiples of this, to be cut into tokens like whole pictures.
            generator (`torch.Generator`): Draws pictures and places.

        Returns:
            `torch.Tensor` of shape `(count, 3, side, side)`: float32 in 0..1.
        """
        indices = draw_indices(len(self.pictures), count, generator)
        height, width = self.pictures.shape[2:]
        if crop_size is None or crop_size >= min(height, width):
            return self.pictures[indices].float() / 255
        rows, columns = (
            torch.randint((side - crop_size) // multiple + 1, (count,), generator=generator) * multiple
            for side in (height, width)
        )
        windows = [
            self.pictures[index, :, row : row + crop_size, column : column + crop_size]
            for index, row, column in zip(indices.tolist(), rows.tolist(), columns.tolist())
        ]
        return torch.stack(windows).float() / 255


class PictureFolder(PicturePool):
    """
    Picture files, read when they are drawn, as squares.

    Args:
        paths (`Sequence[Path]`): The files.
        size (`int`): Side of the squares in pixels.
        skip_unreadable (`bool`, defaults to `False`): Take the next file, with a warning, where one cannot be read
            although [`check_pictures`] could.
        fit (`str`, defaults to `"crop"`): How they become squares, as for [`to_square`]; where a random square lies
            follows from the name of the file.

    The files that could not be read meanwhile are in `left_out`.
    """

    def __init__(self, paths: Sequence[Path], size: int, skip_unreadable: bool = False, fit: str = "crop"):
        self.paths, self.size, self.skip_unreadable, self.fit = list(paths), size, skip_unreadable, fit
        self.left_out: set[Path] = set()

    def batch(self, count: int, crop_size: int | None, multiple: int, generator: torch.Generator) -> torch.Tensor:
        """As [`PicturePool.batch`]."""
        pool = PicturePool(self.squares(draw_indices(len(self.paths), count, generator).tolist()))
        windows = [
            PicturePool(pool.pictures[i : i + 1]).batch(1, crop_size, multiple, generator) for i in range(count)
        ]
        return torch.cat(windows)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Whole pictures of these files: `(num, 3, size, size)`, float32 in 0..1."""
        return self.squares(indices).float() / 255

    def squares(self, indices: Sequence[int]) -> torch.Tensor:
        """Whole pictures of these files, as RGB bytes: `(num, 3, size, size)`."""
        return torch.stack([to_bytes(self._square(index)) for index in indices])

    def _square(self, index: int) -> Image.Image:
        for step in range(len(self.paths)):
            path = self.paths[(index + step) % len(self.paths)]
            try:
                image = read_picture(path)
            except ValueError as error:
                if not self.skip_unreadable:
                    raise
                self.left_out.add(path)
                logger.warning("The next picture is taken instead: %s", error)
            else:
                return to_square(on_white(image), self.size, self.fit, (zlib.crc32(path.name.encode()),))
        raise ValueError("None of the pictures can be read.")


def check_pictures(
    paths: Sequence[Path],
    skip_unreadable: bool = False,
    num_workers: int = 0,
    record: Path | None = None,
    writes_record: bool = True,
    places: Sequence[str] | None = None,
) -> list[Path]:
    """
    Read all pictures once, so that none ends a long training when it is drawn.

    Args:
        paths (`Sequence[Path]`): The files.
        skip_unreadable (`bool`, defaults to `False`): Leave out what cannot be read, with a warning.
        num_workers (`int`, defaults to 0): Threads that read.
        record (`Path`, *optional*): A file of JSON lines that keeps which files were good. Those are not read again
            while their size and time of change stay the same.
        writes_record (`bool`, defaults to `True`): Whether this process is the one that writes it.
        places (`Sequence[str]`, *optional*): Where each file is named, for messages, such as `"Line 7 of a.jsonl"`.

    Returns:
        `list[Path]`: Those that can be read.

    Raises:
        ValueError: If some cannot be read and are not to be skipped, or none is left.
    """
    known = {} if record is None or not record.exists() else _read_record(record)
    state, broken = {}, {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checked = pool.map(functools.partial(_problem, known), paths)
        for index, (signature, problem) in enumerate(tqdm(checked, "pictures checked", len(paths))):
            if problem is None:
                state[str(paths[index])] = signature
            else:
                broken[paths[index]] = problem if places is None else f"{places[index]}: {problem}"
    if record is not None and writes_record and state != known:
        record.parent.mkdir(parents=True, exist_ok=True)
        with open(record, "w", encoding="utf-8") as file:
            write_lines(file, ({"file": name, "signature": signature} for name, signature in state.items()))
    if broken and not skip_unreadable:
        shown = " ".join(list(broken.values())[:MOST_SHOWN])
        if len(broken) > MOST_SHOWN:
            shown += f" And {len(broken) - MOST_SHOWN} more."
        raise ValueError(
            f"{len(broken)} of {len(paths)} pictures cannot be read: {shown} Repair or remove them, or leave them out "
            "with `--skip_unreadable`."
        )
    for problem in broken.values():
        logger.warning("Left out: %s", problem)
    if paths and len(broken) == len(paths):
        raise ValueError("None of the pictures can be read.")
    return [path for path in paths if path not in broken]


def _problem(known: dict[str, list[int]], path: Path) -> tuple[list[int], str | None]:
    """What tells that a file has changed, and what is wrong with its picture."""
    try:
        stat = find_file(path).stat()
        signature = [stat.st_size, stat.st_mtime_ns]
        if known.get(str(path)) != signature:
            read_picture(path)
    except (OSError, ValueError) as error:
        return [], str(error)
    return signature, None


def _read_record(path: Path) -> dict[str, list[int]]:
    try:
        rows = [parse_object(line) for _, line in read_lines(path)]
    except ValueError:  # it was cut off: all is read again
        return {}
    return {row["file"]: row["signature"] for row in rows if row.keys() >= {"file", "signature"}}


def to_bytes(image: Image.Image) -> torch.Tensor:
    """RGB bytes of a PIL image: `(3, height, width)` uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)
