"""Token shards: what is written is read, at any place; what is damaged is named and left out."""

import dataclasses
import json
import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cogview_pipelines.training.data import shards as module
from cogview_pipelines.training.data.draws import seeded_generator
from cogview_pipelines.training.data.shards import (
    DamagedShard,
    TokenShards,
    find_damaged,
    is_shard_folder,
    is_written,
    write_index,
    write_shard,
)
from cogview_pipelines.training.data.tokens import TokenData, TokenTrainConfig

from ...utils import NUM_IMAGE_TOKENS

MADE_OF = {"data": "a test", "low_size": 32, "compression_rate": 8}
ROWS = [
    {"en": ["a tiger", "a tiger\u2028on a blue background."], "zh": ["一只老虎"], "targets": {"en": ["tiger"]}},
    {"en": "a cat", "weight": 3, "style": "oil painting"},
    {"zh": ["一棵树"], "weight": 0},
    {"en": "a dog"},
]


def tokens(count, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "low": generator.integers(0, NUM_IMAGE_TOKENS, (count, 4, 4)),
        "fine": generator.integers(0, NUM_IMAGE_TOKENS, (count, 12, 12)),
    }


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in three shards, of 4 (with weights), none, and 3."""
    for number, rows in enumerate((ROWS, [], ROWS[:1] * 3)):
        write_shard(
            tmp_path / "shards",
            number,
            tokens(len(rows), number),
            rows,
            made_of=MADE_OF,
            num_codes=NUM_IMAGE_TOKENS,
            report={"unreadable": number},
        )
    assert write_index(tmp_path / "shards", 3) == {"unreadable": 3, "num_pictures": 7}
    return tmp_path / "shards"


@pytest.fixture
def data(folder, tokenizer):
    return TokenData.load(folder, tokenizer)


def test_what_is_written_is_read(data):
    expected = {name: np.concatenate([tokens(4, 0)[name], tokens(3, 2)[name]]) for name in ("low", "fine")}
    assert data.low.shape == (7, 4, 4) and data.fine.shape == (7, 12, 12) and len(data) == 7
    for name in ("low", "fine"):
        rows, wanted = getattr(data, name), torch.from_numpy(expected[name]).int()
        assert rows[5].dtype == torch.int32 and torch.equal(rows[5], wanted[5])
        assert torch.equal(rows[[6, 0, 3]], wanted[[6, 0, 3]]) and torch.equal(rows[2:6], wanted[2:6])
        assert torch.equal(rows[torch.tensor([1, 1])], wanted[[1, 1]]) and torch.equal(torch.stack(list(rows)), wanted)
    assert data.captions[0] == {"en": ROWS[0]["en"], "zh": ["一只老虎"]} == data.captions[4]
    assert data.captions[1] == {"en": ["a cat"]} and data.captions[2] == {"zh": ["一棵树"]}
    assert data.targets[0] == {"en": ["tiger"]} and data.targets[1] == {"en": ["a cat"]}
    assert data.has_styles and data.styles[1] == {"en": ["oil painting"]} and data.styles[0] == {}
    assert [len(texts) for texts in data.captions[::3]] == [2, 1, 2]
    for index in (7, -1):
        with pytest.raises(IndexError, match=r"outside of 0\.\.6"):
            data.low[index]


def test_numbers_in_files_are_as_small_as_the_codes_allow(folder, tmp_path):
    assert json.loads((folder / "index.json").read_text())["arrays"]["fine"] == {"dtype": "uint16", "shape": [12, 12]}
    write_shard(tmp_path / "many", 0, tokens(4), ROWS, made_of={}, num_codes=65_537)
    write_index(tmp_path / "many", 1)
    shards = TokenShards(tmp_path / "many")
    assert shards.tokens("low", [3]).dtype == np.int32 and (shards.tokens("low", [3])[0] == tokens(4)["low"][3]).all()


def test_pictures_are_drawn_as_from_a_folder_of_the_same_weights(data):
    weights = torch.tensor([1.0, 3, 0, 1, 1, 1, 1], dtype=torch.float64)
    listed = dataclasses.replace(data, weights=weights)
    one, other = seeded_generator(0), seeded_generator(0)
    drawn = data.draw_all(range(500), [one] * 500)
    assert drawn == [listed.draw(other) for _ in range(500)]
    assert set(drawn) == {0, 1, 3, 4, 5, 6}


def test_the_last_picture_is_not_drawn_if_its_weight_is_0(tmp_path, tokenizer):
    write_shard(
        tmp_path, 0, tokens(3), [{"en": "a"}, {"en": "b", "weight": 0.1}, {"en": "c", "weight": 0}], made_of={}
    )
    write_shard(tmp_path, 1, tokens(1), [{"en": "d", "weight": 0}], made_of={})
    write_index(tmp_path, 2)
    chances = TokenData.load(tmp_path, tokenizer).chances
    assert [chances.find(place) for place in (0.0, 1.0, chances.total, chances.total + 1e-9)] == [0, 1, 1, 1]


def test_nothing_but_the_index_is_read_until_a_picture_is_asked_for(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_File", lambda path: pytest.fail(f"{path} was opened"))
    data = TokenData.load(folder, tokenizer)
    assert len(data) == 7 and data.low.shape == (7, 4, 4) and data.require_fine() is data


def test_few_files_stay_open_and_threads_and_copies_read_the_same(tmp_path, tokenizer, monkeypatch):
    for number in range(12):
        write_shard(tmp_path, number, tokens(2, number), ROWS[:1] * 2, made_of={})
    write_index(tmp_path, 12)
    monkeypatch.setattr(module, "MOST_OPEN_FILES", 3)
    shards = TokenShards(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    order = np.random.default_rng(0).integers(0, 24, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda index: shards.tokens("low", [index])[0], order))
    assert all((row == tokens(2, index // 2)["low"][index % 2]).all() for index, row in zip(order, rows))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    copied = pickle.loads(pickle.dumps(shards))
    assert not copied._open and (copied.tokens("fine", [5]) == shards.tokens("fine", [5])).all()


def test_rows_of_several_sets_are_read_together(data):
    mixed = data.mixed_with([dataclasses.replace(data)], [0.5])
    order = [13, 0, 6, 7, 7, 3]
    for name in ("low", "fine"):
        rows = getattr(mixed, name)
        assert torch.equal(rows[order], torch.stack([getattr(data, name)[each % 7] for each in order]))
        assert torch.equal(rows[5:9], torch.stack([rows[each] for each in range(5, 9)]))
    for index in ([14], [-1]):
        with pytest.raises(IndexError, match=r"outside of 0\.\.13"):
            mixed.low[index]


# Damage --------------------------------------------------------------------------------------------------------------


def config_for(folder, tmp_path, **options):
    return TokenTrainConfig(output_dir=str(tmp_path / "run"), data=str(folder), tokenizer="none", **options)


@pytest.mark.parametrize("damage", ["missing", "cut off", "one bit"])
def test_damaged_shards_are_left_out_with_a_warning_and_noted(folder, tmp_path, tokenizer, damage, caplog):
    path = folder / "00000.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            content[:-5] if damage == "cut off" else content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        )
    config = config_for(folder, tmp_path, verify_data=damage == "one bit")
    with caplog.at_level(logging.WARNING):
        data = config.load_data(tokenizer)
    assert len(data) == 3 and (data.low[0].numpy() == tokens(3, 2)["low"][0]).all()
    assert config.excluded_shards == [str(path)] and dataclasses.asdict(config)["excluded_shards"] == [str(path)]
    what = {"missing": "it is missing", "cut off": "instead of", "one bit": "not what was written"}[damage]
    assert str(path) in caplog.text and what in caplog.text


def test_sizes_alone_are_looked_at_unless_checksums_are_asked_for(folder):
    path = folder / "00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_damaged(folder) == {}
    assert list(find_damaged(folder, verify=True)) == ["00002.safetensors"]
    parts = [find_damaged(folder, True, part, 2) for part in range(2)]  # two processes share the reading
    assert sorted(map(len, parts)) == [0, 1]


def test_shards_can_be_left_out_by_name_and_none_left_is_an_error(folder, tmp_path, tokenizer):
    names = [str(folder / f"0000{number}.safetensors") for number in (0, 2)]
    assert len(config_for(folder, tmp_path, excluded_shards=names[:1]).load_data(tokenizer)) == 3
    with pytest.raises(ValueError, match="`data` has no shard that is whole"):
        config_for(folder, tmp_path, excluded_shards=names).load_data(tokenizer)


def test_a_file_that_is_cut_off_while_it_is_read_is_named(data, folder):
    assert data.low[6].shape == (4, 4)
    with open(folder / "00002.safetensors", "rb+") as file:
        file.truncate(200)
    with pytest.raises(DamagedShard, match=r"00002\.safetensors was cut off"):
        for index in (4, 5, 6):
            data.fine[index], data.captions[index]


@pytest.mark.parametrize("name", ["00000.safetensors", "00002.safetensors"])
def test_a_file_in_the_place_of_another_is_named(data, folder, name):
    other = {"00000.safetensors": "00002.safetensors", "00002.safetensors": "00000.safetensors"}[name]
    (folder / name).write_bytes((folder / other).read_bytes())
    with pytest.raises(DamagedShard, match=rf"{name} is another shard than index\.json says|is no shard"):
        data.low[0], data.low[6]


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]xx"])
def test_a_file_of_something_else_is_named(data, folder, content):
    (folder / "00000.safetensors").write_bytes(content)
    with pytest.raises(DamagedShard, match=r"00000\.safetensors (is no shard|was cut off)"):
        data.low[0]


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"format": "token shards", "version": 1, "shards": [{"file": "../a"}]}']
)
def test_a_damaged_index_is_an_error(folder, tokenizer, index):
    (folder / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"`data` has a damaged index\.json"):
        TokenData.load(folder, tokenizer)


def test_an_index_of_a_later_version_is_an_error(folder, tokenizer):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"version": 2}))
    with pytest.raises(ValueError, match=r"has shards of version 2 .* reads 1"):
        TokenData.load(folder, tokenizer)


def test_tokens_that_the_tokenizer_has_no_room_for_are_an_error(tmp_path, tokenizer):
    large = tokens(4)
    large["fine"][2, 3, 4] = NUM_IMAGE_TOKENS
    write_shard(tmp_path, 0, large, ROWS, made_of={})
    write_index(tmp_path, 1)
    with pytest.raises(ValueError, match=r"`data` has tokens in `fine` outside of 0\.\.47: 48"):
        TokenData.load(tmp_path, tokenizer)
    write_shard(tmp_path, 0, tokens(4), ROWS, made_of={}, num_codes=NUM_IMAGE_TOKENS * 2)
    write_index(tmp_path, 1)
    with pytest.raises(ValueError, match="image tokenizer of 96 codes, but the text tokenizer has room for 48"):
        TokenData.load(tmp_path, tokenizer)


# Making them ---------------------------------------------------------------------------------------------------------


def test_a_shard_is_there_when_it_is_whole_and_not_before(folder, tokenizer):
    assert is_written(folder, 0, MADE_OF) and is_written(folder, 1, MADE_OF)
    (folder / "00000.safetensors").unlink()
    assert not is_written(folder, 0, MADE_OF) and not is_written(folder, 3, MADE_OF)
    (folder / "00002.json").write_text("{")
    assert not is_written(folder, 2, MADE_OF)
    (folder / "index.json").unlink()
    assert write_index(folder, 3) is None and is_shard_folder(folder)
    with pytest.raises(ValueError, match=r"has shards, but no index\.json: they are not finished"):
        TokenData.load(folder, tokenizer)


def test_shards_of_other_options_are_not_mixed(folder):
    with pytest.raises(ValueError, match=r"shards that were made otherwise \(`low_size` was 32 and is 64\)"):
        is_written(folder, 0, MADE_OF | {"low_size": 64})


def test_shards_that_do_not_fit_each_other_have_no_index(folder):
    write_shard(folder, 3, {"low": tokens(4)["low"]}, ROWS, made_of=MADE_OF, num_codes=NUM_IMAGE_TOKENS)
    with pytest.raises(ValueError, match=r"do not fit each other: 00003\.safetensors has arrays"):
        write_index(folder, 4)


@pytest.mark.parametrize("value", [-1, NUM_IMAGE_TOKENS])
def test_tokens_that_are_no_codes_are_not_written(tmp_path, value):
    wrong = tokens(4)
    wrong["low"][0, 0, 0] = value
    with pytest.raises(ValueError, match=r"`low` must have 4 pictures of tokens in 0\.\.47"):
        write_shard(tmp_path, 0, wrong, ROWS, made_of={}, num_codes=NUM_IMAGE_TOKENS)
    assert not list(tmp_path.glob("0*"))
