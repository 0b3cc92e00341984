"""Completion against the original: reordering, masks, logits, decisions, crop boxes."""

import numpy as np
import torch

from cogview_pipelines.generation.decoders import Decoding
from cogview_pipelines.generation.tokens import generate
from cogview_pipelines.models.cogview2 import sequences
from cogview_pipelines.pipelines.cogview2 import completion_geometry as geometry

from .conftest import (
    CLEAR_MARGIN,
    assert_close,
    assert_logits,
    assert_same,
    assert_same_decisions,
    bools,
    cases,
    longs,
)
from .test_text_to_image import Follow, forward


def task_of(model, data, case):
    image = longs(data[f"{case}_image_ids"])[None]
    return sequences.completion([data[f"{case}_text_ids"]], image, bools(data[f"{case}_mask"]), model.config.layout)


def masks(data):
    return cases(data, "_context_length")


def bias_of(data, case):
    return float(data[f"{case}_log_attention_weights"].max())


def test_reordering_positions_mask_and_bias_are_the_originals(coglm, arrays):
    data = arrays("completion")
    for case in masks(data):
        task = task_of(coglm, data, case)
        assert task.context.input_ids.shape[1] == data[f"{case}_context_length"]
        whole = task.whole_sequence()
        assert_same(whole.input_ids[0], data[f"{case}_seq"], f"{case} ids")
        assert_same(whole.position_ids[0], data[f"{case}_pos_ids"], f"{case} positions")
        assert_same(whole.attention_mask[0], bools(data[f"{case}_attention_mask"]), f"{case} mask")
        ours = (whole.text_mask[0] * bias_of(data, case)).expand(len(data[f"{case}_seq"]), -1)
        assert_close(ours, data[f"{case}_log_attention_weights"], 1e-6, f"{case} bias")


def filled(data, case, task):
    """Entries of the task from the stored filling."""
    return longs(data[f"{case}_filled_seq"])[None, -task.entries.shape[1] :]


def test_logits_and_decisions_are_the_originals(coglm, arrays):
    data = arrays("completion")
    for case in masks(data):
        task = task_of(coglm, data, case)
        task.entries = filled(data, case, task)
        whole = task.whole_sequence()
        assert_same(whole.input_ids[0], data[f"{case}_filled_seq"], f"{case} ids")
        logits = forward(coglm, whole, bias_of(data, case)).logits[0]
        assert_close(logits.logsumexp(-1), data[f"{case}_logsumexp"], what=f"{case} logsumexp")
        assert_same_decisions(logits.argmax(-1), data[f"{case}_argmax"], data[f"{case}_margin"], case)
        assert_logits(logits[longs(data[f"{case}_logit_positions"])], data[f"{case}_logits"], what=f"{case} logits")


def test_entries_go_back_to_their_cells(coglm, arrays):
    data = arrays("completion")
    for case in masks(data):
        task = task_of(coglm, data, case)
        grid = longs(data[f"{case}_image_ids"])
        grid[task.cells] = filled(data, case, task)[0]
        assert_same(grid, data[f"{case}_filled_grid"], case)


def test_cached_decoding_takes_the_original_decisions(coglm, arrays):
    data = arrays("completion")
    for case in masks(data):
        task = task_of(coglm, data, case)
        theirs = longs(data[f"{case}_greedy_seq"])[None, -task.entries.shape[1] :]
        wanted = task.entries[0] == -1
        follow = Follow(theirs[:, wanted])
        entries = generate(
            coglm,
            task.context,
            follow,
            task.entries,
            task.positions,
            text_attention_bias=bias_of(data, case),
            decoding=Decoding(parallel=1),
        )
        assert_same(entries, theirs, case)
        ours = torch.cat(follow.logits).argmax(-1)
        assert_same_decisions(ours, theirs[0, wanted].numpy(), data[f"{case}_greedy_margin"], case)


def test_greedy_completion_is_the_originals(coglm, arrays):
    data = arrays("completion")
    for case in masks(data):
        if data[f"{case}_greedy_margin"].min() <= CLEAR_MARGIN:
            continue  # two correct programs may go different ways here; the decisions one by one are tested above
        task = task_of(coglm, data, case)
        entries = generate(
            coglm,
            task.context,
            lambda logits, noise: logits.argmax(-1),
            task.entries,
            task.positions,
            text_attention_bias=bias_of(data, case),
        )
        grid = longs(data[f"{case}_image_ids"])
        grid[task.cells] = entries[0].cpu()
        assert_same(grid, data[f"{case}_greedy_grid"], case)
        known = ~bools(data[f"{case}_mask"]).flatten()
        assert_same(grid[known], data[f"{case}_image_ids"][known.numpy()], "known cells")


def test_crop_boxes_and_token_masks_are_the_originals(coglm, direct_sr, arrays):
    data = arrays("completion")
    packed = np.unpackbits(data["crop_masks_packed"], axis=1)
    size = int(packed.shape[1] ** 0.5)
    for index, flat in enumerate(packed):
        mask = bools(flat).view(size, size)
        assert geometry.bounding_box(mask) == tuple(data["crop_inner"][index])
        top, left, bottom, right = box = geometry.crop_box(mask)
        assert box == tuple(data["crop_boxes"][index])
        crop = mask[top:bottom, left:right]
        assert_same(geometry.token_mask(crop, coglm.config.image_grid), bools(data["crop_small_masks"][index]))
        fine = geometry.token_mask(crop, direct_sr.config.fine_grid).flatten()
        assert_same(fine, bools(data["crop_big_masks"][index]))


def test_masks_from_fractions_are_the_originals(arrays):
    data = arrays("completion")
    for fractions, box in zip(data["cord2mask_args"], data["cord2mask_boxes"]):
        mask = geometry.rectangle_mask(tuple(fractions))
        assert geometry.bounding_box(mask) == tuple(box)
        assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])
