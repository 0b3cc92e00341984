"""`training_scripts/assemble_cogview_pipeline.py`: trained parts of the first CogView become a pipeline folder."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cogview_pipelines import (
    CogViewCaptionPipeline,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
)
from cogview_pipelines.environment import SHIPPED_MODEL, SHIPPED_MODELS
from cogview_pipelines.models.adapters import add_adapter
from cogview_pipelines.training.adapters import LEFT_OUT

from ..utils_cogview import make_cogview
from .conftest import as_arguments, load_script

SETTINGS = {"CogViewPipeline": {"temperature": 0.7, "top_k": 5}, "CogViewCaptionPipeline": {"top_k": 3}}


@pytest.fixture(scope="module")
def parts(cogview_tokenizer_folder, cogview_vqvae_folder, tmp_path_factory):
    """Options that name all parts."""
    folder = tmp_path_factory.mktemp("cogview_parts")
    names = ("transformer", "super_resolution_transformer", "caption_transformer")
    for seed, name in enumerate(names):
        make_cogview(seed).save_pretrained(folder / name)
    models = {name: folder / name for name in names}
    return {"tokenizer": cogview_tokenizer_folder, "vqvae": cogview_vqvae_folder, **models}


@pytest.fixture
def assemble(tmp_path):
    def call(folder, **options):
        pipe = load_script("assemble_cogview_pipeline").main(
            as_arguments({"output_dir": tmp_path / folder, "dtype": "float32", **options})
        )
        return pipe, tmp_path / folder

    return call


def weights(folder, name):
    return load_file(folder / name / "model.safetensors")


def test_the_folder_is_a_pipeline_that_makes_pictures(parts, assemble, tmp_path):
    (tmp_path / "card.md").write_text("# A model\n")
    (tmp_path / "words.txt").write_text("a tiger on blue background\n")
    options = {**parts, "settings": SETTINGS, "words_file": tmp_path / "words.txt"}
    assembled, folder = assemble("model", files={"README.md": f"{tmp_path / 'card.md'}"}, **options)
    assert (folder / "README.md").read_text() == "# A model\n"
    pipe = CogViewPipeline.from_pretrained(folder)
    assert pipe.config.settings == SETTINGS and pipe.config.compression_rate == 8
    assert pipe.tokenizer.unknown_parts("a cat on a blue tiger") == ["cat"]
    pictures = []
    for one in (pipe, assembled):
        one.set_progress_bar_config(disable=True)
        pictures.append(one("a blue tiger", generator=torch.Generator().manual_seed(0)).tokens)
    assert torch.equal(*pictures)
    _, half = assemble("half", **{**parts, "dtype": "float16"})
    assert {value.dtype for value in weights(half, "transformer").values()} == {torch.float16}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("super_resolution_transformer", CogViewUpscalePipeline),
        ("caption_transformer", CogViewCaptionPipeline),
    ],
)
def test_a_folder_without_text_to_image_is_of_the_pipeline_that_it_has(parts, assemble, name, kind):
    kept = {part: parts[part] for part in ("tokenizer", "vqvae", name)}
    pipe, folder = assemble("model", **kept)
    assert type(pipe) is kind
    again, folder = assemble("same", like=folder)
    assert (
        type(again) is kind and json.loads((folder / "model_index.json").read_text())["_class_name"] == kind.__name__
    )


def test_what_no_option_says_is_as_in_the_pipeline_that_it_is_like(parts, assemble, cogview_token_folder, tmp_path):
    (tmp_path / "words.txt").write_text("tiger")
    options = {**parts, "settings": SETTINGS, "words_file": tmp_path / "words.txt"}
    _, model = assemble("model", **options)
    first, (same, folder) = CogViewPipeline.from_pretrained(model), assemble("same", like=model)
    assert same.config.settings == first.config.settings == SETTINGS
    assert same.config.compression_rate == first.config.compression_rate
    assert same.tokenizer.unknown_parts("a tiger and") == ["a", "and"]
    for name in ("transformer", "super_resolution_transformer", "caption_transformer"):
        before, after = weights(model, name), weights(folder, name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    make_cogview(7).save_pretrained(tmp_path / "new")
    taught = {"like": model, "transformer": tmp_path / "new", "data": cogview_token_folder}
    _, folder = assemble("trained", **taught)
    assert torch.equal(
        weights(folder, "transformer")["word_embeddings.weight"],
        weights(tmp_path, "new")["word_embeddings.weight"],
    )
    tokenizer = CogViewTokenizer.from_pretrained(folder, subfolder="tokenizer")
    lines = (cogview_token_folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    caption = json.loads(lines[0])["en"][0]
    assert same.tokenizer.unknown_parts(caption) and not tokenizer.unknown_parts(f"{caption} tiger")
    assert tokenizer.known_text(caption) == caption  # the prompt of a taught word reaches the model

    other, _ = assemble("other", like=model, settings={"CogViewPipeline": {"top_k": 1}})
    assert other.config.settings == {"CogViewPipeline": {"top_k": 1}}


def test_the_shipped_model_keeps_its_settings_and_words(assemble):
    _, folder = assemble("model", like=SHIPPED_MODELS["cogview-emoji"], dtype="float16")
    shipped, same = (CogViewPipeline.from_pretrained(one) for one in (SHIPPED_MODELS["cogview-emoji"], folder))
    assert same.config.settings == shipped.config.settings != {}
    assert same.tokenizer.unknown_parts("a cat and a zebra") == ["zebra"]
    assert same.caption_transformer is None


def test_adapters_that_were_saved_with_the_pipeline_are_named_where_they_are_left_out(
    parts, assemble, tmp_path, caplog
):
    pytest.importorskip("peft")
    pipe, _ = assemble("model", **parts)
    add_adapter(pipe.transformer, "style", 2)
    pipe.save_pretrained(tmp_path / "with_lora")
    caplog.clear()
    assemble("same", like=tmp_path / "with_lora")
    assemble("parts", **{**parts, "transformer": tmp_path / "with_lora/transformer"})
    said = [f"The adapters ['style'] of `{option}` {LEFT_OUT}" for option in ("like", "transformer")]
    assert [text for text in caplog.messages if LEFT_OUT in text] == said


def test_what_is_missing_or_of_another_family_is_named(parts, assemble, tmp_path):
    common = {name: parts[name] for name in ("tokenizer", "vqvae")}
    with pytest.raises(ValueError, match=r"One of `transformer`, .* must be given, or `like`"):
        assemble("model", **common)
    with pytest.raises(ValueError, match="`tokenizer` must be given, or `like`"):
        assemble("model", transformer=parts["transformer"])
    with pytest.raises(ValueError, match="`settings` must be JSON"):
        assemble("model", **parts, settings="{none")
    with pytest.raises(ValueError, match=r"CogViewModel as `transformer`, but .* has a CogLMModel. assemble_pipeline"):
        assemble("model", like=SHIPPED_MODEL)
    assert not (tmp_path / "model").exists()
