"""What more than one transformer is built of: Sandwich-LN layers, dense attention, token embeddings that score."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops.gelu import gelu
from ..ops.linear import fused_linear, fuses
from ..ops.processor import multiplies


class LayerCache(Protocol):
    """What dense attention asks of a cache; those of `generation/cache.py` are such."""

    dtype: torch.dtype

    def update(self, layer: int, keys_values: torch.Tensor) -> torch.Tensor:
        """Add `(2, batch_size, num_heads, new, head_dim)` keys and values to a layer; returns all it attends to."""


class DenseAttention(nn.Module):
    """Projections of one attention: fused query, key and value, and the output."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.pb_relaxation_alpha = config.pb_relaxation_alpha
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def project(
        self, hidden_states: torch.Tensor, norm: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Query, key and value, each `(batch_size, positions, num_heads, head_dim)`: views of one tensor. With a `norm`,
        of the states after it.
        """
        return self._project(hidden_states, norm).unbind(2)

    def _project(self, hidden_states: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        if norm is None:
            projected = self.query_key_value(hidden_states)
        else:
            projected = fused_linear(hidden_states, self.query_key_value, input_norm=norm)
        return projected.unflatten(-1, (3, self.num_heads, -1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None,
        cache: LayerCache | None,
        layer: int,
        norm: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Dense attention before its output projection; also returns this call's keys and values. All heads last. A
        `norm` is given if it has still to be applied to the states.
        """
        projected = self._project(hidden_states, norm)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind()
        all_keys, all_values = key, value
        if cache is not None:
            all_keys, all_values = cache.update(layer, projected[:, :, 1:].permute(2, 0, 3, 1, 4)).unbind()
            query = query.to(all_keys.dtype)  # the cache's: on a CPU, 16-bit attention is many times slower
        dropout = self.dropout if self.training else 0.0
        if self.pb_relaxation_alpha is None:
            output = dense_attention(query, all_keys, all_values, bias, dropout)
        else:
            output = pb_relaxed_attention(query, all_keys, all_values, bias, dropout, self.pb_relaxation_alpha)
        return output.transpose(1, 2).to(hidden_states.dtype), key.transpose(1, 2), value.transpose(1, 2)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    """
    Attention of all queries to all keys, by PyTorch's function.

    On a CPU, 16-bit numbers go through it in float32 while gradients are wanted, whose backward pass takes half the
    time of theirs, also under autocast; and wherever the processor has no arithmetic for them.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, positions, head_dim)`): As for SDPA.
        bias (`torch.Tensor`, *optional*): Added to the scores.
        dropout (`float`): Probability of dropping an attention weight.
        is_causal (`bool`): Whether queries see no later keys; then there is no `bias`.
    """
    halves = query.is_cpu and query.dtype in (torch.bfloat16, torch.float16)
    if not halves or not (torch.is_grad_enabled() or not multiplies(query.dtype)):
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, is_causal)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), bias, dropout, is_causal)
        return attended.to(query.dtype)


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


class FeedForward(nn.Module):
    """Feed-forward layer with the tanh approximation of GELU."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if fuses(hidden_states, self.dense_h_to_4h):
            return self.dense_4h_to_h(fused_linear(hidden_states, self.dense_h_to_4h, gelu=True))
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states)))


class LazyDropout(nn.Dropout):
    """Dropout that costs nothing while there is none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) if self.training else hidden_states


