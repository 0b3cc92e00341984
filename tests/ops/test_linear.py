"""Linear layers with what stands around them in one kernel: PyTorch's numbers, row by row, for plain modules only."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cogview_pipelines.models import layers
from cogview_pipelines.models.cogview2.modeling_coglm_canvas import CogLMContext
from cogview_pipelines.ops import linear as module
from cogview_pipelines.ops import native
from cogview_pipelines.ops.int8_linear import set_int8
from cogview_pipelines.ops.linear import LEAST_ROWS, MOST_WEIGHTS, fused_linear, fuses, linear_op

from ..utils import make_coglm

pytestmark = pytest.mark.skipif(module.kernel() is None, reason="the kernels are not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 7, 3), (6, 33, 40), (13, 64, 17), (50, 20, 70), (101, 256, 33), (70, 40, 130)]
needs_vectors = pytest.mark.skipif(
    native.build_info().get("cpu_instruction_set") == "baseline", reason="PyTorch is as fast on this processor"
)


def make_parts(inputs, outputs, dtype=torch.float32):
    source = torch.Generator().manual_seed(inputs + outputs)
    parts = nn.ModuleDict(
        {"layer": nn.Linear(inputs, outputs), "input_norm": nn.LayerNorm(inputs), "output_norm": nn.LayerNorm(outputs)}
    )
    for parameter in parts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source)
    return parts.to(dtype).requires_grad_(False)


def make_rows(rows, inputs, dtype=torch.float32):
    return (3 + 2 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))).to(dtype)


def operation_by_operation(values, layer, input_norm=None, gelu=False, output_norm=None, residual=None):
    """What the kernel is to compute."""
    values = layer(values if input_norm is None else input_norm(values))
    values = F.gelu(values, approximate="tanh") if gelu else values
    values = values if output_norm is None else output_norm(values)
    return values if residual is None else residual + values


def arguments_of(parts, gelu, norms, residual):
    kept = {name: parts[name] for name in ("input_norm", "output_norm") if norms}
    return {**kept, "gelu": gelu, "residual": residual}


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("isa", range(1, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_as_accurate_as_those_of_pytorch_on_every_instruction_set(rows, inputs, outputs, isa, dtype):
    names = native.build_info()["cpu_instruction_sets"]
    if isa > len(names) or isa - 1 > names.index(native.build_info()["cpu_instruction_set"]):
        pytest.skip("not compiled in, or not of this processor")
    values, parts, residual = make_rows(rows, inputs, dtype), make_parts(inputs, outputs, dtype), None
    for gelu, norms, adds in ((False, False, False), (True, True, False), (False, True, True), (True, False, True)):
        residual = make_rows(rows, outputs, dtype) if adds else None
        norm = [[[], 0.0], [[], 0.0]]
        if norms:
            norm = [[[each.weight, each.bias], each.eps] for each in (parts["input_norm"], parts["output_norm"])]
        layer = parts["layer"]
        result = linear_op(values, layer.weight, None, layer.bias, *norm[0], *norm[1], residual, gelu, isa)
        given = arguments_of(parts, gelu, norms, residual)
        theirs = operation_by_operation(values, layer, **given).double()
        added = None if residual is None else residual.double()
        parts.double()
        exact = operation_by_operation(values.double(), parts["layer"], **arguments_of(parts, gelu, norms, added))
        parts.to(dtype)
        allowed = 2 * (theirs - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert result.dtype == dtype and (result.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_depends_neither_on_others_nor_on_threads(monkeypatch, int8):
    values, residual, parts = make_rows(101, 72), make_rows(101, 40), make_parts(72, 40)
    set_int8(parts, int8)
    given = {name: parts[name] for name in ("input_norm", "output_norm")}
    together = fused_linear(values, parts["layer"], gelu=True, residual=residual, **given)
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(fused_linear(values, parts["layer"], gelu=True, residual=residual, **given), together)
    alone = fused_linear(values[37:38], parts["layer"], gelu=True, residual=residual[37:38], **given)
    assert torch.equal(alone, together[37:38])


def test_whole_numbers_have_norms_and_residuals_too():
    values, residual, parts = make_rows(70, 256), make_rows(70, 48), make_parts(256, 48)
    given = {**arguments_of(parts, True, True, residual)}
    expected = operation_by_operation(values, parts["layer"], **given)
    set_int8(parts, True)
    result = fused_linear(values[None], parts["layer"], **given)
    assert result.shape == (1, 70, 48)
    assert (result[0] - expected).norm() <= 0.02 * (expected - residual).norm()


def test_what_is_no_number_stays_in_its_row():
    values, parts = make_rows(9, 20), make_parts(20, 33)
    values[1, 3], values[2, 19] = float("nan"), float("inf")
    result = fused_linear(values, parts["layer"], input_norm=parts["input_norm"], output_norm=parts["output_norm"])
    assert result[1:3].isnan().all() and result[3:].isfinite().all() and result[0].isfinite().all()


@needs_vectors
def test_plain_modules_without_gradients_are_fused():
    values, parts = make_rows(LEAST_ROWS, 64), make_parts(64, 32)
    assert not fuses(values, parts["layer"], parts["input_norm"])  # gradients may be wanted
    with torch.no_grad():
        assert fuses(values, parts["layer"], parts["input_norm"])
        assert fuses(values.view(2, -1, 64), parts["layer"])
        assert not fuses(values[1:], parts["layer"])  # too few
        assert not fuses(values.double(), parts.double()["layer"])
        parts.float()
        assert not fuses(values.bfloat16(), parts["layer"])  # of two dtypes
        with torch.autocast("cpu"):
            assert not fuses(values, parts["layer"])
        assert not fuses(values, nn.LayerNorm(64, bias=False))
        assert not fuses(values, nn.Linear(64, MOST_WEIGHTS // 64 + 1))
        assert not fuses(values, parts["layer"].to("meta"))


def test_graphs_that_are_traced_hold_operations_that_others_know():
    values, parts = make_rows(LEAST_ROWS, 64), make_parts(64, 32)

    class Traced(nn.Module):
        def forward(self, values):
            return fused_linear(values, parts["layer"]) if fuses(values, parts["layer"]) else parts["layer"](values)

    with torch.no_grad():
        graph = str(torch.jit.trace(Traced(), values, check_trace=False).inlined_graph)
    assert "aten::linear" in graph and "cogview_pipelines" not in graph


@needs_vectors
def test_modules_that_are_watched_moved_or_changed_are_left_alone(monkeypatch):
    class Adapted(nn.Linear):
        pass

    class Around(nn.Module):  # as PEFT puts its layers: the weight is that of the layer inside
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(64, 32)

        weight = property(lambda self: self.base_layer.weight)
        bias = property(lambda self: self.base_layer.bias)

    values = make_rows(LEAST_ROWS, 64)
    with torch.no_grad():
        assert not fuses(values, Adapted(64, 32)) and not fuses(values, Around())
        watched, container = make_parts(64, 32), nn.Sequential()
        watched["layer"].register_forward_hook(lambda *_: None)
        assert not fuses(values, watched["layer"])
        plain = make_parts(64, 32)["layer"]
        assert fuses(values, plain, inside=[container])
        container.register_forward_pre_hook(lambda *_: None)
        assert not fuses(values, plain, inside=[container])
        moved = make_parts(64, 32)["layer"]
        moved.forward = lambda values: values
        assert not fuses(values, moved)
        monkeypatch.setattr(module, "kernel", lambda: None)
        assert not fuses(values, make_parts(64, 32)["layer"])


@needs_vectors
@pytest.mark.parametrize("stage", ["direct", "iterative"])
def test_a_canvas_has_the_same_states_with_and_without_the_kernel(monkeypatch, stage):
    model = make_coglm(stage, seed=3).eval()
    rows, columns = model.config.fine_grid
    canvas = torch.full((2, rows * columns), model.config.boi_token_id)
    num_slots = model.config.num_text_slots + (model.config.layout.image_length if stage == "direct" else 0)
    source = torch.Generator().manual_seed(0)
    shape = (
        2,
        num_slots,
        model.config.num_attention_heads,
        model.config.hidden_size // model.config.num_attention_heads,
    )
    parts = [[torch.randn(shape, generator=source) for _ in model.layers] for _ in range(2)]
    context = CogLMContext(*parts, torch.ones(2, num_slots, dtype=torch.bool))
    calls = []
    monkeypatch.setattr(
        layers, "fused_linear", lambda *given, **named: (calls.append(1), fused_linear(*given, **named))[1]
    )
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    with torch.no_grad():
        fused = model(canvas, context).logits
        assert len(calls) == 4 * len(model.layers)
        monkeypatch.setattr(layers, "fuses", lambda *_, **__: False)
        torch.testing.assert_close(fused, model(canvas, context).logits, rtol=1e-4, atol=1e-4)


def test_the_operator_is_registered_as_pytorch_wants_it():
    values, layer = make_rows(7, 20), make_parts(20, 9)["layer"]
    norm = make_parts(20, 9)["input_norm"]
    given = (values, layer.weight, None, layer.bias, [norm.weight, norm.bias], 1e-5, [], 0.0, None, True, 0)
    torch.library.opcheck(torch.ops.cogview_pipelines.linear.default, given)
