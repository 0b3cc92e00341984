"""The GELU kernel: PyTorch's numbers, for any count, dtype, processor and number of threads."""

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines.ops import gelu as ops
from cogview_pipelines.ops import native
from cogview_pipelines.ops.gelu import SMALLEST, gelu

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels are not built")
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


@needs_kernels
@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_as_accurate_as_pytorch_on_every_instruction_set(dtype, isa):
    info = native.build_info()
    names = info["cpu_instruction_sets"]
    if isa >= len(names) or isa > names.index(info["cpu_instruction_set"]):
        pytest.skip("not compiled in, or not of this processor")
    for count in (9, 16, 17, 40000):
        for threads in (1, 3):
            values = numbers(count, dtype)
            result = torch.empty_like(values)
            arguments = (count, native.FLOAT32_AND_HALVES[dtype], threads, 1 + isa, native.openmp_parallel())
            assert ops._kernel()(values.data_ptr(), result.data_ptr(), *arguments) == 0
            assert_as_accurate_as_pytorch(result, values)


@pytest.fixture
def calls(monkeypatch):
    """Every call of the kernel."""
    seen, kernel = [], ops._kernel()

    def count(*arguments):
        seen.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(ops, "_kernel", lambda: kernel and count)
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


def test_where_a_gradient_is_wanted_pytorch_computes_it(calls):
    values = numbers(SMALLEST)[9:].repeat(2).requires_grad_()
    gelu(values).sum().backward()
    expected = values.detach().clone().requires_grad_()
    F.gelu(expected, approximate="tanh").sum().backward()
    torch.testing.assert_close(values.grad, expected.grad)
    assert not calls


def test_where_a_derivative_goes_along_pytorch_computes_it(calls):
    values = numbers(SMALLEST)[9:].repeat(2)
    along = torch.ones_like(values)
    with torch.no_grad():
        _, result = torch.func.jvp(gelu, (values,), (along,))
        _, expected = torch.func.jvp(lambda given: F.gelu(given, approximate="tanh"), (values,), (along,))
    assert torch.equal(result, expected) and result.any()
    assert not calls


def test_without_kernels_pytorch_does_it(monkeypatch):
    monkeypatch.setattr(ops, "_kernel", lambda: None)
    values = numbers(SMALLEST)
    torch.testing.assert_close(gelu(values), F.gelu(values, approximate="tanh"), equal_nan=True)


@needs_kernels
def test_the_operator_is_registered_as_pytorch_wants_it():
    torch.library.opcheck(torch.ops.cogview_pipelines.gelu.default, (numbers(SMALLEST)[9:],))
