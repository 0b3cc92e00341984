"""Arguments of the calls: prompts, counts, output types, generators. Each is checked here, once."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
from diffusers import DiffusionPipeline

from ...generation.sampling import Generators
from .settings import MOST_COUNT, MOST_PER_CALL, whole_number

Value = TypeVar("Value")
Count = TypeVar("Count", bound=int | None)  # `None` comes back where it may be given
PromptTranslator = Callable[[str], str]


def check_prompts(prompt: str | Sequence[str], allow_empty: bool = False) -> list[str]:
    """The prompts as a list, if they are texts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
    if not prompts or not (allow_empty or all(text.strip() for text in prompts)):
        raise ValueError(f"`prompt` must not be empty, but is {prompt!r}. Say what the picture shows.")
    return [check_text("prompt", text) for text in prompts]


def check_text(name: str, text: str) -> str:
    """The text, if it is Unicode: half of a surrogate pair is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` must be Unicode text, but {quote(text)} is not.") from None
    return text


def one_per_prompt(name: str, texts: str | Sequence[str], num_prompts: int) -> list[str]:
    """One text for each prompt; a single text is used for all."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be a string or a list of strings, but is {texts!r}.")
    if len(texts) not in (1, num_prompts):
        raise ValueError(f"`{name}` must be one, or one per prompt ({num_prompts}), but there are {len(texts)}.")
    return [check_text(name, text) for text in texts] * (num_prompts if len(texts) == 1 else 1)


def quote(text: str, longest: int = 60) -> str:
    """A text in a message, or its beginning."""
    return repr(text if len(text) <= longest else f"{text[:longest].rstrip()}…")


def translate(prompts: list[str], prompt_translator: PromptTranslator | None) -> list[str]:
    """What the caller's translator makes of each prompt."""
    if prompt_translator is None:
        return prompts
    translated = [prompt_translator(prompt) if prompt.strip() else prompt for prompt in prompts]
    for prompt, text in zip(prompts, translated):
        if not isinstance(text, str) or (prompt.strip() and not text.strip()):
            raise ValueError(f"`prompt_translator` must return a text, but made {text!r} of {prompt!r}.")
    return [check_text("prompt_translator", text) for text in translated]


def check_taken(pipe: DiffusionPipeline, names: Iterable[str]) -> None:
    """
    See that the call of a pipeline takes all of these arguments: other families have others.

    Raises:
        ValueError: If not; the message names the first that it does not take.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name in names:
        if name not in taken and not takes_all:
            raise ValueError(
                f"`{name}` has no meaning for this model, which is a {type(pipe).__name__}. Leave it out."
            )


def check_counts(**counts: Count) -> tuple[Count, ...]:
    """The named arguments as plain numbers, if each is `None` or a whole number of at least 1."""
    checked = (None if value is None else whole_number(name, value) for name, value in counts.items())
    return tuple(cast("Count", value) for value in checked)


def check_numbers_drawn(num_prompts: int, **counts: Count) -> tuple[Count, ...]:
    """As [`check_counts`], of what is drawn for each prompt or picture: no more than memory has room for."""
    checked = tuple(
        cast("Count", None if value is None else whole_number(name, value, most=MOST_COUNT))
        for name, value in counts.items()
    )
    for name, value in zip(counts, checked):
        if value is not None and num_prompts * value > MOST_PER_CALL:
            raise ValueError(
                f"`{name}` may be {MOST_PER_CALL // num_prompts} for {num_prompts} at a time, but is {value}. Make "
                "several calls."
            )
    return checked


def check_choice(name: str, value: str, possible: Sequence[str]) -> None:
    """Raise an error unless the value is one of those possible."""
    if value not in possible:
        raise ValueError(f"`{name}` must be one of {tuple(possible)}, but is {value!r}.")


def check_tokens(
    tokens: torch.Tensor, num_image_tokens: int, grid: tuple[int, int], may_be_larger: bool = False
) -> torch.Tensor:
    """Image tokens of the caller, `(num_images, rows, columns)`, if they are codes in a grid of this size."""
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"`tokens` must be a torch tensor, but is of type `{type(tokens).__name__}`.")
    size = tuple(tokens.shape[1:])
    fits = size == grid or (may_be_larger and all(own >= least for own, least in zip(size, grid)))
    if tokens.ndim != 3 or not len(tokens) or not fits:
        least = "at least " if may_be_larger else ""
        raise ValueError(
            f"`tokens` must have the shape (num_images, rows, columns) with {least}{grid[0]} x {grid[1]} tokens per "
            f"picture, but have {tuple(tokens.shape)}."
        )
    if tokens.is_floating_point() or not 0 <= int(tokens.min()) <= int(tokens.max()) < num_image_tokens:
        raise ValueError(
            f"`tokens` must be image codes, whole numbers in 0..{num_image_tokens - 1}, but are {tokens.dtype} in "
            f"{tokens.min().item()}..{tokens.max().item()}."
        )
    return tokens.long()


def one_generator_per_image(generator: Generators, num_images: int) -> list[torch.Generator]:
    """
    A generator for each picture, whose seed makes the picture again: the caller's if it is fresh, else a new one whose
    seed comes from the caller's, or from chance.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != num_images or not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(
                f"`generator` must be one generator or one per picture ({num_images}), but is {generator}."
            )
        return [one if _is_fresh(one) else _new_generator(one) for one in generator]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, but is {generator!r}.")
    if generator is not None and num_images == 1 and _is_fresh(generator):
        return [generator]
    return [_new_generator(generator) for _ in range(num_images)]


def _is_fresh(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn since the seed was set."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), fresh.get_state())


def _new_generator(source: torch.Generator | None) -> torch.Generator:
    device = "cpu" if source is None else source.device
    seed = int(torch.randint(2**63 - 1, (), generator=source, device=device))
    return torch.Generator("cpu").manual_seed(seed)


def run_lengths(values: Sequence[Value]) -> tuple[list[Value], list[int]]:
    """Neighbouring equal values as one, with their numbers."""
    groups = [list(group) for _, group in itertools.groupby(values)]
    return [group[0] for group in groups], [len(group) for group in groups]
