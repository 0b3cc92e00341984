"""Batches that are made ahead, in order; what is in them is a function of the draw alone (draws.py)."""

import itertools
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def draw_indices(dataset_size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` indices below `dataset_size`, each drawn by itself: `(count,)` long."""
    return torch.randint(dataset_size, (count,), generator=generator)


def prefetch(
    make: Callable[[Item], Batch], items: Iterable[Item], num_workers: int = 1, processes: bool = False
) -> Generator[tuple[Item, Batch], None, None]:
    """
    Yield `(item, make(item))` in order while threads or processes prepare the next ones.

    Args:
        make (`Callable`): Makes the batch of an item, such as a step; it must not depend on other calls.
        items (`Iterable`): The items.
        num_workers (`int`, defaults to 1): Threads or processes, and so batches ahead; with 0 all runs in the caller.
        processes (`bool`, defaults to `False`):
            Processes instead of threads (only one thread runs Python at a time). Each holds what `make` needs, and
            batches come through shared memory.
    """
    if num_workers == 0:
        for item in items:
            yield item, make(item)
        return
    if processes:
        items, ahead = itertools.tee(items)
        # a generator of its own: the loader would draw from the global one, which dropout follows
        batches = DataLoader(
            _Made(make),
            batch_size=None,
            sampler=ahead,
            num_workers=num_workers,
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_loop,
        )
        yield from zip(items, batches)
        return
    pending: deque[tuple[Item, Future[Batch]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(make, item)))
                if len(pending) > num_workers:
                    item, future = pending.popleft()
                    yield item, future.result()
            while pending:
                item, future = pending.popleft()
                yield item, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal: the loop that ends by itself still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Made(Dataset, Generic[Item, Batch]):
    """What `make` makes of an item, for a `DataLoader`."""

    def __init__(self, make: Callable[[Item], Batch]):
        self.make = make

    def __getitem__(self, item: Item) -> Batch:
        return self.make(item)


def image_paths(folder: str | Path) -> list[Path]:
    """
    The pictures (PNG, JPEG, WebP) below a folder, sorted; without hidden files and folders, such as `._a.png`.

    Raises:
        ValueError: If there are none.
    """
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise ValueError(f"`{folder}` has no pictures ({', '.join(sorted(suffixes))}).")
    return paths
