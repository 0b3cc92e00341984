"""What is asked of a model: prompts and pictures with their settings, checked before anything is computed."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..json_lines import parse_object, read_lines
from ..pipelines.cogview.settings import CaptionSettings as CogViewCaptionSettings
from ..pipelines.cogview.settings import SamplingSettings as CogViewSamplingSettings
from ..pipelines.cogview2.settings import CaptionSettings, SamplingSettings
from ..pipelines.common.settings import MOST_COUNT, Setting
from .names import check_id, clashes

LARGEST_SEED = 2**63 - 1


def _text(value) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _whole_number(value, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"a whole number of at least {least}")
    return value


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a number")
    return float(value)


def _share(value) -> float:
    if _number(value) < 0 or value > 1:
        raise ValueError("a number from 0 to 1")
    return float(value)


def _truth(value) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _choice(*names: str) -> Callable:
    """One of these names; `-` is as good as `_`, as on the command line."""

    def check(value) -> str:
        if not isinstance(value, str) or value.replace("-", "_") not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value.replace("-", "_")

    return check


def _prompts(value) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of texts")
    return [check_prompt(text, "prompts") for text in value]


def _whole_number_or_none_at_all(value) -> int:
    return _whole_number(value, least=0)


def _count(value) -> int:
    """Of what is drawn: no more than memory has room for."""
    if _whole_number(value) > MOST_COUNT:
        raise ValueError(f"a whole number from 1 to {MOST_COUNT}")
    return value


def _setting(declared: Setting) -> Callable:
    """What the pipelines take."""

    def check(value):
        try:
            return declared.check("value", value)
        except ValueError:
            raise ValueError(declared.wanted) from None

    return check


COGVIEW_SAMPLING = CogViewSamplingSettings.declared()
# The arguments of the pipeline's call that a request may have, and how each is checked: those of both families. Which
# of them a model takes is known once it is there.
ARGUMENTS: dict[str, Callable] = {
    "num_images_per_prompt": _count,
    "num_candidates": _count,
    "style": _text,
    "height": _whole_number,
    "width": _whole_number,
    "negative_prompt": _text,
    **{name: _setting(declared) for name, declared in COGVIEW_SAMPLING.items()},
    **{name: _setting(declared) for name, declared in SamplingSettings.declared().items()},
    "max_batch_size": _whole_number,
}
_SUPER_RESOLUTION = {
    name: ARGUMENTS[name]
    for name in (*SamplingSettings.declared("CogView2UpscalePipeline"), *COGVIEW_SAMPLING, "style", "max_batch_size")
}
MARGINS = ("top", "bottom", "left", "right")


@dataclass(frozen=True)
class Kind:
    """
    What the lines of a list may hold for one command.

    Args:
        own (`tuple[str, ...]`): Fields that name what is to be done.
        required (`tuple[str, ...]`): Those that no line lacks.
        arguments (`dict[str, Callable]`): Arguments of the pipeline's call, and how each is checked.
        writes_pictures (`bool`): Whether results are files named by `id`.
    """

    own: tuple[str, ...]
    required: tuple[str, ...]
    arguments: dict[str, Callable]
    writes_pictures: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of a line."""
        return (*self.own, *self.arguments)

    @property
    def files(self) -> tuple[str, ...]:
        """The fields that name files."""
        return tuple(name for name in self.own if name in ("image", "mask"))


GENERATE = Kind(("id", "prompt", "seed"), ("id", "prompt"), ARGUMENTS)
_NOT_PAINTING = ("num_candidates", "height", "width", "top_k", "top_p")
INPAINT = Kind(
    ("id", "prompt", "image", "mask", "seed"),
    ("id", "prompt", "image"),
    {
        **{name: check for name, check in ARGUMENTS.items() if name not in _NOT_PAINTING},
        **dict.fromkeys(MARGINS, _whole_number_or_none_at_all),
        "super_resolve": _truth,
        "mask_share": _share,
        "min_crop_size": _whole_number,
        "max_crop_size": _whole_number,
        "mask_rule": _choice("cover", "nearest"),
    },
)
UPSCALE = Kind(
    ("id", "image", "prompt", "seed"),
    ("id", "image"),
    {
        **_SUPER_RESOLUTION,
        "num_levels": _whole_number,
        "tile_overlap": _share,
        "faithful": _truth,
        "size": _whole_number,
    },
)
CAPTION = Kind(
    ("id", "image", "seed"),
    ("id", "image"),
    {
        "language": _choice("en", "zh"),
        "strategy": _choice("greedy", "sample", "beam", "best_of"),
        "num_captions_per_image": _count,
        "num_candidates": _count,
        "num_beams": _count,
        "rank_by": _choice("image", "caption"),
        **{name: _setting(declared) for name, declared in CogViewCaptionSettings.declared().items()},
        **{name: _setting(declared) for name, declared in CaptionSettings.declared().items()},
        "max_length": _whole_number,
        "end": _choice("sentence", "likelihood", "length"),
        "max_batch_size": _whole_number,
    },
    writes_pictures=False,
)
SCORE = Kind(
    ("id", "image"),
    ("id", "image", "prompts"),
    {"prompts": _prompts, "max_batch_size": _whole_number},
    writes_pictures=False,
)


