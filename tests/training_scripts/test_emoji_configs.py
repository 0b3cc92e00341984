"""The config files of the demo: their scripts read them, they fit each other, and their models can be built."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from cogview_pipelines import (
    CogLMCanvasModel,
    CogLMConfig,
    IcetkTokenizer,
    IcetkVQConfig,
    IcetkVQModel,
    LoPARScheduler,
)
from cogview_pipelines.demo import NATIVE_SIZE, STYLES, Scope
from cogview_pipelines.demo.captions import known_words
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.training.arguments import parse_config
from cogview_pipelines.training.data.tokens import TokenData

from .conftest import SCRIPTS, load_script

EMOJI = SCRIPTS / "emoji"
CONFIG_CLASSES = {
    "tokenizer": ("train_tokenizer", "TokenizerConfig"),
    "vq": ("train_vq_model", "VQTrainConfig"),
    "tokens": ("prepare_tokens", "PrepareConfig"),
    "coglm": ("train_coglm", "CogLMTrainConfig"),
    "direct_sr": ("train_direct_sr", "DirectSRTrainConfig"),
    "iterative_sr": ("train_iterative_sr", "IterativeSRTrainConfig"),
    "pipeline": ("assemble_pipeline", "AssembleConfig"),
}
SETS = {
    "small": {name: EMOJI / f"{name}_small.yaml" for name in CONFIG_CLASSES},
    "gpu": {name: EMOJI / "gpu" / f"{name}.yaml" for name in CONFIG_CLASSES},
}
SENTENCES = ("tokenizer", "tokens", "coglm", "pipeline")
GRIDS = {"small": ((10, 10), (30, 30)), "gpu": ((20, 20), (60, 60))}


@pytest.fixture(scope="module", params=sorted(SETS))
def configs(request):
    """The name of the set, and its configs as the scripts read them; outputs by the names of the README."""
    prefix = "runs/gpu/{}" if request.param == "gpu" else "runs/{}_small"
    parsed = {}
    for name, path in SETS[request.param].items():
        script, config_class = CONFIG_CLASSES[name]
        arguments = ["--config", str(path)]
        if "output_dir" not in yaml.safe_load(path.read_text(encoding="utf-8")):
            arguments += ["--output_dir", prefix.format(name)]
        parsed[name] = parse_config(getattr(load_script(script), config_class), arguments)
    return request.param, parsed


def test_each_step_takes_what_the_steps_before_leave(configs):
    _, configs = configs
    tokenizer = configs["tokenizer"].output_dir
    vqvae = f"{configs['vq'].output_dir}/final"
    coglm = f"{configs['coglm'].output_dir}/final"
    for stage in ("coglm", "direct_sr", "iterative_sr"):
        assert (configs[stage].tokenizer, configs[stage].vqvae) == (tokenizer, vqvae)
        assert configs[stage].data == configs["coglm"].data
        assert configs[stage].decay_steps + configs[stage].warmup_steps <= configs[stage].max_steps
        if stage != "coglm":
            assert configs[stage].transformer == coglm
            assert getattr(configs["pipeline"], f"{stage}_transformer") == f"{configs[stage].output_dir}/final"
    assert (configs["tokens"].output_dir, configs["tokens"].vqvae) == (configs["coglm"].data, vqvae)
    parts = configs["pipeline"].tokenizer, configs["pipeline"].vqvae, configs["pipeline"].transformer
    assert parts == (tokenizer, vqvae, coglm)
    assert configs["tokenizer"].num_image_tokens == json.loads(configs["vq"].model)["num_embeddings"]


def test_files_that_the_configs_name_are_there(configs):
    _, configs = configs
    named = [*json.loads(configs["pipeline"].files).values(), configs["vq"].scope, configs["tokens"].scope]
    for name in filter(None, named):
        assert (SCRIPTS.parent / name).is_file(), name


def test_the_runs_on_sentences_take_what_the_runs_on_templates_leave():
    configs = {name: yaml.safe_load((EMOJI / f"{name}_sentences.yaml").read_text("utf-8")) for name in SENTENCES}
    tokenizer = configs["tokenizer"]["output_dir"]
    assert tokenizer == configs["coglm"]["tokenizer"] == configs["pipeline"]["tokenizer"]
    assert configs["pipeline"]["transformer"] == "runs/coglm_sentences_sixty_words/final"
    names = ("_first", "_mixed", "", "_long", "_even", "_sixty", "_sixty_more", "_sixty_words")
    runs = [small_config(f"coglm_sentences{name}") for name in names]
    assert [run.init_from for run in runs[1:]] == [f"{run.output_dir}/final" for run in runs[:-1]]
    mains = [f"sentences{ending}" for ending in ("", "_mixed", "_mixed", "_long", "_even", "_captions")]
    others = [*["things"] * 5, "sixty", "sentences_captions", "sixty_colours"]
    for run, name, other in zip(runs, [*mains, "sixty_many", "sixty_words"], others, strict=True):
        main, things = small_config(f"tokens_{name}"), small_config(f"tokens_{other}")
        assert (run.tokenizer, run.data, run.auxiliary_data) == (tokenizer, main.output_dir, things.output_dir)
    grown = Path(runs[0].init_from).parent
    directs = [small_config(f"direct_sr_sentences{name}") for name in ("", *names[3:], "_sixty_hard")]
    assert Path(directs[0].init_from) == grown / "direct_sr_transformer"
    assert [direct.init_from for direct in directs[1:]] == [f"{direct.output_dir}/final" for direct in directs[:-1]]
    for direct, run in zip(directs, [*runs[2:], runs[-1]], strict=True):
        assert (direct.tokenizer, direct.transformer) == (tokenizer, f"{run.output_dir}/final")
    first, iterative = (small_config(f"iterative_sr_sentences{name}") for name in ("", "_sixty"))
    assert Path(first.transformer) == grown / "iterative_sr_transformer"
    assert iterative.transformer == f"{first.output_dir}/final"
    assert first.tokenizer == iterative.tokenizer == tokenizer
    for stage, config, name in (("direct_sr", directs[-1], "sixty_hard"), ("iterative_sr", iterative, "sixty")):
        fine = [small_config(f"tokens_{each}_fine").output_dir for each in (name, "sentences")]
        assert [config.data, config.auxiliary_data] == fine
        assert configs["pipeline"][f"{stage}_transformer"] == f"{config.output_dir}/final"
    templates = yaml.safe_load((EMOJI / "pipeline_small.yaml").read_text("utf-8"))
    same = ("vqvae", "direct_sr_scheduler", "default_style", "whole_pictures")
    assert all(configs["pipeline"][name] == templates[name] for name in same)
    for stage in ("direct_sr", "iterative_sr"):
        shipped = LoPARScheduler.from_pretrained(SHIPPED_MODEL, subfolder=f"{stage}_scheduler").config
        options = configs["pipeline"][f"{stage}_scheduler"]
        assert {name: shipped[name] for name in options} == options
    suffixes = [
        {name: style.get("suffix") for name, style in each["styles"].items()}
        for each in (configs["pipeline"], templates)
    ]
    assert suffixes[0] == suffixes[1]
    assert configs["tokens"]["vqvae"] == templates["vqvae"]
    for name in configs["pipeline"]["files"].values():
        assert (SCRIPTS.parent / name).is_file(), name


@pytest.mark.parametrize("path", sorted(EMOJI.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_of_its_script_and_names_files_that_are_there(path):
    step = max((name for name in CONFIG_CLASSES if path.stem.startswith(name)), key=len)
    script, config_class = CONFIG_CLASSES[step]
    arguments = ["--config", str(path)]
    if "output_dir" not in yaml.safe_load(path.read_text(encoding="utf-8")):
        arguments += ["--output_dir", "runs/any"]
    config = parse_config(getattr(load_script(script), config_class), arguments)
    named = [getattr(config, "scope", None), *json.loads(getattr(config, "files", "{}")).values()]
    for name in filter(None, named):
        assert (SCRIPTS.parent / name).is_file(), name


def test_the_large_scope_is_everything():
    assert Scope.load(EMOJI / "gpu/scope.json") == Scope.full()


def small_config(name: str):
    """A config file beside those of the set: other runs of the models, and what they read."""
    step = next(step for step in ("tokens", "coglm", "direct_sr", "iterative_sr") if name.startswith(step))
    script, config_class = CONFIG_CLASSES[step]
    arguments = ["--config", str(EMOJI / f"{name}.yaml")]
    if step != "tokens":
        arguments += ["--output_dir", f"runs/{name}"]
    return parse_config(getattr(load_script(script), config_class), arguments)


def test_the_runs_of_the_small_coglm_follow_each_other():
    runs = [small_config(f"coglm_small{name}") for name in ("_first", "_order", "_all", "")]
    assert [run.init_from for run in runs] == [None, *(f"{run.output_dir}/final" for run in runs[:3])]
    for run, ending in zip(runs, ("", "_order", "", ""), strict=True):
        main, wide = (small_config(f"tokens_{name}{ending}") for name in ("small", "wide"))
        assert (run.data, run.auxiliary_data) == (main.output_dir, wide.output_dir)
        assert (main.reversed_share, wide.reversed_share) == ((0.2, 0.2) if ending else (0.5, 0.5))
        assert run.decay_steps + run.warmup_steps <= run.max_steps


@pytest.mark.parametrize("name", ["tokens_wide", "tokens_wide_order", "tokens_wide_fine"])
def test_the_auxiliary_scenes_of_the_small_model_are_of_its_styles_and_of_all_concepts(name):
    tokens = small_config(name)
    scope, small, full = Scope.load(tokens.scope), Scope.small(), Scope.full()
    assert (scope.concepts, scope.styles, scope.backgrounds) == (full.concepts, small.styles, small.backgrounds)
    assert tokens.low_size // (tokens.compression_rate or 8) == GRIDS["small"][0][0]
    assert tokens.vqvae == "runs/vq_small/final"


def test_the_last_runs_of_the_shipped_model_meet_more_things():
    sixty, things = (Scope.load(EMOJI / f"scope_{name}.json") for name in ("sixty", "things"))
    assert len(sixty.concepts) == 60 and sixty.concepts[:24] == Scope.small().concepts
    assert set(sixty.concepts) <= set(things.concepts) and sixty.styles == Scope.small().styles
    assert Scope.load(SHIPPED_MODEL) == sixty
    assert IcetkTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer").known_words == known_words(sixty)
    for ending in ("", "_many", "_words", "_colours", "_fine", "_hard_fine"):
        assert Scope.load(small_config(f"tokens_sixty{ending}").scope) == sixty


def make_models(name, configs, tokenizer_folder, tmp_path) -> dict[str, torch.nn.Module]:
    """All four models on the meta device, made by the scripts' own functions where these read no weights."""
    num_image_tokens = configs["tokenizer"].num_image_tokens
    tokenizer = IcetkTokenizer(Path(tokenizer_folder) / "ice_text.model", num_image_tokens=num_image_tokens)
    low, fine = (torch.zeros(1, *grid, dtype=torch.int32) for grid in GRIDS[name])
    data = TokenData(low, fine, [{"en": [""]}], torch.ones(1), tokenizer.encode)
    direct, iterative = configs["direct_sr"], configs["iterative_sr"]
    with torch.device("meta"):
        models = {"vqvae": IcetkVQModel(IcetkVQConfig(**json.loads(configs["vq"].model)))}
        first = configs["coglm"] if name == "gpu" else small_config("coglm_small_first")
        coglm = models["transformer"] = load_script("train_coglm").make_model(first, tokenizer, data)
        models["direct_sr_transformer"] = CogLMCanvasModel.from_transformer(
            coglm, "direct", GRIDS[name][1], **json.loads(direct.model)
        )
        if iterative.from_scratch:
            coglm.config.save_pretrained(tmp_path)
            iterative.transformer = str(tmp_path)
            models["iterative_sr_transformer"] = load_script("train_iterative_sr").make_model(iterative, data)
        else:
            models["iterative_sr_transformer"] = CogLMCanvasModel.from_transformer(
                coglm, "iterative", GRIDS[name][1], **json.loads(iterative.model)
            )
    return models


