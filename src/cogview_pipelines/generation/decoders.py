"""
More tokens for every sequence, one or a few: the step that text to image, completion and captions repeat, in each way
that it can run.

[`Decoder`] runs the model as it is. On a CPU, [`FusedDecoder`] runs all of a step in one kernel. [`StaticDecoder`]
runs the model on tensors of fixed shapes at fixed addresses, so that one compilation and one captured CUDA graph serve
all steps and prompts. [`Decoding`] says which, and keeps what can be used again.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..models.cogview2.modeling_coglm import CogLMConfig, CogLMModel
from ..models.layers import DenseAttention, FeedForward, LazyDropout, SandwichLayer, TokenEmbedding, attention_bias
from ..ops.decode_step import LAYER_PARTS, DecodeStep, decode_step_refusals
from .cache import KeyValueCache, SlotCache
from .token_sequence import TokenSequence

logger = logging.getLogger(__name__)

# A fixed step reads a whole number of blocks of the cache: few variants, and little that is masked.
BLOCK = 128
# Positions that a pass predicts at once, unless told otherwise (`benchmarks/bench_parallel_decoding.py`). On a CPU, a
# pass takes longer in proportion to its tokens, of all sequences, from about so many on; what it takes beside them is
# the time of about so many tokens, with the width of the shipped model as with 1,024.
PARALLEL, LEAST_PARALLEL_ON_CPU, TOKENS_ON_CPU, FIXED_COST_ON_CPU = 32, 8, 64, 7.0
# All that a CogLM consists of, as the fused step knows it.
_PLAIN_MODULES = {CogLMModel, SandwichLayer, DenseAttention, FeedForward, LazyDropout, TokenEmbedding}
_PLAIN_MODULES |= {nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList}


class Decoder:
    """
    Sequences that grow, and the logits of what comes next.

    Args:
        model (`CogLMModel`): The model.
        num_sequences (`int`): Number of sequences.
        max_length (`int`): The longest that they will get.
        full_vocabulary (`bool`): Logits of all tokens, not of image tokens only.
        device (`torch.device`): Where to compute.
    """

    def __init__(
        self, model: CogLMModel, num_sequences: int, max_length: int, full_vocabulary: bool, device: torch.device | str
    ):
        self.model, self.full_vocabulary = model, full_vocabulary
        self.cache = KeyValueCache(model.config, num_sequences, max_length, cache_dtype(model, device), device)
        self.bias = torch.zeros(num_sequences, 1, max_length, dtype=self.cache.dtype, device=device)
        self.hidden = torch.finfo(self.cache.dtype).min / 2

    def begin(self, context: KeyValueCache, context_bias: torch.Tensor, repeats: torch.Tensor) -> None:
        """
        Start from encoded contexts; each is continued by `repeats` sequences.

        Args:
            context (`KeyValueCache`): Their keys and values.
            context_bias (`torch.Tensor` of shape `(num_contexts, 1, context_length)`): Added to the scores of their
                keys in every step.
            repeats (`torch.Tensor` of shape `(num_contexts,)`): They add up to the number of sequences.
        """
        self.cache.load(context, repeats)
        self.bias.zero_()
        self.bias[:, :, : context.length] = context_bias.repeat_interleave(repeats, 0)

    def append(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """
        Append tokens and predict the next.

        Args:
            input_ids (`torch.Tensor` of shape `(num_sequences, new)`): Each sees those before it.
            position_ids (`torch.Tensor` of shape `(new,)` or `(num_sequences, new)`): Their position ids.

        Returns:
            `torch.Tensor` of shape `(num_sequences, tokens)`: float32. The next call may overwrite it.
        """
        return self._read(input_ids, position_ids, input_ids.shape[1] - 1)[:, 0]

    def append_all(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """
        Append tokens as `append` does, and predict what follows each of them.

        Args:
            input_ids (`torch.Tensor` of shape `(num_sequences, new)`): Each sees those before it.
            position_ids (`torch.Tensor` of shape `(new,)` or `(num_sequences, new)`): Their position ids.

        Returns:
            `torch.Tensor` of shape `(num_sequences, new, tokens)`: float32.
        """
        return self._read(input_ids, position_ids, 0)

    def truncate(self, length: int | torch.Tensor) -> None:
        """
        Forget the end of the sequences, so that others can be tried.

        Args:
            length (`int` or `torch.Tensor` of shape `(num_sequences,)`): What stays, of all or of each.
        """
        self.cache.truncate(length)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these sequences only: the others are whole."""
        self.cache.keep_rows(rows)
        self.bias = self.bias[rows]

    def reorder(self, rows: torch.Tensor) -> None:
        """Go on with these sequences. `rows` has one entry per sequence; some may be equal."""
        self.cache.reorder(rows)
        self.bias.copy_(self.bias[rows])

    def _read(self, input_ids: torch.Tensor, position_ids: torch.Tensor, first: int) -> torch.Tensor:
        """Append tokens; logits after them, from the `first` on."""
        new = input_ids.shape[1]
        wanted = torch.arange(first, new, device=input_ids.device) if first else None
        return self.model(
            input_ids,
            position_ids.expand(len(input_ids), -1),
            self._bias_of_new(new),
            cache=self.cache,
            logits_positions=wanted,
            full_vocabulary=self.full_vocabulary,
        ).logits

    def _bias_of_new(self, new: int) -> torch.Tensor:
        """What is added to the scores of `new` tokens, `(num_sequences, new, keys)`: none sees those after it."""
        length, lengths = self.cache.length, self.cache.lengths
        bias = self.bias[:, :, : length + new]
        if lengths is not None:
            # where each sequence has its own length, all beyond it is old
            columns = torch.arange(length + new, device=bias.device)
            last = lengths[:, None] + torch.arange(new, device=bias.device)
            return torch.where(columns <= last[..., None], bias, self.hidden)
        if new > 1:
            later = torch.full((new, new), self.hidden, dtype=bias.dtype, device=bias.device).triu(1)
            bias = bias.repeat(1, new, 1)
            bias[:, :, length:] = later
        return bias


