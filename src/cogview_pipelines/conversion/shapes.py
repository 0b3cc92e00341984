"""Whether the tensors of a file are those of a model."""

from collections.abc import Mapping
from typing import Any

import torch

from .reader import ConversionError


def expected_shapes(model_class: type, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model of this configuration saves; nothing is allocated."""
    with torch.device("meta"):
        model = model_class(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


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
