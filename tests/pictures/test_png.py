import os
import stat
import time

import pytest
from PIL import Image

from cogview_pipelines.pictures.png import read_metadata, remove_unfinished, save_png

from .utils import exchanged_primaries, png_chunk, with_chunk

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


@pytest.mark.parametrize("step", ["encode", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail_to_encode(self, file, **arguments):
        file.write(b"half a picture")
        raise OSError("No space left on device")

    def fail_to_replace(source, target):
        assert os.path.exists(source)
        raise OSError("No space left on device")

    if step == "encode":
        monkeypatch.setattr(Image.Image, "save", fail_to_encode)
    else:
        monkeypatch.setattr(os, "replace", fail_to_replace)
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


def test_a_picture_can_be_written_without_metadata(tmp_path):
    save_png(Image.new("RGB", (3, 2), "red"), tmp_path / "a.png", None)
    assert read_metadata(tmp_path / "a.png") == {}
    assert b"cogview" not in (tmp_path / "a.png").read_bytes()


def test_the_file_says_that_it_is_srgb_and_has_no_other_profile(tmp_path):
    image = Image.new("RGB", (3, 2), "red")
    image.info["icc_profile"] = exchanged_primaries()
    save_png(image, tmp_path / "a.png", {})
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.info["srgb"] == 0
        assert "icc_profile" not in saved.info


def test_names_of_files_that_are_no_unicode_are_kept_as_escapes(tmp_path):
    save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png", {"inputs": {"file": "\udcff.png"}, "prompt": "\udcff"})
    assert read_metadata(tmp_path / "a.png") == read_metadata(tmp_path / "a.png") | {
        "inputs": {"file": "\udcff.png"},
        "prompt": "\\udcff",
    }


def test_metadata_are_read_beside_texts_of_any_size(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (1, 1)), path, METADATA)
    path.write_bytes(with_chunk(path.read_bytes(), b"tEXt", b"comment\0" + b"a" * (2**20 + 1)))
    assert read_metadata(path)["settings"] == METADATA["settings"]


def test_json_that_is_nested_deeply_stays_text(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (1, 1)), path, {"settings": "[" * 100_000})
    assert read_metadata(path)["settings"] == "[" * 100_000


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (1, 1)), path, METADATA)
    content = path.read_bytes()
    header = (60_000).to_bytes(4, "big") * 2 + content[24:29]
    path.write_bytes(content[:8] + png_chunk(b"IHDR", header) + content[33:])
    with pytest.raises(ValueError, match=r"a\.png has more than 178,956,970 pixels"):
        read_metadata(path)


def test_a_changed_byte_of_the_metadata_is_noticed(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (1, 1)), path, {"settings": {"style": "cool"}})
    path.write_bytes(path.read_bytes().replace(b"cool", b"pool"))
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(path)


@pytest.mark.parametrize("name", ["a.png", "虎" * 80 + ".png", "x" * 251 + ".png"])
def test_what_a_killed_writer_left_is_removed(tmp_path, monkeypatch, name):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", killed)  # not even tidying up
        with pytest.raises(KeyboardInterrupt):
            save_png(Image.new("RGB", (1, 1)), tmp_path / name, {})
    (left,) = tmp_path.iterdir()
    (tmp_path / ".mine.part").write_text("mine")
    remove_unfinished(tmp_path, ["other.png"])
    assert left.exists()  # somebody may be writing it
    remove_unfinished(tmp_path, [name])
    assert [path.name for path in tmp_path.iterdir()] == [".mine.part"]


def test_after_a_day_nobody_is_writing(tmp_path):
    for name, age in ((".a.png.01234567.part", 90_000), (".b.png.01234567.part", 80_000)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".b.png.01234567.part"]
