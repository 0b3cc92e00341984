"""Captioned pictures in lists, tars and Parquet files: what is read of them, and what is said of what cannot be."""

import csv
import io
import json
import tarfile

import pytest
from PIL import Image

from cogview_pipelines.training.data.captions import parse_captions
from cogview_pipelines.training.data.inputs import PictureRow, captions_of, find_parts, is_packed
from cogview_pipelines.training.data.selection import Filters, select, to_square


def picture(colour=(200, 0, 0), size=(40, 30), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def all_rows(folder, captions=None, shard_size=2):
    return [list(part.rows()) for part in find_parts(folder, captions, shard_size)]


# Captions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"caption": "a cat"}, {"en": ["a cat"]}),
        ({"text": "一只猫"}, {"zh": ["一只猫"]}),
        ({"text": ["a cat", " 一只 cat ", ""]}, {"en": ["a cat"], "zh": ["一只 cat"]}),
        ({"en": "a cat", "caption": "passed over", "zh": None}, {"en": ["a cat"]}),
    ],
)
def test_captions_have_the_language_of_their_letters_unless_the_row_says_it(row, expected):
    texts, num_blank = captions_of(row, "Row 1")
    assert texts == expected | {"weight": 1.0}
    assert num_blank == len([text for text in row.get("text", ()) if not text.strip()])


def test_weights_styles_and_targets_are_kept_as_in_a_list_of_captions():
    row = {"caption": "a cat", "weight": 2, "style": "oil painting", "targets": {"en": "cat"}, "width": 5}
    texts, _ = captions_of(row, "Row 1")
    line = json.dumps({**row, "en": "a cat"})
    assert texts == {**parse_captions(line, "Row 1").texts, "weight": 2.0}


@pytest.mark.parametrize(
    "row",
    [{}, {"caption": ""}, {"caption": None}, {"text": [1]}, {"text": {"a": 1}}, {"en": "  ", "zh": ["\u3000", ""]}],
)
def test_a_row_without_a_caption_is_named(row):
    with pytest.raises(ValueError, match="Row 7 has no caption"):
        captions_of(row, "Row 7")


HALF = "\\ud800 cat"  # of a surrogate pair, as JSON writes it


def test_half_of_a_surrogate_pair_is_a_problem_of_its_row_wherever_it_comes_from(tmp_path):
    line = f'{{"file_name": "a.png", "text": "{HALF}"}}'
    (tmp_path / "metadata.jsonl").write_text(line)
    assert all_rows(tmp_path)[0][0].problem.startswith("must have Unicode text in 'en'")
    path = write_tar(tmp_path / "a.tar", [("a.png", picture()), ("a.json", line.encode())])
    assert all_rows(path)[0][0].problem.startswith("must have Unicode text in 'en'")


def test_a_text_of_parquet_that_is_no_utf_8_is_a_problem_of_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([b"a cat", b"\xed\xa0\x80 cat", b"a dog"]).view(pyarrow.string())
    table = pyarrow.table({"image": pyarrow.array([picture()] * 3), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    (rows,) = all_rows(tmp_path)
    assert [row.problem for row in rows] == [None, "is not UTF-8 text", None]
    assert [row.texts.get("en") for row in rows] == [["a cat"], None, ["a dog"]]
    assert rows[1].place.startswith("Row 1 of")


@pytest.mark.parametrize(
    "row, texts, num_blank",
    [
        ({"en": ["", " a cat\t", "\n"]}, {"en": ["a cat"]}, 2),
        ({"en": "   ", "zh": "猫"}, {"zh": ["猫"]}, 1),
        ({"en": "", "zh": "猫"}, {"zh": ["猫"]}, 0),  # as tables have it where there is none
        ({"en": "   ", "caption": "a cat"}, {"en": ["a cat"]}, 0),
        ({"caption": " ", "text": ["a cat", None]}, {"en": ["a cat"]}, 1),
        ({"en": "a", "targets": {"en": ["b", " "]}}, {"en": ["a"], "targets": {"en": ["b"]}}, 1),
        ({"en": "a", "style": {"en": [" ink ", ""]}}, {"en": ["a"], "style": {"en": ["ink"]}}, 1),
        ({"en": "a", "style": "  "}, {"en": ["a"]}, 0),
    ],
)
def test_white_space_is_no_caption_and_what_is_left_out_is_counted(row, texts, num_blank):
    assert captions_of(row, "Row 1") == ({**texts, "weight": 1.0}, num_blank)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"en": "   "}, "Row 7 must be an object with captions"),
        ({"en": ["", " "], "zh": ""}, "Row 7 must be an object with captions"),
        ({"en": "a", "targets": {"en": " "}}, "`targets` of Row 7 must be an object with captions"),
    ],
)
def test_a_line_of_blank_captions_alone_is_one_without_a_caption(row, said):
    with pytest.raises(ValueError, match=said):
        parse_captions(json.dumps(row), "Row 7")


