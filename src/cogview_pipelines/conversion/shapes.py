"""Whether the tensors of a file are those of a model."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .errors import ConversionError


def expected_shapes(model_class: type, config) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of all tensors that a model of this configuration saves; nothing is allocated.

    Raises:
        ConversionError: If there is no such model.
    """
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise ConversionError(
            f"The sizes of the tensors make no `{model_class.__name__}` ({str(error).splitlines()[0][:200]})."
        ) from error
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def sizes_of(tensors: Mapping[str, Any], key: str, dimensions: int, name: str) -> tuple[int, ...]:
    """
    The sizes of a tensor from which a configuration is read; none is 0.

    Args:
        tensors: Anything with a `shape`, by name.
        key (`str`): Of the tensor.
        dimensions (`int`): That it must have.
        name (`str`): Of the file, for the message.

    Raises:
        ConversionError: If it has another number of dimensions, or no element.
        KeyError: If it is not there.
    """
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ConversionError(f"{name}: `{key}` must have {dimensions} dimensions and elements, but is {shape}.")
    return shape


def count_layers(tensors: Iterable[str], name: str) -> int:
    """
    The number of layers, by the names of their tensors, `layers.N.…`.

    Raises:
        ConversionError: If some are missing in between.
    """
    layers = {int(match[1]) for key in tensors if (match := re.match(r"layers\.(\d{1,6})\.", key))}
    missing = sorted(set(range(len(layers))) - layers)
    if missing or not layers:
        raise ConversionError(f"{name} has gaps in its layers: {missing[:8] or 'all'} are missing.")
    return len(layers)


def check_shapes(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], name: str) -> list[str]:
    """
    Compare names and shapes of tensors with what the model needs.

    Args:
        found: Tensors (anything with a `shape`) by our names.
        expected: Shapes by our names.
        name (`str`): Of the file, for the message.

    Returns:
        `list[str]`: Names that the model does not know.

    Raises:
        ConversionError: That lists every missing and every misshapen tensor.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    misshapen = [
        f"{key}: is {tuple(found[key].shape)}, must be {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {'; '.join(misshapen)}")
    if problems:
        if surplus:
            problems.append(f"{len(surplus)} unknown: {', '.join(surplus)}")
        raise ConversionError(f"{name} does not fit the model.\n  " + "\n  ".join(problems))
    return surplus
