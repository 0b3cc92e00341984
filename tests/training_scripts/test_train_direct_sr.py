"""`training_scripts/train_direct_sr.py`: what trains, what is saved, what it reads. Resuming: test_resuming.py."""

import pytest
import torch
from safetensors import safe_open

from cogview_pipelines import CogLMCanvasModel, CogLMModel
from cogview_pipelines.models.cogview2.sequences import direct_super_resolution
from cogview_pipelines.training.data.draws import Draw
from cogview_pipelines.training.data.tokens import TokenData

from .conftest import WINDOWS, as_arguments, assert_losses_are_told, load_script, write_long_captions


@pytest.fixture(scope="module")
def script():
    return load_script("train_direct_sr")


@pytest.fixture
def run(script, tokenizer_folder, coglm_folder, token_folder, tmp_path):
    def call(*flags, **options):
        options = {
            "output_dir": tmp_path / "run",
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "transformer": coglm_folder,
            "model": {"num_text_slots": 30, **WINDOWS},
            "batch_size": 2,
            "max_steps": 3,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            **options,
        }
        return script.main([*as_arguments(options), *flags])

    return call


@pytest.fixture(scope="module")
def untrained(coglm_folder):
    """The CogLM, in float32."""
    return CogLMModel.from_pretrained(coglm_folder, dtype=torch.float32)


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "weight_decay": 0.1}, {"ema_decay": 0.5}])
def test_only_canvas_weights_train(run, untrained, options):
    if options.get("optimizer") == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch < 2.9")
    model = run(**options)
    trained = dict(model.named_parameters())
    start = CogLMCanvasModel.from_transformer(untrained, "direct", (12, 12), num_text_slots=30, **WINDOWS)
    for name, value in start.named_parameters():
        assert torch.equal(value, trained[name]) is ("canvas_" not in name), name


def test_the_saved_file_holds_canvas_weights_only_and_borrows_the_rest(run, untrained, tmp_path):
    model = run()
    path = tmp_path / "run/final/model.safetensors"
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert names == {name for name, _ in model.named_parameters() if "canvas_" in name}

    loaded = CogLMCanvasModel.from_pretrained(tmp_path / "run/final").eval()
    texts = [[60, 61, 62], [57, 58]]
    tokens = torch.zeros(2, 16, dtype=torch.long)
    context = direct_super_resolution(texts, tokens, 30, loaded.config.layout)
    canvas = torch.full((2, 144), loaded.config.boi_token_id)
    with pytest.raises(ValueError, match="Lend it first"):
        loaded(canvas, context)
    loaded.share_backbone(untrained)
    assert loaded.word_embeddings.weight is untrained.word_embeddings.weight
    with torch.no_grad():
        assert torch.equal(loaded(canvas, context).logits, model.eval()(canvas, context).logits)


def test_training_goes_on_from_this_stage_on_another_coglm(run, untrained, tmp_path):
    first = run()
    other = tmp_path / "other"
    changed = CogLMModel.from_pretrained(untrained.name_or_path, dtype=torch.float32)
    with torch.no_grad():
        changed.final_layernorm.weight.mul_(2)
    changed.save_pretrained(other)
    options = {"init_from": tmp_path / "run/final", "transformer": other, "output_dir": tmp_path / "second"}
    second = run(learning_rate=0.0, weight_decay=0.0, **options)
    assert torch.equal(second.final_layernorm.weight, changed.final_layernorm.weight)
    for (name, before), after in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(before, after) or "canvas_" not in name
    with pytest.raises(ValueError, match="`CogLMCanvasModel` reads models of the type 'coglm_canvas'"):
        run(**{**options, "init_from": other})
    iterative = CogLMCanvasModel.from_transformer(changed, "iterative", (12, 12), num_text_slots=4, **WINDOWS)
    iterative.save_pretrained(tmp_path / "iterative")
    with pytest.raises(ValueError, match="`init_from` must have `super_resolution` and `fine_grid`"):
        run(**{**options, "init_from": tmp_path / "iterative"})


