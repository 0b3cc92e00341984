"""How long the stages of a call take, and how much memory they need."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .outputs import StageStatistics

# Linux tells the peak of a process' memory in the first file; 5 in the second sets it back to what is used now.
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Seconds and peak memory of each stage of one call; a stage may come several times."""

    def __init__(self):
        self.stages: dict[str, StageStatistics] = {}
        self._is_measuring = False
        self._passes: dict[str, int] = {}

    def count_pass(self, stage: str) -> None:
        """One more pass of a stage that is being measured."""
        self._passes[stage] = self._passes.get(stage, 0) + 1

    @contextlib.contextmanager
    def measure(self, stage: str, device: torch.device) -> Iterator[None]:
        """What runs inside belongs to a stage that computes on a device; inside of another stage, to that one."""
        if self._is_measuring:
            yield
            return
        self._is_measuring = True
        can_measure = _restart_peak(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._is_measuring = False
            peak = _peak(device) if can_measure else None  # waits for the device
            seconds = time.perf_counter() - start
            before = self.stages.setdefault(stage, StageStatistics(0.0, peak))
            before.seconds += seconds
            before.num_passes = self._passes.get(stage)
            if peak is not None:
                before.peak_memory_bytes = max(before.peak_memory_bytes or 0, peak)


def _restart_peak(device: torch.device) -> bool:
    """Begin to look for the peak anew; False where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return device.type == "cpu"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return 1024 * int(kilobytes)
