"""
The kernels of `csrc/`: the library is loaded with ctypes, and local attention is registered with `torch.library`.

The library has a plain C interface (the headers in `csrc/`) and links against neither torch nor Python, so one build
serves every version of both. It is loaded at the first use. [`fused_refusals`] is the one place that decides whether
the local-attention kernels can run some inputs; `decode_step.py`, `linear.py` and `gelu.py` are about the others.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .key_set import KeySet, bias_in
from .transforms import is_transformed

_ABI = 2
_LIBRARY = Path(__file__).with_name("_kernels.so")
_MAX_HEAD_DIM = 128
_MAX_KEY_SETS = 3
_MAX_SIDE = 2**28
_MAX_CUDA_SIDE = 16384  # the CUDA kernels keep coordinates in 16 bits
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# those of the other CPU kernels, which compute in float32
FLOAT32_AND_HALVES = {dtype: number for dtype, number in _DTYPES.items() if dtype != torch.float64}
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TUNING: dict[str, int] = {}  # overrides of the kernels' own choices, for tests and measurements
_FAILURES = {1: "these inputs are not supported", 2: "out of memory", 3: "a CUDA call failed"}


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "position_stride", "head_stride")
    ]


class _Source(ctypes.Structure):
    _fields_ = [
        *[(name, _Tensor) for name in ("key", "value", "grad_key", "grad_value")],
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64),
        *[
            (name, ctypes.c_int32)
            for name in (
                "rows",
                "columns",
                "reach_rows",
                "reach_columns",
                "ratio_rows",
                "ratio_columns",
                "causal",
                "reserved",
            )
        ],
    ]


class _Problem(ctypes.Structure):
    """`LocalAttentionProblem` of `csrc/local_attention.h`."""

    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                "abi",
                "dtype",
                "batch",
                "heads",
                "head_dim",
                "rows",
                "columns",
                "threads",
                "tile_rows",
                "isa",
            )
        ],
        ("scale", ctypes.c_double),
        *[(name, _Tensor) for name in ("query", "output", "grad_output", "grad_query")],
        *[(name, ctypes.c_void_p) for name in ("logsumexp", "grad_logsumexp", "softmax")],
        ("source", _Source * _MAX_KEY_SETS),
        *[(name, ctypes.c_void_p) for name in ("parallel", "stream", "delta")],
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they are not built; a file that does not load is reported once."""
    if not _LIBRARY.exists():
        return None
    try:
        kernels = ctypes.CDLL(str(_LIBRARY))
        kernels.local_attention_problem_size.restype = ctypes.c_int64
        kernels.cpu_isa_name.restype = ctypes.c_char_p
        size = kernels.local_attention_problem_size()
        if hasattr(kernels, "local_attention_cuda_error"):
            kernels.local_attention_cuda_error.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        warnings.warn(f"The kernels in {_LIBRARY} do not load ({error}): reinstall the package.", stacklevel=2)
        return None
    if size != ctypes.sizeof(_Problem):
        warnings.warn(f"The kernels in {_LIBRARY} are of another version: reinstall the package.", stacklevel=2)
        return None
    return kernels


@torch.compiler.assume_constant_result
def built_for() -> list[str]:
    """The device types that the library holds kernels for: a part of `["cpu", "cuda"]`."""
    if library() is None:
        return []
    return ["cpu", "cuda"] if hasattr(library(), "local_attention_cuda_forward") else ["cpu"]


@functools.cache
def openmp_parallel() -> int | None:
    """
    Address of `GOMP_parallel` in the OpenMP runtime that torch uses, if it uses one.

    The kernels run on the threads of that pool: a pool of their own would compete with torch's threads for the cores.
    """
    if not torch.backends.openmp.is_available():
        return None
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@functools.cache
def say_that_kernels_are_missing() -> None:
    """Warn, once in a process, that PyTorch operations stand in for the kernels."""
    warnings.warn(
        "The local-attention kernels are not built, so PyTorch operations compute it, several times slower: reinstall "
        "the package where a C++ compiler is found. `cogview2 doctor` shows what is built.",
        stacklevel=3,
    )


