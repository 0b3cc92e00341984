"""Work through pictures a few at a time, and fewer at a time once memory runs out."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers.utils import logging

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the computer, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # of Accelerate; it can read no other errors than those that are texts
    return bool(error.args) and isinstance(error.args[0], str) and should_reduce_batch_size(error)


def slices(length: int, size: int) -> list[slice]:
    """`range(length)` in parts of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def run_in_batches(
    work: Callable[[slice], Result],
    count: int,
    batch_size: int,
    *,
    generators: Sequence[torch.Generator] = (),
    on_more_batches: Callable[[int], None] | None = None,
) -> list[Result]:
    """
    Results of `work(part)` for parts of `range(count)`, in order.

    When memory runs out in a part, what is finished is kept, and the rest goes on with half as many at a time.

    Args:
        work: Computes the part of a slice.
        count (`int`): How many there are in all.
        batch_size (`int`): The most at a time.
        generators (list of `torch.Generator`, *optional*): As many for each as for any other, in order; they are set
            back before a part is tried again, so that it draws the same numbers.
        on_more_batches (*optional*): Called with the number of additional parts when they become smaller.

    Raises:
        RuntimeError: The error of `work`, if there is no memory even for a single one.
    """
    results: list[Result] = []
    start, each = 0, len(generators) // max(count, 1)
    while start < count:
        batch = slice(start, min(start + batch_size, count))
        size = batch.stop - batch.start
        own = generators[batch.start * each : batch.stop * each]
        states = [generator.get_state() for generator in own]
        try:
            results.append(work(batch))
            start = batch.stop
            continue
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # outside of `except`: only now the error is gone, and with it the tensors of the frames it went through
        for generator, state in zip(own, states):
            generator.set_state(state)
        clear_device_cache(garbage_collection=True)
        left = count - start
        if on_more_batches is not None:
            on_more_batches(len(slices(left, size // 2)) - len(slices(left, batch_size)))
        batch_size = size // 2
        logger.warning(f"Memory ran out with {size} at a time; going on with {batch_size}.")
    return results
