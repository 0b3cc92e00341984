"""CogLM: the Sandwich-LN transformer over text and low-resolution image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ...generation.token_sequence import IGNORED_LABEL
from ..conventions import every_row, refuse_unused
from ..layers import (
    LayerCache,
    LazyDropout,
    SandwichLayer,
    TokenEmbedding,
    attention_bias,
    select_positions,
    shrink_gradient,
)
from ..loading import WholeModelMixin, check_count, check_grid
from .sequences import SequenceLayout


class CogLMConfig(PreTrainedConfig):
    """
    Configuration of [`CogLMModel`]; by default that of the released 6B CogLM.

    Args:
        vocab_size (`int`): Rows of the token embedding: image tokens, text tokens, special tokens and rows to spare.
        num_image_tokens (`int`): Image codes, which are the first ids.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, depth, heads, and width of the feed-forward layer (default: 4 x `hidden_size`).
        max_position_embeddings (`int`): Rows of the position table of text and low-resolution tokens.
        image_position (`int`): Position id of `<start_of_image>`; image tokens follow.
        image_grid (`Sequence[int]`): Rows and columns of the low-resolution tokens.
        max_text_tokens (`int`): The longest text that text-to-image takes, without `<start_of_image>`.
        hidden_dropout, attention_dropout (`float`): Dropout of sub-layer outputs and of dense attention, in training.
        layer_norm_eps (`float`): Epsilon of all layer norms.
        pb_relaxation_alpha (`float`, *optional*):
            Precision-bottleneck relaxation: dense scores are computed divided by this and multiplied back after the
            row maximum has been taken away, which keeps float16 from overflowing. The result is the same; it is slower
            than fused attention.
        embedding_gradient_scale (`float`): What gradients of the input embeddings are multiplied by (CogView: 0.1).
        boi_token_id, start_of_english_token_id, start_of_chinese_token_id, pad_token_id (`int`): Special tokens.
        initializer_range (`float`): Standard deviation of new weights.
    """

    model_type = "coglm"
    model_class: ClassVar[str] = "CogLMModel"
    released_models: ClassVar[dict[str, dict[str, Any]]] = {"coglm": {}}

    def __init__(
        self,
        vocab_size: int = 150016,
        num_image_tokens: int = 20000,
        hidden_size: int = 3072,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 48,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        image_position: int = 512,
        image_grid: Sequence[int] = (20, 20),
        max_text_tokens: int = 109,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        pb_relaxation_alpha: float | None = None,
        embedding_gradient_scale: float = 1.0,
        boi_token_id: int = 150000,
        start_of_english_token_id: int = 150001,
        start_of_chinese_token_id: int = 150002,
        pad_token_id: int = 20003,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if kwargs.get("super_resolution") is not None:
            raise ValueError(
                f"`super_resolution` must be left out, but is {kwargs['super_resolution']!r}: it is a field of "
                "`CogLMCanvasConfig`."
            )
        check_count("num_hidden_layers", num_hidden_layers)
        check_count("num_attention_heads", num_attention_heads, hidden_size)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of the {num_attention_heads} heads, but is {hidden_size}."
            )
        rows, columns = check_grid("image_grid", image_grid)
        last_position = image_position + rows * columns
        if last_position >= max_position_embeddings:
            raise ValueError(
                f"`max_position_embeddings` must be above {last_position} here, but is {max_position_embeddings}."
            )
        self.vocab_size = vocab_size
        self.num_image_tokens = num_image_tokens
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.image_position = image_position
        self.image_grid = (rows, columns)
        self.max_text_tokens = max_text_tokens
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.pb_relaxation_alpha = pb_relaxation_alpha
        self.embedding_gradient_scale = embedding_gradient_scale
        self.boi_token_id = boi_token_id
        self.start_of_english_token_id = start_of_english_token_id
        self.start_of_chinese_token_id = start_of_chinese_token_id
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As in transformers.

        Raises:
            ValueError: If the configuration is that of another kind of model.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"`{cls.model_class}` reads models of the type {cls.model_type!r}, but this one is a {kind!r}. Load "
                "it with the class that its `config.json` names under `architectures`."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def released(cls, name: str, **config) -> "CogLMConfig":
        """
        The configuration of a released model.

        The number of rows of the token embedding was not published; converting a checkpoint reads it from the file.

        Args:
            name (`str`): `"coglm"` here; `"cogview2-dsr"` or `"cogview2-itersr"` in [`CogLMCanvasConfig`].
            config: Fields to change.
        """
        if name not in cls.released_models:
            raise ValueError(f"`name` must be one of {sorted(cls.released_models)}, but is {name!r}.")
        return cls(**{**cls.released_models[name], **config})

    @property
    def layout(self) -> SequenceLayout:
        """Where things stand in this model's sequences."""
        return SequenceLayout(self.image_grid, self.image_position, self.boi_token_id, self.num_image_tokens)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest text, `<start_of_image>` and a whole picture (release: 510)."""
        return self.max_text_tokens + 1 + self.layout.image_length


@dataclass
class CogLMModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, *optional*): Mean cross-entropy over all positions with a label.
        logits (`torch.Tensor`): Float32 scores over the image vocabulary, or over all of it, of shape
            `(batch_size, positions, tokens)`. While `labels` are given, only of the positions that have one:
            `(labelled, tokens)`, in order.
        hidden_states (`tuple[torch.Tensor]`, *optional*): The states after each layer.
        label_losses (`torch.Tensor` of shape `(labelled,)`, *optional*): Cross-entropy of each label, in order.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    label_losses: torch.Tensor | None = None


class CogLMPreTrainedModel(WholeModelMixin, PreTrainedModel):
    """What CogLM and its super-resolution stages share: token and position embeddings, and the scores of tokens."""

    config_class: type[PreTrainedConfig] = CogLMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    # with group offload, each of these brings its own weights: `logits` is called outside of `forward`, too
    _group_offload_block_modules = (
        "word_embeddings",
        "position_embeddings",
        "canvas_position_embeddings",
        "final_layernorm",
    )
    config: CogLMConfig

    def _init_weights(self, module: nn.Module) -> None:
        """As in transformers, which would draw weights for modules that have none: another model lends them theirs."""
        if next(module.parameters(recurse=False), None) is not None:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens that are read, whose gradient is as large as the config says."""
        return shrink_gradient(self.word_embeddings(input_ids), self.config.embedding_gradient_scale)

    def logits(self, hidden_states: torch.Tensor, full_vocabulary: bool = False) -> torch.Tensor:
        """
        Scores of the states after the last layer.

        For parts of these states, where the scores of all positions at once are too much memory. The product is
        computed in float32, as in the release; under autocast it follows autocast.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): States after the last layer.
            full_vocabulary (`bool`): Score text tokens too; by default image tokens only.

        Returns:
            `torch.Tensor` of shape `(..., tokens)`: float32.
        """
        return self._score(hidden_states, full_vocabulary, torch.float32)

    def _score(self, hidden_states: torch.Tensor, full_vocabulary: bool, dtype: torch.dtype | None) -> torch.Tensor:
        """Scores computed in `dtype`, by default that of the states."""
        hidden_states = self.final_layernorm(hidden_states)
        num_tokens = None if full_vocabulary else self.config.num_image_tokens
        dtype = hidden_states.dtype if dtype is None else dtype
        return self.word_embeddings(hidden_states=hidden_states, num_tokens=num_tokens, dtype=dtype).float()

    def _labelled_logits(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, full_vocabulary: bool
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of states that have these labels, its mean, and their logits, as outputs call them."""
        logits = self.logits(hidden_states, full_vocabulary)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses.mean(), "logits": logits, "label_losses": losses}


class CogLMModel(CogLMPreTrainedModel):
    """
    CogLM: text to image, captioning and completion of low-resolution tokens.

    Input is token plus position embedding, output the product with the token embedding.

    Source: the CogView2 release; https://arxiv.org/abs/2204.14217, section 3.1.
    """

    main_input_name = "input_ids"
    _no_split_modules = ("SandwichLayer",)

    def __init__(self, config: CogLMConfig):
        super().__init__(config)
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(SandwichLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = LazyDropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        text_attention_bias: float = 0.0,
        *,
        cache: LayerCache | None = None,
        labels: torch.Tensor | None = None,
        logits_positions: torch.Tensor | None = None,
        full_vocabulary: bool = False,
        output_hidden_states: bool = False,
        **unused,
    ) -> CogLMModelOutput:
        """
        Read sequences; `sequences.py` makes the arguments of each task.

        Args:
            input_ids, position_ids (`torch.Tensor` of shape `(batch_size, length)`): The sequences.
            attention_mask (`torch.Tensor` of shape `(batch_size, length, keys)`, *optional*):
                True = may attend; `keys` counts what the cache holds, too. Without it, every row attends to every key.
                Floats instead of truth values are added to the scores, and the bias below is in them already. That of
                a tokenizer, `(batch_size, keys)`, hides padding from all rows.
            text_mask (`torch.Tensor` of shape `(batch_size, keys)`, *optional*): Which keys get `text_attention_bias`.
            text_attention_bias (`float`): Added to the scores of text keys, in all layers and heads.
            cache ([`KeyValueCache`], *optional*): The sequences are appended to it and attend to what it holds.
            labels (`torch.Tensor` of shape `(batch_size, length)`, *optional*): Target of each position, not shifted
                here, -100 = none: there, the last layer serves as keys and values alone.
            logits_positions (`torch.Tensor` of shape `(positions,)` or `(batch_size, positions)`, *optional*):
                Compute logits at these positions only. The last layer, too, is left out elsewhere if they are the same
                for the whole batch.
            full_vocabulary (`bool`): Score text tokens too; by default image tokens only.
            output_hidden_states (`bool`): Return the states after each layer.
            unused: Arguments of other models, as long as they ask for nothing: `return_dict=True`, `use_cache=False`.

        Raises:
            TypeError: If an argument of another model asks for something.
            ValueError: If `attention_mask` has another shape.
        """
        refuse_unused(self, unused)
        attention_mask = every_row(attention_mask, input_ids.shape[1])
        bias = attention_bias(
            attention_mask, text_mask, text_attention_bias, self.dtype if cache is None else cache.dtype
        )
        labelled = None if labels is None else (labels != IGNORED_LABEL).nonzero(as_tuple=True)
        last_positions = positions_of_last_layer(logits_positions, labelled, output_hidden_states)
        hidden_states = self.dropout(self._embed(input_ids) + self.position_embeddings(position_ids))
        states = []
        for layer in self.layers:
            positions = last_positions if layer.index == self.config.num_hidden_layers - 1 else None
            hidden_states = layer(hidden_states, bias, cache, positions=positions)
            states.append(hidden_states)
        kept = tuple(states) if output_hidden_states else None
        if labels is not None:
            hidden_states = hidden_states if last_positions is not None else hidden_states[labelled]
            outputs = self._labelled_logits(hidden_states, labels[labelled], full_vocabulary)
            return CogLMModelOutput(hidden_states=kept, **outputs)
        if logits_positions is not None and last_positions is None:
            hidden_states = select_positions(hidden_states, logits_positions)
        return CogLMModelOutput(logits=self.logits(hidden_states, full_vocabulary), hidden_states=kept)


def positions_of_last_layer(
    logits_positions: torch.Tensor | None,
    labelled: tuple[torch.Tensor, torch.Tensor] | None,
    output_hidden_states: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """What the last layer has to compute, where all that is asked for is the logits or losses of some positions."""
    if output_hidden_states:
        return None
    if labelled is not None:
        return labelled
    return logits_positions if logits_positions is not None and logits_positions.ndim == 1 else None


for _public in (CogLMConfig, CogLMModel):
    _public.__module__ = "cogview_pipelines"
