"""The threads among which PyTorch divides its work on a CPU."""

import ctypes
import sys

SOFT = 1  # `omp_pause_soft`: what the threads leave behind stays


def release_cpu_threads() -> None:
    """
    End the threads that help the calling one, which gets new ones when it has work for them. For when another thread
    is about to compute.

    OpenMP gives each thread helpers of its own. Where there are more of them than processors, GNU's lets all of them
    sleep after each operation rather than spin until the next, which makes a small model slower. Where OpenMP
    is not found, nothing happens.
    """
    if sys.platform == "win32":  # has no table of all symbols
        return
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(SOFT)
