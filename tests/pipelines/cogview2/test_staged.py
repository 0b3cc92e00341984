"""Prompts that are computed together, stage by stage, give the pictures that each gives alone."""

import pytest
import torch

from cogview_pipelines.pipelines.cogview2.staged import StagedPipeline

from ..conftest import LOW, build

PROMPTS = ["a tiger on a blue background.", "一只猫,红色背景。", "a car"]


@pytest.fixture(scope="module")
def pipe(tokenizer):
    pipe = build(tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(first, count):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def run(staged, orders):
    """All stages: together where keys are equal."""
    while len(orders[0].keys) > 1:
        step = staged.draft if orders[0].tokens is None else staged.refine
        step(orders)
    return staged.decode(orders)


def test_orders_computed_together_give_the_pictures_of_a_call_each(pipe):
    staged = StagedPipeline(pipe)
    arguments = [{"num_images": 2}, {"num_images": 1, "num_candidates": 3}, {"num_images": 1}]
    orders = [
        staged.order(prompt, seeded(10 * index, more.get("num_candidates", more["num_images"])), **more)
        for index, (prompt, more) in enumerate(zip(PROMPTS, arguments))
    ]
    assert orders[0].keys == orders[1].keys == orders[2].keys
    found = run(staged, orders)
    for index, (order, images, more) in enumerate(zip(orders, found, arguments)):
        drafts = more.get("num_candidates", more["num_images"])
        call = {"num_images_per_prompt": more["num_images"], "num_candidates": more.get("num_candidates")}
        alone = pipe(PROMPTS[index], generator=seeded(10 * index, drafts), **call)
        assert torch.equal(order.tokens, alone.tokens) and order.seeds == alone.seeds
        assert [image.tobytes() for image in images] == [image.tobytes() for image in alone.images]
        if order.scores is not None:
            assert order.scores == pytest.approx(alone.scores)


def test_guidance_and_negative_prompts_of_each_order_hold(pipe):
    staged = StagedPipeline(pipe)
    negatives = ["a car", ""]
    orders = [
        staged.order(prompt, seeded(3, 1), guidance_scale=2.0, negative_prompt=negative)
        for prompt, negative in zip(PROMPTS, negatives)
    ]
    run(staged, orders)
    for order, prompt, negative in zip(orders, PROMPTS, negatives):
        alone = pipe(prompt, generator=seeded(3, 1), guidance_scale=2.0, negative_prompt=negative)
        assert torch.equal(order.tokens, alone.tokens)


def test_keys_differ_where_stages_do_and_only_there(pipe):
    staged = StagedPipeline(pipe)

    def keys(**settings):
        return staged.order(PROMPTS[0], seeded(0, 1), **settings).keys

    plain = keys()
    assert keys(height=LOW) == [plain[0], plain[-1]]  # drafted together, whatever comes after
    assert keys(num_images=1, direct_sr_temperature=0.5)[0] == plain[0]
    assert keys(direct_sr_temperature=0.5)[1] != plain[1]
    assert keys(num_lopar_steps=1)[:2] == plain[:2] and keys(num_lopar_steps=1)[2] != plain[2]
    for changed in ({"temperature": 0.5}, {"guidance_scale": 2.0}, {"style": "cool"}, {"top_k_clusters": 2}):
        assert keys(**changed)[0] != plain[0], changed


def test_a_stage_that_failed_is_tried_again_with_the_same_numbers(pipe):
    staged = StagedPipeline(pipe)
    order = staged.order(PROMPTS[0], seeded(4, 1))

    def fail(pipe, step, timestep, kwargs):
        raise RuntimeError("no")

    for step in (staged.draft, staged.refine, staged.refine):
        with pytest.raises(RuntimeError, match="no"):
            step([order], fail)
        step([order])
    assert torch.equal(order.tokens, pipe(PROMPTS[0], generator=seeded(4, 1)).tokens)


def test_an_order_that_cannot_be_made_is_refused_at_once(pipe):
    staged = StagedPipeline(pipe)
    with pytest.raises(ValueError, match="`num_candidates`"):
        staged.order(PROMPTS[0], seeded(0, 2), num_images=2, num_candidates=1)
    with pytest.raises(ValueError, match="`style`"):
        staged.order(PROMPTS[0], seeded(0, 1), style="oil")
