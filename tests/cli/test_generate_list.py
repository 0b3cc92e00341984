import json
import unicodedata

import pytest
from PIL import Image

from cogview_pipelines.cli import app, loading
from cogview_pipelines.cli.results import MANIFEST, only_writer
from cogview_pipelines.pictures import png
from cogview_pipelines.pictures.png import read_metadata
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline

from .conftest import LOW_SIZE, assert_bad_input
from .test_generate import TIGER, TIGER_ZH, look_the_same, pixels

CAT = "a cat on a red background."


@pytest.fixture
def batches(monkeypatch):
    """The prompts of each call of the pipeline."""
    calls = []
    call = CogView2Pipeline.__call__

    def recorded(self, prompt, **arguments):
        calls.append(prompt)
        return call(self, prompt, **arguments)

    monkeypatch.setattr(CogView2Pipeline, "__call__", recorded)
    return calls


def read_manifest(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]


def test_each_line_makes_its_picture_with_its_own_settings(cogview2, write_list, tmp_path):
    path = write_list(
        {"id": "tiger", "prompt": TIGER, "seed": 3},
        "",
        {
            "id": "老虎",
            "prompt": TIGER_ZH,
            "seed": 4,
            "style": "cool",
            "height": LOW_SIZE,
            "iterative_sr_top_k": [2] * 5,
            "temperature": 0.5,
        },
        {"id": 7, "prompt": CAT, "num_images_per_prompt": 2, "style": None},
    )
    out = tmp_path / "out"
    result = cogview2("generate", "--prompts", path, "--seed", 9, "--temperature", 0.9, "--output", out)
    assert result.exit_code == 0, result.output
    names = ["7-1.png", "7-2.png", "tiger.png", "老虎.png"]
    assert sorted(file.name for file in out.glob("*.png")) == names
    found = {name: read_metadata(out / name) for name in names}
    assert [found[name]["seed"] for name in names] == [9, 10, 3, 4]
    assert found["老虎.png"]["settings"]["style"] == "cool"
    assert found["tiger.png"]["settings"]["temperature"] == 0.9
    assert found["老虎.png"]["settings"]["temperature"] == 0.5
    assert pixels(out / "老虎.png").shape[0] == LOW_SIZE

    one = tmp_path / "one.png"
    cogview2("generate", TIGER, "--seed", 3, "--temperature", 0.9, "--output", one)
    assert look_the_same(one, out / "tiger.png")

    manifest = {entry["file"]: entry for entry in read_manifest(out)}
    assert sorted(manifest) == names
    for name in names:
        for key in ("prompt", "seed", "settings", "model", "dtype", "versions"):
            assert manifest[name][key] == found[name][key]
    assert manifest["7-2.png"]["id"] == "7"


def test_lines_with_the_same_settings_are_made_in_one_batch(cogview2, write_list, batches, tmp_path):
    lines = [{"id": f"n{index}", "prompt": f"a cat {index}", "height": LOW_SIZE} for index in range(5)]
    lines.insert(2, {"id": "other", "prompt": TIGER, "height": LOW_SIZE, "temperature": 0.5})
    cogview2("generate", "--prompts", write_list(*lines), "--max-batch-size", 3, "--output", tmp_path / "out")
    assert batches == [["a cat 0", "a cat 1", "a cat 2"], ["a cat 3", "a cat 4"], [TIGER]]


