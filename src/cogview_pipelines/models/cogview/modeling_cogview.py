"""CogView: the GPT over text and image tokens that writes pictures, captions, and finer pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ...generation.token_sequence import IGNORED_LABEL
from ...ops.three_region_attention import draw_pivots, three_region_attention
from ..conventions import every_row, refuse_unused
from ..layers import (
    DenseAttention,
    FeedForward,
    LayerCache,
    LazyDropout,
    TokenEmbedding,
    attention_bias,
    dense_attention,
    pb_relaxed_attention,
    select_positions,
    shrink_gradient,
)
from ..loading import WholeModelMixin, check_count, check_grid
from .sequences import SequenceLayout
from .tokenization_cogview import COMMAND_TOKENS

LAYER_NORM_ORDERS = ("sandwich", "pre", "post")
SPARSE_ATTENTION = ("window_size", "num_windows", "num_pivots")
NORM_SCALES = ("sequence", "token", "tensor", None)


class CogViewConfig(PreTrainedConfig):
    """
    Configuration of [`CogViewModel`]; by default that of the released 4B models.

    Args:
        vocab_size (`int`): Rows of the token embedding: image codes, text pieces, command tokens and rows to spare.
        num_image_tokens (`int`): Image codes, which are the first ids.
        command_token_id (`int`): Id of `[PAD]`, the first of the command tokens.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, depth, heads, and width of the feed-forward layer (default: 4 x `hidden_size`).
        max_position_embeddings (`int`): Rows of the position table.
        max_super_resolution_length (`int`): The longest sequence with two pictures, in which positions start again.
        image_grid (`Sequence[int]`): Rows and columns of a picture's tokens.
        layer_norm_order (`str`): `"sandwich"`: a norm before each sub-layer and one after it; `"pre"`: before it only;
            `"post"`: after the residual addition.
        norm_scale (`str`, *optional*):
            What the inputs of a norm are divided by before it, which keeps float16 from overflowing: an eighth of the
            largest absolute value of each sequence (`"sequence"`), of each token alone (`"token"`) or, as in the
            release, of the whole tensor with all rows of the batch (`"tensor"`). `None`: nothing, which is ordinary
            layer norm. In effect the epsilon of the norm grows with the largest value; padding does not count.
        layer_norm_eps (`float`): Epsilon of all norms.
        pb_relaxation_alpha (`float`, *optional*):
            Precision-bottleneck relaxation of attention (paper: 32): scores are computed divided by this and
            multiplied back after the row maximum has been taken away. The result is the same; it is slower than fused
            attention. The released code only has the relaxed norms.
        embedding_gradient_scale (`float`): What gradients of the input embeddings are multiplied by (paper: 0.1).
        sparse_attention (`dict`, *optional*): Three-region sparse attention in training: `window_size` and
            `num_windows`, whose product is the window, and `num_pivots` (release: 128, 6 and 768, or 64, 4 and 256).
            Dense without it, and always outside of training.
        hidden_dropout, attention_dropout (`float`): Dropout of embeddings and sub-layer outputs, and of attention.
        initializer_range (`float`): Standard deviation of new weights.
    """

    model_type = "cogview"

    def __init__(
        self,
        vocab_size: int = 58240,
        num_image_tokens: int = 8192,
        command_token_id: int = 58192,
        hidden_size: int = 2560,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 40,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1089,
        max_super_resolution_length: int = 1345,
        image_grid: Sequence[int] = (32, 32),
        layer_norm_order: str = "sandwich",
        norm_scale: str | None = "sequence",
        layer_norm_eps: float = 1e-5,
        pb_relaxation_alpha: float | None = None,
        embedding_gradient_scale: float = 1.0,
        sparse_attention: dict[str, int] | None = None,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        check_count("num_hidden_layers", num_hidden_layers)
        check_count("num_attention_heads", num_attention_heads, hidden_size)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of the {num_attention_heads} heads, but is {hidden_size}."
            )
        if layer_norm_order not in LAYER_NORM_ORDERS:
            raise ValueError(f"`layer_norm_order` must be one of {LAYER_NORM_ORDERS}, but is {layer_norm_order!r}.")
        if norm_scale not in NORM_SCALES:
            raise ValueError(f"`norm_scale` must be one of {NORM_SCALES}, but is {norm_scale!r}.")
        if not num_image_tokens <= command_token_id <= vocab_size - len(COMMAND_TOKENS):
            raise ValueError(
                f"`command_token_id` must leave room for {len(COMMAND_TOKENS)} commands between `num_image_tokens` "
                f"{num_image_tokens} and `vocab_size` {vocab_size}, but is {command_token_id}."
            )
        rows, columns = check_grid("image_grid", image_grid)
        if rows % 2 or columns % 2:
            raise ValueError(f"`image_grid` must have even sides, but is {(rows, columns)}.")
        if sparse_attention is not None and set(sparse_attention) != set(SPARSE_ATTENTION):
            raise ValueError(
                f"`sparse_attention` must have {', '.join(SPARSE_ATTENTION)}, but has "
                f"{', '.join(sparse_attention) or 'nothing'}."
            )
        self.vocab_size = vocab_size
        self.num_image_tokens = num_image_tokens
        self.command_token_id = command_token_id
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.max_super_resolution_length = max_super_resolution_length
        self.image_grid = (rows, columns)
        self.layer_norm_order = layer_norm_order
        self.norm_scale = norm_scale
        self.layer_norm_eps = layer_norm_eps
        self.pb_relaxation_alpha = pb_relaxation_alpha
        self.embedding_gradient_scale = embedding_gradient_scale
        self.sparse_attention = None if sparse_attention is None else dict(sparse_attention)
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        kwargs["pad_token_id"] = command_token_id  # `[PAD]`
        super().__init__(**kwargs)

    @property
    def layout(self) -> SequenceLayout:
        """Where things stand in this model's sequences."""
        return SequenceLayout(
            self.image_grid,
            self.num_image_tokens,
            self.command_token_id,
            self.max_position_embeddings,
            self.max_super_resolution_length,
        )

    @property
    def max_text_tokens(self) -> int:
        """The longest text of text-to-image (release: 62)."""
        return self.layout.max_text_tokens

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that is generated (release: 1,345)."""
        return max(self.max_position_embeddings, self.max_super_resolution_length)


@dataclass
class CogViewModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, *optional*): Mean cross-entropy over all positions with a label, weighted if asked for.
        logits (`torch.Tensor`): Float32 scores over the image vocabulary, or over all of it, of shape
            `(batch_size, positions, tokens)`. While `labels` are given, only of the positions that have one:
            `(labelled, tokens)`, in order.
        hidden_states (`tuple[torch.Tensor]`, *optional*): The input of the first layer and the states after each.
        label_losses (`torch.Tensor` of shape `(labelled,)`, *optional*): Cross-entropy of each label, in order, before
            weights.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    label_losses: torch.Tensor | None = None


class RelaxedLayerNorm(nn.LayerNorm):
    """
    Layer norm of inputs divided by an eighth of their largest absolute value, a constant to the backward pass.

    Args:
        normalized_shape (`int`), eps (`float`): As of [`torch.nn.LayerNorm`].
        scale (`str`, *optional*): Whose largest value: `"sequence"`, `"token"`, `"tensor"`, or `None` for ordinary
            layer norm.

    Source: precision bottleneck relaxation, CogView (https://arxiv.org/abs/2105.13290), section 2.4.
    """

    def __init__(self, normalized_shape: int, eps: float, scale: str | None):
        super().__init__(normalized_shape, eps)
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor, is_real: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`): What is normalised.
            is_real (`torch.Tensor` of shape `(batch_size, length)`, *optional*): False at padding.
        """
        if self.scale is None:
            return super().forward(hidden_states)
        largest = hidden_states.detach().abs().amax(-1, keepdim=True)
        if self.scale == "tensor":
            largest = largest.amax()
        elif self.scale == "sequence":
            if is_real is not None:
                largest = largest.masked_fill(~is_real[..., None], 0)
            largest = largest.amax(1, keepdim=True)
        # divided by 8 first, or float16 overflows; and zeros stay zeros
        return super().forward(hidden_states / (largest / 8).clamp_min(torch.finfo(largest.dtype).tiny))


class CogViewAttention(DenseAttention):
    """Attention that is causal where it is not told otherwise, dense or to a window and pivots."""

    def __init__(self, config: CogViewConfig):
        super().__init__(config)
        sparse = config.sparse_attention or {}
        self.window: dict[str, Any] = {name: value for name, value in sparse.items() if name != "num_pivots"}

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None,
        cache: LayerCache | None,
        layer: int,
        pivots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attended values, heads last, before the output projection."""
        if pivots is not None:
            dropout = self.dropout if self.training else 0.0
            return three_region_attention(*self.project(hidden_states), pivots, **self.window, dropout=dropout)
        projected = self._project(hidden_states)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            key, value = cache.update(layer, projected[:, :, 1:].permute(2, 0, 3, 1, 4)).unbind()
            query = query.to(key.dtype)  # the cache's: on a CPU, 16-bit attention is many times slower
        dropout = self.dropout if self.training else 0.0
        if self.pb_relaxation_alpha is not None:
            if bias is None:
                bias = causal_bias(query, key)
            output = pb_relaxed_attention(query, key, value, bias, dropout, self.pb_relaxation_alpha)
        elif bias is not None or query.shape[2] == 1:
            output = dense_attention(query, key, value, bias, dropout)
        elif query.shape[2] == key.shape[2]:
            output = dense_attention(query, key, value, dropout=dropout, is_causal=True)
        else:
            output = dense_attention(query, key, value, causal_bias(query, key), dropout)
        return output.transpose(1, 2).to(hidden_states.dtype)


def causal_bias(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What hides later keys, where the queries are the last keys: `(1, 1, queries, keys)`, to add to scores."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    hidden = torch.finfo(query.dtype).min / 2
    later = torch.full((num_queries, num_keys), hidden, dtype=query.dtype, device=query.device)
    return later.triu(num_keys - num_queries + 1)[None, None]


class CogViewLayer(GradientCheckpointingLayer):
    """
    Attention and a feed-forward layer, each with its norms and its residual addition.

    Source: CogView (https://arxiv.org/abs/2105.13290), section 2.4.
    """

    def __init__(self, config: CogViewConfig, index: int):
        super().__init__()
        self.index, self.order = index, config.layer_norm_order
        norm = (config.hidden_size, config.layer_norm_eps, config.norm_scale)
        self.attention_layernorm = RelaxedLayerNorm(*norm)
        self.attention = CogViewAttention(config)
        self.mlp_layernorm = RelaxedLayerNorm(*norm)
        self.mlp = FeedForward(config)
        for output in (self.attention.dense, self.mlp.dense_4h_to_h):
            output.adds_to_residual = True
        if self.order == "sandwich":
            self.attention_output_layernorm = RelaxedLayerNorm(*norm)
            self.mlp_output_layernorm = RelaxedLayerNorm(*norm)
        self.dropout = LazyDropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        is_real: torch.Tensor | None = None,
        pivots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The new states; `is_real` is False at padding, and with `pivots` attention is sparse."""

        def attend(normed: torch.Tensor) -> torch.Tensor:
            attended = self.attention(normed, bias, cache, self.index, pivots)
            return self.dropout(self.attention.dense(attended.flatten(2)))

        def feed_forward(normed: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.mlp(normed))

        if self.order == "post":
            hidden_states = self.attention_layernorm(hidden_states + attend(hidden_states), is_real)
            return self.mlp_layernorm(hidden_states + feed_forward(hidden_states), is_real)
        attended = attend(self.attention_layernorm(hidden_states, is_real))
        if self.order == "sandwich":
            attended = self.attention_output_layernorm(attended, is_real)
        hidden_states = hidden_states + attended
        fed_forward = feed_forward(self.mlp_layernorm(hidden_states, is_real))
        if self.order == "sandwich":
            fed_forward = self.mlp_output_layernorm(fed_forward, is_real)
        return hidden_states + fed_forward


class CogViewModel(WholeModelMixin, PreTrainedModel):
    """
    The transformer of CogView: one causal sequence of text, pictures and command tokens.

    Input is token plus position embedding, output the product with the token embedding. One class serves the released
    base, caption and super-resolution models, which differ in their weights only.

    Source: the CogView release; https://arxiv.org/abs/2105.13290, section 2.3.
    """

    config_class = CogViewConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ("CogViewLayer",)
    # with group offload, each of these brings its own weights: `score` is called outside of `forward`, too
    _group_offload_block_modules = ("word_embeddings", "position_embeddings", "final_layernorm")
    config: CogViewConfig

    def __init__(self, config: CogViewConfig):
        super().__init__(config)
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(CogViewLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = RelaxedLayerNorm(config.hidden_size, config.layer_norm_eps, config.norm_scale)
        self.dropout = LazyDropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # what is added to the residual starts smaller, the deeper the model
            depth = 2 * self.config.num_hidden_layers if getattr(module, "adds_to_residual", False) else 1
            nn.init.normal_(module.weight, std=std / depth**0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def depends_on_pieces(self) -> bool:
        """Whether logits depend, very slightly, on how a sequence is cut into calls with a cache."""
        return self.config.norm_scale in ("sequence", "tensor")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

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
        label_weights: torch.Tensor | None = None,
        logits_positions: torch.Tensor | None = None,
        full_vocabulary: bool = False,
        output_hidden_states: bool = False,
        pivots: Sequence[torch.Tensor] | None = None,
        **unused,
    ) -> CogViewModelOutput:
        """
        Read sequences; `sequences.py` makes the arguments of each task.

        Args:
            input_ids, position_ids (`torch.Tensor` of shape `(batch_size, length)`): The sequences.
            attention_mask (`torch.Tensor` of shape `(batch_size, length, keys)`, *optional*):
                True = may attend; `keys` counts what the cache holds, too. Without it, attention is causal. Floats
                instead of truth values are added to the scores, and the bias below is in them already. That of a
                tokenizer, `(batch_size, keys)`, hides padding, and attention stays causal.
            text_mask (`torch.Tensor` of shape `(batch_size, keys)`, *optional*): Which keys get `text_attention_bias`.
            text_attention_bias (`float`): Added to the scores of text keys, in all layers and heads.
            cache ([`KeyValueCache`], *optional*): The sequences are appended to it and attend to what it holds.
            labels (`torch.Tensor` of shape `(batch_size, length)`, *optional*): Target of each position, not shifted
                here, -100 = none.
            label_weights (`torch.Tensor` of shape `(batch_size, length)`, *optional*): Of each label in the mean.
            logits_positions (`torch.Tensor` of shape `(positions,)` or `(batch_size, positions)`, *optional*):
                Compute logits at these positions only.
            full_vocabulary (`bool`): Score text and commands too; by default image tokens only.
            output_hidden_states (`bool`): Return the input of the first layer and the states after each.
            pivots (sequence of `torch.Tensor` of shape `(batch_size, num_pivots)`, *optional*): Of each layer, for
                sparse attention. In training with `config.sparse_attention` they are drawn anew for every layer.
            unused: Arguments of other models, as long as they ask for nothing: `return_dict=True`, `use_cache=False`.

        Raises:
            TypeError: If an argument of another model asks for something.
            ValueError: If attention is sparse and something but the causal mask is asked for, or `attention_mask` has
                another shape.
        """
        refuse_unused(self, unused)
        attention_mask = every_row(attention_mask, input_ids.shape[1], causal=True)
        if pivots is None and self.config.sparse_attention is not None and self.training:
            pivots = self.draw_pivots(input_ids, labels)
        if pivots is not None and (attention_mask is not None or cache is not None or text_attention_bias):
            raise ValueError(
                "`attention_mask`, `cache` and `text_attention_bias` must be left out with sparse attention, which is "
                "causal. Use `eval()` for dense attention."
            )
        if attention_mask is None and text_mask is not None and text_attention_bias:
            length = input_ids.shape[1]
            attention_mask = text_mask.new_ones(length, text_mask.shape[1]).tril(text_mask.shape[1] - length)[None]
        bias = attention_bias(
            attention_mask, text_mask, text_attention_bias, self.dtype if cache is None else cache.dtype
        )
        is_real = input_ids != self.config.pad_token_id
        embeddings = shrink_gradient(self.word_embeddings(input_ids), self.config.embedding_gradient_scale)
        hidden_states = self.dropout(embeddings + self.position_embeddings(position_ids))
        states = [hidden_states]
        for layer, own_pivots in zip(self.layers, pivots or [None] * len(self.layers)):
            hidden_states = layer(hidden_states, bias, cache, is_real, own_pivots)
            if output_hidden_states:
                states.append(hidden_states)
        hidden_states = self.final_layernorm(hidden_states, is_real)
        output = CogViewModelOutput(hidden_states=tuple(states) if output_hidden_states else None)
        if labels is not None:
            labelled = labels != IGNORED_LABEL
            output.logits = self.score(hidden_states[labelled], full_vocabulary)
            losses = F.cross_entropy(output.logits, labels[labelled], reduction="none")
            weights = torch.ones_like(losses) if label_weights is None else label_weights[labelled]
            output.loss, output.label_losses = (losses * weights).sum() / weights.sum(), losses
            return output
        if logits_positions is not None:
            hidden_states = select_positions(hidden_states, logits_positions)
        output.logits = self.score(hidden_states, full_vocabulary)
        return output

    def draw_pivots(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> list[torch.Tensor]:
        """
        Pivots of each layer: all text and command tokens, and image positions drawn anew, from torch's own generator.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, length)`): The sequences.
            labels (`torch.Tensor` of shape `(batch_size, length)`, *optional*): A token that predicts nothing is no
                pivot by itself.

        Raises:
            ValueError: If there is more text than pivots.
        """
        assert self.config.sparse_attention is not None
        is_real = input_ids != self.config.pad_token_id
        is_text = is_real & (input_ids >= self.config.num_image_tokens)
        if labels is not None:
            is_text = is_text & (labels != IGNORED_LABEL)
        num_pivots = min(self.config.sparse_attention["num_pivots"], input_ids.shape[1])
        return [draw_pivots(is_text, num_pivots, is_real) for _ in self.layers]

    def score(self, hidden_states: torch.Tensor, full_vocabulary: bool = False) -> torch.Tensor:
        """
        Scores of tokens, computed in float32; under autocast the product follows autocast.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): States after the final norm.
            full_vocabulary (`bool`): Score text and commands too; by default image tokens only.

        Returns:
            `torch.Tensor` of shape `(..., tokens)`: float32.
        """
        num_tokens = None if full_vocabulary else self.config.num_image_tokens
        return self.word_embeddings(hidden_states=hidden_states, num_tokens=num_tokens, dtype=torch.float32).float()


for _public in (CogViewConfig, CogViewModel):
    _public.__module__ = "cogview_pipelines"
