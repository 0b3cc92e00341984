"""`training_scripts/train_tokenizer.py`: which pieces come out, their order, and what of a text they keep."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from cogview_pipelines import demo
from cogview_pipelines.models.cogview2.tokenization_icetk import IcetkTokenizer

SCRIPTS = Path(__file__).parents[2] / "training_scripts"
NOUNS = {"tiger": "老虎", "cat": "猫", "apple": "苹果", "car": "汽车", "tree": "树"}
COLOURS = {"blue": "蓝色", "green": "绿色", "white": "白色", "red": "红色"}


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPTS / "train_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A `.jsonl` file of captions with some Greek, full-width punctuation, and a text file."""
    folder = tmp_path_factory.mktemp("captions")
    rows = [
        {
            "en": f"a {noun} on a {colour} background, 3D!",
            "zh": [f"一只{noun_zh}，{zh}背景！", f"{zh}背景上的{noun_zh}。"],
        }
        for noun, noun_zh in NOUNS.items()
        for colour, zh in COLOURS.items()
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "more.txt").write_text("the letters α and β\n\n  a red (1) tree  \n", encoding="utf-8")
    (folder / "words.txt").write_text(
        "\n".join([*NOUNS.values(), *COLOURS.values(), "一只", "背景"]), encoding="utf-8"
    )
    return folder


def run(script, captions, output, *options):
    """Train on both files; return the tokenizer."""
    files = [str(captions / "captions.jsonl"), str(captions / "more.txt")]
    script.main(
        [
            "--train_files",
            *files,
            "--output_dir",
            str(output),
            "--vocab_size",
            "120",
            "--num_image_tokens",
            "16",
            *options,
        ]
    )
    return IcetkTokenizer.from_pretrained(output)


@pytest.fixture(scope="module", params=["substrings", "whole words"])
def tokenizer(request, script, captions, tmp_path_factory):
    """A tokenizer trained with and without `--whole_words`."""
    options = ["--whole_words", "--words_file", str(captions / "words.txt")] if request.param == "whole words" else []
    return run(script, captions, tmp_path_factory.mktemp("tokenizer"), *options)