def fused_refusals(
    query: torch.Tensor, key_sets: Sequence[KeySet] = (), query_grid: tuple[int, int] | None = None
) -> list[str]:
    """
    Why the fused kernels cannot run these inputs.

    Args:
        query (`torch.Tensor` of shape `(batch_size, positions, num_heads, head_dim)`): The queries.
        key_sets (sequence of `KeySet`, *optional*): What they attend to, in the dtype of the queries.
        query_grid (`tuple[int, int]`, *optional*): Rows and columns of the grid of the queries.

    Returns:
        `list[str]`: One reason a line; empty where they can run.
    """
    reasons = []
    device = query.device.type
    built = built_for()
    if not built:
        reasons.append("the kernels are not built (reinstall where a C++ compiler is found)")
    elif device == "cuda" and device not in built:
        reasons.append("the CUDA kernels are not built (reinstall where a CUDA toolkit is found)")
    if device not in ("cpu", "cuda"):
        reasons.append(f"the device is {device} (supported: cpu, cuda)")
    supported = _CUDA_DTYPES if device == "cuda" else tuple(_DTYPES)
    if query.dtype not in supported:
        reasons.append(f"the dtype is {query.dtype} (supported on {device}: {', '.join(map(str, supported))})")
    head_dim = query.shape[-1]
    if head_dim > _MAX_HEAD_DIM or (device == "cuda" and head_dim % 8):
        limit = f"multiples of 8 up to {_MAX_HEAD_DIM}" if device == "cuda" else f"up to {_MAX_HEAD_DIM}"
        reasons.append(f"head_dim is {head_dim} (supported on {device}: {limit})")
    if len(key_sets) > _MAX_KEY_SETS:
        reasons.append(f"there are {len(key_sets)} key sets (supported: up to {_MAX_KEY_SETS})")
    longest = max((*(query_grid or ()), *(keys.longest_side for keys in key_sets)), default=1)
    most = _MAX_CUDA_SIDE if device == "cuda" else _MAX_SIDE
    if longest > most:
        reasons.append(f"a grid or a context has {longest} cells in a row (supported on {device}: up to {most})")
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(query.device)[0] < 8:
        reasons.append("the device is older than compute capability 8.0")
    if torch.is_grad_enabled() and any(keys.bias is not None and keys.bias.requires_grad for keys in key_sets):
        reasons.append("a `bias` requires a gradient (detach it, or use the reference)")
    if torch.jit.is_tracing():
        reasons.append("the model is being traced, to run where the kernels are not")
    if is_transformed(query, *(tensor for keys in key_sets for tensor in keys.tensors)):
        reasons.append("a torch.func transform or forward-mode differentiation is at work")
    return reasons


def build_info() -> dict:
    """
    What was built and what will be used, for `cogview2 doctor`.

    Returns:
        `dict`: `library` (path or None), `cpu_instruction_sets` (compiled in), `cpu_instruction_set` (chosen on this
        processor), `cpu_threads`, `threads_of` ("torch's OpenMP pool" or "own threads"), `cuda_architectures`
        (compiled in; the last as PTX too), `cuda_devices` (names and compute capabilities), and `used_on`, for local
        attention on `cpu` and `cuda` "fused" or "reference: <why>".
    """
    kernels = library()
    info: dict = {
        "library": str(_LIBRARY) if kernels else None,
        "cpu_instruction_sets": [],
        "cpu_instruction_set": None,
    }
    info |= {"cpu_threads": torch.get_num_threads(), "cuda_architectures": [], "cuda_devices": []}
    info["threads_of"] = "torch's OpenMP pool" if openmp_parallel() else "own threads"
    if kernels:
        names = iter(lambda: kernels.cpu_isa_name(len(info["cpu_instruction_sets"])), None)
        for name in names:
            info["cpu_instruction_sets"].append(name.decode())
        info["cpu_instruction_set"] = info["cpu_instruction_sets"][kernels.cpu_isa_selected()]
    if kernels and "cuda" in built_for():
        kernels.local_attention_cuda_architectures.restype = ctypes.c_char_p
        info["cuda_architectures"] = kernels.local_attention_cuda_architectures().decode().split(";")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            info["cuda_devices"].append(f"{torch.cuda.get_device_name(index)} ({capability})")
    info["used_on"] = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        reasons = fused_refusals(torch.empty(1, 1, 1, 64, dtype=dtype)) if device == "cpu" else []
        if device == "cuda" and not torch.cuda.is_available():
            reasons.append("no CUDA device")
        if device == "cuda" and "cuda" not in built_for():
            reasons.append("the CUDA kernels are not built")
        info["used_on"][device] = f"reference: {'; '.join(reasons)}" if reasons else "fused"
    return info


def _describe(tensor: torch.Tensor | None) -> _Tensor:
    if tensor is None:
        return _Tensor()
    return _Tensor(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2))


