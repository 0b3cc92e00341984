"""The kernel that runs one token of a few sequences through all of CogLM on a CPU: `csrc/decode_step_cpu.cpp`."""

import ctypes
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .native import FLOAT32_AND_HALVES, library, openmp_parallel

_ABI = 1
_MAX_SEQUENCES, _MAX_KEYS = 64, 8192
_FAILURES = {1: "these inputs are not supported", 2: "a token id lies outside of the vocabulary"}
# for fewer bytes of weights than this, no thread is woken
_BYTES_PER_THREAD = 2**18
_ALIGNMENT = 64
LAYER_PARTS = (
    "attention_layernorm",
    "query_key_value",
    "dense",
    "attention_output_layernorm",
    "mlp_layernorm",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "mlp_output_layernorm",
)


class _Parameters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")]


class _Layer(ctypes.Structure):
    _fields_ = [*[(name, _Parameters) for name in LAYER_PARTS], ("cache", ctypes.c_void_p)]


class _Step(ctypes.Structure):
    """`DecodeStep` of `csrc/decode_step.h`."""

    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                "abi",
                "dtype",
                "sequences",
                "layers",
                "heads",
                "hidden",
                "intermediate",
                "vocabulary",
                "tokens",
                "capacity",
                "length",
                "threads",
                "isa",
                "reserved",
            )
        ],
        ("epsilon", ctypes.c_double),
        ("final_layernorm", _Parameters),
        *[(name, ctypes.c_void_p) for name in ("word_embeddings", "position_embedding", "input_ids")],
        ("input_stride", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("bias", "layer", "logits", "scratch", "parallel")],
    ]


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """The library, if it holds this kernel in this version."""
    kernels = library()
    if kernels is None or not hasattr(kernels, "decode_step_size"):
        return None
    kernels.decode_step_size.restype = kernels.decode_step_scratch_size.restype = ctypes.c_int64
    return kernels if kernels.decode_step_size() == ctypes.sizeof(_Step) else None


def decode_step_refusals(
    dtype: torch.dtype, device: torch.device | str, num_sequences: int = 1, max_length: int = 1
) -> list[str]:
    """
    Why the kernel cannot run a model.

    Args:
        dtype (`torch.dtype`): Of its weights.
        device (`torch.device`): Where they are.
        num_sequences (`int`, defaults to 1): Sequences that grow together.
        max_length (`int`, defaults to 1): The longest that they get.

    Returns:
        `list[str]`: One reason a line; empty where it can.
    """
    reasons = []
    if _kernel() is None:
        reasons.append("the kernels are not built (reinstall where a C++ compiler is found)")
    if torch.device(device).type != "cpu":
        reasons.append(f"the device is {device} (supported: cpu)")
    if dtype not in FLOAT32_AND_HALVES:
        reasons.append(f"the dtype is {dtype} (supported: {', '.join(map(str, FLOAT32_AND_HALVES))})")
    if num_sequences > _MAX_SEQUENCES:
        reasons.append(f"there are {num_sequences} sequences (supported: up to {_MAX_SEQUENCES})")
    if max_length > _MAX_KEYS:
        reasons.append(f"sequences get {max_length} tokens long (supported: up to {_MAX_KEYS})")
    return reasons


