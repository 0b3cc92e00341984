import logging
import struct

import pytest
import torch
from PIL import Image

from cogview_pipelines.training.data import pictures
from cogview_pipelines.training.data.pictures import PictureFolder, check_pictures

from ...pictures.utils import encode, exchanged_primaries


@pytest.fixture
def paths(tmp_path):
    """Three pictures in one colour each, the second of which is damaged."""
    for index, name in enumerate("abc"):
        Image.new("RGB", (20, 20), (0, 0, 100 * index)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])
    return sorted(tmp_path.glob("*.png"))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_broken_files_are_all_named_or_left_out(paths, caplog, num_workers):
    paths[0].write_bytes(b"text")
    with pytest.raises(
        ValueError, match=r"2 of 3 pictures cannot be read: .*a\.png is no .*b\.png is damaged.*--skip"
    ):
        check_pictures(paths, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        assert check_pictures(paths, True, num_workers) == [paths[2]]
    assert "a.png" in caplog.text and "b.png" in caplog.text
    paths[2].write_bytes(b"text")
    with pytest.raises(ValueError, match="None of the pictures can be read"):
        check_pictures(paths, True, num_workers)


def test_files_that_have_not_changed_are_checked_once(paths, tmp_path, monkeypatch):
    read, record = [], tmp_path / "run" / "pictures.jsonl"
    real = pictures.read_picture
    monkeypatch.setattr(pictures, "read_picture", lambda path: (read.append(path.name), real(path))[1])
    check_pictures(paths, True, record=record)
    assert sorted(read) == ["a.png", "b.png", "c.png"]
    Image.new("RGB", (30, 30)).save(paths[2])
    read.clear()
    assert check_pictures(paths, True, record=record) == [paths[0], paths[2]]
    assert sorted(read) == ["b.png", "c.png"]  # a bad file may be mended, and one has changed
    record.write_text('{"file": "cut o')
    read.clear()
    check_pictures(paths, True, record=record)
    assert sorted(read) == ["a.png", "b.png", "c.png"]


def test_a_file_that_breaks_later_is_replaced_by_the_next(paths):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"b\.png is damaged"):
        PictureFolder([paths[1]], 8).batch(1, None, 8, generator)
    batch = PictureFolder(paths[1:], 8, skip_unreadable=True).batch(6, None, 8, generator)
    assert (batch[:, 2] * 255).round().unique().tolist() == [200]


def test_pictures_to_train_on_are_in_the_colours_that_people_see(tmp_path):
    """Profiles are heeded, deep greys are scaled, and what is transparent is white."""
    files = {
        "a.png": encode(Image.new("RGB", (8, 8), "red"), icc_profile=exchanged_primaries()),
        "b.png": encode(Image.frombytes("I;16", (8, 8), struct.pack("<H", 40000) * 64)),
        "c.png": encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        "d.tif": encode(Image.new("F", (8, 8), 0.5), "TIFF"),
    }
    found = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        batch = PictureFolder([tmp_path / name], 8).batch(1, None, 8, torch.Generator())
        found[name] = (batch[0, :, 3, 3] * 255).round().tolist()
    assert found == {
        "a.png": pytest.approx([0, 0, 255], abs=1),
        "b.png": [156, 156, 156],
        "c.png": [255, 255, 255],
        "d.tif": [128, 128, 128],
    }


def test_windows_start_on_the_token_grid_and_stay_inside():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    pool = pictures.PicturePool(torch.stack([rows, columns, torch.zeros_like(rows)]).byte()[None])
    windows = (pool.batch(64, 16, 8, torch.Generator().manual_seed(0)) * 255).round().long()
    assert windows.shape == (64, 3, 16, 16)
    assert set(windows[:, 0, 0, 0].tolist()) == set(windows[:, 1, 0, 0].tolist()) == {0, 8, 16}
    assert (windows[:, 0, -1, 0] - windows[:, 0, 0, 0] == 15).all()
    assert pool.batch(2, None, 8, torch.Generator()).shape == (2, 3, 32, 32)
