"""What judges are shown: which captions, the pictures of which models, in what order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...evaluation.captioned import Captioned, References, open_references
from ...pictures.colours import on_white
from ...short_names import short_names

# The largest grade of each question, the least is 1 (CogView, appendix E). The last one decides whether a judge is
# careless.
GRADES = {"clarity": 5, "texture": 5, "relevance": 5, "overall": 10}


@dataclass(frozen=True)
class Study:
    """
    Args:
        rows (list of [`Captioned`]): The captions.
        names (list of `str`): Of the models; judges never see them.
        models (list of [`References`]): Where the pictures of each model are.
        is_pair (`bool`): A/B mode: two models, and judges only say which picture is better.
        size (`int`, *optional*): Pictures are resized to so many pixels in height and width, so that their size does
            not tell who made them. By default they are shown as they are.
    """

    rows: Sequence[Captioned]
    names: Sequence[str]
    models: Sequence[References]
    is_pair: bool = False
    size: int | None = None

    def order_of_captions(self, token: str) -> list[int]:
        """The captions in the order of a judge."""
        return _shuffled(len(self.rows), token)

    def order_of_models(self, token: str, caption: int) -> list[int]:
        """Whose picture stands at which place, for this judge and caption."""
        return _shuffled(len(self.models), f"{token}/{caption}")

    def picture(self, caption: int, model: int) -> Image.Image:
        """
        The picture of a model, without anything that its file says beside it.

        Raises:
            ValueError: If it cannot be read any more.
        """
        image = on_white(self.models[model].read(self.rows[caption])).convert("RGB")
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return image


def make_study(
    rows: Sequence[Captioned],
    folders: Sequence[Path],
    num: int | None = None,
    seed: int = 0,
    is_pair: bool = False,
    size: int | None = None,
) -> tuple[Study, dict[str, str]]:
    """
    A study of the captions of which every model has a picture.

    Args:
        rows (list of [`Captioned`]): Captions.
        folders (list of `Path`): The pictures of each model, named like the captions.
        num (`int`, *optional*), seed (`int`): So many of the captions, by chance. By default all.
        is_pair, size: See [`Study`].

    Returns:
        The study, and why other captions are left out, by their ids.

    Raises:
        ValueError: If there are too few folders or captions, or a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("`FOLDERS` must be different ones.")
    if len(folders) < 2 or (is_pair and len(folders) != 2):
        raise ValueError(f"`FOLDERS` must be {'two' if is_pair else 'two or more'}, but are {len(folders)}.")
    models = [open_references(folder) for folder in folders]
    kept: list[Captioned] = []
    excluded: dict[str, str] = {}
    order = list(range(len(rows)))
    if num is not None:
        random.Random(seed).shuffle(order)
    for row in (rows[index] for index in order):
        if num is not None and len(kept) == num:
            break
        try:
            for model in models:
                model.read(row)
        except ValueError as error:
            excluded[row.id] = str(error)
        else:
            kept.append(row)
    if not kept or (num is not None and len(kept) < num):
        reason = next(iter(excluded.values()), "there are no captions")
        raise ValueError(
            f"there are pictures of all models for {len(kept)} of {len(rows)} captions"
            f"{'' if num is None else f', but {num} are asked for'}. The first problem: {reason}"
        )
    return Study(kept, short_names(folders), models, is_pair, size), excluded


def _shuffled(count: int, key: str) -> list[int]:
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order
