"""`training_scripts/assemble_pipeline.py`: parts as the training scripts leave them become a pipeline that draws."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from cogview_pipelines import CogLMModel, CogView2Pipeline
from cogview_pipelines.environment import SHIPPED_MODELS
from cogview_pipelines.models.adapters import add_adapter
from cogview_pipelines.training.adapters import LEFT_OUT

from .conftest import WINDOWS, as_arguments, load_script


@pytest.fixture(scope="module")
def parts(tokenizer_folder, vqvae_folder, coglm_folder, token_folder, tmp_path_factory):
    """Both super-resolution stages after one step, and what they were made from."""
    runs = tmp_path_factory.mktemp("runs")
    for stage, slots in (("direct_sr", 30), ("iterative_sr", 4)):
        options = {
            "output_dir": runs / stage,
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "transformer": coglm_folder,
            "model": {"num_text_slots": slots, **WINDOWS},
            "batch_size": 2,
            "max_steps": 1,
        }
        load_script(f"train_{stage}").main(as_arguments(options))
    return {
        "tokenizer": tokenizer_folder,
        "vqvae": vqvae_folder,
        "transformer": coglm_folder,
        "direct_sr_transformer": runs / "direct_sr/final",
        "iterative_sr_transformer": runs / "iterative_sr/final",
    }


def test_the_folder_is_a_pipeline_that_makes_pictures(parts, tmp_path):
    (tmp_path / "card.md").write_text("# A model\n")
    script = load_script("assemble_pipeline")
    (tmp_path / "pipeline.yaml").write_text(
        "direct_sr_scheduler: {step_grid: [[1]], top_k: [5], cluster_temperature: 0.5}\n"
        "iterative_sr_scheduler: {top_k: [3, 3, 2, 2, 1, 1]}\n"
        "styles:\n"
        "  none: {top_k_clusters: 3, text_attention_bias: 0.0}\n"
        "  painted: {suffix: {en: ' red', zh: 红色}}\n"
        "default_style: none\n"
        "whole_pictures: true\n"
        f"files: {{README.md: {tmp_path / 'card.md'}}}\n",
        encoding="utf-8",
    )
    (tmp_path / "words.txt").write_text("a tiger on blue background\n一只 老虎 蓝色 背景\n", encoding="utf-8")
    options = {"config": tmp_path / "pipeline.yaml", "output_dir": tmp_path / "model", **parts}
    options["words_file"] = tmp_path / "words.txt"
    assembled = script.main(as_arguments(options))
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["whole_pictures"] is True
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"cogview_pipelines"}
    assert (tmp_path / "model/README.md").read_text() == "# A model\n"
    for folder, is_stored in (("transformer", True), ("direct_sr_transformer", False)):
        weights = load_file(tmp_path / f"model/{folder}/model.safetensors")
        assert ("word_embeddings.weight" in weights) is is_stored
        assert {value.dtype for value in weights.values()} == {torch.float16}

    pipe = CogView2Pipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tokenizer.unknown_parts("A cat on a blue tiger, 一只红色老虎") == ["cat", "红色"]
    assert pipe.sizes == [(32, 32), (96, 96)]
    assert pipe.config.default_style == "none" and pipe.config.styles["painted"]["suffix"]["zh"] == "红色"
    assert pipe.direct_sr_scheduler.config.cluster_temperature == 0.5
    assert pipe.direct_sr_transformer.word_embeddings.weight is pipe.transformer.word_embeddings.weight
    prompts = ["a tiger on a blue background", "一只老虎,蓝色背景"]
    output = pipe(prompts, style="painted", generator=torch.Generator().manual_seed(0))
    assert [image.size for image in output.images] == [(96, 96)] * 2
    assembled.to(dtype=torch.float32).set_progress_bar_config(disable=True)
    again = assembled(prompts, style="painted", generator=torch.Generator().manual_seed(0))
    assert torch.equal(output.tokens, again.tokens)


def test_weights_of_transformers_are_rounded_where_asked(parts, tmp_path):
    script, names = (
        load_script("assemble_pipeline"),
        ("transformer", "direct_sr_transformer", "iterative_sr_transformer"),
    )
    for folder, options in (("as_they_are", {}), ("rounded", {"round_to": "bfloat16"})):
        script.main(as_arguments({"output_dir": tmp_path / folder, **parts, **options}))

    def weights(folder, name):
        return load_file(tmp_path / folder / name / "model.safetensors")

    for name in names:
        before, after = weights("as_they_are", name), weights("rounded", name)
        for key, tensor in after.items():
            assert tensor.dtype == torch.float16 and torch.equal(tensor, before[key].bfloat16().half())
        assert any(not torch.equal(tensor, before[key]) for key, tensor in after.items())
    for key, tensor in weights("rounded", "vqvae").items():
        assert torch.equal(tensor, weights("as_they_are", "vqvae")[key])


def test_rows_of_matrices_are_rounded_to_eight_bits_where_asked(parts, tmp_path):
    for folder, options in (("as_they_are", {}), ("rounded", {"round_to": "int8"})):
        load_script("assemble_pipeline").main(as_arguments({"output_dir": tmp_path / folder, **parts, **options}))
    matrices = 0
    for name in ("transformer", "direct_sr_transformer", "iterative_sr_transformer"):
        before, after = (
            load_file(tmp_path / folder / name / "model.safetensors") for folder in ("as_they_are", "rounded")
        )
        for key, tensor in after.items():
            if tensor.dim() != 2:
                assert torch.equal(tensor, before[key].bfloat16().half())
                continue
            for row, original in zip(tensor.float(), before[key].float(), strict=True):
                step = 2.0 ** math.ceil(math.log2(max(original.abs().max().item(), 2**-14) / 127.5))
                assert (row / step).frac().abs().max() == 0 and (row / step).abs().max() <= 127
                assert (row - original).abs().max() <= step / 2
            matrices += 1
    assert matrices > 10


def test_rounding_keeps_rows_of_zeros_and_the_sign_and_size_of_the_largest():
    round_rows = load_script("assemble_pipeline").round_rows
    weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.25, 0.004], [-127.5, 127.4, 0.6]])
    rounded = round_rows(weights)
    assert torch.equal(rounded[0], weights[0])
    assert rounded[1].tolist() == [1.0, -0.25, 0.0]
    assert rounded[2].tolist() == [-127.0, 127.0, 1.0]


def test_super_resolution_may_be_left_out(parts, tmp_path):
    kept = {name: parts[name] for name in ("tokenizer", "vqvae", "transformer")}
    load_script("assemble_pipeline").main(as_arguments({"output_dir": tmp_path / "model", "dtype": "float32", **kept}))
    pipe = CogView2Pipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.sizes == [(32, 32)] and pipe.transformer.dtype == torch.float32
    assert pipe("a cat", generator=torch.Generator().manual_seed(0)).images[0].size == (32, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float17"}, r"`dtype` must be one of \['float32', 'float16', 'bfloat16'\]"),
        ({"files": {"README.md": "/nowhere/card.md"}}, "`files` names /nowhere/card.md, which is no file"),
        ({"styles": "{none"}, r"`styles` must be JSON"),
        ({"default_style": "nice"}, r"`default_style` must be one of the `styles` \[\], but is 'nice'"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(parts, options, message, tmp_path, capsys):
    arguments = as_arguments({"output_dir": tmp_path / "model", **parts, **options})
    with pytest.raises((ValueError, SystemExit), match=None if "dtype" in options else message):
        load_script("assemble_pipeline").main(arguments)
    assert not (tmp_path / "model").exists()
    if "dtype" in options:  # argparse says it
        assert "invalid choice: 'float17'" in capsys.readouterr().err


def test_a_direct_stage_of_another_coglm_is_refused(parts, tmp_path):
    other = CogLMModel.from_pretrained(parts["transformer"])
    other.config.hidden_size = 16
    CogLMModel(other.config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`transformer` must have `hidden_size` = 32"):
        load_script("assemble_pipeline").main(
            as_arguments({**parts, "transformer": tmp_path / "other", "output_dir": tmp_path / "model"})
        )


def test_what_no_option_says_is_as_in_the_pipeline_that_it_is_like(parts, token_folder, tmp_path):
    script = load_script("assemble_pipeline")
    styles = {"none": {"temperature": 0.8}, "painted": {"suffix": " red"}}
    schedulers = {"direct_sr_scheduler": {"step_grid": [[1]], "top_k": 7}, "iterative_sr_scheduler": {"top_k": 9}}
    (tmp_path / "words.txt").write_text("tiger")
    options = {**parts, **schedulers, "styles": styles, "default_style": "painted", "whole_pictures": True}
    options["words_file"] = tmp_path / "words.txt"
    script.main(as_arguments({**options, "output_dir": tmp_path / "model"}))
    like = {"like": tmp_path / "model", "dtype": "float32"}
    script.main(as_arguments({**like, "output_dir": tmp_path / "same"}))
    names = ("styles", "default_style", "whole_pictures", "compression_rate")
    first, same = (CogView2Pipeline.from_pretrained(tmp_path / name) for name in ("model", "same"))
    assert all(first.config[name] == same.config[name] for name in names)
    assert same.direct_sr_scheduler.config.top_k == first.direct_sr_scheduler.config.top_k
    assert same.tokenizer.unknown_parts("a tiger and") == ["a", "and"]
    script.main(as_arguments({**like, "data": token_folder, "output_dir": tmp_path / "trained"}))
    trained = CogView2Pipeline.from_pretrained(tmp_path / "trained").tokenizer
    lines = (token_folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    caption = json.loads(lines[0])["en"][0]
    assert same.tokenizer.unknown_parts(caption) and not trained.unknown_parts(f"{caption} tiger")
    assert same.direct_sr_transformer.config.shares_backbone
    own = {"styles": {"plain": {}}, "default_style": "plain", "direct_sr_scheduler": {"step_grid": [[1]], "top_k": 2}}
    script.main(as_arguments({**like, **own, "output_dir": tmp_path / "other"}))
    other = CogView2Pipeline.from_pretrained(tmp_path / "other")
    assert other.config.styles == {"plain": {}} and other.config.whole_pictures
    assert other.direct_sr_scheduler.config.top_k != first.direct_sr_scheduler.config.top_k


@pytest.mark.parametrize("kind", ["beside", "fused"])
def test_adapters_that_were_saved_with_the_pipeline_are_named_where_they_are_left_out(kind, parts, tmp_path, caplog):
    script = load_script("assemble_pipeline")
    kept = {name: parts[name] for name in ("tokenizer", "vqvae", "transformer")}
    pipe = script.main(as_arguments({**kept, "output_dir": tmp_path / "model", "dtype": "float32"}))
    add_adapter(pipe.transformer, "style", 2)
    if kind == "fused":
        pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "with_lora")
    caplog.clear()
    script.main(as_arguments({"like": tmp_path / "with_lora", "output_dir": tmp_path / "same"}))
    own = {**kept, "transformer": tmp_path / "with_lora/transformer"}
    script.main(as_arguments({**own, "output_dir": tmp_path / "parts"}))
    said = [f"The adapters ['style'] of `{option}` {LEFT_OUT}" for option in ("like", "transformer")]
    assert [text for text in caplog.messages if LEFT_OUT in text] == (said if kind == "beside" else [])


def test_without_a_pipeline_to_be_like_parts_must_be_named_and_schedulers_work(parts, tmp_path):
    script = load_script("assemble_pipeline")
    with pytest.raises(ValueError, match="`tokenizer` must be given, or `like`"):
        script.main(as_arguments({"output_dir": tmp_path / "model", "transformer": parts["transformer"]}))
    script.main(as_arguments({**parts, "output_dir": tmp_path / "model"}))
    pipe = CogView2Pipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", generator=torch.Generator().manual_seed(0)).images[0].size == (96, 96)


def test_a_pipeline_of_the_other_family_is_refused_with_the_script_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"`like` must have a CogLMModel .* assemble_cogview_pipeline.py joins parts"):
        load_script("assemble_pipeline").main(
            as_arguments({"like": SHIPPED_MODELS["cogview-emoji"], "output_dir": tmp_path / "model"})
        )
    assert not (tmp_path / "model").exists()