def _readable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself, or a copy where a head is not contiguous or (CUDA) not aligned to 16 bytes."""
    if tensor is None:
        return None
    readable = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    if tensor.device.type == "cuda":
        pieces = 16 // tensor.element_size()
        aligned = tensor.data_ptr() % 16 == 0 and all(stride % pieces == 0 for stride in tensor.stride()[:-1])
        readable = readable and aligned
    return tensor if readable else tensor.clone(memory_format=torch.contiguous_format)


class _Geometry(NamedTuple):
    """A call but for its tensors, as the numbers that `torch.library` passes on."""

    query_grid: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]  # rows, columns, height and width, causal, has a bias

    @classmethod
    def of(cls, key_sets: Sequence[KeySet], query_grid: tuple[int, int]) -> _Geometry:
        # without a grid: one row, seen whole from everywhere, which a height of 0 says
        return cls(
            tuple(query_grid),
            tuple(
                (
                    *(keys.grid or (1, keys.key.shape[1])),
                    *(keys.kernel_size or (0, 0)),
                    keys.causal,
                    keys.bias is not None,
                )
                for keys in key_sets
            ),
        )

    def to_list(self) -> list[int]:
        return [int(number) for part in (self.query_grid, *self.sets) for number in part]

    @classmethod
    def from_list(cls, numbers: list[int]) -> _Geometry:
        return cls(tuple(numbers[:2]), tuple(tuple(numbers[at : at + 6]) for at in range(2, len(numbers), 6)))


def _problem(query, keys, values, biases, geometry: _Geometry, scale: float) -> _Problem:
    """A call without its outputs."""
    problem = _Problem(abi=_ABI, dtype=_DTYPES[query.dtype], batch=query.shape[0], heads=query.shape[2])
    problem.head_dim, problem.scale = query.shape[3], scale
    problem.rows, problem.columns = geometry.query_grid
    for name, number in _TUNING.items():
        setattr(problem, name, number)
    problem.query = _describe(query)
    biases = iter(biases)
    for source, key, value, (*grid, height, width, causal, has_bias) in zip(
        problem.source, keys, values, geometry.sets, strict=False
    ):
        source.key, source.value, source.causal = _describe(key), _describe(value), causal
        source.rows, source.columns = grid
        if height:
            source.reach_rows, source.reach_columns = min(height // 2, grid[0]), min(width // 2, grid[1])
            source.ratio_rows, source.ratio_columns = (fine // edge for fine, edge in zip(geometry.query_grid, grid))
        else:
            source.reach_columns = grid[1]
            source.ratio_rows, source.ratio_columns = geometry.query_grid
        if has_bias:
            bias = next(biases)
            source.bias, source.bias_stride = bias.data_ptr(), bias.stride(0)
    return problem


def _launch(problem: _Problem, direction: str, device: torch.device) -> None:
    """Run the kernels on the device's current stream, or on as many threads as torch uses."""
    kernels = library()
    assert kernels is not None
    if device.type == "cuda":
        with torch.cuda.device(device):
            problem.stream = torch.cuda.current_stream(device).cuda_stream
            failure = getattr(kernels, f"local_attention_cuda_{direction}")(ctypes.byref(problem))
            detail = (kernels.local_attention_cuda_error() or b"").decode()
    else:
        problem.threads = problem.threads or torch.get_num_threads()
        problem.parallel = openmp_parallel()
        failure = getattr(kernels, f"local_attention_cpu_{direction}")(ctypes.byref(problem))
        detail = ""
    if failure:
        reason = detail or _FAILURES.get(failure, f"code {failure}")
        raise RuntimeError(f"The local-attention kernel failed on {device}: {reason}.")


def _statistics_dtype(query: torch.Tensor) -> torch.dtype:
    """The dtype of what the kernels know of each row of scores."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _results_like(query: torch.Tensor, for_backward: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the output, the logsumexp and, where the backward will need it, the largest score and the sum."""
    rows = (query.shape[0], query.shape[2], query.shape[1])
    dtype = _statistics_dtype(query)
    return (
        query.new_empty(query.shape),
        query.new_empty(rows, dtype=dtype),
        query.new_empty((2, *rows) if for_backward else (0,), dtype=dtype),
    )


