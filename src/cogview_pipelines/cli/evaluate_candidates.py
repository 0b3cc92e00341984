"""`cogview2 evaluate --captions --candidate-counts`: the measures against the number of candidates."""

import hashlib
import importlib.util
import json
from typing import TYPE_CHECKING

from .console import fail, say, say_json

if TYPE_CHECKING:
    from ..evaluation.picture_runs import PictureRun

_SELF = "caption_loss"  # the scorer of the pipelines themselves


def read_counts(text: str) -> list[int]:
    """`"1,2,4"` to numbers that rise."""
    parts = text.split(",")
    counts = sorted({int(part) for part in parts if part.strip().isdecimal()})
    if len(counts) != len(parts) or len(counts) < 2 or counts[0] < 1 or counts[-1] > 999:
        fail(f"`--candidate-counts` must be different numbers from 1 to 999, as in 1,2,4,8, but is {text!r}.")
    return counts


def evaluate_candidates(
    run: "PictureRun", pipe, call: dict, counts: list[int], shard: tuple[int, int], batch_size: int, as_json: bool
) -> None:
    """
    Draw candidates, compare those that each scorer chooses, and write table and plot.

    Args:
        run ([`PictureRun`]): What would be evaluated with as many candidates as there are at most.
        pipe: The pipeline.
        call (`dict`): Arguments of its call.
        counts (list of `int`): Numbers of candidates.
        shard (`(index, count)`): Which captions are drawn; figures come when all are.
        batch_size (`int`): Pictures computed at a time.
        as_json (`bool`): Print one line of JSON.
    """
    from tqdm.auto import tqdm

    from ..evaluation.candidates import CandidatePool, candidate_curves, table
    from ..evaluation.estimates import estimate_candidates, tell

    if run.network is None:
        fail("--candidate-counts need a network that compares: --inception FILE or --network MODULE:FUNCTION.")
    others = {name.removesuffix("_score"): score for name, score in run.scores.items() if name != _SELF}
    decisive = json.dumps([run.key, counts[-1], sorted(others)])
    pool = CandidatePool(
        run.folder / "candidates",
        run.rows,
        _drawer(pipe, {**call, "num_candidates": counts[-1]}, batch_size, others),
        counts[-1],
        hashlib.sha256(decisive.encode()).hexdigest()[:16],
        run.seed,
    )
    scorers = [_SELF, *others]
    hidden = True if as_json else None
    own = len(range(shard[0], len(run.rows), shard[1]))
    say(
        f"{own * counts[-1]} candidates of {own} captions are drawn. A stop loses those of one caption at most.",
        err=True,
    )
    num = len(run.rows) * (len(counts) * len(scorers) - (len(scorers) - 1) * (counts[0] == 1))
    expected = estimate_candidates(run, pool, num, shard)
    if expected is not None:
        say(tell(expected, "caption"), err=True)
    with tqdm(total=own, desc="captions", disable=hidden) as progress:
        pool.fill(shard, progress.update)
    if not pool.is_full:
        say("This shard is done. Once the others are, the same command without --shard gives the figures.", err=True)
        return
    run.stamp = {**run.stamp, **({} if expected is None else {"estimate": expected})}
    with tqdm(total=num, desc="pictures compared", disable=hidden) as progress:
        content = candidate_curves(run, pool, counts, scorers, progress.update)
    for note in content["notes"]:
        say(f"Note: {note}", err=True)
    _plot(run.folder)
    if as_json:
        say_json(content)
    else:
        say(table(content["curves"]).rstrip("\n"))


def _drawer(pipe, call: dict, batch_size: int, others: dict):
    import torch

    count = call["num_candidates"]

    def draw(row, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = pipe(
            row.caption, generator=generators, num_images_per_prompt=count, max_batch_size=batch_size, **call
        )
        order = [output.seeds.index(seed) for seed in seeds]  # they come best first
        images = [output.images[place] for place in order]
        scores = {_SELF: [output.scores[place] for place in order]}
        scores |= {name: list(score(images, [row] * count)) for name, score in others.items()}
        return images, scores

    return draw


def _plot(folder) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        say('No plot: it needs `pip install "cogview_pipelines[plots]"`. The table is in candidates.csv.', err=True)
        return
    from ..plots.drawing import draw, save
    from ..plots.series import read_panels

    for file in save(draw(read_panels([folder / "candidates.json"])), folder / "candidates"):
        say(file, err=True)
