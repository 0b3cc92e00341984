"""Super-resolution of CogView2: CogLM's layers over a canvas of fine tokens, which attends locally."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput

from ...generation.token_sequence import IGNORED_LABEL, TokenSequence
from ...ops.key_set import KeySet
from ...ops.local_attention import local_attention
from ..adapters import fused_adapters, lent_parameters, plain_parameters
from ..conventions import refuse_unused
from ..layers import DenseAttention, LazyDropout, SandwichParts, TokenEmbedding, attention_bias, select_positions
from ..loading import check_grid
from .modeling_coglm import (
    CogLMConfig,
    CogLMModel,
    CogLMPreTrainedModel,
    positions_of_last_layer,
)

SUPER_RESOLUTIONS = ("direct", "iterative")
DEFAULT_TEXT_SLOTS = {"direct": 96, "iterative": 16}
# Of a lent backbone: what must be as in the model that borrows it.
BACKBONE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_grid",
    "image_position",
)


class CogLMCanvasConfig(CogLMConfig):
    """
    Configuration of [`CogLMCanvasModel`]; by default that of the released direct super-resolution.

    Args:
        super_resolution (`str`):
            `"direct"`: the canvas has attention projections of its own and sees a window of the low-resolution tokens.
            `"iterative"`: the canvas sees the text slots.
        fine_grid (`Sequence[int]`): Rows and columns of the canvas.
        num_text_slots (`int`): Text slots of the context (default: 96 direct, 16 iterative).
        kernel_size (`Sequence[int]`): Rows and columns of the window on the canvas.
        cross_kernel_size (`Sequence[int]`): Rows and columns of the window on the low-resolution tokens (direct only).
        shares_backbone (`bool`): Direct super-resolution only: all but the extra weights are those of another model,
            which [`CogLMCanvasModel.share_backbone`] lends; they are neither saved nor loaded here.
        kwargs: Fields of [`CogLMConfig`].
    """

    model_type = "coglm_canvas"
    model_class: ClassVar[str] = "CogLMCanvasModel"
    released_models: ClassVar[dict[str, dict[str, Any]]] = {
        "cogview2-dsr": {"super_resolution": "direct"},
        "cogview2-itersr": {"super_resolution": "iterative"},
    }

    def __init__(
        self,
        super_resolution: str = "direct",
        fine_grid: Sequence[int] = (60, 60),
        num_text_slots: int | None = None,
        kernel_size: Sequence[int] = (9, 5),
        cross_kernel_size: Sequence[int] = (5, 5),
        shares_backbone: bool = False,
        **kwargs,
    ):
        if super_resolution not in SUPER_RESOLUTIONS:
            raise ValueError(f"`super_resolution` must be one of {SUPER_RESOLUTIONS}, but is {super_resolution!r}.")
        if shares_backbone and super_resolution != "direct":
            raise ValueError(
                "`shares_backbone` is for `super_resolution='direct'`, the only stage whose backbone stays as it was."
            )
        self.super_resolution = super_resolution
        self.fine_grid = check_grid("fine_grid", fine_grid)
        self.num_text_slots = DEFAULT_TEXT_SLOTS[super_resolution] if num_text_slots is None else num_text_slots
        self.kernel_size = check_grid("kernel_size", kernel_size)
        self.cross_kernel_size = check_grid("cross_kernel_size", cross_kernel_size)
        self.shares_backbone = shares_backbone
        super().__init__(**kwargs)
        if any(fine % low for fine, low in zip(self.fine_grid, self.image_grid)):
            raise ValueError(
                f"`fine_grid` must be a multiple of `image_grid` {self.image_grid}, but is {self.fine_grid}."
            )

    @classmethod
    def of_transformer(cls, config: CogLMConfig, **fields) -> "CogLMCanvasConfig":
        """
        The configuration of a canvas on the layers of a CogLM.

        Args:
            config ([`CogLMConfig`]): Of the CogLM.
            fields: What is added or changed.
        """
        own = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
        return cls(**{**own, **fields})

    @property
    def canvas_length(self) -> int:
        """Number of canvas cells (release: 3,600)."""
        return self.fine_grid[0] * self.fine_grid[1]


@dataclass
class CogLMContext:
    """
    What the canvas attends to, encoded once for all passes.

    Args:
        keys, values (`list[torch.Tensor]`): Of each layer, `(batch_size, context_length, num_heads, head_dim)`.
        key_mask (`torch.Tensor` of shape `(batch_size, context_length)`): False at padding.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_mask: torch.Tensor

    def __len__(self) -> int:
        return self.key_mask.shape[0]

    def repeat_interleave(self, repeats: int) -> "CogLMContext":
        """Every context `repeats` times in a row."""
        keys, values = ([t.repeat_interleave(repeats, 0) for t in tensors] for tensors in (self.keys, self.values))
        return CogLMContext(keys, values, self.key_mask.repeat_interleave(repeats, 0))


