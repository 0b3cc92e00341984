"""
What there is to plot in files of results: `metrics.jsonl` of training, `evaluation.json` and `candidates.json` of
`cogview2 evaluate --captions`, and the JSON lines of benchmarks.

Everything becomes curves in panels: those of the same name, from several files, are drawn into one panel.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..json_lines import read_whole_rows
from ..short_names import short_names

METRICS = "metrics.jsonl"
_EVALUATIONS = ("candidates.json", "evaluation.json")
_FID = "fid_"
_NAMING = ("case", "benchmark", "measure", "split", "layout", "language", "decoding", "device", "dtype")


@dataclass
class Curve:
    """
    Args:
        label (`str`): What it is of: a run, a line of a benchmark.
        points (list of `(x, y)`): By `x`, which rises; `y` is NaN where something else than a number was written, and
            the curve has a gap.
        errors (list of `float`, *optional*): How sure each `y` is, as a standard error; NaN where it is not known.
    """

    label: str
    points: list[tuple[float, float]]
    errors: list[float] | None = None


@dataclass
class Panel:
    """
    Args:
        name (`str`): What is measured.
        x_label (`str`): What it is measured against; empty if curves are single values beside one another.
        curves (list of [`Curve`]): One or more.
    """

    name: str
    x_label: str
    curves: list[Curve] = field(default_factory=list)


def read_panels(paths: Sequence[str | Path], x: str | None = None) -> list[Panel]:
    """
    All panels of some files, in the order in which their names come.

    Args:
        paths (list of `str` or `Path`): Folders of runs or evaluations, or files.
        x (`str`, *optional*): Of the lines of a benchmark: the field that the others are drawn against. By default
            each line is a value of its own.

    Raises:
        ValueError: If a path holds nothing that can be plotted; the message names it.
    """
    panels: dict[tuple[str, str], Panel] = {}
    files = [_find(Path(path)) for path in paths]
    for file, name in zip(files, _names(files), strict=True):
        found = list(_read(file, name, x, len(files) > 1))
        if not found:
            raise ValueError(f"{file} has no numbers to plot.")
        for panel in found:
            panels.setdefault((panel.name, panel.x_label), Panel(panel.name, panel.x_label)).curves += panel.curves
    return list(panels.values())


def smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Means of the last `width` points up to each, as far as they are numbers."""
    means = []
    for index, (x, _) in enumerate(points):
        known = [y for _, y in points[max(0, index + 1 - width) : index + 1] if math.isfinite(y)]
        means.append((x, sum(known) / len(known) if known else math.nan))
    return means


# Files ---------------------------------------------------------------------------------------------------------------


def _find(path: Path) -> Path:
    """The file of results that a path means."""
    if path.is_dir():
        for name in (METRICS, *_EVALUATIONS):
            if (path / name).is_file():
                return path / name
        raise ValueError(f"{path} has no {METRICS} of a training run and no {' or '.join(_EVALUATIONS)}.")
    if not path.is_file():
        raise ValueError(f"there is no file or folder {path}.")
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} must be a folder, a .jsonl file or a .json file of results.")
    return path


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file: that of its folder where all such files are called alike."""
    known = (METRICS, *_EVALUATIONS)
    return short_names([file.resolve().parent if file.name in known else file.with_suffix("") for file in files])


def _read(file: Path, name: str, x: str | None, is_compared: bool) -> Iterable[Panel]:
    try:
        if file.suffix == ".jsonl":
            rows = list(read_whole_rows(file, allow_nan=True))
            is_run = x is None and any(isinstance(row.get("step"), int) for row in rows)
            return list(_metrics(rows, name) if is_run else _benchmark(rows, name if is_compared else "", x))
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content.get("curves"), dict):
            return list(_candidates(content["curves"], name))
        if isinstance(content.get("figures"), dict):
            return list(_evaluation(content["figures"], name))
        return list(_benchmark([content], name, x))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}.") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no file of results: {error}.") from None


def _number(value: object) -> float:
    """A number as it is, anything else as NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


# Kinds of results ----------------------------------------------------------------------------------------------------


def _metrics(rows: Sequence[dict], name: str) -> Iterable[Panel]:
    by_step = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}  # of a step, what came last
    keys = dict.fromkeys(key for row in by_step.values() for key in row if key != "step")
    for key in keys:
        points = [(float(step), _number(row[key])) for step, row in sorted(by_step.items()) if key in row]
        if any(math.isfinite(y) for _, y in points):
            yield Panel(key, "step", [Curve(name, points)])


def _evaluation(figures: dict, name: str) -> Iterable[Panel]:
    values = {key: figure for key, figure in figures.items() if isinstance(figure, dict)}
    radii = [key for key in values if key.startswith(_FID) and _is_number(key.removeprefix(_FID))]
    if len(radii) > 1:
        radii.sort(key=lambda key: float(key.removeprefix(_FID)))
        points = [(float(key.removeprefix(_FID)), _number(values[key].get("value"))) for key in radii]
        errors = [_number(values[key].get("standard_error")) for key in radii]
        yield Panel("FID", "radius of the blur", [Curve(name, points, errors)])
    for key, figure in values.items():
        spread = figure.get("standard_error", figure.get("deviation_over_splits"))
        if math.isfinite(_number(figure.get("value"))) and not (key in radii and len(radii) > 1):
            yield Panel(key, "", [Curve(name, [(0.0, _number(figure["value"]))], [_number(spread)])])


def _candidates(curves: dict, name: str) -> Iterable[Panel]:
    """Measures against the number of candidates: `{scorer: {number: {figure: {"value": ...}}}}`."""
    panels: dict[str, Panel] = {}
    for scorer, by_number in curves.items():
        for number, figures in sorted(by_number.items(), key=lambda pair: int(pair[0])):
            for key, figure in figures.items():
                panel = panels.setdefault(key, Panel(key, "candidates"))
                label = f"{name}: chosen by {scorer}"
                if not panel.curves or panel.curves[-1].label != label:
                    panel.curves.append(Curve(label, [], []))
                curve = panel.curves[-1]
                curve.points.append((float(number), _number(figure.get("value"))))
                assert curve.errors is not None
                curve.errors.append(_number(figure.get("standard_error", figure.get("deviation_over_splits"))))
    return panels.values()


def _benchmark(rows: Sequence[dict], name: str, x: str | None) -> Iterable[Panel]:
    panels: dict[str, Panel] = {}
    flat = [dict(_flatten(row)) for row in rows]
    for number, row in enumerate(flat, 1):
        label = ", ".join(str(row[key]) for key in _NAMING if isinstance(row.get(key), str)) or f"line {number}"
        label = f"{name}: {label}" if name else label
        place = 0.0 if x is None else _number(row.get(x))
        for key, value in row.items():
            if key == x or not math.isfinite(_number(value)) or not math.isfinite(place):
                continue
            curves = panels.setdefault(key, Panel(key, x or "")).curves
            own = next((curve for curve in curves if curve.label == label), None) if x is not None else None
            if own is None:
                own = Curve(label, [])
                curves.append(own)
            own.points.append((place, _number(value)))
    for panel in panels.values():
        for curve in panel.curves:
            curve.points.sort()
    return panels.values()


def _flatten(row: dict, before: str = "") -> Iterable[tuple[str, object]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
