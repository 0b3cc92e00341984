"""`training_scripts/stamps/stamps.py`: photographs with texts in both languages, and what of them a model draws."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageOps

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.training.arguments import parse_config

from .conftest import load_script
from .test_emoji_configs import CONFIG_CLASSES

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "stamps" / "stamps.py"
TEXTS = {
    "yak": "A yak.\nde.utf8=Ein Yak.\nzh_CN.utf8=一头犛牛。\n",
    "bee": "A bee.\nzh_CN.utf8=蜜蜂。\n",
    "bee-2": "A bee.\nzh_CN.utf8=另一只蜜蜂。\n",
    "other": "The other bee.\nzh_CN.utf8=蜜蜂。\n",
    "remark": "Penguins are winning!\nzh_CN.utf8=企鹅\n",
    "untranslated": "A crane.\nde.utf8=Ein Kranich.\n",
}


def save_stamps(folder):
    """Pictures and texts as the package has them."""
    folder.mkdir(parents=True)
    for index, (name, text) in enumerate(TEXTS.items()):
        picture = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse((20, 10, 60, 50), (40 * index, 200 - 30 * index, 90, 255))
        ImageDraw.Draw(picture).rectangle((20, 10, 30, 20), (200, 40 * index, 60, 255))  # not its own mirror image
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("stamps", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["stamps"] = module  # its named tuple looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stamps")
    save_stamps(folder / "animals")
    Image.new("RGB", (9, 9)).save(folder / "without_text.png")
    return folder


@pytest.fixture(scope="module")
def run(script, package):
    def call(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["stamps.py", *map(str, arguments), "--stamps", str(package)])
            script.main()

    return call


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run("make", "--num_backgrounds", 9, "--num_colours", 3, "--output_dir", folder)
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stamps_are_those_with_a_name_in_both_languages_once(script, package):
    found = script.find_stamps(package)
    assert [(stamp.english, stamp.chinese) for stamp in found] == [("a bee", "蜜蜂"), ("a yak", "犛牛")]


def test_pictures_are_composed_and_some_backgrounds_of_each_are_kept_for_the_test(script, made):
    rows, tests = read_rows(made / "captions.jsonl"), read_rows(made / "test.jsonl")
    assert len(rows) == 2 * (9 * 2 + 3) and len(tests) == 2 * 2
    assert not {row["file"] for row in rows} & {row["file"] for row in tests}
    for row in tests:
        name = ("a bee", "a yak")[row["stamp"]]
        assert row["en"] == f"{name} on a {row['background']} background"
        picture = Image.open(made / row["file"])
        assert picture.size == (240, 240) and picture.mode == "RGB"
        assert picture.getpixel((2, 2)) == script.BACKGROUNDS[row["background"]].rgb
        assert picture.getpixel((120, 120)) != picture.getpixel((2, 2))
        assert picture.getpixel((120, 30)) != picture.getpixel((2, 2))  # cut to what is shown, then made large
    for stamp, name in enumerate(("a bee", "a yak")):
        own = [row for row in rows if row["file"].startswith(f"{stamp:03d}")]
        backgrounds = {row["background"] for row in tests if row["stamp"] == stamp}
        assert not [row for row in own if any(background in row["file"] for background in backgrounds)]
        assert [row["en"] for row in own if len(row["en"]) == 1] == [[name]] * 3  # on colours without a name
        assert sum("mirrored" in row["file"] for row in own) == 9


def test_a_mirrored_picture_is_the_mirror_image(script, made):
    row = next(row for row in read_rows(made / "captions.jsonl") if "mirrored" in row["file"])
    mirrored, picture = (Image.open(made / row["file"].replace(part, "")) for part in ("", "-mirrored"))
    assert ImageOps.mirror(picture).tobytes() == mirrored.tobytes() != picture.tobytes()


def test_things_are_taken_from_the_whole_list(script, package):
    found = script.find_stamps(package)
    assert script.choose_stamps(Namespace(stamps=str(package), num_things=1)) == found[:1]
    assert script.choose_stamps(Namespace(stamps=str(package), num_things=9)) == found


def test_the_model_to_begin_with_knows_the_characters_of_the_texts(made):
    pipe = CogView2Pipeline.from_pretrained(made / "model")
    texts = [text for row in read_rows(made / "test.jsonl") for text in (row["en"], row["zh"])]
    assert not [part for text in texts for part in pipe.tokenizer.unknown_parts(text)]
    assert pipe.transformer.get_input_embeddings().weight.shape[0] >= len(pipe.tokenizer)


def test_true_pictures_are_read_as_what_they_are_and_others_are_not(script, package, made):
    rows, stamps = read_rows(made / "test.jsonl"), script.find_stamps(package)
    truth = [Image.open(made / row["file"]) for row in rows]
    assert script.read(truth, rows, stamps) == {"right": 1.0, "among_five": 1.0, "background": 1.0}
    colours = [script.BACKGROUNDS[row["background"]].rgb for row in rows]
    mirrored = [script.compose(stamps[row["stamp"]], colour, True) for row, colour in zip(rows, colours, strict=True)]
    assert script.read(mirrored, rows, stamps) == {"right": 1.0, "among_five": 1.0, "background": 1.0}
    exchanged = [script.compose(stamps[1 - row["stamp"]], colour) for row, colour in zip(rows, colours, strict=True)]
    assert script.read(exchanged, rows, stamps) == {"right": 0.0, "among_five": 1.0, "background": 1.0}
    other = ["black" if row["background"] != "black" else "white" for row in rows]
    grounds = [script.BACKGROUNDS[name].rgb for name in other]
    moved = [script.compose(stamps[row["stamp"]], ground) for row, ground in zip(rows, grounds, strict=True)]
    assert script.read(moved, rows, stamps)["background"] == 0.0


@pytest.mark.parametrize("options, keys", [((), ["en", "zh"]), (("--ceiling",), ["ceiling"])])
def test_what_a_model_draws_is_measured_and_shown(run, made, tmp_path, capsys, options, keys):
    run("measure", "--data", made, "--model", made / "model", "--low", "--num", 2, "--output_dir", tmp_path, *options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pictures"] == 2 and result["of"] == 2
    assert [key for key in ("en", "zh", "ceiling") if key in result] == keys
    assert all(set(result[key]) == {"right", "among_five", "background"} for key in keys)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == keys
    if options:
        assert result["ceiling"]["background"] == 1.0


@pytest.mark.parametrize(
    "name, kind",
    [("coglm", "coglm"), ("direct_sr", "direct_sr"), ("iterative_sr", "iterative_sr"), ("vq_decoder", "vq")],
)
def test_the_configs_of_the_trainings_go_on_from_the_model_with_its_pictures(name, kind):
    module, config_class = CONFIG_CLASSES[kind]
    arguments = ["--config", str(SCRIPT.with_name(f"{name}.yaml")), "--output_dir", "runs/any"]
    config = parse_config(getattr(load_script(module), config_class), arguments)
    component = {"vq": "vqvae", "coglm": "transformer"}.get(kind, f"{kind}_transformer")
    assert (config.transformer if kind == "iterative_sr" else config.init_from) == f"stamps/model/{component}"
    assert (config.image_folder if kind == "vq" else config.data) == ("stamps" if kind == "vq" else "data/stamps")


def test_an_empty_folder_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["stamps.py", "make", "--stamps", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match="apt-get install tuxpaint-stamps-default"):
        script.main()