def test_a_list_that_was_stopped_goes_on_where_it_stopped(cogview2, write_list, batches, tmp_path, monkeypatch):
    lines = [{"id": f"n{i}", "prompt": f"a cat {i}", "seed": i, "height": LOW_SIZE} for i in range(5)]
    arguments = ("generate", "--prompts", write_list(*lines), "--max-batch-size", 2, "--output", tmp_path / "out")
    call = CogView2Pipeline.__call__

    def stopped(self, prompt, **settings):
        if prompt == ["a cat 2", "a cat 3"]:
            raise KeyboardInterrupt
        return call(self, prompt, **settings)

    monkeypatch.setattr(CogView2Pipeline, "__call__", stopped)
    assert cogview2(*arguments).exit_code != 0
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert sorted(made) == ["n0.png", "n1.png"]
    with open(tmp_path / "out" / MANIFEST, "a") as manifest:
        manifest.write('{"id": "n2", "fi')  # stopped in the middle of a line

    monkeypatch.setattr(CogView2Pipeline, "__call__", call)
    batches.clear()
    result = cogview2(*arguments)
    assert result.exit_code == 0, result.output
    assert "2 of 5" in result.stderr
    assert batches == [["a cat 2", "a cat 3"], ["a cat 4"]]
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in made} == made
    assert [entry["id"] for entry in read_manifest(tmp_path / "out")] == [f"n{index}" for index in range(5)]

    assert cogview2(*arguments).stdout == ""  # nothing is left to do
    assert len(read_manifest(tmp_path / "out")) == 5


def test_the_best_of_several_candidates_are_resumed_together(cogview2, write_list, batches, tmp_path):
    line = {"id": "a", "prompt": CAT, "num_images_per_prompt": 2, "num_candidates": 3, "seed": 5, "height": LOW_SIZE}
    arguments = ("generate", "--prompts", write_list(line), "--output", tmp_path)
    cogview2(*arguments)
    seeds = [read_metadata(tmp_path / f"a-{index}.png")["seed"] for index in (1, 2)]
    assert len(set(seeds)) == 2 and set(seeds) <= {5, 6, 7}
    assert cogview2(*arguments).stdout == ""
    assert batches == [[CAT]]
    (tmp_path / "a-2.png").unlink()
    cogview2(*arguments)
    assert [read_metadata(tmp_path / f"a-{index}.png")["seed"] for index in (1, 2)] == seeds
    assert sorted(entry["file"] for entry in read_manifest(tmp_path)) == ["a-1.png", "a-2.png"]
    other = write_list({**line, "num_candidates": 2})
    assert cogview2("generate", "--prompts", other, "--output", tmp_path).exit_code == 2


def test_a_damaged_picture_is_made_again(cogview2, write_list, tmp_path):
    arguments = ("generate", "--prompts", write_list({"id": "a", "prompt": CAT, "seed": 1}), "--output", tmp_path)
    cogview2(*arguments)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert cogview2(*arguments).stdout.split() == [str(tmp_path / "a.png")]
    assert (tmp_path / "a.png").read_bytes() == whole
    assert len(read_manifest(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"prompt": TIGER}, {"seed": 2}, {"temperature": 0.5}, {"style": "cool"}])
def test_a_picture_of_another_request_is_replaced_only_if_asked(cogview2, write_list, tmp_path, change):
    line = {"id": "a", "prompt": CAT, "seed": 1, "height": LOW_SIZE}
    cogview2("generate", "--prompts", write_list(line), "--output", tmp_path)
    first = (tmp_path / "a.png").read_bytes()
    path = write_list({**line, **change}, {"id": "b", "prompt": CAT})
    assert_bad_input(cogview2("generate", "--prompts", path, "--output", tmp_path), "a.png", "--overwrite")
    assert (tmp_path / "a.png").read_bytes() == first
    assert not (tmp_path / "b.png").exists()
    assert cogview2("generate", "--prompts", path, "--output", tmp_path, "--overwrite").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() != first
    assert sorted(entry["id"] for entry in read_manifest(tmp_path)) == ["a", "b"]


def test_pictures_whose_seed_was_drawn_by_chance_are_kept(cogview2, write_list, tmp_path):
    arguments = ("generate", "--prompts", write_list({"id": "a", "prompt": CAT}), "--output", tmp_path)
    cogview2(*arguments)
    seed = read_metadata(tmp_path / "a.png")["seed"]
    assert cogview2(*arguments).stdout == ""
    assert read_manifest(tmp_path)[0]["seed"] == seed


