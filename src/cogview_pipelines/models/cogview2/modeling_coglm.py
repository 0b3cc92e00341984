"""CogLM: the Sandwich-LN transformer over text and image tokens that serves every stage of CogView2."""

import dataclasses
import math
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
from ...ops.gelu import gelu
from ...ops.local_attention import local_attention
from .sequences import SequenceLayout

SUPER_RESOLUTIONS = (None, "direct", "iterative")
RELEASED_MODELS = {"coglm": None, "cogview2-dsr": "direct", "cogview2-itersr": "iterative"}


class CogLMConfig(PreTrainedConfig):
    """
    Configuration of [`CogLMModel`]: by default the released 6B CogLM; `super_resolution` makes it another stage.

    Args:
        vocab_size (`int`): Rows of the token embedding: image tokens, text tokens, special tokens and rows to spare.
        num_image_tokens (`int`): Image codes, which are the first ids.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, depth, heads, and width of the feed-forward layer (default: 4 x `hidden_size`).
        max_position_embeddings (`int`): Rows of the position table of text and low-resolution tokens.
        image_position (`int`): Position id of `<start_of_image>`; image tokens follow.
        image_grid (`Sequence[int]`): Rows and columns of the low-resolution tokens.
        max_text_tokens (`int`): The longest text that text-to-image takes, without `<start_of_image>`.
        super_resolution (`str`, *optional*):
            `None`: CogLM itself. `"direct"`: the canvas has attention projections of its own and sees a window of the
            low-resolution tokens. `"iterative"`: the canvas sees the text slots.
        fine_grid (`Sequence[int]`): Rows and columns of the canvas (super-resolution only).
        num_text_slots (`int`): Text slots of the super-resolution context (default: 96 direct, 16 iterative).
        kernel_size (`Sequence[int]`): Rows and columns of the window on the canvas.
        cross_kernel_size (`Sequence[int]`): Rows and columns of the window on the low-resolution tokens (direct only).
        hidden_dropout, attention_dropout (`float`): Dropout of sub-layer outputs and of dense attention, in training.
        layer_norm_eps (`float`): Epsilon of all layer norms.
        pb_relaxation_alpha (`float`, *optional*):
            Precision-bottleneck relaxation: dense scores are computed divided by this and multiplied back after the
            row maximum has been taken away, which keeps float16 from overflowing. The result is the same; it is slower
            than fused attention.
        shares_backbone (`bool`): Direct super-resolution only: all but the extra weights are those of another model,
            which [`CogLMModel.share_backbone`] lends; they are neither saved nor loaded here.
        boi_token_id, start_of_english_token_id, start_of_chinese_token_id, pad_token_id (`int`): Special tokens.
        initializer_range (`float`): Standard deviation of new weights.
    """

    model_type = "coglm"

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
        super_resolution: str | None = None,
        fine_grid: Sequence[int] = (60, 60),
        num_text_slots: int | None = None,
        kernel_size: Sequence[int] = (9, 5),
        cross_kernel_size: Sequence[int] = (5, 5),
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        pb_relaxation_alpha: float | None = None,
        shares_backbone: bool = False,
        boi_token_id: int = 150000,
        start_of_english_token_id: int = 150001,
        start_of_chinese_token_id: int = 150002,
        pad_token_id: int = 20003,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if super_resolution not in SUPER_RESOLUTIONS:
            raise ValueError(f"`super_resolution` must be one of {SUPER_RESOLUTIONS}, but is {super_resolution!r}.")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of the {num_attention_heads} heads, but is {hidden_size}."
            )
        if shares_backbone and super_resolution != "direct":
            raise ValueError(
                "`shares_backbone` is for `super_resolution='direct'`, the only stage whose backbone stays as it was."
            )
        if super_resolution and any(fine % low for fine, low in zip(fine_grid, image_grid)):
            raise ValueError(
                f"`fine_grid` must be a multiple of `image_grid` {tuple(image_grid)}, but is {tuple(fine_grid)}."
            )
        last_position = image_position + image_grid[0] * image_grid[1]
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
        self.image_grid = tuple(image_grid)
        self.max_text_tokens = max_text_tokens
        self.super_resolution = super_resolution
        self.fine_grid = tuple(fine_grid)
        self.num_text_slots = (
            {"direct": 96, "iterative": 16}.get(super_resolution) if num_text_slots is None else num_text_slots
        )
        self.kernel_size = tuple(kernel_size)
        self.cross_kernel_size = tuple(cross_kernel_size)
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.pb_relaxation_alpha = pb_relaxation_alpha
        self.shares_backbone = shares_backbone
        self.boi_token_id = boi_token_id
        self.start_of_english_token_id = start_of_english_token_id
        self.start_of_chinese_token_id = start_of_chinese_token_id
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    @classmethod
    def released(cls, name: str, **config) -> "CogLMConfig":
        """
        The configuration of a released model.

        The number of rows of the token embedding was not published; converting a checkpoint reads it from the file.

        Args:
            name (`str`): `"coglm"`, `"cogview2-dsr"` or `"cogview2-itersr"`.
            config: Fields to change.
        """
        if name not in RELEASED_MODELS:
            raise ValueError(f"`name` must be one of {sorted(RELEASED_MODELS)}, but is {name!r}.")
        return cls(**{"super_resolution": RELEASED_MODELS[name], **config})

    @property
    def layout(self) -> SequenceLayout:
        """Where things stand in this model's sequences."""
        return SequenceLayout(self.image_grid, self.image_position, self.boi_token_id, self.num_image_tokens)

    @property
    def canvas_length(self) -> int:
        """Number of canvas cells (release: 3,600)."""
        return self.fine_grid[0] * self.fine_grid[1]


