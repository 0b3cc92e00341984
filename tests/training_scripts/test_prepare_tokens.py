"""`training_scripts/prepare_tokens.py`: pictures or emoji scenes become a token folder; what it says of bad input."""

import json
import logging
import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2UpscalePipeline,
    CogViewCaptionPipeline,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
    IcetkTokenizer,
    IcetkVQModel,
)
from cogview_pipelines.demo import BACKGROUNDS, Scope, captions, iterate_scenes, read_caption, render
from cogview_pipelines.training.data.captions import MOST_LOOKED_AT, tell_text_losses
from cogview_pipelines.training.data.tokens import TokenData

from .conftest import as_arguments, load_script


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_tokens")


@pytest.fixture
def pictures(tmp_path):
    """Five picture files, of several kinds and shapes, and a line of captions for each."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    names = ["a.png", "b.jpg", "c.webp", "more/d.png", "e.png"]
    for index, name in enumerate(names):
        image = Image.fromarray(pixels[index]).resize((64, 48), Image.Resampling.BILINEAR)
        (image.convert("L") if name == "e.png" else image).save(folder / name)
    rows = [
        {"file": "a.png", "en": "a tiger", "zh": ["一只老虎", "老虎"]},
        {"file": "b.jpg", "en": ["a cat"]},
        {"file": "c.webp", "zh": "一棵树", "weight": 2},
        {"file": "more/d.png", "en": "an apple", "id": 7},
        {"file": "e.png", "en": "a car"},
    ]
    write_lines(folder, rows)
    return folder


def write_lines(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def run(script, pictures, vqvae_folder, tmp_path):
    def call(**options):
        options = {
            "image_folder": pictures,
            "captions": pictures / "captions.jsonl",
            "vqvae": vqvae_folder,
            "low_size": 32,
            "fine_size": 96,
            "batch_size": 2,
            "output_dir": tmp_path / "tokens",
            **options,
        }
        script.main(as_arguments({name: value for name, value in options.items() if value is not None}))
        return load_file(tmp_path / "tokens" / "tokens.safetensors")

    return call


def test_a_folder_of_pictures_becomes_tokens_with_their_captions(run, pictures, vqvae_folder, tokenizer, tmp_path):
    tensors = run()
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"low": (5, 4, 4), "fine": (5, 12, 12)}
    data = TokenData.load(tmp_path / "tokens", tokenizer)
    assert [list(texts) for texts in data.captions] == [["en", "zh"], ["en"], ["zh"], ["en"], ["en"]]
    assert data.captions[0]["zh"] == ["一只老虎", "老虎"]
    assert data.captions[3]["en"] == ["an apple"]
    assert data.weights.tolist() == [1, 1, 2, 1, 1]
    # each line has the tokens of its own picture: cut to the square in the middle, scaled to the size
    vqvae = IcetkVQModel.from_pretrained(vqvae_folder).eval()
    for index, name in enumerate(["a.png", "b.jpg", "c.webp", "more/d.png", "e.png"]):
        image = Image.open(pictures / name).convert("RGB").crop((8, 0, 56, 48)).resize((32, 32), Image.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float() / 255
        with torch.no_grad():
            same = (vqvae.encode(pixels, 8).tokens == data.low).sum((1, 2))
        assert same.argmax() == index and same[index] >= 15  # of 16: a batch may round a near tie another way


def test_processes_that_read_ahead_change_nothing(run, pictures, tmp_path):
    alone = run(), (tmp_path / "tokens/captions.jsonl").read_text(encoding="utf-8")
    helped = run(data_workers=2), (tmp_path / "tokens/captions.jsonl").read_text(encoding="utf-8")
    assert alone[1] == helped[1] and all(torch.equal(value, helped[0][name]) for name, value in alone[0].items())
    (pictures / "b.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"Line 2 of .*b\.jpg is no picture that can be read"):
        run(data_workers=1)


def test_low_resolution_alone_and_options_from_a_file(run, tmp_path):
    (tmp_path / "tokens.yaml").write_text("low_size: 16\nfine_size: 0\n")
    tensors = run(config=tmp_path / "tokens.yaml", low_size=None, fine_size=None)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"low": (5, 2, 2)}


def test_a_float16_image_tokenizer_gives_the_tokens_of_its_weights_in_float32(run, vqvae_folder, tmp_path):
    half = IcetkVQModel.from_pretrained(vqvae_folder).half()
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "rounded")
    tokens = [run(vqvae=tmp_path / name)["low"] for name in ("half", "rounded")]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_captions_that_name_the_second_object_first_make_up_the_share_that_is_asked_for(script, share):
    scope = Scope(("1f431", "1f42f"), ("noto",), ("blue",), ("pair",))
    for scene in list(iterate_scenes(scope, "pair", "train"))[:4]:
        for language, words in (("en", ("right of", "below")), ("zh", ("右边", "下面"))):
            texts = captions(scene, language) * 4
            thinned = script.thin_reversed(texts, language, share)
            is_reversed = [any(word in text for word in words) for text in thinned]
            assert sum(is_reversed) / len(thinned) == pytest.approx(share, abs=0.02)
            assert set(thinned) <= set(texts)
            assert {text for text in texts if not any(word in text for word in words)} <= set(thinned)


def test_emoji_scenes_of_the_scope_are_encoded_and_drawn_by_the_share_of_singles(
    script, run, vqvae_folder, tokenizer, tmp_path
):
    scope = Scope(("1f431", "1f42f", "1f34e"), ("noto",), ("blue", "white"), ("single", "pair"))
    scope.save(tmp_path / "scope.json")
    options = {"image_folder": None, "captions": None, "scope": tmp_path / "scope.json", "max_pairs": 3}
    tensors = run(low_size=24, fine_size=48, batch_size=8, **options)
    data = TokenData.load(tmp_path / "tokens", tokenizer)
    singles = list(iterate_scenes(scope, "single", "train"))
    assert len(tensors["low"]) == len(singles) + 3 == len(data)
    assert tensors["low"].shape[1:] == (3, 3) and tensors["fine"].shape[1:] == (6, 6)
    assert data.weights[: len(singles)].sum().item() == pytest.approx(0.15)
    assert data.weights.sum().item() == pytest.approx(1)
    lines = [json.loads(line) for line in (tmp_path / "tokens/captions.jsonl").open(encoding="utf-8")]
    assert all(line["en"] and line["zh"] for line in lines)
    noun = {"1f431": "cat", "1f42f": "tiger", "1f34e": "apple"}[singles[0].objects[0]]
    assert noun in lines[0]["en"][0] and singles[0].background in lines[0]["en"][0]
    pixels = torch.from_numpy(np.array(render(singles[0], 24))).movedim(-1, 0)[None].float() / 255
    vqvae = IcetkVQModel.from_pretrained(vqvae_folder).eval()
    with torch.no_grad():
        assert torch.equal(vqvae.encode(pixels, 8).tokens[0], tensors["low"][0].long())


@pytest.mark.parametrize("templates, number", [(None, 5), (3, 7)])
def test_emoji_scenes_in_sentences_keep_the_templates_for_captioning(run, tokenizer, tmp_path, templates, number):
    scope = Scope(("1f431", "1f42f"), ("noto",), ("blue",), ("single", "pair"))
    scope.save(tmp_path / "scope.json")
    options = {"image_folder": None, "captions": None, "scope": tmp_path / "scope.json", "sentences": 4}
    run(low_size=24, fine_size=0, batch_size=8, templates=templates, **options)
    data = TokenData.load(tmp_path / "tokens", tokenizer)
    scenes = [*iterate_scenes(scope, "single", "train"), *iterate_scenes(scope, "pair", "train")]
    for scene, texts, targets in zip(scenes, data.captions, data.targets, strict=True):
        for language in ("en", "zh"):
            requests = [read_caption(text, language).request() for text in texts[language]]
            assert len(requests) == number and all(request.is_met_by(scene) for request in requests)
            assert all(read_caption(text, language).compare(scene)["all"] for text in targets[language])
            if scene.layout == "pair":  # captioning learns to write what is left or above first
                words = ("right of", "below") if language == "en" else ("右边", "下面")
                is_reversed = [any(word in text for word in words) for text in targets[language]]
                assert sum(is_reversed) / len(is_reversed) == pytest.approx(0.1, abs=0.03)
    generator = torch.Generator().manual_seed(0)
    written = {tuple(data.draw_caption(0, generator, to_write=True)) for _ in range(40)}
    assert written <= {tuple(data.encode(text)) for texts in data.targets[0].values() for text in texts}


def test_things_that_are_hard_to_learn_are_drawn_more_often(run, tokenizer, tmp_path):
    scope = Scope(("1f431", "1f42f", "1f34e"), ("noto",), ("blue",), ("single", "pair"))
    scope.save(tmp_path / "scope.json")
    (tmp_path / "tokens.yaml").write_text('frequencies: {1f431: 3, "1f34e": 1.5}\n')
    options = {"image_folder": None, "captions": None, "scope": tmp_path / "scope.json"}
    run(low_size=24, fine_size=0, batch_size=8, config=tmp_path / "tokens.yaml", **options)
    weights = TokenData.load(tmp_path / "tokens", tokenizer).weights
    for layout, share in (("single", 0.15), ("pair", 0.85)):
        scenes = list(iterate_scenes(scope, layout, "train"))
        part, weights = weights[: len(scenes)], weights[len(scenes) :]
        times = [max({"1f431": 3, "1f34e": 1.5}.get(thing, 1) for thing in scene.objects) for scene in scenes]
        assert len(set(times)) > 1
        assert part.tolist() == pytest.approx([share / len(scenes) * number for number in times])
    assert not len(weights)


@pytest.mark.parametrize("sentences", [0, 2])
def test_scenes_on_other_colours_are_called_by_a_name_only_near_it(script, sentences):
    options = {"sentences": sentences, "other_colours_share": 0.5}
    drawn = script.EmojiPictures(script.PrepareConfig(output_dir="out", **options), [24])
    plain = script.EmojiPictures(script.PrepareConfig(output_dir="out", sentences=sentences), [24])
    kinds = dict.fromkeys(("own", "near", "far"), 0)
    for index in range(120):
        (picture,), texts = drawn[index]
        (own,), own_texts = plain[index]
        scene = plain.scenes[index][0]
        colour, named = picture.getpixel((0, 0)), BACKGROUNDS[scene.background].rgb
        distances = [max(abs(a - b) for a, b in zip(colour, ground.rgb)) for ground in BACKGROUNDS.values()]
        kind = "own" if colour == named else "near" if max(map(abs, np.subtract(colour, named))) <= 20 else "far"
        kinds[kind] += 1
        assert (picture.tobytes() == own.tobytes()) is (kind == "own")
        if kind == "far":
            assert min(distances) > 30 and "targets" not in texts
        for language in ("en", "zh"):
            readings = [read_caption(text, language) for text in texts.get("targets", texts)[language]]
            if kind == "far":
                assert {(reading.background, reading.style) for reading in readings} == {(None, scene.style)}
            else:
                assert texts.get("targets", texts)[language] == own_texts.get("targets", own_texts)[language]
    assert kinds["own"] > 40 and kinds["near"] > 12 and kinds["far"] > 12


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file": "a.png"}', r"Line 3 of .*captions\.jsonl must be an object with captions"),
        ('{"file": "a.png", "en": "   "}', r"Line 3 of .*captions\.jsonl must be an object with captions"),
        ('{"en": "a cat"}', r"Line 3 of .*captions\.jsonl must name a picture in `file`"),
        ('{"file": "a.png", "en": ["a", 1]}', r"Line 3 of .*captions\.jsonl must have a text or a list of texts in"),
        ('{"file": "a.png", "en": "a", "weight": -1}', r"Line 3 of .* number of at least 0 as `weight`, but has -1"),
        ("not JSON", r"Line 3 of .*captions\.jsonl is not JSON .*'not JSON'"),
        ("[1]", r"Line 3 of .*captions\.jsonl must be a JSON object"),
        (
            r'{"file": "a.png", "zh": ["a", "\ud800 cat"]}',
            r"Line 3 of .*captions\.jsonl must have Unicode text in 'zh', but '\\ud800 cat'",
        ),
        (r'{"file": "a.png", "en": "a", "style": "\udc00"}', r"`style` of Line 3 of .* must have Unicode text"),
        (
            r'{"file": "a.png", "en": "a", "targets": {"en": "\udc00"}}',
            r"`targets` of Line 3 of .* must have Unicode text in 'en'",
        ),
    ],
)
def test_a_bad_line_is_named_before_any_work(run, pictures, line, message, tmp_path):
    write_lines(pictures, [{"file": "a.png", "en": "a tiger"}, "", line])  # empty lines count, as in an editor
    with pytest.raises(ValueError, match=message):
        run()
    assert not (tmp_path / "tokens/tokens.safetensors").exists()


@pytest.mark.parametrize("damage", ["not a picture", "cut off"])
def test_an_unreadable_picture_is_named_or_left_out(run, pictures, damage, tokenizer, tmp_path, caplog):
    path = pictures / "b.jpg"
    path.write_bytes(b"text" if damage == "not a picture" else path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"Line 2 of .*captions\.jsonl: .*b\.jpg is .*--skip_unreadable"):
        run()
    with caplog.at_level(logging.WARNING):
        tensors = run(skip_unreadable=True)
    assert "Line 2" in caplog.text and "b.jpg" in caplog.text
    assert len(tensors["low"]) == 4
    assert [list(texts) for texts in TokenData.load(tmp_path / "tokens", tokenizer).captions][1] == ["zh"]


def test_missing_pictures_are_named_all_at_once_or_left_out_and_counted(
    run, pictures, tokenizer, tmp_path, caplog, capsys
):
    names = ["a.png", "y.png", "b.jpg", "more/z.png"]
    write_lines(pictures, [{"file": name, "en": f"a cat of {name}"} for name in names])
    with pytest.raises(ValueError, match=r"2 of 4 lines name .* Line 2 of .*y\.png'; Line 4 of .*z\.png'\. Add"):
        run()
    with caplog.at_level(logging.WARNING):
        run(skip_unreadable=True)
    assert [text for text in caplog.messages if "Left out" in text and ("y.png" in text or "z.png" in text)]
    assert "2 lines were left out: their pictures are not there." in capsys.readouterr().out
    kept = TokenData.load(tmp_path / "tokens", tokenizer).captions
    assert kept == [{"en": ["a cat of a.png"]}, {"en": ["a cat of b.jpg"]}]
    write_lines(pictures, [{"file": "z.png", "en": "a cat"}])
    with pytest.raises(ValueError, match="None of the 1 lines names a picture that is in"):
        run(skip_unreadable=True)


def test_pictures_without_a_line_are_counted(run, pictures, capsys):
    run()
    assert "no line names them" not in capsys.readouterr().out
    for name in ("f.png", "more/G.JPG", ".hidden.png", "notes.txt"):
        (pictures / name).write_bytes(b"never read")
    write_lines(pictures, [{"file": name, "en": "a cat"} for name in ("more/../a.png", "c.webp", "more/d.png")])
    run()
    said = capsys.readouterr().out
    assert "3 pictures are in" in said and f"4 pictures in {pictures} were left out: no line names them." in said


def test_an_unreadable_picture_is_found_before_anything_is_encoded(run, pictures, monkeypatch):
    (pictures / "e.png").write_bytes(b"text")
    monkeypatch.setattr(IcetkVQModel, "encode", lambda *_: pytest.fail("worked before looking at the pictures"))
    with pytest.raises(ValueError, match=r"1 of 5 pictures cannot be read: Line 5 of .*e\.png"):
        run()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_line_may_hold_every_character_and_the_file_a_byte_order_mark(run, pictures, tokenizer, tmp_path, encoding):
    text = "a\u2028cat\x85on\u2029a mat"
    lines = [{"file": "a.png", "en": text}, {"file": "b.jpg", "en": "a dog"}]
    text_of_file = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (pictures / "captions.jsonl").write_text(text_of_file, encoding=encoding, newline="")
    run()
    assert [row["en"] for row in TokenData.load(tmp_path / "tokens", tokenizer).captions] == [[text], ["a dog"]]


def test_blank_captions_are_left_out_and_counted(run, pictures, tokenizer, tmp_path, capsys):
    write_lines(pictures, [{"file": "a.png", "en": ["", "a cat ", "  "]}, {"file": "b.jpg", "en": " ", "zh": "猫"}])
    run()
    assert "3 blank captions were left out." in capsys.readouterr().out
    assert TokenData.load(tmp_path / "tokens", tokenizer).captions == [{"en": ["a cat"]}, {"zh": ["猫"]}]


def test_utf_16_is_named(run, pictures):
    (pictures / "captions.jsonl").write_text('{"file": "a.png", "en": "a cat"}\n', encoding="utf-16")
    with pytest.raises(ValueError, match=r"captions\.jsonl: it is UTF-16 .* UTF-8"):
        run()


@pytest.mark.parametrize("on_disk, in_list", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_however_its_accents_are_written(run, pictures, tmp_path, on_disk, in_list):
    os.rename(pictures / "a.png", pictures / unicodedata.normalize(on_disk, "café.png"))
    write_lines(pictures, [{"file": unicodedata.normalize(in_list, "café.png"), "en": "a cat"}])
    assert len(run()["low"]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"captions": "/nowhere/captions.jsonl"}, r"`captions` must be a JSONL file, .* /nowhere/captions\.jsonl"),
        ({"captions": None}, "`captions` is missing: pictures need captions"),
        ({"image_folder": None}, "`image_folder` is missing"),
        ({"image_folder": "/nowhere"}, "`image_folder` must be a folder of pictures, but there is none at /nowhere"),
        ({"low_size": 30}, "`low_size` must be a multiple of `compression_rate` 8, but is 30"),
        ({"fine_size": 80}, "`fine_size` must be a multiple of `low_size` 32, but is 80"),
        ({"compression_rate": 16}, r"`compression_rate` must be one of \[8\], which `vqvae` has, but is 16"),
        ({"reversed_share": 0.7}, r"`reversed_share` must be from 0 to 0\.5, but is 0\.7"),
        ({"other_colours_share": 1.5}, r"`other_colours_share` must be from 0 to 1, but is 1\.5"),
    ],
)
def test_options_that_cannot_work_are_named(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    "frequencies, message",
    [
        ('{"1f680": 2}', "`frequencies` must name things of `scope` by hexcode, but has '1f680'"),
        ('{"1f431": 0}', "`frequencies` must be numbers above 0, but that of 1f431 is 0"),
        ('{"1f431": "2"}', "`frequencies` must be numbers above 0, but that of 1f431 is '2'"),
        ("[1]", "`frequencies` must be a JSON object"),
    ],
)
def test_frequencies_that_cannot_be_are_named(script, frequencies, message, tmp_path):
    Scope(("1f431", "1f42f"), ("noto",), ("blue",), ("single",)).save(tmp_path / "scope.json")
    config = script.PrepareConfig(output_dir="out", scope=str(tmp_path / "scope.json"), frequencies=frequencies)
    with pytest.raises(ValueError, match=message):
        script.EmojiPictures(config, [24])


def test_an_output_folder_that_cannot_be_written_is_found_at_once(run, pictures, monkeypatch):
    monkeypatch.setattr(IcetkVQModel, "encode", lambda *_: pytest.fail("worked before looking at the output folder"))
    with pytest.raises(OSError):
        run(output_dir=pictures / "a.png" / "tokens")


# Of a pipeline -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_folder(tokenizer, tmp_path_factory):
    from ..pipelines.conftest import build

    folder = tmp_path_factory.mktemp("like") / "model"
    build(tokenizer).save_pretrained(folder)
    return folder


def test_a_pipeline_says_sizes_and_image_tokenizer_and_what_it_cannot_read_is_told(
    run, pictures, pipeline_folder, vqvae_folder, caplog, capsys
):
    expected = run()
    write_lines(
        pictures,
        [
            {"file": "a.png", "en": "a tiger on the Zugspitze"},
            {"file": "b.jpg", "en": " ".join(["a cat"] * 20)},
            {"file": "c.webp", "zh": "一棵树"},
            {"file": "more/d.png", "en": "an apple"},
            {"file": "e.png", "en": "a car"},
        ],
    )
    caplog.clear()
    found = run(like=pipeline_folder, vqvae=None, low_size=None, fine_size=None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert "5 pictures are in" in capsys.readouterr().out
    told = " ".join(record.message for record in caplog.records)
    assert (
        "Captions with more than 30 tokens" in told and ": 1 of 4 (25.0%) in English, 0 of 1 (0.0%) in Chinese" in told
    )
    shares = re.search(
        r"Pieces that the tokenizer does not know: (\d+) of (\d+) \(\S+%\) in English, 0 of (\d+) \(0\.0%\) in", told
    )
    assert 0 < int(shares[1]) < int(shares[2]) and int(shares[3])
    assert "Characters that have no piece, which no model reads: Z" in told and "new to the model" not in told


@pytest.mark.parametrize(
    "kind, parts, fine, longest",
    [
        (CogViewPipeline, ["transformer"], None, 21),
        (CogViewPipeline, ["transformer", "super_resolution_transformer"], (8, 8), 21),
        (CogViewUpscalePipeline, ["super_resolution_transformer"], (8, 8), 18),
        (CogViewCaptionPipeline, ["caption_transformer"], None, 20),
        (CogView2CaptionPipeline, ["transformer"], None, 30),
        (CogView2UpscalePipeline, ["direct_sr_transformer", "direct_sr_scheduler"], (12, 12), 29),
    ],
)
def test_whatever_a_pipeline_has_says_sizes_and_how_long_texts_may_be(
    run, pictures, tokenizer, cogview_tokenizer_folder, tmp_path, caplog, kind, parts, fine, longest
):
    from ..pipelines.conftest import build, build_cogview

    is_first = not kind.__name__.startswith("CogView2")
    pipe = build_cogview(CogViewTokenizer.from_pretrained(cogview_tokenizer_folder)) if is_first else build(tokenizer)
    names = ["tokenizer", "vqvae", *parts]
    kind(**{name: getattr(pipe, name) for name in names}).save_pretrained(tmp_path / "like")
    write_lines(pictures, [{"file": "a.png", "en": " ".join(["a cat"] * 20)}, {"file": "b.jpg", "en": "a cat"}])
    tensors = run(like=tmp_path / "like", vqvae=None, low_size=None, fine_size=None)
    expected = {"low": (2, 4, 4), **({"fine": (2, *fine)} if fine else {})}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    assert f"Captions with more than {longest} tokens" in caplog.text


@pytest.mark.parametrize(
    "absent, message",
    [
        (["vqvae"], r"has no image tokenizer \(`vqvae`\)\. Name one by `vqvae`"),
        (
            ["transformer", "direct_sr_transformer"],
            "a CogView2Pipeline, has none of transformer, direct_sr_transformer, ",
        ),
    ],
)
def test_what_a_pipeline_lacks_is_named(run, pipeline_folder, tmp_path, absent, message):
    shutil.copytree(pipeline_folder, tmp_path / "like")
    index = json.loads((tmp_path / "like/model_index.json").read_text())
    (tmp_path / "like/model_index.json").write_text(json.dumps(index | {name: [None, None] for name in absent}))
    with pytest.raises(ValueError, match=message):
        run(like=tmp_path / "like", vqvae=None, low_size=None)


def test_a_pipeline_without_a_text_tokenizer_says_sizes(run, pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "like")
    index = json.loads((tmp_path / "like/model_index.json").read_text())
    (tmp_path / "like/model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    assert run(like=tmp_path / "like", vqvae=None, low_size=None)["low"].shape == (5, 4, 4)


def test_of_many_captions_some_of_each_language_are_looked_at(tokenizer, caplog):
    many = [{"en": ["a cat"] * 3, "zh": ["一棵树Z"] * 2}] * (MOST_LOOKED_AT + 1)
    losses = tell_text_losses(many, tokenizer, 30)
    looked_at = MOST_LOOKED_AT // 2 + 1
    assert losses.captions == {"en": looked_at, "zh": looked_at}
    assert losses.unknown["zh"] >= looked_at and not losses.unknown["en"]
    assert losses.is_sample
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and all(f" (of {2 * looked_at} captions that were looked at)." in text for text in told)


@pytest.mark.parametrize("num_captions", [1, MOST_LOOKED_AT // 2 + 1])
def test_only_a_sample_is_called_one(tokenizer, caplog, num_captions):
    told = tell_text_losses([{"zh": ["一棵树Z"] * num_captions}] * 2, tokenizer, 30)
    assert told.is_sample == (num_captions > 1)
    assert told.captions["zh"] == (2 if num_captions == 1 else 2 * -(-num_captions // 2))
    assert ("looked at" in caplog.text) == told.is_sample


def test_words_that_training_teaches_are_told_apart_from_characters_that_are_lost(tokenizer_folder, caplog):
    tokenizer = IcetkTokenizer.from_pretrained(tokenizer_folder, known_words=["a", "一棵"])
    captions = [{"en": ["a tiger", "a ZZ"], "zh": ["一棵树", "一棵Z"]}, {"en": ["a tiger"]}]
    losses = tell_text_losses(captions, tokenizer, 30)
    assert losses.lost == {"Z": 1, "ZZ": 1} and losses.new_words == {"tiger": 2, "树": 1}
    assert [record.message for record in caplog.records][1:] == [
        "Characters that have no piece, which no model reads: ZZ, Z.",
        "Words that are new to the model, which training on these captions teaches it: tiger, 树.",
    ]


@pytest.mark.parametrize("family", ["cogview2", "cogview"])
def test_without_a_pipeline_a_tokenizer_says_what_it_cannot_read(
    family, run, pictures, tokenizer_folder, cogview_tokenizer_folder, vqvae_folder, caplog
):
    lines = [{"file": "a.png", "en": "a tiger Ω"}, {"file": "b.jpg", "en": " ".join(["a cat"] * 20)}]
    write_lines(pictures, lines)
    reader = {"tokenizer": tokenizer_folder if family == "cogview2" else cogview_tokenizer_folder}
    for options, cut in (({}, False), ({"max_text_tokens": 20}, True)):
        caplog.clear()
        run(**reader, **options)
        told = [record.message for record in caplog.records if "data.captions" in record.name]
        assert ("Captions with more than 20 tokens" in told[0] and "1 of 2 (50.0%)" in told[0]) is cut
        assert told[-1] == "Characters that have no piece, which no model reads: Ω."
    with pytest.raises(ValueError, match="`max_text_tokens` must be at least 1, but is 0"):
        run(**reader, max_text_tokens=0)
    with pytest.raises(ValueError, match="`max_text_tokens` counts the tokens of `tokenizer`"):
        run(max_text_tokens=20)


def test_what_is_no_text_tokenizer_of_ours_is_named(run, tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, "?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`tokenizer` must be a text tokenizer as train_tokenizer\.py saves one"):
        run(tokenizer=tmp_path / "other")


def test_nothing_is_told_where_nothing_is_lost(run, pipeline_folder, caplog, pictures):
    write_lines(pictures, [{"file": name, "en": "a cat"} for name in ("a.png", "b.jpg")])
    run(like=pipeline_folder)
    assert not [record for record in caplog.records if "data.captions" in record.name]


def test_a_share_of_the_pictures_is_held_out_and_none_is_in_both(run, pictures, tmp_path, tokenizer):
    run(held_out_share=0.4)
    kept, held_out = (TokenData.load(tmp_path / f"tokens{name}", tokenizer) for name in ("", "/held_out"))
    assert (len(kept.low), len(held_out.low)) == (3, 2)
    assert held_out.fine.shape == (2, 12, 12)
    texts = [str(row) for data in (kept, held_out) for row in data.captions]
    assert len(set(texts)) == 5
    with pytest.raises(ValueError, match="`held_out_share` must be at least 0 and below 1, but is 1"):
        run(held_out_share=1.0)


def test_padding_keeps_the_whole_picture_and_adds_white(script):
    config = script.PrepareConfig(output_dir="", fit="pad")
    pictures = script.FolderPictures.__new__(script.FolderPictures)
    pictures.sizes, pictures.fit, pictures.seed = [40], config.fit, config.seed
    image = Image.new("RGB", (80, 40), (200, 0, 0))
    pictures.rows = [(None, None, {})]
    script.read_picture, read = (lambda path: image), script.read_picture
    try:
        (square,), _ = pictures[0]
    finally:
        script.read_picture = read
    assert square.size == (40, 40)
    assert square.getpixel((20, 2)) == square.getpixel((20, 37)) == (255, 255, 255)
    assert square.getpixel((1, 20)) == square.getpixel((38, 20)) == (200, 0, 0)


def test_neither_image_tokenizer_nor_pipeline_is_an_error(run):
    with pytest.raises(ValueError, match="`vqvae` must be given, or `like`"):
        run(vqvae=None)
