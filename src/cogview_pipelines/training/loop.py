"""
The loop that the training scripts share.

It is written once because exact resuming, accumulation and clean stops are easy to get subtly wrong in copies. What
differs between the scripts (samples, loss, sample pictures, what happens between steps) they pass in as functions.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from .arguments import TrainConfig
from .averaging import make_average
from .background_saves import BackgroundSaves
from .checkpoints import (
    Clock,
    TrainingState,
    changed_options,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from .data.draws import Draw, derived_seed
from .data.prefetch import prefetch
from .distribution import DistributedModel
from .interruption import Interruption
from .logs import MetricsLog, save_samples
from .optimizers import LossScale, Optimizers, clip_gradients, gradient_norm, learning_rate, unscale
from .processes import Processes, make_accelerator, resolve
from .run_folder import locked, read_run, remove_leftovers, save_final, write_run

logger = logging.getLogger(__name__)

Pictures: TypeAlias = torch.Tensor | list[Image.Image]
Metrics = Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]


def train(
    config: TrainConfig,
    model: nn.Module,
    make_batch: Callable[[Draw], Any],
    compute_loss: Callable[[nn.Module, Any], tuple[torch.Tensor, Metrics]],
    loss_weight: Callable[[Any], float],
    make_samples: Callable[[nn.Module], Pictures | dict[str, Pictures]] | None = None,
    adamw_names: tuple[str, ...] = (),
    begin_step: Callable[[int], None] | None = None,
    finish: Callable[[nn.Module], None] | None = None,
    save: Callable[[nn.Module, Path], object] | None = None,
    validation: Mapping[str, Sequence[Any]] | None = None,
) -> nn.Module | None:
    """
    Train all parameters of a model that require a gradient.

    The loss of a step is the sum over all its forward passes, on all processes, of what `compute_loss` returns, over
    the sum of their `loss_weight`: a mean over all labels of the step, however they are spread.

    Args:
        config ([`TrainConfig`]): The knobs.
        model (`nn.Module`): The model, with `save_pretrained`.
        make_batch (`Callable`): Makes the batch of a [`Draw`], an object with `.to(device)`. It must depend on nothing
            else, so that a resumed run sees the batches that it would have seen.
        compute_loss (`Callable`): The loss of the model (as it is distributed) and a batch, summed over labels; and
            further scalars by name, each as a sum and a count.
        loss_weight (`Callable`): By how much the loss of a batch is divided to be a mean, such as its labels.
        make_samples (`Callable`, *optional*): Pictures made by the model in evaluation mode, or several sets by name.
        adamw_names (`tuple[str, ...]`): Parts of names of linear layers that Muon leaves to AdamW.
        begin_step (`Callable`, *optional*): Called with the number of updates so far before each forward pass.
        finish (`Callable`, *optional*): Called with the trained model, in evaluation mode, before it is saved.
        save (`Callable`, *optional*): Saves the trained model in a folder; default: its `save_pretrained`.
        validation (mapping, *optional*): Batches that are not trained on, by kind. Their mean loss, over all and of
            each kind, goes to the metrics every `evaluate_every_steps`, before the first step, and after the last.

    Returns:
        `nn.Module` or `None`: The trained model (the moving average, if there is one), also saved in
        `<output_dir>/final`; `None` if `max_minutes`, SIGTERM or Ctrl-C ended the run after a checkpoint, from which
        `resume_from_checkpoint` goes on.

    Raises:
        ValueError: If the options cannot work, or the folder has a run already, or one that is running.
        FloatingPointError: If loss or gradients are not finite and `non_finite` is `"stop"`: no checkpoint was saved
            since.
        OSError: If the disk is full.
    """
    config = resolve(config)
    accelerator = make_accelerator(config)
    processes = Processes(accelerator)
    with contextlib.ExitStack() as stack:
        lock = locked(config.output_dir)
        processes.main_first(lambda: stack.enter_context(lock) if processes.is_main else None)
        processes.main_first(lambda: remove_leftovers(config.output_dir))
        run = _Run(
            config, accelerator, processes, model, compute_loss, loss_weight, make_samples, adamw_names, begin_step
        )
        stack.callback(run.close)  # before the lock is given up
        run.validation = validation or {}
        found = run.resume()
        run.note("running")
        try:
            with Interruption() as interruption:
                finished = run.train(make_batch, interruption)
        except BaseException:
            with contextlib.suppress(OSError):
                run.note("failed")
            raise
        if not finished:
            run.note("interrupted")
            return None
        return run.finish(finish, save or _save_pretrained, nothing_to_do=found == config.max_steps)


def _save_pretrained(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


class _Run:
    """One run: what `train` was given, and what it makes of it."""

    def __init__(
        self, config, accelerator, processes, model, compute_loss, loss_weight, make_samples, adamw_names, begin_step
    ):
        self.config: TrainConfig = config
        self.accelerator: Accelerator = accelerator
        self.processes: Processes = processes
        self.compute_loss, self.loss_weight = compute_loss, loss_weight
        self.make_samples, self.begin_step = make_samples, begin_step
        self.distributed = DistributedModel(model, config, accelerator, processes)
        self.model = self.distributed.model
        optimizers = Optimizers(self.model, config, adamw_names)
        self.state = TrainingState(self.model, optimizers, make_average(self.model, config.ema_decay))
        self.scale = None
        if accelerator.mixed_precision == "fp16":
            self.scale = LossScale(interval=config.loss_scale_interval, patience=config.loss_scale_patience)
        self.watch = FiniteWatch(processes)
        self.validation: Mapping[str, Sequence[Any]] = {}
        self.last_checkpoint: Path | None = None
        self.background = BackgroundSaves(processes, config) if config.async_checkpoints else None

    @property
    def samples_per_step(self) -> int:
        return self.config.batch_size * self.processes.count * self.config.gradient_accumulation_steps

    def note(self, state: str, final_step: int | None = None) -> None:
        """Write the state of the run down."""
        if self.processes.is_main:
            write_run(self.config, state, self.state.step, final_step)

    def resume(self) -> int | None:
        """Load the checkpoint that the config asks for; its step, or `None`."""
        found = find_checkpoint(self.processes, self.config)
        if found is None:
            return None
        folder, content = found
        notes = load_checkpoint(folder, content, self.state)
        if self.scale is not None:
            self.scale.load(self.state.numbers)
        self.last_checkpoint = folder
        if self.processes.is_main:
            for line in [*changed_options(self.config, content["options"]), *notes]:
                logger.warning("Resuming from %s: %s", folder.name, line)
        return self.state.step

    # Steps -----------------------------------------------------------------------------------------------------------

    def train(self, make_batch: Callable[[Draw], Any], interruption: Interruption) -> bool:
        """All steps that are left; False if the run was interrupted before the last one."""
        config, state = self.config, self.state
        log = MetricsLog(self.accelerator, self.processes, config, state.step)
        clock = Clock(config)
        self.model.train()
        if state.step == 0 and self.validation:
            # a checkpoint keeps it: a stop may come before the first line
            state.numbers["validation_loss_before"] = self.validation_losses()["validation_loss"]
        if "validation_loss_before" in state.numbers and log.is_empty:
            log.note(validation_loss_before=state.numbers["validation_loss_before"])
        batches = prefetch(make_batch, self.draws(), config.data_workers, config.data_processes)
        with contextlib.closing(batches), contextlib.closing(log):
            while passes := list(islice(batches, config.gradient_accumulation_steps)):
                step = passes[0][0].step
                (weight,) = self.processes.sum([sum(self.loss_weight(batch) for _, batch in passes)])
                self.update(step, passes, weight, log)
                state.step, state.samples = step + 1, state.samples + self.samples_per_step
                if self.evaluation_due(state.step):
                    log.note(**self.validation_losses())
                log.end_step(state.step, learning_rate(config, step))
                self.show(state.step)
                # what one process was asked for, all do
                asked = (interruption.signal is not None, clock.time_is_over(), clock.checkpoint_due())
                flags = self.processes.sum([float(flag) for flag in (*asked, self.save_failed())])
                if flags[3]:
                    self.finish_save()
                ends = any(flags[:2]) and state.step < config.max_steps
                if ends or flags[2] or self.checkpoint_due(state.step):
                    self.save()
                    clock.saved()
                if ends:
                    self.finish_save()
                    if self.processes.is_main:
                        reason = "a signal" if flags[0] else "`max_minutes`"
                        logger.warning(
                            "Stopped after %d steps by %s; go on with --resume_from_checkpoint latest.",
                            state.step,
                            interruption.signal or reason,
                        )
                    return False
        self.finish_save()
        return True

    def draws(self) -> Iterator[Draw]:
        """What this process computes in the rest of the run, in order."""
        config, processes = self.config, self.processes
        for step in range(self.state.step, config.max_steps):
            first = self.state.samples + (step - self.state.step) * self.samples_per_step
            for micro_step in range(config.gradient_accumulation_steps or 1):
                start = first + (micro_step * processes.count + processes.index) * config.batch_size
                yield Draw(step, range(start, start + config.batch_size))

    def update(self, step: int, passes: list[tuple[Draw, Any]], total_weight: float, log: MetricsLog) -> None:
        """Forward and backward passes of a step, and the update of the weights."""
        config, optimizers = self.config, self.state.optimizers
        optimizers.set_learning_rate(learning_rate(config, step))
        finite = torch.ones((), dtype=torch.bool, device=self.processes.device)
        reports = []
        for number, (draw, batch) in enumerate(passes):
            batch = batch.to(self.processes.device)
            if self.begin_step is not None:
                self.begin_step(step)
            torch.manual_seed(derived_seed(config.seed, "forward", draw.samples[0]))  # dropout
            with self.distributed.synchronizing(number == len(passes) - 1):
                with self.distributed.autocast():
                    loss, metrics = self.compute_loss(self.distributed.forward, batch)
                scale = self.distributed.gradient_factor / max(total_weight, 1e-30)
                (loss * (scale * (self.scale.scale if self.scale is not None else 1.0))).backward()
            finite &= loss.detach().isfinite()
            reports.append((len(draw.samples), {"loss": (loss, self.loss_weight(batch)), **metrics}))
        gradients = optimizers.gradients()
        if self.scale is not None:
            unscale(gradients, self.scale.scale)
        norm = gradient_norm(gradients)
        if self.go_on(step, finite, norm):
            if config.max_grad_norm:
                clip_gradients(gradients, norm, config.max_grad_norm)
            optimizers.step()
            if self.state.average is not None:
                self.state.average.update(self.model)
            for num_samples, values in reports:
                log.add(num_samples, **values)
        else:
            log.skip()
        optimizers.zero_grad()

    def go_on(self, step: int, finite: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether to update the weights; see `non_finite`."""
        if self.scale is None and self.config.non_finite == "stop":
            self.watch.note(step, finite & norm.isfinite())  # looked at when it matters, so that nothing waits here
            return True
        is_finite = bool(norm.isfinite())
        if self.scale is not None:
            self.scale.update(is_finite)
        good = not self.processes.any(not (is_finite and bool(finite)))
        if not good:
            self.state.numbers["skipped_steps"] = self.state.numbers.get("skipped_steps", 0) + 1
        return good

    # Between steps ---------------------------------------------------------------------------------------------------

    def checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpoint_every_steps
        return step == self.config.max_steps or bool(every and step % every == 0)

    def evaluation_due(self, step: int) -> bool:
        every = self.config.evaluate_every_steps
        return bool(self.validation) and (step == self.config.max_steps or bool(every and step % every == 0))

    def validation_losses(self) -> dict[str, float]:
        """
        Mean losses over the labels of the validation batches, of all and of each kind, of the weights as they would be
        saved now. Every process computes all of them, so that none waits for another.
        """
        sums: dict[str, tuple[float, float]] = {}
        with self._as_saved():
            for kind, batches in self.validation.items():
                total = weight = 0.0
                for batch in batches:
                    batch = batch.to(self.processes.device)
                    with self.distributed.autocast():
                        loss, _ = self.compute_loss(self.distributed.forward, batch)
                    total, weight = total + float(loss), weight + self.loss_weight(batch)
                sums[f"validation_loss/{kind}"] = total, weight
        totals = (sum(total for total, _ in sums.values()), sum(weight for _, weight in sums.values()))
        sums = {"validation_loss": totals, **sums}
        return {name: total / max(weight, 1e-30) for name, (total, weight) in sums.items()}

    @contextlib.contextmanager
    def _as_saved(self) -> Iterator[None]:
        """The model in evaluation mode, with the weights that would be saved now, without a trace in the run."""
        average = self.state.average
        with (
            average.in_place_of_weights(self.model)
            if average is not None and average.started
            else contextlib.nullcontext(),
            self.distributed.evaluating(),
        ):
            yield

    def save(self) -> None:
        """Save a checkpoint, or begin to, if all losses since the last one were finite."""
        self.finish_save()
        self.watch.require_finite(self.last_checkpoint)
        if self.scale is not None:
            self.state.numbers.update(self.scale.state())
        if self.background is not None:
            self.background.begin(self.state)
        else:
            self.last_checkpoint = save_checkpoint(self.processes, self.config, self.state)
        self.note("running")

    def save_failed(self) -> bool:
        """Whether a save beside the training has failed, as [`finish_save`] will raise."""
        return self.background is not None and self.background.failed()

    def finish_save(self) -> None:
        """Wait for the save beside the training, if one is under way."""
        if self.background is not None:
            self.last_checkpoint = self.background.wait() or self.last_checkpoint

    def close(self) -> None:
        """Leave nothing at work."""
        if self.background is not None:
            self.background.close()

    def show(self, step: int) -> None:
        """Sample pictures, where they are due, made by all processes together, without a trace in the run."""
        every = self.config.sample_every_steps
        if self.make_samples is None or not every or step % every:
            return
        with self._as_saved():
            samples = self.make_samples(self.model)
        self.processes.main_first(lambda: save_samples(samples, self.config, step))

    def finish(
        self,
        finish: Callable[[nn.Module], None] | None,
        save: Callable[[nn.Module, Path], object],
        nothing_to_do: bool,
    ) -> nn.Module:
        """The trained model, saved."""
        config, step = self.config, self.state.step
        if self.state.average is not None:
            self.state.average.exchange(self.model)
        final = self.distributed.whole_model().eval()
        if finish is not None:
            finish(final)
        if nothing_to_do and read_run(config.output_dir).get("final_step") == step:
            if self.processes.is_main:
                logger.warning("The run has its %d steps; with more --max_steps it goes on.", step)
        else:
            self.processes.main_first(lambda: save_final(config.output_dir, step, functools.partial(save, final)))
        if self.processes.is_main and self.last_checkpoint in list_checkpoints(config.output_dir):
            remove_old_checkpoints(config, self.last_checkpoint)  # a stop may have left them
        self.note("finished", step)
        self.processes.wait()
        return final


@dataclass
class FiniteWatch:
    """
    The first step at which something was not finite, kept on the device until it is asked for.

    Args:
        processes ([`Processes`]): Who must agree.
    """

    processes: Processes
    first: torch.Tensor | None = None

    def note(self, step: int, finite: torch.Tensor) -> None:
        """Note a step and whether all was finite in it, a boolean scalar."""
        if self.first is None:
            self.first = torch.full((), -1, device=finite.device)
        self.first = torch.where((self.first < 0) & ~finite, step + 1, self.first)

    def require_finite(self, last_checkpoint: Path | None) -> None:
        """Raise `FloatingPointError` if something was not."""
        first = -1 if self.first is None else int(self.first)
        steps = [step for step in self.processes.gather(first) if step >= 0]
        if steps:
            after = f"{last_checkpoint.name} is the last checkpoint" if last_checkpoint else "there is no checkpoint"
            raise FloatingPointError(
                f"The loss or its gradient is not finite (NaN or infinite) at step {min(steps)}. Nothing was saved "
                f"since; {after}. Go on from it with a lower `learning_rate` or in another `mixed_precision`, or "
                "leave such steps out by `--non_finite skip`."
            )