class DecodeStep:
    """
    One more token for every sequence. Holds the tensors that it reads and writes: if the model gets others meanwhile
    (`model.half()`), this goes on with those it began with.

    All weights are of one dtype, contiguous and on the CPU; sums are float32 whatever it is.

    Args:
        word_embeddings, position_embeddings (`torch.Tensor` of shape `(rows, hidden_size)`): The tables.
        final_layernorm (`nn.LayerNorm`): Of the last states; its epsilon is that of all norms.
        layers (sequence of mappings from `LAYER_PARTS` to modules): `nn.Linear` and `nn.LayerNorm` of each layer.
        num_heads (`int`): Attention heads.
        num_tokens (`int`): How many tokens are scored, from the first.
        bias (`torch.Tensor` of shape `(num_sequences, max_length)`): Added to the scores of keys, float32.

    Raises:
        ValueError: If `decode_step_refusals` has something against it.
    """

    def __init__(
        self,
        word_embeddings: torch.Tensor,
        position_embeddings: torch.Tensor,
        final_layernorm: nn.LayerNorm,
        layers: Sequence[Mapping[str, nn.Module]],
        num_heads: int,
        num_tokens: int,
        bias: torch.Tensor,
    ):
        num_sequences, max_length = bias.shape
        dtype = word_embeddings.dtype
        reasons = decode_step_refusals(dtype, word_embeddings.device, num_sequences, max_length)
        if reasons:
            raise ValueError(f"The decode-step kernel cannot run this model: {'; '.join(reasons)}.")
        self.position_embeddings, self.bias = position_embeddings.detach(), bias
        self.layers = (_Layer * len(layers))()
        modules = [final_layernorm, *(part for layer in layers for part in layer.values())]
        # tensors of their own: the data of a parameter can be exchanged and freed
        self._held = [word_embeddings.detach(), *(weight.detach() for each in modules for weight in each.parameters())]
        for target, layer in zip(self.layers, layers):
            for name in LAYER_PARTS:
                setattr(target, name, _parameters(layer[name]))
        vocabulary, hidden = word_embeddings.shape
        step = self.step = _Step(
            abi=_ABI, dtype=FLOAT32_AND_HALVES[dtype], sequences=num_sequences, layers=len(layers)
        )
        step.heads, step.hidden, step.intermediate = num_heads, hidden, layers[0]["dense_h_to_4h"].out_features
        step.vocabulary, step.tokens, step.capacity = vocabulary, num_tokens, max_length
        step.epsilon, step.final_layernorm = final_layernorm.eps, _parameters(final_layernorm)
        step.word_embeddings, step.bias = word_embeddings.data_ptr(), bias.data_ptr()
        step.layer = ctypes.addressof(self.layers)
        num_bytes = sum(weight.nbytes for weight in self._held[1:])
        step.threads = max(1, min(torch.get_num_threads(), num_bytes // _BYTES_PER_THREAD))
        step.parallel = openmp_parallel()
        size = _kernel().decode_step_scratch_size(ctypes.byref(step))
        self.scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        step.scratch = -(-self.scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT

    def __call__(
        self, input_ids: torch.Tensor, position: int, length: int, caches: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """
        Append a token to every sequence and predict the next.

        Args:
            input_ids (`torch.Tensor` of shape `(num_sequences,)`): The tokens, int64.
            position (`int`): Their position id.
            length (`int`): Keys that the caches hold; that of this token is put after them.
            caches (sequence of `torch.Tensor` of shape `(2, num_sequences, num_heads, max_length, head_dim)`): Keys
                and values of each layer, float32, contiguous.

        Returns:
            `torch.Tensor` of shape `(num_sequences, num_tokens)`: Logits, float32.

        Raises:
            IndexError: If a token or the position lies outside of its table.
            ValueError: If there is not one token for each sequence.
        """
        step = self.step
        if input_ids.shape != (step.sequences,) or input_ids.dtype != torch.long:
            raise ValueError(
                f"`input_ids` must be {step.sequences} numbers of torch.int64, but is of shape "
                f"{tuple(input_ids.shape)} and {input_ids.dtype}."
            )
        if not 0 <= position < len(self.position_embeddings):
            raise IndexError(f"`position` must be below {len(self.position_embeddings)}, but is {position}.")
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.cache = cache.data_ptr()
        logits = torch.empty(step.sequences, step.tokens, dtype=torch.float32, device="cpu")
        step.logits = logits.data_ptr()
        step.position_embedding = self.position_embeddings[position].data_ptr()
        step.input_ids, step.input_stride, step.length = input_ids.data_ptr(), input_ids.stride(0), length
        failure = _kernel().decode_step_cpu(ctypes.byref(step))
        if failure:
            error = IndexError if failure == 2 else RuntimeError
            raise error(f"The decode-step kernel failed: {_FAILURES.get(failure, f'code {failure}')}.")
        return logits


def _parameters(module: nn.Module) -> _Parameters:
    return _Parameters(module.weight.data_ptr(), module.bias.data_ptr())
