"""
How far bfloat16 drifts from the original's float32 numbers, with the bounds that docs/differences.md states.

The weights are random, so their logits spread as far as noise does: a released model, whose decisions are clearer,
drifts less in what it decides. A bound that is exceeded means that something is computed in too low a precision.
"""

import copy

import torch

from cogview_pipelines.models.cogview2 import sequences

from .conftest import cases, longs, stored
from .test_super_resolution import direct_context, direct_forward
from .test_text_to_image import forward, whole_sequence

# Both as shares of the standard deviation of the logits (measured: drift 0.015 to 0.017; no decision with a margin
# above 0.05 differs).
MAX_DRIFT = 0.03  # root mean square of the difference
CLEAR_MARGIN = 0.15


def drift(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs).square().mean().sqrt() / theirs.std()).item()


def assert_clear_decisions_agree(ours, argmax, margin, spread):
    clear = torch.from_numpy(margin) > CLEAR_MARGIN * spread
    assert clear.float().mean() > 0.5
    assert torch.equal(ours[clear], longs(argmax)[clear])


def test_text_to_image_drifts_little(coglm, arrays):
    data = arrays("coglm_t2i")
    model = copy.deepcopy(coglm).to(torch.bfloat16)
    logits = forward(model, whole_sequence(model, data), float(data["attn_plus"])).logits[0]
    theirs = torch.from_numpy(data["logits"])
    assert drift(stored(logits[longs(data["logit_positions"])], theirs), theirs) < MAX_DRIFT
    assert_clear_decisions_agree(logits.argmax(-1), data["argmax"], data["margin"], theirs.std())


def test_direct_super_resolution_drifts_little(direct_sr, arrays):
    data = arrays("dsr")
    model = copy.deepcopy(direct_sr).to(torch.bfloat16)
    case = cases(data, "_logits")[0]
    logits = direct_forward(model, direct_context(model, data, case)[:1])[0]
    theirs = torch.from_numpy(data[f"{case}_logits"])
    assert drift(stored(logits[longs(data[f"{case}_logit_positions"])], theirs), theirs) < MAX_DRIFT
    assert_clear_decisions_agree(logits.argmax(-1), data[f"{case}_argmax"][0], data[f"{case}_margin"][0], theirs.std())


def test_iterative_super_resolution_drifts_little(iterative_sr, arrays):
    data = arrays("itersr")
    model = copy.deepcopy(iterative_sr).to(torch.bfloat16)
    case = cases(data, "_logits_iter1")[0]
    context = sequences.iterative_super_resolution([data[f"{case}_text_ids"]], model.config.num_text_slots)
    context, canvas_ids = context.to(model.device), longs(data[f"{case}_inputs"][:1]).to(model.device)
    with torch.no_grad():
        logits = model(canvas_ids, context).logits[0].cpu()
    theirs = torch.from_numpy(data[f"{case}_logits_iter1"])
    assert drift(stored(logits[longs(data[f"{case}_logit_positions"])], theirs), theirs) < MAX_DRIFT
    margin = data[f"{case}_margin"][0].astype("float32")
    assert_clear_decisions_agree(logits.argmax(-1), data[f"{case}_argmax"][0], margin, theirs.std())
