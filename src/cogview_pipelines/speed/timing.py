"""Seconds, memory, and the speed of a machine."""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable

import torch

_SAMPLING_SECONDS = 0.005


def median_seconds(
    function: Callable[[], object],
    device: torch.device | str,
    limit: float = 1.0,
    *,
    warmup: int = 1,
    least: int = 3,
    most: int = 200,
) -> float:
    """
    Median time of a call.

    Args:
        function: What is measured.
        device (`torch.device`): It is waited for.
        limit (`float`): Seconds after which no further call is made.
        warmup, least, most (`int`): Calls before those that count, and the fewest and most that count.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for _ in range(warmup):
        function()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (time.perf_counter() - begin < limit and len(times) < most):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine_speed(device: torch.device | str, dtype: torch.dtype, limit: float = 1.0) -> tuple[float, float]:
    """Bytes per second of a copy (read plus written), and operations per second of a matrix product."""
    on_gpu = torch.device(device).type == "cuda"
    size, edge = (2**30, 8192) if on_gpu else (2**26, 1024)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.ones(edge, edge, device=device, dtype=dtype) for _ in range(2))
    bandwidth = 2 * size / median_seconds(lambda: target.copy_(source), device, limit)
    return bandwidth, 2 * edge**3 / median_seconds(lambda: a @ b, device, limit)


def resident_bytes() -> int | None:
    """Main memory of this process; `None` where the system does not tell as Linux does."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


class PeakMemory:
    """
    The most memory at any time inside of a `with` block, in `bytes`: on a GPU what tensors take, on a CPU how much the
    process has grown beyond `before`; `None` where that cannot be measured.

    Args:
        device (`torch.device`): Whose memory.
        before (`int`, *optional*): Of the process before there were any weights (default: at the start of the block).
    """

    def __init__(self, device: torch.device | str, before: int | None = None):
        self.device, self.before = torch.device(device), before
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._look()

    def _look(self) -> None:
        now = resident_bytes()
        if now is not None and self.before is not None:
            self.bytes = max(self.bytes or 0, now - self.before)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu" and resident_bytes() is not None:
            self.before = resident_bytes() if self.before is None else self.before
            self.bytes = 0
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._thread is not None:
            self._done.set()
            self._thread.join()
            self._look()
