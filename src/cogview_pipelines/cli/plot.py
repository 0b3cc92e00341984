"""`cogview2 plot`: curves of training runs, evaluations and benchmarks."""

import importlib.util
from pathlib import Path

import typer

from .console import FAILURE, bad_input, expand, fail, failures, make_writable_folder, say

NEEDED = "matplotlib"
MOST_PANELS = 24


def plot(
    sources: list[Path] = typer.Argument(
        ..., help="Folders of training runs or evaluations, or .jsonl and .json files of results; several to compare."
    ),
    output: Path = typer.Option(
        "plot", "--output", "-o", help="A .png or .svg file; without an ending, both are written."
    ),
    key: list[str] = typer.Option(
        None, "--key", "-k", help="Only this number, such as loss or stage_seconds.vqvae; may be repeated."
    ),
    x: str = typer.Option(
        None, "--x", help="For lines of a benchmark: the number to draw against, such as batch_size."
    ),
    smooth: int = typer.Option(1, min=1, help="Curves become means of so many points, with these pale behind them."),
    log: bool = typer.Option(False, "--log", help="A logarithmic scale of what is measured."),
) -> None:
    """
    Plot training runs, evaluations and benchmarks.

    Of a training run, all that its metrics.jsonl has: losses, learning rate, samples per second. Of an evaluation, FID
    by blur and the other figures with their errors, or all of them by the number of candidates. Of a benchmark, a bar
    for each line, or curves over --x. Lines that a stop has cut off are passed over.

    \b
    Examples:
      cogview2 plot runs/a runs/b --key loss --smooth 20 -o losses.png
      cogview2 plot coco/evaluation.json mine/evaluation.json
      cogview2 plot benchmark.jsonl --x batch_size --key images_per_minute
    """
    if importlib.util.find_spec(NEEDED) is None:
        fail('Plots need matplotlib: `pip install "cogview_pipelines[plots]"`.', FAILURE)
    from ..plots.series import read_panels

    with bad_input():
        panels = read_panels([expand(source, "SOURCES") for source in sources], x)
    names = list(dict.fromkeys(panel.name for panel in panels))
    unknown = [name for name in key or () if name not in names]
    if unknown:
        fail(f"`--key`: nothing is called {unknown[0]!r} in what was given. There are {', '.join(names)}.")
    if key:
        panels = [panel for name in dict.fromkeys(key) for panel in panels if panel.name == name]
    if len(panels) > MOST_PANELS:
        fail(f"There are {len(panels)} numbers, too many for one plot. Choose some with --key: {', '.join(names)}.")
    from ..plots.drawing import draw, save

    path = expand(output, "--output")
    make_writable_folder(path.parent)
    with bad_input(), failures():
        for file in save(draw(panels, smooth, log), path):
            say(file)
