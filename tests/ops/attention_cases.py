"""Cases of local attention for the tests of all backends: inputs, the definition, how accurate a backend must be."""

import math
from dataclasses import replace

import pytest
import torch

from cogview_pipelines.ops import native
from cogview_pipelines.ops.key_set import KeySet
from cogview_pipelines.ops.local_attention import local_attention, window_mask

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels are not built")
BACKENDS = ["reference", pytest.param("fused", marks=needs_kernels)]

ROUNDINGS = 4  # of each term, that are always allowed

# The grid of the queries, and of each set of keys a window on a grid or, where there is none, the number of keys.
CASES = {
    "self": ((7, 9), [{"kernel_size": (5, 3)}]),
    "self_released": ((12, 12), [{"kernel_size": (9, 5)}]),
    "self_biased": ((7, 9), [{"kernel_size": (5, 3), "biased": True}]),
    "causal": ((7, 9), [{"kernel_size": (5, 3), "causal": True}]),
    "one_row": ((1, 11), [{"kernel_size": (3, 3)}]),
    "one_column": ((11, 1), [{"kernel_size": (5, 1)}]),
    "one_cell": ((1, 1), [{"kernel_size": (9, 5)}]),
    "smaller_than_window": ((4, 3), [{"kernel_size": (9, 11)}]),
    "cross": ((12, 12), [{"grid": (4, 4), "kernel_size": (5, 5)}]),
    "cross_uneven": ((6, 20), [{"grid": (3, 5), "kernel_size": (1, 3)}]),
    "cross_causal": ((6, 9), [{"grid": (2, 3), "kernel_size": (3, 3), "causal": True}]),
    "context": ((5, 4), [{"keys": 6, "biased": True}]),
    "direct": ((9, 12), [{"kernel_size": (9, 5)}, {"grid": (3, 4), "kernel_size": (5, 5)}]),
    "iterative": ((9, 12), [{"kernel_size": (9, 5)}, {"keys": 16, "biased": True}]),
    "two_coarse": ((8, 12), [{"grid": (4, 4), "kernel_size": (3, 3)}, {"grid": (2, 6), "kernel_size": (1, 5)}]),
    "all": (
        (8, 18),
        [{"kernel_size": (3, 7)}, {"grid": (4, 6), "kernel_size": (3, 3)}, {"keys": 5, "biased": True}],
    ),
}


