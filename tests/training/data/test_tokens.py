"""Token folders: what they hold, how samples are drawn, and what is said of a folder that cannot be used."""

import dataclasses
import json

import pytest
import torch

from cogview_pipelines import CogViewTokenizer
from cogview_pipelines.environment import SHIPPED_MODELS
from cogview_pipelines.training.data.draws import seeded_generator
from cogview_pipelines.training.data.shards import write_index, write_shard
from cogview_pipelines.training.data.tokens import CAPTIONS_FILE, TOKENS_FILE, TokenData

from ... import child_processes as children
from ...utils import NUM_IMAGE_TOKENS, make_coglm, token_config

ROWS = [
    {"en": ["a tiger", "a tiger on a blue background."], "zh": ["一只老虎"]},
    {"en": "a cat", "weight": 3},
    {"zh": ["一棵树"], "en": [], "weight": 0},
]


@pytest.fixture
def folder(tmp_path):
    tensors = {"low": torch.arange(3 * 16).reshape(3, 4, 4), "fine": torch.zeros(3, 12, 12)}
    TokenData.save(tmp_path / "tokens", tensors, ROWS)
    return tmp_path / "tokens"


@pytest.fixture
def data(folder, tokenizer):
    return TokenData.load(folder, tokenizer)


def test_what_is_saved_is_loaded(data):
    assert torch.equal(data.low, torch.arange(48).reshape(3, 4, 4).int()) and data.low.dtype == torch.int32
    assert len(data) == 3 and data.require_fine() is data
    assert data.captions[0] == {
        "en": ["a tiger", "a tiger on a blue background."],
        "zh": ["一只老虎"],
    }
    assert data.captions[1] == {"en": ["a cat"]}  # a text alone is one caption, not one a letter
    assert data.captions[2] == {"zh": ["一棵树"]}
    assert data.weights.tolist() == [1, 3, 0]


def test_pictures_are_drawn_by_weight_and_captions_by_language_first(data, tokenizer):
    generator = seeded_generator(0)
    counts = torch.bincount(torch.tensor([data.draw(generator) for _ in range(4000)]), minlength=3)
    assert counts[2] == 0 and counts[1].item() == pytest.approx(3000, abs=140)  # five sigma
    drawn = [tuple(data.draw_caption(0, generator)) for _ in range(1000)]
    chinese = drawn.count(tuple(tokenizer.encode("一只老虎")))
    short = drawn.count(tuple(tokenizer.encode("a tiger")))
    assert chinese == pytest.approx(500, abs=80) and short == pytest.approx(250, abs=70)


def test_auxiliary_pictures_are_drawn_by_their_share_and_keep_their_weights(data):
    other = TokenData(data.low.flip(0), data.fine, data.captions[::-1], torch.tensor([1.0, 1.0, 2.0]), data.encode)
    both = data.with_auxiliary(other, 0.25)
    ends = [0.75 * 0.25, 0.75, 0.75 + 0.0625, 0.75 + 0.125, 1]
    between = [0.1, 0.5, 0.78, 0.85, 0.95]
    assert both.chances.total == 1 and [both.chances.find(place) for place in between] == [0, 1, 3, 4, 5]
    assert [both.chances.find(end - 1e-9) for end in ends] == [0, 1, 3, 4, 5] and both.chances.find(1.0) == 5
    for part, source in ((slice(0, 3), data), (slice(3, 6), other)):
        assert torch.equal(both.low[part], source.low) and torch.equal(both.fine[part], source.fine)
        assert both.captions[part] == source.captions
    assert data.with_auxiliary(dataclasses.replace(other, fine=None), 1.0).fine is None


def test_auxiliary_pictures_of_another_size_or_an_impossible_share_are_errors(data):
    other = dataclasses.replace(data, low=data.low[:, :2])
    with pytest.raises(ValueError, match=r"`auxiliary_data` must have tokens `low` of \(4, 4\) .*, but has \(2, 4\)"):
        data.with_auxiliary(other, 0.5)
    with pytest.raises(ValueError, match=r"`auxiliary_probability` must be from 0 to 1, but is 1\.5"):
        data.with_auxiliary(data, 1.5)
    for shares in ([0.5], [0.7, 0.4], [-0.1, 0.2]):
        with pytest.raises(ValueError, match="`auxiliary_probability` must have a share for each of the 2 folders"):
            data.mixed_with([data, data], shares)


