"""What one running call of a pipeline has of its own, so that several can run at a time."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch

from .notifier import Callback, Notifier
from .outputs import StageStatistics
from .statistics import Meter

Function = TypeVar("Function", bound=Callable)

# The call in whose thread we are: inside of a callback, say.
_current: contextvars.ContextVar["Call | None"] = contextvars.ContextVar("current_call", default=None)


class GenerationInterrupted(RuntimeError):
    """A call was stopped from outside, by `pipe.interrupt = True`; nothing of it is kept."""


class Call:
    """
    One running call: whether it is to stop, whom it tells of its steps, and how long its stages take.

    Args:
        pipe ([`PipelineBase`]): Whose call it is.
        progress: Its progress bar.
        return_statistics (`bool`), callback, tensor_inputs: Arguments of the call.
    """

    def __init__(
        self,
        pipe,
        progress,
        return_statistics: bool = False,
        callback: Callback | None = None,
        tensor_inputs: Sequence[str] = (),
    ):
        self.pipe, self.progress, self.interrupted = pipe, progress, False
        self.callback, self.tensor_inputs = callback, tensor_inputs
        self._meter = Meter() if return_statistics else None

    @property
    def statistics(self) -> dict[str, StageStatistics] | None:
        """Of each stage so far; `None` if they are not asked for."""
        return None if self._meter is None else self._meter.stages

    def measure(self, stage: str) -> contextlib.AbstractContextManager:
        """What runs inside belongs to a stage, which bears the name of its component."""
        if self._meter is None:
            return contextlib.nullcontext()
        return self._meter.measure(stage, self.pipe._device_of(getattr(self.pipe, stage)))

    def count_pass(self, stage: str) -> None:
        """A model has read new tokens to write others."""
        if self._meter is not None:
            self._meter.count_pass(stage)

    def stop_if_interrupted(self) -> None:
        """
        Raises:
            GenerationInterrupted: If somebody asked this call to stop.
        """
        if self.interrupted:
            raise GenerationInterrupted("The call was stopped, because `interrupt` was set to True.")

    def expect(self, num_steps: int) -> None:
        """Add steps to the total of the progress bar."""
        self.progress.total += num_steps

    @contextlib.contextmanager
    def batch(self, image_indices: list[int], num_done: int = 0) -> Iterator[Notifier]:
        """
        Compute a batch of pictures, which tells the notifier of each step.

        If it fails, the progress bar goes back to where it was, for smaller batches to do the same steps.

        Args:
            image_indices (`list[int]`): Which of the call's pictures these are.
            num_done (`int`): Steps that they have behind them.
        """
        progress = self.progress
        before = progress.n, progress.total
        try:
            yield Notifier(self, image_indices, num_done)
        except BaseException:
            progress.n, progress.total = before
            progress.refresh()
            raise


class RunningCalls:
    """The calls of one pipeline that run now, in whichever threads."""

    def __init__(self):
        self._calls: set[Call] = set()
        self._was_interrupted = False  # whether the call that ended last was

    def __deepcopy__(self, memo: dict) -> "RunningCalls":
        return RunningCalls()  # a copy of a pipeline runs nothing

    def __bool__(self) -> bool:
        return bool(self._calls)

    @contextlib.contextmanager
    def enter(self, call: Call) -> Iterator[None]:
        """Count a call among those that run while it does."""
        self._calls.add(call)
        token = _current.set(call)
        try:
            yield
        finally:
            _current.reset(token)
            self._calls.discard(call)
            self._was_interrupted = call.interrupted

    def concerned(self) -> tuple[Call, ...]:
        """The calls that an interruption is meant for: in a callback the one that runs it, elsewhere all."""
        current = _current.get()
        return (current,) if current in self._calls else tuple(self._calls)

    @property
    def interrupted(self) -> bool:
        """Whether one of them is to stop; if none runs, whether the last one was stopped."""
        calls = self.concerned()
        return any(call.interrupted for call in calls) if calls else self._was_interrupted

    @interrupted.setter
    def interrupted(self, value: bool) -> None:
        self._was_interrupted = bool(value)
        for call in self.concerned():
            call.interrupted = bool(value)


# What other pipelines call their arguments, and what to pass here instead, where the call has it.
_FOREIGN = {
    "num_inference_steps": ("num_lopar_steps", "`num_lopar_steps` sets the passes of the last stage"),
    "seed": ("generator", "pass `generator=torch.Generator().manual_seed(seed)`"),
    "num_images": ("num_images_per_prompt", "pass `num_images_per_prompt`"),
    "latents": ("tokens", "pass `tokens`"),
    "mask": ("mask_image", "pass `mask_image`"),
}


def _refuse_foreign(parameters: Mapping[str, inspect.Parameter], given: Mapping[str, object]) -> None:
    """Say what an argument is called here; of any other name that is not known, Python tells."""
    for name in given:
        if name in _FOREIGN and name not in parameters:
            own, hint = _FOREIGN[name]
            if own not in parameters:
                hint = "leave it out: there is no such choice"
            raise TypeError(f"`{name}` is not an argument of this pipeline; {hint}.")


def inference(function: Function) -> Function:
    """
    For what users call: no gradients, and new tensors begin on the CPU, whatever `torch.set_default_device` says.

    Devices are those of the components; nothing else moves.
    """

    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def run(*args, **kwargs):
        _refuse_foreign(parameters, kwargs)
        # entered only where it is needed: it makes every operation a little slower
        on_cpu = torch.get_default_device().type != "cpu"
        with torch.no_grad(), torch.device("cpu") if on_cpu else contextlib.nullcontext():
            return function(*args, **kwargs)

    return cast(Function, run)


GenerationInterrupted.__module__ = "cogview_pipelines"