@torch.library.custom_op("cogview_pipelines::local_attention", mutates_args=())
def local_attention_forward(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    biases: list[torch.Tensor],
    geometry: list[int],
    scale: float,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Output, logsumexp and, if `for_backward`, the softmax's largest score and logarithm of the sum, by the kernels.

    `biases` are those of the sets that have one, and `geometry` is `_Geometry.to_list()`.
    """
    query, keys, values = _readable(query), [_readable(key) for key in keys], [_readable(value) for value in values]
    biases = [bias.contiguous() for bias in biases]
    output, logsumexp, softmax = _results_like(query, for_backward)
    problem = _problem(query, keys, values, biases, _Geometry.from_list(geometry), scale)
    problem.output, problem.logsumexp = _describe(output), logsumexp.data_ptr()
    problem.softmax = softmax.data_ptr() if for_backward else None
    _launch(problem, "forward", query.device)
    return output, logsumexp, softmax


@local_attention_forward.register_fake
def _(query, keys, values, biases, geometry, scale, for_backward):
    return _results_like(query, for_backward)


@torch.library.custom_op("cogview_pipelines::local_attention_backward", mutates_args=())
def local_attention_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor,
    output: torch.Tensor,
    softmax: torch.Tensor,
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    biases: list[torch.Tensor],
    geometry: list[int],
    scale: float,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """Gradients of the query, all keys and all values; an empty tensor where it is not `wanted`."""
    query, keys, values = _readable(query), [_readable(key) for key in keys], [_readable(value) for value in values]
    biases = [bias.contiguous() for bias in biases]
    problem = _problem(query, keys, values, biases, _Geometry.from_list(geometry), scale)
    grad_output, output, softmax = _readable(grad_output), _readable(output), softmax.contiguous()
    grad_logsumexp = grad_logsumexp.to(softmax.dtype).contiguous()
    problem.grad_output, problem.output = _describe(grad_output), _describe(output)
    problem.softmax, problem.grad_logsumexp = softmax.data_ptr(), grad_logsumexp.data_ptr()
    if query.device.type == "cuda":
        delta = torch.empty_like(softmax[0])
        problem.delta = delta.data_ptr()
    grads = _gradients_like([query, *keys, *values], wanted)
    problem.grad_query, *described = [
        _describe(grad) if is_wanted else _Tensor() for grad, is_wanted in zip(grads, wanted, strict=True)
    ]
    for source, grad_key, grad_value in zip(problem.source, described[: len(keys)], described[len(keys) :]):
        source.grad_key, source.grad_value = grad_key, grad_value
    _launch(problem, "backward", query.device)
    return grads


def _gradients_like(tensors: list[torch.Tensor], wanted: list[bool]) -> list[torch.Tensor]:
    return [
        tensor.new_empty(tensor.shape if is_wanted else 0) for tensor, is_wanted in zip(tensors, wanted, strict=True)
    ]


@local_attention_backward.register_fake
def _(
    grad_output, grad_logsumexp, output, softmax, query, keys, values, biases, geometry, scale, wanted
):  # fmt: skip
    return _gradients_like([query, *keys, *values], wanted)


def _save(ctx, inputs, output):
    query, keys, values, biases, ctx.geometry, ctx.scale, _ = inputs
    ctx.counts = [len(keys), len(values), len(biases)]
    output, _, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(output, softmax, query, *keys, *values, *biases)


def _backward(ctx, grad_output, grad_logsumexp, _):
    if is_transformed(grad_output, grad_logsumexp):
        raise NotImplementedError(
            "The gradients of fused local attention have no derivative of their own and take no tangents. Pass "
            '`backend="reference"` to differentiate them.'
        )
    output, softmax, query, *rest = ctx.saved_tensors
    if not softmax.numel() and query.numel():
        raise RuntimeError("Local attention was run without keeping what its backward pass needs.")
    num_sets, num_biases = ctx.counts[0], ctx.counts[2]
    keys, values, biases = rest[:num_sets], rest[num_sets : 2 * num_sets], rest[2 * num_sets :]
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
    grads = local_attention_backward(
        grad_output, grad_logsumexp, output, softmax, query, keys, values, biases, ctx.geometry, ctx.scale, wanted
    )
    grad_query, *grads = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]
    return grad_query, grads[:num_sets], grads[num_sets:], [None] * num_biases, None, None, None


local_attention_forward.register_autograd(_backward, setup_context=_save)


def fused_local_attention(
    query: torch.Tensor, key_sets: Sequence[KeySet], query_grid: tuple[int, int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of `local_attention`, of inputs that [`fused_refusals`] has nothing against."""
    keys, values = [keys.key for keys in key_sets], [keys.value for keys in key_sets]
    biases = [bias_in(keys.bias.detach(), _statistics_dtype(query)) for keys in key_sets if keys.bias is not None]
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *keys, *values))
    geometry = _Geometry.of(key_sets, query_grid).to_list()
    output, logsumexp, _ = local_attention_forward(query, keys, values, biases, geometry, scale, wants_grad)
    return output, logsumexp