def make_inputs(case, dtype=torch.float64, batch_size=2, num_heads=2, head_dim=16, seed=0):
    """Tensors and geometry of a case as keyword arguments of `local_attention`."""
    generator = torch.Generator().manual_seed(seed)
    query_grid, sets = CASES[case] if isinstance(case, str) else case

    def random(positions):
        shape = (batch_size, positions, num_heads, head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    key_sets = []
    for window in sets:
        window = dict(window)
        if "kernel_size" in window:
            window.setdefault("grid", query_grid)
        positions = window.pop("keys", None) or math.prod(window["grid"])
        bias = None
        if window.pop("biased", False):
            bias = torch.randn(batch_size, positions, generator=generator)
            bias[0, : positions // 2] = -math.inf
        key_sets.append(KeySet(random(positions), random(positions), bias=bias, **window))
    return {"query": random(math.prod(query_grid)), "key_sets": key_sets, "query_grid": query_grid}


def mapped(inputs, function, biases=False):
    """The same case with `function` of the query, all keys and all values, and of the biases on demand."""
    sets = [keys.with_keys(function(keys.key), function(keys.value)) for keys in inputs["key_sets"]]
    if biases:
        sets = [keys if keys.bias is None else replace(keys, bias=function(keys.bias)) for keys in sets]
    return {**inputs, "query": function(inputs["query"]), "key_sets": sets}


def with_biases(inputs, bias):
    """The same case in which every bias is a number, or what a function makes of it."""
    function = bias if callable(bias) else lambda old: torch.full_like(old, bias)
    sets = [keys if keys.bias is None else replace(keys, bias=function(keys.bias)) for keys in inputs["key_sets"]]
    return {**inputs, "key_sets": sets}


def tensors_of(inputs):
    """The query, all keys and all values."""
    sets = inputs["key_sets"]
    return [inputs["query"], *(keys.key for keys in sets), *(keys.value for keys in sets)]


def names_of(inputs):
    """What `tensors_of` gives, in words."""
    numbers = range(len(inputs["key_sets"]))
    return ["query", *(f"key {number}" for number in numbers), *(f"value {number}" for number in numbers)]


def with_tensors(inputs, tensors):
    """The same case with other tensors, in the order of `tensors_of`."""
    tensors = iter(tensors)
    query = next(tensors)
    keys = [next(tensors) for _ in inputs["key_sets"]]
    sets = [each.with_keys(key, next(tensors)) for each, key in zip(inputs["key_sets"], keys, strict=True)]
    return {**inputs, "query": query, "key_sets": sets}


def to_dtype(inputs, dtype):
    """The tensors of a case in another dtype, with their strides, except the biases."""
    return mapped(inputs, lambda tensor: tensor.to(dtype))


def dense_scores(query, key_sets, query_grid, scale=None):
    """
    The scores of all keys in one row, minus infinity outside of the windows, `(batch_size, num_heads, queries, keys)`;
    and all keys and values in that order.
    """
    biases = []
    for keys in key_sets:
        bias = torch.zeros(keys.key.shape[:2]) if keys.bias is None else keys.bias
        bias = bias[:, None, None, :].expand(-1, 1, query.shape[1], -1)
        if keys.grid is not None:
            mask = window_mask(query_grid, keys.grid, keys.kernel_size, keys.causal)
            bias = bias.masked_fill(~mask, -math.inf)
        biases.append(bias)
    key, value = (torch.cat(tensors, 1) for tensors in zip(*((keys.key, keys.value) for keys in key_sets)))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("bqhd,bkhd->bhqk", query, key) * scale + torch.cat(biases, -1), key, value


def dense_attention(query, key_sets, query_grid, scale=None):
    """The definition: all keys in one row, everything outside the windows set to minus infinity, one softmax."""
    scores, _, value = dense_scores(query, key_sets, query_grid, scale)
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), value)
    return output, scores.logsumexp(-1)


