"""
Measures against the number of candidates, chosen by several scorers: figure 9 of CogView
(https://arxiv.org/abs/2105.13290).

All candidates of a caption are drawn once. Each number and scorer then has an evaluation of its own, of the pictures
that it would have chosen among the first so many.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..pictures.files import read_picture
from ..pictures.png import save_png, write_whole
from .captioned import Captioned
from .picture_runs import PictureRun

RESULTS = "candidates.json"
# The pictures of a caption by their seeds, in this order, and scores of them by scorer; higher is better.
Draw = Callable[[Captioned, Sequence[int]], tuple[Sequence[Image.Image], dict[str, Sequence[float]]]]


@dataclass
class CandidatePool:
    """
    The candidates of all captions, with their scores, in a folder. Captions that are there are not drawn again.

    Args:
        folder (`Path`): For the pictures.
        rows (list of [`Captioned`]): The captions.
        draw (function of a caption and seeds): Makes the candidates of a caption, and scores them.
        count (`int`): Candidates of each caption.
        key (`str`): Changes with whatever decides the pictures; those of another key are drawn again.
        seed (`int`, defaults to 0): Candidate `k` of caption `i` has `seed + i * count + k`.
    """

    folder: Path
    rows: Sequence[Captioned]
    draw: Draw
    count: int
    key: str
    seed: int = 0

    def fill(self, shard: tuple[int, int] = (0, 1), on_captions: Callable[[int], None] | None = None) -> None:
        """Draw what is missing of a shard: every so many captions."""
        for index in range(shard[0], len(self.rows), shard[1]):
            if self.scores(index) is None:
                self.fill_one(index)
            if on_captions is not None:
                on_captions(1)

    def left(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """The captions of a shard that are not done."""
        return [index for index in range(shard[0], len(self.rows), shard[1]) if self.scores(index) is None]

    def fill_one(self, index: int) -> Path:
        """Draw the candidates of one caption; their folder."""
        seeds = [self.seed + index * self.count + number for number in range(self.count)]
        images, scores = self.draw(self.rows[index], seeds)
        folder = self._of(index)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            save_png(image, folder / f"{number:03d}.png", {"prompt": self.rows[index].caption, "seed": seed})
        content = {"key": self.key, "scores": {name: list(map(float, values)) for name, values in scores.items()}}
        write_whole(folder / "scores.json", json.dumps(content).encode())  # the last: now the caption is done
        return folder

    def scores(self, index: int) -> dict[str, list[float]] | None:
        """Scores of the candidates of a caption; `None` if they are not there."""
        try:
            content = json.loads((self._of(index) / "scores.json").read_text(encoding="utf-8"))
            return content["scores"] if content["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_full(self) -> bool:
        """Whether all captions are done."""
        return not self.left()

    def chosen(self, index: int, number: int, scorer: str) -> Path:
        """The best of the first so many candidates of a caption."""
        scores = self.scores(index)
        if scores is None:
            raise ValueError(f"the candidates of caption {self.rows[index].id} are not there.")
        best = max(range(number), key=scores[scorer].__getitem__)
        return self._of(index) / f"{best:03d}.png"

    def _of(self, index: int) -> Path:
        return self.folder / f"{index:06d}"


class Chosen:
    """The pictures that a scorer chooses among the first so many; see [`References`]."""

    def __init__(self, pool: CandidatePool, number: int, scorer: str):
        self.pool, self.number, self.scorer = pool, number, scorer
        self._places = {row.id: index for index, row in enumerate(pool.rows)}

    def read(self, row: Captioned) -> Image.Image:
        """See [`References`]."""
        return read_picture(self.pool.chosen(self._places[row.id], self.number, self.scorer))


def candidate_curves(
    run: PictureRun,
    pool: CandidatePool,
    numbers: Sequence[int],
    scorers: Sequence[str],
    on_pictures: Callable[[int], None] | None = None,
) -> dict:
    """
    The figures of an evaluation for every number of candidates and scorer; they are written into the folder, too.

    Args:
        run ([`PictureRun`]): What is compared how, and where; of its own pictures nothing is made.
        pool ([`CandidatePool`]): All candidates.
        numbers (list of `int`): Of candidates.
        scorers (list of `str`): Who chooses: names of the pool's scores.
        on_pictures (function of a number, *optional*): Is told how many pictures were just compared.

    Returns:
        `dict` for JSON: `curves[scorer][number][figure]`, notes, settings.
    """
    curves: dict[str, dict] = {scorer: {} for scorer in scorers}
    notes: list[str] = []
    for number in sorted(numbers):
        for scorer in scorers:
            if number == 1 and scorer != scorers[0]:  # there is nothing to choose
                curves[scorer]["1"] = curves[scorers[0]]["1"]
                continue
            one = dataclasses.replace(
                run,
                folder=run.folder / f"{scorer}-{number:03d}",
                settings={**run.settings, "chosen_by": scorer, "chosen_of": number},
                make=None,
                made=Chosen(pool, number, scorer),
                scores={},
            )
            one.begin()
            one.run(on_pictures=on_pictures)
            found = one.results()
            assert found is not None
            curves[scorer][str(number)] = found["figures"]
            notes += [note for note in found["notes"] if note not in notes]
    content = {"key": run.key, "settings": run.settings, "curves": curves, "notes": notes, **run.stamp}
    write_whole(run.folder / RESULTS, json.dumps(content, ensure_ascii=False, indent=1).encode())
    write_whole(run.folder / "candidates.csv", table(curves).encode())
    return content


def table(curves: dict[str, dict]) -> str:
    """Comma-separated values: a row for each scorer, number and figure."""
    lines = ["chosen_by,candidates,figure,value,spread"]
    for scorer, by_number in curves.items():
        for number, figures in by_number.items():
            for name, figure in figures.items():
                value, spread, *_ = figure.values()
                lines.append(f"{scorer},{number},{name},{value},{'' if spread is None else spread}")
    return "\n".join(lines) + "\n"
