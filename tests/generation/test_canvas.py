"""Passes over a canvas on tiny real models: what they compute, and that a picture depends on prompt and seed."""

import pytest
import torch

from cogview_pipelines.generation import canvas as canvas_loop
from cogview_pipelines.generation.canvas import refine
from cogview_pipelines.generation.sampling import draw_noise, sample_cluster_tokens, sample_tokens
from cogview_pipelines.models.cogview2.sequences import direct_super_resolution, iterative_super_resolution
from cogview_pipelines.schedulers.scheduling_lopar import LoPARScheduler

from ..utils import (
    BOI,
    FINE_GRID,
    NUM_CLUSTERS,
    NUM_IMAGE_TOKENS,
    cluster_labels,
    make_coglm,
    make_image_tokens,
    make_texts,
)
from .utils import MIXED_LENGTHS, generators

# two passes on cells of 2 x 2, of which one cell in four keeps its token
SCHEDULER = LoPARScheduler([[0, 1], [2, 1]], top_k=(10, 5))


def make_canvas(batch_size, seed=5):
    return make_image_tokens(batch_size, FINE_GRID[0] * FINE_GRID[1], seed).unflatten(1, FINE_GRID)


def make_context(model, texts):
    if model.config.super_resolution == "iterative":
        return iterative_super_resolution(texts, model.config.num_text_slots)
    image = make_image_tokens(len(texts))
    return direct_super_resolution(texts, image, model.config.num_text_slots, model.config.layout)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_refining_is_masking_predicting_and_drawing_pass_by_pass(kind):
    model, texts, canvas = make_coglm(kind), make_texts([2, 4]), make_canvas(2)
    context = make_context(model, texts)
    refined = refine(model, SCHEDULER, context, canvas, generator=generators(1, 2))
    noise = draw_noise((2, *FINE_GRID, 2), generators(1, 2))
    steps, expected = SCHEDULER.step_map(*FINE_GRID), canvas.clone()
    for timestep, top_k in ((1, 10), (2, 5)):
        visible = expected.masked_fill(steps >= timestep, BOI)
        logits = model(visible.flatten(1), context).logits
        # every unknown cell is drawn here, as in the release; the later ones are masked again, whatever they got
        tokens = sample_tokens(logits.unflatten(1, FINE_GRID), noise, top_k=top_k)
        expected = torch.where(steps >= timestep, tokens, expected)
    assert torch.equal(refined, expected)


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_one_refined_image_alone_is_the_one_in_a_batch_of_mixed_prompts(kind):
    model, texts, canvas = make_coglm(kind), make_texts(MIXED_LENGTHS), make_canvas(4)
    context = make_context(model, texts)
    together = refine(model, SCHEDULER, context, canvas, generator=generators(1, 2, 3, 4))
    for row in range(4):
        one = slice(row, row + 1)
        alone = refine(model, SCHEDULER, context[one], canvas[one], generator=generators(row + 1))
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("cells", [1, 7, 1000])
@pytest.mark.parametrize("cluster_temperature", [None, 0.8])
def test_drawing_in_parts_gives_the_same_canvas(cells, cluster_temperature, monkeypatch):
    model, texts, canvas = make_coglm("iterative"), make_texts([2, 4]), make_canvas(2)
    scheduler = SCHEDULER.with_settings(cluster_temperature=cluster_temperature)

    def refined():
        arguments = (model, scheduler, make_context(model, texts), canvas)
        return refine(*arguments, cluster_labels=cluster_labels(), generator=generators(1, 2))

    expected, sizes = refined(), []
    monkeypatch.setattr(canvas_loop, "LOGITS_BYTES", 4 * 2 * NUM_IMAGE_TOKENS * cells)
    model.word_embeddings.register_forward_hook(lambda module, arguments, output: sizes.append(output.shape))
    assert torch.equal(refined(), expected)
    logits = [shape for shape in sizes if shape[-1] == NUM_IMAGE_TOKENS]
    assert max(shape[1] for shape in logits) <= cells
    assert sum(shape[1] for shape in logits) == int((SCHEDULER.step_map(*FINE_GRID) >= 1).sum())


def test_direct_super_resolution_fills_an_unknown_canvas_by_cluster_sampling():
    model, texts = make_coglm("direct"), make_texts([3, 2])
    scheduler = LoPARScheduler([[1]], top_k=3, cluster_temperature=0.8)
    context = make_context(model, texts)
    arguments = {"cluster_labels": cluster_labels(), "generator": generators(1, 2)}
    canvas = refine(model, scheduler, context, **arguments)
    assert canvas.shape == (2, *FINE_GRID)
    assert canvas.min() >= 0 and canvas.max() < NUM_IMAGE_TOKENS
    with torch.no_grad():
        logits = model(torch.full((2, FINE_GRID[0] * FINE_GRID[1]), BOI), context).logits.unflatten(1, FINE_GRID)
    noise = draw_noise((2, *FINE_GRID, 2), generators(1, 2))
    expected = sample_cluster_tokens(logits, noise, cluster_labels(), 1.0, 3, 0.8, num_clusters=NUM_CLUSTERS)
    assert torch.equal(canvas, expected)