class SandwichParts(GradientCheckpointingLayer):
    """
    The parts of a layer in Sandwich-LN order: a norm before each sub-layer, and another between it and the residual
    addition. What attends to what is up to the classes that are made of them.

    Args:
        config (`PreTrainedConfig`): Of the model: `hidden_size`, `intermediate_size`, `num_attention_heads`,
            `layer_norm_eps`, `hidden_dropout`, `attention_dropout` and `pb_relaxation_alpha`.
        index (`int`): Which layer it is, from 0.
        norm_class (`type`, defaults to `nn.LayerNorm`): Of all four norms.

    Source: CogView (https://arxiv.org/abs/2105.13290), section 2.4.
    """

    def __init__(self, config: PreTrainedConfig, index: int, norm_class: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.index = index
        norm = {"normalized_shape": config.hidden_size, "eps": config.layer_norm_eps}
        self.attention_layernorm = norm_class(**norm)
        self.attention = DenseAttention(config)
        self.attention_output_layernorm = norm_class(**norm)
        self.mlp_layernorm = norm_class(**norm)
        self.mlp = FeedForward(config)
        self.mlp_output_layernorm = norm_class(**norm)
        self.dropout = LazyDropout(config.hidden_dropout)

    def before_attention(
        self, attention: DenseAttention, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, nn.Module | None]:
        """What the attention is given: states, and the norm of them unless it has been applied."""
        norm = self.attention_layernorm
        if fuses(hidden_states, norm, attention.query_key_value, inside=[attention]):
            return hidden_states, norm
        return norm(hidden_states), None

    def after_attention(
        self,
        attention: DenseAttention,
        hidden_states: torch.Tensor,
        attended: torch.Tensor,
        positions: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Output projection of the attention, heads last, and the feed-forward layer, each with its residual."""
        if positions is not None:
            index = positions if isinstance(positions, tuple) else (slice(None), positions)
            hidden_states, attended = hidden_states[index], attended[index]
        hidden_states = self._add(
            attention.dense, attended.flatten(-2), self.attention_output_layernorm, hidden_states
        )
        mlp = self.mlp
        if type(mlp) is FeedForward and fuses(hidden_states, self.mlp_layernorm, mlp.dense_h_to_4h, inside=[mlp]):
            wide = fused_linear(hidden_states, mlp.dense_h_to_4h, input_norm=self.mlp_layernorm, gelu=True)
            return self._add(mlp.dense_4h_to_h, wide, self.mlp_output_layernorm, hidden_states)
        return hidden_states + self.mlp_output_layernorm(self.dropout(mlp(self.mlp_layernorm(hidden_states))))

    def _add(
        self, layer: nn.Linear, inputs: torch.Tensor, norm: nn.Module, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The states plus what a sub-layer's last linear layer makes of `inputs`, normed."""
        if not self.dropout.training and fuses(inputs, layer, norm, inside=[self.dropout]):
            return fused_linear(inputs, layer, output_norm=norm, residual=hidden_states)
        return hidden_states + norm(self.dropout(layer(inputs)))


class SandwichLayer(SandwichParts):
    """A layer whose rows attend to those of the same sequence and to what a cache holds of it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        positions: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The new states; with `positions`, of those only: the others serve as keys and values. They are an index, the
        same for all sequences; or indices of sequences and of positions in them, and the states are `(number, width)`.
        """
        states, norm = self.before_attention(self.attention, hidden_states)
        attended, _, _ = self.attention(states, bias, cache, self.index, norm)
        return self.after_attention(self.attention, hidden_states, attended, positions)


class TokenEmbedding(nn.Embedding):
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


def shrink_gradient(embeddings: torch.Tensor, scale: float) -> torch.Tensor:
    """
    The same embeddings, whose gradients come out `scale` times as large.

    Source: CogView (https://arxiv.org/abs/2105.13290), section 2.4: it keeps training in float16 stable.
    """
    if scale == 1 or not embeddings.requires_grad:  # no rounding where there is no gradient
        return embeddings
    return embeddings * scale + embeddings.detach() * (1 - scale)


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
        assert attention_mask is not None
        bias = torch.zeros((), device=attention_mask.device)
    if attention_mask is not None:
        bias = torch.where(attention_mask[:, None], bias, torch.finfo(dtype).min / 2)
    return bias.to(dtype)


def select_positions(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """States of some positions: the same for all sequences, or of each its own, `(batch_size, positions)`."""
    if positions.ndim == 1:
        return hidden_states[:, positions]
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


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
