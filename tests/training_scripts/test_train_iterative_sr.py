"""`training_scripts/train_iterative_sr.py`: masks, noise, and where weights come from. Resuming: test_resuming.py."""

import pytest
import torch

from cogview_pipelines import CogLMCanvasModel, CogLMModel, LoPARScheduler
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.training.data.draws import Draw
from cogview_pipelines.training.data.tokens import TokenData

from .conftest import WINDOWS, as_arguments, assert_losses_are_told, load_script, write_long_captions


@pytest.fixture(scope="module")
def script():
    return load_script("train_iterative_sr")


@pytest.fixture(scope="module")
def data(token_folder, tokenizer):
    return TokenData.load(token_folder, tokenizer)


@pytest.fixture
def make_batch(script, data, coglm_folder):
    def make(batch_size, **options):
        config = script.IterativeSRTrainConfig(
            output_dir="unused", data="unused", tokenizer="unused", transformer=str(coglm_folder), **options
        )
        model_config = script.make_model(config, data).config
        return model_config, script.make_batch(config, model_config, data, Draw(0, range(batch_size)))

    return make


def test_mask_ratios_are_the_papers_and_equally_likely(make_batch):
    config, batch = make_batch(batch_size=500)
    masked = batch.canvas_ids == config.boi_token_id
    shares = masked.float().mean(1)
    ratios = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.9])
    nearest = (shares[:, None] - ratios).abs().argmin(1)
    counts = torch.bincount(nearest, minlength=5)
    assert ((counts - 100).abs() < 45).all()  # five sigma
    for index, ratio in enumerate(ratios):
        assert shares[nearest == index].mean().item() == pytest.approx(ratio.item(), abs=0.02)


def test_masked_cells_are_predicted_and_the_others_seen(make_batch, data):
    config, batch = make_batch(batch_size=16)
    masked = batch.canvas_ids == config.boi_token_id
    assert torch.equal(batch.labels != IGNORED_LABEL, masked)
    pictures = {tuple(picture.flatten().tolist()) for picture in data.fine}
    restored = torch.where(masked, batch.labels, batch.canvas_ids)
    assert {tuple(row.tolist()) for row in restored} <= pictures


def test_other_mask_ratios_can_be_asked_for(make_batch):
    config, batch = make_batch(batch_size=64, mask_ratios=[0.5])
    shares = (batch.canvas_ids == config.boi_token_id).float().mean(1)
    assert shares.min() > 0.3 and shares.max() < 0.7


def test_noise_replaces_visible_tokens_but_never_labels(make_batch):
    config, clean = make_batch(batch_size=64)
    _, noisy = make_batch(batch_size=64, noise_probability=0.25)
    visible = clean.canvas_ids != config.boi_token_id
    assert torch.equal(noisy.canvas_ids != config.boi_token_id, visible)
    assert torch.equal(noisy.labels, clean.labels)
    changed = (noisy.canvas_ids != clean.canvas_ids)[visible].float().mean().item()
    assert changed == pytest.approx(0.25 * 47 / 48, abs=0.03)  # one in 48 draws the same token
    assert noisy.canvas_ids[visible].max() < config.num_image_tokens


def test_texts_are_cut_to_the_slots(make_batch):
    _, batch = make_batch(batch_size=8, model='{"num_text_slots": 4}')
    assert batch.context.input_ids.shape == (8, 4)
    assert batch.context.text_mask.all()


@pytest.fixture
def run(script, tokenizer_folder, coglm_folder, token_folder, tmp_path):
    def call(*flags, **options):
        options = {
            "output_dir": tmp_path / "run",
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "transformer": coglm_folder,
            "model": {"num_text_slots": 4, **WINDOWS},
            "batch_size": 2,
            "max_steps": 1,
            "warmup_steps": 0,
            **options,
        }
        return script.main([*as_arguments(options), *flags])

    return call


def test_it_starts_from_the_coglm_and_is_saved_whole(run, coglm_folder, tmp_path):
    model = run(learning_rate=1e-5)
    start = CogLMModel.from_pretrained(coglm_folder, dtype=torch.float32)
    for name, value in start.state_dict().items():
        assert (model.state_dict()[name] - value).abs().max() < 1e-4, name
    loaded = CogLMCanvasModel.from_pretrained(tmp_path / "run/final")
    assert loaded.config.super_resolution == "iterative" and not loaded.config.shares_backbone
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_from_scratch_takes_the_shape_only_and_other_options_win(run, coglm_folder, tmp_path):
    start = CogLMModel.from_pretrained(coglm_folder, dtype=torch.float32)
    options = {"num_text_slots": 4, "hidden_size": 16, "num_hidden_layers": 1, **WINDOWS}
    model = run("--from_scratch", model=options)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    assert model.config.intermediate_size == start.config.intermediate_size  # given, so it does not follow the width
    assert model.config.vocab_size == start.config.vocab_size and model.config.fine_grid == (12, 12)
    assert CogLMCanvasModel.from_pretrained(tmp_path / "run/final").config.num_text_slots == 4


@pytest.mark.parametrize("rows, columns, sigma", [(12, 12, None), (60, 18, None), (8, 8, 4), (10, 20, 10), (7, 9, 1)])
def test_sample_pictures_have_a_schedule_for_every_canvas(script, rows, columns, sigma):
    scheduler = script.sample_scheduler(rows, columns)
    expected = LoPARScheduler() if sigma is None else LoPARScheduler.diagonal(sigma)
    assert scheduler.config.step_grid == expected.config.step_grid
    assert scheduler.step_map(rows, columns).shape == (rows, columns)


def test_what_is_lost_of_captions_is_told_at_the_end(run, caplog, tmp_path):
    run(data=write_long_captions(tmp_path / "long"))
    assert_losses_are_told(caplog, 4)
