"""The kernel that runs new tokens of a few sequences through all of CogLM on a CPU: `csrc/decode_step_cpu.cpp`."""

import ctypes
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .native import FLOAT32_AND_HALVES, library, openmp_parallel

_ABI = 2
_MAX_SEQUENCES, _MAX_KEYS = 64, 8192
_FAILURES = {1: "these inputs are not supported", 2: "a token id or a position lies outside of its table"}
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
                "news",
                "scored",
                "threads",
                "isa",
                "table_rows",
            )
        ],
        ("epsilon", ctypes.c_double),
        ("final_layernorm", _Parameters),
        *[
            (name, ctypes.c_void_p)
            for name in (
                "word_embeddings",
                "position_embeddings",
                "input_ids",
                "position_ids",
                "lengths",
                "bias",
                "layer",
                "logits",
                "scratch",
                "parallel",
            )
        ],
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
    One or more new tokens for every sequence. Holds the tensors that it reads and writes: if the model gets others
    meanwhile (`model.half()`), this goes on with those it began with.

    All weights are of one dtype, contiguous and on the CPU; sums are float32 whatever it is. What a token gets does
    not depend on what is read together with it, to the bit.

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
        self.layers = (_Layer * len(layers))()
        modules = [final_layernorm, *(part for layer in layers for part in layer.values())]
        # tensors of their own: the data of a parameter can be exchanged and freed
        weights = [weight.detach() for each in modules for weight in each.parameters()]
        self._held = [word_embeddings.detach(), position_embeddings.detach(), *weights]
        for target, layer in zip(self.layers, layers):
            for name in LAYER_PARTS:
                setattr(target, name, _parameters(layer[name]))
        vocabulary, hidden = word_embeddings.shape
        step = self.step = _Step(abi=_ABI, dtype=FLOAT32_AND_HALVES[dtype], layers=len(layers))
        step.heads, step.hidden, step.intermediate = num_heads, hidden, layers[0]["dense_h_to_4h"].out_features
        step.vocabulary, step.tokens, step.table_rows = vocabulary, num_tokens, len(position_embeddings)
        step.epsilon, step.final_layernorm = final_layernorm.eps, _parameters(final_layernorm)
        step.word_embeddings, step.position_embeddings = word_embeddings.data_ptr(), position_embeddings.data_ptr()
        step.layer = ctypes.addressof(self.layers)
        step.threads = max(1, min(torch.get_num_threads(), sum(each.nbytes for each in weights) // _BYTES_PER_THREAD))
        step.parallel = openmp_parallel()
        self.scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.set_bias(bias)

    def set_bias(self, bias: torch.Tensor) -> None:
        """
        Go on with other sequences.

        Args:
            bias (`torch.Tensor` of shape `(num_sequences, max_length)`): As for the class.
        """
        self.bias = bias
        self.step.sequences, self.step.capacity = bias.shape
        self.step.bias = bias.data_ptr()

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: torch.Tensor,
        caches: Sequence[torch.Tensor],
        num_scored: int = 1,
    ) -> torch.Tensor:
        """
        Append tokens to every sequence and predict the next.

        Args:
            input_ids (`torch.Tensor` of shape `(num_sequences, new)`): The tokens, int64; each sees those before it.
            position_ids (`torch.Tensor` of shape `(new,)` or `(num_sequences, new)`): Their position ids, int64.
            lengths (`torch.Tensor` of shape `(num_sequences,)`): Keys that the caches hold of each sequence, int64;
                those of these tokens are put after them.
            caches (sequence of `torch.Tensor` of shape `(2, num_sequences, num_heads, max_length, head_dim)`): Keys
                and values of each layer, float32, contiguous.
            num_scored (`int`, defaults to 1): After how many of the tokens, the last ones, logits are wanted.

        Returns:
            `torch.Tensor` of shape `(num_sequences, num_scored, num_tokens)`: Logits, float32.

        Raises:
            IndexError: If a token or a position lies outside of its table.
            RuntimeError: If the caches have no room for the tokens.
            ValueError: If there is not a row of tokens for each sequence.
        """
        step = self.step
        if input_ids.ndim != 2 or len(input_ids) != step.sequences or input_ids.dtype != torch.long:
            raise ValueError(
                f"`input_ids` must be {step.sequences} rows of torch.int64, but is of shape "
                f"{tuple(input_ids.shape)} and {input_ids.dtype}."
            )
        step.news, step.scored = input_ids.shape[1], num_scored
        kernels = _kernel()
        assert kernels is not None
        size = kernels.decode_step_scratch_size(ctypes.byref(step)) + _ALIGNMENT
        if len(self.scratch) < size:
            self.scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
            step.scratch = -(-self.scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.cache = cache.data_ptr()
        logits = torch.empty(step.sequences, num_scored, step.tokens, dtype=torch.float32, device="cpu")
        step.logits = logits.data_ptr()
        # held by these names until the call is over
        input_ids, position_ids = input_ids.contiguous(), position_ids.expand_as(input_ids).contiguous()
        lengths = lengths.contiguous()
        step.input_ids, step.position_ids = input_ids.data_ptr(), position_ids.data_ptr()
        step.lengths = lengths.data_ptr()
        failure = kernels.decode_step_cpu(ctypes.byref(step))
        if failure:
            error = IndexError if failure == 2 else RuntimeError
            raise error(f"The decode-step kernel failed: {_FAILURES.get(failure, f'code {failure}')}.")
        return logits


def _parameters(module: nn.Module) -> _Parameters:
    return _Parameters(module.weight.data_ptr(), module.bias.data_ptr())