def test_a_stage_goes_on_with_a_backbone_of_its_own_unless_another_is_lent(run, untrained, coglm_folder, tmp_path):
    own = CogLMCanvasModel.from_transformer(untrained, "direct", (12, 12), num_text_slots=30, **WINDOWS)
    with torch.no_grad():
        own.final_layernorm.weight.mul_(2)
    own.save_pretrained(tmp_path / "own")
    options = {"init_from": tmp_path / "own", "learning_rate": 1e-2, "max_steps": 1}
    for lends in (False, True):
        model = run(lend_backbone=lends, output_dir=tmp_path / f"{lends}", **options)
        assert model.config.shares_backbone is lends
        expected = untrained if lends else own
        assert torch.equal(model.final_layernorm.weight, expected.final_layernorm.weight)
        trained = dict(model.named_parameters())
        still = [name for name, value in own.named_parameters() if torch.equal(value, trained[name])]
        assert not any("canvas_" in name for name in still)
        assert lends or len(still) == sum("canvas_" not in name for name in trained)
        weights = tmp_path / f"{lends}/final/model.safetensors"
        with safe_open(weights, "pt") as file:
            assert ("final_layernorm.weight" in file.keys()) is not lends  # noqa: SIM118
    for name, value in (("train_backbone", True), ("lora_rank", 2)):
        with pytest.raises(ValueError, match=f"`lend_backbone` must not be with `{name}`"):
            run(lend_backbone=True, output_dir=tmp_path / "none", **{name: value}, **options)
    with pytest.raises(ValueError, match="`lend_backbone` is about a trained stage"):
        run(lend_backbone=True, output_dir=tmp_path / "none")


def test_a_stage_that_borrowed_gets_a_backbone_of_its_own_where_all_weights_train(run, untrained, tmp_path):
    run(output_dir=tmp_path / "first")
    model = run("--train_backbone", init_from=tmp_path / "first/final", output_dir=tmp_path / "second")
    assert not torch.equal(model.final_layernorm.weight, untrained.final_layernorm.weight)
    loaded = CogLMCanvasModel.from_pretrained(tmp_path / "second/final")
    assert not loaded.config.shares_backbone
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_with_train_backbone_everything_that_counts_trains_and_is_saved(run, untrained, tmp_path):
    model = run("--train_backbone")
    still = {
        name
        for name, value in untrained.named_parameters()
        if torch.equal(value, dict(model.named_parameters())[name])
    }
    assert {name for name in still if not name.startswith("position_embeddings")} == {
        "layers.1.attention.dense.weight",  # of no effect: the canvas reads only keys and values of the last layer
        "layers.1.attention.dense.bias",
    }
    loaded = CogLMCanvasModel.from_pretrained(tmp_path / "run/final")
    assert not loaded.config.shares_backbone
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_every_trained_weight_gets_a_gradient(script, token_folder, tokenizer_folder, tokenizer, coglm_folder):
    data = TokenData.load(token_folder, tokenizer)
    for train_backbone in (False, True):
        config = script.DirectSRTrainConfig(
            output_dir="unused",
            data="unused",
            tokenizer="unused",
            transformer=str(coglm_folder),
            model='{"kernel_size": [5, 3], "cross_kernel_size": [3, 3]}',
            train_backbone=train_backbone,
        )
        model = script.make_model(config, data)
        loss, _ = script.canvas_loss(model, script.make_batch(config, model, data, Draw(0, range(2))))
        loss.backward()
        for name, value in model.named_parameters():  # as distributed training demands
            assert (value.grad is not None) is value.requires_grad, name


def test_the_canvas_is_unknown_and_texts_are_as_long_as_in_generation(script, token_folder, tokenizer, coglm_folder):
    data = TokenData.load(token_folder, tokenizer)
    lengths = {}
    for slots, max_text_tokens in ((30, 30), (8, 30), (96, 6)):
        options = {"num_text_slots": slots, "max_text_tokens": max_text_tokens, **WINDOWS}
        config = script.DirectSRTrainConfig(
            output_dir="unused", data="unused", tokenizer="unused", transformer=str(coglm_folder)
        )
        model = CogLMCanvasModel.from_transformer(
            CogLMModel.from_pretrained(coglm_folder, dtype=torch.float32), "direct", (12, 12), **options
        )
        batch = script.make_batch(config, model, data, Draw(0, range(40)))
        lengths[slots] = int(batch.context.text_mask.sum(1).max())
        assert (batch.canvas_ids == model.config.boi_token_id).all()
        fine = {tuple(picture.flatten().tolist()): index for index, picture in enumerate(data.fine)}
        for row, labels in zip(batch.context.input_ids, batch.labels):
            index = fine[tuple(labels.tolist())]
            assert torch.equal(row[slots:], data.low[index].flatten().long())
    assert lengths[30] > 7 and lengths[8] == 7 and lengths[96] == 6


def test_what_is_lost_of_captions_is_told_at_the_end(run, caplog, tmp_path):
    run(data=write_long_captions(tmp_path / "long"), max_steps=1)
    assert_losses_are_told(caplog, 29)
