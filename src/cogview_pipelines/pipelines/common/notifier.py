"""Tells the progress bar and the caller's callback of each step."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline

if TYPE_CHECKING:
    from .calls import Call

Callback = Callable[[DiffusionPipeline, int, int, dict], dict | None]


class Notifier:
    """
    Counts the steps of one batch, for the progress bar and the caller's callback, and stops it if asked to.

    Args:
        call ([`Call`]): Which the batch belongs to.
        image_indices (`list[int]`): Which of the call's pictures these are.
        step (`int`): How many steps they have behind them.
    """

    def __init__(self, call: "Call", image_indices: list[int], step: int = 0):
        self.call, self.image_indices, self.step = call, image_indices, step

    def __call__(self, stage: str, timestep: int, tokens: torch.Tensor) -> torch.Tensor | None:
        """The tokens to go on with, `(batch_size, rows, columns)`, if the callback returns others."""
        call, changed = self.call, None
        call.progress.update()
        if call.callback is not None:
            tensors = {"tokens": tokens} if "tokens" in call.tensor_inputs else {}
            about = {"stage": stage, "image_indices": self.image_indices, **tensors}
            changed = self._changed(call.callback(call.pipe, self.step, timestep, about), tokens)
        self.step += 1
        call.stop_if_interrupted()
        return changed

    def _changed(self, returned: dict | None, tokens: torch.Tensor) -> torch.Tensor | None:
        if returned is None:
            return None
        if not isinstance(returned, dict):
            raise ValueError(
                "`callback_on_step_end` must return `None`, or a dictionary such as the one it gets, but returned "
                f"{type(returned).__name__}."
            )
        changed = returned.get("tokens")
        if changed is None or changed is tokens:
            return None
        if not isinstance(changed, torch.Tensor) or changed.shape != tokens.shape or changed.is_floating_point():
            raise ValueError(
                "`callback_on_step_end` must return `tokens` as whole numbers of the shape that it gets, "
                f"{tuple(tokens.shape)}."
            )
        changed = changed.to(tokens.device, tokens.dtype)
        most = self.call.pipe.vqvae.config.num_embeddings
        if not bool(((changed == tokens) | ((changed >= 0) & (changed < most))).all()):
            raise ValueError(
                f"`callback_on_step_end` must return `tokens` that are as they were, or from 0 to {most - 1}."
            )
        return changed
