"""What is asked of a model: prompts with their settings, checked before anything is computed."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

LARGEST_SEED = 2**63 - 1
LONGEST_ID = 100  # characters


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


def _positive_number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError("a number above 0")
    return float(value)


def _whole_numbers(value) -> int | list[int]:
    try:
        return [_whole_number(entry) for entry in value] if isinstance(value, list) else _whole_number(value)
    except ValueError:
        raise ValueError("a whole number of at least 1, or a list of them, one per pass") from None


# The arguments of the pipeline's call that a request may have, and how each is checked.
ARGUMENTS: dict[str, Callable] = {
    "num_images_per_prompt": _whole_number,
    "num_candidates": _whole_number,
    "style": _text,
    "height": _whole_number,
    "width": _whole_number,
    "guidance_scale": _number,
    "negative_prompt": _text,
    "text_attention_bias": _number,
    "temperature": _positive_number,
    "top_k_clusters": _whole_number,
    "cluster_temperature": _positive_number,
    "direct_sr_temperature": _positive_number,
    "direct_sr_top_k_clusters": _whole_number,
    "direct_sr_cluster_temperature": _positive_number,
    "iterative_sr_temperature": _positive_number,
    "iterative_sr_top_k": _whole_numbers,
    "num_lopar_steps": lambda value: _whole_number(value, least=0),
    "max_batch_size": _whole_number,
}
FIELDS = ("id", "prompt", "seed", *ARGUMENTS)


@dataclass
class Request:
    """
    One prompt and how its pictures are to be made.

    Args:
        prompt (`str`): The text.
        seed (`int`, *optional*): Of the first picture; picture `i` has `seed + i`.
        arguments (`dict`): Arguments of the pipeline's call.
        id (`str`): Name of the file, without its ending.
        where (`str`): How messages call it: file and line.
    """

    prompt: str
    seed: int | None = None
    arguments: dict = field(default_factory=dict)
    id: str = ""
    where: str = ""

    @property
    def num_images(self) -> int:
        """How many pictures are asked for."""
        return self.arguments.get("num_images_per_prompt", 1)

    @property
    def num_seeds(self) -> int:
        """How many pictures are drawn: more, if the best of several are kept."""
        return max(self.num_images, self.arguments.get("num_candidates", 1))

    def file_names(self) -> list[str]:
        """`<id>.png`, or `<id>-1.png`, `<id>-2.png`, ... if there are several pictures."""
        return numbered(f"{self.id}.png", self.num_images)


def numbered(name: str, count: int) -> list[str]:
    """Names for so many files: the name itself for one, else with `-1`, `-2`, ... before the ending."""
    path = Path(name)
    return [name] if count == 1 else [f"{path.stem}-{index}{path.suffix}" for index in range(1, count + 1)]


def check_arguments(values: dict) -> dict:
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
            checked[name] = ARGUMENTS[name](value)
        except ValueError as error:
            raise ValueError(f"`{name}` must be {error}, but is {value!r}.") from None
    return checked


def check_prompt(prompt) -> str:
    """
    The prompt, if it is a text and says something.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` must be a text, but is {prompt!r}.")
    if not prompt.strip():
        raise ValueError("`prompt` must not be empty. Say what the picture shows.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"`prompt` must be Unicode text, but {prompt!r} is not.") from None
    if "\0" in prompt:
        raise ValueError(f"`prompt` must not hold the character NUL, but is {prompt!r}.")
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


def _check_id(value) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\w[\w.-]*", text) or len(text) > LONGEST_ID:
        raise ValueError(
            f"`id` must be up to {LONGEST_ID} letters, digits, `_`, `-` and `.`, and begin with a letter, digit or `_`"
            f" (it names the file), but is {value!r}."
        )
    return text


def _parse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _parse_line(line: str, defaults: dict, seed: int | None) -> Request:
    try:
        values = json.loads(line, parse_constant=_parse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object such as {{'id': 'x', 'prompt': 'a tiger'}}, but is {line.strip()!r}.")
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise ValueError(f"has unknown fields: {', '.join(unknown)}. Known: {', '.join(FIELDS)}.")
    missing = [name for name in ("id", "prompt") if name not in values]
    if missing:
        raise ValueError(f"lacks {' and '.join(f'`{name}`' for name in missing)}.")
    own = check_arguments({name: value for name, value in values.items() if name in ARGUMENTS})
    request = Request(check_prompt(values["prompt"]), arguments={**defaults, **own}, id=_check_id(values["id"]))
    request.seed = seed if values.get("seed") is None else values["seed"]
    if request.seed is not None:
        check_seed(request.seed, request.num_seeds)
    return request


def read_requests(path: Path, defaults: dict, seed: int | None) -> tuple[list[Request], list[str]]:
    """
    Read a JSONL file: on each line `id`, `prompt`, and optionally `seed` and arguments of the pipeline's call.

    Args:
        path (`Path`): The file, UTF-8; empty lines are passed over.
        defaults (`dict`): Arguments for the lines that do not have them.
        seed (`int`, *optional*): Likewise.

    Returns:
        `tuple[list[Request], list[str]]`: The requests, and what is wrong with the other lines.

    Raises:
        ValueError: If the file cannot be read as text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"`--prompts`: cannot read {path}: {reason}.") from error
    requests, errors = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _parse_line(line, defaults, seed)
        except ValueError as error:
            errors.append(f"{path}, line {number}: {error}")
        else:
            request.where = f"{path}, line {number}"
            requests.append(request)
    if not requests and not errors:
        errors.append(f"{path} has no lines.")
    return requests, errors + _clashes(requests)


def _clashes(requests: Iterable[Request]) -> list[str]:
    """Requests that would write the same file; also where the file system does not tell upper from lower case."""
    errors, first = [], {}
    for request in requests:
        for name in request.file_names():
            other = first.setdefault(name.casefold(), request)
            if other is not request:
                errors.append(f"{request.where}: `id` {request.id!r} would write {name} again, after {other.where}.")
                break
    return errors
