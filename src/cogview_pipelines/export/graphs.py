"""The stages of CogView2 as ONNX graphs of plain operators: tensors in, tensors out, no loop and no sampling."""

import io
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..generation.token_sequence import TokenSequence
from ..models.cogview2.modeling_coglm import CogLMModel
from ..models.cogview2.modeling_coglm_canvas import CogLMCanvasModel

if TYPE_CHECKING:
    import onnx

OPSET = 18


class _GivenCache:
    """Keys and values that came from outside, and what they have become."""

    def __init__(self, past: tuple[torch.Tensor, ...]):
        self.past = past
        self.present: list[torch.Tensor] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.past[0].dtype

    def update(self, layer: int, keys_values: torch.Tensor) -> torch.Tensor:
        """As of [`KeyValueCache`]."""
        self.present.append(torch.cat([self.past[layer], keys_values], 3))
        return self.present[-1]


class TextStage(nn.Module):
    """
    CogLM over new tokens, be it a whole context or the one written last.

    Inputs are `input_ids` and `position_ids`, `(batch_size, new)`; `bias`, `(batch_size, new, past + new)`, which is
    added to the scores; and of each layer `past.i`, `(2, batch_size, num_heads, past, head_dim)`. Outputs are the
    `logits` of the image tokens after the last new one, `(batch_size, num_image_tokens)`, and `present.i`, the keys
    and values of all, to be given back as `past.i`.
    """

    def __init__(self, model: CogLMModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, bias, *past):
        cache = _GivenCache(past)
        last = torch.arange(input_ids.shape[1], device=input_ids.device)[-1:]
        output = self.model(input_ids, position_ids, bias, cache=cache, logits_positions=last)
        return output.logits[:, 0], *cache.present


class CanvasStage(nn.Module):
    """
    A pass of super-resolution over one canvas.

    Inputs are `context_ids` and `context_positions`, `(1, context_length)`; the boolean `context_mask`,
    `(1, context_length, context_length)`; `canvas_ids`, `(1, canvas_length)`; and `cells`, the indices of the cells
    that are drawn. The output is their `logits`, `(1, cells, num_image_tokens)`.
    """

    def __init__(self, model: CogLMCanvasModel):
        super().__init__()
        self.model = model

    def forward(self, context_ids, context_positions, context_mask, canvas_ids, cells):
        keys = context_mask[:, 0]  # of iterative super-resolution, whose rows are alike; the other asks for none
        context = TokenSequence(context_ids, context_positions, context_mask, keys, keys)
        return self.model(canvas_ids, context, logits_positions=cells).logits


class PixelStage(nn.Module):
    """`tokens`, `(1, rows, columns)`, to `pixels` in 0..1, `(1, 3, height, width)`, at one compression rate."""

    def __init__(self, vqvae: nn.Module, compression_rate: int):
        super().__init__()
        self.vqvae = vqvae
        self.compression_rate = compression_rate

    def forward(self, tokens):
        return self.vqvae.decode(tokens, self.compression_rate).sample.clamp(0, 1)


def text_graph(model: CogLMModel) -> "onnx.ModelProto":
    """[`TextStage`] of a model as a graph; batch size, `past` and `new` are free."""
    config = model.config
    layers, head_dim = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, 2, config.num_attention_heads, 3, head_dim) for _ in range(layers)]
    new = torch.zeros(2, 4, dtype=torch.long)
    names = [f"past.{layer}" for layer in range(layers)]
    free = {
        "input_ids": {0: "batch_size", 1: "new"},
        "position_ids": {0: "batch_size", 1: "new"},
        "bias": {0: "batch_size", 1: "new", 2: "all"},
        "logits": {0: "batch_size"},
        **{name: {1: "batch_size", 3: "past"} for name in names},
        **{f"present.{layer}": {1: "batch_size", 3: "all"} for layer in range(layers)},
    }
    outputs = ["logits", *(f"present.{layer}" for layer in range(layers))]
    inputs = {"input_ids": new, "position_ids": new, "bias": torch.zeros(2, 4, 7), **dict(zip(names, past))}
    return _trace(TextStage(model), inputs, outputs, free)


def canvas_graph(model: CogLMCanvasModel) -> "onnx.ModelProto":
    """[`CanvasStage`] of a model as a graph; the number of `cells` is free."""
    config = model.config
    length = config.num_text_slots
    if config.super_resolution == "direct":
        length += config.layout.image_length
    inputs = {
        "context_ids": torch.zeros(1, length, dtype=torch.long),
        "context_positions": torch.zeros(1, length, dtype=torch.long),
        "context_mask": torch.ones(1, length, length, dtype=torch.bool),
        "canvas_ids": torch.zeros(1, config.canvas_length, dtype=torch.long),
        "cells": torch.arange(config.canvas_length)[1::2],
    }
    return _trace(CanvasStage(model), inputs, ["logits"], {"cells": {0: "cells"}, "logits": {1: "cells"}})


def pixel_graph(vqvae: nn.Module, compression_rate: int) -> "onnx.ModelProto":
    """[`PixelStage`] of a model as a graph; `rows` and `columns` are free."""
    free = {"tokens": {1: "rows", 2: "columns"}, "pixels": {2: "height", 3: "width"}}
    tokens = torch.zeros(1, 3, 5, dtype=torch.long)
    return _trace(PixelStage(vqvae, compression_rate), {"tokens": tokens}, ["pixels"], free)


def _trace(
    stage: nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str], free: dict[str, dict[int, str]]
) -> "onnx.ModelProto":
    # The exporter that traces: the newer one takes a minute for each of these graphs. What does not change from one
    # call to the next may become a constant, which is why shapes that do are named.
    import onnx

    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            stage.eval(),
            tuple(inputs.values()),
            file,
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,  # would keep copies of weights under new names
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=free,
        )
    model = onnx.load_from_string(file.getvalue())
    _forget_guessed_shapes(model, free)
    _count_axes_from_the_front(model)
    return model


def _forget_guessed_shapes(model: "onnx.ModelProto", free: dict[str, dict[int, str]]) -> None:
    """Sizes that the trace took for fixed although they are free."""
    del model.graph.value_info[:]
    for output in model.graph.output:
        for axis, name in free.get(output.name, {}).items():
            output.type.tensor_type.shape.dim[axis].dim_param = name


def _count_axes_from_the_front(model: "onnx.ModelProto") -> None:
    """The exporter copies the negative axes of `movedim`, which the standard forbids."""
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Transpose" else ():
            axes = [axis % len(attribute.ints) for axis in attribute.ints]
            del attribute.ints[:]
            attribute.ints.extend(axes)
