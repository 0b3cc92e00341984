"""Loading a model that is whole, or not at all."""

import operator
import os
from collections.abc import Iterable, Sequence

import torch

MAX_LAYERS = 1000  # twenty times as many as the largest release has
MAX_NAMES = 16  # in a message


class WholeModelMixin:
    """
    A `PreTrainedModel` that is loaded with all of its weights.

    transformers leaves random numbers in the place of weights that a file lacks, and passes over those that the model
    does not know; both with a warning.
    """

    _supports_sdpa: bool

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers, but in float32 by default, as the pipelines are, whatever the number format of the files.

        Args:
            pretrained_model_name_or_path (`str` or path): A folder, or an id on the Hub.
            dtype (`torch.dtype` or `"auto"`, defaults to `torch.float32`): Number format of the weights; `"auto"`
                takes that of the files.
            attn_implementation (`str`, *optional*): May be `"sdpa"`, which is what the models compute with.
            args, kwargs: Further arguments of transformers: `revision`, `variant`, `token`, `subfolder`, `device_map`.

        Raises:
            ValueError: If the files lack weights of the model, hold others, or some of another shape; with
                `ignore_mismatched_sizes=True` those of another shape are made anew, as in transformers. Or if another
                `attn_implementation` is asked for.
        """
        attention = kwargs.get("attn_implementation")
        if attention not in (None, "sdpa"):
            raise ValueError(
                f"`attn_implementation` must be 'sdpa' or left out, but is {attention!r}: {cls.__name__} computes "
                "with PyTorch's attention and with kernels of its own, and chooses among them by itself."
            )
        if cls._supports_sdpa is False:  # a convolutional network, to which transformers would not take the word
            kwargs.pop("attn_implementation", None)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        ignores_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        mismatched = {} if ignores_shapes else {key: shapes for key, *shapes in info["mismatched_keys"]}
        problems = {
            "missing": sorted(set(info["missing_keys"]) - {key for key, *_ in info["mismatched_keys"]}),
            "unknown": sorted(info["unexpected_keys"]),
            "of another shape": [
                f"{key} (is {tuple(found)}, must be {tuple(wanted)})"
                for key, (found, wanted) in sorted(mismatched.items())
            ],
        }
        told = [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in problems.items() if names]
        if told:
            raise ValueError(
                f"The weights in {os.fspath(pretrained_model_name_or_path)} are not those of a `{cls.__name__}` with "
                f"its `config.json`: {'; '.join(told)}. Copy or save the model again."
            )
        return (model, info) if output_loading_info else model


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def check_grid(name: str, value: Sequence[int]) -> tuple[int, int]:
    """
    Rows and columns of a configuration, or height and width.

    Raises:
        ValueError: If the value is not two whole numbers from 1 on.
    """
    try:
        rows, columns = map(operator.index, value)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise ValueError(f"`{name}` must be two whole numbers from 1 on, but is {value!r:.200}.")
    return rows, columns


def check_count(name: str, value: int, most: int = MAX_LAYERS) -> None:
    """
    Keep a configuration from asking for a model that takes for ever to build.

    Raises:
        ValueError: If the value is no number from 1 to `most`.
    """
    try:
        is_count = 1 <= operator.index(value) <= most
    except TypeError:
        is_count = False
    if not is_count:
        raise ValueError(f"`{name}` must be a number from 1 to {most}, but is {value!r}.")
