"""LoPAR schedules as data: which cell in which pass, and one pass of drawing."""

import json

import pytest
import torch
from diffusers import SchedulerMixin

from cogview_pipelines.generation.sampling import sample_cluster_tokens, sample_tokens
from cogview_pipelines.schedulers.scheduling_lopar import RELEASED_STEP_GRID, RELEASED_TOP_K, LoPARScheduler

from ..utils import BOI, NUM_IMAGE_TOKENS, cluster_labels

SCHEDULERS = {
    "released": LoPARScheduler(),
    "direct": LoPARScheduler([[1]], top_k=100, cluster_temperature=0.89),
    "diagonal": LoPARScheduler.diagonal(4),
    "uneven": LoPARScheduler([[0, 1, 3], [2, 1, -1]], top_k=(9, 5, 7)),
}
# a canvas that each of their grids tiles more than once
HEIGHT, WIDTH = 24, 36


def step_masks(scheduler, method):
    return [getattr(scheduler, method)(timestep, HEIGHT, WIDTH) for timestep in scheduler.timesteps.tolist()]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_cell_becomes_final_in_its_own_step(name):
    scheduler = SCHEDULERS[name]
    grid = torch.tensor(scheduler.config.step_grid)
    tiled = grid.repeat(HEIGHT // grid.shape[0], WIDTH // grid.shape[1])
    assert torch.equal(scheduler.step_map(HEIGHT, WIDTH), tiled)
    final = step_masks(scheduler, "final_positions")
    steps = sum(timestep * mask for timestep, mask in zip(scheduler.timesteps, final))
    assert torch.equal(steps, tiled.clamp(min=0))
    assert torch.equal(sum(mask.long() for mask in final), (tiled >= 1).long())  # once, or never
    masked = step_masks(scheduler, "masked_positions")
    assert torch.equal(sum(mask.long() for mask in masked), tiled.clamp(min=0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_unknown_cells_of_a_step_are_those_of_the_step_before_without_the_ones_it_set(name):
    scheduler = SCHEDULERS[name]
    masked, final = step_masks(scheduler, "masked_positions"), step_masks(scheduler, "final_positions")
    for step in range(len(masked) - 1):
        assert torch.equal(masked[step + 1], masked[step] & ~final[step])
    assert torch.equal(masked[-1], final[-1])


def test_released_grid_masks_the_released_numbers_of_cells():
    scheduler = LoPARScheduler()
    masked = [int(scheduler.masked_positions(step, 60, 60).sum()) for step in scheduler.timesteps.tolist()]
    assert masked == [2300, 1900, 1500, 1000, 600, 200]
    assert (scheduler.step_map(60, 60) < 1).sum() == 1300
    assert RELEASED_TOP_K == (40, 40, 40, 20, 20, 10)


@pytest.mark.parametrize("sigma", [1, 2, 3, 6])
def test_diagonal_schedule_leaves_no_cell_out(sigma):
    scheduler = LoPARScheduler.diagonal(sigma)
    assert len(scheduler.timesteps) == 2 * sigma - 1
    steps = scheduler.step_map(2 * sigma, 3 * sigma)
    assert steps.min() == 1
    assert steps.max() == 2 * sigma - 1
    for row in range(2 * sigma):
        for column in range(3 * sigma):
            assert steps[row, column] == row % sigma + column % sigma + 1


def test_diagonal_schedule_takes_the_other_settings():
    scheduler = LoPARScheduler.diagonal(2, top_k=(5, 4, 3), temperature=0.7, cluster_temperature=0.5)
    assert scheduler.config.top_k == (5, 4, 3)
    assert (scheduler.config.temperature, scheduler.config.cluster_temperature) == (0.7, 0.5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_number_of_steps_keeps_cells_and_order(name):
    scheduler = SCHEDULERS[name]
    before = torch.tensor(scheduler.config.step_grid).flatten()
    num_cells = int((before >= 1).sum())
    for num_steps in range(1, num_cells + 1):
        changed = scheduler.with_num_steps(num_steps)
        after = torch.tensor(changed.config.step_grid).flatten()
        assert changed.timesteps.tolist() == list(range(1, num_steps + 1))
        assert torch.equal(after[before < 1], before[before < 1])
        assert sorted(set(after[before >= 1].tolist())) == list(range(1, num_steps + 1))
        earlier = (before[:, None] < before) & (before[:, None] >= 1)
        strictly = num_steps >= len(scheduler.timesteps)
        difference = (after[None] - after[:, None])[earlier]
        assert (difference > 0).all() if strictly else (difference >= 0).all()
        if num_steps > len(scheduler.timesteps):  # cells of one old step are split in raster order
            for step in scheduler.timesteps.tolist():
                parts = after[before == step]
                assert (parts.diff() >= 0).all()
                sizes = torch.bincount(parts)[parts.min() :]
                assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_its_own_number_of_steps_reproduces_the_schedule(name):
    scheduler = SCHEDULERS[name]
    same = scheduler.with_num_steps(len(scheduler.timesteps))
    assert same.config.step_grid == [list(row) for row in scheduler.config.step_grid]
    assert [same._top_k(step) for step in same.timesteps] == [scheduler._top_k(step) for step in scheduler.timesteps]


def test_joined_steps_take_the_largest_top_k_and_keep_the_temperatures():
    scheduler = LoPARScheduler([[1, 2], [3, 4]], top_k=(8, 30, 20, 10), temperature=0.9, cluster_temperature=0.4)
    joined = scheduler.with_num_steps(2)
    assert joined.config.step_grid == [[1, 1], [2, 2]]
    assert joined.config.top_k == [30, 20]
    assert (joined.config.temperature, joined.config.cluster_temperature) == (0.9, 0.4)
    split = LoPARScheduler([[1, 1], [2, 2]], top_k=(30, 20)).with_num_steps(4)
    assert split.config.step_grid == [[1, 2], [3, 4]]
    assert split.config.top_k == [30, 30, 20, 20]


def test_step_draws_the_given_cells_and_leaves_the_rest_and_the_arguments():
    scheduler = LoPARScheduler([[1, 2], [2, 0]], top_k=(5, 3), temperature=0.8)
    canvas = torch.randint(NUM_IMAGE_TOKENS, (2, 4, 6))
    before = canvas.clone()
    for timestep in (1, 2):
        drawn = scheduler.final_positions(timestep, 4, 6)
        logits, noise = torch.randn(2, int(drawn.sum()), NUM_IMAGE_TOKENS), torch.rand(2, int(drawn.sum()), 2)
        after = scheduler.step(logits, timestep, canvas, drawn, noise).prev_sample
        assert torch.equal(after[:, ~drawn], before[:, ~drawn])
        assert torch.equal(after[:, drawn], sample_tokens(logits, noise, 0.8, (5, 3)[timestep - 1]))
        assert torch.equal(canvas, before)


def test_step_draws_by_cluster_where_a_cluster_temperature_is_set():
    scheduler = LoPARScheduler([[1]], top_k=2, temperature=1.2, cluster_temperature=0.6)
    drawn = torch.ones(4, 4, dtype=torch.bool)
    logits, noise, labels = torch.randn(3, 16, NUM_IMAGE_TOKENS), torch.rand(3, 16, 2), cluster_labels()
    canvas = torch.full((3, 4, 4), BOI)
    after = scheduler.step(logits, 1, canvas, drawn, noise, labels).prev_sample
    assert torch.equal(after.flatten(1), sample_cluster_tokens(logits, noise, labels, 1.2, 2, 0.6))


def test_cluster_sampling_without_labels_is_an_error():
    scheduler = LoPARScheduler([[1]], top_k=2, cluster_temperature=0.6)
    arguments = (
        torch.zeros(1, 1, 5),
        1,
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        torch.rand(1, 1, 2),
    )
    with pytest.raises(ValueError, match="`cluster_labels` must be given, because `cluster_temperature`"):
        scheduler.step(*arguments)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_schedules_are_loaded_unchanged(name, tmp_path):
    scheduler = SCHEDULERS[name]
    scheduler.save_pretrained(tmp_path)
    loaded = LoPARScheduler.from_pretrained(tmp_path)
    assert isinstance(loaded, SchedulerMixin)
    assert torch.equal(loaded.step_map(HEIGHT, WIDTH), scheduler.step_map(HEIGHT, WIDTH))
    assert torch.equal(loaded.timesteps, scheduler.timesteps)
    for step in scheduler.timesteps.tolist():
        assert loaded._top_k(step) == scheduler._top_k(step)
    for field in ("temperature", "cluster_temperature"):
        assert loaded.config[field] == scheduler.config[field]
    json.loads((tmp_path / "scheduler_config.json").read_text())


def test_another_schedule_comes_from_the_config_of_one():
    scheduler = LoPARScheduler.from_config(LoPARScheduler().config, top_k=3, temperature=0.5)
    assert [tuple(row) for row in scheduler.config.step_grid] == list(RELEASED_STEP_GRID)
    assert (scheduler.config.top_k, scheduler.config.temperature) == (3, 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"step_grid": [[1, 2], [3]]}, r"`step_grid` must have rows of one length, but they have lengths \[1, 2\]"),
        ({"step_grid": [[]]}, r"`step_grid` must have rows of one length, but they have lengths \[0\]"),
        ({"step_grid": [[1, 3]]}, r"`step_grid` must use every step from 1 to its largest .*3.*; missing: \[2\]"),
        ({"step_grid": [[0, -1]]}, r"`step_grid` must use every step from 1 to its largest"),
        ({"top_k": (40, 20)}, r"`top_k` must be one number or one per step \(6\), but has 2 entries"),
        ({"top_k": 0}, "`top_k` must be at least 1, but is 0"),
        ({"top_k": (40, 40, 40, 20, -1, 10)}, "`top_k` must be at least 1, but is .*-1"),
        ({"temperature": 0.0}, "`temperature` must be above 0, but is 0.0"),
        ({"temperature": float("nan")}, "`temperature` must be above 0, but is nan"),
        ({"cluster_temperature": -1.0}, "`cluster_temperature` must be above 0, but is -1.0"),
    ],
)
def test_impossible_settings_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoPARScheduler(**arguments)


@pytest.mark.parametrize("num_steps", [0, 24, -3])
def test_an_impossible_number_of_steps_is_an_error_that_says_what_is_possible(num_steps):
    with pytest.raises(ValueError, match=f"`num_steps` must be from 1 to 23 .* but is {num_steps}"):
        LoPARScheduler().with_num_steps(num_steps)


def test_a_diagonal_schedule_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="`sigma` must be at least 1, but is 0"):
        LoPARScheduler.diagonal(0)


@pytest.mark.parametrize("size", [(60, 62), (61, 60)])
def test_a_canvas_that_the_grid_does_not_tile_is_an_error(size):
    with pytest.raises(ValueError, match=rf"6 x 6 step grid, but is {size[0]} x {size[1]}"):
        LoPARScheduler().masked_positions(1, *size)


def test_another_number_of_steps_keeps_settings_given_by_position():
    scheduler = LoPARScheduler(((1, 2),), (5, 4), 0.7, 0.5).with_num_steps(1)
    assert (scheduler.config.temperature, scheduler.config.cluster_temperature) == (0.7, 0.5)