def test_of_several_sets_each_is_drawn_by_its_share_and_rows_are_those_of_the_sets(data):
    others = [dataclasses.replace(data, low=data.low + 100), dataclasses.replace(data, low=data.low + 200)]
    mixed = data.mixed_with(others, [0.5, 0.2])
    assert mixed.low.shape == (9, 4, 4) and len(mixed) == 9
    assert torch.equal(
        mixed.low[torch.tensor([8, 1, 3])], torch.stack([others[1].low[2], data.low[1], others[0].low[0]])
    )
    generator = seeded_generator(0)
    counts = torch.bincount(torch.tensor([mixed.draw(generator) for _ in range(4000)]), minlength=9)
    for share, part in zip((0.3, 0.5, 0.2), counts.split(3)):
        assert part.sum().item() == pytest.approx(4000 * share, abs=160)
        assert part[2] == 0 and part[1].item() == pytest.approx(3000 * share, abs=150)
    with pytest.raises(IndexError, match=r"9 is outside of 0\.\.8"):
        mixed.captions[9]


@pytest.mark.parametrize("name", [TOKENS_FILE, CAPTIONS_FILE])
def test_a_missing_file_is_named(folder, tokenizer, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"`data` must be a folder with .*, but .*tokens has no {name}"):
        TokenData.load(folder, tokenizer)


