"""
Local attention against one dense softmax over masks built from the geometry function, for every backend that runs
here.
"""

import math
import warnings

import pytest
import torch

from cogview_pipelines.ops import native
from cogview_pipelines.ops.local_attention import (
    local_attention,
    merge_attention,
    reference_local_attention,
    window_mask,
)

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels are not built")

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
    query, key=None, value=None, *, query_grid, kernel_size=None, causal=False, cross_key=None, cross_value=None,
    cross_grid=None, cross_kernel_size=None, cross_causal=False, context_key=None, context_value=None,
    context_bias=None, scale=None,
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


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_kernels)])
@pytest.mark.parametrize("case", CASES)
def test_output_equals_one_dense_softmax(case, backend):
    inputs = make_inputs(case)
    output, logsumexp = local_attention(**inputs, backend=backend, return_logsumexp=True)
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


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_kernels)])
@pytest.mark.parametrize("window", [True, False])
def test_fully_masked_context_is_finite_with_finite_gradients(window, backend):
    inputs = make_inputs("iterative" if window else "context")
    inputs["context_bias"] = torch.full_like(inputs["context_bias"], -math.inf)
    names = [name for name in inputs if name.endswith(("query", "key", "value"))]
    for name in names:
        inputs[name].requires_grad_()
    output = local_attention(**inputs, backend=backend)
    output.square().sum().backward()
    if window:
        alone = local_attention(**{name: value for name, value in inputs.items() if not name.startswith("context")})
        torch.testing.assert_close(output, alone)
    else:
        assert torch.equal(output, torch.zeros_like(output))
    assert all(inputs[name].grad.isfinite().all() for name in names)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_kernels)])
@pytest.mark.parametrize("case", ["causal", "smaller_than_window", "cross_uneven", "context", "all"])
def test_gradients_including_that_of_the_logsumexp_are_exact(case, backend):
    small = {**CASES[case], "query_grid": {"cross_uneven": (6, 10), "all": (4, 6)}.get(case, (3, 4))}
    if "cross_grid" in small:
        small["cross_grid"] = (3, 5) if case == "cross_uneven" else (2, 3)
    inputs = make_inputs(small, batch_size=1, num_heads=1, head_dim=3)
    names = [name for name in inputs if name.endswith(("query", "key", "value"))]
    others = {name: value for name, value in inputs.items() if name not in names}

    def function(*tensors):
        return local_attention(**dict(zip(names, tensors)), **others, backend=backend, return_logsumexp=True)

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