def test_what_stands_on_masked_cells_before_refining_does_not_matter():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    other = torch.where(SCHEDULER.step_map(*FINE_GRID) >= 1, make_canvas(1, seed=6), canvas)
    assert not torch.equal(other, canvas)
    images = [
        refine(model, SCHEDULER, make_context(model, texts), start, generator=generators(1))
        for start in (canvas, other)
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_refining_changes_only_cells_of_the_schedule_inside_the_cell_mask(kind):
    model, texts, canvas = make_coglm(kind), make_texts([2, 4]), make_canvas(2)
    before = canvas.clone()
    cell_mask = torch.zeros(FINE_GRID, dtype=torch.bool)
    cell_mask[2:9, 3:] = True
    refined = refine(
        model, SCHEDULER, make_context(model, texts), canvas, cell_mask=cell_mask, generator=generators(1, 2)
    )
    free = cell_mask & (SCHEDULER.step_map(*FINE_GRID) >= 1)
    assert torch.equal(refined[:, ~free], before[:, ~free])
    assert (refined[:, free] != before[:, free]).float().mean() > 0.5
    assert torch.equal(canvas, before)  # the argument stays as it is


def test_cells_outside_the_cell_mask_are_seen_while_refining():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    cell_mask = torch.zeros(FINE_GRID, dtype=torch.bool)
    cell_mask[4:8, 4:8] = True
    # those outside that every pass would hide, if the cell mask did not hold them back
    changed = ~cell_mask & (SCHEDULER.step_map(*FINE_GRID) == SCHEDULER.timesteps[-1])
    other = canvas.clone()
    other[:, changed] = make_canvas(1, seed=9)[:, changed]
    inside = [
        refine(model, SCHEDULER, make_context(model, texts), start, cell_mask=cell_mask, generator=generators(1))[
            :, cell_mask & (SCHEDULER.step_map(*FINE_GRID) >= 1)
        ]
        for start in (canvas, other)
    ]
    assert not torch.equal(*inside)


def test_an_empty_cell_mask_keeps_the_canvas():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    nothing = torch.zeros(FINE_GRID, dtype=torch.bool)
    assert torch.equal(refine(model, SCHEDULER, make_context(model, texts), canvas, cell_mask=nothing), canvas)


def test_refine_reports_the_canvas_after_every_pass():
    model, texts, canvas = make_coglm("iterative"), make_texts([2, 3]), make_canvas(2)
    scheduler = LoPARScheduler.diagonal(2)
    reports = []
    refined = refine(
        model,
        scheduler,
        make_context(model, texts),
        canvas,
        generator=generators(1, 2),
        callback=lambda step, tokens: reports.append((step, tokens.clone())),
    )
    assert [step for step, _ in reports] == [1, 2, 3]
    steps = scheduler.step_map(*FINE_GRID)
    for step, tokens in reports:
        assert torch.equal(tokens[:, steps <= step], refined[:, steps <= step])
        assert torch.equal(tokens[:, steps > step], canvas[:, steps > step])


def test_a_context_encoded_before_refines_alike():
    model, texts, canvas = make_coglm("iterative"), make_texts([2, 3]), make_canvas(2)
    context = make_context(model, texts)
    with torch.no_grad():
        encoded = model.encode_context(context)
    images = [refine(model, SCHEDULER, one, canvas, generator=generators(1, 2)) for one in (context, encoded)]
    assert torch.equal(*images)


def test_more_and_fewer_passes_fill_the_same_cells():
    model, texts, canvas = make_coglm("iterative"), make_texts([2]), make_canvas(1)
    kept = SCHEDULER.step_map(*FINE_GRID) < 1
    images = []
    for num_steps in (1, 2, 3):
        refined = refine(
            model,
            SCHEDULER.with_num_steps(num_steps),
            make_context(model, texts),
            canvas,
            generator=generators(1),
        )
        assert torch.equal(refined[:, kept], canvas[:, kept])
        assert refined.max() < NUM_IMAGE_TOKENS
        images.append(refined)
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_a_schedule_that_keeps_cells_needs_a_canvas():
    model = make_coglm("iterative")
    with pytest.raises(ValueError, match="`tokens` must be given, because 36 of 144 cells keep theirs"):
        refine(model, SCHEDULER, make_context(model, make_texts([2])))


def test_a_wrong_number_of_generators_is_an_error():
    model, texts = make_coglm("iterative"), make_texts([2, 3])
    with pytest.raises(ValueError, match=r"`generator` must be one generator or one per image \(2\), but 3 came"):
        refine(model, SCHEDULER, make_context(model, texts), make_canvas(2), generator=generators(1, 2, 3))
