#!/usr/bin/env python
"""
Run the examples of the documentation, and put what they print and draw beneath them.

    python docs/images/make_examples.py [PAGE ...]

An example is a Python block after a line `<!-- example -->`. Its output stands between `<!-- output -->` and
`<!-- /output -->`, and is replaced as a whole: pictures that the example saves, in the order of their names, and what
it prints. Run it again whenever the shipped model changes.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent.parent
MOST_BYTES = 60_000  # of a picture; of wide ones as many a pixel as a single one has
MOST_BYTES_PER_PIXEL = 0.2
EXAMPLE = re.compile(
    r"<!-- example -->\n```python\n(?P<code>.*?)```\n\n<!-- output -->\n(?P<output>.*?)<!-- /output -->", re.DOTALL
)


def save_small(image: Image.Image, path: Path) -> None:
    """A PNG file of limited size: with as many colours of a palette as fit, if it is too large with all of them."""
    image = image.convert("RGB")
    most = max(MOST_BYTES, int(MOST_BYTES_PER_PIXEL * image.width * image.height))
    for colours in (None, 256, 128, 64, 32):
        (image if colours is None else image.quantize(colours)).save(path, optimize=True)
        if path.stat().st_size <= most:
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes, but may have {most}. Make the example smaller.")


def run(code: str, page: str) -> str:
    """Run an example in an empty folder; what is to stand beneath it."""
    printed, before = io.StringIO(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page, "exec"), {"__name__": "__main__"})
            lines = []
            for path in sorted(Path(folder).glob("*.png")):
                with Image.open(path) as image:
                    save_small(image, DOCS / "images" / path.name)
                lines.append(f"![{path.stem.replace('_', ' ')}](images/{path.name})\n")
        finally:
            os.chdir(before)
    if printed.getvalue():
        lines.append(f"```text\n{printed.getvalue().rstrip()}\n```\n")
    return "\n".join(lines)


def main() -> None:
    names = sys.argv[1:] or [path.name for path in sorted(DOCS.glob("*.md"))]
    for name in names:
        page = DOCS / name
        text = page.read_text(encoding="utf-8")

        def with_output(match: re.Match, name: str = name) -> str:
            print(f"{name}: running an example", file=sys.stderr)
            start = match.start("output") - match.start()
            end = match.end("output") - match.start()
            return match[0][:start] + run(match["code"], name) + match[0][end:]

        changed = EXAMPLE.sub(with_output, text)
        if changed != text:
            page.write_text(changed, encoding="utf-8")


if __name__ == "__main__":
    main()