@pytest.mark.parametrize(
    "line, parts",
    [
        ("{", ["not JSON"]),
        ('["a"]', ["JSON object"]),
        ('{"id": "a", "prompt": "x", "temperature": NaN}', ["not JSON", "NaN"]),
        ({"prompt": CAT}, ["lacks `id`"]),
        ({"id": "b"}, ["lacks `prompt`"]),
        ({"id": "b", "prompt": "  "}, ["`prompt`", "empty"]),
        ({"id": "b", "prompt": 5}, ["`prompt`", "5"]),
        ('{"id": "b", "prompt": "\\ud800"}', ["`prompt`", "Unicode"]),
        ('{"id": "b", "prompt": "a\\u0000b"}', ["`prompt`", "NUL"]),
        ({"id": "b", "prompt": CAT, "colour": 1, "size": 2}, ["unknown fields: colour, size", "temperature"]),
        ({"id": "b", "prompt": CAT, "generator": 1}, ["unknown fields: generator"]),
        ({"id": "../b", "prompt": CAT}, ["`id`", "'../b'"]),
        ({"id": "/b", "prompt": CAT}, ["`id`", "'/b'"]),
        ({"id": ".b", "prompt": CAT}, ["`id`", "'.b'"]),
        ({"id": "a\\b", "prompt": CAT}, ["`id`"]),
        ({"id": "b\n", "prompt": CAT}, ["`id`"]),
        ({"id": "", "prompt": CAT}, ["`id`", "''"]),
        ({"id": "b" * 101, "prompt": CAT}, ["`id`", "100"]),
        ({"id": True, "prompt": CAT}, ["`id`", "True"]),
        ({"id": "good", "prompt": CAT}, ["`id`", "good.png", "line 1"]),
        ({"id": "GOOD", "prompt": CAT}, ["`id`", "'GOOD'", "line 1"]),
        ({"id": "many", "prompt": CAT}, ["many-2.png"]),
        ({"id": "b", "prompt": CAT, "seed": -1}, ["`seed`", "-1"]),
        ({"id": "b", "prompt": CAT, "seed": 1.5}, ["`seed`", "1.5"]),
        ({"id": "b", "prompt": CAT, "seed": True}, ["`seed`", "True"]),
        ({"id": "b", "prompt": CAT, "seed": "7"}, ["`seed`", "'7'"]),
        ({"id": "b", "prompt": CAT, "seed": 2**63}, ["`seed`"]),
        ({"id": "b", "prompt": CAT, "style": 3}, ["`style`", "3"]),
        ({"id": "b", "prompt": CAT, "temperature": "hot"}, ["`temperature`", "'hot'"]),
        ({"id": "b", "prompt": CAT, "temperature": -1}, ["`temperature`", "-1"]),
        ({"id": "b", "prompt": CAT, "text_attention_bias": "much"}, ["`text_attention_bias`", "'much'"]),
        ({"id": "b", "prompt": CAT, "height": 40.5}, ["`height`", "40.5"]),
        ({"id": "b", "prompt": CAT, "num_images_per_prompt": 0}, ["`num_images_per_prompt`", "0"]),
        ({"id": "b", "prompt": CAT, "iterative_sr_top_k": ["a"]}, ["`iterative_sr_top_k`", "'a'"]),
        ({"id": "b", "prompt": CAT, "num_lopar_steps": -1}, ["`num_lopar_steps`", "-1"]),
    ],
)
def test_one_bad_line_is_found_before_the_model_is_loaded(cogview2, write_list, no_model, tmp_path, line, parts):
    first = {"id": "good", "prompt": CAT}
    if parts == ["many-2.png"]:
        first, line = {"id": "many", "prompt": CAT, "num_images_per_prompt": 3}, {"id": "many-2", "prompt": CAT}
    path = write_list(first, "", line)
    result = cogview2("generate", "--prompts", path, "--output", tmp_path / "out")
    assert_bad_input(result, f"{path}, line 3:", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"style": "baroque"}, ["'baroque'", "cool"]),
        ({"height": 41}, ["41"]),
        ({"prompt": "cat " * 70}, ["64"]),
        ({"num_lopar_steps": 99}, ["99"]),
    ],
)
def test_a_line_that_the_model_cannot_do_is_found_before_anything_is_computed(
    cogview2, write_list, batches, tmp_path, change, parts
):
    path = write_list({"id": "good", "prompt": CAT}, {"id": "bad", "prompt": CAT, **change})
    result = cogview2("generate", "--prompts", path, "--output", tmp_path / "out")
    assert_bad_input(result, f"{path}, line 2:", *parts)
    assert batches == []
    assert list((tmp_path / "out").iterdir()) == []