class CogLMCache:
    """
    Keys and values of the dense attention of every layer, in memory that is taken once.

    Args:
        config (`CogLMConfig`): Of the model.
        batch_size (`int`): Number of sequences.
        max_length (`int`): The longest that the sequences will get.
        dtype, device: Of the model. Attention is computed in this dtype: on a CPU, float32 is many times faster for
            16-bit models, too.
    """

    def __init__(
        self, config: CogLMConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ):
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (2, batch_size, config.num_attention_heads, max_length, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.slot: torch.Tensor | None = None
        self.visible = max_length

    @classmethod
    def at_slot(cls, layers: list[torch.Tensor], slot: torch.Tensor, visible: int) -> "CogLMCache":
        """
        The memory of another cache for a step of fixed shapes, whatever it holds: new keys go to `slot`, an index
        tensor `(new,)`, and the first `visible` ones are attended to, of which a mask hides those not yet written.
        """
        cache = object.__new__(cls)
        cache.layers, cache.slot, cache.visible, cache.length = layers, slot, visible, 0
        return cache

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def update(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Add `(2, batch_size, num_heads, new, head_dim)` keys and values to a layer; returns all it attends to."""
        held = self.layers[layer]
        if self.slot is not None:
            held.index_copy_(3, self.slot, new.to(held.dtype))
            return held[:, :, :, : self.visible]
        end = self.length + new.shape[3]
        held[:, :, :, self.length : end] = new
        return held[:, :, :, :end]

    def load(self, other: "CogLMCache", repeats: int | torch.Tensor) -> None:
        """Hold what another cache holds, every sequence `repeats` times in a row, and nothing else."""
        length = self.length = other.length
        for own, theirs in zip(self.layers, other.layers):
            own[:, :, :, :length] = theirs[:, :, :, :length].repeat_interleave(repeats, 1)
            own[:, :, :, length:] = 0

    def repeat_interleave(self, repeats: int) -> "CogLMCache":
        """A cache in which every sequence stands `repeats` times in a row: encode a prompt once for several images."""
        copy = CogLMCache.at_slot([layer.repeat_interleave(repeats, 1) for layer in self.layers], None, self.visible)
        copy.length = self.length
        return copy

    def reorder(self, rows: torch.Tensor) -> None:
        """Go on with these sequences."""
        self.layers = [layer.index_select(1, rows) for layer in self.layers]


@dataclass
class CogLMContext:
    """
    What the canvas of a super-resolution model attends to, encoded once for all passes.

    Args:
        keys, values (`list[torch.Tensor]`): Of each layer, `(batch_size, context_length, num_heads, head_dim)`.
        key_mask (`torch.Tensor` of shape `(batch_size, context_length)`): False at padding.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_mask: torch.Tensor

    def repeat_interleave(self, repeats: int) -> "CogLMContext":
        """Every context `repeats` times in a row."""
        keys, values = ([t.repeat_interleave(repeats, 0) for t in tensors] for tensors in (self.keys, self.values))
        return CogLMContext(keys, values, self.key_mask.repeat_interleave(repeats, 0))


@dataclass
class CogLMModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, *optional*): Mean cross-entropy over all positions with a label.
        logits (`torch.Tensor`, *optional*):
            Float32 scores over the image vocabulary, or over all of it, of shape `(batch_size, positions, tokens)`.
            While `labels` are given, only of the positions that have one: `(labelled, tokens)`, in order.
        last_hidden_state (`torch.Tensor`, *optional*): Instead of logits, with `output_logits=False`: the states that
            they are made of, `(batch_size, positions, hidden_size)`.
        hidden_states (`tuple[torch.Tensor]`, *optional*): The states after each layer.
        context (`CogLMContext`, *optional*): Super-resolution: the encoded context, to be passed to the next pass.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    context: CogLMContext | None = None


class CogLMAttention(nn.Module):
    """Projections of one attention: fused query, key and value, and the output."""

    def __init__(self, config: CogLMConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.pb_relaxation_alpha = config.pb_relaxation_alpha
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each `(batch_size, positions, num_heads, head_dim)`: views of one tensor."""
        return self._project(hidden_states).unbind(2)

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.query_key_value(hidden_states).unflatten(-1, (3, self.num_heads, -1))

    def forward(
        self, hidden_states: torch.Tensor, bias: torch.Tensor | None, cache: CogLMCache | None, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Dense attention before its output projection; also returns this call's keys and values. All heads last."""
        projected = self._project(hidden_states)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind()
        all_keys, all_values = key, value
        if cache is not None:
            all_keys, all_values = cache.update(layer, projected[:, :, 1:].permute(2, 0, 3, 1, 4)).unbind()
            query = query.to(cache.dtype)
        dropout = self.dropout if self.training else 0.0
        if self.pb_relaxation_alpha is None:
            output = F.scaled_dot_product_attention(query, all_keys, all_values, bias, dropout)
        else:
            output = pb_relaxed_attention(query, all_keys, all_values, bias, dropout, self.pb_relaxation_alpha)
        return output.transpose(1, 2).to(hidden_states.dtype), key.transpose(1, 2), value.transpose(1, 2)


def pb_relaxed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    alpha: float,
) -> torch.Tensor:
    """
    Attention whose scores stay small while they are in low precision.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, positions, head_dim)`): As for SDPA.
        bias (`torch.Tensor`, *optional*): Added to the scores.
        dropout (`float`): Probability of dropping an attention weight.
        alpha (`float`): The scores are held divided by this until the row maximum is gone.

    Source: precision bottleneck relaxation, CogView (https://arxiv.org/abs/2105.13290), section 2.4.
    """
    scores = (query / (alpha * math.sqrt(query.shape[-1]))) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias / alpha
    scores = (scores - scores.amax(-1, keepdim=True).detach()).float() * alpha
    return F.dropout(scores.softmax(-1).to(value.dtype), dropout) @ value


class CogLMMLP(nn.Module):
    """Feed-forward layer with the tanh approximation of GELU."""

    def __init__(self, config: CogLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states)))


