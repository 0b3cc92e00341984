"""`torch.func` and forward-mode differentiation through the operators: right numbers, or a refusal, never zeros."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

from cogview_pipelines.ops.gelu import SMALLEST, gelu
from cogview_pipelines.ops.local_attention import local_attention
from cogview_pipelines.ops.transforms import is_transformed

from .attention_cases import make_inputs, mapped, needs_kernels, tensors_of, with_tensors


@pytest.fixture
def case():
    """A function of all tensors of a case, by any backend, and the tensors."""
    inputs = make_inputs("all", head_dim=4)

    def function(*tensors, backend=None):
        return local_attention(**with_tensors(inputs, tensors), backend=backend)

    return function, tensors_of(inputs)


def difference(function, tensors, tangents, step=1e-6):
    """The derivative along the tangents, by finite differences."""
    ahead = function(*(tensor + step * tangent for tensor, tangent in zip(tensors, tangents)))
    behind = function(*(tensor - step * tangent for tensor, tangent in zip(tensors, tangents)))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_equals_finite_differences(case, grad_mode):
    function, tensors = case
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    with torch.set_grad_enabled(grad_mode):
        _, along = jvp(function, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(along, difference(function, tensors, tangents), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("index", range(7))
def test_a_tangent_of_any_tensor_counts(case, index):
    function, tensors = case
    tangent = torch.randn_like(tensors[index])
    with forward_ad.dual_level():
        duals = list(tensors)
        duals[index] = forward_ad.make_dual(tensors[index], tangent)
        along = forward_ad.unpack_dual(function(*duals)).tangent
    tangents = [tangent if i == index else torch.zeros_like(tensor) for i, tensor in enumerate(tensors)]
    torch.testing.assert_close(along, difference(function, tensors, tangents), atol=1e-7, rtol=1e-6)


def test_transforms_that_differentiate_backwards_agree_with_autograd(case):
    function, tensors = case
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
    found = grad(lambda *given: function(*given).sin().sum(), argnums=tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(found, expected)
    output, pull = vjp(function, *tensors)
    torch.testing.assert_close(pull(output.cos()), expected)
    rows = jacrev(lambda query: function(query, *tensors[1:])[0, 0, 0])(tensors[0])
    torch.testing.assert_close(rows.shape, (4, *tensors[0].shape))


def test_vmap_equals_a_loop(case):
    function, tensors = case
    queries = torch.stack([tensors[0], 2 * tensors[0], -tensors[0]])
    expected = torch.stack([function(query, *tensors[1:]) for query in queries])
    torch.testing.assert_close(vmap(lambda query: function(query, *tensors[1:]))(queries), expected)


def test_a_tangent_outside_of_another_transform_counts(case):
    """Inside of the inner transform, the tensors of the outer one look plain."""
    function, tensors = case

    def inner(query):
        return grad(lambda factor: (factor * function(query, *tensors[1:])).sum())(torch.tensor(2.0).double())

    tangent = torch.randn_like(tensors[0])
    _, along = jvp(inner, (tensors[0],), (tangent,))
    torch.testing.assert_close(along, difference(inner, tensors[:1], [tangent]), atol=1e-5, rtol=1e-5)


@needs_kernels
def test_the_kernels_refuse_transforms_when_asked_by_name(case):
    function, tensors = case
    with pytest.raises(ValueError, match=r"torch\.func transform or forward-mode"):
        jvp(lambda query: function(query, *tensors[1:], backend="fused"), (tensors[0],), (tensors[0],))


@needs_kernels
def test_tangents_that_come_in_with_the_gradient_are_refused(case):
    function, tensors = case
    query = tensors[0].detach().requires_grad_()
    output = function(query, *tensors[1:], backend="fused")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='`backend="reference"`'):
        dual = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
        torch.autograd.grad(output, query, dual)


def test_gelu_keeps_tangents_from_outside_of_another_transform():
    values = torch.randn(SMALLEST, dtype=torch.float32)

    def inner(given):
        return grad(lambda factors: (gelu(given) * factors).sum())(torch.ones(SMALLEST))

    _, along = jvp(inner, (values,), (torch.ones_like(values),))
    _, expected = jvp(
        lambda given: torch.nn.functional.gelu(given, approximate="tanh"), (values,), (torch.ones(SMALLEST),)
    )
    torch.testing.assert_close(along, expected)


@needs_kernels
def test_plain_calls_and_compiled_ones_are_not_taken_for_transforms():
    inputs = mapped(make_inputs("direct", torch.float32), lambda tensor: tensor.requires_grad_())
    assert not is_transformed(*tensors_of(inputs))
    compiled = torch.compile(
        lambda given: local_attention(**given, backend="fused"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(inputs), local_attention(**inputs, backend="fused"))


def test_a_compiled_transform_has_its_derivative(case):
    function, tensors = case
    tangent = torch.randn_like(tensors[0])
    compiled = torch.compile(
        lambda query: jvp(lambda given: function(given, *tensors[1:]), (query,), (tangent,))[1], backend="aot_eager"
    )
    expected = jvp(lambda given: function(given, *tensors[1:]), (tensors[0],), (tangent,))[1]
    torch.testing.assert_close(compiled(tensors[0]), expected)