def incoming_gradients(output, logsumexp):
    """Random gradients of both results: rounded to bfloat16, so that they are the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator).bfloat16().to(output)
    grad_logsumexp = torch.randn(logsumexp.shape, generator=generator).bfloat16().to(logsumexp)
    return grad_output, grad_logsumexp.masked_fill(logsumexp == -math.inf, 0.0)


def run_with_gradients(inputs, backend):
    """Output, logsumexp and the gradients of all tensors, for fixed random gradients of both results."""
    inputs = mapped(inputs, lambda tensor: tensor.detach().requires_grad_())
    output, logsumexp = local_attention(**inputs, backend=backend, return_logsumexp=True)
    grads = torch.autograd.grad([output, logsumexp], tensors_of(inputs), incoming_gradients(output, logsumexp))
    return {"output": output.detach(), "logsumexp": logsumexp.detach(), **dict(zip(names_of(inputs), grads))}


def sums_of_sizes(inputs):
    """
    For every number of `run_with_gradients`, the sum of the sizes of the terms that it is computed from: a rounding of
    each term, or of what it is made of, may change the number by this times the dtype's epsilon.

    Where terms cancel, that is many times the number itself. It grows with the number of terms.
    """
    inputs = to_dtype(inputs, torch.float64)
    query, key_sets, scale = inputs["query"], inputs["key_sets"], inputs.get("scale")
    scores, key, value = dense_scores(query, key_sets, inputs["query_grid"], scale)
    logsumexp = scores.logsumexp(-1)
    grad_output, grad_logsumexp = incoming_gradients(query, logsumexp)
    query, key, value, grad_output = (tensor.abs() for tensor in (query, key, value, grad_output))
    scale = abs(query.shape[-1] ** -0.5 if scale is None else scale)

    weights = scores.softmax(-1).nan_to_num()
    of_scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale + scores.masked_fill(weights == 0, 0.0).abs()
    of_sums = (weights * of_scores).sum(-1, keepdim=True)
    of_weights = weights * (1 + of_scores + of_sums)  # an exponential turns what a score is off by into a share
    of_products = torch.einsum("bqhd,bkhd->bhqk", grad_output, value)
    through_softmax = of_products + (weights * of_products).sum(-1, keepdim=True) + grad_logsumexp.abs()[..., None]
    of_grad_scores = of_weights * through_softmax * scale
    counts = [keys.key.shape[1] for keys in key_sets]
    grad_keys = torch.einsum("bhqk,bqhd->bkhd", of_grad_scores, query).split(counts, 1)
    grad_values = torch.einsum("bhqk,bqhd->bkhd", of_weights, grad_output).split(counts, 1)
    sizes = [torch.einsum("bhqk,bkhd->bqhd", of_grad_scores, key), *grad_keys, *grad_values]
    output = torch.einsum("bhqk,bkhd->bqhd", of_weights, value)
    of_logsumexp = of_sums[..., 0] + logsumexp.masked_fill(logsumexp == -math.inf, 0.0).abs()
    return {"output": output, "logsumexp": of_logsumexp, **dict(zip(names_of(inputs), sizes))}


def assert_as_accurate_as_pytorch(inputs, factor=2):
    """
    The error against float64 is at most `factor` times that of the reference in the same dtype, for outputs and
    gradients, but for a few roundings of the terms: the reference may be lucky with them.
    """
    exact = run_with_gradients(to_dtype(inputs, torch.float64), "reference")
    plain = run_with_gradients(inputs, "reference")
    fused = run_with_gradients(inputs, "fused")
    sizes = sums_of_sizes(inputs)
    for name, value in exact.items():
        finite = value.isfinite()
        assert torch.equal(fused[name].isfinite(), finite), name
        error = (fused[name].double() - value)[finite].abs()
        allowed = factor * (plain[name].double() - value)[finite].abs().max()
        is_double = fused[name].dtype == torch.float64  # then the reference is no judge: allow it the same rounding
        rounding = 100 * torch.finfo(torch.float64).eps if is_double else ROUNDINGS * torch.finfo(torch.float32).eps
        excess = error - allowed - rounding * sizes[name][finite]
        assert (excess <= 0).all(), f"{name}: {error.max()}, {excess.max()} more than allowed"


def random_case(generator):
    """A random geometry, sizes, strided views and biases, as keyword arguments of `local_attention`."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch_size, num_heads, head_dim = draw(1, 3), draw(1, 3), (1, 3, 8, 16, 24, 32, 40, 64, 80, 128)[draw(0, 9)]
    coarse, ratio = (draw(1, 7), draw(1, 7)), (draw(1, 3), draw(1, 3))
    grid = (coarse[0] * ratio[0], coarse[1] * ratio[1])

    def views(positions, parts):
        fused = torch.randn(
            batch_size, positions, parts, num_heads, head_dim, generator=generator, dtype=torch.float64
        )
        return fused.unbind(2) if draw(0, 1) else fused.permute(2, 0, 3, 1, 4).contiguous().transpose(2, 3).unbind(0)

    def bias(positions, share):
        if draw(1, 4) > share:
            return None
        bias = torch.randn(batch_size, positions, generator=generator)
        return bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -math.inf)

    def window(key, value, grid, most):
        kernel = (2 * draw(0, most) + 1, 2 * draw(0, most) + 1)
        return KeySet(key, value, grid, kernel, bool(draw(0, 1)), bias(math.prod(grid), 1))

    sources, key_sets = draw(1, 7), []
    query, key, value = views(math.prod(grid), 3)
    if sources & 1:
        key_sets.append(window(key, value, grid, 5))
    if sources & 2:
        key_sets.append(window(*views(math.prod(coarse), 2), coarse, 3))
    if sources & 4:
        context = draw(1, 40)
        key_sets.insert(draw(0, len(key_sets)), KeySet(*views(context, 2), bias=bias(context, 2)))
    return {"query": query, "key_sets": key_sets, "query_grid": grid, "scale": None if draw(0, 1) else 0.3}
