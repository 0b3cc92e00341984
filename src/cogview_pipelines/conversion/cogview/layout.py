"""Names, shapes and configurations: how the CogView release writes them, and how this package does."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...models.cogview.modeling_cogview import CogViewConfig
from ...models.cogview.tokenization_cogview import COMMAND_TOKENS
from ...models.image_tokenizers.modeling_cogview_vq import CogViewVQConfig
from ..reader import CHUNK_BYTES, ConversionError, LoadedTensor, ReadableTensor
from ..shapes import count_layers, sizes_of
from ..writer import hash_tensor

RELEASED_HEAD_DIM = 64
RELEASED_COMMAND_TOKEN_ID = 58192
# Our components, and the folders of the release.
STAGES = {
    "transformer": "cogview-base",
    "caption_transformer": "cogview-caption",
    "super_resolution_transformer": "cogview-sr",
}

_NORMS = {
    "input_layernorm": "attention_layernorm",
    "third_layernorm": "attention_output_layernorm",
    "post_attention_layernorm": "mlp_layernorm",
    "fourth_layernorm": "mlp_output_layernorm",
}
_TRANSFORMER_RULES = [  # (pattern of the released key, its replacement; pattern of our key, its replacement)
    *(
        (
            rf"transformer\.layers\.(\d+)\.{old}\.",
            rf"layers.\1.{new}.",
            rf"layers\.(\d+)\.{new}\.",
            rf"transformer.layers.\1.{old}.",
        )
        for old, new in _NORMS.items()
    ),
    (r"word_embeddings\.", "word_embeddings.", r"word_embeddings\.", "word_embeddings."),
    (r"transformer\.", "", "", "transformer."),
]
_IMAGE_RULES = [
    (r"enc_b\.blocks\.", "encoder.", r"encoder\.", "enc_b.blocks."),
    (r"dec\.blocks\.", "decoder.", r"decoder\.", "dec.blocks."),
    (r"quantize_t\.embed$", "quantize.embed.weight", r"quantize\.embed\.weight$", "quantize_t.embed"),
    (r"quantize_t\.", "quantize.", r"quantize\.", "quantize_t."),
]
# Codes are columns in the release and rows here.
TRANSPOSED = ("quantize.embed.weight", "quantize.embed_avg")


def _rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key, count=1)
    return key


def transformer_key(released: str) -> str:
    """Our name of a tensor of a released transformer."""
    return _rename(released, [rule[:2] for rule in _TRANSFORMER_RULES])


def released_transformer_key(key: str) -> str:
    """The release's name of a tensor of [`CogViewModel`]."""
    return _rename(key, [rule[2:] for rule in _TRANSFORMER_RULES])


def image_tokenizer_key(released: str) -> str:
    """Our name of a tensor of the released image tokenizer."""
    return _rename(released.removeprefix("module."), [rule[:2] for rule in _IMAGE_RULES])


def released_image_tokenizer_key(key: str) -> str:
    """The release's name of a tensor of [`CogViewVQModel`]."""
    return _rename(key, [rule[2:] for rule in _IMAGE_RULES])


# Model-parallel ranks ------------------------------------------------------------------------------------------------

# How a tensor is cut into ranks, by the end of its name; all others are whole in each.
_CUTS = {
    "word_embeddings.weight": "rows",
    "attention.query_key_value.weight": "thirds",
    "attention.query_key_value.bias": "thirds",
    "attention.dense.weight": "columns",
    "mlp.dense_h_to_4h.weight": "rows",
    "mlp.dense_h_to_4h.bias": "rows",
    "mlp.dense_4h_to_h.weight": "columns",
}


def cut_of(key: str) -> str | None:
    """How a tensor of ours is cut into ranks: `"rows"`, `"columns"`, rows of each of `"thirds"`, or not (`None`)."""
    return next((cut for end, cut in _CUTS.items() if key.endswith(end)), None)


