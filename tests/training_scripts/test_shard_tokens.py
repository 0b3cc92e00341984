"""`training_scripts/shard_tokens.py`: a token folder becomes shards, from which all stages train alike."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogview_pipelines.training.data.draws import Draw
from cogview_pipelines.training.data.tokens import TokenData

from .. import child_processes as children
from ..utils import make_coglm, token_config
from .conftest import COGLM, COGVIEW, as_arguments, load_script, metrics, write_token_folder

SCRIPTS_FOLDER = Path(__file__).parents[2] / "training_scripts"
COMMON = {
    "batch_size": 3,
    "max_steps": 6,
    "warmup_steps": 1,
    "log_every_steps": 1,
    "checkpoint_every_steps": 0,
    "learning_rate": 1e-2,
}


def shard(source, target, **options):
    load_script("shard_tokens").main(as_arguments({"data": source, "output_dir": target, "shard_size": 7, **options}))
    return target


@pytest.fixture(scope="module")
def shards(token_folder, tmp_path_factory):
    return shard(token_folder, tmp_path_factory.mktemp("sharded") / "shards")


@pytest.fixture
def train(tokenizer_folder, token_folder, tmp_path):
    """`train("name", data=...)`: a tiny run of CogLM in `tmp_path / "name"`; its metrics."""

    def call(name, **options):
        options = {
            "output_dir": tmp_path / name,
            "tokenizer": tokenizer_folder,
            "data": token_folder,
            "model": COGLM,
            "caption_probability": 0.5,
            "patch_size": 2,
            **COMMON,
            **options,
        }
        load_script("train_coglm").main(as_arguments(options))
        return metrics(tmp_path / name)

    return call


def test_all_pictures_are_in_the_shards_as_they_were(shards, token_folder, tokenizer):
    data, before = TokenData.load(shards, tokenizer), TokenData.load(token_folder, tokenizer)
    assert len(list(shards.glob("*.safetensors"))) == 3 and len(data) == 20
    assert torch.equal(data.low[:], before.low) and torch.equal(data.fine[:], before.fine)
    assert data.captions[:] == before.captions and data.targets[:] == before.targets
    assert [data.chances.find(place - 0.5) for place in range(1, 23)] == [0, 1, 2, 2, 2, *range(3, 20)]


def test_blank_captions_are_told_and_in_no_shard(token_folder, tokenizer, tmp_path, capsys, caplog):
    shutil.copytree(token_folder, tmp_path / "blank")
    lines = (token_folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    lines[0] = json.dumps({"en": ["a cat", " "], "zh": " "})
    (tmp_path / "blank/captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    folder = shard(tmp_path / "blank", tmp_path / "shards")
    assert "2 blank captions were left out." in capsys.readouterr().out
    assert b'" "' not in b"".join(path.read_bytes() for path in folder.glob("*.safetensors"))
    assert TokenData.load(folder, tokenizer).captions[0] == {"en": ["a cat"]}
    assert TokenData.load(tmp_path / "blank", tokenizer).captions[0] == {"en": ["a cat"]}
    assert "2 blank captions were left out." in caplog.text


@pytest.mark.parametrize("order", ["weighted", "epochs"])
def test_a_run_on_shards_is_the_run_on_the_folder(train, shards, order):
    assert train("folder", data_order=order) == train("shards", data=shards, data_order=order)


@pytest.mark.parametrize("script", ["train_direct_sr", "train_iterative_sr"])
def test_super_resolution_trains_on_shards(script, shards, tokenizer_folder, coglm_folder, token_folder, tmp_path):
    found = []
    for name, data in (("folder", token_folder), ("shards", shards)):
        options = {"output_dir": tmp_path / name, "data": data, "tokenizer": tokenizer_folder, "max_steps": 2}
        slots = {"num_text_slots": 30 if script == "train_direct_sr" else 4}
        options = {**COMMON, **options, "transformer": coglm_folder, "model": slots, "data_order": "epochs"}
        load_script(script).main(as_arguments(options))
        found.append(metrics(tmp_path / name))
    assert found[0] == found[1]


def test_cogview_trains_on_shards_with_styles(cogview_tokenizer_folder, cogview_token_folder, tmp_path):
    found = []
    shards = shard(cogview_token_folder, tmp_path / "sharded")
    for name, data in (("folder", cogview_token_folder), ("shards", shards)):
        options = {"output_dir": tmp_path / name, "data": data, "tokenizer": cogview_tokenizer_folder, "max_steps": 2}
        options |= {"model": COGVIEW, "style_probability": 0.5, "super_resolution_probability": 0.3}
        load_script("train_cogview").main(as_arguments({**COMMON, **options, "max_text_tokens": 30}))
        found.append(metrics(tmp_path / name))
    assert found[0] == found[1]


@pytest.mark.parametrize("order", ["weighted", "epochs"])
def test_a_run_that_is_resumed_in_mid_epoch_has_the_losses_of_an_uninterrupted_one(train, shards, stop_after, order):
    options = {"data": shards, "data_order": order, "max_steps": 9}  # 27 samples of 20 pictures
    whole = train("whole", **options)
    stop_after(4)
    train("stopped", **options)
    assert train("stopped", resume_from_checkpoint="latest", **options) == whole


def test_all_processes_together_go_through_each_epoch_once(shards, tokenizer):
    """Samples are keyed by their number in the run: any number of processes and passes shares the same ones out."""
    script = load_script("train_coglm")
    config = script.CogLMTrainConfig(output_dir="", data=str(shards), tokenizer="", data_order="epochs")
    data, model = config.load_data(tokenizer), make_coglm(**token_config(tokenizer)).config
    whole = script.make_batch(config, model, tokenizer, data, Draw(0, range(20)))
    for num_processes in (2, 4):
        size = 20 // num_processes
        parts = [
            script.make_batch(
                config, model, tokenizer, config.load_data(tokenizer), Draw(0, range(start, start + size))
            )
            for start in range(0, 20, size)
        ]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    draws = [data.draw(generator, number) for number, generator in enumerate(Draw(0, range(40)).generators(0))]
    for epoch in (draws[:20], draws[20:]):  # picture 2 has weight 3: 20 * 3 / 22 times, the others 20 / 22
        assert epoch.count(2) in (2, 3) and all(epoch.count(other) <= 1 for other in range(20) if other != 2)
    assert draws[:20] != draws[20:]


def test_several_sets_are_mixed_by_their_shares_in_a_run(train, shards, token_folder, tmp_path):
    other = write_token_folder(tmp_path / "other", captions=[{"en": ["a cat"]}] * 20)
    shares = {"auxiliary_data": [other, shards], "auxiliary_probability": [0.25, 0.5]}
    rows = train("mixed", data_order="epochs", **shares)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="a share for each of the 2 folders"):
        train("wrong", auxiliary_data=[other, shards], auxiliary_probability=[0.2])


def test_a_damaged_shard_is_left_out_and_stands_in_run_and_checkpoint(train, token_folder, tmp_path, caplog):
    shards = shard(token_folder, tmp_path / "shards")
    content = (shards / "00001.safetensors").read_bytes()
    (shards / "00001.safetensors").write_bytes(content[:-1])
    options = {"data": shards, "checkpoint_every_steps": 2, "max_steps": 2}
    with caplog.at_level(logging.WARNING):
        train("run", **options)
    path = str(shards / "00001.safetensors")
    assert f"`data`: {path} is left out: it has" in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["options"]["excluded_shards"] == [path]
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    assert state["options"]["excluded_shards"] == [path]
    (shards / "00001.safetensors").write_bytes(content)  # repaired
    caplog.clear()
    train("run", **{**options, "max_steps": 3}, resume_from_checkpoint="latest")
    assert f"`excluded_shards` was ['{path}'] and is []: other samples are drawn" in caplog.text
    caplog.clear()
    train("run", **{**options, "max_steps": 4}, resume_from_checkpoint="latest", excluded_shards=[path])
    assert f"`excluded_shards` was [] and is ['{path}']" in caplog.text


# Making them ---------------------------------------------------------------------------------------------------------


def test_a_conversion_that_is_killed_anywhere_goes_on_to_the_same_shards(token_folder, tmp_path):
    target = tmp_path / "shards"

    def contents():
        return {path.name: path.read_bytes() for path in target.iterdir() if path.suffix in (".json", ".safetensors")}

    def call():
        shard(token_folder, target)
        return True

    number = children.count_changes(call, target, writes=(".json",))
    whole = contents()
    assert number > 10 and len(whole) == 7
    for at in range(0, number, 3):
        shutil.rmtree(target)
        assert children.kill_before_change(call, target, at, writes=(".json",))
        children.run(call)
        assert contents() == whole, f"killed at change {at}"
        assert not list(target.glob(".partial*"))


def test_shards_that_are_there_are_not_made_again(shards, token_folder, monkeypatch):
    script = load_script("shard_tokens")
    monkeypatch.setattr(script, "write_shard", lambda *args, **options: pytest.fail("made again"))
    shard(token_folder, shards)
    with pytest.raises(ValueError, match=r"made otherwise \(`end` was 7 and is 5\)"):
        shard(token_folder, shards, shard_size=5)


@pytest.mark.parametrize("lines", [19, 21])
def test_tokens_and_captions_must_be_as_many(tmp_path, lines):
    source = write_token_folder(tmp_path / "tokens")
    text = (source / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    (source / "captions.jsonl").write_text("\n".join((text * 2)[:lines]), encoding="utf-8")
    with pytest.raises(
        ValueError, match=f"`data` has 20 pictures in `low` and 20 pictures in `fine`, but {lines} lin"
    ):
        shard(source, tmp_path / "shards")
    assert not (tmp_path / "shards/index.json").exists()


def test_what_is_no_token_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`data` must be a folder with tokens\.safetensors and captions\.jsonl, not"):
        shard(tmp_path, tmp_path / "shards")
    source = write_token_folder(tmp_path / "tokens")
    (source / "tokens.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"`data` has a damaged tokens\.safetensors"):
        shard(source, tmp_path / "shards")
    with pytest.raises(ValueError, match="`shard_size` must be at least 1, but is 0"):
        shard(source, tmp_path / "shards", shard_size=0)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.timeout(900)
def test_two_processes_of_accelerate_launch_train_on_what_one_does_and_one_goes_on_with_their_run(
    train, shards, tokenizer_folder, tmp_path
):
    """Each process opens the shards itself; together they see the samples of one, in mid-epoch of 20 pictures."""
    no_dropout = {**COGLM, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    options = {**COMMON, "data": shards, "data_order": "epochs", "model": no_dropout, "sample_every_steps": 0}
    whole = train("one", **{**options, "batch_size": 4, "max_steps": 9})
    launched = {"output_dir": tmp_path / "two", "tokenizer": tokenizer_folder, "caption_probability": 0.5}
    launched |= {"patch_size": 2, **options, "batch_size": 2, "max_steps": 6}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = str(SCRIPTS_FOLDER / "train_coglm.py")
    subprocess.run([*command, script, *as_arguments(launched)], check=True, env=environment, timeout=800)
    run = json.loads((tmp_path / "two/run.json").read_text())
    assert run["state"] == "finished"
    resumed = train("two", **{**options, "batch_size": 4, "max_steps": 9}, resume_from_checkpoint="latest")
    assert [row["step"] for row in resumed] == list(range(1, 10))
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in whole], rel=2e-3)
    other = train("other", **{**options, "batch_size": 2, "max_steps": 6})  # the control: half of the samples
    assert [row["loss"] for row in other] != pytest.approx([row["loss"] for row in whole[:6]], rel=2e-3)
