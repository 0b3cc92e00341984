"""Local attention against the original kernels: outputs, scores, gradients."""

import numpy as np
import pytest
import torch

from cogview_pipelines.ops.key_set import KeySet
from cogview_pipelines.ops.local_attention import local_attention
from cogview_pipelines.ops.native import fused_refusals

from .conftest import assert_close, assert_thinned

TOLERANCE = 1e-5


@pytest.fixture(params=["reference", "fused"])
def backend(request, device):
    """Plain PyTorch, and the compiled kernels where they are built."""
    if request.param == "fused" and (reasons := fused_refusals(torch.zeros(1, 1, 1, 8, device=device))):
        pytest.skip("; ".join(reasons))
    return request.param


def heads_last(array: np.ndarray) -> torch.Tensor:
    """`(batch_size, channels, rows, columns)` as one head: `(batch_size, cells, 1, channels)`."""
    return torch.from_numpy(array).flatten(2).transpose(1, 2)[:, :, None]


def channels_first(tensor: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tensor[:, :, 0].transpose(1, 2).unflatten(-1, grid)


def case_names(arrays):
    data = arrays("local_attention")
    return [(str(name), data["params"][index].tolist()) for index, name in enumerate(data["cases"])]


def attend(query, key, value, params, **kwargs):
    """Our function on a case of the original: the queries come scaled already."""
    _, _, _, height, width, key_height, key_width, kernel_height, kernel_width, causal = params
    grid, key_grid, kernel = (height, width), (key_height, key_width), (kernel_height, kernel_width)
    keys = KeySet(key, value, key_grid, kernel, bool(causal))
    return local_attention(query, keys, grid, scale=1.0, **kwargs)


def run(data, name, params, device, **kwargs):
    """Inputs (leaves, so that they get gradients) and what our function makes of them."""
    leaves = [heads_last(data[f"{name}_{part}"]).to(device).requires_grad_() for part in "qkv"]
    repeats = leaves[0].shape[0] // leaves[1].shape[0]  # each key of a smaller batch serves neighbouring queries
    key, value = (leaf.repeat_interleave(repeats, 0) for leaf in leaves[1:])
    return leaves, attend(leaves[0], key, value, params, **kwargs)


def odd_cases(arrays):
    return [(name, params) for name, params in case_names(arrays) if params[7] % 2 and params[8] % 2]


def test_outputs_are_the_originals(arrays, device, backend):
    data = arrays("local_attention")
    for name, params in odd_cases(arrays):
        _, output = run(data, name, params, device, backend=backend)
        assert_thinned(channels_first(output, params[3:5]), data, f"{name}_out", TOLERANCE)


def logsumexp_of(data, name):
    """Of the scores of each query. A set holds it, or the scores."""
    if f"{name}_logsumexp" in data:
        return data[f"{name}_logsumexp"]
    return torch.from_numpy(data[f"{name}_scores"]).logsumexp(-1).numpy()


def test_scores_are_the_originals(arrays, device, backend):
    data = arrays("local_attention")
    for name, params in odd_cases(arrays):
        _, (_, logsumexp) = run(data, name, params, device, return_logsumexp=True, backend=backend)
        ours = logsumexp[:, 0].unflatten(-1, params[3:5])
        if f"{name}_score_rows" in data:
            ours = ours[:, torch.from_numpy(data[f"{name}_score_rows"]).long()]
        assert_close(ours, logsumexp_of(data, name), TOLERANCE, name)


def test_gradients_are_the_originals(arrays, device, backend):
    data = arrays("local_attention")
    tested = 0
    for name, params in odd_cases(arrays):
        if f"{name}_grad_out" not in data:
            continue
        leaves, output = run(data, name, params, device, backend=backend)
        output.backward(heads_last(data[f"{name}_grad_out"]).to(device))
        for part, leaf in zip("qkv", leaves):
            grid = params[3:5] if part == "q" else params[5:7]
            assert_close(channels_first(leaf.grad, grid), data[f"{name}_grad_{part}"], TOLERANCE, f"{name} {part}")
        tested += 1
    assert tested


def test_double_precision_is_the_naive_computation(arrays, device, backend):
    if backend == "fused" and (reasons := fused_refusals(torch.zeros(1, 1, 1, 8, device=device, dtype=torch.double))):
        pytest.skip("; ".join(reasons))
    data = arrays("local_attention")
    tested = 0
    for name, params in odd_cases(arrays):
        if f"{name}_out_f64" not in data:
            continue
        leaves = [heads_last(data[f"{name}_{part}"]).to(device).double() for part in "qkv"]
        output = attend(*leaves, params, backend=backend)
        assert_close(channels_first(output, params[3:5]), data[f"{name}_out_f64"], 1e-9, name)
        tested += 1
    assert tested


def test_even_windows_are_refused_with_a_reason(arrays, device):
    data = arrays("local_attention")
    for name, params in case_names(arrays):
        if params[7] % 2 == 0 or params[8] % 2 == 0:
            with pytest.raises(ValueError, match="odd"):
                run(data, name, params, device)
