"""Names of tensors: how the CogView release writes them, and how this package does."""

import re
from collections.abc import Iterable

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
