#!/usr/bin/env python
r"""
Pictures of the tutorials that train (docs/new_thing.md, docs/style_learning.md), from the folders that they wrote.

    python docs/images/make_tutorial_pictures.py new_thing before after
    python docs/images/make_tutorial_pictures.py style_learning before outline_after sticker_after sketch_after \
        negative_after

Each row is of one folder: without an adapter, and then with one.
"""

import sys
from pathlib import Path

from make_examples import DOCS, save_small
from PIL import Image

# Of each tutorial, the grids that it wrote, how many pictures stand in a row of them, and how large they are shown.
GRIDS = {
    "new_thing": (("new_backgrounds", "new_companions"), None, 120),
    "style_learning": (("unseen_things",), 4, 80),
}


def cut(path: Path, columns: int | None) -> list[Image.Image]:
    """The pictures of a grid; of several in a row (the same scene with other seeds) the first."""
    with Image.open(path) as image:
        side = image.height if columns is None else image.width // columns
        boxes = (
            ((left, 0) for left in range(0, image.width, side))
            if columns is None
            else ((0, top) for top in range(0, image.height, side))
        )
        return [image.crop((left, top, left + side, top + side)) for left, top in boxes]


def main() -> None:
    name, *folders = sys.argv[1:]
    grids, columns, side = GRIDS[name]
    rows = [
        [
            picture.resize((side, side), Image.Resampling.LANCZOS)
            for picture in cut(Path(folder) / f"{grid}.png", columns)
        ]
        for grid in grids
        for folder in folders
    ]
    whole = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            whole.paste(picture, (left * side, top * side))
    save_small(whole, DOCS / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
