"""Names, shapes and configurations: how the release writes them, and how this package does."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...models.cogview2.modeling_coglm import CogLMConfig, CogLMModel
from ...models.cogview2.modeling_coglm_canvas import CogLMCanvasConfig, CogLMCanvasModel
from ...models.image_tokenizers.modeling_icetk_vq import IcetkVQConfig, IcetkVQModel
from ..errors import ConversionError
from ..shapes import check_shapes, count_layers, expected_shapes, sizes_of  # noqa: F401 (used with this family's models)


@dataclass(frozen=True)
class Stage:
    """
    One of the three transformers.

    Args:
        component (`str`): Its folder in a pipeline.
        released_name (`str`): Its folder in the release.
        super_resolution (`str`, *optional*): As in [`CogLMCanvasConfig`]; `None` is CogLM itself.
        model_class (`str`): Of the release.
        scheduler (`str`, *optional*): The scheduler component that belongs to it.
    """

    component: str
    released_name: str
    super_resolution: str | None
    model_class: str
    scheduler: str | None = None


STAGES = (
    Stage("transformer", "coglm", None, "BaseModel"),
    Stage("direct_sr_transformer", "cogview2-dsr", "direct", "DsrModel", "direct_sr_scheduler"),
    Stage("iterative_sr_transformer", "cogview2-itersr", "iterative", "ItersrModel", "iterative_sr_scheduler"),
)
RELEASED_BOI_TOKEN_ID = 150000
RELEASED_ITERATIONS = {"coglm": "432000", "cogview2-dsr": "20000", "cogview2-itersr": "20000"}

# Key names -----------------------------------------------------------------------------------------------------------

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
    (
        r"mixins\.attention_plus\.(query_key_value|dense)\.(\d+)\.",
        r"layers.\2.canvas_attention.\1.",
        r"layers\.(\d+)\.canvas_attention\.(query_key_value|dense)\.",
        r"mixins.attention_plus.\2.\1.",
    ),
    (
        r"mixins\.extra_position_embedding\.position_embeddings\.",
        "canvas_position_embeddings.",
        r"canvas_position_embeddings\.",
        "mixins.extra_position_embedding.position_embeddings.",
    ),
    (r"transformer\.", "", "", "transformer."),
]
_DECODER_RATES = {"0": "16", "1": "8", "2": "4"}
_IMAGE_RULES = [
    (r"enc\.", "encoder.", r"encoder\.", "enc."),
    *(
        (rf"decs\.{index}\.", f"decoders.{rate}.", rf"decoders\.{rate}\.", f"decs.{index}.")
        for index, rate in _DECODER_RATES.items()
    ),
    (
        r"down_samplers\.(\d+)\.conv_down_sampler\.",
        r"down_samplers.\1.",
        r"down_samplers\.(\d+)\.",
        r"down_samplers.\1.conv_down_sampler.",
    ),
]


def _rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key, count=1)
    return key


def transformer_key(released: str) -> str:
    """Our name of a tensor of the three transformers."""
    return _rename(released, [rule[:2] for rule in _TRANSFORMER_RULES])


def released_transformer_key(key: str) -> str:
    """The release's name of a tensor of [`CogLMModel`] or [`CogLMCanvasModel`]."""
    return _rename(key, [rule[2:] for rule in _TRANSFORMER_RULES])


def image_tokenizer_key(released: str) -> str:
    """Our name of a tensor of `ice_image.pt`."""
    return _rename(released, [rule[:2] for rule in _IMAGE_RULES])


def released_image_tokenizer_key(key: str) -> str:
    """The release's name of a tensor of [`IcetkVQModel`]."""
    return _rename(key, [rule[2:] for rule in _IMAGE_RULES])


# Configurations ------------------------------------------------------------------------------------------------------


def transformer_config(
    tensors: Mapping[str, Any],
    released_config: Mapping[str, Any],
    stage: Stage,
    boi_token_id: int,
    num_image_tokens: int,
    name: str,
) -> CogLMConfig:
    """
    The configuration of a released transformer. Sizes are read from the tensors; only the number of heads must be
    told.

    Args:
        tensors: Of the file, by our names.
        released_config: `model_config.json`.
        stage (`Stage`): Which transformer it is.
        boi_token_id (`int`): Of the text tokenizer that belongs to it.
        num_image_tokens (`int`): Image codes.
        name (`str`): Of the file, for messages.

    Raises:
        ConversionError: If `model_config.json` contradicts the tensors, or says something that this package does not
        do.
    """
    for key in ("word_embeddings.weight", "position_embeddings.weight"):
        if key not in tensors:
            raise ConversionError(
                f"{name} has no `{released_transformer_key(key)}`, so it is no CogView2 transformer."
            )
    vocab_size, hidden_size = sizes_of(tensors, "word_embeddings.weight", 2, name)
    num_positions, _ = sizes_of(tensors, "position_embeddings.weight", 2, name)
    num_layers = count_layers(tensors, name)
    heads = _check_released_config(released_config, {"num_layers": num_layers, "hidden_size": hidden_size}, name)
    if boi_token_id + 2 >= vocab_size:
        raise ConversionError(
            f"{name}: <start_of_image> is token {boi_token_id}, but there are only {vocab_size} rows of word "
            "embeddings. Give the text "
            "tokenizer that belongs to this checkpoint."
        )
    config_class: type[CogLMConfig] = CogLMConfig
    own: dict[str, Any] = {}
    if stage.super_resolution is not None:
        config_class, own = CogLMCanvasConfig, {"super_resolution": stage.super_resolution}
    try:
        return config_class(
            **own,
            vocab_size=vocab_size,
            num_image_tokens=num_image_tokens,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            intermediate_size=_intermediate_size(tensors, hidden_size),
            max_position_embeddings=num_positions,
            boi_token_id=boi_token_id,
            start_of_english_token_id=boi_token_id + 1,
            start_of_chinese_token_id=boi_token_id + 2,
            pad_token_id=num_image_tokens + 3,
        )
    except ValueError as error:
        raise ConversionError(f"{name} is no CogView2 transformer: {error}") from error


