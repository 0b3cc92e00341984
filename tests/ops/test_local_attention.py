"""
Local attention against one dense softmax over masks built from the geometry function, for every backend that runs
here.
"""

import ctypes
import math
import warnings
from dataclasses import replace

import pytest
import torch

from cogview_pipelines.ops import native
from cogview_pipelines.ops.key_set import KeySet
from cogview_pipelines.ops.local_attention import (
    local_attention,
    merge_attention,
    reference_local_attention,
    window_mask,
)

from .attention_cases import (
    BACKENDS,
    CASES,
    assert_as_accurate_as_pytorch,
    dense_attention,
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_output_equals_one_dense_softmax(case, backend):
    inputs = make_inputs(case)
    output, logsumexp = local_attention(**inputs, backend=backend, return_logsumexp=True)
    expected, expected_logsumexp = dense_attention(**inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)


def test_merged_pieces_equal_one_dense_softmax():
    inputs = make_inputs("all")
    pieces = [reference_local_attention(**{**inputs, "key_sets": [keys]}) for keys in inputs["key_sets"]]
    torch.testing.assert_close(merge_attention(pieces), dense_attention(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_set_needs_no_list(backend):
    inputs = make_inputs("self")
    (keys,) = inputs["key_sets"]
    alone = local_attention(**{**inputs, "key_sets": keys}, backend=backend)
    assert torch.equal(alone, local_attention(**inputs, backend=backend))


def test_scale_replaces_the_default():
    inputs = make_inputs("self")
    output = local_attention(**inputs, scale=0.7)
    torch.testing.assert_close(output, dense_attention(**inputs, scale=0.7)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [True, False])
def test_fully_masked_context_is_finite_with_finite_gradients(window, backend):
    inputs = mapped(make_inputs("iterative" if window else "context"), lambda tensor: tensor.requires_grad_())
    inputs = with_biases(inputs, -math.inf)
    output = local_attention(**inputs, backend=backend)
    output.square().sum().backward()
    if window:
        torch.testing.assert_close(output, local_attention(**{**inputs, "key_sets": inputs["key_sets"][:1]}))
    else:
        assert torch.equal(output, torch.zeros_like(output))
    assert all(tensor.grad.isfinite().all() for tensor in tensors_of(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [-1e9, -1e30, 1e9])
def test_gradients_are_right_where_all_keys_have_a_bias_as_large_as_a_mask(bias, dtype, backend):
    """Beside such a bias float32 keeps nothing of the scores: the keys of a row share their weight equally."""
    inputs = with_biases(to_dtype(make_inputs("context"), dtype), bias)
    found = run_with_gradients(inputs, backend)
    even = to_dtype(with_biases(inputs, 0.0), torch.float64)
    even["query"] = torch.zeros_like(even["query"])
    expected = run_with_gradients(even, "reference")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in ("output", "value 0"):
        torch.testing.assert_close(found[name].double(), expected[name], atol=tolerance, rtol=tolerance, msg=name)
    with_queries = run_with_gradients(inputs, "reference")
    for name in ("query", "key 0"):
        torch.testing.assert_close(found[name], with_queries[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [-1e5, -1e6, -1e7])
def test_weights_sum_to_one_in_the_backward_whatever_the_bias(bias, backend):
    inputs = with_biases(make_inputs("context", torch.float32), lambda old: bias + old.clamp_min(-1))
    inputs = mapped(inputs, lambda tensor: tensor.requires_grad_())
    local_attention(**inputs, backend=backend).sum().backward()
    of_all_queries = torch.full((2, 2, 16), float(inputs["query"].shape[1]))
    torch.testing.assert_close(inputs["key_sets"][0].value.grad.sum(1), of_all_queries, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["self", "direct", "all"])
def test_weights_sum_to_one_in_the_backward_for_scores_of_millions(case, backend):
    inputs = mapped(make_inputs(case, torch.float32), lambda tensor: (1000 * tensor).requires_grad_())
    output = local_attention(**inputs, backend=backend)
    largest = max(keys.value.abs().max() for keys in inputs["key_sets"])
    assert output.abs().max() <= largest * (1 + 1e-5)
    output.sum().backward()
    values = sum(keys.value.grad.sum(1) for keys in inputs["key_sets"])
    torch.testing.assert_close(values, torch.full_like(values, inputs["query"].shape[1]), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_lowest_number_as_bias_leaves_a_mean_and_not_nothing(dtype, backend):
    inputs = to_dtype(make_inputs("context"), dtype)
    for lowest in (torch.finfo(torch.float32).min, torch.finfo(torch.float64).min):
        bias = torch.full((2, 6), lowest, dtype=torch.float64)
        hidden = {**inputs, "key_sets": [replace(inputs["key_sets"][0], bias=bias)]}
        output, logsumexp = local_attention(**hidden, backend=backend, return_logsumexp=True)
        mean = inputs["key_sets"][0].value.double().mean(1, keepdim=True).expand_as(output)
        torch.testing.assert_close(output.double(), mean, atol=1e-6 if dtype != torch.bfloat16 else 1e-2, rtol=1e-2)
        finite = max(lowest, torch.finfo(logsumexp.dtype).min)
        torch.testing.assert_close(logsumexp, torch.full_like(logsumexp, finite))
        grads = run_with_gradients(hidden, backend)
        assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_keeps_the_precision_of_float64(backend):
    inputs = with_biases(make_inputs("context"), lambda bias: torch.randn(bias.shape, dtype=torch.float64))
    expected, logsumexp = dense_attention(**inputs)
    found = local_attention(**inputs, backend=backend, return_logsumexp=True)
    torch.testing.assert_close(found, (expected, logsumexp), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["causal", "smaller_than_window", "cross_uneven", "context", "self_biased", "all"])
def test_gradients_including_that_of_the_logsumexp_are_exact(case, backend):
    small = {
        "causal": ((3, 4), [{"kernel_size": (5, 3), "causal": True}]),
        "smaller_than_window": ((3, 4), [{"kernel_size": (9, 11)}]),
        "cross_uneven": ((6, 10), [{"grid": (3, 5), "kernel_size": (1, 3)}]),
        "context": ((3, 4), [{"keys": 6, "biased": True}]),
        "self_biased": ((3, 4), [{"kernel_size": (5, 3), "biased": True}]),
        "all": ((4, 6), [{"kernel_size": (3, 7)}, {"grid": (2, 3), "kernel_size": (3, 3)}, {"keys": 5}]),
    }[case]
    inputs = make_inputs(small, batch_size=1, num_heads=1, head_dim=3)
    inputs = with_biases(inputs, lambda bias: bias.nan_to_num(neginf=0.3).index_fill(1, torch.tensor([1]), -math.inf))

    def function(*tensors):
        return local_attention(**with_tensors(inputs, tensors), backend=backend, return_logsumexp=True)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors_of(inputs)])


@needs_kernels
@pytest.mark.parametrize("case", ["direct", "all"])
def test_gradients_that_nobody_wants_are_not_computed_and_the_others_do_not_change(case, monkeypatch):
    inputs = make_inputs({"direct": CASES["direct"], "all": CASES["all"]}[case], torch.float32)
    everything = torch.autograd.grad(
        local_attention(**mapped(inputs, lambda tensor: tensor.requires_grad_()), backend="fused").sin().sum(),
        tensors_of(inputs),
    )
    launched, launch = [], native._launch

    def record(problem, direction, device):
        if direction == "backward":
            launched.append([bool(problem.grad_query.data)])
            for source in problem.source[: len(inputs["key_sets"])]:
                launched[-1] += [bool(source.grad_key.data), bool(source.grad_value.data)]
        launch(problem, direction, device)

    monkeypatch.setattr(native, "_launch", record)
    number = len(everything)
    for wanted in [{index} for index in range(number)] + [{0, 1}, {1, number - 1}, set(range(1, number))]:
        tensors = [t.detach().requires_grad_(index in wanted) for index, t in enumerate(tensors_of(inputs))]
        output = local_attention(**with_tensors(inputs, tensors), backend="fused")
        grads = torch.autograd.grad(output.sin().sum(), [tensors[index] for index in sorted(wanted)])
        for index, grad in zip(sorted(wanted), grads):
            assert torch.equal(grad, everything[index])
        assert sum(launched[-1]) == len(wanted)


def changed(name, index=0, **fields):
    """A case with other arguments, or with other fields of one key set."""
    inputs = make_inputs(name)
    sets = list(inputs["key_sets"])
    sets[index] = replace(sets[index], **{k: v for k, v in fields.items() if k not in ("query_grid", "backend")})
    return {**inputs, "key_sets": sets, **{k: v for k, v in fields.items() if k in ("query_grid", "backend")}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_grid": (7, 8)}, r"`query_grid` \(7, 8\) needs 56 positions, but `query` has 63"),
        (
            {"kernel_size": (4, 3)},
            r"`kernel_size` of the key set must be two odd positive numbers, .* but is \(4, 3\)",
        ),
        ({"kernel_size": None}, "`grid` of the key set was given without `kernel_size`"),
        ({"grid": None, "kernel_size": None, "causal": True}, "`causal` of the key set needs a `grid`"),
        ({"grid": (7, 8)}, r"`grid` of the key set \(7, 8\) needs 56 positions, but its `key` has 63"),
        ({"value": torch.zeros(1, 2)}, r"`key` and `value` of the key set must have one shape, .* and \(1, 2\)"),
        ({"bias": torch.zeros(2, 3)}, r"`bias` of the key set must .* = \(2, 63\), but is .* of the shape \(2, 3\)"),
        ({"backend": "quick"}, "`backend` must be .* but is 'quick'"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        local_attention(**changed("self", **change))


def test_errors_say_which_of_several_sets_is_meant():
    inputs = make_inputs("direct")
    with pytest.raises(ValueError, match="`key_sets` is empty"):
        local_attention(**{**inputs, "key_sets": []})
    with pytest.raises(ValueError, match=r"`kernel_size` of key set 1 must be two odd"):
        local_attention(**changed("direct", 1, kernel_size=(2, 2)))


def test_coarse_grid_must_divide_the_query_grid():
    with pytest.raises(ValueError, match=r"`query_grid` must be a multiple .* \(12, 12\) and \(8, 2\)"):
        local_attention(**changed("cross", grid=(8, 2)))


def test_more_than_three_sets_go_through_the_reference():
    inputs = make_inputs("all")
    inputs["key_sets"] = [*inputs["key_sets"], inputs["key_sets"][2]]
    torch.testing.assert_close(local_attention(**inputs), dense_attention(**inputs)[0])
    with pytest.raises(ValueError, match=r"there are 4 key sets \(supported: up to 3\)"):
        local_attention(**inputs, backend="fused")


def test_meta_tensors_have_shapes():
    inputs = mapped(make_inputs("all", torch.bfloat16), lambda tensor: tensor.to("meta"), biases=True)
    output, logsumexp = local_attention(**inputs, return_logsumexp=True)
    assert output.is_meta and output.shape == inputs["query"].shape and output.dtype == torch.bfloat16
    assert logsumexp.is_meta and logsumexp.shape == (2, 2, 144) and logsumexp.dtype == torch.float32
    with pytest.raises(ValueError, match=r"the device is meta \(supported: cpu, cuda\)"):
        local_attention(**inputs, backend="fused")


def test_reference_compiles_without_graph_breaks():
    inputs = make_inputs("all", torch.float32)
    compiled = torch.compile(
        lambda **x: local_attention(**x, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**inputs), local_attention(**inputs, backend="reference"))


def test_fused_without_kernels_lists_every_reason(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    inputs = make_inputs("iterative")
    inputs = with_biases(inputs, lambda bias: bias.requires_grad_())
    with pytest.raises(
        ValueError, match=r"(?s)cannot run these inputs:.*kernels are not built.*a `bias` requires a grad"
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


def test_gradient_of_a_bias_comes_from_the_reference():
    inputs = with_biases(make_inputs("iterative"), lambda bias: bias.nan_to_num(neginf=0.0).double().requires_grad_())
    bias = inputs["key_sets"][1].bias
    (grad,) = torch.autograd.grad(local_attention(**inputs)[..., 0].sum(), bias)
    (expected,) = torch.autograd.grad(dense_attention(**inputs)[0][..., 0].sum(), bias)
    torch.testing.assert_close(grad, expected)


# --------------------------------------------------------------------------------------------------- the fused kernels


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
    sets = [{**keys, "grid": (6, 8)} if "grid" in keys else keys for keys in CASES[case][1]]
    inputs = make_inputs(((24, 24), sets), batch_size=1, num_heads=1)
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
    keys = KeySet(key, value, (7, 9), (5, 3))
    output = local_attention(query, keys, (7, 9), backend="fused")
    monkeypatch.undo()
    expected = local_attention(query, keys, (7, 9), backend="reference")
    torch.testing.assert_close(output, expected)


def operator_arguments(inputs):
    """A case as the operator takes it, for training."""
    sets = inputs["key_sets"]
    biases = [keys.bias for keys in sets if keys.bias is not None]
    geometry = native._Geometry.of(sets, inputs["query_grid"]).to_list()
    return inputs["query"], [each.key for each in sets], [each.value for each in sets], biases, geometry, 0.25, True


@needs_kernels
@pytest.mark.parametrize("case", ["direct", "iterative", "context"])
def test_fused_operator_passes_opcheck(case):
    inputs = mapped(make_inputs(case, torch.float32), lambda tensor: tensor.requires_grad_())
    torch.library.opcheck(native.local_attention_forward, operator_arguments(inputs))


@needs_kernels
def test_fused_compiles_without_graph_breaks_and_trains():
    inputs = make_inputs("all", torch.float32)
    compiled = torch.compile(lambda **x: run_with_gradients(x, "fused")["output"], backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), run_with_gradients(inputs, "fused")["output"])
    forward = torch.compile(lambda **x: local_attention(**x), fullgraph=True, backend="aot_eager")
    grads = []
    for function in (forward, local_attention):
        leaves = mapped(inputs, lambda tensor: tensor.clone().requires_grad_())
        function(**leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in tensors_of(leaves)])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_query_keys_and_values(backend):
    inputs = make_inputs("iterative", torch.float32)
    window, text = inputs["key_sets"]
    inputs["key_sets"] = [window.with_keys(window.key.bfloat16(), window.value), text]
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


@needs_kernels
def test_the_c_interface_refuses_descriptions_that_do_not_fit_together(monkeypatch):
    """One call that is right, and then each of its parts broken."""
    calls = []
    monkeypatch.setattr(native, "_launch", lambda problem, direction, device: calls.append((problem, direction)))
    leaves = mapped(make_inputs("direct", torch.float32), lambda tensor: tensor.requires_grad_())
    output = local_attention(**leaves, backend="fused")
    torch.autograd.grad(output.sum(), tensors_of(leaves))
    ratio = {"ratio_rows": 0, "ratio_columns": -1, "rows": 0, "columns": 2**30, "reach_rows": -1}
    for problem, direction in calls:
        run = getattr(native.library(), f"local_attention_cpu_{direction}")
        problem.threads = 1
        written = torch.empty(output.numel() * 8)
        for tensor in ("output", "grad_query", "grad_output"):
            getattr(problem, tensor).data = written.data_ptr()
        problem.logsumexp = problem.softmax = written.data_ptr()
        broken = [("abi", 1), ("threads", 0), ("rows", 0), ("head_dim", 129), ("batch", -1), ("tile_rows", 3)]
        for name, value in broken:
            kept = getattr(problem, name)
            setattr(problem, name, value)
            assert run(ctypes.byref(problem)) == 1, name
            setattr(problem, name, kept)
        for source in problem.source[:2]:
            for name, value in ratio.items():
                kept = getattr(source, name)
                setattr(source, name, value)
                assert run(ctypes.byref(problem)) == 1, name
                setattr(source, name, kept)
            kept, source.value.data = source.value.data, None
            assert run(ctypes.byref(problem)) == 1
            source.value.data = kept
        kept, problem.query.data = problem.query.data, None
        assert run(ctypes.byref(problem)) == 1
        problem.query.data = kept
        for source in problem.source:
            source.key.data = None
        assert run(ctypes.byref(problem)) == 1
        assert run(None) == 1


@needs_kernels
def test_a_batch_of_none_gives_nothing():
    inputs = mapped(make_inputs("direct", torch.float32, batch_size=0), lambda tensor: tensor.requires_grad_())
    output = local_attention(**inputs, backend="fused")
    assert output.shape == inputs["query"].shape
    assert all(grad.numel() == 0 for grad in torch.autograd.grad(output.sum(), tensors_of(inputs)))
