"""Batches made ahead."""

import pytest
import torch

from cogview_pipelines.training.data.prefetch import image_paths, prefetch


@pytest.mark.parametrize("num_workers, processes", [(0, False), (1, False), (3, False), (0, True), (2, True)])
def test_prefetch_keeps_the_order_and_the_random_state(num_workers, processes):
    before = torch.get_rng_state()
    made = prefetch(lambda item: item * item, iter(range(7)), num_workers, processes)
    assert list(made) == [(i, i * i) for i in range(7)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetch_passes_errors_on(num_workers):
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda item: 1 // item, [1, 0], num_workers))


def test_image_paths_are_sorted_and_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no pictures"):
        image_paths(tmp_path)
    for name in ("b.png", "a.JPG", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_paths(tmp_path)] == ["a.JPG", "b.png"]


def test_hidden_files_and_folders_hold_no_pictures_to_train_on(tmp_path):
    for name in ("a.png", "._a.png", ".hidden/b.png", "c/d.png", "c/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in image_paths(tmp_path)] == ["a.png", "c/d.png"]
