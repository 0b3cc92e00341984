"""`training_scripts/prepare_tokens.py` goes on where it was stopped, and makes what it would have made at once."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pipelines import IcetkVQModel
from cogview_pipelines.demo import Scope
from cogview_pipelines.training.data import pictures as checks
from cogview_pipelines.training.data import unfinished

from .. import child_processes as children
from ..utils import make_vq_model
from .conftest import as_arguments, load_script


class Stop(BaseException):
    """What ends a run, as Ctrl-C does."""


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_tokens")


@pytest.fixture(autouse=True)
def save_each_batch(monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures with a caption each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
    for index in range(7):
        Image.fromarray(pixels[index]).resize((48, 40), Image.Resampling.BILINEAR).save(folder / f"{index}.png")
    write_captions(folder, "a cat")
    return folder


def write_captions(folder, text):
    rows = [{"file": f"{index}.png", "en": f"{text} {index}"} for index in range(7)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(script, pictures, vqvae_folder, tmp_path):
    """Runs the script, and gives what it wrote by name."""

    def call(name="tokens", **options):
        own = {"image_folder": pictures, "captions": pictures / "captions.jsonl", "vqvae": vqvae_folder}
        own |= {"low_size": 32, "fine_size": 64, "batch_size": 2, "held_out_share": 0.3, "fit": "random"}
        own |= {"output_dir": tmp_path / name, **options}
        script.main(as_arguments({name: value for name, value in own.items() if value is not None}))
        return contents(tmp_path / name)

    return call


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def encoding(monkeypatch):
    """How many pictures were encoded in each call, one size after the other; `stop_at` a call that a stop comes in."""

    counter, encode = SimpleNamespace(calls=[], stop_at=None), IcetkVQModel.encode

    def counted(self, pixels, *arguments):
        if len(counter.calls) == counter.stop_at:
            raise Stop
        counter.calls.append(len(pixels))
        return encode(self, pixels, *arguments)

    monkeypatch.setattr(IcetkVQModel, "encode", counted)
    return counter


@pytest.fixture
def stopped(run, encoding):
    """Stops a run in its third batch."""

    def call(**options):
        encoding.calls, encoding.stop_at = [], 5
        with pytest.raises(Stop):
            run(**options)
        encoding.calls, encoding.stop_at = [], None

    return call


@pytest.mark.parametrize("kind", ["own pictures", "emoji scenes"])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_same_command_goes_on_and_writes_the_same_bytes(
    run, stopped, encoding, monkeypatch, tmp_path, capsys, kind, seconds
):
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", seconds)  # all is saved where a run ends by itself
    options = {}
    if kind == "emoji scenes":
        scope = Scope(("1f431", "1f42f", "1f34e"), ("noto",), ("blue", "white"), ("single", "pair"))
        scope.save(tmp_path / "scope.json")
        options = {"image_folder": None, "captions": None, "scope": tmp_path / "scope.json", "max_pairs": 4}
        options |= {"low_size": 24, "fine_size": 48, "other_colours_share": 0.5, "sentences": 2}
    whole = run("whole", **options)
    at_once = list(encoding.calls)
    assert len(at_once) >= 8
    assert set(whole) == {f"{part}{name}" for part in ("", "held_out/") for name in FILES}
    stopped(**options)
    (tmp_path / "tokens/.unfinished/.partial-000000004-000000006.safetensors").write_bytes(b"half")
    assert run(**options) == whole
    assert encoding.calls == at_once[4:]
    assert f"4 of {sum(at_once) // 2} pictures have tokens already" in capsys.readouterr().out
    stopped(**options)  # what is done already begins anew, and is there until it is
    assert whole.items() < contents(tmp_path / "tokens").items()


FILES = ("tokens.safetensors", "captions.jsonl")


def test_a_run_that_is_killed_at_any_change_goes_on_to_the_same_bytes(run, tmp_path):
    torch.set_num_threads(1)
    folder = tmp_path / "tokens"

    def call():
        run()
        return True

    number = children.count_changes(call, folder, writes=(".json", ".jsonl"))
    whole = contents(folder)
    assert number > 20
    for at in range(1, number, 3):
        shutil.rmtree(folder)
        assert children.kill_before_change(call, folder, at, writes=(".json", ".jsonl"))
        children.run(call)
        assert contents(folder) == whole, f"killed at change {at}"


@pytest.mark.parametrize("first", [0, 2])
def test_what_is_damaged_is_made_again_and_what_comes_after_it(run, stopped, encoding, tmp_path, caplog, first):
    whole = run("whole")
    at_once = list(encoding.calls)
    stopped()
    (tmp_path / f"tokens/.unfinished/{first:09d}-{first + 2:09d}.safetensors").write_bytes(b"damaged")
    assert run() == whole
    assert encoding.calls == at_once[first:] and "tokens of these pictures are made again" in caplog.text


def test_what_tokens_do_not_depend_on_may_change(run, stopped, encoding, pictures):
    stopped()
    write_captions(pictures, "a tiger")
    changed = {"held_out_share": 0.5, "skip_unreadable": True, "data_workers": 1}
    found = run(**changed)
    assert encoding.calls == [2, 2, 1, 1]
    assert found == run("whole", **changed)
    assert b"a tiger 0" in found["captions.jsonl"] + found["held_out/captions.jsonl"]


@pytest.mark.parametrize("kind", ["option", "picture", "fewer pictures", "image tokenizer"])
def test_what_would_make_other_tokens_is_told_with_what_to_do(run, stopped, encoding, pictures, tmp_path, kind):
    stopped()
    options, message = {}, "the pictures changed"
    if kind == "option":
        options, message = {"fit": "pad", "batch_size": 3}, "`batch_size` was 2 and is 3; `fit` was 'random' and is"
    elif kind == "picture":
        Image.new("RGB", (48, 40), "red").save(pictures / "6.png")
    elif kind == "fewer pictures":
        (pictures / "6.png").unlink()
        options["skip_unreadable"] = True
    else:
        make_vq_model(1).save_pretrained(tmp_path / "other")
        options, message = {"vqvae": tmp_path / "other"}, "the image tokenizer changed"
    with pytest.raises(ValueError, match=r"has tokens of a run that was stopped, and this one would") as error:
        run(**options)
    folder = tmp_path / "tokens/.unfinished"
    assert message in str(error.value) and f"or remove {folder} to begin anew" in str(error.value)
    assert not encoding.calls
    shutil.rmtree(folder)
    assert run(**options) == run("whole", **options)


def test_pictures_that_were_found_good_are_not_checked_again(run, stopped, monkeypatch):
    stopped()
    monkeypatch.setattr(checks, "read_picture", lambda *_: pytest.fail("read again"))
    run()


def test_an_image_tokenizer_may_be_elsewhere_meanwhile(run, stopped, encoding, vqvae_folder, tmp_path):
    stopped()
    shutil.copytree(vqvae_folder, tmp_path / "moved")
    run(vqvae=tmp_path / "moved")
    assert encoding.calls == [2, 2, 1, 1]