@dataclass
class CogLMCanvasModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`, *optional*): Mean cross-entropy over all cells with a label.
        logits (`torch.Tensor`, *optional*):
            Float32 scores over the image vocabulary, or over all of it, of shape `(batch_size, cells, tokens)`. While
            `labels` are given, only of the cells that have one: `(labelled, tokens)`, in order.
        last_hidden_state (`torch.Tensor`, *optional*): Instead of logits, with `output_logits=False`: the states that
            [`CogLMCanvasModel.logits`] makes them of, `(batch_size, cells, hidden_size)`.
        hidden_states (`tuple[torch.Tensor]`, *optional*): The states of the canvas after each layer.
        context (`CogLMContext`): The encoded context, to be passed to the next pass.
        label_losses (`torch.Tensor` of shape `(labelled,)`, *optional*): Cross-entropy of each label, in order.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    context: CogLMContext | None = None
    label_losses: torch.Tensor | None = None


class CogLMCanvasLayer(SandwichParts):
    """
    A layer of CogLM whose rows are those of the context, which attend densely, or canvas cells, which attend locally.
    """

    def __init__(self, config: CogLMCanvasConfig, index: int):
        super().__init__(config, index)
        self.config = config
        if config.super_resolution == "direct":
            self.canvas_attention = DenseAttention(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        context: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
        positions: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        The new states and, without a `context`, whose rows these then are, their keys and values.

        With `positions`, as of [`SandwichLayer`], only those states are computed.
        """
        on_canvas = context is not None and self.config.super_resolution == "direct"
        attention = self.canvas_attention if on_canvas else self.attention
        states, norm = self.before_attention(attention, hidden_states)
        key = value = None
        if context is None:
            attended, key, value = attention(states, bias, None, self.index, norm)
        else:
            attended = self._attend_locally(attention, states, norm, *context)
        return self.after_attention(attention, hidden_states, attended, positions), key, value

    def _attend_locally(
        self,
        attention: DenseAttention,
        states: torch.Tensor,
        norm: nn.Module | None,
        context_key: torch.Tensor,
        context_value: torch.Tensor,
        context_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.config
        query, key, value = attention.project(states, norm)
        if config.super_resolution == "direct":
            image = slice(config.num_text_slots, None)
            seen = KeySet(context_key[:, image], context_value[:, image], config.image_grid, config.cross_kernel_size)
        else:
            seen = KeySet(context_key, context_value, bias=context_bias)
        canvas = KeySet(key, value, config.fine_grid, config.kernel_size)
        return local_attention(query, [canvas, seen], config.fine_grid)


class CogLMCanvasModel(CogLMPreTrainedModel):
    """
    Direct or iterative super-resolution: `config.super_resolution` says which.

    A context (text, and low-resolution tokens if it is direct) is read once by [`CogLMCanvasModel.encode_context`];
    each pass over the canvas sees its keys and values.

    Source: the CogView2 release; https://arxiv.org/abs/2204.14217, section 3.2.
    """

    config_class = CogLMCanvasConfig
    main_input_name = "canvas_ids"
    _no_split_modules = ("CogLMCanvasLayer",)
    _keys_to_ignore_on_load_missing: list[str] | None
    config: CogLMCanvasConfig

    def __init__(self, config: CogLMCanvasConfig):
        super().__init__(config)
        self.word_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.canvas_position_embeddings = nn.Embedding(config.canvas_length, config.hidden_size)
        self.layers = nn.ModuleList(CogLMCanvasLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = LazyDropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        if config.shares_backbone:
            self._forget_backbone()
            self._keys_to_ignore_on_load_missing = [r"^(?!.*canvas_)"]
        self.post_init()

    # Forward -------------------------------------------------------------------------------------------------------

    def encode_context(self, sequence: TokenSequence) -> CogLMContext:
        """
        Read what the canvas attends to.

        While a model is offloaded, call `forward` with the sequence instead, which brings the weights: its output has
        the encoded context.

        Args:
            sequence ([`TokenSequence`]): Of `sequences.direct_super_resolution` or `iterative_super_resolution`.

        Raises:
            ValueError: If the backbone of the model has not been lent yet.
        """
        self._require_backbone()
        bias = attention_bias(sequence.attention_mask, None, 0.0, self.dtype)
        hidden_states = self._embed(sequence.input_ids) + self.position_embeddings(sequence.position_ids)
        hidden_states = self.dropout(hidden_states)
        keys, values = [], []
        for layer in self.layers:
            # of the last layer, the canvas sees keys and values only
            last = layer.index == self.config.num_hidden_layers - 1
            positions = sequence.input_ids.new_empty(0) if last else None
            hidden_states, key, value = layer(hidden_states, bias, positions=positions)
            keys.append(key)
            values.append(value)
        return CogLMContext(keys, values, sequence.key_mask)

    def forward(
        self,
        canvas_ids: torch.Tensor,
        context: TokenSequence | CogLMContext,
        *,
        labels: torch.Tensor | None = None,
        logits_positions: torch.Tensor | None = None,
        full_vocabulary: bool = False,
        output_hidden_states: bool = False,
        output_logits: bool = True,
        **unused,
    ) -> CogLMCanvasModelOutput:
        """
        One pass over a canvas.

        Args:
            canvas_ids (`torch.Tensor` of shape `(batch_size, canvas_length)`): Tokens of the canvas,
                `<start_of_image>` where unknown.
            context ([`TokenSequence`] or `CogLMContext`): What the canvas sees: as `sequences.py` makes it, or encoded
                by an earlier pass.
            labels (`torch.Tensor` of shape `(batch_size, canvas_length)`, *optional*): Target of each cell, -100 =
                none: there, the last layer serves as keys and values alone.
            logits_positions (`torch.Tensor` of shape `(cells,)` or `(batch_size, cells)`, *optional*):
                Compute logits of these cells only. The last layer, too, is left out elsewhere if they are the same for
                the whole batch.
            full_vocabulary (`bool`): Score text tokens too; by default image tokens only.
            output_hidden_states (`bool`): Return the states of the canvas after each layer.
            output_logits (`bool`): Without it, the output has `last_hidden_state` in their place.
            unused: Arguments of other models, as long as they ask for nothing: `return_dict=True`, `use_cache=False`.

        Raises:
            TypeError: If an argument of another model asks for something.
            ValueError: If the canvas is of another size, or the backbone has not been lent yet.
        """
        refuse_unused(self, unused)
        if canvas_ids.shape[1] != self.config.canvas_length:
            raise ValueError(
                f"`canvas_ids` must have {self.config.canvas_length} positions, but has {canvas_ids.shape[1]}."
            )
        if isinstance(context, TokenSequence):
            context = self.encode_context(context)
        labelled = None if labels is None else (labels != IGNORED_LABEL).nonzero(as_tuple=True)
        last_positions = positions_of_last_layer(logits_positions, labelled, output_hidden_states)
        hidden_states, states = self._run_canvas(canvas_ids, context, last_positions)
        kept: dict[str, Any] = {"hidden_states": tuple(states) if output_hidden_states else None, "context": context}
        if labels is not None:
            hidden_states = hidden_states if last_positions is not None else hidden_states[labelled]
            outputs = self._labelled_logits(hidden_states, labels[labelled], full_vocabulary)
            return CogLMCanvasModelOutput(**kept, **outputs)
        if logits_positions is not None and last_positions is None:
            hidden_states = select_positions(hidden_states, logits_positions)
        if output_logits:
            return CogLMCanvasModelOutput(logits=self.logits(hidden_states, full_vocabulary), **kept)
        return CogLMCanvasModelOutput(last_hidden_state=hidden_states, **kept)

    def logits(self, hidden_states: torch.Tensor, full_vocabulary: bool = False) -> torch.Tensor:
        """As in [`CogLMModel`], but iterative super-resolution multiplies in the model's dtype, as in the release."""
        dtype = None if self.config.super_resolution == "iterative" else torch.float32
        return self._score(hidden_states, full_vocabulary, dtype)

    def _run_canvas(
        self,
        canvas_ids: torch.Tensor,
        context: CogLMContext,
        last_positions: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The states after the last layer, and those after each."""
        self._require_backbone()
        positions = self.canvas_position_embeddings(torch.arange(canvas_ids.shape[1], device=canvas_ids.device))
        hidden_states = self.dropout(self._embed(canvas_ids) + positions)
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

    def _require_backbone(self) -> None:
        if self.word_embeddings.weight is None:
            raise ValueError(
                "The backbone of this model is that of another one (`shares_backbone`). Lend it first: "
                "`direct_sr_transformer.share_backbone(transformer)`; `CogView2Pipeline` does so by itself."
            )

    # Weights shared between stages -----------------------------------------------------------------------------------

    @classmethod
    def from_transformer(
        cls,
        transformer: CogLMModel,
        super_resolution: str,
        fine_grid: Sequence[int],
        shares_backbone: bool = False,
        **config,
    ) -> "CogLMCanvasModel":
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
        config |= {
            "super_resolution": super_resolution,
            "fine_grid": fine_grid,
            "shares_backbone": shares_backbone,
        }
        model = cls(CogLMCanvasConfig.of_transformer(transformer.config, **config))
        model = model.to(transformer.device, transformer.dtype)
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

    def share_backbone(self, transformer: CogLMModel) -> None:
        """
        Use the parameters of `transformer` for all but the canvas: one copy in memory, none in this model's files.

        Adapters of `transformer` are not lent: this model goes on with its weights as they are without them.

        Raises:
            ValueError: If this is no direct super-resolution, or the shapes of the two models differ.
        """
        if self.config.super_resolution != "direct":
            raise ValueError(
                "`share_backbone` is for `super_resolution='direct'`, but this model has "
                f"{self.config.super_resolution!r}."
            )
        for field in BACKBONE_FIELDS:
            if getattr(self.config, field) != getattr(transformer.config, field):
                raise ValueError(
                    f"`transformer` must have `{field}` = {getattr(self.config, field)} like this model, but has "
                    f"{getattr(transformer.config, field)}."
                )
        lent, fused = lent_parameters(transformer), fused_adapters(self)
        for module, name, path in self._backbone_parameters():
            if fused is not None and (module, name) in fused.kept:
                fused.kept[module, name] = lent[path]
            else:
                module._parameters[name] = lent[path]
        transformer.lends_weights = True
        self.config.shares_backbone = True
        self.config.vocab_size = transformer.config.vocab_size  # which may have been given more tokens since

    def keep_backbone(self, transformer: CogLMModel) -> None:
        """
        Take over the weights of a CogLM for good, as if they had always been this model's own.

        Args:
            transformer (`CogLMModel`): The one that this model was trained on; it should not be used any more.
        """
        self.share_backbone(transformer)
        transformer.lends_weights = False
        self.config.shares_backbone = False
        self._keys_to_ignore_on_load_missing = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        **kwargs,
    ) -> None:
        """As in transformers, but a backbone that is lent is left out, unless adapters are fused into it."""
        # by name: diffusers reads this signature to know what it may ask for
        options = {
            "is_main_process": is_main_process,
            "push_to_hub": push_to_hub,
            "max_shard_size": max_shard_size,
            "variant": variant,
            "token": token,
            "save_peft_format": save_peft_format,
            **kwargs,
        }
        if not self.config.shares_backbone:
            return super().save_pretrained(save_directory, state_dict=state_dict, **options)
        if self._backbone_differs():
            self.config.shares_backbone = False
            try:
                return super().save_pretrained(save_directory, state_dict=state_dict, **options)
            finally:
                self.config.shares_backbone = True
        if state_dict is not None:
            state_dict = {key: value for key, value in state_dict.items() if "canvas_" in key}
        lent = [(module, name, module._parameters[name]) for module, name, _ in self._backbone_parameters()]
        self._forget_backbone()
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **options)
        finally:
            for module, name, parameter in lent:
                module._parameters[name] = parameter

    def _backbone_differs(self) -> bool:
        """Whether the weights of this model are not those of its lender, since adapters are fused into either."""
        if fused_adapters(self) is not None:
            return True
        lent = [module._parameters[name] for module, name, _ in self._backbone_parameters()]
        return any(getattr(parameter, "lender_is_fused", False) for parameter in lent)

    def _forget_backbone(self) -> None:
        """Hold nothing where [`CogLMCanvasModel.share_backbone`] puts the parameters of another model."""
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
        return [(module, name, path) for module, name, path in plain_parameters(self) if "canvas_" not in path]


for _public in (CogLMCanvasConfig, CogLMCanvasModel):
    _public.__module__ = "cogview_pipelines"
