"""Curves as an SVG file, for benchmarks that compare how something goes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 720, 420, 70, 50, 190, 30
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#b8860b", "#555555")


def write_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """
    Draw some curves over common axes.

    Args:
        path (`str` or path): The SVG file.
        curves (mapping): Points `(x, y)` of each curve by its name; one without points stands in the legend only.
        title, x_label, y_label (`str`): What stands above, below and beside.
    """
    points = [point for curve in curves.values() for point in curve] or [(0.0, 0.0)]
    (least_x, most_x), (least_y, most_y) = (
        (min(values), max(values)) for values in ([x for x, _ in points], [y for _, y in points])
    )
    span_x, span_y = (most_x - least_x) or 1.0, (most_y - least_y) or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - least_x) / span_x
        down = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - least_y) / span_y
        return f"{across:.1f},{down:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
        f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="black"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="16" y="{TOP - 12}">{escape(y_label)}</text>',
    ]
    for part in (0.0, 0.5, 1.0):
        x, y = least_x + part * span_x, least_y + part * span_y
        across, _ = place(x, least_y).split(",")
        _, down = place(least_x, y).split(",")
        lines.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
        lines.append(f'<text x="{LEFT - 6}" y="{down}" text-anchor="end">{y:.3g}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        if curve:
            path_of = " ".join(place(x, y) for x, y in curve)
            lines.append(f'<polyline points="{path_of}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        down = TOP + 18 * index
        lines.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{down}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 30}" y="{down + 11}">{escape(name)}</text>')
    Path(path).write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")
