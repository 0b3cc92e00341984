"""
The CUDA kernels: on a GPU where there is one (`-m gpu`), and everywhere on the CPU, where `cuda_emulation.h` runs
the same source.

The emulation runs whole kernels, so that tiles, halos, chunks, masks, fragment layouts and sums over warps are
tested without a GPU. What it cannot show is speed, races and the instructions' own rounding.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cogview_pipelines.ops import native
from cogview_pipelines.ops.key_set import KeySet
from cogview_pipelines.ops.local_attention import local_attention

from .attention_cases import (
    CASES,
    assert_as_accurate_as_pytorch,
    make_inputs,
    mapped,
    needs_kernels,
    random_case,
    run_with_gradients,
    tensors_of,
    to_dtype,
    with_biases,
    with_tensors,
)
from .test_local_attention import operator_arguments

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "local_attention_cuda.cu"
HALF = [torch.bfloat16, torch.float16]


def on_head_dim_of_cuda(arguments):
    """The same case with a head dimension that is a multiple of 8."""
    head_dim = arguments["query"].shape[-1]
    wanted = -(-head_dim // 8) * 8
    return mapped(arguments, lambda tensor: torch.nn.functional.pad(tensor, (0, wanted - head_dim)))


# ------------------------------------------------------------------------------------------------- emulated on the CPU


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    """The kernels compiled for the emulation."""
    compiler = shutil.which("g++")
    if compiler is None or not SOURCE.exists():
        pytest.skip("needs g++ and the sources of the kernels")
    target = tmp_path_factory.mktemp("emulation") / "emulated.so"
    flags = [
        "-x",
        "c++",
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-w",
        "-shared",
        "-fPIC",
        "-DLOCAL_ATTENTION_EMULATION",
    ]
    header = Path(__file__).with_name("cuda_emulation.h")
    result = subprocess.run(
        [compiler, *flags, "-include", header, SOURCE, "-o", target], capture_output=True, text=True
    )
    if "_Float16" in result.stderr:
        pytest.skip("this g++ has no 16-bit floats")
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture
def emulation(emulated_kernels, monkeypatch):
    """Lets the fused operator run the emulated kernels on CPU tensors; returns a setter of their shared memory."""
    monkeypatch.setattr(native, "built_for", lambda: ["cpu", "cuda"])

    def launch(problem, direction, device):
        delta = torch.full((problem.batch * problem.heads * problem.rows * problem.columns,), math.nan)
        problem.delta = delta.data_ptr()
        assert getattr(emulated_kernels, f"local_attention_cuda_{direction}")(ctypes.byref(problem)) == 0

    monkeypatch.setattr(native, "_launch", launch)
    emulated_kernels.emulation_set_shared_memory(112 * 1024)
    emulated_kernels.emulation_set_order(0)
    return emulated_kernels.emulation_set_shared_memory


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "case", ["causal", "one_row", "smaller_than_window", "cross_uneven", "cross_causal", "context", "all"]
)
def test_emulated_kernels_are_as_accurate_as_pytorch(emulation, case, dtype):
    inputs = make_inputs(case, dtype, batch_size=2, num_heads=1, head_dim=32)
    assert_as_accurate_as_pytorch(inputs, factor=2 if dtype == torch.float32 else 4)


@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128)]
)
def test_emulated_kernels_with_wide_heads(emulation, dtype, head_dim):
    inputs = make_inputs("direct", dtype, batch_size=1, num_heads=2, head_dim=head_dim - 8)
    assert_as_accurate_as_pytorch(inputs, factor=2 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_kernels_take_columns_in_chunks(emulation, dtype):
    emulation(12 * 1024)
    inputs = make_inputs("all", dtype, batch_size=1, num_heads=1, head_dim=32)
    assert_as_accurate_as_pytorch(inputs, factor=2 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("seed", range(8))
def test_emulated_kernels_on_random_shapes_strides_and_biases(emulation, emulated_kernels, seed):
    emulation((16, 112)[seed % 2] * 1024)
    emulated_kernels.emulation_set_order(seed)
    arguments = on_head_dim_of_cuda(random_case(torch.Generator().manual_seed(100 + seed)))
    dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
    assert_as_accurate_as_pytorch(to_dtype(arguments, dtype), factor=2 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_emulated_results_do_not_depend_on_the_order_of_threads(emulation, emulated_kernels, dtype):
    emulation(16 * 1024)  # several chunks, one after the other in the same memory
    inputs = make_inputs("all", dtype, batch_size=1, num_heads=1, head_dim=32)
    expected = run_with_gradients(inputs, "fused")
    for seed in (1, 2, 3):
        emulated_kernels.emulation_set_order(seed)
        for name, value in run_with_gradients(inputs, "fused").items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [-1e9, torch.finfo(torch.float32).min])
def test_emulated_gradients_are_right_where_all_keys_have_a_bias_as_large_as_a_mask(emulation, bias, dtype):
    inputs = with_biases(make_inputs("context", dtype, batch_size=1, num_heads=1), bias)
    expected, found = (run_with_gradients(inputs, backend) for backend in ("reference", "fused"))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("wanted", [{0}, {1}, {3}, {2, 4}, {1, 2, 3, 4}])
def test_emulated_gradients_that_nobody_wants_leave_the_others_as_they_are(emulation, wanted):
    inputs = make_inputs("direct", torch.bfloat16, batch_size=1, num_heads=1)
    tensors = [tensor.requires_grad_(index in wanted) for index, tensor in enumerate(tensors_of(inputs))]
    grads = []
    for backend in ("reference", "fused"):
        output = local_attention(**with_tensors(inputs, tensors), backend=backend)
        grads.append(torch.autograd.grad(output.sin().sum(), [tensors[index] for index in sorted(wanted)]))
    torch.testing.assert_close(*grads, atol=5e-2, rtol=5e-2)


# ------------------------------------------------------------------------------------------------------------ on a GPU


def to_cuda(arguments):
    return mapped(arguments, lambda tensor: tensor.cuda(), biases=True)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case", CASES)
def test_cuda_is_as_accurate_as_pytorch(case, dtype):
    assert_as_accurate_as_pytorch(
        to_cuda(make_inputs(case, dtype, head_dim=64)), factor=2 if dtype == torch.float32 else 4
    )


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "geometry",
    [
        ((60, 60), [{"kernel_size": (9, 5)}]),
        ((60, 60), [{"kernel_size": (9, 5)}, {"grid": (20, 20), "kernel_size": (5, 5)}]),
        ((60, 60), [{"kernel_size": (9, 5)}, {"keys": 16, "biased": True}]),
        ((64, 64), [{"kernel_size": (9, 9)}]),
    ],
)
def test_cuda_is_as_accurate_as_pytorch_at_the_released_sizes(geometry, head_dim, dtype):
    inputs = make_inputs(geometry, dtype, batch_size=1, num_heads=2, head_dim=head_dim)
    assert_as_accurate_as_pytorch(to_cuda(inputs), factor=2)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("seed", range(60))
def test_cuda_is_as_accurate_as_pytorch_on_random_shapes_strides_and_biases(seed):
    arguments = on_head_dim_of_cuda(random_case(torch.Generator().manual_seed(200 + seed)))
    dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
    inputs = to_cuda(to_dtype(arguments, dtype))
    assert_as_accurate_as_pytorch(inputs, factor=2 if dtype == torch.float32 else 4)


@pytest.mark.gpu
@needs_kernels
def test_cuda_copies_what_is_not_aligned():
    storage = torch.randn(2 * 63 * 3 * 2 * 16 + 1, device="cuda", dtype=torch.bfloat16)
    query, key, value = storage[1:].view(2, 63, 3, 2, 16).unbind(2)
    keys = KeySet(key, value, (7, 9), (5, 3))
    output = local_attention(query, keys, (7, 9), backend="fused")
    expected = local_attention(query, keys, (7, 9), backend="reference")
    torch.testing.assert_close(output, expected)


@pytest.mark.gpu
@needs_kernels
def test_cuda_gives_the_same_numbers_every_time():
    inputs = to_cuda(make_inputs("all", torch.bfloat16, head_dim=64))
    first = run_with_gradients(inputs, "fused")
    for _ in range(5):
        again = run_with_gradients(inputs, "fused")
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("case", ["direct", "iterative", "context"])
def test_cuda_operator_passes_opcheck(case):
    inputs = mapped(to_cuda(make_inputs(case, torch.bfloat16)), lambda tensor: tensor.requires_grad_())
    torch.library.opcheck(native.local_attention_forward, operator_arguments(inputs))


@pytest.mark.gpu
@needs_kernels
def test_cuda_compiles_without_graph_breaks():
    inputs = to_cuda(make_inputs("all", torch.bfloat16))
    compiled = torch.compile(lambda **x: local_attention(**x, backend="fused"), fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), local_attention(**inputs, backend="fused"))


@pytest.mark.gpu
@needs_kernels
def test_cuda_graph_replays_forward_and_backward():
    inputs = to_cuda(make_inputs("direct", torch.bfloat16, head_dim=64))
    inputs = mapped(inputs, lambda tensor: tensor.requires_grad_())

    def step():
        output = local_attention(**inputs, backend="fused")
        return output, torch.autograd.grad(output.square().sum(), tensors_of(inputs))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, grads = step()
    with torch.no_grad():
        inputs["query"].mul_(0.5)
    graph.replay()
    expected, expected_grads = step()
    assert torch.equal(output, expected)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, expected_grads))


@pytest.mark.gpu
@needs_kernels
def test_cuda_runs_on_the_current_stream():
    inputs = to_cuda(make_inputs("direct", torch.bfloat16, head_dim=64))
    expected = local_attention(**inputs, backend="fused")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        copy = mapped(inputs, lambda tensor: tensor * 1)
        output = local_attention(**copy, backend="fused")
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.gpu
@needs_kernels
def test_cuda_needs_no_memory_but_its_results():
    query, key, value = torch.randn(1, 3600, 3, 48, 64, device="cuda", dtype=torch.bfloat16).unbind(2)
    inputs = {"query": query, "key_sets": KeySet(key, value, (60, 60), (9, 5)), "query_grid": (60, 60)}
    local_attention(**inputs, backend="fused")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, logsumexp = local_attention(**inputs, backend="fused", return_logsumexp=True)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= output.nbytes + logsumexp.nbytes + 4096