class FusedDecoder(Decoder):
    """A [`Decoder`] whose steps are one call of a kernel; see [`fused_decoding_refusals`]."""

    def __init__(self, *args):
        super().__init__(*args)
        model = self.model
        self.step = DecodeStep(
            model.word_embeddings.weight,
            model.position_embeddings.weight,
            model.final_layernorm,
            [_step_parts(layer) for layer in model.layers],
            model.config.num_attention_heads,
            len(model.word_embeddings.weight) if self.full_vocabulary else model.config.num_image_tokens,
            self.bias[:, 0],
        )

    def keep_rows(self, rows: torch.Tensor) -> None:
        super().keep_rows(rows)
        self.step.set_bias(self.bias[:, 0])

    def _read(self, input_ids: torch.Tensor, position_ids: torch.Tensor, first: int) -> torch.Tensor:
        cache, new = self.cache, input_ids.shape[1]
        lengths = torch.full((len(input_ids),), cache.length) if cache.lengths is None else cache.lengths
        logits = self.step(input_ids, position_ids, lengths, cache.layers, new - first)
        cache.advance(new)
        return logits


def _step_parts(layer: SandwichLayer) -> dict[str, nn.Module]:
    """Where the kernel finds what."""
    inside = {"query_key_value": layer.attention, "dense": layer.attention}
    inside |= {"dense_h_to_4h": layer.mlp, "dense_4h_to_h": layer.mlp}
    return {name: getattr(inside.get(name, layer), name) for name in LAYER_PARTS}


def fused_decoding_refusals(
    model: CogLMModel, num_sequences: int, max_length: int, device: torch.device | str
) -> list[str]:
    """
    Why [`FusedDecoder`] cannot run a model: reasons of the kernel, and all that makes the model more than its weights.

    Args:
        model (`CogLMModel`): The model.
        num_sequences (`int`): Number of sequences.
        max_length (`int`): The longest that they will get.
        device (`torch.device`): Where to compute.

    Returns:
        `list[str]`: One reason a line; empty where it can.
    """
    return call_refusals(model, num_sequences, max_length, device) + model_refusals(model)


def call_refusals(model: CogLMModel, num_sequences: int, max_length: int, device: torch.device | str) -> list[str]:
    """The part of [`fused_decoding_refusals`] that differs from call to call."""
    reasons = decode_step_refusals(model.dtype, device, num_sequences, max_length)
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on")
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        reasons.append("all modules have hooks")
    return reasons


