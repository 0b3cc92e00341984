"""
The kernels of `csrc/`: the library is loaded with ctypes, and local attention is registered with `torch.library`.

The library has a plain C interface (the headers in `csrc/`) and links against neither torch nor Python, so one build
serves every version of both. It is loaded at the first use. [`fused_refusals`] is the one place that decides whether
the local-attention kernels can run some inputs; `decode_step.py` and `gelu.py` are about the other kernels.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch

_ABI = 1
_LIBRARY = Path(__file__).with_name("_kernels.so")
_MAX_HEAD_DIM = 128
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
    _fields_ = [(name, _Tensor) for name in ("key", "value", "grad_key", "grad_value")] + [
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
        *[(name, ctypes.c_void_p) for name in ("logsumexp", "grad_logsumexp", "context_bias")],
        ("context_bias_stride", ctypes.c_int64),
        ("source", _Source * 3),
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


def fused_refusals(query: torch.Tensor, context_bias: torch.Tensor | None = None, longest_side: int = 1) -> list[str]:
    """
    Why the fused kernels cannot run these inputs.

    Args:
        query (`torch.Tensor` of shape `(batch_size, positions, num_heads, head_dim)`):
            The queries; keys and values are like them.
        context_bias (`torch.Tensor`, *optional*): The bias of the context keys.
        longest_side (`int`, defaults to 1): The most rows or columns of a grid, or the number of context keys.

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
    if device == "cuda" and longest_side > _MAX_CUDA_SIDE:
        reasons.append(
            f"a grid or the context has {longest_side} cells in a row (supported on cuda: up to {_MAX_CUDA_SIDE})"
        )
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(query.device)[0] < 8:
        reasons.append("the device is older than compute capability 8.0")
    if context_bias is not None and context_bias.requires_grad:
        reasons.append("`context_bias` requires a gradient (detach it, or use the reference)")
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
    if "cuda" in built_for():
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


