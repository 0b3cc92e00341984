"""
Pictures in terminals that can show them.

There are three ways in which terminals take pictures: the graphics protocol of kitty
(https://sw.kovidgoyal.net/kitty/graphics-protocol/), the inline images of iTerm2
(https://iterm2.com/documentation-images.html), and sixels, as a VT340 had them (https://www.vt100.net/docs/vt3xx-gp/).
What a terminal takes is told by environment variables, or, for sixels, by its answer to a question.
"""

import base64
import enum
import io
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from .console import fail, say

if TYPE_CHECKING:
    from PIL import Image

_KITTY_CHUNK = 4096  # bytes of base64 in one escape sequence, at most
_SIXEL_COLOURS = 255
_SIXEL_LONGEST_SIDE = 480
_ANSWER_SECONDS = 0.3


class Show(str, enum.Enum):
    """What `--show` takes."""

    auto = "auto"
    no = "no"
    kitty = "kitty"
    iterm2 = "iterm2"
    sixel = "sixel"


SHOW_OPTION = typer.Option(Show.auto, help="Show pictures in the terminal; auto: if it is one that can.")


def find_way(wanted: Show) -> Show:
    """How pictures are shown: as asked for; else as the terminal says, and not at all where output is no terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if wanted is Show.no or (wanted is Show.auto and not is_terminal):
        return Show.no
    if not is_terminal:
        fail(f"`--show` {wanted.value} needs a terminal, but the output goes somewhere else. Leave --show out.")
    return wanted if wanted is not Show.auto else _way_of_terminal(os.environ)


def show_picture(image: "Image.Image", way: Show) -> None:
    """Print a picture; nothing for `Show.no`."""
    if way is not Show.no:
        say(_WAYS[way](image))


def _way_of_terminal(environment) -> Show:
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux")) or "TMUX" in environment:  # they pass none of it on by default
        return Show.no
    if "KITTY_WINDOW_ID" in environment or term == "xterm-kitty" or program == "ghostty":
        return Show.kitty
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return Show.iterm2
    return Show.sixel if _answers_sixel() else Show.no


def _answers_sixel() -> bool:
    """Whether the terminal names sixels (4) among its attributes when it is asked for them."""
    try:
        import termios
        import tty

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (ImportError, OSError, ValueError, AttributeError, termios.error):
        return False
    answer, deadline = b"", time.monotonic() + _ANSWER_SECONDS
    try:
        tty.setcbreak(number, termios.TCSANOW)
        sys.stdout.write("\033[c")
        sys.stdout.flush()
        while not answer.endswith(b"c"):
            ready, _, _ = select.select([number], [], [], max(deadline - time.monotonic(), 0))
            byte = os.read(number, 1) if ready else b""
            if not byte:
                return False
            answer += byte
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)
    return b"4" in answer.partition(b"?")[2].rstrip(b"c").split(b";")


def _png(image: "Image.Image") -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def kitty(image: "Image.Image") -> str:
    """A picture in kitty's graphics protocol: PNG in pieces, each but the last with `m=1`."""
    data = base64.standard_b64encode(_png(image)).decode()
    pieces = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    parts = []
    for index, piece in enumerate(pieces):
        control = "a=T,f=100," if index == 0 else ""
        parts.append(f"\033_G{control}m={int(index < len(pieces) - 1)};{piece}\033\\")
    return "".join(parts)


def iterm2(image: "Image.Image") -> str:
    """A picture as an inline image of iTerm2."""
    data = _png(image)
    return f"\033]1337;File=inline=1;size={len(data)}:{base64.standard_b64encode(data).decode()}\a"


def sixel(image: "Image.Image") -> str:
    """A picture as sixels: bands of six rows, each colour of a band by itself, runs of equal columns counted."""
    import numpy as np

    image = image.convert("RGB")
    image.thumbnail((_SIXEL_LONGEST_SIDE, _SIXEL_LONGEST_SIDE))
    image = image.quantize(_SIXEL_COLOURS)
    palette, pixels = image.getpalette(), np.asarray(image)
    height, width = pixels.shape
    parts = [f'\033Pq"1;1;{width};{height}']
    for colour in np.unique(pixels).tolist():
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * colour : 3 * colour + 3])
        parts.append(f"#{colour};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        for colour in np.unique(band).tolist():
            columns = ((band == colour) * bits).sum(0)
            starts = np.flatnonzero(np.diff(columns, prepend=-1))
            lengths = np.diff(starts, append=width)
            runs = (
                f"!{n}{chr(63 + columns[s])}" if n > 3 else chr(63 + columns[s]) * n for s, n in zip(starts, lengths)
            )
            parts.append(f"#{colour}{''.join(runs)}$")
        parts.append("-")
    return "".join([*parts, "\033\\"])


_WAYS: dict[Show, Callable[["Image.Image"], str]] = {Show.kitty: kitty, Show.iterm2: iterm2, Show.sixel: sixel}