def test_a_caption_that_is_no_text_is_named():
    with pytest.raises(ValueError, match="Row 7 has a caption that is no text: 1"):
        captions_of({"text": ["a cat", 1]}, "Row 7")


# Lists ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_list_is_cut_into_parts_that_are_read_by_themselves(tmp_path, end):
    lines = [json.dumps({"file": f"{number}.png", "en": f"cat {number}"}) for number in range(5)]
    (tmp_path / "captions.jsonl").write_text("\ufeff" + end.join(lines), encoding="utf-8", newline="")
    parts = find_parts(tmp_path, tmp_path / "captions.jsonl", 2)
    rows = [list(part.rows()) for part in reversed(parts)][::-1]
    assert [[row.texts["en"] for row in part] for part in rows] == [
        [["cat 0"], ["cat 1"]],
        [["cat 2"], ["cat 3"]],
        [["cat 4"]],
    ]
    assert rows[1][0].content == tmp_path / "2.png" and "Row 2 of" in rows[1][0].place
    assert len({json.dumps(part.made_of()) for part in parts}) == 3


def test_wrong_lines_of_a_list_are_rows_with_a_problem(tmp_path):
    lines = [b'{"file": "a.png", "en": "a cat"}', b"{", b'{"en": "a"}', b'{"file": "a.png"}', b'"\xff"']
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    (rows,) = all_rows(tmp_path, tmp_path / "captions.jsonl", 9)
    said = ["is not JSON", "names no picture", "has no caption", "is not UTF-8 text"]
    assert rows[0].problem is None
    assert all(text in row.problem for text, row in zip(said, rows[1:], strict=True))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_folders_of_datasets_are_read_with_their_metadata(tmp_path, kind):
    rows = [{"file_name": f"{number}.png", "text": f"a cat, {number}\nand more"} for number in range(3)]
    with open(tmp_path / f"metadata.{kind}", "w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    assert is_packed(tmp_path)
    found = all_rows(tmp_path)
    assert [len(part) for part in found] == [2, 1]
    assert [row.texts["en"] for part in found for row in part] == [[row["text"]] for row in rows]
    assert found[1][0].content == tmp_path / "2.png"


def test_an_input_that_cannot_be_read_is_named(tmp_path):
    assert not is_packed(tmp_path)
    with pytest.raises(ValueError, match=r"`image_folder` .* must hold tars, Parquet files"):
        find_parts(tmp_path, None, 5)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="`shard_size` must be given"):
        find_parts(tmp_path, None, None)
    with pytest.raises(ValueError, match="is empty"):
        find_parts(tmp_path, None, 5)


# Archives ------------------------------------------------------------------------------------------------------------


def test_a_tar_of_img2dataset_is_read_sample_by_sample(tmp_path):
    note = json.dumps({"caption": "from json", "key": "000000001", "status": "success", "width": 40}).encode()
    write_tar(
        tmp_path / "00001.tar",
        [
            ("000000000.jpg", picture(kind="JPEG")),
            ("000000000.txt", "一只猫".encode()),
            ("000000000.json", json.dumps({"caption": "not this", "key": "0"}).encode()),
            ("000000001.png", picture()),
            ("000000001.json", note),
            ("sub/000000001.txt", b"of another sample"),
            ("._000000001.png", b"of a Mac"),
            ("sub/000000001.seg.png", b"another suffix"),
            ("000000002.txt", b"no picture"),
            ("000000003.png", picture()),
            ("000000004.png", picture()),
            ("000000004.txt", b"\xff"),
        ],
    )
    write_tar(tmp_path / "00000.tar", [("a.png", picture()), ("a.txt", b"first")])
    (tmp_path / "00001.parquet").write_bytes(b"img2dataset's list of the tar is not read")
    parts = find_parts(tmp_path, None, None)
    assert [part.path.name for part in parts] == ["00000.tar", "00001.tar"] and is_packed(tmp_path)
    rows = list(parts[1].rows())
    good = [row for row in rows if row.problem is None]
    assert [row.texts for row in good] == [
        {"zh": ["一只猫"], "weight": 1.0},
        {"en": ["from json"], "weight": 1.0},
    ]
    assert good[0].content[:2] == b"\xff\xd8" and good[1].content == picture()
    problems = {row.place.split(" ")[0]: row.problem for row in rows if row.problem is not None}
    assert problems["sub/000000001"] == "has no picture"
    assert problems["000000002"] == "has no picture" and problems["000000003"].startswith("has no caption")
    assert problems["000000004"].startswith("has a damaged text")


