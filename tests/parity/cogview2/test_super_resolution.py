"""Direct and iterative super-resolution against the original: inputs, logits, decisions of every pass."""

import numpy as np
import pytest
import torch

from cogview_pipelines import LoPARScheduler
from cogview_pipelines.generation.canvas import refine
from cogview_pipelines.models.cogview2 import sequences
from cogview_pipelines.ops.local_attention import window_mask

from .conftest import (
    LOGITS_TOLERANCE,
    assert_close,
    assert_logits,
    assert_same,
    assert_same_decisions,
    bools,
    cases,
    longs,
    run,
    stored,
)


def direct_context(model, data, case):
    image = longs(data[f"{case}_image_ids"])
    texts = [data[f"{case}_text_ids"]] * len(image)
    return sequences.direct_super_resolution(texts, image, model.config.num_text_slots, model.config.layout)


def direct_forward(model, context, logits_positions=None):
    canvas = torch.full((len(context), model.config.canvas_length), model.config.boi_token_id)
    with torch.no_grad():
        context = context.to(model.device)
        return run(model, canvas, context, logits_positions=logits_positions).logits


def test_direct_input_is_the_originals(direct_sr, arrays):
    data, config = arrays("dsr"), direct_sr.config
    for case in cases(data, "_seq"):
        context = direct_context(direct_sr, data, case)
        length = context.input_ids.shape[1]
        assert_same(context.input_ids, data[f"{case}_seq"][:, :length], "ids")
        assert_same(context.position_ids[0], data[f"{case}_position_ids"][:length], "positions")
        assert (data[f"{case}_seq"][:, length:] == config.boi_token_id).all()
        fine = data[f"{case}_position_ids"][length:] - config.max_position_embeddings
        assert_same(torch.arange(config.canvas_length), fine, "canvas positions")
        for mask in context.attention_mask:
            assert_same(mask, bools(data[f"{case}_attention_mask"]), "mask")


def test_direct_logits_and_decisions_are_the_originals(direct_sr, arrays):
    data = arrays("dsr")
    for case in cases(data, "_seq"):
        logits = direct_forward(direct_sr, direct_context(direct_sr, data, case))
        assert_close(logits.logsumexp(-1), data[f"{case}_logsumexp"], what=f"{case} logsumexp")
        assert_same_decisions(logits.argmax(-1), data[f"{case}_argmax"], data[f"{case}_margin"], case)
        if f"{case}_logits" in data:
            positions = longs(data[f"{case}_logit_positions"])
            assert_logits(logits[0, positions], data[f"{case}_logits"], what=f"{case} logits")


def test_direct_refinement_draws_every_cell_from_one_pass(direct_sr, direct_sr_scheduler, arrays):
    data = arrays("dsr")
    case = cases(data, "_logits")[0]
    context = direct_context(direct_sr, data, case)[:1]
    greedy = LoPARScheduler.from_config(direct_sr_scheduler.config, top_k=1, cluster_temperature=None)
    tokens = refine(direct_sr, greedy, context)
    assert_same_decisions(tokens.flatten(1), data[f"{case}_argmax"][:1], data[f"{case}_margin"][:1])


def test_windows_are_nine_rows_by_five_columns_and_five_by_five(direct_sr, iterative_sr):
    for config in (direct_sr.config, iterative_sr.config):
        middle = window_mask(config.fine_grid, config.fine_grid, config.kernel_size)
        middle = middle.view(*config.fine_grid, *config.fine_grid)[30, 30]
        assert (middle.any(1).sum(), middle.any(0).sum()) == (9, 5)
    assert direct_sr.config.cross_kernel_size == (5, 5)


def iterative_context(model, data, case):
    return sequences.iterative_super_resolution([data[f"{case}_text_ids"]], model.config.num_text_slots)


def cell_mask(data, case):
    everywhere = np.ones(data[f"{case}_masks"].shape[1])
    return bools(data.get(f"{case}_input_mask", everywhere))


def test_iterative_input_is_the_originals(iterative_sr, arrays):
    data, config = arrays("itersr"), iterative_sr.config
    for case in cases(data, "_seq_iter1"):
        context = iterative_context(iterative_sr, data, case)
        slots = config.num_text_slots
        assert_same(context.input_ids[0], data[f"{case}_seq_iter1"][0, :slots], "ids")
        assert_same(context.position_ids[0], data[f"{case}_position_ids"][:slots], "positions")
        assert_same(context.key_mask, bools(data[f"{case}_attention_mask"]), "text keys")
        assert_same(context.attention_mask[0], bools(data[f"{case}_attention_mask"]).expand(slots, -1), "mask")
        fine = data[f"{case}_position_ids"][slots:] - config.max_position_embeddings
        assert_same(torch.arange(config.canvas_length), fine, "canvas positions")


