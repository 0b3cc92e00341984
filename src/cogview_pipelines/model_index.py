"""What the `model_index.json` of a saved pipeline says."""

from collections.abc import Mapping
from typing import Any


def has_component(index: Mapping[str, Any], name: str) -> bool:
    """Whether the pipeline was saved with a component; what was left out is there as `[null, null]`, or not at all."""
    return index.get(name, [None])[0] is not None
