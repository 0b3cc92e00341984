"""What the file of a picture says of how it was made: the same on the command line and from a server."""

import hashlib
from collections.abc import Mapping
from typing import Any

from ...environment import versions


def chosen_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Those with a value of what `check_inputs` of a pipeline gives: a call with them makes the same pictures.

    Args:
        settings (`Mapping`): Arguments of the pipeline's call, by name.
    """
    return {name: value for name, value in settings.items() if value not in (None, "")}


def of_generation(
    prompt: str,
    seed: int,
    settings: Mapping[str, Any],
    num_candidates: int | None = None,
    first_seed: int | None = None,
    score: float | None = None,
) -> dict[str, Any]:
    """
    Of a picture that was made from its prompt alone.

    Args:
        prompt (`str`): The text.
        seed (`int`): Of the picture itself.
        settings (`Mapping`): Style, size and settings: arguments of the pipeline's call, all that matter.
        num_candidates (`int`, *optional*): Of how many it was chosen.
        first_seed (`int`, *optional*): That of the first candidate.
        score (`float`, *optional*): By which it was chosen.
    """
    chosen = {}
    if num_candidates is not None:
        chosen["post_selection"] = {"num_candidates": num_candidates, "seed": first_seed, "score": score}
    return {"prompt": prompt, "seed": seed, "settings": dict(settings), **chosen}


def of_change(
    command: str, prompt: str, seed: int, settings: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """
    Of a picture that was made from another one.

    Args:
        command (`str`): Of the command line, that does so.
        prompt, seed: As for [`of_generation`].
        settings (`Mapping`): The arguments that were given.
        inputs (`Mapping`): By its argument, each file as [`of_input`] tells it.
    """
    return {"command": command, "prompt": prompt, "seed": seed, "settings": dict(settings), "inputs": dict(inputs)}


def of_input(content: bytes, file: str | None = None) -> dict[str, str]:
    """
    Of a file that a picture was made from, so that a change of it is noticed.

    Args:
        content (`bytes`): Of the file.
        file (`str`, *optional*): Its name, without its folder.
    """
    named = {} if file is None else {"file": file}
    return {**named, "sha256": hashlib.sha256(content).hexdigest()}


def of_maker(model: Mapping[str, Any], pipe: Any) -> dict[str, Any]:
    """
    Of what made a picture, beside the above.

    Args:
        model (`Mapping`): What results say of the model: its name, fingerprint, adapters and `int8`.
        pipe: The pipeline, for its number format.
    """
    return {**model, "dtype": str(pipe.vqvae.dtype).removeprefix("torch."), "versions": versions()}