def model_refusals(model: CogLMModel) -> list[str]:
    """The part of [`fused_decoding_refusals`] that lies in the model, module by module and weight by weight."""
    if type(model) is not CogLMModel:
        return [f"the model is a {type(model).__name__}"]
    reasons = []
    if [getattr(layer, "index", None) for layer in model.layers] != list(range(model.config.num_hidden_layers)):
        reasons.append("its layers are not those of its config, in order")
    for name, module in model.named_modules():
        # a changed class is an adapter, a quantised layer or a parametrised one; a `forward` of its own, offloading
        if hasattr(module, "base_layer"):
            return [f"`{name}` has an adapter (`pipe.fuse_lora()` adds it to the weights)"]
        if type(module) not in _PLAIN_MODULES:
            reasons.append(f"`{name}` is a {type(module).__name__}")
        elif "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            reasons.append(f"`{name or 'the model'}` has hooks")
        elif module.training and _dropout(module):
            reasons.append(f"`{name}` is in training mode, with dropout")
        elif not _is_configured(name.rpartition(".")[2], module, model.config):
            reasons.append(f"`{name}` is not as the config says")
    for name, weight in model.named_parameters():
        if type(weight.data) is not torch.Tensor or weight.device.type != "cpu":
            reasons.append(f"`{name}` is a {type(weight.data).__name__} on {weight.device}")
        elif weight.dtype != model.dtype or not weight.is_contiguous():
            reasons.append(f"`{name}` is of {weight.dtype}, strides {weight.stride()}")
    return reasons


def _dropout(module: nn.Module) -> float:
    if isinstance(module, DenseAttention):
        return module.dropout
    return module.p if isinstance(module, LazyDropout) else 0.0


def _is_configured(name: str, module: nn.Module, config: CogLMConfig) -> bool:
    """Whether a module has the shapes by which the kernel reads its memory, and the epsilon of all norms."""
    hidden, wide = config.hidden_size, config.intermediate_size
    linear = {"query_key_value": (3 * hidden, hidden), "dense": (hidden, hidden)}
    linear |= {"dense_h_to_4h": (wide, hidden), "dense_4h_to_h": (hidden, wide)}
    shape = () if getattr(module, "weight", None) is None else tuple(module.weight.shape)
    if isinstance(module, nn.Linear):
        return shape == linear.get(name) and module.bias is not None
    if isinstance(module, nn.LayerNorm):
        return shape == (hidden,) and module.bias is not None and module.eps == config.layer_norm_eps
    if isinstance(module, TokenEmbedding):
        return shape[1:] == (hidden,) and shape[0] >= config.num_image_tokens
    return not isinstance(module, nn.Embedding) or shape[1:] == (hidden,)


