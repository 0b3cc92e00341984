"""Three-region sparse attention: every backend against a definition written out, gradients, pivots, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines.ops.three_region_attention import (
    BACKENDS,
    attend_to_keys,
    draw_inference_keys,
    draw_pivots,
    three_region_attention,
)

CASES = [  # batch, length, window, windows, pivots, text
    (2, 32, 4, 2, 6, 3),
    (2, 30, 4, 3, 10, 2),  # the last block is short
    (1, 16, 8, 4, 5, 1),  # the window is longer than the sequence
    (3, 24, 1, 1, 4, 0),  # windows of one position; no text
    (2, 20, 4, 2, 20, 5),  # all positions are pivots
]


def make_inputs(case, dtype=torch.float64):
    batch_size, length, _, _, num_pivots, num_text = case
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(batch_size, length, 3, 2, 8, generator=generator).to(dtype)
    is_text = torch.zeros(batch_size, length, dtype=torch.bool)
    for row in range(batch_size):  # texts of several lengths, so that rows see different numbers of pivots
        is_text[row, : max(0, num_text - row)] = True
    return fused.unbind(2), draw_pivots(is_text, num_pivots, generator=generator)


def definition(query, key, value, pivots, window_size, num_windows):
    """One query and one sequence at a time, with lists of keys."""
    output = torch.zeros_like(query)
    length, bonus = query.shape[1], math.log(max(1, query.shape[1] // pivots.shape[1]))
    for row in range(len(query)):
        for position in range(length):
            block = position // window_size
            window = [k for k in range(position + 1) if k // window_size > block - num_windows]
            seen = [k for k in pivots[row].tolist() if k // window_size <= block - num_windows]
            scores = key[row, window + seen].transpose(0, 1) @ query[row, position][..., None]
            scores = scores[..., 0] / query.shape[-1] ** 0.5
            scores[:, len(window) :] += bonus
            weights = scores.softmax(-1)
            output[row, position] = (weights[..., None] * value[row, window + seen].transpose(0, 1)).sum(1)
    return output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_every_backend_is_the_definition(case, backend):
    inputs, pivots = make_inputs(case)
    options = {"window_size": case[2], "num_windows": case[3]}
    ours = three_region_attention(*inputs, pivots, **options, backend=backend)
    assert torch.allclose(ours, definition(*inputs, pivots, *options.values()), atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_backend_are_those_of_the_definition(case, backend):
    inputs, pivots = make_inputs(case)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = []
    for function in (
        lambda *leaves: three_region_attention(
            *leaves, pivots, window_size=case[2], num_windows=case[3], backend=backend
        ),
        lambda *leaves: definition(*leaves, pivots, case[2], case[3]),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        function(*leaves).backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_backends_are_as_accurate_as_the_reference(dtype):
    case = CASES[0]
    exact, pivots = make_inputs(case)
    inputs = [tensor.to(dtype) for tensor in exact]
    options = {"window_size": case[2], "num_windows": case[3]}
    wanted = three_region_attention(*exact, pivots, **options, backend="reference")
    plain = three_region_attention(*inputs, pivots, **options, backend="reference")
    for backend in ("blocked", "merged"):
        fast = three_region_attention(*inputs, pivots, **options, backend=backend)
        assert fast.dtype == dtype
        assert (fast - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-5


def test_a_window_over_the_whole_sequence_is_causal_attention():
    inputs, pivots = make_inputs((2, 24, 8, 3, 6, 2))
    causal = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in inputs), is_causal=True)
    for backend in BACKENDS:
        ours = three_region_attention(*inputs, pivots, window_size=8, num_windows=3, backend=backend)
        assert torch.allclose(ours, causal.transpose(1, 2))


def test_one_sequence_alone_is_the_same_as_in_a_batch():
    inputs, pivots = make_inputs(CASES[0])
    together = three_region_attention(*inputs, pivots, window_size=4, num_windows=2)
    alone = three_region_attention(*(tensor[1:] for tensor in inputs), pivots[1:], window_size=4, num_windows=2)
    assert torch.allclose(together[1:], alone)


def test_the_order_of_pivots_means_nothing():
    inputs, pivots = make_inputs(CASES[0])
    options = {"window_size": 4, "num_windows": 2}
    first = three_region_attention(*inputs, pivots, **options)
    assert torch.allclose(first, three_region_attention(*inputs, pivots.flip(1), **options))


def test_dropout_drops_and_keeps_the_mean():
    inputs, pivots = make_inputs(CASES[0], torch.float32)
    options = {"window_size": 4, "num_windows": 2}
    whole = three_region_attention(*inputs, pivots, **options)
    for backend in ("reference", "blocked"):
        draws = [three_region_attention(*inputs, pivots, **options, dropout=0.3, backend=backend) for _ in range(100)]
        assert not torch.allclose(draws[0], draws[1])
        assert (torch.stack(draws).mean(0) - whole).abs().mean() < 0.15


# Pivots --------------------------------------------------------------------------------------------------------------


def test_pivots_are_all_text_then_different_other_positions():
    is_text = torch.zeros(2, 50, dtype=torch.bool)
    is_text[0, [0, 1, 2, 40]] = True
    is_text[1, 3] = True
    pivots = draw_pivots(is_text, 20)
    assert pivots[0, :4].tolist() == [0, 1, 2, 40] and pivots[1, 0] == 3
    assert all(len(set(row.tolist())) == 20 for row in pivots)


def test_pivots_are_drawn_evenly_and_follow_their_generator():
    is_text = torch.zeros(1, 12, dtype=torch.bool)
    is_text[0, 0] = True
    counts = torch.zeros(12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        counts[draw_pivots(is_text, 4, generator=generator)[0]] += 1
    assert counts[0] == 3000
    assert (counts[1:] / 3000 - 3 / 11).abs().max() < 0.04
    draws = [draw_pivots(is_text, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_padding_comes_in_last():
    is_real = torch.ones(1, 10, dtype=torch.bool)
    is_real[0, 6:] = False
    assert set(draw_pivots(torch.zeros_like(is_real), 6, is_real)[0].tolist()) == set(range(6))


# Generation ----------------------------------------------------------------------------------------------------------


def test_keys_of_generation_are_text_and_drawn_positions_and_the_window():
    is_text = torch.zeros(2, 50, dtype=torch.bool)
    is_text[0, :5], is_text[1, :2] = True, True
    options = {"window_size": 4, "num_windows": 3, "num_pivots": 20, "max_length": 100}
    keys = draw_inference_keys(is_text, **options)
    assert keys.shape == (2, 5 + (38 - 5) * 20 // 100 + 12)
    assert keys[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert keys[:, -12:].tolist() == [list(range(38, 50))] * 2
    assert all(len(set(row.tolist())) == len(row) for row in keys)
    assert draw_inference_keys(is_text[:, :12], **options).tolist() == [list(range(12))] * 2
    assert draw_inference_keys(~is_text[:, :13] & is_text[:, :13], **options).shape == (2, 12)


def test_new_tokens_see_the_chosen_keys_and_themselves_causally():
    (query, key, value), _ = make_inputs((1, 12, 1, 1, 1, 0))
    positions = torch.tensor([[0, 4, 9, 10, 11]])
    new = attend_to_keys(query[:, -2:], key, value, positions)
    for row, seen in ((0, [0, 4, 9, 10]), (1, [0, 4, 9, 10, 11])):
        heads = [part.transpose(1, 2) for part in (query[:, 10 + row : 11 + row], key[:, seen], value[:, seen])]
        assert torch.allclose(new[:, row : row + 1], F.scaled_dot_product_attention(*heads).transpose(1, 2))


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    inputs, pivots = make_inputs(CASES[0])
    with pytest.raises(ValueError, match=r"`backend` must be one of .* but is 'fused'"):
        three_region_attention(*inputs, pivots, backend="fused")
    with pytest.raises(ValueError, match=r"(?s)cannot run these inputs:\n    `dropout` is 0.1, not 0\nLeave"):
        three_region_attention(*inputs, pivots, dropout=0.1, backend="merged")
    with pytest.raises(ValueError, match=r"`pivots` must have the shape \(2, num_pivots\), but has \(1, 6\)"):
        three_region_attention(*inputs, pivots[:1])
    with pytest.raises(ValueError, match="must have one shape"):
        three_region_attention(inputs[0], inputs[1][:, :5], inputs[2], pivots)
    with pytest.raises(ValueError, match="`num_windows` must be at least 1, but is 0"):
        three_region_attention(*inputs, pivots, num_windows=0)
    is_text = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="`num_pivots` must be at least 8, the longest text here, but is 4"):
        draw_pivots(is_text, 4)
    with pytest.raises(ValueError, match=r"`num_pivots` must be in 1\.\.8 \(the length\), but is 9"):
        draw_pivots(is_text, 9)
    with pytest.raises(ValueError, match="`query` may have 2 tokens, as many as `positions`, but has 3"):
        attend_to_keys(inputs[0][:, :3], *inputs[1:], torch.zeros(2, 2, dtype=torch.long))
