"""How much of a call's time previews take."""

import numbers
from time import perf_counter

import PIL.Image
import torch

# Devices on which a preview was made: the first one loads libraries, which says nothing about the next.
_warm_devices: set[torch.device] = set()


class PreviewBudget:
    """
    The previews of one call, which make it slower by a limited share. It begins when this is made.

    Args:
        max_share (`float`, *optional*): Time of the previews, as a share of the time of all else; `None`: no limit.
    """

    def __init__(self, max_share: float | None):
        self.max_share = max_share
        self._began = perf_counter()
        self._spent = 0.0
        # seconds per token of the last preview, by the number of tokens that a picture has
        self._costs: dict[int, float] = {}

    def allows(self, tokens: torch.Tensor) -> bool:
        """Whether there is time for a preview of `(num_images, rows, columns)` tokens; for the first there is."""
        if self.max_share is None:
            return True
        # the first of another size is judged by those before; the smaller cost more per token, so this is careful
        cost = self._costs.get(tokens[0].numel(), next(iter(self._costs.values()), 0.0))
        others = perf_counter() - self._began - self._spent
        return self._spent + cost * tokens.numel() < self.max_share * others

    def make(self, pipe, tokens: torch.Tensor, full: bool = False) -> list[PIL.Image.Image]:
        """
        The preview that a pipeline makes of tokens on the CPU: nothing that the device still computes counts, and not
        what is done once for a model.

        Args:
            pipe: The pipeline.
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`): Of a callback.
            full (`bool`): Decode them, instead of putting them together from patches.
        """
        if not full:
            began = perf_counter()
            pipe.code_patches()
            self._began += perf_counter() - began
        start = perf_counter()
        images = pipe.preview(tokens) if full else pipe.sketch(tokens)
        seconds = perf_counter() - start
        if pipe.vqvae.device in _warm_devices:
            self._spent += seconds
            self._costs[tokens[0].numel()] = seconds / tokens.numel()
        else:
            _warm_devices.add(pipe.vqvae.device)
            self._began += seconds
        return images


def check_share(max_preview_share: float | None) -> None:
    """Raise an error unless it is `None` or a number from 0 to 1."""
    if max_preview_share is None:
        return
    is_number = isinstance(max_preview_share, numbers.Real) and not isinstance(max_preview_share, bool)
    if not is_number or not 0 <= max_preview_share <= 1:  # true for nan, too
        raise ValueError(
            f"`max_preview_share` must be a number from 0 to 1, but is {max_preview_share!r}. Give 0.05 for 5 %, or "
            "None for every preview."
        )
