"""The config files of the small CogView: their scripts read them, they fit each other, and their models are small."""

import itertools
import json

import pytest
import torch

from cogview_pipelines import CogViewTokenizer
from cogview_pipelines.demo import LANGUAGES, Scope, caption_variants, captions, sample_scenes
from cogview_pipelines.demo.captions import template_words
from cogview_pipelines.models.known_words import KnownWords
from cogview_pipelines.training.arguments import parse_config, read_words
from cogview_pipelines.training.data.tokens import TokenData

from .conftest import SCRIPTS, load_script

FOLDER = SCRIPTS / "emoji_cogview"
CONFIG_CLASSES = {
    "tokenizer": ("train_tokenizer", "TokenizerConfig", "runs/cogview_tokenizer"),
    "vq": ("train_vq_model", "VQTrainConfig", "runs/cogview_vq"),
    "vq_decoder": ("train_vq_model", "VQTrainConfig", "runs/cogview_vq_decoder"),
    "tokens": ("prepare_tokens", "PrepareConfig", "data/cogview_tokens"),
    "tokens_reversed": ("prepare_tokens", "PrepareConfig", "data/cogview_tokens_reversed"),
    "cogview": ("train_cogview", "CogViewTrainConfig", "runs/cogview"),
    "cogview_reversed": ("train_cogview", "CogViewTrainConfig", "runs/cogview_reversed"),
    "super_resolution": ("train_cogview", "CogViewTrainConfig", "runs/cogview_super_resolution"),
    "pipeline": ("assemble_cogview_pipeline", "AssembleConfig", "runs/cogview_emoji"),
}


@pytest.fixture(scope="module")
def configs():
    return {
        name: parse_config(
            getattr(load_script(script), kind), ["--config", str(FOLDER / f"{name}.yaml"), "--output_dir", folder]
        )
        for name, (script, kind, folder) in CONFIG_CLASSES.items()
    }


def test_each_step_takes_what_the_steps_before_leave(configs):
    vqvae, tokenizer = f"{configs['vq'].output_dir}/final", configs["tokenizer"].output_dir
    assert configs["tokens"].vqvae == configs["tokens_reversed"].vqvae == vqvae
    second = configs["cogview_reversed"]
    assert (second.init_from, second.data) == (
        f"{configs['cogview'].output_dir}/final",
        configs["tokens_reversed"].output_dir,
    )
    assert (second.vqvae, second.tokenizer) == (vqvae, tokenizer)
    for name in ("cogview", "super_resolution"):
        config = configs[name]
        assert (config.data, config.vqvae, config.tokenizer) == (configs["tokens"].output_dir, vqvae, tokenizer)
        assert config.warmup_steps + config.decay_steps <= config.max_steps
        assert not config.restart_on_roi2 or not config.super_resolution_probability
    pipeline = configs["pipeline"]
    decoder = configs["vq_decoder"]
    assert decoder.decoder_only and decoder.init_from == vqvae
    assert (pipeline.vqvae, pipeline.tokenizer) == (f"{decoder.output_dir}/final", tokenizer)
    assert pipeline.transformer == f"{second.output_dir}/final"
    assert pipeline.super_resolution_transformer == f"{configs['super_resolution'].output_dir}/final"
    assert configs["tokenizer"].num_image_tokens == json.loads(configs["vq"].model)["num_embeddings"]
    for name in (configs["vq"].scope, configs["tokens"].scope, *json.loads(pipeline.files).values()):
        assert (SCRIPTS.parent / name).is_file()
    scope = Scope.load(FOLDER)
    assert len(scope.concepts) == 12
    assert read_words(pipeline.words_file) == template_words(scope)
    assert len(sample_scenes(scope, configs["vq"].num_scenes, 0, split_name="train")) == configs["vq"].num_scenes


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_list_of_words_has_all_of_the_captions_and_no_other_thing(configs, language):
    words = KnownWords(read_words(configs["pipeline"].words_file))
    for scene in sample_scenes(Scope.load(FOLDER), 939, 0, split_name="train"):
        texts = [*captions(scene, language), *itertools.chain(*caption_variants(scene, language).values())]
        assert not any(map(words.unknown, texts)), texts
    assert words.unknown({"en": "a cat and a tiger", "zh": "一只猫和一只老虎"}[language]) in (["tiger"], ["老虎"])


def test_the_models_can_be_built_and_are_at_most_five_megabytes_in_16_bits(configs, tmp_path):
    tokens = configs["tokens"]
    side = tokens.low_size // 8
    assert tokens.fine_size == 2 * tokens.low_size and side % 4 == 0  # windows begin at a quarter of a picture
    arguments = [
        "--config",
        str(FOLDER / "tokenizer.yaml"),
        "--output_dir",
        str(tmp_path / "tokenizer"),
        "--emoji_pairs",
        "300",
    ]
    load_script("train_tokenizer").main(arguments)
    tokenizer = CogViewTokenizer.from_pretrained(tmp_path / "tokenizer")
    low, fine = torch.zeros(1, side, side).long(), torch.zeros(1, 2 * side, 2 * side).long()
    data = TokenData(low, fine, [{"en": ["a"]}], torch.ones(1), tokenizer.encode)
    with torch.device("meta"):
        script = load_script("train_cogview")
        models = {name: script.make_model(configs[name], tokenizer, data) for name in ("cogview", "super_resolution")}
        models["vq"] = load_script("train_vq_model").make_model(configs["vq"])
    sizes = {name: 2 * sum(value.numel() for value in model.parameters()) for name, model in models.items()}
    assert 3e6 < sum(sizes.values()) < 4.7e6, sizes  # with 0.3 MB for the text tokenizer
    for name in ("cogview", "super_resolution"):
        layout = models[name].config.layout
        assert layout.image_grid == (side, side)
        assert min(layout.max_text_tokens, layout.max_super_resolution_text_tokens) >= 28  # the longest caption
