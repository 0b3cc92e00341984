import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.checkpoints import Clock, list_checkpoints, resume, save_checkpoint
from cogview_pipelines.training.data.pictures import PicturePool
from cogview_pipelines.training.data.prefetch import draw_indices, image_paths, prefetch, step_generator
from cogview_pipelines.training.logs import MetricsLog
from cogview_pipelines.training.losses import content_weights, reconstruction_loss
from cogview_pipelines.training.setup import (
    CombinedOptimizer,
    make_accelerator,
    make_averaged_model,
    make_optimizer,
    make_scheduler,
)

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_config(tmp_path=".", **options) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path), **options)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def update(network, optimizer):
    network(torch.arange(5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_same_step_draws_the_same_and_another_draws_anew():
    def draw(*arguments):
        return draw_indices(1000, 8, step_generator(*arguments)).tolist()

    assert draw(0, 5) == draw(0, 5)
    others = [draw(1, 5), draw(0, 6), draw(0, 5, 1), draw(0, 5, 0, 1), draw(0, 5, 1, 1)]
    assert draw(0, 5) not in others and len({tuple(other) for other in others}) == 5


@pytest.mark.parametrize("num_workers, processes", [(0, False), (1, False), (3, False), (0, True), (2, True)])
def test_prefetch_keeps_the_order_and_the_random_state(num_workers, processes):
    before = torch.get_rng_state()
    made = prefetch(lambda item: item * item, iter(range(7)), num_workers, processes)
    assert list(made) == [(i, i * i) for i in range(7)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetch_passes_errors_on(num_workers):
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda item: 1 // item, [1, 0], num_workers))


@needs_muon
def test_muon_takes_linear_weights_and_adamw_the_rest():
    network = make_network()
    optimizer = make_optimizer(network, make_config(optimizer="muon", weight_decay=0.1), adamw_names=("3.",))
    adamw, muon = optimizer.optimizers
    assert [tuple(value.shape) for group in muon.param_groups for value in group["params"]] == [(4, 6)]
    decay = {tuple(value.shape): group["weight_decay"] for group in adamw.param_groups for value in group["params"]}
    assert decay == {(5, 6): 0.1, (3, 4): 0.1, (4,): 0.0, (3,): 0.0}


@needs_muon
def test_the_schedule_drives_both_parts_and_state_round_trips():
    config = make_config(optimizer="muon", learning_rate=1e-2, warmup_steps=4, decay_steps=2, max_steps=10)
    network = make_network()
    optimizer = make_optimizer(network, config)
    assert isinstance(optimizer, CombinedOptimizer)
    scheduler = make_scheduler(optimizer, config)
    for _ in range(3):
        update(network, optimizer)
        scheduler.step()
    assert {group["lr"] for part in optimizer.optimizers for group in part.param_groups} == {7.5e-3}

    copy = make_network()
    copy.load_state_dict(network.state_dict())
    copied_optimizer = make_optimizer(copy, config)
    copied_scheduler = make_scheduler(copied_optimizer, config)
    copied_optimizer.load_state_dict(json_free_copy(optimizer.state_dict()))
    copied_scheduler.load_state_dict(scheduler.state_dict())
    for one, one_optimizer, one_scheduler in (
        (network, optimizer, scheduler),
        (copy, copied_optimizer, copied_scheduler),
    ):
        update(one, one_optimizer)
        one_scheduler.step()
        update(one, one_optimizer)
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in network.state_dict().items())
    assert {group["lr"] for group in copied_optimizer.param_groups} == {1e-2}


def json_free_copy(state):
    """As saving and loading does it: no tensor is shared."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_learning_rate_warms_up_stays_and_decays_late():
    config = make_config(learning_rate=1.0, warmup_steps=4, decay_steps=4, max_steps=12)
    optimizer = make_optimizer(make_network(), config)
    scheduler = make_scheduler(optimizer, config)
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and set(rates[4:9]) == {1.0}
    assert all(rates[i] > rates[i + 1] > 0 for i in range(9, 11))


def test_the_moving_average_lags_behind():
    network = make_network()
    assert make_averaged_model(network, make_config()) is None
    averaged = make_averaged_model(network, make_config(ema_decay=0.75))
    averaged.update_parameters(network)
    with torch.no_grad():
        network[1].bias.add_(1.0)
    before = averaged.module[1].bias.clone()
    averaged.update_parameters(network)
    torch.testing.assert_close(averaged.module[1].bias - before, torch.full((4,), 0.25))
    assert not any(value.requires_grad for value in averaged.parameters())


def test_checkpoints_are_complete_and_old_ones_go(tmp_path):
    config = make_config(tmp_path, keep_checkpoints=2, resume_from_checkpoint="latest")
    accelerator = make_accelerator(config)
    network = accelerator.prepare(make_network())
    assert resume(accelerator, config) == 0
    for step in (2, 9, 10):
        with torch.no_grad():
            network[1].bias.fill_(float(step))
        save_checkpoint(accelerator, config, step)
    (tmp_path / ".partial-checkpoint-11").mkdir()  # as an interruption leaves it
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    with torch.no_grad():
        network[1].bias.zero_()
    assert resume(accelerator, config) == 10
    assert network[1].bias.tolist() == [10.0] * 4
    config.max_steps = 5
    with pytest.raises(ValueError, match=r"`max_steps` is 5, but .*checkpoint-10 has 10"):
        resume(accelerator, config)
    config.resume_from_checkpoint = str(tmp_path)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be"):
        resume(accelerator, config)


def test_the_clock_counts_steps_and_minutes(tmp_path):
    accelerator = Accelerator()
    by_steps = Clock(accelerator, make_config(tmp_path, checkpoint_every_steps=3, checkpoint_every_minutes=0))
    assert [by_steps.checkpoint_due(step) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    assert not by_steps.time_is_over()
    by_minutes = Clock(accelerator, make_config(tmp_path, checkpoint_every_steps=0, max_minutes=2.0))
    assert not by_minutes.checkpoint_due(1)
    by_minutes.start -= 121
    by_minutes.last_save -= 601
    assert by_minutes.time_is_over()
    assert by_minutes.checkpoint_due(1) and not by_minutes.checkpoint_due(2)


def test_metrics_are_means_and_a_resumed_run_drops_later_lines(tmp_path):
    config = make_config(tmp_path, log_every_steps=2, max_steps=4)
    log = MetricsLog(Accelerator(), config)
    for step, loss in ((1, 1.0), (2, 3.0), (3, 5.0), (4, torch.tensor(6.0))):
        log.add(8, loss=loss)
        log.end_step(step, 0.1)
    log.close()

    def losses():
        return [(line["step"], line["loss"]) for line in map(json.loads, log.path.read_text().splitlines())]

    assert losses() == [(2, 2.0), (4, 5.5)]
    MetricsLog(Accelerator(), config, start_step=2).close()
    assert losses() == [(2, 2.0)]


def test_flat_squares_weigh_less_and_the_mean_stays_one():
    target = torch.full((1, 3, 16, 16), 0.5)
    target[:, :, :8, :8] = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = content_weights(target, flat_weight=0.25)
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights[0, 0, 0, 0] / weights[0, 0, 15, 15]).item() == pytest.approx(4.0)


def test_reconstruction_loss_is_the_stated_mix():
    target = torch.zeros(1, 3, 4, 4)
    sample = torch.zeros(1, 3, 4, 4)
    sample[..., 2:] = 0.5  # a step between columns 1 and 2, in each of 4 rows
    assert reconstruction_loss(sample, target, 1.0, 0.0).item() == pytest.approx(0.25)
    assert reconstruction_loss(sample, target, 0.0, 2.0).item() == pytest.approx(0.25)
    assert reconstruction_loss(sample, target, 0.0, 0.0, edge_weight=1.0).item() == pytest.approx(0.5 * 4 / 16)
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 2.0
    assert reconstruction_loss(sample, target, 1.0, 1.0, pixel_weights=left).item() == 0.0


def test_windows_start_on_the_token_grid_and_stay_inside():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    pool = PicturePool(torch.stack([rows, columns, torch.zeros_like(rows)]).byte()[None])
    windows = (pool.batch(64, 16, 8, torch.Generator().manual_seed(0)) * 255).round().long()
    assert windows.shape == (64, 3, 16, 16)
    assert set(windows[:, 0, 0, 0].tolist()) == set(windows[:, 1, 0, 0].tolist()) == {0, 8, 16}
    assert (windows[:, 0, -1, 0] - windows[:, 0, 0, 0] == 15).all()
    assert pool.batch(2, None, 8, torch.Generator()).shape == (2, 3, 32, 32)


def test_image_paths_are_sorted_and_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no pictures"):
        image_paths(tmp_path)
    for name in ("b.png", "a.JPG", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_paths(tmp_path)] == ["a.JPG", "b.png"]


def test_hidden_files_and_folders_hold_no_pictures_to_train_on(tmp_path):
    for name in ("a.png", "._a.png", ".hidden/b.png", "c/d.png", "c/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in image_paths(tmp_path)] == ["a.png", "c/d.png"]
