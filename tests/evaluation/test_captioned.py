"""Lists of captions and true pictures, as files of the field hold them."""

import base64
import io
import json
import tarfile

import pytest
from PIL import Image

from cogview_pipelines.evaluation.captioned import Captioned, open_references, read_captions


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


COCO = '{"images": [{"id": 2, "file_name": "2.jpg"}], "annotations": [{"id": 1, "image_id": 2, "caption": "x"}]}'


def coco(path, per_image=2, images=5):
    path.write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in range(images)],
                "annotations": [
                    {"id": i * 10 + k, "image_id": i, "caption": f" caption {k}\n of {i} "}
                    for k in range(per_image)
                    for i in range(images)
                ],
            }
        )
    )
    return path


def test_jsonl_takes_the_usual_names_of_fields(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('\ufeff{"id": 7, "caption": "a"}\n{"prompt": "老虎\u2028", "file_name": "x/y.jpg"}\n', "utf-8")
    assert read_captions(path) == [Captioned("7", "a"), Captioned("000002", "老虎\u2028", "x/y.jpg")]


def test_coco_has_one_caption_for_each_picture_by_chance_but_the_same_on_every_machine(tmp_path):
    path = coco(tmp_path / "captions_val.json")
    rows = read_captions(path, seed=1)
    assert [row.picture for row in rows] == [f"COCO_{i}.jpg" for i in range(5)]
    assert rows == read_captions(path, seed=1)
    texts = {read_captions(path, seed=seed)[0].caption for seed in range(20)}
    assert texts == {"caption 0 of 0", "caption 1 of 0"}
    some = read_captions(path, 3, seed=1)
    assert len(some) == 3 and set(some) <= set(rows)
    assert {row.id for seed in range(20) for row in read_captions(path, 3, seed)} > {row.id for row in some}


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    path = coco(tmp_path / "captions.json")
    rows = read_captions(path)
    path.write_text(path.read_text(), "utf-8-sig")
    assert read_captions(path) == rows
    (tmp_path / "captions.tsv").write_text("7\ta cat\n", "utf-8-sig")
    assert read_captions(tmp_path / "captions.tsv") == [Captioned("7", "a cat")]


def test_tsv_of_two_columns_and_of_cogviews_four(tmp_path):
    two, four = tmp_path / "two.tsv", tmp_path / "four.tsv"
    two.write_text("1\ta cat\n2\t一只猫\n", "utf-8")
    picture = base64.urlsafe_b64encode(png("red")).decode()
    four.write_text(f"1\t-\ta cat\t{picture}\n2\t-\ta dog\t!!!!\n", "utf-8")
    assert read_captions(two) == [Captioned("1", "a cat"), Captioned("2", "一只猫")]
    rows = read_captions(four)
    assert rows == [Captioned("1", "a cat"), Captioned("2", "a dog")]
    references = open_references(four)
    assert references.read(rows[0]).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match=r"four\.tsv: 2 is no picture"):
        references.read(rows[1])
    with pytest.raises(ValueError, match="no picture of the id 9"):
        references.read(Captioned("9", "x"))
    with pytest.raises(ValueError, match="has no column of pictures"):
        open_references(two)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"id": "a"}\n', 'line 1 must have a text as "caption"'),
        ("a.jsonl", '{"id": "a", "caption": " "}\n', 'line 1 must have a text as "caption"'),
        ("a.jsonl", '{"id": "a", "caption": "\\ud800"}\n', 'line 1 must have Unicode text as "caption"'),
        ("a.jsonl", '{"id": "a", "caption": "x", "image": 3}\n', "has 3"),
        ("a.jsonl", '{"id": 1, "caption": "x"}\n{"id": "1", "caption": "y"}\n', "has the id '1' twice"),
        ("a.jsonl", "", "holds no captions"),
        ("a.jsonl", "[]\n", "line 1 must be a JSON object"),
        ("a.json", '{"images": []}', "no list of captions as COCO has them"),
        ("a.json", "[" * 100_000, "no list of captions as COCO has them"),
        ("a.json", '{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "x"}]}', "KeyError"),
        ("a.json", COCO.replace("x", "\\ud800"), 'annotation 1 must have Unicode text as "caption"'),
        ("a.json", COCO.replace("x", " "), 'annotation 1 must have a text as "caption"'),
        ("a.tsv", "1\n", "line 1 must have 2 or 4 columns, but has 1"),
        ("a.tsv", "1\t \n", "line 1 has no caption"),
        ("a.txt", "x", "must be a .jsonl, .json, .tsv file"),
    ],
)
def test_other_files_are_refused_by_name_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_more_than_there_are_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="captions of 5 different pictures, but 6 are asked for"):
        read_captions(coco(tmp_path / "c.json"), 6)


def test_pictures_of_folders_are_found_by_name_or_by_id(tmp_path):
    (tmp_path / "in").mkdir()
    for name, colour in {"a.png": "red", "in/b.png": "lime", "in/é.png": "blue", "._a.png": "white"}.items():
        (tmp_path / name).write_bytes(png(colour))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    references = open_references(tmp_path)
    assert references.read(Captioned("a", "")).getpixel((0, 0)) == (255, 0, 0)
    assert references.read(Captioned("x", "", "b.png")).getpixel((0, 0)) == (0, 255, 0)
    assert references.read(Captioned("x", "", "in/b.png")).getpixel((0, 0)) == (0, 255, 0)
    assert references.read(Captioned("e\u0301", "")).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match="no picture of the name nothing"):
        references.read(Captioned("nothing", ""))
    with pytest.raises(ValueError, match=r"broken.jpg is no picture"):
        references.read(Captioned("broken", ""))
    (tmp_path / "b.jpg").write_bytes(png("red"))
    with pytest.raises(ValueError, match="several pictures of the name b"):
        open_references(tmp_path).read(Captioned("b", ""))


def test_a_name_never_leads_out_of_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(png("red"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png("red"))
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(ValueError, match="no picture of the name"):
            open_references(tmp_path / "in").read(Captioned("x", "", name))


def test_pictures_of_webdataset_tars(tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for suffix, data in ((".png", png(("red", "lime")[number])), (".txt", b"text")):
                member = tarfile.TarInfo(f"{number:09d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for source in (tmp_path, [tmp_path / "00000.tar", tmp_path / "00001.tar"]):
        references = open_references(source)
        assert references.read(Captioned("000000001", "")).getpixel((0, 0)) == (0, 255, 0)
        assert references.read(Captioned("x", "", "000000000.png")).getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(ValueError, match="no picture of the name 5"):
            references.read(Captioned("5", ""))
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"cannot read .*bad\.tar"):
        open_references(tmp_path / "bad.tar")


def test_nothing_is_no_reference(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        open_references(tmp_path)
    with pytest.raises(ValueError, match="must be in a folder"):
        open_references(tmp_path / "x.zip")
