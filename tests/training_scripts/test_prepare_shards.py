"""`training_scripts/prepare_tokens.py` with shards: the pictures of a folder's tokens, in parts, whatever happens."""

import io
import itertools
import json
import logging
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pipelines import IcetkTokenizer, IcetkVQModel
from cogview_pipelines.training.data import duplicates
from cogview_pipelines.training.data.tokens import TokenData

from .. import child_processes as children
from ..utils import COLOURS, NOUNS
from .conftest import as_arguments, load_script


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_tokens")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eleven pictures with captions, listed and, four each, in tars."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (11, 6, 8, 3), dtype=np.uint8)
    for number in range(11):
        Image.fromarray(pixels[number]).resize((64, 48), Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    rows = [{"file": f"{number:02d}.png", "en": f"a cat, {number}"} for number in range(11)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tars").mkdir()
    for start in range(0, 11, 4):
        with tarfile.open(folder / "tars" / f"{start // 4:05d}.tar", "w") as tar:
            for number in range(start, min(start + 4, 11)):
                for suffix, content in (
                    ("png", (folder / f"{number:02d}.png").read_bytes()),
                    ("txt", f"a cat, {number}".encode()),
                ):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def run(script, pictures, vqvae_folder, tmp_path):
    def call(output="tokens", listed=True, **options):
        source = {"image_folder": pictures, "captions": pictures / "captions.jsonl"}
        options = {
            **(source if listed else {"image_folder": pictures / "tars"}),
            "vqvae": vqvae_folder,
            "low_size": 32,
            "fine_size": 96,
            "batch_size": 3,
            "output_dir": tmp_path / output,
            **options,
        }
        script.main(as_arguments({name: value for name, value in options.items() if value is not None}))
        return tmp_path / output

    return call


def texts(data):
    return [row["en"][0] for row in data.captions[:]]


def same_tokens(one, other):
    """Nearly all: a batch of another size may round a near tie another way."""
    return (one[:] == other[:]).float().mean() > 0.97


def test_shards_of_a_list_and_of_tars_hold_what_the_folder_does(run, tokenizer, capsys):
    plain = TokenData.load(run("plain"), tokenizer)
    for options in ({"shard_size": 4}, {"listed": False}, {"listed": False, "data_workers": 2}):
        folder = run(f"shards{len(options)}{options.get('listed')}", **options)
        data = TokenData.load(folder, tokenizer)
        assert len(list(folder.glob("*.safetensors"))) == 3
        assert texts(data) == texts(plain) == [f"a cat, {number}" for number in range(11)]
        assert same_tokens(data.low, plain.low) and same_tokens(data.fine, plain.fine)
    index = json.loads((folder / "index.json").read_text())
    assert index["num_codes"] == 48 and index["num_pictures"] == 11
    assert index["picture_sizes"] == {"low_size": 32, "fine_size": 96, "compression_rate": 8}
    said = capsys.readouterr().out
    assert "made 3 shards with 11 pictures" in said and "11 pictures of 11 rows are in" in said


def test_it_is_killed_at_any_time_and_goes_on_to_the_same_shards(run, tmp_path):
    torch.set_num_threads(1)
    target = tmp_path / "tokens"

    def call():
        run(shard_size=6, fine_size=0)
        return True

    def contents():
        return {path.name: path.read_bytes() for path in target.iterdir() if path.suffix in (".json", ".safetensors")}

    number = children.count_changes(call, target, writes=(".json",))
    whole = contents()
    assert number > 10 and len(whole) == 5
    for at in range(1, number, 4):
        shutil.rmtree(target)
        assert children.kill_before_change(call, target, at, writes=(".json",))
        children.run(call)
        assert contents() == whole, f"killed at change {at}"
        assert not list(target.glob(".partial*"))


def test_shards_that_are_there_are_not_made_again_and_other_options_are_refused(run, monkeypatch, capsys):
    folder = run(listed=False)
    (folder / "00001.safetensors").unlink()
    (folder / "00001.json").unlink()
    encoded = []
    encode = IcetkVQModel.encode
    monkeypatch.setattr(
        IcetkVQModel, "encode", lambda self, pixels, *a: (encoded.append(len(pixels)), encode(self, pixels, *a))[1]
    )
    run(listed=False)
    assert sum(encoded) == 2 * 4 and "2 were there already" in capsys.readouterr().out  # two sizes of four pictures
    with pytest.raises(ValueError, match=r"shards that were made otherwise \(`fit` was 'crop' and is 'pad'\)"):
        run(listed=False, fit="pad")


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.csv"])
def test_pictures_without_a_line_are_counted_once_by_whoever_writes_the_index(name, run, pictures, tmp_path, capsys):
    """A line names its picture also where its captions, or the picture, cannot be used."""
    folder = tmp_path / "some"
    (folder / "more").mkdir(parents=True)
    for picture in ("00.png", "01.png", "02.png", "03.png", "04.png", "more/05.PNG"):
        shutil.copyfile(pictures / picture[-6:].lower(), folder / picture)
    (folder / ".hidden.png").write_bytes(b"never read")
    (folder / "03.png").write_bytes(b"no picture")
    if name.endswith(".csv"):
        lines = ["file_name,caption", "00.png,a cat", "more/../01.png,a cat", "02.png,", "03.png,a cat"]
    else:
        rows = [("00.png", "a cat"), ("more/../01.png", "a cat"), ("02.png", " "), ("03.png", "a cat")]
        lines = [json.dumps({"file": file, "en": caption}) for file, caption in rows]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    captions = folder / name if name.endswith(".jsonl") else None
    options = {"image_folder": folder, "captions": captions, "shard_size": 2, "skip_unreadable": True, "fine_size": 0}
    said = []
    for worker in ("1/2", "2/2"):
        run(worker=worker, **options)
        said.append(capsys.readouterr().out)
    assert "no line names them" not in said[0]
    assert said[1].count(f"2 pictures in {folder} were left out: no line names them.") == 1


def test_workers_make_a_part_each_and_the_last_writes_the_index(run, tokenizer, capsys):
    whole = TokenData.load(run("whole", listed=False), tokenizer)
    folder = run("shared", listed=False, worker="2/2")
    assert [path.name for path in folder.glob("*.safetensors")] == ["00001.safetensors"]
    assert "Other workers have not finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no index\.json: they are not finished"):
        TokenData.load(folder, tokenizer)
    run("shared", listed=False, worker="1/2")
    data = TokenData.load(folder, tokenizer)
    assert texts(data) == texts(whole) and torch.equal(data.low[:], whole.low[:])
    for worker in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(ValueError, match="`worker` must be I/N with I from 1 to N"):
            run("other", listed=False, worker=worker)


def test_what_is_left_out_is_counted_over_all_starts(run, pictures, tmp_path, tokenizer, capsys, caplog):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(6):
        shutil.copy(pictures / f"{number:02d}.png", folder)
    Image.new("RGB", (64, 20)).save(folder / "narrow.png")
    Image.new("RGB", (10, 10)).save(folder / "small.png")
    (folder / "broken.png").write_bytes(b"text")
    shutil.copy(folder / "00.png", folder / "again.png")
    names = ["00", "01", "narrow", "broken", "02", "small", "again", "03", "04", "05"]
    rows = [{"file": f"{name}.png", "en": f"a cat of {name}"} for name in names] + [{"file": "05.png", "en": "a"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "image_folder": folder,
        "captions": folder / "captions.jsonl",
        "shard_size": 4,
        "min_side": 20,
        "max_aspect": 2,
        "min_caption_length": 3,
        "drop_duplicates": True,
    }
    with pytest.raises(ValueError, match=r"broken\.png.*leave such out by --skip_unreadable"):
        run(**options)
    with caplog.at_level(logging.WARNING):
        target = run(**options, skip_unreadable=True)
    (target / "00001.json").unlink()  # as after a kill: the first shard is there, and its pictures are known
    again = run(**options, skip_unreadable=True)
    assert "broken.png" in caplog.text
    said = capsys.readouterr().out.splitlines()[-6:]
    assert "6 pictures of 11 rows" in said[0]
    assert [line.split(" left out")[0] for line in said[1:]] == ["1", "1", "1", "1", "1"]
    assert texts(TokenData.load(again, tokenizer)) == [f"a cat of 0{number}" for number in range(6)]


def test_blank_captions_are_left_out_and_counted_over_all_starts(run, pictures, tmp_path, tokenizer, capsys):
    rows = [{"file": f"{number:02d}.png", "en": ["", f"a cat, {number} "]} for number in range(3)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"captions": tmp_path / "captions.jsonl", "shard_size": 2, "fine_size": 0}
    folder = run(**options)
    run(**options)  # finds all shards made
    assert capsys.readouterr().out.count("3 blank captions were left out.") == 2
    assert texts(TokenData.load(folder, tokenizer)) == ["a cat, 0", "a cat, 1", "a cat, 2"]


@pytest.fixture
def repeated(pictures, tmp_path):
    """Nine lines in three shards of three, some with the bytes of earlier ones, in the same shard and in others."""
    folder = tmp_path / "repeated"
    folder.mkdir()
    originals = [0, 1, 0, 2, 1, 3, 3, 0, 4]
    rows = []
    for number, original in enumerate(originals):
        shutil.copy(pictures / f"{original:02d}.png", folder / f"{number}.png")
        rows.append({"file": f"{number}.png", "en": f"number {number}", "weight": 1 + number % 3, "style": "ink"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "image_folder": folder,
        "captions": folder / "captions.jsonl",
        "shard_size": 3,
        "drop_duplicates": True,
        "fine_size": 0,
        "held_out_share": 0.3,
    }


FIRST_COPIES = [0, 1, 3, 5, 8]


def test_of_pictures_that_several_workers_meet_the_first_stays_as_with_one(run, repeated, tokenizer, capsys):
    alone, shared = run("alone", **repeated), None
    for worker in ("3/3", "1/3", "2/3"):
        shared = run("shared", **repeated, worker=worker)
    for name in ("", "held_out"):
        one, other = (TokenData.load(folder / name, tokenizer) for folder in (alone, shared))
        assert texts(one) == texts(other) and same_tokens(one.low, other.low)
        assert [one.draw(torch.Generator().manual_seed(n)) for n in range(30)] == [
            other.draw(torch.Generator().manual_seed(n)) for n in range(30)
        ]
        assert other.has_styles
    kept = [text for name in ("", "held_out") for text in texts(TokenData.load(shared / name, tokenizer))]
    assert sorted(kept) == [f"number {number}" for number in FIRST_COPIES] and len(texts(one))
    assert capsys.readouterr().out.count("4 left out: pictures that are there already.") == 2
    before = {path.name: path.stat().st_mtime_ns for path in shared.glob("*.safetensors")}
    run("shared", **repeated, worker="1/3")  # nothing is left to do
    assert {path.name: path.stat().st_mtime_ns for path in shared.glob("*.safetensors")} == before


def test_a_worker_that_is_killed_while_it_takes_out_copies_goes_on_to_the_same_shards(run, repeated, tmp_path):
    torch.set_num_threads(1)
    options = {**repeated, "held_out_share": 0.0}
    target = tmp_path / "tokens"
    for worker in ("1/3", "2/3"):
        run(**options, worker=worker)
    before = tmp_path / "before"
    shutil.copytree(target, before)

    def call():
        run(**options, worker="3/3")
        return True

    def contents():
        return {path.name: path.read_bytes() for path in target.iterdir() if path.suffix in (".json", ".safetensors")}

    number = children.count_changes(call, target, writes=(".json",))
    whole = contents()
    assert {"index.json", "00002.safetensors"} <= whole.keys() and number > 10
    for at in range(1, number, 4):
        shutil.rmtree(target)
        shutil.copytree(before, target)
        assert children.kill_before_change(call, target, at, writes=(".json",))
        for worker in ("1/3", "2/3", "3/3"):
            children.run(lambda worker=worker: bool(run(**options, worker=worker)))
        assert contents() == whole, f"killed at change {at}"


def test_copies_are_found_whatever_is_looked_at_together(run, repeated, tokenizer, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_HASHES", 2)
    for worker in ("1/3", "2/3", "3/3"):
        folder = run(**{**repeated, "held_out_share": 0.0}, worker=worker)
    assert texts(TokenData.load(folder, tokenizer)) == [f"number {number}" for number in FIRST_COPIES]


def test_held_out_pictures_are_drawn_by_their_content_and_are_in_no_other_shard(run, tokenizer):
    folder = run(shard_size=4, held_out_share=0.4)
    kept, held_out = (TokenData.load(path, tokenizer) for path in (folder, folder / "held_out"))
    assert sorted(texts(kept) + texts(held_out), key=lambda text: int(text[7:])) == [f"a cat, {n}" for n in range(11)]
    assert len(held_out) and held_out.fine.shape[1:] == (12, 12)
    other = run("other", shard_size=5, held_out_share=0.4)  # cut otherwise
    assert texts(TokenData.load(other / "held_out", tokenizer)) == texts(held_out)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_side": 5}, "`min_side` is for token shards. Give `shard_size`, too"),
        ({"drop_duplicates": True}, "`drop_duplicates` is for token shards"),
        ({"shard_size": 0}, "`shard_size` must be at least 1, but is 0"),
        ({"shard_size": 3, "image_folder": None, "captions": None}, "`shard_size` is for pictures of your own"),
    ],
)
def test_options_that_cannot_work_are_named(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_what_is_lost_of_captions_that_are_held_out_is_told_too(run, tokenizer_folder, tmp_path, caplog):
    rows = [
        {"file": f"{number:02d}.png", "en": f"a {colour} {noun}"}
        for number, (colour, noun) in zip(range(11), itertools.product(COLOURS, NOUNS))
    ]
    options = {"captions": tmp_path / "captions.jsonl", "shard_size": 4, "held_out_share": 0.3, "fine_size": 0}

    def prepare(output):
        (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run(output, tokenizer=tokenizer_folder, **options)

    folders = prepare("plain"), tmp_path / "plain" / "held_out"
    reader = IcetkTokenizer.from_pretrained(tokenizer_folder)
    kept, held_out = (texts(TokenData.load(folder, reader))[0] for folder in folders)
    assert not [text for text in caplog.messages if text.startswith("Characters that have no piece")]
    for row in rows:
        lost = {kept: {"en": "a Ω", "targets": {"en": "a Ψ"}}, held_out: {"en": "a Φ", "style": "Δ"}}
        row.update(lost.get(row["en"], {}))
    prepare("lost")
    (said,) = (text for text in caplog.messages if text.startswith("Characters that have no piece"))
    assert set(said.removesuffix(".").rpartition(": ")[2].split(", ")) == set("ΩΨΦΔ")
