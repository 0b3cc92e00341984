"""Working in batches that become smaller when memory runs out."""

import pytest
import torch

from cogview_pipelines.generation.batching import is_out_of_memory, run_in_batches, slices


def limited(limit, sizes, error=None):
    """Work that fails above a number of items at a time."""

    def work(batch):
        size = batch.stop - batch.start
        sizes.append(size)
        if size > limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return list(range(batch.start, batch.stop))

    return work


@pytest.mark.parametrize("count, batch_size, limit", [(10, 4, 4), (10, 8, 3), (7, 100, 1), (1, 1, 1), (0, 5, 5)])
def test_every_item_is_done_once_and_in_order(count, batch_size, limit):
    parts = run_in_batches(limited(limit, []), count, batch_size)
    assert [item for part in parts for item in part] == list(range(count))


def test_what_is_finished_is_not_done_again_and_batches_stay_small():
    sizes, more = [], []

    def work(batch):
        limit = 8 if batch.start == 0 else 2  # something else takes memory after the first batch
        return limited(limit, sizes)(batch)

    parts = run_in_batches(work, 20, 8, on_more_batches=more.append)
    assert sizes == [8, 8, 4, 2, 2, 2, 2, 2, 2]
    assert [len(part) for part in parts] == [8, 2, 2, 2, 2, 2, 2]
    assert len(parts) == len(slices(20, 8)) + sum(more)


def test_a_batch_that_is_tried_again_draws_the_same_numbers():
    def draw(limit):
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]

        def work(batch):
            noise = [torch.rand(3, generator=generator) for generator in generators[batch]]
            limited(limit, [])(batch)
            return torch.stack(noise)

        return torch.cat(run_in_batches(work, 6, 6, generators=generators))

    assert torch.equal(draw(1), draw(6))


def test_too_little_memory_for_one_is_the_error_it_was():
    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches(limited(0, []), 4, 4)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory.")])
def test_other_errors_pass_through_at_once(error):
    sizes = []
    with pytest.raises(type(error)):
        run_in_batches(limited(1, sizes, error), 4, 4)
    assert sizes == [4]


def test_the_allocator_of_the_cpu_runs_out_of_memory_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_tensors_of_a_failed_batch_are_free_before_the_next_one():
    class Big:
        alive = 0

        def __init__(self):
            Big.alive += 1

        def __del__(self):
            Big.alive -= 1

    seen = []

    def work(batch):
        seen.append(Big.alive)
        big = Big()
        limited(1, [])(batch)
        del big

    run_in_batches(work, 2, 2)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize(
    "error", [RuntimeError(), RuntimeError(1), RuntimeError("a mistake of ours"), ValueError("x")]
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error):
    assert not is_out_of_memory(error)
