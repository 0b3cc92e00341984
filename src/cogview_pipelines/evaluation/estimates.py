"""How long an evaluation will take, and how much room, from one batch of it."""

import dataclasses
import shutil
import time

from .candidates import CandidatePool, Chosen
from .picture_runs import PictureRun

_GIGABYTE = 1e9


def estimate(run: PictureRun, shard: tuple[int, int] = (0, 1)) -> dict | None:
    """
    Make and compare one batch of what is left, and tell what the rest will take. The pictures made are kept. The
    first batch of a process is slower than others, so the time is rather too long.

    Returns:
        `dict` for JSON: `pictures_to_make`, `pictures_to_compare`, `seconds`, `bytes`, `free_bytes`; `None` if nothing
        is left to do.
    """
    blocks = run.blocks_left(shard)
    if not blocks:
        return None
    compared = sum(run.num_rows(block) for block in blocks)
    start = time.monotonic()
    made = run.make_some(blocks[0])
    making = (time.monotonic() - start) / max(1, len(made))
    start = time.monotonic()
    num, size = run.compare_some(blocks[0], made)
    comparing = (time.monotonic() - start) / max(1, num)
    to_make = 0 if run.make is None else sum(run.num_missing(block) for block in blocks)
    file_size = sum(path.stat().st_size for path in made) / max(1, len(made))
    return {
        "pictures_to_make": to_make,
        "pictures_to_compare": compared,
        "seconds": round(to_make * making + compared * comparing, 1),
        "bytes": round(to_make * file_size + compared * size / max(1, num)),
        "free_bytes": shutil.disk_usage(run.folder).free,
    }


def estimate_candidates(
    run: PictureRun, pool: CandidatePool, num_compared: int, shard: tuple[int, int] = (0, 1)
) -> dict | None:
    """
    Draw the candidates of one caption, compare one of them, and tell what the rest will take. What is drawn is kept.

    Args:
        run ([`PictureRun`]): What is compared how.
        pool ([`CandidatePool`]): All candidates.
        num_compared (`int`): Pictures that are compared once all candidates are there. This is left out of what a
            shard takes: who comes last does it.
        shard (`(index, count)`): Which captions are drawn.

    Returns:
        `dict` as that of [`estimate`]; `None` if no candidates are left to draw.
    """
    left = pool.left(shard)
    if not left:
        return None
    start = time.monotonic()
    files = list(pool.fill_one(left[0]).iterdir())
    making = time.monotonic() - start
    file_size = sum(path.stat().st_size for path in files)
    chosen = Chosen(pool, 1, next(iter(pool.scores(left[0]) or {})))
    one = dataclasses.replace(run, rows=[pool.rows[left[0]]], make=None, made=chosen, scores={})
    start = time.monotonic()
    num, size = one.compare_some(0)
    comparing = time.monotonic() - start
    compared = num_compared if shard == (0, 1) else 0
    to_make = len(left) - 1
    return {
        "pictures_to_make": to_make * pool.count,
        "pictures_to_compare": compared,
        "seconds": round(to_make * making + compared * comparing / max(1, num), 1),
        "bytes": round(to_make * file_size + compared * size / max(1, num)),
        "free_bytes": shutil.disk_usage(run.folder).free,
    }


def tell(found: dict, by: str = "batch") -> str:
    """An estimate in words, and from the first of what it is."""
    seconds = found["seconds"]
    unit, name = next((pair for pair in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= pair[0]), (1, "s"))
    text = f"About {seconds / unit:.1f} {name} and {found['bytes'] / _GIGABYTE:.2f} GB are needed"
    if found["bytes"] > found["free_bytes"]:
        text += f", but only {found['free_bytes'] / _GIGABYTE:.2f} GB are free"
    return f"{text}, by the first {by}."
