"""How long an evaluation will take, and how much room, from one batch of it."""

import shutil
import time

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


def tell(found: dict) -> str:
    """An estimate in words."""
    seconds = found["seconds"]
    unit, name = next((pair for pair in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= pair[0]), (1, "s"))
    text = f"About {seconds / unit:.1f} {name} and {found['bytes'] / _GIGABYTE:.2f} GB are needed"
    if found["bytes"] > found["free_bytes"]:
        text += f", but only {found['free_bytes'] / _GIGABYTE:.2f} GB are free"
    return f"{text}, by the first batch."