@dataclass
class JoinedTensor:
    """
    A tensor whose parts are in the files of several ranks, behind the interface of [`StoredTensor`].

    Args:
        parts (`list`): Of each rank.
        cut (`str`): As [`cut_of`] says.
    """

    parts: list[ReadableTensor]
    cut: str

    def __post_init__(self):
        axis = 1 if self.cut == "columns" else 0
        shape = list(self.parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in self.parts)
        self.shape, self.dtype = tuple(shape), self.parts[0].dtype
        self.nbytes = sum(part.nbytes for part in self.parts)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The elements in row-major order, some bytes at a time."""
        if self.cut == "rows":
            for part in self.parts:
                yield from part.chunks(chunk_bytes)
        else:  # of one layer: some megabytes
            yield from LoadedTensor(self.read()).chunks(chunk_bytes)

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        parts = [part.read() for part in self.parts]
        if self.cut == "thirds":
            thirds = zip(*(part.chunk(3) for part in parts))
            return torch.cat([torch.cat(third) for third in thirds])
        return torch.cat(parts, 1 if self.cut == "columns" else 0)


def join_ranks(
    ranks: Sequence[Mapping[str, ReadableTensor]], name: str
) -> tuple[dict[str, ReadableTensor], list[str]]:
    """
    The tensors of a model, by our names, out of those of its ranks by the release's.

    Returns:
        tuple: The tensors, and the names of those that should be the same in all ranks and are not; of these, the
        first rank's are taken.

    Raises:
        ConversionError: If the ranks do not hold the same tensors, or shapes that do not fit together.
    """
    named = [{transformer_key(key): tensor for key, tensor in rank.items()} for rank in ranks]
    if len(named) == 1:
        return dict(named[0]), []
    keys = [set(rank) for rank in named]
    different = sorted(set().union(*keys) - keys[0].intersection(*keys))
    if different:
        raise ConversionError(f"{name}: its {len(named)} ranks do not hold the same tensors: {', '.join(different)}.")
    tensors: dict[str, ReadableTensor] = {}
    unequal = []
    for key, first in named[0].items():
        parts = [rank[key] for rank in named]
        if any(part.dtype != first.dtype or part.shape != first.shape for part in parts):
            raise ConversionError(f"{name}: `{key}` has another shape or dtype in one rank than in another.")
        cut = cut_of(key)
        if cut is not None:
            tensors[key] = JoinedTensor(parts, cut)
        else:
            tensors[key] = first
            if len({hash_tensor(part) for part in parts}) > 1:
                unequal.append(key)
    return tensors, unequal


# Configurations ------------------------------------------------------------------------------------------------------


def transformer_config(
    tensors: Mapping[str, Any],
    num_image_tokens: int,
    command_token_id: int,
    num_attention_heads: int | None,
    name: str,
) -> CogViewConfig:
    """
    The configuration of a released transformer, whose sizes are read from the tensors.

    Args:
        tensors: Of the file, by our names.
        num_image_tokens (`int`): Image codes.
        command_token_id (`int`): Of the text tokenizer that belongs to it.
        num_attention_heads (`int`, *optional*): The tensors do not tell; by default 64 dimensions each.
        name (`str`): Of the file, for messages.

    Raises:
        ConversionError: If it is no CogView transformer, or the numbers do not fit it.
    """
    for key in ("word_embeddings.weight", "position_embeddings.weight"):
        if key not in tensors:
            raise ConversionError(f"{name} has no `{released_transformer_key(key)}`, so it is no CogView transformer.")
    vocab_size, hidden_size = sizes_of(tensors, "word_embeddings.weight", 2, name)
    max_length, _ = sizes_of(tensors, "position_embeddings.weight", 2, name)
    num_layers = count_layers(tensors, name)
    heads = num_attention_heads or hidden_size // RELEASED_HEAD_DIM
    if not heads or hidden_size % heads:
        raise ConversionError(
            f"{name}: `num_attention_heads` must be a divisor of the width {hidden_size}, but is {heads}. The tensors "
            "do not tell it; give the number that the model was trained with."
        )
    if command_token_id + len(COMMAND_TOKENS) > vocab_size:
        raise ConversionError(
            f"{name}: the command tokens begin with {command_token_id}, but there are only {vocab_size} rows of word "
            "embeddings. Give the text tokenizer that belongs to this checkpoint."
        )
    first = tensors.get("layers.0.mlp.dense_h_to_4h.weight")
    return CogViewConfig(
        vocab_size=vocab_size,
        num_image_tokens=num_image_tokens,
        command_token_id=command_token_id,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size if first is None else first.shape[0],
        max_position_embeddings=max_length,
        max_super_resolution_length=max_length + 256,
    )


def image_tokenizer_config(tensors: Mapping[str, Any], name: str) -> CogViewVQConfig:
    """The configuration of a released image tokenizer, whose sizes are read from its tensors."""
    try:
        num_embeddings, embedding_dim = sizes_of(tensors, "quantize.embed.weight", 2, name)
        channels = sizes_of(tensors, "encoder.0.weight", 4, name)[0]
    except KeyError as error:
        raise ConversionError(
            f"{name} has no `{released_image_tokenizer_key(error.args[0])}`, so it is no image tokenizer of CogView."
        ) from None
    halvings = len({key.split(".")[1] for key in tensors if key.startswith("encoder.")}) - 1
    return CogViewVQConfig(
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        hidden_channels=channels,
        num_halvings=halvings,
    )


def check_released(config: CogViewConfig) -> None:
    """
    Raises:
        ConversionError: If the original code cannot run a model of this configuration.
    """
    wanted = {  # constants of the original code
        "image_grid": (32, 32),
        "num_image_tokens": 8192,
        "layer_norm_eps": 1e-5,
        "layer_norm_order": "sandwich",
        "intermediate_size": 4 * config.hidden_size,
    }
    wrong = [
        f"`{key}` is {getattr(config, key)}, not {value}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    if config.norm_scale is None:
        wrong.append("`norm_scale` is None, but the original's norms are relaxed")
    if wrong:
        raise ConversionError(
            "The original code has constants that this model does not share: " + "; ".join(wrong) + "."
        )
