"""The GELU kernels: PyTorch's numbers and gradients, for any count, dtype, processor and number of threads."""

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines.ops import gelu as ops
from cogview_pipelines.ops import native
from cogview_pipelines.ops.gelu import SMALLEST, gelu

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels are not built")
needs_gradients = pytest.mark.skipif(
    native.library() is None or ops._kernel("gelu_backward_cpu") is None, reason="the kernels are not built, or older"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(count, dtype=torch.float32):
    values = 4 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    special = [0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, -11.0, float("inf"), float("nan")]
    values[: len(special)] = torch.tensor(special)
    return values.to(dtype)


def in_float64(values):
    return F.gelu(values.double(), approximate="tanh")


def assert_as_accurate_as_pytorch(result, values):
    """No further from the true result than PyTorch's own function, give or take a rounding."""
    exact, theirs = in_float64(values), F.gelu(values, approximate="tanh")
    finite = exact.isfinite()
    assert torch.equal(result[~finite].isnan(), theirs[~finite].isnan())
    error, allowed = ((each.double() - exact)[finite].abs() for each in (result, theirs))
    rounding = torch.finfo(values.dtype).eps * exact[finite].abs() + 1e-7
    assert (error <= allowed + rounding).all()


def need_instruction_set(isa):
    """Skip the test where these instructions are not compiled in, or not of this processor."""
    info = native.build_info()
    names = info["cpu_instruction_sets"]
    if isa >= len(names) or isa > names.index(info["cpu_instruction_set"]):
        pytest.skip("not compiled in, or not of this processor")


@needs_kernels
@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_as_accurate_as_pytorch_on_every_instruction_set(dtype, isa):
    need_instruction_set(isa)
    for count in (9, 16, 17, 40000):
        for threads in (1, 3):
            values = numbers(count, dtype)
            result = torch.empty_like(values)
            arguments = (count, native.FLOAT32_AND_HALVES[dtype], threads, 1 + isa, native.openmp_parallel())
            assert ops._kernel()(values.data_ptr(), result.data_ptr(), *arguments) == 0
            assert_as_accurate_as_pytorch(result, values)


def slopes_in_float64(values):
    exact = values.double().requires_grad_()
    F.gelu(exact, approximate="tanh").sum().backward()
    return exact.grad


@needs_gradients
@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_kernel_are_as_accurate_as_those_of_pytorch_on_every_instruction_set(dtype, isa):
    need_instruction_set(isa)
    for count in (9, 16, 17, 40000):
        for threads in (1, 3):
            values = numbers(count, dtype)
            values[7:9] = 60.0
            gradients = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
            result = torch.empty_like(values)
            pointers = [tensor.data_ptr() for tensor in (values, gradients, result)]
            arguments = (count, native.FLOAT32_AND_HALVES[dtype], threads, 1 + isa, native.openmp_parallel())
            assert ops._kernel("gelu_backward_cpu")(*pointers, *arguments) == 0
            exact = gradients.double() * slopes_in_float64(values)
            theirs = torch.ops.aten.gelu_backward(gradients, values, approximate="tanh")
            error, allowed = ((each.double() - exact).abs() for each in (result, theirs))
            rounding = torch.finfo(dtype).eps * exact.abs() + 1e-6 * gradients.double().abs()
            assert (error <= allowed + rounding).all()


@pytest.fixture
def calls(monkeypatch):
    """Every call of a kernel."""
    seen, kernels = [], ops._kernel

    def counted(name="gelu_cpu"):
        kernel = kernels(name)
        return kernel and (lambda *arguments: (seen.append(name), kernel(*arguments))[1])

    monkeypatch.setattr(ops, "_kernel", counted)
    return seen


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_numbers_go_through_the_kernel_and_stay_as_they_are(dtype, calls):
    values = numbers(SMALLEST + 3, dtype)
    given = values.clone().unflatten(0, (1, -1))
    result = gelu(given)
    assert calls and result.shape == given.shape
    assert_as_accurate_as_pytorch(result[0], values)
    torch.testing.assert_close(given[0], values, equal_nan=True, rtol=0, atol=0)


def test_few_numbers_other_types_and_layouts_go_through_pytorch(calls):
    many = numbers(2 * SMALLEST)
    for values in (many[: SMALLEST - 1], many.double(), many.unflatten(0, (2, -1)).T):
        torch.testing.assert_close(gelu(values), F.gelu(values, approximate="tanh"), equal_nan=True)
    assert not calls


@needs_gradients
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_go_through_a_kernel_too_and_are_those_of_pytorch(calls, dtype):
    values = numbers(SMALLEST, dtype)[9:].repeat(2).unflatten(0, (2, -1)).requires_grad_()
    weights = torch.randn(values.shape[::-1], generator=torch.Generator().manual_seed(1)).to(dtype).T
    (gelu(values) * weights).sum().backward()  # gradients that are not contiguous
    assert calls == ["gelu_cpu", "gelu_backward_cpu"]
    expected = values.detach().clone().requires_grad_()
    (F.gelu(expected, approximate="tanh") * weights).sum().backward()
    torch.testing.assert_close(values.grad, expected.grad)


@needs_gradients
def test_gradients_of_gradients_are_those_of_pytorch():
    values = numbers(SMALLEST)[9:].repeat(2).requires_grad_()
    found = []
    for function in (gelu, lambda given: F.gelu(given, approximate="tanh")):
        (slope,) = torch.autograd.grad(function(values).square().sum(), values, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), values)
        found.append(curve)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_where_a_derivative_goes_along_pytorch_computes_it(calls):
    values = numbers(SMALLEST)[9:].repeat(2)
    along = torch.ones_like(values)
    with torch.no_grad():
        _, result = torch.func.jvp(gelu, (values,), (along,))
        _, expected = torch.func.jvp(lambda given: F.gelu(given, approximate="tanh"), (values,), (along,))
    assert torch.equal(result, expected) and result.any()
    assert not calls


def test_without_kernels_pytorch_does_it(monkeypatch):
    monkeypatch.setattr(ops, "_kernel", lambda name="gelu_cpu": None)
    values = numbers(SMALLEST)
    torch.testing.assert_close(gelu(values), F.gelu(values, approximate="tanh"), equal_nan=True)


@needs_gradients
def test_the_operator_is_registered_as_pytorch_wants_it():
    values = numbers(SMALLEST)[9:]
    torch.library.opcheck(torch.ops.cogview_pipelines.gelu.default, (values,))
    torch.library.opcheck(torch.ops.cogview_pipelines.gelu.default, (values.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.cogview_pipelines.gelu_backward.default, (values, values.flip(0)))
