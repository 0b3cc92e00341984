"""Panels as pictures, by matplotlib, which is the extra `plots`."""

import math
import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .series import Curve, Panel, smooth

FORMATS = (".png", ".svg")
COLUMNS = 2
MOST_IN_LEGEND = 12
MOST_COLUMNS = 24  # of a table whose numbers are written out
# Whichever of these is installed draws the letters of the one before that has none for them.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Micro Hei")
_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.hashsalt": "cogview_pipelines",  # the same file of the same numbers
    "svg.fonttype": "path",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}


def draw(panels: Sequence[Panel], width: int = 1, log: bool = False) -> Figure:
    """
    One figure of all panels, two beside each other; a run has the same colour in all of them.

    Args:
        panels (list of [`Panel`]): What [`read_panels`] found.
        width (`int`, defaults to 1): Curves over steps become means of so many points, and what they are means of
            stands behind them, pale.
        log (`bool`, defaults to `False`): A logarithmic scale of what is measured, where all of it is positive.
    """
    with rc_context({**_SETTINGS, "font.family": _fonts()}):
        columns = min(COLUMNS, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(6 * columns, 3.4 * rows), layout="constrained")
        labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
        colours = {label: f"C{number % 10}" for number, label in enumerate(labels)}
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, number)
            axes.set_title(panel.name)
            if panel.x_label:
                _draw_curves(axes, panel, colours, width)
            else:
                _draw_values(axes, panel, colours)
            if log and all(y > 0 for curve in panel.curves for _, y in curve.points if math.isfinite(y)):
                (axes.set_yscale if panel.x_label else axes.set_xscale)("log")
        return figure


def draw_table(values: Sequence[Sequence[float]], title: str, row: str, column: str) -> Figure:
    """
    A heat map of numbers, each of which stands in its cell where there is room.

    Args:
        values (list of list of `float`): The rows, from above.
        title (`str`): What is measured.
        row, column (`str`): What a row and a column are of.
    """
    with rc_context({**_SETTINGS, "font.family": _fonts()}):
        height, width = len(values), len(values[0])
        figure = Figure(figsize=(max(4.0, 0.5 * width + 1.6), max(2.4, 0.32 * height + 1.2)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        picture = axes.imshow(values, cmap="viridis", aspect="auto")
        axes.grid(False)
        axes.set_xlabel(column)
        axes.set_ylabel(row)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(picture)
        if width <= MOST_COLUMNS:
            middle = sum(picture.get_clim()) / 2
            for y, numbers in enumerate(values):
                for x, number in enumerate(numbers):
                    colour = "white" if number < middle else "black"
                    axes.text(x, y, f"{number:.2g}", ha="center", va="center", color=colour, fontsize=6)
        return figure


def draw_marks(image: Any, marks: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """
    A picture with dots on some of its cells, in the colour of what they belong to.

    Args:
        image (`PIL.Image.Image`): The picture.
        marks (list of list of `int`): For each cell, row by row, an index of `names`; -1 for none.
        names (list of `str`): What dots may belong to; those without any are left out.
    """
    with rc_context({**_SETTINGS, "font.family": _fonts()}):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        rows, columns = len(marks), len(marks[0])
        axes.imshow(image, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
        axes.set_axis_off()
        for index, name in enumerate(names):
            cells = [(x, y) for y, row in enumerate(marks) for x, mark in enumerate(row) if mark == index]
            if cells:
                colour, marker = f"C{index % 10}", "os^Dv"[index // 10 % 5]
                xs, ys = zip(*cells)
                label = _legible(name)
                axes.scatter(xs, ys, color=colour, marker=marker, edgecolors="white", linewidths=0.6, label=label)
        if any(mark >= 0 for row in marks for mark in row):
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, fontsize=7)
        return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """
    Write a figure into a `.png` or an `.svg` file; without an ending, into both. Each is replaced as a whole.

    Raises:
        ValueError: If the file has another ending.
    """
    if path.suffix and path.suffix.lower() not in FORMATS:
        raise ValueError(f"a plot is written as {' or '.join(FORMATS)}, not as {path.suffix}.")
    paths = [path] if path.suffix else [path.with_name(path.name + suffix) for suffix in FORMATS]
    with rc_context({**_SETTINGS, "font.family": _fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that no font here has are boxes
        for file in paths:
            kind = file.suffix.lower().removeprefix(".")
            unfinished = file.with_name(f".plot.{secrets.token_hex(4)}.part")
            try:
                figure.savefig(unfinished, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)
    return paths


def _fonts() -> list[str]:
    installed = set(font_manager.get_font_names())
    return [name for name in _FONTS if name in installed] or ["sans-serif"]


def _draw_curves(axes, panel: Panel, colours: dict[str, str], width: int) -> None:
    shown = []
    for curve in panel.curves:
        colour = colours[curve.label]
        xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
        errors = _known_errors(curve)
        marker = "o" if len(xs) <= 20 else None  # a single point has no line
        if width > 1:
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
            ys = [y for _, y in smooth(curve.points, width)]
        (line,) = axes.plot(xs, ys, color=colour, marker=marker, markersize=3, linewidth=1.3)
        if errors is not None:
            axes.errorbar(xs, ys, errors, color=colour, fmt="none", capsize=2)
        shown.append(line)
    axes.set_xlabel(panel.x_label)
    labels = [curve.label for curve in panel.curves]
    if len(labels) <= MOST_IN_LEGEND:
        axes.legend(shown, [_legible(label) for label in labels], fontsize=7)


def _draw_values(axes, panel: Panel, colours: dict[str, str]) -> None:
    """A bar for each curve, from above, with its name beside it."""
    pairs = [(curve, value) for curve in panel.curves for _, value in curve.points]
    places = range(len(pairs))
    axes.barh(places, [value for _, value in pairs], color=[colours[curve.label] for curve, _ in pairs], height=0.7)
    for place, (curve, value) in zip(places, pairs):
        errors = _known_errors(curve)
        if errors is not None:
            axes.errorbar([value], [place], xerr=errors, color="black", fmt="none", capsize=2)
    axes.set_yticks(places, [_legible(curve.label) for curve, _ in pairs], fontsize=7 if len(pairs) <= 12 else 5)
    axes.invert_yaxis()


def _known_errors(curve: Curve) -> list[float] | None:
    if curve.errors is None or not any(math.isfinite(error) for error in curve.errors):
        return None
    return [error if math.isfinite(error) else 0.0 for error in curve.errors]


def _legible(label: str) -> str:
    """A label that matplotlib shows: it hides what begins with an underscore, and long ones leave no room."""
    label = label if len(label) <= 48 else f"{label[:20]}…{label[-27:]}"
    return f" {label}" if label.startswith("_") else label
