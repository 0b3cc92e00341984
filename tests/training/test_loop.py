"""The loop that the scripts share, on a regression of one layer."""

import json
import logging
import os
import shutil
import signal
import stat
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn

from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.checkpoints import list_checkpoints
from cogview_pipelines.training.data.draws import Draw
from cogview_pipelines.training.loop import train
from cogview_pipelines.training.run_folder import locked, read_run

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


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


class Plain(Regression):
    """Without dropout."""

    def __init__(self):
        super().__init__()
        self.layers[2] = nn.Identity()


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self):
        return len(self.inputs)

    def to(self, device):
        return Batch(self.inputs.to(device), self.targets.to(device))


class Runner:
    """Runs the loop in a folder; remembers the draws, and does something when the batch of a step is made."""

    def __init__(self, folder):
        self.folder, self.draws, self.at_step = folder, [], {}

    def make_batch(self, draw):
        self.draws.append((draw.step, draw.samples.start, draw.samples.stop))
        self.at_step.get(draw.step, lambda: None)()
        inputs = torch.stack([torch.randn(4, generator=generator) for generator in draw.generators(0)])
        targets = inputs.sum(1)
        if self.at_step.get("spoil") == draw.step:
            targets[1] = float("nan")
        return Batch(inputs, targets)

    def fail_at(self, step):
        def fail():
            raise KeyboardInterrupt

        self.at_step = {step: fail}

    @staticmethod
    def compute_loss(model, batch):
        loss = (model(batch.inputs) - batch.targets).square().sum()
        return loss, {"twice": (2 * loss, len(batch))}

    def __call__(self, name, make_samples=None, model=None, hooks=None, **options):
        defaults = {"max_steps": 6, "batch_size": 4, "warmup_steps": 0, "log_every_steps": 1, "learning_rate": 0.01}
        config = TrainConfig(output_dir=str(self.folder / name), **{**defaults, "data_workers": 0, **options})
        return train(
            config, model or Regression(), self.make_batch, self.compute_loss, len, make_samples, **(hooks or {})
        )

    def metrics(self, name):
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"], line["learning_rate"]) for line in lines]

    def checkpoints(self, name):
        return [path.name for path in list_checkpoints(self.folder / name)]


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(runner, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "checkpoint_every_steps": 2, "ema_decay": 0.5}
    whole = runner("whole", **options)
    runner.fail_at(3)  # one step after the checkpoint
    with pytest.raises(KeyboardInterrupt):
        runner("parts", **options)
    assert [step for step, _, _ in runner.metrics("parts")] == [1, 2, 3]
    runner.at_step = {}
    resumed = runner("parts", resume_from_checkpoint="latest", **options)
    assert runner.metrics("parts") == runner.metrics("whole")
    assert same(whole, resumed)


def test_resuming_draws_the_batches_that_come_next(runner):
    runner("run", gradient_accumulation_steps=2, checkpoint_every_steps=2, max_steps=2)
    assert runner.draws == [(0, 0, 4), (0, 4, 8), (1, 8, 12), (1, 12, 16)]
    runner.draws.clear()
    runner("run", gradient_accumulation_steps=2, resume_from_checkpoint="latest", max_steps=3)
    assert runner.draws == [(2, 16, 20), (2, 20, 24)]


def test_resuming_with_another_batch_size_goes_on_after_the_samples_seen(runner):
    runner("run", max_steps=2)
    runner.draws.clear()
    runner("run", batch_size=3, resume_from_checkpoint="latest", max_steps=4)
    assert runner.draws == [(2, 8, 11), (3, 11, 14)]


def test_accumulated_small_batches_are_one_large_batch(runner):
    small = runner("small", model=Plain(), gradient_accumulation_steps=2)
    large = runner("large", model=Plain(), batch_size=8)
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