def test_schedule_is_the_originals(iterative_sr, iterative_sr_scheduler, arrays):
    data, scheduler = arrays("itersr"), iterative_sr_scheduler
    rows, columns = iterative_sr.config.fine_grid
    matrix = longs(data["matrix"])
    tiled = matrix.repeat(rows // matrix.shape[0], columns // matrix.shape[1])
    assert_same(scheduler.step_map(rows, columns).clamp(min=0), tiled.clamp(min=0), "schedule")
    for case in cases(data, "_masks"):
        assert len(scheduler.timesteps) == len(data[f"{case}_masks"])
        assert [scheduler.config.top_k[step] for step in range(len(scheduler.timesteps))] == data[
            f"{case}_topk_asked"
        ].tolist()
        for step in scheduler.timesteps.tolist():
            masked = scheduler.masked_positions(step, rows, columns).flatten() & cell_mask(data, case)
            assert_same(masked, bools(data[f"{case}_masks"][step - 1]), f"cells masked in pass {step}")
            before = data[f"{case}_image_ids"][0] if step == 1 else data[f"{case}_tokens"][step - 2]
            seen = longs(before).masked_fill(masked, iterative_sr.config.boi_token_id)
            assert_same(seen, data[f"{case}_inputs"][step - 1], f"input of pass {step}")


def test_every_pass_takes_the_original_decisions(iterative_sr, arrays):
    data = arrays("itersr")
    for case in cases(data, "_inputs"):
        sequence = iterative_context(iterative_sr, data, case).to(iterative_sr.device)
        with torch.no_grad():
            context = iterative_sr.encode_context(sequence)
            for step, canvas in enumerate(data[f"{case}_inputs"]):
                canvas_ids = longs(canvas)[None].to(iterative_sr.device)
                logits = iterative_sr(canvas_ids, context).logits[0].cpu()
                assert_same_decisions(
                    logits.argmax(-1), data[f"{case}_argmax"][step], data[f"{case}_margin"][step], f"{case} {step}"
                )
                if step == 0:
                    assert_close(logits.logsumexp(-1), data[f"{case}_logsumexp_iter1"], what=f"{case} logsumexp")
                    if f"{case}_logits_iter1" in data:
                        positions = longs(data[f"{case}_logit_positions"])
                        assert_logits(logits[positions], data[f"{case}_logits_iter1"], what=f"{case} logits")


def test_refinement_ends_with_the_original_tokens(iterative_sr, iterative_sr_scheduler, arrays):
    data = arrays("itersr")
    greedy = LoPARScheduler.from_config(iterative_sr_scheduler.config, top_k=1)
    grid = iterative_sr.config.fine_grid
    for case in cases(data, "_tokens"):
        passes = []
        tokens = refine(
            iterative_sr,
            greedy,
            iterative_context(iterative_sr, data, case),
            longs(data[f"{case}_image_ids"]).view(1, *grid),
            cell_mask=cell_mask(data, case).view(grid),
            callback=lambda step, canvas, passes=passes: passes.append(canvas.flatten().cpu()),
        )
        tokens = tokens.flatten().cpu()
        # the smallest margins of the loop are not above float32 noise: a token or two may legitimately differ
        assert (tokens != longs(data[f"{case}_tokens"][-1])).sum() <= 2
        assert_same(tokens, passes[-1])
        for step, canvas in enumerate(passes, start=1):
            final = iterative_sr_scheduler.step_map(*grid).flatten() <= step
            assert (canvas != longs(data[f"{case}_tokens"][step - 1]))[final].sum() <= 2, f"pass {step}"


def test_untouched_cells_keep_their_tokens(iterative_sr, iterative_sr_scheduler, arrays):
    data = arrays("itersr")
    for case in cases(data, "_tokens"):
        untouched = ~bools(data[f"{case}_masks"]).any(0)
        assert untouched.any()
        kept = longs(data[f"{case}_tokens"][-1])[untouched]
        assert_same(longs(data[f"{case}_image_ids"][0])[untouched], kept)
        drawn = iterative_sr_scheduler.step_map(*iterative_sr.config.fine_grid).flatten() >= 1
        assert_same(~drawn | ~cell_mask(data, case), untouched)


@pytest.mark.parametrize("change", ["window", "mask"])
def test_transposed_windows_and_a_full_mask_make_a_difference(direct_sr, arrays, change):
    data = arrays("dsr")
    case = cases(data, "_logits")[0]
    context, positions = direct_context(direct_sr, data, case)[:1], longs(data[f"{case}_logit_positions"])
    kernel_size = direct_sr.config.kernel_size
    try:
        if change == "window":
            direct_sr.config.kernel_size = kernel_size[::-1]
        else:
            context.attention_mask = torch.ones_like(context.attention_mask)
        logits = direct_forward(direct_sr, context, positions)[0]
    finally:
        direct_sr.config.kernel_size = kernel_size
    theirs = torch.from_numpy(data[f"{case}_logits"])
    assert (stored(logits, theirs) - theirs).abs().max() > 20 * LOGITS_TOLERANCE