def test_token_grids_and_drawings_follow_from_the_sizes(configs):
    name, configs = configs
    tokens = configs["tokens"]
    rate = tokens.compression_rate or 8
    sides = (tokens.low_size // rate, tokens.fine_size // rate)
    assert sides == tuple(grid[0] for grid in GRIDS[name])
    assert list(configs["vq"].resolutions) == [tokens.low_size, tokens.fine_size]
    for config in (configs["vq"], tokens):
        assert (config.sprites is not None) is (tokens.fine_size > NATIVE_SIZE)


def test_the_models_can_be_built_and_the_pipeline_is_small_enough_to_ship(configs, tokenizer_folder, tmp_path):
    name, configs = configs
    models = make_models(name, configs, tokenizer_folder, tmp_path)
    coglm: CogLMConfig = models["transformer"].config
    assert coglm.image_grid == GRIDS[name][0]
    assert coglm.max_text_tokens >= 28 and coglm.max_text_tokens < coglm.image_position  # 28: the longest caption
    for stage in ("direct_sr_transformer", "iterative_sr_transformer"):
        assert models[stage].config.fine_grid == GRIDS[name][1]
    sizes = {
        part: sum(
            value.numel()
            for key, value in model.named_parameters()
            if part != "direct_sr_transformer" or "canvas_" in key
        )
        for part, model in models.items()
    }
    assert 2 * sum(sizes.values()) < 36e6, sizes  # bytes in float16
    assert (2e6 if name == "small" else 10e6) < sum(sizes.values())


def test_the_pipelines_settings_can_be_used(configs):
    name, configs = configs
    pipeline = configs["pipeline"]
    for stage in ("direct_sr", "iterative_sr"):
        scheduler = LoPARScheduler(**json.loads(getattr(pipeline, f"{stage}_scheduler")))
        assert scheduler.step_map(*GRIDS[name][1]).shape == GRIDS[name][1]
    styles = json.loads(pipeline.styles)
    assert pipeline.default_style in styles
    scope = Scope.full() if name == "gpu" else Scope.small()
    assert set(styles) == {"none", *(STYLES[key].english for key in scope.styles)}
    for style in scope.styles:
        suffix = styles[STYLES[style].english]["suffix"]
        assert STYLES[style].english in suffix["en"] and STYLES[style].chinese in suffix["zh"]
