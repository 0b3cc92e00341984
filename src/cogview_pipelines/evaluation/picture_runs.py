"""
An evaluation of many captions and pictures that may stop at any time and be spread over processes.

The captions are worked off in blocks of 64: pictures are made, each saved at once, compared, and what the comparison
needs (features, losses) is written into one file a block. Whatever is there is not made again; so the same command
goes on after a stop, and shards that write into one folder need no merging: who comes last finds all blocks. Figures
are computed from the blocks one after the other, so that memory does not depend on the number of pictures.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..json_lines import dump_file
from ..pictures.files import read_picture
from ..pictures.png import read_metadata, remove_unfinished, save_png, write_whole
from .blocks import Blocks, block_key, write_block
from .captioned import Captioned, References
from .figures import figures_of
from .networks import FeatureNetwork, features_of
from .preparation import Preparation
from .requirements import Detector, check, detect

BLOCK = 64
MOST_NAMED = 20  # pictures that could not be read, in the results
_RESULTS = "evaluation.json"

Make = Callable[[Sequence[Captioned], Sequence[int]], Sequence[Image.Image]]
Score = Callable[[Sequence[Image.Image], Sequence[Captioned]], Sequence[float]]


@dataclass
class PictureRun:
    """
    An evaluation in a folder.

    Args:
        folder (`Path`): For pictures, blocks and results.
        rows (list of [`Captioned`]): The captions.
        settings (`dict`): All that decides the result, for JSON. A folder that was begun with others is refused.
        make (function of captions and seeds): Makes the picture of each caption from its seed.
        made ([`References`], *optional*): In place of `make`: where pictures are that were made already.
        references ([`References`], *optional*): The true pictures. Without them there is no distance.
        network ([`FeatureNetwork`], *optional*): For distances and the Inception score.
        preparation ([`Preparation`]): What is done to pictures before.
        scores (`dict` of functions of pictures and captions): Further figures of each picture, by name; lower or
            higher, `mean` and standard error are given.
        detector ([`Detector`], *optional*): Finds objects in pictures, for captions that say what is to be seen.
        with_precision (`bool`, defaults to `False`): Precision and recall, too. All features are in memory for them.
        seed (`int`, defaults to 0): Picture `i` of the list has `seed + i * seeds_of_each`.
        seeds_of_each (`int`, defaults to 1): How many seeds a picture takes: its candidates.
        batch_size (`int`, defaults to 8): Pictures that are made and compared at a time.
        stamp (`dict`): Goes into the results: versions, hardware.
    """

    folder: Path
    rows: Sequence[Captioned]
    settings: dict
    make: Make | None = None
    made: References | None = None
    references: References | None = None
    network: FeatureNetwork | None = None
    preparation: Preparation = field(default_factory=Preparation)
    scores: dict[str, Score] = field(default_factory=dict)
    detector: Detector | None = None
    with_precision: bool = False
    seed: int = 0
    seeds_of_each: int = 1
    batch_size: int = 8
    stamp: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.make is None) == (self.made is None):
            raise ValueError("`make` or `made` must be given, and not both.")

    @property
    def num_blocks(self) -> int:
        """Blocks of captions."""
        return -(-len(self.rows) // BLOCK)

    @property
    def key(self) -> str:
        """Changes with the settings and the captions."""
        rows = [[row.id, row.caption, row.picture, *([repr(row.shows)] if row.shows else [])] for row in self.rows]
        content = [self.settings, rows]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def begin(self) -> None:
        """
        Write down what is evaluated.

        Raises:
            ValueError: If the folder holds an evaluation of something else; the message says what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _RESULTS
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
                key, settings = before["key"], before["settings"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path} is damaged or no file of an evaluation. Name another folder.") from None
            if key != self.key:
                differing = [
                    f"{name} {settings.get(name)!r}, now {self.settings.get(name)!r}"
                    for name in sorted({*settings, *self.settings})
                    if settings.get(name) != self.settings.get(name)
                ]
                raise ValueError(
                    f"{self.folder} holds an evaluation with other settings ({'; '.join(differing) or 'captions'}). "
                    "Name another folder."
                )
            return
        _write(path, {"key": self.key, "settings": self.settings})

    # One block -------------------------------------------------------------------------------------------------------

    def run(self, shard: tuple[int, int] = (0, 1), on_pictures: Callable[[int], None] | None = None) -> None:
        """
        Do the blocks of a shard that are not done.

        Args:
            shard (`(index, count)`): Every `count`-th block from `index` on.
            on_pictures (function of a number, *optional*): Is told how many pictures were just done.
        """
        for block in range(shard[0], self.num_blocks, shard[1]):
            count = len(self._rows(block))
            if not self._is_done(block):
                with self._only_worker(block):
                    if not self._is_done(block):
                        self._run_block(block, on_pictures)
                        continue
            if on_pictures is not None:
                on_pictures(count)

    def _run_block(self, block: int, on_pictures: Callable[[int], None] | None) -> None:
        rows = self._rows(block)
        excluded: dict[str, str] = {}
        if self.make is not None:
            self._make_missing(block, rows, on_pictures)
        pairs = []
        for row, path in zip(rows, self._paths(block), strict=True):
            try:
                made = read_picture(path) if self.made is None else self.made.read(row)
                true = None if self.references is None else self.references.read(row)
            except ValueError as error:
                excluded[row.id] = str(error)
            else:
                pairs.append((row, made, true))
        if self.make is None and on_pictures is not None:
            on_pictures(len(rows))
        tensors = self._compare(pairs) if pairs else {}
        write_block(self._block_file(block), tensors, self.key, excluded, len(pairs))

    def _make_missing(
        self,
        block: int,
        rows: Sequence[Captioned],
        on_pictures: Callable[[int], None] | None,
        most: int | None = None,
    ) -> list[Path]:
        """Make the pictures of a block that are not there, or so many of them; their files."""
        assert self.make is not None
        missing = []
        for offset, (row, path) in enumerate(zip(rows, self._paths(block), strict=True)):
            seed = self.seed + (block * BLOCK + offset) * self.seeds_of_each
            metadata = {"prompt": row.caption, "id": row.id, "seed": seed, "evaluation": self.key}
            try:
                there = read_metadata(path)
            except ValueError:
                there = {}
            if all(str(there.get(name)) == str(value) for name, value in metadata.items()):
                if on_pictures is not None:
                    on_pictures(1)
            else:
                missing.append((row, seed, path, metadata))
        missing = missing[:most]
        if missing:
            folder = missing[0][2].parent
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder, [path.name for _, _, path, _ in missing])
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            images = self.make([row for row, *_ in part], [seed for _, seed, *_ in part])
            for (_, _, path, metadata), image in zip(part, images, strict=True):
                save_png(image, path, metadata)
            if on_pictures is not None:
                on_pictures(len(part))
        return [path for _, _, path, _ in missing]

    # What is left ----------------------------------------------------------------------------------------------------

    def blocks_left(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """The blocks of a shard that are not done."""
        return [block for block in range(shard[0], self.num_blocks, shard[1]) if not self._is_done(block)]

    def num_rows(self, block: int) -> int:
        """How many captions a block has."""
        return len(self._rows(block))

    def num_missing(self, block: int) -> int:
        """How many pictures of a block have no file."""
        return sum(not path.exists() for path in self._paths(block))

    def make_some(self, block: int) -> list[Path]:
        """Make a batch of the pictures of a block that are not there; their files."""
        if self.make is None:
            return []
        return self._make_missing(block, self._rows(block), None, self.batch_size)

    def compare_some(self, block: int, files: Sequence[Path] = ()) -> tuple[int, int]:
        """Compare these pictures of a block, or a batch of those there: how many, and bytes that are kept of them."""
        pairs: list[tuple[Captioned, Image.Image, Image.Image | None]] = []
        for row, path in zip(self._rows(block), self._paths(block), strict=True):
            if len(pairs) < self.batch_size and (not files or path in files):
                with contextlib.suppress(ValueError):  # left out, when it comes to it
                    made = read_picture(path) if self.made is None else self.made.read(row)
                    pairs.append((row, made, None if self.references is None else self.references.read(row)))
        tensors = self._compare(pairs) if pairs else {}
        return len(pairs), sum(values.nbytes for values in tensors.values())

    def keep(self, **found: dict) -> None:
        """Put something into the results, unless it is there already."""
        path = self.folder / _RESULTS
        content = json.loads(path.read_text(encoding="utf-8"))
        if not found.keys() <= content.keys():
            _write(path, {**found, **content})

    def _compare(self, pairs: Sequence[tuple[Captioned, Image.Image, Image.Image | None]]) -> dict[str, torch.Tensor]:
        tensors: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            if self.network is not None:
                sides = {"made": [made for _, made, _ in part]}
                if self.references is not None:
                    sides["true"] = [true for _, _, true in part]
                for side, images in sides.items():
                    prepared = [list(self.preparation(image, side == "true")) for image in images]
                    for number, radius in enumerate(self.preparation.radii):
                        features, logits = features_of(self.network, torch.stack([one[number] for one in prepared]))
                        tensors.setdefault(f"{side}/{radius:g}", []).append(features)
                        if side == "made" and radius == 0 and logits is not None:
                            tensors.setdefault("logits", []).append(logits)
            for name, score in self.scores.items():
                values = torch.tensor(score([made for _, made, _ in part], [row for row, *_ in part])).double()
                if not values.isfinite().all():
                    row = part[int(values.isfinite().logical_not().nonzero()[0])][0]
                    raise ValueError(f"the figure {name!r} of {row.id} is no finite number.")
                tensors.setdefault(f"score/{name}", []).append(values)
            self._check_objects(part, tensors)
        return {name: torch.cat(parts) for name, parts in tensors.items()}

    def _check_objects(self, part: Sequence[tuple[Captioned, Image.Image, Any]], tensors: dict) -> None:
        """What is right of what the captions ask for; not all ask for the same, so not all pictures have a value."""
        asked = [(row.shows, made) for row, made, _ in part if row.shows is not None]
        if self.detector is None or not asked:
            return
        for (shows, _), found in zip(asked, detect(self.detector, [made for _, made in asked]), strict=True):
            for name, is_right in check(shows, found).items():
                tensors.setdefault(f"check/{name}", []).append(torch.tensor([float(is_right)]))

    # Results ---------------------------------------------------------------------------------------------------------

    def results(self) -> dict | None:
        """
        All figures, each with what says how sure it is; they are written into the folder, too. `None` as long as
        blocks are missing.
        """
        if self.blocks_left():
            return None
        blocks = Blocks([self._block_file(block) for block in range(self.num_blocks)])
        figures, notes = figures_of(blocks, self.preparation.radii, self.with_precision)
        results = {
            "key": self.key,
            "settings": self.settings,
            "pictures": blocks.count,
            "excluded": len(blocks.excluded),
            "excluded_pictures": dict(list(blocks.excluded.items())[:MOST_NAMED]),
            "figures": figures,
            "notes": notes,
            **self._kept(),
            **self.stamp,
        }
        _write(self.folder / _RESULTS, results)
        return results

    def _kept(self) -> dict:
        try:
            content = json.loads((self.folder / _RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: content[name] for name in ("estimate",) if name in content}

    # Files -----------------------------------------------------------------------------------------------------------

    def _rows(self, block: int) -> Sequence[Captioned]:
        return self.rows[block * BLOCK : (block + 1) * BLOCK]

    def _paths(self, block: int) -> list[Path]:
        folder = self.folder / "pictures" / f"{block:05d}"
        return [folder / f"{block * BLOCK + offset:06d}.png" for offset in range(len(self._rows(block)))]

    def _block_file(self, block: int) -> Path:
        return self.folder / "blocks" / f"{block:05d}.safetensors"

    def _is_done(self, block: int) -> bool:
        return block_key(self._block_file(block)) == self.key

    @contextlib.contextmanager
    def _only_worker(self, block: int) -> Iterator[None]:
        from filelock import FileLock, Timeout

        path = self.folder / f".block-{block:05d}.lock"
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"another process works on block {block} in {self.folder}. Give each its own shard, or wait."
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            lock.release()


def _write(path: Path, content: dict) -> None:
    write_whole(path, dump_file(content).encode())
