"""Text, command tokens and query strings against the original."""

import pytest

from cogview_pipelines.models.cogview.tokenization_cogview import fill_query

from ..comparing import assert_same

ERRORS = {"FileNotFoundError": FileNotFoundError}  # other errors are those of a value here


def no_file(path):
    raise FileNotFoundError(path)


def test_ids_and_pieces_are_the_originals(text_tokenizer, texts):
    for item in texts["encode"]:
        assert text_tokenizer.encode(item["text"]) == item["ids"], item["text"]
        assert text_tokenizer.tokenize(item["text"]) == item["pieces"], item["text"]


def test_command_tokens_are_the_originals(text_tokenizer, texts, notes):
    for token, index in texts["command_tokens"].items():
        assert text_tokenizer.convert_tokens_to_ids(token) == index
        assert text_tokenizer.convert_ids_to_tokens(index) == token
    assert text_tokenizer.pad_token_id == texts["command_tokens"]["[PAD]"] == text_tokenizer.command_token_id
    assert len(text_tokenizer) == notes["ids"]["num_tokens"]
    assert text_tokenizer.num_pieces == notes["ids"]["text_pieces"]


def test_decoding_splits_texts_and_commands_as_the_original(text_tokenizer, texts):
    for item in texts["decode"]:
        assert text_tokenizer.decode_parts(item["ids"]) == item["texts"]


def test_query_strings_become_the_ids_of_the_original_or_an_error(text_tokenizer, texts):
    for item in texts["parse_query"]:
        if "error" in item:
            with pytest.raises(ERRORS.get(item["error"], ValueError)):
                text_tokenizer.encode_query(item["query"], no_file)
        else:
            assert text_tokenizer.encode_query(item["query"], no_file) == item["ids"], item["query"]


def test_templates_give_the_queries_of_the_original(text_tokenizer, arrays):
    """The queries of four scripts, whose pictures are read as whatever codes stand in them."""
    t2i, sr, caption = arrays("t2i"), arrays("super_resolution"), arrays("caption")
    query = fill_query("text_to_image", str(t2i["text"]))
    assert_same(text_tokenizer.encode_query(query), t2i["query_ids"])
    codes = [token for token in sr["query_ids"] if 0 <= token < text_tokenizer.num_image_tokens]
    query = fill_query("low_level_super_resolution", f"{sr['text']}\tpicture.png")
    assert_same(text_tokenizer.encode_query(query, lambda path: codes), sr["query_ids"])
    codes = [token for token in caption["query_ids"] if 0 <= token < text_tokenizer.num_image_tokens]
    query = fill_query("image_to_text", "picture.png")
    assert_same(text_tokenizer.encode_query(query, lambda path: codes), caption["query_ids"])
    for sequence in caption["sequences"]:
        codes = [token for token in sequence if token < text_tokenizer.num_image_tokens]
        query = fill_query("post_selection", f"picture.png\t{caption['text']}")
        assert_same(text_tokenizer.encode_query(query, lambda path, codes=codes: codes), sequence)
    magnify = arrays("magnify")
    query = fill_query("super_resolution", f"{magnify['text']}\tpicture.png")
    assert_same(text_tokenizer.encode_query(query, lambda path: []), magnify["prefix"])
