"""`IcetkTokenizer`: what text becomes, the one id space, files, batches and errors."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import DiffusionPipeline
from sentencepiece import sentencepiece_model_pb2

import cogview_pipelines
from cogview_pipelines.models.cogview2.tokenization_icetk import START_TOKENS, IcetkTokenizer

FIXTURES = Path(__file__).parents[2] / "parity" / "cogview2" / "fixtures"
MODEL = FIXTURES / "icetk" / "ice_text.model"
EXPECTED = json.loads((FIXTURES / "text_tokenizer.json").read_text(encoding="utf-8"))
TEXTS = [item["text"] for item in EXPECTED["items"]]


@pytest.fixture(scope="module")
def released():
    """The tokenizer of the fixtures: 20,000 image codes and 400 pieces."""
    return IcetkTokenizer(MODEL)


@pytest.fixture(scope="module")
def by_protobuf():
    """SentencePiece itself on the model with the start tokens written into it by protobuf."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(MODEL.read_bytes())
    for token in START_TOKENS:
        proto.pieces.add(piece=token, score=0.0)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_words_that_the_model_does_not_know_are_told_and_the_list_is_saved(tmp_path):
    words = ["a", "cat", "and", "猫"]
    IcetkTokenizer(MODEL, known_words=words).save_pretrained(tmp_path)
    loaded = IcetkTokenizer.from_pretrained(tmp_path)
    assert loaded.known_words == words
    assert loaded.unknown_parts("A cat and a dog, and ☃") == ["dog", "☃"]
    assert loaded.unknown_parts("猫和狗") == ["和狗"]
    assert loaded.parts_without_piece("A cat and a dog, and ☃") == ["☃"]
    assert loaded.encode("a cat") == IcetkTokenizer(MODEL).encode("a cat")


def test_words_that_the_model_has_learned_since_are_known_and_saved(tmp_path):
    tokenizer = IcetkTokenizer(MODEL, known_words=["a", "cat", "猫"])
    assert tokenizer.add_known_words(["A cat, a dog", "猫和狗", "dogs"]) == ["dog", "和狗", "dogs"]
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, IcetkTokenizer.from_pretrained(tmp_path)):
        assert one.known_words == ["a", "cat", "猫", "dog", "和狗", "dogs"]
        assert one.unknown_parts("a dog and a cat") == ["and"]
    tokenizer.add_tokens(["ca"])  # a part of a word of the list
    assert tokenizer.unknown_parts("a cat") == [] and tokenizer.unknown_parts("a car") == ["r"]
    tokenizer.add_tokens(["<my-dog>"])
    assert tokenizer.add_known_words(["a <my-dog> and a hat"]) == ["and", "hat"]
    assert tokenizer.add_known_words(["a carpet"]) == ["carpet"] and not tokenizer.unknown_parts("a carpet")
    assert IcetkTokenizer(MODEL).add_known_words(["a dog"]) == []


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("a cat", "a cat"),
        ("A big cat, please", "A cat"),
        ("wow: a cat; and, maybe, a dog", "a cat and, a"),  # there is no piece for ":" and ";"
        ("a sky-cat and a cat-like ☃", "a cat and a cat"),
        ("a+cat -- zzz", "a cat"),
        ("一只猫，快", "猫"),
        ("好猫在，蓝天下", "猫"),
        ("Ａ　ｃａｔ zzz", "Ａ ｃａｔ"),
        ("zzz", "zzz"),  # nothing else is left
        ("", ""),
    ],
)
def test_a_text_without_what_the_model_does_not_know(text, known):
    tokenizer = IcetkTokenizer(MODEL, known_words=["a", "cat", "and", "猫"])
    assert tokenizer.known_text(text) == known
    assert known == text or not tokenizer.unknown_parts(known)
    nothing = text in ("zzz", "")
    assert tokenizer.knows_some(text) is (not nothing)
    without = IcetkTokenizer(MODEL)  # there is no list
    assert without.known_text(text) == text
    assert without.knows_some(text) is (not nothing) and not without.knows_some("☃!")  # no piece has a "z"


