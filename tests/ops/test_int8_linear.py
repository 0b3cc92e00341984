"""Linear layers of whole numbers: exact sums of what the inputs are rounded to, whatever computes them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cogview_pipelines.ops import int8_linear as module
from cogview_pipelines.ops import native
from cogview_pipelines.ops.int8_linear import Int8Linear, PackedWeight, int8_linear, quantize_rows, set_int8

SHAPES = [(1, 1, 1), (1, 8, 16), (5, 7, 3), (6, 33, 40), (13, 64, 17), (50, 20, 70), (101, 256, 33)]


def make_layer(rows, inputs, outputs, dtype=torch.float32):
    source = torch.Generator().manual_seed(rows + inputs)
    numbers = [torch.randn(*shape, generator=source) for shape in ((rows, inputs), (outputs, inputs), (outputs,))]
    return [tensor.to(dtype) for tensor in numbers]


def exact(values, weight, bias):
    """By the definition: rounded numbers, multiplied exactly."""
    whole, scales = quantize_rows(values)
    whole_weight, weight_scales = quantize_rows(weight)
    sums = whole.double() @ whole_weight.double().T
    return (sums * scales.double() * weight_scales.double().T + bias.double()).float()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("isa", range(1, 4))
def test_sums_are_those_of_the_rounded_numbers_on_every_instruction_set(rows, inputs, outputs, isa):
    names = native.build_info()["cpu_instruction_sets"]
    if isa > len(names) or isa - 1 > names.index(native.build_info()["cpu_instruction_set"]):
        pytest.skip("not compiled in, or not of this processor")
    values, weight, bias = make_layer(rows, inputs, outputs)
    whole = torch.randint(-127, 128, values.shape, generator=torch.Generator().manual_seed(1)).float()
    whole[:, 0] = 127  # so that the scale is 1, and nothing can be rounded in another way
    result = int8_linear(whole, PackedWeight(weight), bias, isa=isa)
    torch.testing.assert_close(result, exact(whole, weight, bias), rtol=1e-6, atol=1e-5)
    result = int8_linear(values, PackedWeight(weight), bias, isa=isa)
    # a number halfway between two may be rounded to either
    step = values.abs().amax() / 127 * weight.abs().amax()
    assert (result - exact(values, weight, bias)).abs().max() <= 1.01 * step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_results_are_close_to_those_of_the_numbers_themselves(dtype, gelu):
    values, weight, bias = make_layer(70, 256, 48, dtype)
    result = int8_linear(values[None], PackedWeight(weight), bias, gelu=gelu)
    expected = F.linear(values.float(), weight.float(), bias.float())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    assert result.dtype == dtype and result.shape == (1, 70, 48)
    assert (result[0].float() - expected).norm() <= 0.02 * expected.norm()


def test_a_row_does_not_depend_on_others_nor_on_threads(monkeypatch):
    values, weight, bias = make_layer(101, 64, 40)
    packed = PackedWeight(weight)
    together = int8_linear(values, packed, bias)
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(int8_linear(values, packed, bias), together)
    assert torch.equal(int8_linear(values[37:38], packed, bias), together[37:38])


def test_largest_numbers_do_not_overflow():
    values, weight = torch.full((7, 4096), -3.0), torch.full((5, 4096), 2.0)
    result = int8_linear(values, PackedWeight(weight))
    torch.testing.assert_close(result, torch.full((7, 5), -6.0 * 4096))


def test_what_is_no_number_is_passed_on_and_zeros_stay():
    values, weight, _ = make_layer(4, 20, 8)
    values[0], values[1, 3], values[2, 19] = 0, float("nan"), float("inf")
    result = int8_linear(values, PackedWeight(weight))
    assert (result[0] == 0).all() and result[1:3].isnan().all() and result[3].isfinite().all()


def test_without_a_kernel_the_same_is_computed(monkeypatch):
    values, weight, bias = make_layer(9, 33, 20)
    expected = int8_linear(values, PackedWeight(weight), bias, gelu=True)
    monkeypatch.setattr(module, "_kernel", lambda: None)
    result = int8_linear(values, PackedWeight(weight), bias, gelu=True)
    assert (result - expected).abs().max() <= 0.05


def test_a_layer_is_changed_and_changed_back_with_its_weights():
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    before, values = copy.deepcopy(model.state_dict()), torch.randn(6, 64)
    with torch.no_grad():
        plain = model(values)
        set_int8(model, True)
        rounded = model(values)
        model.load_state_dict(before)
        assert type(model[0]) is Int8Linear and torch.equal(model(values), rounded)
        assert not torch.equal(rounded, plain)
        set_int8(model, False)
        assert type(model[0]) is nn.Linear and torch.equal(model(values), plain)


def test_new_weights_are_read():
    layer, values = nn.Linear(16, 8), torch.randn(3, 16)
    set_int8(layer, True)
    with torch.no_grad():
        first, packed = layer(values), layer.packed_weight()
        assert layer.packed_weight() is packed
        layer.weight.mul_(-1)
        layer.bias.mul_(-1)
        torch.testing.assert_close(layer(values), -first)
    assert layer.packed_weight() is not packed  # also where there are no kernels that read them


def test_gradients_and_other_dtypes_go_through_the_weights_themselves():
    layer, values = nn.Linear(16, 8), torch.randn(3, 16)
    expected = layer(values)
    set_int8(layer, True)
    assert torch.equal(layer(values), expected)
    layer(values).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(layer.double()(values.double()), F.linear(values.double(), layer.weight, layer.bias))