def test_all_bad_lines_are_told_at_once(cogview2, write_list, no_model, tmp_path):
    path = write_list("{", {"id": "good", "prompt": CAT}, {"id": "b", "prompt": ""})
    result = cogview2("generate", "--prompts", path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split(":")[1].rsplit(" ", 1)[1] for line in lines] == ["1", "3"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_list_without_lines_or_in_another_encoding_is_refused(cogview2, no_model, tmp_path, content):
    path = tmp_path / "list.jsonl"
    path.write_bytes(content)
    assert_bad_input(cogview2("generate", "--prompts", path, "--output", tmp_path / "out"), path)


def test_the_output_of_a_list_must_be_a_folder(cogview2, write_list, no_model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"mine")
    path = write_list({"id": "a", "prompt": CAT})
    assert_bad_input(cogview2("generate", "--prompts", path, "--output", tmp_path / "a.png"), "folder", "a.png")


@pytest.fixture
def loaded(monkeypatch, pipeline):
    """The model is in memory already."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *arguments, **options: pipeline)


SMALL = {"height": LOW_SIZE, "seed": 1}


def test_a_name_that_is_too_long_is_told_before_anything_is_computed(cogview2, write_list, no_model, tmp_path):
    path = write_list({"id": "虎" * 84, "prompt": CAT, **SMALL}, {"id": "z", "prompt": CAT, **SMALL})
    result = cogview2("generate", "--requests", path, "--output", tmp_path / "out")
    assert_bad_input(result, f"{path}, line 1: ", "has 256 bytes, but may have 255")


def test_a_picture_that_cannot_be_written_stops_no_other(cogview2, write_list, loaded, tmp_path, monkeypatch):
    path = write_list(*({"id": id, "prompt": CAT, **SMALL} for id in ("a", "b", "c")))
    real = png.write_whole

    def write_whole(file, content):
        if file.name == "b.png":
            raise OSError(22, "Invalid argument")
        real(file, content)

    monkeypatch.setattr(png, "write_whole", write_whole)
    result = cogview2("generate", "--requests", path, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{path}, line 2: could not write: " in result.stderr and "1 of 3 lines failed" in result.stderr
    assert [row["id"] for row in read_manifest(tmp_path / "out")] == ["a", "c"]


def test_ids_and_files_keep_combining_marks(cogview2, write_list, loaded, tmp_path):
    ids = ["बाघ-चित्र", "เสือ-ฟ้า", unicodedata.normalize("NFD", "café")]
    path = write_list(*({"id": id, "prompt": CAT, **SMALL} for id in ids))
    assert cogview2("generate", "--requests", path, "--output", tmp_path / "out").exit_code == 0
    assert sorted(file.stem for file in (tmp_path / "out").glob("*.png")) == sorted(ids)


def test_rows_of_another_list_stay_whatever_their_prompts_hold(cogview2, write_list, loaded, tmp_path):
    prompt = "a cat\u2028on a\x85red background."
    for id in ("first", "second"):
        path = write_list({"id": id, "prompt": prompt, **SMALL})
        assert cogview2("generate", "--requests", path, "--output", tmp_path).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / MANIFEST).read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["id"], row["prompt"]) for row in rows] == [("first", prompt), ("second", prompt)]


def test_a_manifest_of_something_else_is_not_replaced(cogview2, write_list, loaded, tmp_path):
    (tmp_path / MANIFEST).write_text("mine\n")
    result = cogview2("generate", "--requests", write_list({"id": "a", "prompt": CAT}), "--output", tmp_path)
    assert_bad_input(result, tmp_path / MANIFEST, "line 1 is no JSON object")
    assert (tmp_path / MANIFEST).read_text() == "mine\n"


def test_a_report_that_cannot_be_printed_stops_nothing(cogview2, write_list, loaded, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    path = write_list(*({"id": id, "prompt": CAT, **SMALL} for id in ("a-1", "ñ-2", "c-3")))
    arguments = ["generate", "--requests", str(path), "--output", str(tmp_path / "out"), "--model", "shipped"]
    result = CliRunner(charset="gbk").invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted(file.stem for file in (tmp_path / "out").glob("*.png")) == ["a-1", "c-3", "ñ-2"]
    assert len(result.stdout.splitlines()) == 3


def test_two_lists_cannot_write_into_one_folder_at_once(cogview2, write_list, no_model, tmp_path):
    path = write_list({"id": "a", "prompt": CAT})
    with only_writer(tmp_path):
        result = cogview2("generate", "--requests", path, "--output", tmp_path)
    assert result.exit_code == 1
    assert "Another command writes into" in result.stderr


def test_what_a_killed_run_left_of_a_picture_is_removed(cogview2, write_list, loaded, tmp_path):
    for name in (".a.png.01234567.part", ".other.png.01234567.part"):
        (tmp_path / name).write_bytes(b"half a picture")
    path = write_list({"id": "a", "prompt": CAT, **SMALL})
    assert cogview2("generate", "--requests", path, "--output", tmp_path).exit_code == 0
    assert [file.name for file in tmp_path.glob(".*")] == [".other.png.01234567.part"]  # perhaps being written


def test_pictures_without_metadata_are_known_by_the_manifest(cogview2, write_list, loaded, batches, tmp_path):
    out = tmp_path / "out"
    path = write_list(*({"id": id, "prompt": CAT, **SMALL} for id in ("a", "b")))
    arguments = ("generate", "--requests", path, "--no-metadata", "--output", out)
    assert cogview2(*arguments).exit_code == 0
    assert read_metadata(out / "a.png") == {} and b"a cat" not in (out / "a.png").read_bytes()
    assert read_manifest(out)[0]["prompt"] == CAT
    batches.clear()
    assert cogview2(*arguments).exit_code == 0
    assert batches == []
    assert len(read_manifest(out)) == 2
    (out / "a.png").write_bytes((out / "b.png").read_bytes()[:-12] + b"\0\0\0\0IEND\xaeB`\x82")
    png.save_png(Image.new("RGB", (3, 3)), out / "b.png", None)  # another picture of this name
    assert_bad_input(cogview2(*arguments), out / "b.png", "was made from another request")


def test_pictures_that_were_deleted_leave_the_manifest(cogview2, write_list, tmp_path):
    call = ("--output", tmp_path / "out", "--height", LOW_SIZE)
    lines = [{"id": name, "prompt": "a cat", "seed": 1} for name in "ab"]
    assert cogview2("generate", "--prompts", write_list(*lines), *call).exit_code == 0
    (tmp_path / "out" / "a.png").unlink()
    assert cogview2("generate", "--prompts", write_list({**lines[0], "id": "c"}), *call).exit_code == 0
    rows = (tmp_path / "out" / "manifest.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["file"] for row in rows] == ["b.png", "c.png"]
