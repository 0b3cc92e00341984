"""Arguments of the calls: prompts, counts, output types, generators. Each is checked here, once."""

from collections.abc import Callable, Sequence

import torch

from ...generation.sampling import Generators

PromptTranslator = Callable[[str], str]


def check_prompts(prompt: str | Sequence[str], allow_empty: bool = False) -> list[str]:
    """The prompts as a list, if they are strings."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
    if not prompts or not (allow_empty or all(text.strip() for text in prompts)):
        raise ValueError(f"`prompt` must not be empty, but is {prompt!r}. Say what the picture shows.")
    return list(prompts)


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
    return translated


def check_counts(**counts: int | None) -> None:
    """Raise an error unless each of the named arguments is `None` or a whole number of at least 1."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, but is {value!r}.")


def check_output_type(output_type: str, possible: Sequence[str]) -> None:
    """Raise an error unless the output type is one of those possible."""
    if output_type not in possible:
        raise ValueError(f"`output_type` must be one of {tuple(possible)}, but is {output_type!r}.")


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


def run_lengths(texts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Neighbouring equal texts as one, with their numbers: each is encoded once."""
    unique: list[list[int]] = []
    repeats: list[int] = []
    for text in texts:
        if unique and unique[-1] == text:
            repeats[-1] += 1
        else:
            unique.append(text)
            repeats.append(1)
    return unique, repeats