def _problem(query, sources, context_bias, grids, causal, scale) -> _Problem:
    """
    A call without outputs: `grids` are query grid, kernel, coarse grid, coarse kernel; `sources` keys with values.
    """
    query_grid, kernel_size, cross_grid, cross_kernel_size = grids
    problem = _Problem(abi=_ABI, dtype=_DTYPES[query.dtype], batch=query.shape[0], heads=query.shape[2])
    problem.head_dim, problem.scale = query.shape[3], scale
    problem.rows, problem.columns = query_grid
    for name, number in _TUNING.items():
        setattr(problem, name, number)
    problem.query = _describe(query)
    for source, (key, value) in zip(problem.source, sources, strict=True):
        source.key, source.value = _describe(key), _describe(value)
    window, cross, context = problem.source
    for source, grid, kernel, is_causal in (
        (window, query_grid, kernel_size, causal[0]),
        (cross, cross_grid, cross_kernel_size, causal[1]),
    ):
        if grid and kernel:
            source.rows, source.columns = grid
            source.reach_rows, source.reach_columns = (
                min(size // 2, edge) for size, edge in zip(kernel, grid, strict=True)
            )
            source.ratio_rows, source.ratio_columns = query_grid[0] // grid[0], query_grid[1] // grid[1]
            source.causal = is_causal
    if sources[2][0] is not None:  # a grid of one row that every query sees all of
        context.rows, context.columns = 1, sources[2][0].shape[1]
        context.reach_columns = context.columns
        context.ratio_rows, context.ratio_columns = query_grid
    if context_bias is not None:
        problem.context_bias, problem.context_bias_stride = context_bias.data_ptr(), context_bias.stride(0)
    return problem


def _launch(problem: _Problem, direction: str, device: torch.device) -> None:
    """Run the kernels on the device's current stream, or on as many threads as torch uses."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            problem.stream = torch.cuda.current_stream(device).cuda_stream
            failure = getattr(library(), f"local_attention_cuda_{direction}")(ctypes.byref(problem))
            detail = (library().local_attention_cuda_error() or b"").decode()
    else:
        problem.threads = problem.threads or torch.get_num_threads()
        problem.parallel = openmp_parallel()
        failure = getattr(library(), f"local_attention_cpu_{direction}")(ctypes.byref(problem))
        detail = ""
    if failure:
        reason = detail or _FAILURES.get(failure, f"code {failure}")
        raise RuntimeError(f"The local-attention kernel failed on {device}: {reason}.")


def _prepare(query, key, value, cross_key, cross_value, context_key, context_value, context_bias):
    """Tensors as the kernels read them."""
    query, *rest = map(_readable, (query, key, value, cross_key, cross_value, context_key, context_value))
    if context_bias is not None:
        context_bias = context_bias.detach().to(torch.float32).contiguous()
    return query, list(zip(rest[::2], rest[1::2], strict=True)), context_bias


def _logsumexp_like(query: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=dtype)


@torch.library.custom_op("cogview_pipelines::local_attention", mutates_args=())
def fused_local_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cross_key: torch.Tensor | None,
    cross_value: torch.Tensor | None,
    context_key: torch.Tensor | None,
    context_value: torch.Tensor | None,
    context_bias: torch.Tensor | None,
    query_grid: list[int],
    kernel_size: list[int],
    cross_grid: list[int],
    cross_kernel_size: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp by the kernels; grids are empty where a source is absent, `causal` is (own, coarse)."""
    query, sources, context_bias = _prepare(
        query, key, value, cross_key, cross_value, context_key, context_value, context_bias
    )
    output, logsumexp = torch.empty_like(query, memory_format=torch.contiguous_format), _logsumexp_like(query)
    problem = _problem(
        query, sources, context_bias, (query_grid, kernel_size, cross_grid, cross_kernel_size), causal, scale
    )
    problem.output, problem.logsumexp = _describe(output), logsumexp.data_ptr()
    _launch(problem, "forward", query.device)
    return output, logsumexp


@fused_local_attention.register_fake
def _(query, *arguments):
    return query.new_empty(query.shape), _logsumexp_like(query)


@torch.library.custom_op("cogview_pipelines::local_attention_backward", mutates_args=())
def fused_local_attention_backward(
    grad_output: torch.Tensor,
    grad_logsumexp: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cross_key: torch.Tensor | None,
    cross_value: torch.Tensor | None,
    context_key: torch.Tensor | None,
    context_value: torch.Tensor | None,
    context_bias: torch.Tensor | None,
    query_grid: list[int],
    kernel_size: list[int],
    cross_grid: list[int],
    cross_kernel_size: list[int],
    causal: list[bool],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, keys and values in the order of the arguments; an empty tensor where a source is absent."""
    query, sources, context_bias = _prepare(
        query, key, value, cross_key, cross_value, context_key, context_value, context_bias
    )
    problem = _problem(
        query, sources, context_bias, (query_grid, kernel_size, cross_grid, cross_kernel_size), causal, scale
    )
    grad_output, output = _readable(grad_output), _readable(output)
    logsumexp, grad_logsumexp = logsumexp.contiguous(), grad_logsumexp.to(logsumexp.dtype).contiguous()
    problem.grad_output, problem.output = _describe(grad_output), _describe(output)
    problem.logsumexp, problem.grad_logsumexp = logsumexp.data_ptr(), grad_logsumexp.data_ptr()
    if query.device.type == "cuda":
        delta = torch.empty_like(logsumexp)
        problem.delta = delta.data_ptr()
    grads = [torch.empty_like(query, memory_format=torch.contiguous_format)]
    problem.grad_query = _describe(grads[0])
    for source, pair in zip(problem.source, sources, strict=True):
        pair_grads = [_gradient_like(query, tensor) for tensor in pair]
        if pair[0] is not None:
            source.grad_key, source.grad_value = map(_describe, pair_grads)
        grads += pair_grads
    _launch(problem, "backward", query.device)
    return tuple(grads)


def _gradient_like(query: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor:
    return query.new_empty(0) if tensor is None else query.new_empty(tensor.shape)


@fused_local_attention_backward.register_fake
def _(grad_output, grad_logsumexp, output, logsumexp, query, *arguments):
    return (query.new_empty(query.shape), *(_gradient_like(query, tensor) for tensor in arguments[:6]))


def _save(ctx, inputs, output):
    *tensors, ctx.query_grid, ctx.kernel_size, ctx.cross_grid, ctx.cross_kernel_size, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_output, grad_logsumexp):
    geometry = (ctx.query_grid, ctx.kernel_size, ctx.cross_grid, ctx.cross_kernel_size, ctx.causal, ctx.scale)
    output, logsumexp, *tensors = ctx.saved_tensors
    grads = fused_local_attention_backward(grad_output, grad_logsumexp, output, logsumexp, *tensors, *geometry)
    grads = [grad if tensor is not None else None for grad, tensor in zip(grads, tensors[:7], strict=True)]
    return *grads, *[None] * 7


fused_local_attention.register_autograd(_backward, setup_context=_save)
