"""Threads that help another one to compute."""

import sys
from pathlib import Path

import pytest
import torch

from cogview_pipelines.pipelines.common.cpu_threads import release_cpu_threads

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="counts the threads of OpenMP on Linux"
)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def num_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def test_helpers_end_and_come_again_when_there_is_work(two_threads):
    values = torch.rand(2**20, generator=torch.Generator().manual_seed(0))
    expected = values.exp()
    busy = num_threads()
    release_cpu_threads()
    released = num_threads()
    assert released < busy
    assert torch.equal(values.exp(), expected)
    assert num_threads() > released
    release_cpu_threads()
    release_cpu_threads()  # there are none