def test_added_tokens_stay_in_a_text_without_what_the_model_does_not_know():
    tokenizer = IcetkTokenizer(MODEL, known_words=["a", "cat"])
    tokenizer.add_tokens(["<my-dog>"])
    assert tokenizer.known_text("a cat and <my-dog>, wow") == "a cat <my-dog>"
    tokenizer.set_adapter_words(["wow"])
    assert tokenizer.known_text("a cat and <my-dog>, wow") == "a cat <my-dog> wow"


def test_words_of_adapters_are_known_while_they_count_and_saved_when_they_are_fused(tmp_path):
    tokenizer = IcetkTokenizer(MODEL, known_words=["a", "cat"])
    tokenizer.set_adapter_words(["dog"], ["猫"])
    assert tokenizer.unknown_parts("a cat, a dog, 猫 and") == ["and"]
    assert tokenizer.known_words == ["a", "cat", "猫"]
    tokenizer.save_pretrained(tmp_path)
    assert IcetkTokenizer.from_pretrained(tmp_path).known_words == tokenizer.known_words
    tokenizer.set_adapter_words()
    assert tokenizer.unknown_parts("a cat, a dog, 猫 and") == ["dog", "猫", "and"]
    tokenizer.set_adapter_words(["dog"], ["猫"])
    assert tokenizer.add_known_words(["a dog and"]) == ["dog", "and"]  # whatever an adapter knows besides
    assert tokenizer.known_words == ["a", "cat", "dog", "and", "猫"]
    tokenizer.set_adapter_words()
    assert tokenizer.unknown_parts("a cat, a dog, 猫 and") == ["猫"]
    tokenizer.save_pretrained(tmp_path)
    assert IcetkTokenizer.from_pretrained(tmp_path).known_words == ["a", "cat", "dog", "and"]
    without = IcetkTokenizer(MODEL)
    without.set_adapter_words(["dog"], ["cat"])
    assert without.known_words is None and without.unknown_words(["a dog"]) == without.unknown_parts("a dog") == []


def test_words_that_one_component_knows_are_unknown_to_others(tmp_path):
    tokenizer = IcetkTokenizer(MODEL, known_words=["a"], component_words={"other": ["cat"]})
    tokenizer.set_adapter_words(["dog"], ["猫"], "other")
    for _ in range(2):  # as it is, and loaded
        assert tokenizer.unknown_parts("a cat, 猫") == tokenizer.unknown_words(["a cat, 猫"]) == ["cat", "猫"]
        assert tokenizer.unknown_parts("a cat, 猫, dog", "other") == (["dog"] if tokenizer.name_or_path else [])
        assert tokenizer.unknown_words(["a cat, 猫"], "other") == [] and tokenizer.known_words == ["a"]
        tokenizer.save_pretrained(tmp_path)
        tokenizer = IcetkTokenizer.from_pretrained(tmp_path)
    assert tokenizer.add_known_words(["a bird, cat"], "other") == ["bird"]
    assert tokenizer.unknown_parts("a cat, a bird") == ["cat", "bird"]
    assert tokenizer.add_known_words(["a cat"]) == ["cat"] and tokenizer.unknown_parts("a cat, a bird") == ["bird"]
    replaced = IcetkTokenizer.from_pretrained(tmp_path, known_words=["dog"], component_words=None)
    assert replaced.unknown_parts("a dog, a cat", "other") == ["a", "cat"]


def test_what_a_text_loses_is_told_part_by_part(released):
    assert released.unknown_parts("") == released.unknown_parts("cat") == []
    assert released.unknown_parts("ꙮꙮ cat ☃ ꙮꙮ") == ["ꙮꙮ", "☃"]
    assert released.unk_token_id in released.encode("ꙮꙮ")