def test_the_average_is_over_the_weights_after_every_update_the_last_included(runner):
    averaged = runner("average", model=Plain(), ema_decay=0.9, max_steps=3).state_dict()
    weights = [runner(f"to{steps}", model=Plain(), max_steps=steps, decay_steps=0).state_dict() for steps in (1, 2, 3)]
    for name, value in averaged.items():
        first, second, third = (state[name] for state in weights)
        expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_a_disk_without_room_is_known_before_a_checkpoint_is_begun(runner, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    begun = []
    monkeypatch.setattr(torch.distributed.checkpoint, "save", lambda *args, **kwargs: begun.append(args))
    with pytest.raises(OSError, match=r"has no room for checkpoint-2"):
        runner("run", checkpoint_every_steps=2)
    assert not begun and not runner.checkpoints("run")


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
    assert runner.checkpoints("run") == [f"checkpoint-{n}" for n in (4, 5, 6)]
    early = str(runner.folder / "run/checkpoint-4")
    runner.fail_at(5)
    with pytest.raises(KeyboardInterrupt):
        runner("run", checkpoint_every_steps=1, keep_checkpoints=1, resume_from_checkpoint=early, learning_rate=0.5)
    assert runner.checkpoints("run") == ["checkpoint-5"]


def test_nothing_is_left_of_a_checkpoint_that_was_not_finished(runner, monkeypatch):
    def fail(*_, **__):
        raise OSError("no such device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", fail)
    with pytest.raises(OSError, match="no such device"):
        runner("run", checkpoint_every_steps=2)
    monkeypatch.undo()
    assert runner.checkpoints("run") == [] and not list((runner.folder / "run").glob(".partial*"))
    assert read_run(runner.folder / "run")["state"] == "failed"
    runner("run", checkpoint_every_steps=2, resume_from_checkpoint="latest")
    assert [step for step, _, _ in runner.metrics("run")] == [1, 2, 3, 4, 5, 6]


# Finished runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["checkpoints and final", "final", "checkpoints"])
def test_a_run_is_never_begun_in_the_folder_of_another(runner, leave):
    runner("run")
    for name, kept in (("final", "final" in leave), ("checkpoint-6", "checkpoints" in leave)):
        if not kept:
            (runner.folder / "run" / name).rename(runner.folder / name)
    before = {path: path.read_bytes() for path in (runner.folder / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"`output_dir` .* has a run already .*--resume_from_checkpoint latest"):
        runner("run", seed=1)
    after = {path: path.read_bytes() for path in (runner.folder / "run").rglob("*") if path.is_file()}
    assert before == after


def test_a_finished_run_is_extended_as_if_it_had_been_longer_and_its_final_model_is_kept(runner):
    options = {"checkpoint_every_steps": 0, "ema_decay": 0.5}
    whole = runner("whole", max_steps=6, **options)
    short = runner("run", max_steps=4, **options)
    assert runner.checkpoints("run") == ["checkpoint-4"]
    extended = runner("run", max_steps=6, resume_from_checkpoint="latest", **options)
    assert same(whole, extended) and runner.metrics("run") == runner.metrics("whole")
    for name, model in (("final", extended), ("final-4", short)):
        saved = torch.load(runner.folder / "run" / name / "weights.pt", weights_only=True)
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert read_run(runner.folder / "run") | {"options": None} == {
        "state": "finished",
        "step": 6,
        "final_step": 6,
        "options": None,
    }


def test_latest_in_a_finished_run_gives_its_model_and_changes_nothing(runner, caplog):
    first = runner("run", ema_decay=0.5)
    names = ("final/weights.pt", "metrics.jsonl", "checkpoint-6/trainer_state.json")
    before = [((runner.folder / "run" / name).read_bytes()) for name in names]
    runner.draws.clear()
    again = runner("run", ema_decay=0.5, resume_from_checkpoint="latest")
    assert same(first, again) and not runner.draws
    assert [((runner.folder / "run" / name).read_bytes()) for name in names] == before
    assert "The run has its 6 steps; with more --max_steps it goes on" in caplog.text


def test_latest_without_a_checkpoint_beside_a_final_model_is_an_error(runner):
    """As runs of earlier versions ended: going on would begin at 0 and overwrite the model."""
    runner("run")
    (runner.folder / "run/checkpoint-6").rename(runner.folder / "elsewhere")
    with pytest.raises(ValueError, match=r"has a final model of 6 steps, but no checkpoint to go on from"):
        runner("run", max_steps=15, resume_from_checkpoint="latest")


def test_a_run_killed_between_its_last_checkpoint_and_its_final_model_is_finished_by_resuming(runner, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Regression, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        runner("run")
    monkeypatch.undo()
    assert not (runner.folder / "run/final").exists()
    runner("run", resume_from_checkpoint="latest")
    assert (runner.folder / "run/final/weights.pt").is_file()


# What is not a number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(runner, accumulation):
    runner.at_step = {"spoil": 3}
    with pytest.raises(FloatingPointError, match=r"not finite .* at step 4\. .*checkpoint-2 is the last checkpoint"):
        runner("run", checkpoint_every_steps=2, keep_checkpoints=1, gradient_accumulation_steps=accumulation)
    assert runner.checkpoints("run") == ["checkpoint-2"]
    assert not (runner.folder / "run/final").exists()
    for line in (runner.folder / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_infinite_gradient_stops_the_run_too(runner):
    class Steep(Regression):
        def forward(self, inputs):
            return super().forward(inputs) * 1e19  # the loss is finite, the norm of its gradient is not

    with pytest.raises(FloatingPointError, match=r"not finite .* at step 1"):
        runner("run", model=Steep())


def test_a_step_that_is_not_a_number_is_skipped_and_counted_if_asked_for(runner):
    runner.at_step = {"spoil": 3}
    trained = runner("run", non_finite="skip", log_every_steps=6, ema_decay=0.5)
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    (line,) = map(json.loads, (runner.folder / "run/metrics.jsonl").read_text().splitlines())
    assert line["skipped_steps"] == 1 and line["loss"] > 0
    runner.at_step = {}
    runner.draws.clear()
    other = runner("clean", non_finite="skip", log_every_steps=6, ema_decay=0.5)
    assert not same(trained, other)


def test_skipping_steps_changes_no_good_run(runner):
    assert same(runner("one", non_finite="skip"), runner("other"))


def test_float16_trains_with_a_scaled_loss_and_resumes(runner):
    """The scale of the first steps overflows: those are left out and the scale is halved, which is no error."""
    options = {"mixed_precision": "fp16", "max_steps": 12}
    whole = runner("whole", **options)
    lines = [json.loads(line) for line in (runner.folder / "whole/metrics.jsonl").read_text().splitlines()]
    assert all("loss" in line for line in lines[-5:]) and not same(whole, Regression())
    runner("parts", **{**options, "max_steps": 7})
    assert same(whole, runner("parts", **options, resume_from_checkpoint="latest"))


# Resuming with other options -----------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_learning_rate_it_is_given_and_says_so(runner, caplog):
    runner("run", max_steps=3)
    runner("run", max_steps=6, learning_rate=0.5, resume_from_checkpoint="latest")
    assert [rate for _, _, rate in runner.metrics("run")] == [0.01] * 3 + [0.5] * 3
    assert "`learning_rate` was 0.01 and is 0.5: the new value counts from the next step on" in caplog.text
    assert "`max_steps` was 3 and is 6" in caplog.text
    assert "output_dir" not in caplog.text and "`resume_from_checkpoint`" not in caplog.text


def test_nothing_is_said_of_options_that_stayed(runner, caplog):
    runner.fail_at(4)
    with pytest.raises(KeyboardInterrupt):
        runner("run", checkpoint_every_steps=2)
    runner.at_step = {}
    caplog.clear()
    runner("run", checkpoint_every_steps=2, resume_from_checkpoint="latest", data_workers=1, log_every_steps=2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@needs_muon
@pytest.mark.parametrize("first, second", [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_resumed_with_another_optimizer_says_what_begins_anew(runner, caplog, first, second):
    runner("run", max_steps=3, optimizer=first)
    trained = runner("run", max_steps=6, optimizer=second, resume_from_checkpoint="latest")
    assert f"`optimizer` was '{first}' and is '{second}': its moments begin at zero" in caplog.text
    assert "The checkpoint has no moments of 2 of the weights; theirs begin at zero" in caplog.text
    assert all(value.isfinite().all() for value in trained.state_dict().values())


def test_an_average_that_the_checkpoint_lacks_begins_with_its_weights(runner, caplog):
    start = runner("run", max_steps=3)
    average = runner("run", max_steps=4, ema_decay=0.999999, resume_from_checkpoint="latest")
    assert "The checkpoint has no average of the weights" in caplog.text
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_another_model_is_named(runner):
    class Wider(Regression):
        def __init__(self):
            super().__init__()
            self.layers[3] = nn.Linear(8, 2)

    runner("run", max_steps=3)
    with pytest.raises(ValueError, match=r"checkpoint-3 is of another model: `layers\.3\.weight` has shape \(1, 8\)"):
        runner("run", model=Wider(), resume_from_checkpoint="latest")


@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_a_compiled_run_resumes_uncompiled_and_back(runner, monkeypatch, first, second):
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    compiled = []
    whole = runner("whole")
    runner("run", max_steps=3, compile=first)
    resumed = runner("run", compile=second, resume_from_checkpoint="latest")
    assert same(whole, resumed) and compiled == ["Regression"]
    saved = torch.load(runner.folder / "run/final/weights.pt", weights_only=True)
    assert saved.keys() == Regression().state_dict().keys()


def test_compiling_is_really_done(runner):
    compiled = runner("compiled", max_steps=2, model=Plain(), compile=True)
    plain = runner("plain", max_steps=2, model=Plain())
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


# Damage --------------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()], ids=["cut", "flipped bit", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(runner, caplog, name, damage):
    whole = runner("run", checkpoint_every_steps=2)
    damage(runner.folder / "run/checkpoint-6" / name)
    resumed = runner("run", max_steps=6, resume_from_checkpoint="latest")
    assert f"checkpoint-6/{name} is " in caplog.text and "the checkpoint before it is taken" in caplog.text
    assert same(whole, resumed)
    damage(runner.folder / "run/checkpoint-4" / name)
    explicit = str(runner.folder / "run/checkpoint-4")
    with pytest.raises(ValueError, match=rf"checkpoint-4/{name} is .*Take another checkpoint"):
        runner("run", resume_from_checkpoint=explicit)


def test_if_no_checkpoint_is_whole_the_run_does_not_begin_anew(runner):
    runner("run", checkpoint_every_steps=3)
    for name in ("checkpoint-3", "checkpoint-6"):
        cut(runner.folder / "run" / name / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no checkpoint is whole\. .*checkpoint-6.*; .*checkpoint-3"):
        runner("run", resume_from_checkpoint="latest")


def test_checkpoints_of_an_earlier_version_are_named(runner):
    folder = runner.folder / "run/checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="checkpoint-3 was written by an earlier version"):
        runner("run", resume_from_checkpoint="latest")


def test_a_last_line_that_was_cut_off_does_not_keep_a_run_from_going_on(runner):
    runner.fail_at(4)
    with pytest.raises(KeyboardInterrupt):
        runner("run", checkpoint_every_steps=4)
    runner.at_step = {}
    path = runner.folder / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 5, "lo\xe4')
    runner("run", checkpoint_every_steps=2, resume_from_checkpoint="latest")
    assert [step for step, _, _ in runner.metrics("run")] == [1, 2, 3, 4, 5, 6]


# Signals, locks, modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(runner, number, caplog):
    whole = runner("whole")
    runner.at_step = {3: lambda: os.kill(os.getpid(), number)}
    before = signal.getsignal(number)
    assert runner("run", checkpoint_every_steps=0) is None
    assert signal.getsignal(number) is before
    assert runner.checkpoints("run") == ["checkpoint-4"] and not (runner.folder / "run/final").exists()
    assert read_run(runner.folder / "run")["state"] == "interrupted"
    assert f"Stopped after 4 steps by {number.name}; go on with --resume_from_checkpoint latest" in caplog.text
    runner.at_step = {}
    assert same(whole, runner("run", resume_from_checkpoint="latest"))
    assert runner.metrics("run") == runner.metrics("whole")


@pytest.fixture
def heeds_ctrl_c():
    """Python's own handler of Ctrl-C, which it does not set where the program that started it ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_the_run_at_once(runner, heeds_ctrl_c):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    runner.at_step = {3: twice}
    with pytest.raises(KeyboardInterrupt):
        runner("run", checkpoint_every_steps=2)
    assert runner.checkpoints("run") == ["checkpoint-2"]


def test_two_runs_never_share_a_folder(runner):
    with locked(runner.folder / "run"), pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on"):
        runner("run")
    runner("run")


def test_what_a_run_writes_may_be_read_by_whom_the_umask_lets(runner):
    before = os.umask(0o027)
    try:
        runner("run", lambda model: torch.rand(1, 3, 4, 4), sample_every_steps=6)
    finally:
        os.umask(before)
    for path in (runner.folder / "run").rglob("*"):
        expected = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_batches_come_from_processes_too_when_a_signal_comes(runner):
    runner.at_step = {}
    seen = iter(range(100))
    hooks = {"begin_step": lambda step: os.kill(os.getpid(), signal.SIGTERM) if next(seen) == 2 else None}
    assert runner("run", hooks=hooks, data_workers=1, data_processes=True) is None
    assert runner.checkpoints("run") == ["checkpoint-3"]
    whole = runner("whole")
    assert same(whole, runner("run", data_workers=1, data_processes=True, resume_from_checkpoint="latest"))


def test_what_depends_on_the_draw_alone_may_be_made_anywhere(runner):
    draw = Draw(1, range(4, 8))
    assert torch.equal(runner.make_batch(draw).inputs, runner.make_batch(draw).inputs)
