"""The loop that the scripts share, on a regression of one layer."""

import json
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn

from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.checkpoints import list_checkpoints
from cogview_pipelines.training.data.prefetch import step_generator
from cogview_pipelines.training.loop import train


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Regression(nn.Module):
    """Dropout, so that the global random state counts, and a layer of each kind of weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, inputs):
        return self.layers(inputs)[:, 0]

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "weights.pt")


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor

    def to(self, device):
        return Batch(self.inputs.to(device), self.targets.to(device))


class Runner:
    """Runs the loop in a folder; remembers the draws, and fails at a step if asked to."""

    def __init__(self, folder):
        self.folder, self.draws, self.fail_at = folder, [], None

    def make_batch(self, draw):
        self.draws.append(draw)
        if draw[0] == self.fail_at:
            raise KeyboardInterrupt
        inputs = torch.randn(4, 4, generator=step_generator(0, *draw))
        return Batch(inputs, inputs.sum(1))

    @staticmethod
    def compute_loss(model, batch):
        loss = (model(batch.inputs) - batch.targets).square().mean()
        return loss, {"twice": 2 * loss.detach()}

    def __call__(self, name, make_samples=None, model=None, hooks=None, **options):
        defaults = {"max_steps": 6, "batch_size": 4, "warmup_steps": 0, "log_every_steps": 1, "learning_rate": 0.01}
        config = TrainConfig(output_dir=str(self.folder / name), **{**defaults, "data_workers": 0, **options})
        return train(config, model or Regression(), self.make_batch, self.compute_loss, make_samples, **(hooks or {}))

    def metrics(self, name):
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"], line["learning_rate"]) for line in lines]


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(runner, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "checkpoint_every_steps": 2, "ema_decay": 0.5}
    whole = runner("whole", **options)
    runner.fail_at = 3  # one step after the checkpoint
    with pytest.raises(KeyboardInterrupt):
        runner("parts", **options)
    assert [step for step, _, _ in runner.metrics("parts")] == [1, 2, 3]
    runner.fail_at = None
    resumed = runner("parts", resume_from_checkpoint="latest", **options)
    assert runner.metrics("parts") == runner.metrics("whole")
    assert same(whole, resumed)


def test_resuming_draws_the_batches_that_come_next(runner):
    runner("run", gradient_accumulation_steps=2, checkpoint_every_steps=2, max_steps=2)
    assert runner.draws == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    runner.draws.clear()
    runner("run", gradient_accumulation_steps=2, resume_from_checkpoint="latest", max_steps=3)
    assert runner.draws == [(2, 0, 0), (2, 1, 0)]


def test_accumulated_small_batches_are_one_large_batch(runner):
    class Plain(Regression):
        def __init__(self):
            super().__init__()
            self.layers[2] = nn.Identity()

    def joined(draw):
        parts = [Runner.make_batch(runner, (draw[0], micro_step, 0)) for micro_step in (0, 1)]
        return Batch(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))

    small = runner("small", model=Plain(), gradient_accumulation_steps=2)
    config = TrainConfig(
        output_dir=str(runner.folder / "large"),
        max_steps=6,
        batch_size=8,
        warmup_steps=0,
        learning_rate=0.01,
        log_every_steps=1,
    )
    large = train(config, Plain(), joined, Runner.compute_loss)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, large.state_dict()[name], rtol=1e-4, atol=1e-6)
    for (_, one, _), (_, other, _) in zip(runner.metrics("small"), runner.metrics("large")):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_average_of_the_weights_is_what_is_saved_and_shown(runner):
    shown = []

    def make_samples(model):
        shown.append({name: value.clone() for name, value in model.state_dict().items()})
        assert not model.training
        return torch.rand(1, 3, 4, 4)

    last = runner("last")
    average = runner("average", make_samples, ema_decay=0.9, sample_every_steps=6)
    assert not same(last, average)
    assert all(torch.equal(value, shown[-1][name]) for name, value in average.state_dict().items())
    saved = torch.load(runner.folder / "average/final/weights.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in average.state_dict().items())


def test_sample_pictures_leave_no_trace_in_the_run(runner):
    quiet = runner("quiet")
    shown = runner("shown", lambda model: torch.rand(2, 3, 4, 4), sample_every_steps=1)
    assert same(quiet, shown) and runner.metrics("quiet") == runner.metrics("shown")
    assert len(list((runner.folder / "shown/samples").iterdir())) == 6


def test_sets_of_sample_pictures_become_files_by_their_names(runner):
    sets = {"small": torch.rand(3, 3, 4, 4), "large": torch.rand(2, 3, 8, 8)}
    runner("run", lambda model: sets, sample_every_steps=6)
    sizes = {path.name: Image.open(path).size for path in (runner.folder / "run/samples").iterdir()}
    assert sizes == {"0000006_small.png": (8, 8), "0000006_large.png": (16, 8)}


def test_steps_are_announced_and_the_final_model_is_finished_before_it_is_saved(runner):
    steps = []

    def finish(model):
        assert not model.training
        nn.init.constant_(model.layers[3].bias, 7.0)

    runner("run", hooks={"begin_step": steps.append, "finish": finish}, gradient_accumulation_steps=2, max_steps=2)
    assert steps == [0, 0, 1, 1]
    saved = torch.load(runner.folder / "run/final/weights.pt", weights_only=True)
    assert saved["layers.3.bias"].item() == 7.0


def test_weights_that_need_no_gradient_stay_as_they_are(runner):
    model = Regression()
    model.layers[0].requires_grad_(False)
    before = model.layers[0].weight.clone()
    trained = runner("run", model=model, weight_decay=0.5, ema_decay=0.5)
    assert torch.equal(trained.layers[0].weight, before)
    assert not torch.equal(trained.layers[3].weight, Regression().layers[3].weight)


def test_the_gradient_is_clipped_only_if_asked_for(runner):
    free, clipped, loose = (
        runner(f"clip{norm}", optimizer="adamw", max_grad_norm=norm, max_steps=3) for norm in (0.0, 1e-7, 1e7)
    )
    assert same(free, loose) and not same(free, clipped)


def test_going_back_to_an_early_checkpoint_keeps_the_new_ones(runner):
    runner("run", checkpoint_every_steps=1, keep_checkpoints=3)
    assert [path.name for path in list_checkpoints(runner.folder / "run")] == [f"checkpoint-{n}" for n in (4, 5, 6)]
    early = str(runner.folder / "run/checkpoint-4")
    runner.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        runner("run", checkpoint_every_steps=1, keep_checkpoints=1, resume_from_checkpoint=early, learning_rate=0.5)
    assert [path.name for path in list_checkpoints(runner.folder / "run")] == ["checkpoint-5"]


def test_nothing_is_left_of_a_checkpoint_that_was_not_finished(runner, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.save_state", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        runner("run", checkpoint_every_steps=2)
    monkeypatch.undo()
    assert list_checkpoints(runner.folder / "run") == []
    runner("run", checkpoint_every_steps=2, resume_from_checkpoint="latest")
    assert [step for step, _, _ in runner.metrics("run")] == [1, 2, 3, 4, 5, 6]
