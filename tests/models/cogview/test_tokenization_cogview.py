"""`CogViewTokenizer`: the one id space, command tokens, query strings, files, batches and errors."""

import copy
import json
import pickle
from pathlib import Path

import pytest

from cogview_pipelines.models.cogview.tokenization_cogview import (
    COMMAND_TOKENS,
    QUERY_TEMPLATES,
    CogViewTokenizer,
    fill_query,
)

FIXTURES = Path(__file__).parents[2] / "parity" / "cogview" / "fixtures"
MODEL = FIXTURES / "text_model" / "tiny.model"
TEXTS = [item["text"] for item in json.loads((FIXTURES / "text_tokenizer.json").read_text("utf-8"))["encode"]]


@pytest.fixture(scope="module")
def released():
    """The tokenizer of the fixtures: 8,192 image codes, 400 pieces, 27 command tokens."""
    return CogViewTokenizer(MODEL)


@pytest.mark.parametrize("num_image_tokens", [0, 7, 1024])
def test_every_id_has_one_name_and_every_name_its_id(num_image_tokens):
    tokenizer = CogViewTokenizer(MODEL, num_image_tokens=num_image_tokens)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(tokenizer) == tokenizer.vocab_size == num_image_tokens + 400 + 27 and len(set(names)) == len(names)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(tokenizer)))
    assert tokenizer.get_vocab() == {name: index for index, name in enumerate(names)}
    assert tuple(names[-27:]) == COMMAND_TOKENS
    assert tokenizer.convert_tokens_to_ids(f"<image_{num_image_tokens + 5}>") == tokenizer.unk_token_id


@pytest.mark.parametrize("name", [*COMMAND_TOKENS, "<image_3>", "<unk>", "</s>"])
def test_names_of_tokens_in_a_text_are_letters(released, name):
    ids = released.encode(f"a {name} tiger")
    assert all(released.num_image_tokens <= index < released.command_token_id for index in ids)
    assert len(ids) > len(released.encode("a tiger")) + 1


def test_only_a_query_takes_commands_from_a_text(released):
    assert released.encode_query("[ROI1] a [BASE]") == [8599, *released.encode("a"), 8608]
    assert released.encode_query("a[BASE]") == released.encode("a[BASE]")


def test_a_query_reads_pictures_and_leaves_the_rest_to_generate(released):
    read = {"a.png": [5, 6, 7, 8]}.__getitem__
    assert released.encode_query("[BOI1] [Image]a.png", read) == [8593, 5, 6, 7, 8]
    assert released.encode_query("[Image3]a.png [MASK]", read) == [5, 6, 7, -1, -1]
    assert released.encode_query("[Image0]a.png", read) == [-1] * 4
    assert released.encode_query("[MASK]*3 tiger") == [-1] * 3 + released.encode("tiger")


def test_stretches_of_text_are_encoded_each_by_itself(released):
    text = released.encode_query("a tiger [SEP] a tiger")
    assert text == [*released.encode("a tiger"), 8602, *released.encode("a tiger")]


def test_templates_are_filled_from_tabs(released):
    assert fill_query("post_selection", "b.png\ta tiger") == "[BASE] [BOI1] [Image]b.png [EOI1] [ROI1] a tiger"
    assert fill_query("[ROI1] {}", "x") == "[ROI1] x"
    with pytest.raises(ValueError, match=r"`fields` must have 2 parts separated by tabs .* has 1"):
        fill_query("low_level_super_resolution", "a tiger")
    assert all("[BASE]" in template for template in QUERY_TEMPLATES.values())


def test_decoding_gives_texts_and_commands(released):
    text = released.encode("a tiger")
    assert released.decode_parts([8599, *text, 8608, 3, 4, -1, 8596]) == ["[ROI1]", "a tiger", "[BASE]", "[EOI1]"]
    assert released.decode([*text, 8599]) == "a tiger[ROI1]"
    assert released.decode([*text, 8599], skip_special_tokens=True) == "a tiger"
    assert released.decode([3, 8602]) == "<image_3>[SEP]"


def test_batches_are_padded_on_the_left_with_the_padding_command(released):
    batch = released(["一只老虎", "a tiger"], padding=True, return_tensors="pt")
    longest = len(released.encode("a tiger"))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, longest)
    assert batch["input_ids"][0].tolist() == [8592] * (longest - 1) + released.encode("一只老虎")
    assert batch["attention_mask"].sum(1).tolist() == [1, longest]


def assert_same(tokenizer, expected):
    assert (len(tokenizer), tokenizer.num_image_tokens) == (len(expected), expected.num_image_tokens)
    assert tokenizer.all_special_tokens == expected.all_special_tokens
    assert tokenizer.all_special_ids == expected.all_special_ids
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))


def test_save_and_load_keeps_everything_and_the_file_byte_for_byte(tmp_path):
    tokenizer = CogViewTokenizer(MODEL, num_image_tokens=64)
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = CogViewTokenizer.from_pretrained(tmp_path / "first")
    assert_same(loaded, tokenizer)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("cog-pretrain.model", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert (tmp_path / "first" / "cog-pretrain.model").read_bytes() == MODEL.read_bytes()
    assert_same(CogViewTokenizer.from_pretrained(tmp_path / "first", num_image_tokens=9), CogViewTokenizer(MODEL, 9))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_need_no_file(tmp_path, clone):
    path = tmp_path / "cog-pretrain.model"
    path.write_bytes(MODEL.read_bytes())
    tokenizer = CogViewTokenizer(path, num_image_tokens=5)
    duplicate = clone(tokenizer)
    path.unlink()
    assert_same(duplicate, tokenizer)


def test_bad_files_and_values_are_refused(tmp_path, released):
    with pytest.raises(FileNotFoundError, match=r"`vocab_file` .*gone\.model' does not exist"):
        CogViewTokenizer(tmp_path / "gone.model")
    with pytest.raises(ValueError, match=r"is a folder.*CogViewTokenizer\.from_pretrained"):
        CogViewTokenizer(tmp_path)
    (tmp_path / "cut.model").write_bytes(MODEL.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a SentencePiece model, or is damaged"):
        CogViewTokenizer(tmp_path / "cut.model")
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        CogViewTokenizer(MODEL, num_image_tokens=-1)
    with pytest.raises(IndexError, match=r"`ids` must lie in 0..8618, but there is 8619"):
        released.decode([8619])


def test_bad_queries_say_what_is_wrong(released):
    for query in ("[MASK]*0", "[MASK]*a", "[MASK]*-1"):
        with pytest.raises(ValueError, match=r"positive number after \[MASK\]\*"):
            released.encode_query(query)
    with pytest.raises(ValueError, match=r"`query` must name a picture as \[Image\]PATH"):
        released.encode_query("[Image*4]x.png", lambda path: [1])
    with pytest.raises(ValueError, match="`read_codes` must be given"):
        released.encode_query("[Image]x.png")
    with pytest.raises(TypeError, match="`query` must be a string, but is of type `int`"):
        released.encode_query(5)
    with pytest.raises(ValueError, match="`keep_linebreaks` must be False for `CogViewTokenizer`"):
        released.tokenize("a\nb", keep_linebreaks=True)