def _check_released_config(released_config: Mapping[str, Any], found: Mapping[str, int], name: str) -> int:
    """The number of heads, if `model_config.json` does not contradict what was found in the tensors."""
    for key, value in found.items():
        if released_config.get(key, value) != value:
            raise ConversionError(
                f"{name}: `model_config.json` says `{key}` = {_told(released_config[key])}, but the tensors say "
                f"{value}. One of the files is of another model."
            )
    expected: dict[str, Any] = {
        "layernorm_order": "sandwich",
        "model_parallel_size": 1,
        "kernel_size": 5,
        "kernel_size2": 5,
    }
    for key, value in expected.items():
        if released_config.get(key, value) != value:
            raise ConversionError(
                f"{name}: `model_config.json` has `{key}` = {_told(released_config[key])}; only {value!r} is CogView2."
            )
    heads, width = released_config.get("num_attention_heads"), found["hidden_size"]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConversionError(
            f"{name}: `num_attention_heads` must be a divisor of the width {width}, but `model_config.json` says "
            f"{_told(heads)}. The tensors do not tell it; put the file that belongs to this checkpoint beside "
            "`latest`."
        )
    return heads


def _told(value: object) -> str:
    """A value out of a file, for a message."""
    return repr(value)[:80] if isinstance(value, str | int | float | type(None)) else f"a {type(value).__name__}"


def _intermediate_size(tensors: Mapping[str, Any], hidden_size: int) -> int:
    first = tensors.get("layers.0.mlp.dense_h_to_4h.weight")
    return first.shape[0] if first is not None and first.shape else 4 * hidden_size


def image_tokenizer_config(tensors: Mapping[str, Any], num_clusters: int, name: str) -> IcetkVQConfig:
    """The configuration of a released image tokenizer, whose sizes are read from its tensors."""
    try:
        num_embeddings, embedding_dim = sizes_of(tensors, "quantize.embed.weight", 2, name)
        base_channels = sizes_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    except KeyError as error:
        raise ConversionError(
            f"{name} has no `{released_image_tokenizer_key(error.args[0])}`, so it is no icetk image tokenizer."
        ) from None
    return IcetkVQConfig(
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        base_channels=base_channels,
        num_clusters=num_clusters,
    )


def released_config(config: CogLMConfig, stage: Stage) -> dict[str, Any]:
    """
    What stands in `model_config.json` of a released checkpoint.

    Raises:
        ConversionError: If the original code cannot run a model of this configuration.
    """
    wanted = {  # constants of the original code
        "image_position": 512,
        "image_grid": (20, 20),
        "num_image_tokens": 20000,
        "layer_norm_eps": 1e-5,
        "intermediate_size": 4 * config.hidden_size,
    }
    is_canvas = isinstance(config, CogLMCanvasConfig)
    if is_canvas:
        wanted |= {
            "fine_grid": (60, 60),
            "kernel_size": (9, 5),
            "num_text_slots": {"direct": 96, "iterative": 16}[config.super_resolution],
        }
    if is_canvas and config.super_resolution == "direct":
        wanted["cross_kernel_size"] = (5, 5)
    wrong = [
        f"`{key}` is {getattr(config, key)}, not {value}"
        for key, value in wanted.items()
        if getattr(config, key) != value
    ]
    if wrong:
        raise ConversionError(
            "The original code has constants that this model does not share: " + "; ".join(wrong) + "."
        )
    result = {
        "model_class": stage.model_class,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "layernorm_order": "sandwich",
        "model_parallel_size": 1,
    }
    if is_canvas:
        slots, fine = config.num_text_slots, config.canvas_length
        low = config.image_grid[0] * config.image_grid[1]
        layout = (
            [slots, slots + low, slots + low + fine] if config.super_resolution == "direct" else [slots, slots + fine]
        )
        result |= {
            "kernel_size": config.kernel_size[1],
            "kernel_size2": config.cross_kernel_size[1],
            "layout": layout,
            "new_sequence_length": config.max_position_embeddings + fine,
        }
    return result | {"max_sequence_length": config.max_position_embeddings}


def model_class_of(component: str) -> type[CogLMModel | CogLMCanvasModel | IcetkVQModel]:
    """The class that loads a component folder."""
    if component == "vqvae":
        return IcetkVQModel
    return CogLMModel if component == "transformer" else CogLMCanvasModel