@pytest.mark.parametrize("method", ["unknown_parts", "encode", "tokenize", "__call__"])
def test_half_of_a_surrogate_pair_is_refused_in_a_sentence(released, method):
    with pytest.raises(ValueError, match=r"^`text` must be Unicode text, but '\\ud800 cat' holds half of a surrogate"):
        getattr(released, method)("\ud800 cat")


def write_model(path, change):
    """The fixture's model with the protobuf message changed by `change`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(MODEL.read_bytes())
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


# Encoding and decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", EXPECTED["items"], ids=lambda item: repr(item["text"])[:40])
def test_text_becomes_the_ids_pieces_and_text_of_the_original(released, item):
    assert released.encode(item["text"]) == item["ids"]
    assert released(item["text"])["input_ids"] == item["ids"]
    assert released.tokenize(item["text"]) == item["pieces"]
    assert released.decode(item["ids"]) == item["decoded"]
    assert released.encode(item["text"], keep_linebreaks=True) == item["ids_keep_linebreak"]
    assert released(item["text"], keep_linebreaks=True)["input_ids"] == item["ids_keep_linebreak"]
    assert released.decode(item["ids_keep_linebreak"]) == item["decoded_keep_linebreak"]


@pytest.mark.parametrize(
    "text",
    [
        "<pad>", "<s></s>", "<unk>", "a<pad>b", "<image_17>", "<n><n>\n", "▁", "x" * 300, "\0\x07a", "A　tiger",
        "<start_of_image><start_of_english>a<start_of_chinese>", "< start_of_image >", "🐯🐯 虎", "ﬁre½①㍍", "e\u0301",
    ],
)  # fmt: skip
def test_any_text_is_encoded_as_sentencepiece_encodes_it(released, by_protobuf, text):
    assert released.encode(text) == [20000 + index for index in by_protobuf.encode(text)]


def test_a_text_alone_has_the_ids_of_its_pieces(released, tmp_path):
    """It goes a short way through SentencePiece."""
    add = lambda proto: [proto.pieces.add(piece=piece, score=-1.0) for piece in ("<image_3>", "▁<image_30000>")]  # noqa: E731
    write_model(tmp_path / "odd.model", add)
    odd = IcetkTokenizer(tmp_path / "odd.model")
    for tokenizer in (released, odd):
        for text in [*TEXTS, "a <image_3> b", "<image_30000>", "a☃<pad>☃ cat", "<start_of_image>", "", " a  cat\n"]:
            ids = tokenizer.encode(text)
            assert ids == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == tokenizer(text)["input_ids"]
    assert odd.encode("<image_3>") != released.encode("<image_3>")
    with pytest.raises((TypeError, ValueError)):
        released.encode(3)


def test_an_unknown_run_that_spells_a_control_piece_is_unknown(tmp_path):
    def keep_few(proto):
        kept = [copy.deepcopy(piece) for piece in proto.pieces if piece.type != piece.NORMAL or piece.piece in "▁虎"]
        del proto.pieces[:]
        proto.pieces.extend(kept)

    tokenizer = IcetkTokenizer(write_model(tmp_path / "small.model", keep_few), num_image_tokens=10)
    assert tokenizer.encode("<pad>") == [tokenizer.convert_tokens_to_ids("▁"), tokenizer.unk_token_id]
    assert tokenizer.tokenize("<pad>") == ["▁", "<unk>"]


def test_pieces_spell_the_text_again(released):
    text = "a tiger,一只老虎<n>"
    assert released.convert_tokens_to_string(released.tokenize(text)) == "a tiger,一只老虎\n"


def test_decoding_names_image_codes_and_can_leave_out_special_tokens(released):
    ids = [*released.encode("a tiger"), released.boi_token_id, 3, 19999, released.pad_token_id]
    assert released.decode(ids) == "a tiger<start_of_image><image_3><image_19999>"
    assert released.decode(ids, skip_special_tokens=True) == "a tiger<image_3><image_19999>"
    assert released.decode(torch.tensor([ids, ids])) == [released.decode(ids)] * 2
    assert released.decode(ids[0]) == "a"


def test_added_tokens_get_the_next_ids_and_leave_other_text_alone(released):
    tokenizer = copy.deepcopy(released)
    assert tokenizer.add_tokens(["<my-cat>"]) == 1
    assert len(tokenizer) == len(released) + 1 and len(tokenizer.get_vocab()) == len(tokenizer)
    ids = tokenizer.encode("a<my-cat><pad>")
    assert ids == [*released.encode("a"), len(released), *released.encode("<pad>")]
    assert tokenizer.decode(ids[:2]) == "a<my-cat>"
    assert all(tokenizer.encode(text) == released.encode(text) for text in TEXTS)


# The id space --------------------------------------------------------------------------------------------------------


def test_names_and_ids_are_those_of_the_original(released):
    meta = EXPECTED["meta"]
    for name, index in meta["special"].items():
        assert released.convert_tokens_to_ids(name) == index
    for index, name in meta["id_to_piece"].items():
        assert released.convert_ids_to_tokens(int(index)) == name
    assert released.convert_tokens_to_ids("no such piece") == meta["unknown_piece_lookup"] == released.unk_token_id
    assert released.vocab_size == len(released) == meta["num_tokens"]
    assert (released.boi_token_id, released.start_of_english_id, released.start_of_chinese_id) == (20400, 20401, 20402)
    assert released.pad_token_id == 20003
    assert [released.sp_model.get_score(index) for index in (400, 401, 402)] == [0, 0, 0]


@pytest.mark.parametrize("num_image_tokens", [0, 7, 1024])
def test_every_id_has_one_name_and_every_name_its_id(num_image_tokens):
    tokenizer = IcetkTokenizer(MODEL, num_image_tokens=num_image_tokens)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(tokenizer) == num_image_tokens + 403 and len(set(names)) == len(names)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(tokenizer)))
    assert tokenizer.get_vocab() == {name: index for index, name in enumerate(names)}
    assert tokenizer.convert_tokens_to_ids(f"<image_{num_image_tokens + 5}>") == tokenizer.unk_token_id
    assert tokenizer.convert_tokens_to_ids("<image_01>") == tokenizer.unk_token_id


def test_start_tokens_that_the_file_holds_already_are_not_added_again(tmp_path, released):
    def add(proto):
        for token in START_TOKENS[:2]:
            proto.pieces.add(piece=token, score=0.0)

    tokenizer = IcetkTokenizer(write_model(tmp_path / "two.model", add))
    assert len(tokenizer) == len(released)
    assert all(tokenizer.encode(text) == released.encode(text) for text in TEXTS)


# Language ------------------------------------------------------------------------------------------------------------


def test_language_is_chinese_from_the_first_chinese_id_on():
    tokenizer = IcetkTokenizer(MODEL, num_image_tokens=100, language_ranges={"en": (150, 300), "zh": (300, 450)})
    assert tokenizer.language([100, 150, 299]) == "en"
    assert tokenizer.language([100, 299, 300]) == "zh"
    assert tokenizer.language([460]) == "zh"  # a rare piece
    assert tokenizer.language([]) == "en"
    assert tokenizer.language(torch.tensor([160, 310])) == "zh"
    start_tokens = tokenizer.convert_tokens_to_ids(list(START_TOKENS))
    assert tokenizer.language([99, *start_tokens, tokenizer.pad_token_id]) == "en"


def test_language_of_a_text_is_that_of_its_ids(tokenizer):
    assert tokenizer.language("a tiger on a blue background.") == "en"
    assert tokenizer.language("一只老虎,蓝色背景。") == "zh"
    assert tokenizer.language("a tiger 老虎") == "zh"


def test_language_ranges_are_the_released_ones_by_default(released):
    assert released.language_ranges == {"en": (20100, 83823), "zh": (83823, 145653)}
    assert IcetkTokenizer(MODEL, num_image_tokens=0).language_ranges == {"en": (100, 63823), "zh": (63823, 125653)}


# Batches -------------------------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_left_with_a_mask(released):
    texts = ["一只老虎", "a tiger", ""]
    batch = released(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 4)
    for text, row, mask in zip(texts, batch["input_ids"], batch["attention_mask"]):
        count = len(released.encode(text))
        assert row[4 - count :].tolist() == released.encode(text) and mask.tolist() == [0] * (4 - count) + [1] * count
        assert (row[: 4 - count] == released.pad_token_id).all()


def test_padding_can_be_to_a_length_and_on_the_right(released):
    batch = released(["a", "a tiger"], padding="max_length", max_length=6, padding_side="right")
    assert batch["attention_mask"] == [[1] + [0] * 5, [1] * 4 + [0] * 2]
    assert released(["a", ""])["input_ids"] == [released.encode("a"), []]


# Files ---------------------------------------------------------------------------------------------------------------


def assert_same(tokenizer, expected):
    assert len(tokenizer) == len(expected)
    assert (tokenizer.num_image_tokens, tokenizer.language_ranges) == (
        expected.num_image_tokens,
        expected.language_ranges,
    )
    assert tokenizer.padding_side == expected.padding_side
    assert tokenizer.all_special_tokens == expected.all_special_tokens
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))


def test_save_and_load_keeps_everything_and_the_file_byte_for_byte(tmp_path):
    tokenizer = IcetkTokenizer(MODEL, num_image_tokens=64, language_ranges={"en": (164, 200), "zh": (200, 464)})
    tokenizer.save_pretrained(tmp_path / "first")
    loaded = IcetkTokenizer.from_pretrained(tmp_path / "first")
    assert_same(loaded, tokenizer)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("ice_text.model", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert (tmp_path / "first" / "ice_text.model").read_bytes() == MODEL.read_bytes()


def test_saved_files_name_no_place_on_this_machine(tmp_path, released):
    released.save_pretrained(tmp_path / "first")
    IcetkTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "tokenizer_config.json").read_text(encoding="utf-8")


def test_added_tokens_are_saved(tmp_path, released):
    tokenizer = copy.deepcopy(released)
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(tmp_path)
    assert IcetkTokenizer.from_pretrained(tmp_path).encode("a<my-cat>") == tokenizer.encode("a<my-cat>")


def test_loading_with_another_number_of_image_codes_moves_all_ids(tmp_path, released):
    released.save_pretrained(tmp_path)
    ranges = {"en": (164, 200), "zh": (200, 464)}
    tokenizer = IcetkTokenizer.from_pretrained(tmp_path, num_image_tokens=64, language_ranges=ranges)
    assert_same(tokenizer, IcetkTokenizer(MODEL, num_image_tokens=64, language_ranges=ranges))
    assert (tokenizer.pad_token_id, tokenizer.boi_token_id) == (67, 464)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_need_no_file(tmp_path, clone):
    path = tmp_path / "ice_text.model"
    path.write_bytes(MODEL.read_bytes())
    tokenizer = IcetkTokenizer(path, num_image_tokens=5)
    duplicate = clone(tokenizer)
    path.unlink()
    assert_same(duplicate, tokenizer)
    duplicate.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ice_text.model").read_bytes() == MODEL.read_bytes()


class TextPipeline(DiffusionPipeline):
    """The smallest pipeline that holds a tokenizer."""

    def __init__(self, tokenizer):
        super().__init__()
        self.register_modules(tokenizer=tokenizer)


def test_a_pipeline_saves_and_loads_the_tokenizer_by_its_name_in_the_package(tmp_path, released):
    TextPipeline(released).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["tokenizer"] == ["cogview_pipelines", "IcetkTokenizer"]
    assert cogview_pipelines.IcetkTokenizer is IcetkTokenizer
    loaded = TextPipeline.from_pretrained(tmp_path).tokenizer
    assert type(loaded) is IcetkTokenizer
    assert_same(loaded, released)


def test_neither_loading_nor_encoding_needs_protobuf(tmp_path, released):
    released.save_pretrained(tmp_path)
    code = """
