"""Local attention against one dense softmax over masks built from the geometry function, for every backend that runs here."""

import math

import pytest
import torch

from cogview_pipelines.ops.local_attention import (
    local_attention,
    merge_attention,
    reference_local_attention,
    window_mask,
)

CASES = {
    "self": {"query_grid": (7, 9), "kernel_size": (5, 3)},
    "self_released": {"query_grid": (12, 12), "kernel_size": (9, 5)},
    "causal": {"query_grid": (7, 9), "kernel_size": (5, 3), "causal": True},
    "one_row": {"query_grid": (1, 11), "kernel_size": (3, 3)},
    "one_column": {"query_grid": (11, 1), "kernel_size": (5, 1)},
    "one_cell": {"query_grid": (1, 1), "kernel_size": (9, 5)},
    "smaller_than_window": {"query_grid": (4, 3), "kernel_size": (9, 11)},
    "cross": {"query_grid": (12, 12), "cross_grid": (4, 4), "cross_kernel_size": (5, 5)},
    "cross_uneven": {"query_grid": (6, 20), "cross_grid": (3, 5), "cross_kernel_size": (1, 3)},
    "cross_causal": {"query_grid": (6, 9), "cross_grid": (2, 3), "cross_kernel_size": (3, 3), "cross_causal": True},
    "context": {"query_grid": (5, 4), "context": 6},
    "direct": {"query_grid": (9, 12), "kernel_size": (9, 5), "cross_grid": (3, 4), "cross_kernel_size": (5, 5)},
    "iterative": {"query_grid": (9, 12), "kernel_size": (9, 5), "context": 16},
    "all": {
        "query_grid": (8, 18),
        "kernel_size": (3, 7),
        "cross_grid": (4, 6),
        "cross_kernel_size": (3, 3),
        "context": 5,
    },
}