@pytest.mark.parametrize("content", [b"", b"no tensors", None], ids=["empty", "other", "cut off"])
def test_damaged_tokens_are_an_error(folder, tokenizer, content):
    path = folder / TOKENS_FILE
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match=r"`data` has a damaged tokens\.safetensors \(.*\)\. Make it again"):
        TokenData.load(folder, tokenizer)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"fr": ["un chat"]}', "must be an object with captions in one of"),
        ('{"en": []}', "must be an object with captions in one of"),
        ('{"en": {"a": 1}}', "must have a text or a list of texts in 'en'"),
        ('{"en": "a cat", "weight": "2"}', "must have a number of at least 0 as `weight`, but has '2'"),
    ],
)
def test_a_wrong_line_is_named(folder, tokenizer, line, message):
    lines = (folder / CAPTIONS_FILE).read_text(encoding="utf-8").splitlines()
    (folder / CAPTIONS_FILE).write_text("\n".join([lines[0], line, lines[2]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"Line 2 of .*captions\.jsonl {message}"):
        TokenData.load(folder, tokenizer)


@pytest.mark.parametrize("name", ["low", "fine"])
@pytest.mark.parametrize("value", [-1, NUM_IMAGE_TOKENS])
def test_tokens_that_the_tokenizer_has_no_room_for_are_an_error(folder, tokenizer, name, value):
    tensors = {"low": torch.zeros(3, 4, 4), "fine": torch.zeros(3, 12, 12)}
    tensors[name][1, 2, 3] = value
    TokenData.save(folder, tensors, ROWS)
    with pytest.raises(ValueError, match=rf"`data` has tokens in `{name}` outside of 0\.\.47"):
        TokenData.load(folder, tokenizer)


def test_tokens_and_captions_must_be_as_many(folder, tokenizer):
    lines = (folder / CAPTIONS_FILE).read_text(encoding="utf-8").splitlines()
    (folder / CAPTIONS_FILE).write_text(lines[0] + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="`data` has 3 pictures in `low`, but 1 lines of captions"):
        TokenData.load(folder, tokenizer)


def test_data_without_low_or_fine_tokens_or_pictures_is_named(folder, tokenizer):
    TokenData.save(folder, {"fine": torch.zeros(3, 12, 12)}, ROWS)
    with pytest.raises(ValueError, match="`data` has no tensor `low`"):
        TokenData.load(folder, tokenizer)
    TokenData.save(folder, {"low": torch.zeros(3, 4, 4)}, ROWS)
    with pytest.raises(
        ValueError,
        match=r"`data` \(or `auxiliary_data`\) has no fine tokens; make it with `prepare_tokens\.py --fine_size`",
    ):
        TokenData.load(folder, tokenizer).require_fine()
    TokenData.save(folder, {"low": torch.zeros(0, 4, 4)}, [])
    with pytest.raises(ValueError, match="`data` has no pictures of a `weight` above 0"):
        TokenData.load(folder, tokenizer)


def test_data_must_fit_the_model(data, tokenizer):
    config = make_coglm(**token_config(tokenizer)).config
    assert data.require_fit(config, tokenizer) is data
    config.num_image_tokens = 7
    with pytest.raises(ValueError, match="its num_image_tokens is 48, the model's 7"):
        data.require_fit(config, tokenizer)
    config.image_grid = (2, 8)
    with pytest.raises(ValueError, match="4 x 4 tokens, but the model makes 2 x 8"):
        data.require_fit(config, tokenizer)


def test_saving_writes_chinese_as_it_is(folder):
    text = (folder / CAPTIONS_FILE).read_text(encoding="utf-8")
    assert "一只老虎" in text and [json.loads(line) for line in text.splitlines()] == ROWS


def test_tokens_and_captions_of_two_folders_never_come_together(folder, tokenizer):
    """Whenever the writing is killed, what is there is the old, the new, or an error that names what is missing."""
    old = TokenData.load(folder, tokenizer)
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors = {"low": old.low.flip(0), "fine": old.fine}

    def save():
        TokenData.save(folder, tensors, ROWS[::-1])
        return True

    at, was_killed, found = 0, True, []
    while was_killed:
        for name, content in saved.items():
            (folder / name).write_bytes(content)
        was_killed = children.kill_before_change(save, folder, at, writes=(CAPTIONS_FILE,))
        try:
            data = TokenData.load(folder, tokenizer)
            first = data.captions[0] == old.captions[0]
            assert torch.equal(data.low, old.low if first else tensors["low"]), at
            found.append("old" if first else "new")
        except ValueError as error:
            assert CAPTIONS_FILE in str(error)
            found.append("none")
        children.run(save)
        assert sorted(path.name for path in folder.iterdir()) == sorted(saved), at
        at += 1
    assert found[0] == "old" and found[-1] == "new" and "none" in found


WITH_STYLES = [
    {"en": "a cat", "zh": "一只猫", "style": "oil painting", "targets": {"en": ["a feline"]}},
    {"en": "a tiger", "zh": "一只老虎", "style": {"en": "sketch", "zh": ["油画", "水墨"]}},
]


@pytest.mark.parametrize("in_shards", [False, True])
def test_words_of_styles_are_among_those_that_a_model_learns_to_draw_and_targets_are_not(in_shards, tmp_path):
    tokens = {"low": torch.zeros(2, 4, 4)}
    if in_shards:
        write_shard(tmp_path, 0, {"low": tokens["low"].int().numpy()}, WITH_STYLES, made_of={})
        write_index(tmp_path, 1)
    else:
        TokenData.save(tmp_path, tokens, WITH_STYLES)

    def reader(**options):
        """A tokenizer with pieces for all letters, of a model that knew five words before."""
        words = ["bird", "一", "只", "的", "风格"]
        reader = CogViewTokenizer.from_pretrained(
            SHIPPED_MODELS["cogview-emoji"], subfolder="tokenizer", known_words=words
        )
        data = TokenData.load(tmp_path, reader)
        both = data.with_auxiliary(data, 0.5)
        assert sorted(both.texts(**options)) == sorted([*data.texts(**options)] * 2)
        reader.add_known_words(data.texts(**options))
        return reader

    known = reader()
    for prompt in ("a cat of oil painting style", "a tiger of sketch style", "an image of a cat"):
        assert known.known_text(prompt) == prompt
    assert known.unknown_words(["油画风格的一只猫", "水墨风格的老虎", "一张猫的图片"]) == []
    assert known.unknown_words(["a feline"]) == ["feline"]
    captions_alone = reader(styles=False)
    assert captions_alone.known_text("a cat of oil painting style") == "a cat"
    assert captions_alone.unknown_words(["油画风格的猫"]) == ["油画"]