def test_fused_without_kernels_lists_every_reason(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    inputs = make_inputs("iterative")
    inputs["context_bias"].requires_grad_()
    with pytest.raises(
        ValueError, match=r"(?s)cannot run these inputs:.*kernels are not built.*`context_bias` requires a grad"
    ):
        local_attention(**inputs, backend="fused")
    assert local_attention(**inputs).requires_grad


def test_without_kernels_the_reference_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    native.say_that_kernels_are_missing.cache_clear()
    inputs = make_inputs("self")
    with pytest.warns(UserWarning, match="kernels are not built"):
        output = local_attention(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(local_attention(**inputs), output)


def test_gradient_of_the_context_bias_comes_from_the_reference():
    inputs = make_inputs("iterative")
    bias = inputs["context_bias"].masked_fill(inputs["context_bias"] == -math.inf, 0.0).double()
    (grad,) = torch.autograd.grad(
        local_attention(**{**inputs, "context_bias": bias.requires_grad_()})[..., 0].sum(), bias
    )
    (expected,) = torch.autograd.grad(dense_attention(**{**inputs, "context_bias": bias})[0][..., 0].sum(), bias)
    torch.testing.assert_close(grad, expected)


# --------------------------------------------------------------------------------------------------- the fused kernels


def run_with_gradients(inputs, backend):
    """Output, logsumexp and the gradients of all tensors, for fixed random gradients of both results."""
    names = [name for name in inputs if name.endswith(("query", "key", "value"))]
    inputs = {name: value.detach().requires_grad_() if name in names else value for name, value in inputs.items()}
    output, logsumexp = local_attention(**inputs, backend=backend, return_logsumexp=True)
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16, so that the gradients that come in are the same in every dtype.
    grad_output = torch.randn(output.shape, generator=generator).bfloat16().to(output)
    grad_logsumexp = torch.randn(logsumexp.shape, generator=generator).bfloat16().to(logsumexp)
    grad_logsumexp = grad_logsumexp.masked_fill(logsumexp == -math.inf, 0.0)
    grads = torch.autograd.grad([output, logsumexp], [inputs[name] for name in names], [grad_output, grad_logsumexp])
    return {"output": output.detach(), "logsumexp": logsumexp.detach(), **dict(zip(names, grads))}


def assert_as_accurate_as_pytorch(inputs, factor=2):
    """
    The error against float64 is at most `factor` times that of the reference in the same dtype, for outputs and
    gradients.
    """
    double = {name: value.double() if torch.is_tensor(value) else value for name, value in inputs.items()}
    exact = run_with_gradients(double, "reference")
    plain = run_with_gradients(inputs, "reference")
    fused = run_with_gradients(inputs, "fused")
    for name, value in exact.items():
        finite = value.isfinite()
        assert torch.equal(fused[name].isfinite(), finite), name
        size = value[finite].abs().max()
        error = (fused[name].double() - value)[finite].abs().max()
        allowed = factor * (plain[name].double() - value)[finite].abs().max()
        is_double = fused[name].dtype == torch.float64  # then the reference is no judge: allow it the same rounding
        rounding = size * (100 * torch.finfo(torch.float64).eps if is_double else 4 * torch.finfo(torch.float32).eps)
        assert error <= allowed + rounding, f"{name}: {error} > {allowed} + {rounding}"


def random_case(generator):
    """A random geometry, sizes and strided views, as keyword arguments of `local_attention`."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch_size, num_heads, head_dim = draw(1, 3), draw(1, 3), (1, 3, 8, 16, 24, 32, 40, 64, 80, 128)[draw(0, 9)]
    coarse, ratio = (draw(1, 7), draw(1, 7)), (draw(1, 3), draw(1, 3))
    grid = (coarse[0] * ratio[0], coarse[1] * ratio[1])
    arguments = {"query_grid": grid, "scale": None if draw(0, 1) else 0.3}

    def views(positions, parts):
        fused = torch.randn(
            batch_size, positions, parts, num_heads, head_dim, generator=generator, dtype=torch.float64
        )
        return fused.unbind(2) if draw(0, 1) else fused.permute(2, 0, 3, 1, 4).contiguous().transpose(2, 3).unbind(0)

    sources = draw(1, 7)
    query, key, value = views(grid[0] * grid[1], 3)
    arguments["query"] = query
    if sources & 1:
        kernel = (2 * draw(0, 5) + 1, 2 * draw(0, 5) + 1)
        arguments |= {"key": key, "value": value, "kernel_size": kernel, "causal": bool(draw(0, 1))}
    if sources & 2:
        key, value = views(coarse[0] * coarse[1], 2)
        kernel = (2 * draw(0, 3) + 1, 2 * draw(0, 3) + 1)
        arguments |= {"cross_key": key, "cross_value": value, "cross_kernel_size": kernel, "cross_grid": coarse}
        arguments["cross_causal"] = bool(draw(0, 1))
    if sources & 4:
        context = draw(1, 40)
        arguments["context_key"], arguments["context_value"] = views(context, 2)
        if draw(0, 1):
            bias = torch.randn(batch_size, context, generator=generator)
            arguments["context_bias"] = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -math.inf)
    return arguments


def to_dtype(arguments, dtype):
    """The tensors of a case in another dtype, with their strides, except the bias."""
    return {
        name: value.to(dtype) if torch.is_tensor(value) and name != "context_bias" else value
        for name, value in arguments.items()
    }


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_fused_is_as_accurate_as_pytorch(case, dtype):
    assert_as_accurate_as_pytorch(make_inputs(case, dtype, head_dim=32))


@needs_kernels
@pytest.mark.parametrize("seed", range(40))
def test_fused_is_as_accurate_as_pytorch_on_random_shapes_strides_and_biases(seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[seed % 4]
    assert_as_accurate_as_pytorch(to_dtype(random_case(generator), dtype))


@needs_kernels
@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("tile_rows", [1, 2, 4, 8, 16])
def test_every_instruction_set_and_tile_shape_gives_the_same(isa, tile_rows, monkeypatch):
    sets = native.build_info()["cpu_instruction_sets"]
    if isa > sets.index(native.build_info()["cpu_instruction_set"]):
        pytest.skip("this processor lacks the instruction set, or it is not compiled in")
    monkeypatch.setattr(native, "_TUNING", {"isa": isa + 1, "tile_rows": tile_rows})
    for case, dtype in (
        ("all", torch.float32),
        ("direct", torch.float64),
        ("causal", torch.float32),
        ("one_row", torch.bfloat16),
    ):
        assert_as_accurate_as_pytorch(make_inputs(case, dtype, head_dim=48))


@needs_kernels
@pytest.mark.parametrize("pool", ["torch", "own"])
@pytest.mark.parametrize("case", ["direct", "causal", "all", "context"])
def test_rows_split_between_threads_give_the_same(case, pool, monkeypatch):
    if pool == "own":
        monkeypatch.setattr(native, "openmp_parallel", lambda: None)
    inputs = make_inputs({**CASES[case], "query_grid": (24, 24)}, batch_size=1, num_heads=1)
    expected = run_with_gradients(inputs, "reference")
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "_TUNING", {"threads": threads})
        torch.testing.assert_close(run_with_gradients(inputs, "fused"), expected)


@needs_kernels
def test_fused_reads_views_of_one_projection_without_copies(monkeypatch):
    for copy in ("contiguous", "clone"):
        monkeypatch.setattr(torch.Tensor, copy, lambda self, **options: pytest.fail("a copy was made"))
    projection = torch.randn(2, 63, 3, 2, 16)
    query, key, value = projection.unbind(2)
    output = local_attention(query, key, value, query_grid=(7, 9), kernel_size=(5, 3), backend="fused")
    monkeypatch.undo()
    expected = local_attention(query, key, value, query_grid=(7, 9), kernel_size=(5, 3), backend="reference")
    torch.testing.assert_close(output, expected)


@needs_kernels
@pytest.mark.parametrize("case", ["direct", "iterative", "context"])
def test_fused_operator_passes_opcheck(case):
    inputs = make_inputs(case, torch.float32)
    tensors = [
        inputs.get(name)
        for name in ("query", "key", "value", "cross_key", "cross_value", "context_key", "context_value")
    ]
    tensors = [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors]
    grids = [list(inputs.get(name, ())) for name in ("query_grid", "kernel_size", "cross_grid", "cross_kernel_size")]
    arguments = (*tensors, inputs.get("context_bias"), *grids, [False, False], 0.25)
    torch.library.opcheck(native.fused_local_attention, arguments)


@needs_kernels
def test_fused_compiles_without_graph_breaks_and_trains():
    inputs = make_inputs("all", torch.float32)
    compiled = torch.compile(lambda **x: run_with_gradients(x, "fused")["output"], backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), run_with_gradients(inputs, "fused")["output"])
    names = [name for name in inputs if name.endswith(("query", "key", "value"))]
    forward = torch.compile(lambda **x: local_attention(**x), fullgraph=True, backend="aot_eager")
    grads = []
    for function in (forward, local_attention):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        function(**{**inputs, **leaves}).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_kernels)])
def test_autocast_casts_query_keys_and_values(backend):
    inputs = make_inputs("iterative", torch.float32)
    inputs["key"] = inputs["key"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, logsumexp = local_attention(**inputs, backend=backend, return_logsumexp=True)
    assert output.dtype == torch.bfloat16 and logsumexp.dtype == torch.float32
    expected = local_attention(**to_dtype(inputs, torch.bfloat16), backend=backend)
    assert torch.equal(output, expected)


@needs_kernels
def test_not_a_number_is_not_hidden():
    inputs = make_inputs("direct", torch.float32)
    inputs["query"][0, 5] = math.nan
    output = local_attention(**inputs, backend="fused")
    assert output[0, 5].isnan().all() and output[0, 6].isfinite().all()