def make_inputs(case, dtype=torch.float64, batch_size=2, num_heads=2, head_dim=16, seed=0):
    """Tensors and geometry of a case as keyword arguments of `local_attention`."""
    generator = torch.Generator().manual_seed(seed)
    arguments = dict(CASES[case] if isinstance(case, str) else case)
    context = arguments.pop("context", 0)

    def random(positions):
        return torch.randn(batch_size, positions, num_heads, head_dim, generator=generator, dtype=torch.float64).to(
            dtype
        )

    positions = math.prod(arguments["query_grid"])
    arguments["query"] = random(positions)
    if "kernel_size" in arguments:
        arguments |= {"key": random(positions), "value": random(positions)}
    if "cross_grid" in arguments:
        coarse = math.prod(arguments["cross_grid"])
        arguments |= {"cross_key": random(coarse), "cross_value": random(coarse)}
    if context:
        bias = torch.randn(batch_size, context, generator=generator)
        bias[0, : context // 2] = -math.inf
        arguments |= {"context_key": random(context), "context_value": random(context), "context_bias": bias}
    return arguments


def dense_attention(
    query, key=None, value=None, *, query_grid, kernel_size=None, causal=False, cross_key=None, cross_value=None, cross_grid=None,
    cross_kernel_size=None, cross_causal=False, context_key=None, context_value=None, context_bias=None, scale=None,
):  # fmt: skip
    """The definition: all keys in one row, everything outside the windows set to minus infinity, one softmax."""
    keys, values, biases = [], [], []
    for name_key, name_value, grid, kernel, is_causal in (
        (key, value, query_grid, kernel_size, causal),
        (cross_key, cross_value, cross_grid, cross_kernel_size, cross_causal),
    ):
        if name_key is not None:
            keys.append(name_key)
            values.append(name_value)
            mask = window_mask(query_grid, grid, kernel, is_causal)
            biases.append(torch.zeros(mask.shape).masked_fill(~mask, -math.inf).expand(len(query), 1, -1, -1))
    if context_key is not None:
        keys.append(context_key)
        values.append(context_value)
        bias = torch.zeros(context_key.shape[:2]) if context_bias is None else context_bias
        biases.append(bias[:, None, None, :].expand(-1, 1, query.shape[1], -1))
    keys, values, bias = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(biases, -1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale + bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)


def test_window_is_cut_off_at_the_border():
    mask = window_mask((4, 5), (4, 5), (3, 5)).reshape(4, 5, 4, 5)
    corner = torch.zeros(4, 5, dtype=torch.bool)
    corner[:2, :3] = True
    assert torch.equal(mask[0, 0], corner)
    assert mask[2, 2].sum() == 15


def test_query_looks_at_the_coarse_cell_that_contains_it():
    mask = window_mask((6, 6), (2, 3), (1, 1)).reshape(6, 6, 2, 3)
    assert mask.sum() == 36
    for row in range(6):
        for column in range(6):
            assert mask[row, column, row // 3, column // 2]


def test_causal_window_ends_with_the_own_cell():
    mask = window_mask((3, 5), (3, 5), (3, 3), causal=True).reshape(3, 5, 3, 5)
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0, 1:4] = True
    expected[1, 1:3] = True
    assert torch.equal(mask[1, 2], expected)


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_one_dense_softmax(case):
    inputs = make_inputs(case)
    output, logsumexp = local_attention(**inputs, backend="reference", return_logsumexp=True)
    expected, expected_logsumexp = dense_attention(**inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)


def test_merged_pieces_equal_one_dense_softmax():
    inputs = make_inputs("all")
    shared = {"query": inputs["query"], "query_grid": inputs["query_grid"]}
    names = (("key", "value", "kernel_size"), ("cross_key", "cross_value", "cross_grid", "cross_kernel_size"))
    names += (("context_key", "context_value", "context_bias"),)
    pieces = [
        reference_local_attention(**shared, **{name: inputs[name] for name in group if name in inputs})
        for group in names
    ]
    torch.testing.assert_close(merge_attention(pieces), dense_attention(**inputs))


def test_scale_replaces_the_default():
    inputs = make_inputs("self")
    output = local_attention(**inputs, scale=0.7)
    torch.testing.assert_close(output, dense_attention(**inputs, scale=0.7)[0])


@pytest.mark.parametrize("window", [True, False])
def test_fully_masked_context_is_finite_with_finite_gradients(window):
    inputs = make_inputs("iterative" if window else "context")
    inputs["context_bias"] = torch.full_like(inputs["context_bias"], -math.inf)
    names = [name for name in inputs if name.endswith(("query", "key", "value"))]
    for name in names:
        inputs[name].requires_grad_()
    output = local_attention(**inputs)
    output.square().sum().backward()
    if window:
        alone = local_attention(**{name: value for name, value in inputs.items() if not name.startswith("context")})
        torch.testing.assert_close(output, alone)
    else:
        assert torch.equal(output, torch.zeros_like(output))
    assert all(inputs[name].grad.isfinite().all() for name in names)


@pytest.mark.parametrize("case", ["causal", "smaller_than_window", "cross_uneven", "context", "all"])
def test_gradients_including_that_of_the_logsumexp_are_exact(case):
    small = {**CASES[case], "query_grid": {"cross_uneven": (6, 10), "all": (4, 6)}.get(case, (3, 4))}
    if "cross_grid" in small:
        small["cross_grid"] = (3, 5) if case == "cross_uneven" else (2, 3)
    inputs = make_inputs(small, batch_size=1, num_heads=1, head_dim=3)
    names = [name for name in inputs if name.endswith(("query", "key", "value"))]
    others = {name: value for name, value in inputs.items() if name not in names}

    def function(*tensors):
        return local_attention(**dict(zip(names, tensors)), **others, return_logsumexp=True)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_grid": (7, 8)}, r"`query_grid` \(7, 8\) needs 56 positions, but `query` has 63"),
        ({"kernel_size": (4, 3)}, r"`kernel_size` must be two odd positive numbers, .* but is \(4, 3\)"),
        ({"kernel_size": None}, "`kernel_size` must be two odd"),
        ({"value": None}, "`key` was given without `value`"),
        ({"key": None, "value": None}, "No keys were given"),
        ({"context_bias": torch.zeros(2, 3)}, "`context_bias` was given without `context_key`"),
        ({"backend": "quick"}, "`backend` must be .* but is 'quick'"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        local_attention(**{**make_inputs("self"), **change})


def test_coarse_grid_must_divide_the_query_grid():
    with pytest.raises(ValueError, match=r"`query_grid` must be a multiple .* \(12, 12\) and \(8, 2\)"):
        local_attention(**{**make_inputs("cross"), "cross_grid": (8, 2)})


def test_reference_compiles_without_graph_breaks():
    inputs = make_inputs("all", torch.float32)
    compiled = torch.compile(
        lambda **x: local_attention(**x, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**inputs), local_attention(**inputs, backend="reference"))