@dataclass
class Request:
    """
    One prompt, and how its pictures are to be made; or one picture, and what is to be done with it.

    Args:
        prompt (`str`): The text.
        seed (`int`, *optional*): Of the first picture; picture `i` has `seed + i`.
        arguments (`dict`): Arguments of the pipeline's call.
        id (`str`): Name of the file, without its ending.
        where (`str`): How messages call it: file and line.
        files (`dict[str, Path]`): What it starts from: `image`, and `mask`.
    """

    prompt: str
    seed: int | None = None
    arguments: dict = field(default_factory=dict)
    id: str = ""
    where: str = ""
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """How many pictures are asked for."""
        return self.arguments.get("num_images_per_prompt", 1)

    @property
    def num_seeds(self) -> int:
        """How many pictures or captions are drawn: more, if the best of several are kept."""
        counts = ("num_images_per_prompt", "num_captions_per_image", "num_candidates")
        return max(self.arguments.get(name, 1) for name in counts)

    def file_names(self) -> list[str]:
        """`<id>.png`, or `<id>-1.png`, `<id>-2.png`, ... if there are several pictures."""
        return numbered(f"{self.id}.png", self.num_images)


def numbered(name: str, count: int) -> list[str]:
    """Names for so many files: the name itself for one, else with `-1`, `-2`, ... before the ending."""
    path = Path(name)
    return [name] if count == 1 else [f"{path.stem}-{index}{path.suffix}" for index in range(1, count + 1)]


def check_arguments(values: dict, kind: Kind = GENERATE) -> dict:
    """
    The arguments with a value, each checked.

    Raises:
        ValueError: If one has the wrong type or range.
    """
    checked = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            checked[name] = kind.arguments[name](value)
        except ValueError as error:
            raise ValueError(f"`{name}` must be {error}, but is {value!r}.") from None
    return checked


def check_prompt(prompt, name: str = "prompt") -> str:
    """
    The prompt, if it is a text and says something.

    Args:
        prompt: What came.
        name (`str`): What messages call it.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"`{name}` must be a text, but is {prompt!r}.")
    if not prompt.strip():
        raise ValueError(f"`{name}` must not be empty. Say what the picture shows.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` must be Unicode text, but {prompt!r} is not.") from None
    if "\0" in prompt:
        raise ValueError(f"`{name}` must not hold the character NUL, but is {prompt!r}.")
    return prompt


def check_seed(seed, num_seeds: int) -> int:
    """
    The seed, if it and those of the following pictures can be used.

    Raises:
        ValueError: If not.
    """
    largest = LARGEST_SEED - (num_seeds - 1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= largest:
        raise ValueError(f"`seed` must be a whole number from 0 to {largest}, but is {seed!r}.")
    return seed


def choose_seed(seed: int | None) -> int:
    """The seed, or one that nobody can foresee where none is given."""
    return random.SystemRandom().randrange(2**31) if seed is None else seed


def _parse_line(line: str, kind: Kind, folder: Path, defaults: dict, seed: int | None) -> Request:
    values = parse_object(line)
    unknown = [name for name in values if name not in kind.fields]
    if unknown:
        raise ValueError(f"has unknown fields: {', '.join(unknown)}. Known: {', '.join(kind.fields)}.")
    missing = [name for name in kind.required if name not in values]
    if missing:
        raise ValueError(f"lacks {' and '.join(f'`{name}`' for name in missing)}.")
    own = check_arguments({name: value for name, value in values.items() if name in kind.arguments}, kind)
    prompt = values.get("prompt") or "" if "prompt" not in kind.required else values["prompt"]
    request = Request(
        check_prompt(prompt) if prompt or "prompt" in kind.required else "",
        arguments={**defaults, **own},
        id=check_id(values["id"]),
        files={name: _check_file(name, values[name], folder) for name in kind.files if values.get(name) is not None},
    )
    request.seed = seed if values.get("seed") is None else values["seed"]
    if request.seed is not None:
        check_seed(request.seed, request.num_seeds)
    if kind is INPAINT:
        check_area(request)
    return request


def _check_file(name: str, value, folder: Path) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"`{name}` must be the path of a file, but is {value!r}.")
    try:
        return folder / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"`{name}`: {value} cannot be found ({error})") from None


def check_area(request: Request) -> None:
    """
    See that a request of inpainting says where to paint, and only once.

    Raises:
        ValueError: If not.
    """
    if ("mask" in request.files) == any(request.arguments.get(name) for name in MARGINS):
        raise ValueError(f"must say where to paint: either by a mask, or by some of {', '.join(MARGINS)}.")


def read_requests(
    path: Path, kind: Kind, defaults: dict, seed: int | None, option: str = "--requests"
) -> tuple[list[Request], list[str]]:
    """
    Read a JSONL file: on each line an object with the fields of its kind.

    Args:
        path (`Path`): The file, UTF-8; empty lines are passed over. Files that lines name are looked for beside it.
        kind (`Kind`): For which command.
        defaults (`dict`): Arguments for the lines that do not have them.
        seed (`int`, *optional*): Likewise.
        option (`str`): What messages call the file.

    Returns:
        `tuple[list[Request], list[str]]`: The requests, and what is wrong with the other lines.

    Raises:
        ValueError: If the file cannot be read as text.
    """
    try:
        lines = list(read_lines(path))
    except ValueError as error:
        raise ValueError(f"`{option}`: {error}") from error
    requests, errors = [], []
    for number, line in lines:
        try:
            request = _parse_line(line, kind, path.parent, defaults, seed)
        except ValueError as error:
            errors.append(f"{path}, line {number}: {error}")
        else:
            request.where = f"{path}, line {number}"
            requests.append(request)
    if not requests and not errors:
        errors.append(f"{path} has no lines.")
    names = [
        (request.where, request.id, request.file_names() if kind.writes_pictures else [request.id])
        for request in requests
    ]
    return requests, errors + clashes(names, kind.writes_pictures)