@pytest.mark.parametrize("damage", ["cut off", "other"])
def test_of_a_damaged_tar_whole_samples_are_read_and_the_rest_is_told(tmp_path, damage):
    members = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("txt", b"a cat"), ("png", picture()))]
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: 512 * 7 + 100] if damage == "cut off" else b"no tar at all" * 100)
    (rows,) = all_rows(path)
    assert [row.texts["en"] for row in rows[:-1]] == ([["a cat"]] if damage == "cut off" else [])
    assert rows[-1].problem.startswith("is damaged or cut off") and str(path) in rows[-1].place


def test_parquet_of_datasets_is_read_row_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "c.png").write_bytes(picture())
    rows = [
        {"image": {"bytes": picture(), "path": "a.png"}, "text": "a cat", "other": 1},
        {"image": {"bytes": None, "path": "c.png"}, "text": "一只猫", "other": 2},
        {"image": None, "text": "none", "other": 3},
        {"image": {"bytes": picture(), "path": None}, "text": None, "other": 4},
        {"image": {"bytes": None, "path": "../../etc/passwd"}, "text": "a cat", "other": 5},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (found,) = all_rows(tmp_path)
    assert found[0].content == picture() and found[0].texts == {"en": ["a cat"], "weight": 1.0}
    assert found[1].content == (tmp_path / "c.png").resolve() and found[1].texts["zh"] == ["一只猫"]
    assert [row.problem.split(" (")[0] for row in found[2:]] == [
        "has no picture",
        "has no caption",
        "names a picture outside of its folder: '../../etc/passwd'",
    ]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has no column of pictures"):
        all_rows(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"nothing")
    assert all_rows(tmp_path)[0][0].problem.startswith("is damaged or cut off")


# Selection -----------------------------------------------------------------------------------------------------------


def chosen(filters=None, content=None, texts=None, fit="crop", seed=0):
    row = PictureRow("Row 1", picture() if content is None else content, texts or {"en": ["a cat"], "weight": 1.0})
    return select(row, filters or Filters(), [8], fit, seed)


@pytest.mark.parametrize(
    "filters, reason",
    [
        (Filters(min_side=30), None),
        (Filters(min_side=31), "too_small"),
        (Filters(max_aspect=4 / 3), None),
        (Filters(max_aspect=1.3), "too_narrow"),
        (Filters(min_caption_length=5), None),
        (Filters(min_caption_length=6), "caption_length"),
        (Filters(max_caption_length=4), "caption_length"),
    ],
)
def test_filters_take_what_is_just_good_enough(filters, reason):
    assert chosen(filters).reason == reason


def test_of_several_captions_those_of_a_good_length_are_kept():
    texts = {"en": ["a", "a cat"], "zh": ["猫"], "style": {"en": ["x"]}, "weight": 2.0}
    assert chosen(Filters(min_caption_length=3), texts=texts).texts == {
        "en": ["a cat"],
        "style": {"en": ["x"]},
        "weight": 2.0,
    }


@pytest.mark.parametrize("content", [b"", b"text", picture()[:-30]])
def test_a_picture_that_cannot_be_read_is_told(content):
    one = chosen(content=content)
    assert one.reason == "unusable" and one.problem.startswith("Row 1: ")


def test_squares_are_the_middle_the_whole_or_a_place_that_the_seed_draws():
    image = Image.new("RGB", (90, 30))
    for column in range(90):
        for row in range(30):
            image.putpixel((column, row), (2 * column, 0, 0))
    red = [to_square(image, 30, "random", (0, number)).getpixel((15, 15))[0] for number in range(40)]
    assert min(red) < 60 and max(red) > 120 and len(set(red)) > 20  # columns 15 to 75 can be the middle
    assert to_square(image, 30, "random", (0, 3)).tobytes() == to_square(image, 30, "random", (0, 3)).tobytes()
    assert to_square(image, 30, "crop").getpixel((15, 15))[0] == pytest.approx(90, abs=1)
    assert to_square(image, 30, "pad").getpixel((15, 2)) == (255, 255, 255)
    small = to_square(image, 15, "random", (0, 3)).getpixel((7, 7))[0]
    assert small == pytest.approx(to_square(image, 30, "random", (0, 3)).getpixel((14, 14))[0], abs=4)
