import os
import stat

import pytest
from PIL import Image

from cogview_pipelines.pictures.png import read_metadata, save_png

METADATA = {
    "prompt": '一只老虎, a "tiger"\nand 5',
    "seed": 2**63 - 1,
    "model": "5",
    "settings": {"style": None, "temperature": 0.1, "top_k": [1, 2]},
}


def test_metadata_comes_back_as_it_was(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (3, 2), "red"), path, METADATA)
    found = read_metadata(path)
    assert found.pop("Software").startswith("cogview_pipelines ")
    assert found == METADATA
    with Image.open(path) as image:
        assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0))


def test_a_prompt_that_looks_like_json_stays_text(tmp_path):
    save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png", {"prompt": "[1, 2]"})
    assert read_metadata(tmp_path / "a.png")["prompt"] == "[1, 2]"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, file, **arguments):
        file.write(b"half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (3, 2)), path, METADATA)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX systems")
def test_the_file_has_the_mode_of_other_new_files(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png", {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("keep", [0, 20, -10])
def test_a_file_that_was_cut_off_is_refused(tmp_path, keep):
    path = tmp_path / "a.png"
    save_png(Image.effect_noise((64, 64), 50).convert("RGB"), path, METADATA)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a complete PNG"):
        read_metadata(path)


def test_other_formats_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(ValueError, match="not a complete PNG"):
        read_metadata(tmp_path / "a.png")