def test_pieces_stand_in_the_order_of_the_release(tokenizer, script):
    first = tokenizer.num_image_tokens
    pieces = tokenizer.convert_ids_to_tokens(list(range(first, tokenizer.boi_token_id)))
    assert pieces[:6] == ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (first, first + 3)
    groups = [script.GROUPS.index(script.group(piece)) for piece in pieces[5:]]
    assert groups == sorted(groups) and set(groups) == {0, 1, 2, 3}
    english, chinese = tokenizer.language_ranges["en"], tokenizer.language_ranges["zh"]
    assert english == (first + 5 + groups.index(1), first + 5 + groups.index(2))
    assert chinese == (english[1], first + 5 + groups.index(3))
    names = ["<start_of_image>", "<start_of_english>", "<start_of_chinese>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(first + len(pieces), len(tokenizer)))


def test_scores_fall_within_each_group(tokenizer):
    scores = [tokenizer.sp_model.get_score(index) for index in range(tokenizer.sp_model.get_piece_size() - 3)]
    bounds = [
        6,
        *(index - tokenizer.num_image_tokens for pair in tokenizer.language_ranges.values() for index in pair),
    ]
    assert max(scores[5:]) < 0  # so that the start tokens, at 0, win
    for low, high in pairwise(bounds):
        assert scores[low:high] == sorted(scores[low:high], reverse=True)


def test_texts_are_encoded_without_unknowns_and_in_their_language(tokenizer):
    for noun, noun_zh in NOUNS.items():
        for text, language in ((f"a {noun} on a red background", "en"), (f"一只{noun_zh}，红色背景", "zh")):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.language(ids) == language
    assert tokenizer.language("3, 1!") == "en"
    assert tokenizer.unk_token_id in tokenizer.encode("ж")


def test_full_width_punctuation_shares_ids_with_ascii(tokenizer):
    assert tokenizer.encode("一只猫，红色！") == tokenizer.encode("一只猫,红色!")
    assert tokenizer.decode(tokenizer.encode("一只猫，红色！")) == "一只猫,红色!"


def test_ordering_the_pieces_changes_no_segmentation(script, captions):
    config = script.TokenizerConfig(output_dir="unused", vocab_size=120)
    texts = list(script.read_texts(str(captions / "captions.jsonl"), ["en", "zh"]))
    model = script.train_model(texts, [], config)
    ordered, counts = script.order_pieces(model)
    before, after = (script.sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (model, ordered))
    assert sum(counts.values()) == before.get_piece_size() == after.get_piece_size()
    for text in texts:
        assert after.encode(text, out_type=str) == before.encode(text, out_type=str)


def test_whole_words_are_single_pieces(script, captions, tmp_path):
    options = ["--whole_words", "--words_file", str(captions / "words.txt"), "--normalization", "nmt_nfkc_cf"]
    tokenizer = run(script, captions, tmp_path, *options, "--required_characters", "qz", "--split_by_number", "false")
    assert tokenizer.tokenize("A Tiger on a BLUE background, 3D") == [
        *("▁a", "▁tiger", "▁on", "▁a", "▁blue", "▁background", ",", "▁3d")
    ]
    assert tokenizer.tokenize("一只老虎，蓝色背景") == ["▁", "一只", "老虎", ",", "蓝色", "背景"]
    assert tokenizer.tokenize("蓝色背景上的老虎") == ["▁", "蓝色", "背景", "上的", "老虎"]
    assert tokenizer.unk_token_id not in tokenizer.encode("qz")


def test_the_same_command_gives_the_same_files(script, captions, tmp_path):
    for name in "ab":
        run(script, captions, tmp_path / name, "--whole_words")
    for name in ("ice_text.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"seeds.tsv" not in (tmp_path / "a" / "ice_text.model").read_bytes()


def test_emoji_captions_in_both_languages_are_short_and_known(script, tmp_path, capsys):
    settings = yaml.safe_load((SCRIPTS / "emoji" / "tokenizer_small.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**settings, "emoji_pairs": 50}), encoding="utf-8")
    script.main(["--config", str(path), "--output_dir", str(tmp_path / "tokenizer")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = IcetkTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert report["vocab_size"] == len(tokenizer) and report["en"]["max"] <= 28 and report["zh"]["max"] <= 28
    scope = demo.Scope(tuple(demo.load_concepts()), tuple(demo.STYLES), tuple(demo.BACKGROUNDS), demo.LAYOUTS)
    for scene in demo.sample_scenes(scope, 200, 1):
        for language in demo.LANGUAGES:
            for caption in demo.captions(scene, language):
                ids = tokenizer.encode(caption)
                assert tokenizer.unk_token_id not in ids and len(ids) <= 28
                assert tokenizer.language(ids) == language
                assert tokenizer.decode(ids) == caption.lower().replace("，", ",")


def test_characters_that_get_no_piece_are_counted_and_named(script, captions, tmp_path, capsys, caplog):
    tokenizer = run(script, captions, tmp_path / "some", "--character_coverage", "0.98")
    unknown = json.loads(capsys.readouterr().out.splitlines()[-1])["unknown"]
    assert unknown["texts"] and unknown["tokens"] >= unknown["texts"] and {"α", "β"} <= set(unknown["characters"])
    assert all(tokenizer.parts_without_piece(character) for character in unknown["characters"])
    texts = {
        *script.read_texts(str(captions / "captions.jsonl"), ["en", "zh"]),
        "the letters α and β",
        "a red (1) tree",
    }
    ids = [tokenizer.encode(text) for text in texts]
    assert unknown["tokens"] == sum(each.count(tokenizer.unk_token_id) for each in ids)
    assert unknown["texts"] == sum(tokenizer.unk_token_id in each for each in ids)
    assert f"{len(unknown['characters'])} characters have no piece" in caplog.text
    caplog.clear()
    run(script, captions, tmp_path / "all")
    unknown = json.loads(capsys.readouterr().out.splitlines()[-1])["unknown"]
    assert unknown == {"tokens": 0, "texts": 0, "characters": ""} and "no piece" not in caplog.text


@pytest.mark.parametrize("coverage", ["0.98", "0.9995"])
def test_every_coverage_that_passes_is_one_that_sentencepiece_takes(script, captions, coverage, tmp_path):
    assert len(run(script, captions, tmp_path, "--character_coverage", coverage)) > 16


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to train on"),
        (["--train_files", "x.txt", "--vocab_size", "3"], "`--vocab_size` must be at least 10, but is 3"),
        *(
            (
                ["--train_files", "x.txt", "--character_coverage", number],
                r"`--character_coverage` must be from 0\.98 to 1",
            )
            for number in ("0", "0.9799", "1.01")
        ),
    ],
)
def test_impossible_options_are_refused(script, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        script.main([*options, "--output_dir", str(tmp_path / "tokenizer")])
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    "line, message", [("{", r":1 is not JSON"), ('"a"', r":1 must be"), ('{"fr": "x"}', r":1 has none of")]
)
def test_a_bad_line_is_named_with_its_number(script, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(script.read_texts(str(tmp_path / "bad.jsonl"), ["en", "zh"]))


def test_half_of_a_surrogate_pair_is_refused_with_its_line(script, tmp_path):
    (tmp_path / "half.jsonl").write_text('{"en": "a cat"}\n{"en": ["a dog", "\\ud800"]}\n')
    with pytest.raises(ValueError, match=r"half\.jsonl:2 must have Unicode text, but '\\ud800'"):
        list(script.read_texts(str(tmp_path / "half.jsonl"), ["en", "zh"]))


def test_files_without_text_are_refused(script, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="hold no text"):
        script.main(["--train_files", str(tmp_path / "empty.txt"), "--output_dir", str(tmp_path / "tokenizer")])