@dataclass
class _StepInputs:
    """
    The fixed memory that a step reads: of every sequence, so many new tokens.

    Args:
        input_ids, position_ids, slots (`torch.Tensor` of shape `(num_sequences, new)`): Tokens, their positions, and
            where in the cache their keys and values go.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor


class StaticDecoder(Decoder):
    """
    A [`Decoder`] whose steps have fixed shapes and addresses: one token or a window of them, and a whole number of
    blocks of keys, of which a mask hides those that are not written yet. Sequences that are whole keep their place.

    Args:
        compile (`bool`): Run the step through `torch.compile`.
        cuda_graph (`bool`): Capture it and replay it.
        width (`int`): Tokens of the window. Fewer than that, but more than one, are filled up to it with what will be
            overwritten: `max_length` must leave room.
    """

    def __init__(self, *args, compile: bool, cuda_graph: bool, width: int = 1):
        super().__init__(*args)
        self.compile, self.cuda_graph, self.width = compile, cuda_graph, width
        num_sequences, _, max_length = self.bias.shape
        device = self.bias.device
        self.inputs = {
            new: _StepInputs(
                *(torch.zeros(num_sequences, new, dtype=torch.long, device=device) for _ in fields(_StepInputs))
            )
            for new in sorted({1, width})
        }
        self.columns = torch.arange(max_length, device=device)
        self.steps: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}
        self.active: torch.Tensor | None = None  # the sequences that go on; all of them if none has been dropped

    def begin(self, context: KeyValueCache, context_bias: torch.Tensor, repeats: torch.Tensor) -> None:
        super().begin(context, context_bias, repeats)
        self.active = None

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.active = rows if self.active is None else self.active[rows]
        if self.cache.lengths is not None:
            self.cache.lengths = self.cache.lengths[rows]

    def reorder(self, rows: torch.Tensor) -> None:
        assert self.active is None, "all sequences of a beam go on"
        super().reorder(rows)

    def append(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        for piece in self._pieces(input_ids):
            logits = self._append_piece(input_ids[:, piece], position_ids[..., piece])
        return logits[:, -1]

    def append_all(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits = [
            self._append_piece(input_ids[:, piece], position_ids[..., piece]) for piece in self._pieces(input_ids)
        ]
        # every piece is predicted in the same memory
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def _pieces(self, input_ids: torch.Tensor) -> list[slice]:
        return [slice(first, first + self.width) for first in range(0, input_ids.shape[1], self.width)]

    def _append_piece(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits after each of at most `width` tokens, in memory of their own where there is more than one."""
        new = input_ids.shape[1]
        width = 1 if new == 1 else self.width
        inputs, lengths = self.inputs[width], self.cache.lengths
        rows = slice(None) if self.active is None else self.active
        inputs.input_ids[rows, :new] = input_ids
        inputs.position_ids[rows, :new] = position_ids.expand_as(input_ids)
        inputs.slots[rows] = self.columns[:width] + (self.cache.length if lengths is None else lengths[:, None])
        visible = min(-(-(self.cache.length + width) // BLOCK) * BLOCK, len(self.columns))
        if (visible, width) not in self.steps:
            self.steps[visible, width] = self._make_step(visible, width)
        logits = self.steps[visible, width]()
        self.cache.advance(new)
        return logits if width == 1 and self.active is None else logits[rows, :new].clone()

    def _make_step(self, visible: int, width: int) -> Callable[[], torch.Tensor]:
        """A function without arguments that reads and writes the fixed tensors only."""
        predict = _compiled_prediction(self.bias.device.type) if self.compile else _predict
        own = self.inputs[width]
        inputs = (self.model, own.input_ids, own.position_ids, self.bias, self.columns, own.slots)

        def step() -> torch.Tensor:
            return predict(*inputs, self.cache.layers, visible, self.hidden, self.full_vocabulary)

        return self._capture(step) if self.cuda_graph else step

    def _capture(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The step as a CUDA graph. Running it before changes nothing: it writes what the first replay writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries take their memory and choose their kernels; compilers compile
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def _predict(
    model: CogLMModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    bias: torch.Tensor,
    columns: torch.Tensor,
    slots: torch.Tensor,
    layers: list[torch.Tensor],
    visible: int,
    hidden: float,
    full_vocabulary: bool,
) -> torch.Tensor:
    """
    Logits after each new token, whose keys and values go to `slots`, with attention to the first `visible` keys, as
    far as they do not lie behind its own.
    """
    seen = torch.where(columns[:visible] <= slots[..., None], bias[:, :, :visible], hidden)
    cache = SlotCache(layers, slots, visible)
    return model(input_ids, position_ids, seen, cache=cache, full_vocabulary=full_vocabulary).logits


def _compiled_prediction(device_type: str) -> Callable[..., torch.Tensor]:
    """The compiled [`_predict`]; PyTorch keeps the code of each batch size and number of blocks."""
    # on a GPU a step is products of a few rows with large matrices, for which the default tile sizes are poor
    options = {"coordinate_descent_tuning": True} if device_type == "cuda" else None
    compiled = torch.compile(_predict, fullgraph=True, dynamic=False, options=options)

    def run(*args) -> torch.Tensor:
        # there is one variant for each batch size and number of blocks, and more of them than the default allows;
        # hooks that come later must be noticed; for one query, the compiler's own fusion of products and softmax beats
        # the attention kernels
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch._dynamo.config.patch(recompile_limit=256, skip_nnmodule_hook_guards=False), math_only:
            return compiled(*args)

    return run


def cache_dtype(model: CogLMModel, device: torch.device | str) -> torch.dtype:
    """Of keys and values: the model's, but float32 on a CPU, whose 16-bit attention is many times slower."""
    return torch.float32 if torch.device(device).type == "cpu" and model.dtype.itemsize < 4 else model.dtype


def encode_context(
    model: CogLMModel,
    context: TokenSequence,
    text_attention_bias: float,
    full_vocabulary: bool,
    device: torch.device | str,
) -> tuple[KeyValueCache, torch.Tensor, torch.Tensor]:
    """
    Read contexts in one forward pass.

    Returns:
        `tuple[KeyValueCache, torch.Tensor, torch.Tensor]`: Their keys and values, what is added to the scores of these
            keys in later steps, `(num_contexts, 1, length)`, and the logits after them, `(num_contexts, tokens)`.
    """
    length = context.input_ids.shape[1]
    cache = KeyValueCache(model.config, len(context), length, cache_dtype(model, device), device)
    logits = model(
        context.input_ids,
        context.position_ids,
        context.attention_mask,
        context.text_mask,
        text_attention_bias,
        cache=cache,
        logits_positions=torch.tensor([length - 1], device=device),
        full_vocabulary=full_vocabulary,
    ).logits[:, -1]
    bias = attention_bias(context.key_mask[:, None], context.text_mask, text_attention_bias, cache.dtype)
    assert bias is not None  # a mask was given
    return cache, bias[:, 0], logits


class Decoding:
    """
    How tokens are appended, and what is kept for the next call. Whoever decodes holds one, such as a pipeline.

    A step is small, and what surrounds its matrix products can take longer than they do. `compile` and `cuda_graph`
    give a step fixed shapes and keep its memory (keys and values of the last batch size) as long as this lives.

    What a model allows is checked once, and again when its modules, hooks, dtype, device or the memory of its weights
    have changed.

    Args:
        compile (`bool`): Run the step through `torch.compile`. It needs a C++ compiler (on a GPU, Triton) and a minute
            or so for each new batch size.
        cuda_graph (`bool`): Capture the step and replay it, with one launch for all of its kernels. It needs a CUDA
            device on which all weights stay, and a fraction of a second for each new batch size.
        fused (`bool`, defaults to `True`): On a CPU, without the other two, run all of a step in one kernel where
            there is one for it: built, for plain weights without hooks. It sums in float32 whatever the weights are,
            so that 16-bit models may draw another token where two are nearly tied.
        parallel (`int`, *optional*): How many positions a pass predicts at once. Those that are certain to be what
            writing one by one gives are kept: see [`generate`]. 1 writes them one by one. Default: 32; on a CPU fewer
            in batches, so that a pass reads about 64 tokens, but at least 8, and fewer again where hardly a guess
            holds (never, if a number is given). With `compile` and `cuda_graph` there is a step for one position and
            another for all of these, compiled or captured once. A model whose numbers depend on what shares a pass,
            such as a CogView with `norm_scale` `"sequence"`, is written one by one unless a number is given.
    """

    def __init__(
        self, compile: bool = False, cuda_graph: bool = False, fused: bool = True, parallel: int | None = None
    ):
        if parallel is not None and parallel < 1:
            raise ValueError(f"`parallel` must be at least 1, but is {parallel}.")
        self.compile, self.cuda_graph, self.fused, self.parallel = compile, cuda_graph, fused, parallel
        self._state: tuple | None = None  # of the model that the rest belongs to
        self._refusals: list[str] = []
        self._static: tuple[tuple, StaticDecoder] | None = None

    def num_parallel(self, model: CogLMModel, num_sequences: int, device: torch.device | str) -> int:
        """How many positions of each sequence a pass predicts at once."""
        if self.parallel is not None:
            return self.parallel
        if getattr(model, "depends_on_pieces", False):
            return 1
        if torch.device(device).type != "cpu":
            return PARALLEL
        return min(PARALLEL, max(LEAST_PARALLEL_ON_CPU, TOKENS_ON_CPU // max(num_sequences, 1)))

    def fixed_cost(self, device: torch.device | str) -> float | None:
        """What a pass takes beside its tokens, in tokens, where a [`Window`] may be narrowed; `None` elsewhere."""
        narrows = self.parallel is None and not (self.compile or self.cuda_graph)  # those have steps of two widths
        return FIXED_COST_ON_CPU if narrows and torch.device(device).type == "cpu" else None

    def decoder(
        self,
        model: CogLMModel,
        num_sequences: int,
        max_length: int,
        full_vocabulary: bool,
        device: torch.device | str,
        width: int = 1,
    ) -> Decoder:
        """
        A decoder for new sequences. That of fixed shapes is kept for later calls, and made anew for another number of
        sequences, another width, longer ones, or a model that has changed.

        Args:
            model, num_sequences, max_length, full_vocabulary, device: As for [`Decoder`].
            width (`int`, defaults to 1): How many tokens are usually appended at once.

        Raises:
            ValueError: If a CUDA graph is asked for on another device, or of weights that are not on it.
        """
        state = _state(model)
        if self._state != state:
            self._static = None  # its memory goes before the next takes its own
            self._refusals = model_refusals(model) if self.fused and not (self.compile or self.cuda_graph) else []
            self._state = state
            if torch.device(device).type == "cpu" and not call_refusals(model, num_sequences, max_length, device):
                for reason in self._refusals:
                    _tell_once(reason)
        device = torch.device(device)
        if self.compile or self.cuda_graph:
            return self._static_decoder(model, num_sequences, max_length, full_vocabulary, device, width)
        fused = self.fused and not self._refusals
        fused = fused and not call_refusals(model, num_sequences, max_length, device)
        return (FusedDecoder if fused else Decoder)(model, num_sequences, max_length, full_vocabulary, device)

    def _static_decoder(
        self,
        model: CogLMModel,
        num_sequences: int,
        max_length: int,
        full_vocabulary: bool,
        device: torch.device,
        width: int,
    ) -> StaticDecoder:
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"`cuda_graph=True` needs a CUDA device, but the model computes on {device}.")
        addresses = _addresses(model) if self.cuda_graph else ()
        if any(place.type != device.type for place, _ in addresses):
            raise ValueError(
                "`cuda_graph=True` needs all weights to stay on the GPU, but some are elsewhere between calls. Leave "
                "it out with group or sequential offloading."
            )
        # of all prompts, so that one capture serves them; whole blocks, so that the last one is no variant of its own
        # and room behind the end for a window that is filled up
        longest = -(-(max(max_length, model.config.longest_sequence) + width - 1) // BLOCK) * BLOCK
        key = (
            num_sequences,
            longest,
            width,
            full_vocabulary,
            device,
            torch.is_autocast_enabled(device.type),
            addresses,
        )
        if self._static is None or self._static[0] != key:
            self._static = None
            ways: dict[str, Any] = {"compile": self.compile, "cuda_graph": self.cuda_graph, "width": width}
            self._static = key, StaticDecoder(model, num_sequences, longest, full_vocabulary, device, **ways)
        return self._static[1]


@functools.cache
def _tell_once(reason: str) -> None:
    """Say why steps are slower than they could be; loudly where the user can do something about it."""
    level = logging.WARNING if "adapter" in reason else logging.INFO
    logger.log(level, "Steps run operation by operation instead of in one kernel: %s.", reason)


# Of modules: what decoders rely on, besides their class and weights.
_SETTINGS = (
    *("eps", "p", "dropout", "index", "num_heads", "pb_relaxation_alpha", "training"),
    *("_disable_adapters", "_active_adapter"),
)


def _state(model: nn.Module) -> tuple:
    """All of a model that a decoder relies on but the numbers in its weights, which it reads where they are."""
    modules = []
    for module in model.modules():
        own = vars(module)
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        settings = (*map(own.get, _SETTINGS), str(own.get("scaling")))  # of an adapter: by how much it counts
        modules.append((id(module), type(module), id(own.get("forward")), hooks, *settings))
    weights = [(type(each.data), each.dtype, each.device, each.shape, each.stride()) for each in model.parameters()]
    return modules, weights


def _addresses(model: CogLMModel) -> tuple[tuple[torch.device, int], ...]:
    """Where every weight lies, those inside of quantised weights included."""
    found = []

    def visit(tensor: torch.Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            found.append((tensor.device, tensor.data_ptr()))

    for parameter in [*model.parameters(), *model.buffers()]:
        visit(parameter)
    return tuple(found)