class CogLMDropout(nn.Dropout):
    """Dropout that costs nothing while there is none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) if self.training else hidden_states


class CogLMLayer(GradientCheckpointingLayer):
    """
    One layer in Sandwich-LN order: a norm before each sub-layer, and another between it and the residual addition.

    With `context`, the rows are canvas cells: attention is local, over windows and the context's keys. Otherwise it is
    dense.
    """

    def __init__(self, config: CogLMConfig, index: int):
        super().__init__()
        self.index = index
        self.config = config
        norm = {"normalized_shape": config.hidden_size, "eps": config.layer_norm_eps}
        self.attention_layernorm = nn.LayerNorm(**norm)
        self.attention = CogLMAttention(config)
        self.attention_output_layernorm = nn.LayerNorm(**norm)
        self.mlp_layernorm = nn.LayerNorm(**norm)
        self.mlp = CogLMMLP(config)
        self.mlp_output_layernorm = nn.LayerNorm(**norm)
        self.dropout = CogLMDropout(config.hidden_dropout)
        if config.super_resolution == "direct":
            self.canvas_attention = CogLMAttention(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        cache: CogLMCache | None = None,
        context: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Returns the new states and, of dense rows, their keys and values.

        With `positions`, an index tensor, only those states are computed; the others serve as keys and values.
        """
        normed = self.attention_layernorm(hidden_states)
        key = value = None
        if context is not None:
            attention = self.canvas_attention if self.config.super_resolution == "direct" else self.attention
            attended = self._attend_canvas(attention, normed, *context)
        else:
            attention = self.attention
            attended, key, value = attention(normed, bias, cache, self.index)
        if positions is not None:
            hidden_states, attended = hidden_states[:, positions], attended[:, positions]
        attended = attention.dense(attended.flatten(2))
        hidden_states = hidden_states + self.attention_output_layernorm(self.dropout(attended))
        fed_forward = self.dropout(self.mlp(self.mlp_layernorm(hidden_states)))
        return hidden_states + self.mlp_output_layernorm(fed_forward), key, value

    def _attend_canvas(
        self,
        attention: CogLMAttention,
        normed: torch.Tensor,
        context_key: torch.Tensor,
        context_value: torch.Tensor,
        context_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.config
        query, key, value = attention.project(normed)
        if config.super_resolution == "direct":
            seen = {
                "cross_key": context_key[:, config.num_text_slots :],
                "cross_value": context_value[:, config.num_text_slots :],
                "cross_grid": config.image_grid,
                "cross_kernel_size": config.cross_kernel_size,
            }
        else:
            seen = {"context_key": context_key, "context_value": context_value, "context_bias": context_bias}
        return local_attention(query, key, value, query_grid=config.fine_grid, kernel_size=config.kernel_size, **seen)


class CogLMTokenEmbedding(nn.Embedding):
    """
    Embeddings of tokens, and scores of tokens, which are products with their embeddings.

    Both are calls of the module, because that is when offload hooks bring the weights.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        num_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Embeddings of `input_ids`, or scores of the first `num_tokens` tokens, computed in `dtype`."""
        if hidden_states is None:
            return super().forward(input_ids)
        weight = self.weight[:num_tokens]
        if dtype == torch.float32 and _adds_in_float32(hidden_states, weight):
            flat = hidden_states.flatten(0, -2)
            return torch.mm(flat, weight.T, out_dtype=dtype).unflatten(0, hidden_states.shape[:-1])
        return F.linear(hidden_states.to(dtype), weight.to(dtype))


@dataclass
class CogLMDecoding:
    """
    How tokens are appended.

    Args:
        compile, cuda_graph, fused (`bool`): See [`CogLMModel.set_decoding`].
        decoder (*optional*): What is kept for the next call.
    """

    compile: bool = False
    cuda_graph: bool = False
    fused: bool = True
    decoder: Any = dataclasses.field(default=None, compare=False, repr=False)


class CogLMModel(PreTrainedModel):
    """
    The transformer of CogView2, for every stage: `config.super_resolution` says which.

    Without it, text-to-image, captioning and completion; else direct or iterative super-resolution. Input is token
    plus position embedding, output the product with the token embedding.

    Source: the CogView2 release; https://arxiv.org/abs/2204.14217, sections 3.1 and 3.2.
    """

    config_class = CogLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("CogLMLayer",)
    config: CogLMConfig

    def __init__(self, config: CogLMConfig):
        super().__init__(config)
        self.word_embeddings = CogLMTokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.super_resolution:
            self.canvas_position_embeddings = nn.Embedding(config.canvas_length, config.hidden_size)
        self.layers = nn.ModuleList(CogLMLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = CogLMDropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.decoding = CogLMDecoding()
        if config.shares_backbone:
            self._forget_backbone()
            self._keys_to_ignore_on_load_missing = [r"^(?!.*canvas_)"]
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    # Forward -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        text_attention_bias: float = 0.0,
        key_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: CogLMCache | None = None,
        canvas_ids: torch.Tensor | None = None,
        context: CogLMContext | None = None,
        logits_positions: torch.Tensor | None = None,
        full_vocabulary: bool = False,
        output_hidden_states: bool = False,
        output_logits: bool = True,
        last_hidden_state: torch.Tensor | None = None,
    ) -> CogLMModelOutput:
        """
        Dense rows (`input_ids`), canvas rows (`canvas_ids`), or both; `sequences.py` makes the arguments of each task.

        Args:
            input_ids, position_ids (`torch.Tensor` of shape `(batch_size, length)`): Dense rows: the sequence, or the
                context of the canvas.
            attention_mask (`torch.Tensor` of shape `(batch_size, length, keys)`, *optional*):
                True = may attend; `keys` counts what the cache holds, too. Without it, every row attends to every key.
                Numbers instead of truth values are added to the scores, and the bias below is in them already.
            text_mask (`torch.Tensor` of shape `(batch_size, keys)`, *optional*): Which keys get `text_attention_bias`.
            text_attention_bias (`float`): Added to the scores of text keys, in all layers and heads.
            key_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): Super-resolution: False at padding
                of the context.
            labels (`torch.Tensor`, *optional*):
                Target of each position, not shifted here, -100 = none; of shape `(batch_size, canvas_length)` if there
                is a canvas, else `(batch_size, length)`.
            cache (`CogLMCache`, *optional*): Dense rows are appended to it and attend to what it holds.
            canvas_ids (`torch.Tensor` of shape `(batch_size, canvas_length)`, *optional*):
                Super-resolution: tokens of the canvas, `<start_of_image>` where unknown.
            context (`CogLMContext`, *optional*): The encoded context of an earlier pass, instead of `input_ids`.
            logits_positions (`torch.Tensor` of shape `(positions,)` or `(batch_size, positions)`, *optional*):
                Compute logits at these positions only. The last layer, too, is left out elsewhere if they are the same
                for the whole batch.
            full_vocabulary (`bool`): Score text tokens too; by default image tokens only.
            output_hidden_states (`bool`): Return the states after each layer (of the canvas, if there is one).
            output_logits (`bool`): Without it, the output has the states that logits are made of in their place.
            last_hidden_state (`torch.Tensor` of shape `(batch_size, positions, hidden_size)`, *optional*):
                Some of those states, instead of all else: only their logits are computed. Where logits of all
                positions at once are too much memory.

        Raises:
            ValueError: If a canvas comes to a model without super-resolution, or its backbone has not been lent yet.
        """
        if last_hidden_state is not None:
            return CogLMModelOutput(logits=self.logits(last_hidden_state, full_vocabulary))
        self._check_call(input_ids, canvas_ids, context)
        hidden_states, states = None, []
        # what the last layer need not compute, where all that is asked for is the logits of some positions
        shared = logits_positions is not None and logits_positions.ndim == 1
        last_positions = logits_positions if shared and labels is None and not output_hidden_states else None
        if input_ids is not None:
            dtype = self.dtype if cache is None else cache.dtype
            bias = attention_bias(attention_mask, text_mask, text_attention_bias, dtype)
            hidden_states = self.dropout(self.word_embeddings(input_ids) + self.position_embeddings(position_ids))
            keys, values = [], []
            rows = last_positions
            if self.config.super_resolution and not output_hidden_states:
                rows = input_ids.new_empty(0)  # the canvas sees keys and values only
            for layer in self.layers:
                positions = rows if layer.index == self.config.num_hidden_layers - 1 else None
                hidden_states, key, value = layer(hidden_states, bias, cache, positions=positions)
                keys.append(key)
                values.append(value)
                states.append(hidden_states)
            if cache is not None:
                cache.length += input_ids.shape[1]
            if canvas_ids is not None or self.config.super_resolution:
                key_mask = torch.ones_like(input_ids, dtype=torch.bool) if key_mask is None else key_mask
                context = CogLMContext(keys, values, key_mask)
        if canvas_ids is not None:
            hidden_states, states = self._run_canvas(canvas_ids, context, last_positions)
        output = CogLMModelOutput(context=context, hidden_states=tuple(states) if output_hidden_states else None)
        if canvas_ids is None and self.config.super_resolution:
            return output  # the context alone: there is nothing to predict
        if labels is not None:
            labelled = labels != IGNORED_LABEL
            output.logits = self.logits(hidden_states[labelled], full_vocabulary)
            output.loss = F.cross_entropy(output.logits, labels[labelled])
            return output
        if logits_positions is not None and last_positions is None:
            hidden_states = _select_positions(hidden_states, logits_positions)
        if output_logits:
            output.logits = self.logits(hidden_states, full_vocabulary)
        else:
            output.last_hidden_state = hidden_states
        return output

    def logits(self, hidden_states: torch.Tensor, full_vocabulary: bool = False) -> torch.Tensor:
        """
        Float32 scores of the states after the last layer: `(..., hidden_size)` -> `(..., tokens)`.

        The release multiplies in float32 except in iterative super-resolution. Under autocast the product follows
        autocast.
        """
        hidden_states = self.final_layernorm(hidden_states)
        dtype = hidden_states.dtype if self.config.super_resolution == "iterative" else torch.float32
        num_tokens = None if full_vocabulary else self.config.num_image_tokens
        return self.word_embeddings(hidden_states=hidden_states, num_tokens=num_tokens, dtype=dtype).float()

    def _run_canvas(
        self, canvas_ids: torch.Tensor, context: CogLMContext, last_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        positions = self.canvas_position_embeddings(torch.arange(canvas_ids.shape[1], device=canvas_ids.device))
        hidden_states = self.dropout(self.word_embeddings(canvas_ids) + positions)
        bias = None
        if self.config.super_resolution == "iterative":
            bias = torch.zeros_like(context.key_mask, dtype=torch.float32).masked_fill(
                ~context.key_mask, float("-inf")
            )
        states = []
        for layer, key, value in zip(self.layers, context.keys, context.values):
            positions = last_positions if layer.index == self.config.num_hidden_layers - 1 else None
            hidden_states, _, _ = layer(hidden_states, context=(key, value, bias), positions=positions)
            states.append(hidden_states)
        return hidden_states, states

    def _check_call(
        self, input_ids: torch.Tensor | None, canvas_ids: torch.Tensor | None, context: CogLMContext | None
    ) -> None:
        if self.word_embeddings.weight is None:
            raise ValueError(
                "The backbone of this model is that of another one (`shares_backbone`). Lend it first: "
                "`direct_sr_transformer.share_backbone(transformer)`; `CogView2Pipeline` does so by itself."
            )
        if canvas_ids is not None and not self.config.super_resolution:
            raise ValueError("`canvas_ids` came, but this model has no canvas: `config.super_resolution` is None.")
        if canvas_ids is not None and canvas_ids.shape[1] != self.config.canvas_length:
            raise ValueError(
                f"`canvas_ids` must have {self.config.canvas_length} positions, but has {canvas_ids.shape[1]}."
            )
        if (input_ids is None) == (context is None):
            raise ValueError("Give either `input_ids` or the `context` of an earlier pass.")

    def set_decoding(self, compile: bool = False, cuda_graph: bool = False, fused: bool = True) -> None:
        """
        How tokens are written one by one, in text to image and completion: the same tokens in every way.

        A step is small, and what surrounds its matrix products can take longer than they do. `compile` and
        `cuda_graph` give a step fixed shapes and keep its memory (keys and values of the last batch size) until this
        is called again.

        Args:
            compile (`bool`): Run the step through `torch.compile`. It takes a C++ compiler, on a GPU Triton, and a
                minute or so for each new batch size.
            cuda_graph (`bool`): Capture the step and replay it, with one launch for all of its kernels. It takes a
                CUDA device, on which all weights stay, and a fraction of a second for each new batch size.
            fused (`bool`, defaults to `True`): On a CPU, without the other two, run all of a step in one kernel where
                there is one for it: built, for plain weights without hooks. It sums in float32 whatever the weights
                are, so that 16-bit models may draw another token where two are nearly tied.
        """
        self.decoding = CogLMDecoding(compile, cuda_graph, fused)

    # Weights shared between stages -----------------------------------------------------------------------------------

    @classmethod
    def from_transformer(
        cls,
        transformer: "CogLMModel",
        super_resolution: str,
        fine_grid: Sequence[int],
        shares_backbone: bool = False,
        **config,
    ) -> "CogLMModel":
        """
        A super-resolution model that starts from a trained CogLM, as the release's training does.

        Canvas attention starts as a copy of the layer's own. Each canvas cell gets the position embedding of the
        low-resolution cell it lies in (the release tiles the low-resolution table instead, shifted by one).

        Args:
            transformer (`CogLMModel`): The trained CogLM.
            super_resolution (`str`): `"direct"` or `"iterative"`.
            fine_grid (`Sequence[int]`): Rows and columns of the canvas.
            shares_backbone (`bool`): Hold the parameters of `transformer` themselves instead of copies (direct only).
            config: Other fields to change.

        Raises:
            ValueError: If `config` makes a backbone of another shape.
        """
        fields = {**transformer.config.to_dict(), **config}
        fields.update(super_resolution=super_resolution, fine_grid=fine_grid, shares_backbone=shares_backbone)
        fields["num_text_slots"] = config.get("num_text_slots")
        model = cls(CogLMConfig(**fields)).to(transformer.device, transformer.dtype)
        if shares_backbone:
            model.share_backbone(transformer)
        else:
            missing, unexpected = model.load_state_dict(transformer.state_dict(), strict=False)
            lost = [name for name in [*missing, *unexpected] if "canvas_" not in name]
            if lost:
                raise ValueError(
                    f"`config` must keep the layers of `transformer`, but {lost[0]} is in one of both only."
                )
        with torch.no_grad():
            layout, (rows, columns) = model.config.layout, model.config.image_grid
            table = transformer.position_embeddings.weight[layout.image_positions].unflatten(0, (rows, columns))
            for axis, (fine, low) in enumerate(zip(fine_grid, (rows, columns))):
                table = table.repeat_interleave(fine // low, axis)
            model.canvas_position_embeddings.weight.copy_(table.flatten(0, 1))
            if super_resolution == "direct":
                for layer, source in zip(model.layers, transformer.layers):
                    layer.canvas_attention.load_state_dict(source.attention.state_dict())
        return model

    def share_backbone(self, transformer: "CogLMModel") -> None:
        """
        Use the parameters of `transformer` for all but the canvas: one copy in memory, none in this model's files.

        Raises:
            ValueError: If this is no direct super-resolution, or the shapes of the two models differ.
        """
        if self.config.super_resolution != "direct":
            raise ValueError(
                "`share_backbone` is for `super_resolution='direct'`, but this model has "
                f"{self.config.super_resolution!r}."
            )
        for field in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "image_grid",
            "image_position",
        ):
            if getattr(self.config, field) != getattr(transformer.config, field):
                raise ValueError(
                    f"`transformer` must have `{field}` = {getattr(self.config, field)} like this model, but has "
                    f"{getattr(transformer.config, field)}."
                )
        lent = dict(transformer.named_parameters())
        for module, name, path in self._backbone_parameters():
            module._parameters[name] = lent[path]
        self.config.shares_backbone = True

    def save_pretrained(self, save_directory, state_dict: dict | None = None, **kwargs) -> None:
        if not self.config.shares_backbone:
            return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        if state_dict is not None:
            state_dict = {key: value for key, value in state_dict.items() if "canvas_" in key}
        lent = [(module, name, module._parameters[name]) for module, name, _ in self._backbone_parameters()]
        self._forget_backbone()
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            for module, name, parameter in lent:
                module._parameters[name] = parameter

    def _forget_backbone(self) -> None:
        """Hold nothing where [`CogLMModel.share_backbone`] puts the parameters of another model."""
        for module, name, _ in self._backbone_parameters():
            module._parameters[name] = None

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args, **kwargs) -> None:
        if self.config.shares_backbone:
            # quantisation has put new layers there, which must not take memory
            self._forget_backbone()
            missing_keys = {key for key in missing_keys if "canvas_" in key}
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _backbone_parameters(self) -> list[tuple[nn.Module, str, str]]:
        """Module, name and path of every parameter that CogLM has too."""
        return [
            (module, name, f"{path}.{name}" if path else name)
            for path, module in self.named_modules()
            if "canvas_" not in path
            for name in module._parameters
        ]


def attention_bias(
    attention_mask: torch.Tensor | None, text_mask: torch.Tensor | None, text_attention_bias: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """
    Mask and text bias as one tensor `(batch_size, 1, rows, keys)` to add to the scores; `None` for all zeros.

    Masked scores get a large negative number instead of minus infinity, so that a row with every key masked attends to
    all of them alike, as in the release.

    A mask that holds numbers is such a tensor already.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        return attention_mask[:, None]
    if attention_mask is None and (text_mask is None or not text_attention_bias):
        return None
    if text_mask is not None and text_attention_bias:
        bias = (text_mask * text_attention_bias)[:, None, None]
    else:
        bias = torch.zeros((), device=attention_mask.device)
    if attention_mask is not None:
        bias = torch.where(attention_mask[:, None], bias, torch.finfo(dtype).min / 2)
    return bias.to(dtype)


def _adds_in_float32(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Whether the device multiplies these 16-bit numbers and adds the products in float32, as it does without a copy of
    the weights in float32; not in training, for which PyTorch has no such product.
    """
    return (
        weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and hidden_states.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
    )


def _select_positions(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if positions.ndim == 1:
        return hidden_states[:, positions]
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


for _public in (CogLMConfig, CogLMModel):
    _public.__module__ = "cogview_pipelines"
