"""Who hears of each step: the progress bar, and the caller's callback."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import DiffusionPipeline

from .calls import Call

Callback = Callable[[DiffusionPipeline, int, int, dict], None]


class Notifier:
    """
    Counts the steps of one batch, for the progress bar and the caller's callback, and stops it if asked to.

    Args:
        call ([`Call`]), progress, callback, tensor_inputs: Of the call.
        image_indices (`list[int]`): Which of the call's pictures these are.
        step (`int`): How many steps they have behind them.
    """

    def __init__(
        self,
        call: Call,
        progress,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
        image_indices: list[int],
        step: int = 0,
    ):
        self.call, self.progress, self.callback, self.tensor_inputs = call, progress, callback, tensor_inputs
        self.image_indices, self.step = image_indices, step

    def __call__(self, stage: str, timestep: int, tokens: torch.Tensor) -> None:
        self.progress.update()
        if self.callback is not None:
            tensors = {"tokens": tokens} if "tokens" in self.tensor_inputs else {}
            about = {"stage": stage, "image_indices": self.image_indices, **tensors}
            self.callback(self.call.pipe, self.step, timestep, about)
        self.step += 1
        self.call.stop_if_interrupted()


@contextlib.contextmanager
def progress_of_success(progress) -> Iterator[None]:
    """A progress bar goes back where it was if what runs inside fails."""
    done = progress.n
    try:
        yield
    except BaseException:
        progress.n = done
        raise
