"""What callers know from models of transformers: done as there, or refused in a sentence."""

from typing import Any

import torch
from torch import nn

# Arguments that models of transformers take and these do not, and the values of them that ask for nothing.
UNUSED_ARGUMENTS = {
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "use_cache": (None, False),
    "past_key_values": (None,),
    "inputs_embeds": (None,),
    "token_type_ids": (None,),
}


def refuse_unused(model: nn.Module, arguments: dict[str, Any]) -> None:
    """
    Raise an error where a caller expects what models of transformers do and this one does not.

    Raises:
        TypeError: That names the first such argument.
    """
    for name, value in arguments.items():
        if name not in UNUSED_ARGUMENTS:
            raise TypeError(f"`{type(model).__name__}.forward` has no argument `{name}`.")
        if not any(value is accepted for accepted in UNUSED_ARGUMENTS[name]):
            raise TypeError(
                f"`{name}` must be left out, but is {value!r}: `{type(model).__name__}` returns an object with its "
                "`logits`, keeps keys and values in the `cache` that it is given, and computes no attention maps."
            )


def every_row(attention_mask: torch.Tensor | None, num_rows: int, causal: bool = False) -> torch.Tensor | None:
    """
    A mask of keys, as a tokenizer gives it, for every row; masks of rows and keys stay as they are.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, keys)` or `(batch_size, rows, keys)`, *optional*):
            Truth values or 0 and 1: whether a key is seen. Floats are for the second shape only.
        num_rows (`int`): Rows, which are the last keys.
        causal (`bool`): Whether a row sees no later key; of masks of rows and keys, this is their own affair.

    Returns:
        `torch.Tensor` of shape `(batch_size, rows, keys)`: Truth values, or floats to add; or `None`.

    Raises:
        ValueError: If the mask has another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim == 3:
        return attention_mask if attention_mask.is_floating_point() else attention_mask.bool()
    if attention_mask.ndim != 2 or attention_mask.is_floating_point():
        kind = "of floats " if attention_mask.is_floating_point() else ""
        raise ValueError(
            "`attention_mask` must be `(batch_size, rows, keys)`, or that of a tokenizer, whole numbers or truth "
            f"values of `(batch_size, keys)`, but is {kind}{tuple(attention_mask.shape)}."
        )
    seen = attention_mask.bool()[:, None].expand(-1, num_rows, -1)
    if causal:
        num_keys = attention_mask.shape[1]
        seen = seen & seen.new_ones(num_rows, num_keys).tril(num_keys - num_rows)
    return seen