import sys
class NoProtobuf:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("google.protobuf"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoProtobuf())
from cogview_pipelines.models.cogview2.tokenization_icetk import IcetkTokenizer
tokenizer = IcetkTokenizer.from_pretrained(sys.argv[1])
print(tokenizer.encode("a<start_of_chinese>b"))
tokenizer.save_pretrained(sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "again")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [20011, 20402, 20396]
    assert (tmp_path / "again" / "ice_text.model").read_bytes() == MODEL.read_bytes()


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`vocab_file` .*gone\.model' does not exist"):
        IcetkTokenizer(tmp_path / "gone.model")
    with pytest.raises(ValueError, match=r"is a folder.*from_pretrained"):
        IcetkTokenizer(tmp_path)
    with pytest.raises(TypeError, match=r"`vocab_file` must be the path of `ice_text\.model`, but is of type `bytes`"):
        IcetkTokenizer(b"model")


def test_a_folder_without_the_model_file_says_so(tmp_path, released):
    released.save_pretrained(tmp_path)
    (tmp_path / "ice_text.model").unlink()
    with pytest.raises(ValueError, match=r"must hold `ice_text\.model`"):
        IcetkTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"<html>", lambda data: data[: len(data) // 2]])
def test_a_damaged_model_file_is_refused(tmp_path, released, damage):
    released.save_pretrained(tmp_path)
    (tmp_path / "ice_text.model").write_bytes(damage(MODEL.read_bytes()))
    with pytest.raises(ValueError, match="is not a SentencePiece model, or is damaged"):
        IcetkTokenizer.from_pretrained(tmp_path)


def test_a_model_without_padding_is_refused(tmp_path):
    def rename(proto):
        proto.pieces[3].piece = "<nothing>"

    with pytest.raises(ValueError, match="has no piece '<pad>' for `pad_token`"):
        IcetkTokenizer(write_model(tmp_path / "other.model", rename))


@pytest.mark.parametrize(
    "ranges", [{"en": (0, 5)}, {"en": (90, 200), "zh": (200, 300)}, {"en": (200, 300), "zh": (150, 200)}, "en", 5]
)
def test_impossible_language_ranges_are_refused(ranges):
    with pytest.raises(ValueError, match="`language_ranges` must be like"):
        IcetkTokenizer(MODEL, num_image_tokens=100, language_ranges=ranges)


def test_values_of_the_wrong_type_are_refused(released):
    with pytest.raises(TypeError, match="`num_image_tokens` must be an integer, but is 'many'"):
        IcetkTokenizer(MODEL, num_image_tokens="many")
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        IcetkTokenizer(MODEL, num_image_tokens=-1)
    with pytest.raises(TypeError, match="`text` must be a string, but is of type `int`"):
        released.tokenize(5)
    with pytest.raises(TypeError, match="`text` must be a string or a sequence of ids, but is 5"):
        released.language(5)
    with pytest.raises(IndexError, match=r"`ids` must lie in 0..20402, but there is 20403"):
        released.decode([20403])


def test_white_space_before_the_start_of_an_image_is_a_piece(tokenizer):
    cat = tokenizer.encode("a cat")
    (space,) = set(tokenizer.convert_tokens_to_ids(["▁"]))
    assert tokenizer.encode_before_image("a cat") == tokenizer.encode("a cat ") == cat
    for text in ("a cat ", "a cat\n", "a cat \t "):
        assert tokenizer.encode_before_image(text) == [*cat, space]
    for text in ("", " ", "\n"):  # nothing is said
        assert tokenizer.encode_before_image(text) == []


def test_pipelines_read_prompts_as_they_stand_before_an_image(tokenizer):
    from cogview_pipelines import CogView2Pipeline

    from ...utils import make_coglm, make_vq_model, token_config

    pipe = CogView2Pipeline(tokenizer, make_coglm(**token_config(tokenizer)), make_vq_model())
    cat = tokenizer.encode_before_image("a cat ")
    assert pipe._encode_prompts(["a cat ", "a cat"], None, False) == [cat, cat[:-1]]
