"""Text tokenizer and styles against the original."""

import pytest

from cogview_pipelines.conversion.cogview2.to_pipeline import released_styles


def test_ids_pieces_and_decoding_are_the_originals(text_tokenizer, texts):
    for item in texts["items"]:
        text, ids = item["text"], item["ids"]
        assert text_tokenizer.encode(text) == ids, text
        assert text_tokenizer.encode(text, keep_linebreaks=True) == item["ids_keep_linebreak"], text
        assert text_tokenizer.decode(ids) == item["decoded"], text
        assert text_tokenizer.decode(item["ids_keep_linebreak"]) == item["decoded_keep_linebreak"], text
        assert text_tokenizer.tokenize(text) == item["pieces"], text
        for index, piece in zip(ids, item["pieces"]):
            if index != text_tokenizer.unk_token_id:
                assert text_tokenizer.convert_ids_to_tokens(index) == piece
            assert text_tokenizer.convert_tokens_to_ids(piece) == index


def test_special_tokens_and_lookups_are_the_originals(text_tokenizer, texts):
    meta = texts["meta"]
    assert len(text_tokenizer) == meta["num_tokens"]
    for token, index in meta["special"].items():
        assert text_tokenizer.convert_tokens_to_ids(token) == index, token
    for index, piece in meta["id_to_piece"].items():
        assert text_tokenizer.convert_ids_to_tokens(int(index)) == piece
    assert text_tokenizer.convert_tokens_to_ids("no such piece") == meta["unknown_piece_lookup"]
    assert text_tokenizer.boi_token_id == meta["special"]["<start_of_image>"]


@pytest.mark.parametrize("text", ["a cat ", "a cat", "一只猫 ", " a cat \n", "a cat  "])
def test_a_prompt_is_encoded_as_one_string_with_the_start_of_its_image(text_tokenizer, text):
    """The original encodes `text<start_of_image>`, in which a space at the end of the text is a piece."""
    whole = text_tokenizer.encode(text + "<start_of_image>")
    assert [*text_tokenizer.encode_before_image(text), text_tokenizer.boi_token_id] == whole
    assert len(text_tokenizer.encode_before_image("a cat ")) == len(text_tokenizer.encode("a cat")) + 1


RECIPES = {
    "attn_plus": "text_attention_bias",
    "temp_all_gen": "temperature",
    "topk_gen": "top_k_clusters",
    "temp_cluster_gen": "cluster_temperature",
    "topk_dsr": "direct_sr_top_k_clusters",
    "temp_cluster_dsr": "direct_sr_cluster_temperature",
}


def test_styles_are_the_original_recipes(texts):
    styles = released_styles()["styles"]
    assert styles.keys() == texts["recipes"].keys()
    for name, recipe in texts["recipes"].items():
        assert "{}" + styles[name]["suffix"] + "<start_of_image>" == recipe["query_template"], name
        settings = {key: value for key, value in styles[name].items() if key != "suffix"}
        assert settings == pytest.approx({ours: recipe[theirs] for theirs, ours in RECIPES.items()}), name


def test_prompt_with_style_and_start_token_encodes_as_the_original_template(text_tokenizer, texts):
    templates = [item for item in texts["items"] if item["kind"].startswith("style:")]
    assert templates
    for item in templates:
        suffix = released_styles()["styles"][item["kind"].removeprefix("style:")]["suffix"]
        prompt = item["text"].removesuffix("<start_of_image>").removesuffix(suffix)
        assert [*text_tokenizer.encode(prompt + suffix), text_tokenizer.boi_token_id] == item["ids"]
