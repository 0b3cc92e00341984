"""
`training_scripts/train_cogview.py`: which samples it draws, that it learns, what its models are good for. Resuming:
test_resuming.py; several processes: test_sharding.py.
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cogview_pipelines import (
    CogViewCaptionPipeline,
    CogViewModel,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
)
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.loaders.lora_files import read_lora
from cogview_pipelines.models.adapters import add_adapter
from cogview_pipelines.models.cogview import sequences
from cogview_pipelines.training.adapters import LEFT_OUT
from cogview_pipelines.training.data.captions import with_full_stop
from cogview_pipelines.training.data.draws import Draw, released_index
from cogview_pipelines.training.data.tokens import TokenData

from ..pipelines.conftest import build_cogview
from ..utils import make_coglm
from ..utils_cogview import make_cogview, make_cogview_vq, make_layout
from .conftest import (
    COGVIEW,
    as_arguments,
    assert_losses_are_told,
    load_script,
    metrics,
    write_cogview_token_folder,
    write_long_captions,
)

IMAGE_LENGTH = 16
DRAW = Draw(0, range(48))


@pytest.fixture(scope="module")
def script():
    return load_script("train_cogview")


@pytest.fixture(scope="module")
def tokenizer(cogview_tokenizer_folder):
    return CogViewTokenizer.from_pretrained(cogview_tokenizer_folder)


@pytest.fixture(scope="module")
def data(cogview_token_folder, tokenizer):
    return TokenData.load(cogview_token_folder, tokenizer)


@pytest.fixture(scope="module")
def make_batch(script, data):
    """A batch, given options of the script, of the model, and the draw."""

    def make(draw=DRAW, model=None, **options):
        config = script.CogViewTrainConfig(output_dir="unused", data="unused", tokenizer="unused", **options)
        config.check()
        room = {"max_position_embeddings": 80, "max_super_resolution_length": 90}  # for every caption, uncut
        return script.make_batch(config, make_cogview(**{**room, **(model or {})}).config, data, draw)

    return make


@pytest.fixture
def run(script, cogview_tokenizer_folder, cogview_vqvae_folder, cogview_token_folder, tmp_path):
    def call(**options):
        return script.main(
            as_arguments(
                {
                    "output_dir": tmp_path / "run",
                    "data": cogview_token_folder,
                    "tokenizer": cogview_tokenizer_folder,
                    "vqvae": cogview_vqvae_folder,
                    "batch_size": 2,
                    "max_steps": 2,
                    "warmup_steps": 0,
                    "log_every_steps": 1,
                    "model": COGVIEW,
                    **options,
                }
            )
        )

    return call


def rows_of(batch):
    """The tokens of each sample, with the last label behind."""
    for ids, labels in zip(batch.input_ids, batch.labels):
        real = labels != IGNORED_LABEL
        assert torch.equal(labels[real][:-1], ids[1 : int(real.sum())])
        yield [*ids[real].tolist(), int(labels[real][-1])]


# Samples -------------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_the_draw_alone_however_a_step_is_shared_out(make_batch):
    options = {"caption_probability": 0.3, "super_resolution_probability": 0.3, "noise_probability": 0.1}
    whole = make_batch(Draw(3, range(24, 36)), **options)
    for start in (24, 27, 30, 33):
        part = make_batch(Draw(3, range(start, start + 3)), **options)
        length = part.input_ids.shape[1]
        own = slice(start - 24, start - 21)
        for name in ("labels", "input_ids", "position_ids", "label_weights"):
            assert torch.equal(getattr(whole, name)[own, :length], getattr(part, name)), name
        assert (whole.labels[own, length:] == IGNORED_LABEL).all()
    clean = [make_batch(Draw(0, range(8)), seed=seed).input_ids for seed in (0, 0, 1)]
    assert torch.equal(clean[0], clean[1]) and not torch.equal(clean[0], clean[2])


def test_pretraining_reads_what_generation_reads(make_batch, data, tokenizer):
    layout = make_layout(max_length=80, max_super_resolution_length=90)
    pictures = {tuple(picture.flatten().tolist()): index for index, picture in enumerate(data.low)}
    for row in rows_of(make_batch()):
        assert row[-1] == layout.command("[EOI1]")
        codes, text = row[-IMAGE_LENGTH - 1 : -1], row[1 : -IMAGE_LENGTH - 3]
        index = pictures[tuple(codes)]
        assert text in [tokenizer.encode(one) for own in data.captions[index].values() for one in own]
        expected = sequences.text_to_image([text], layout, torch.tensor([codes]))
        assert row[:-1] == expected.input_ids[0].tolist()


def test_captions_are_read_as_they_are_written_and_scored(make_batch, tokenizer):
    layout = make_layout(max_length=80, max_super_resolution_length=90)
    batch = make_batch(caption_probability=1.0, caption_image_weight=0.25, text_loss_weight=3.0)
    for row in rows_of(batch):
        codes, text = row[2 : 2 + IMAGE_LENGTH], row[4 + IMAGE_LENGTH :]
        expected = sequences.caption(torch.tensor([codes]), layout, [text])
        assert row == expected.input_ids[0].tolist()
    is_image = batch.input_ids < layout.num_image_tokens
    assert (batch.label_weights[is_image] == 0.25).all() and (batch.label_weights[~is_image] == 3.0).all()


def test_captions_that_are_learnt_end_where_the_pipeline_stops(make_batch, tokenizer):
    ends = set(tokenizer.sentence_end_ids)
    ended, endless = (
        [row[4 + IMAGE_LENGTH :] for row in rows_of(make_batch(caption_probability=1.0, end_captions=end))]
        for end in (True, False)
    )
    assert {text[-1] in ends for text in endless} == {
        True,
        False,
    }  # some of the captions have a full stop of their own
    expected = [text if text[-1] in ends else [*text, *tokenizer.encode(".")[-1:]] for text in endless]
    assert ended == expected
    chinese = tokenizer.encode("红色")
    assert with_full_stop(chinese, "zh", tokenizer.encode) == [*chinese, tokenizer.encode("。")[-1]]
    question = tokenizer.encode("a cat?")
    assert with_full_stop(question, "en", tokenizer.encode) == question


@pytest.mark.parametrize("restart", [True, False])
def test_super_resolution_reads_a_part_of_the_picture_and_its_finer_tokens(make_batch, data, restart):
    layout = make_layout(max_length=80, max_super_resolution_length=90)
    batch = make_batch(super_resolution_probability=1.0, restart_on_roi2=restart)
    parts = {}
    for index, (picture, fine) in enumerate(zip(data.low, data.fine)):
        for top in range(3):
            for left in range(3):
                coarse = picture[top : top + 2, left : left + 2].flatten().tolist()
                own = fine[2 * top : 2 * top + 4, 2 * left : 2 * left + 4].flatten().tolist()
                parts[tuple(coarse + own)] = (index, top, left)
    corners = set()
    for row, positions in zip(rows_of(batch), batch.position_ids.tolist()):
        start = row.index(layout.command("[BOI1]")) + 1
        coarse, fine = row[start : start + 4], row[start + 9 : start + 9 + IMAGE_LENGTH]
        corners.add(parts[tuple(coarse + fine)][1:])
        context = sequences.super_resolution([row[1 : start - 2]], torch.tensor([coarse]), layout)
        assert row[: start + 9] == context.input_ids[0].tolist()
        roi2 = row.index(layout.command("[ROI2]"))
        expected = [*context.position_ids[0].tolist(), *sequences.fine_positions(layout).tolist()]
        assert expected[roi2] == roi2
        if restart:
            expected[roi2] = 0
        assert positions[: len(expected)] == expected
    assert corners == {(top, left) for top in range(3) for left in range(3)}


def test_style_learning_names_the_style_instead(make_batch, data, tokenizer):
    styled = {tuple(picture.flatten().tolist()) for picture, style in zip(data.low, data.styles) if style}
    assert 0 < len(styled) < len(data)
    known = {"en": tokenizer.encode("an image of oil painting style"), "zh": tokenizer.encode("一张油画风格的图片")}
    seen = set()
    for row in rows_of(make_batch(Draw(0, range(100)), style_probability=1.0)):
        text, codes = row[1 : -IMAGE_LENGTH - 3], tuple(row[-IMAGE_LENGTH - 1 : -1])
        assert (text in known.values()) == (codes in styled)
        seen |= {language for language, own in known.items() if text == own}
    assert seen == {"en", "zh"}


def test_pictures_are_announced_as_while_generating(script):
    """Of 16 x 16 tokens, for which the release's data has another command."""
    layout = make_layout(image_grid=(16, 16), max_length=300, max_super_resolution_length=500)
    data = TokenData(
        torch.zeros(1, 16, 16).long(), torch.zeros(1, 32, 32).long(), [{"en": ["a"]}], torch.ones(1), lambda text: [50]
    )
    config = script.CogViewTrainConfig(output_dir="", data="", tokenizer="")
    for task, count in (("pretraining", 1), ("caption", 1), ("super_resolution", 2)):
        sample = script.make_sample(config, layout, data, 0, task, torch.Generator().manual_seed(0))
        assert sample.count(layout.command("[BASE]")) == count and layout.command("[SMALL]") not in sample


def test_noise_changes_image_tokens_that_are_read_and_no_label(make_batch):
    clean, noisy = make_batch(), make_batch(noise_probability=0.5)
    layout = make_layout(max_length=80, max_super_resolution_length=90)
    is_image = clean.input_ids < layout.num_image_tokens
    changed = clean.input_ids != noisy.input_ids
    assert changed[is_image].float().mean().item() == pytest.approx(0.5 * 47 / 48, abs=0.12)
    assert not changed[~is_image].any() and noisy.input_ids[is_image].max() < layout.num_image_tokens
    assert torch.equal(clean.labels, noisy.labels) and torch.equal(clean.position_ids, noisy.position_ids)


def test_the_released_order_takes_pictures_by_their_number_in_the_run(make_batch, data):
    pictures = {tuple(picture.flatten().tolist()): index for index, picture in enumerate(data.low)}
    for seed in (0, 1):
        batch = make_batch(Draw(2, range(20, 30)), data_order="released", seed=seed)
        found = [pictures[tuple(row[-IMAGE_LENGTH - 1 : -1])] for row in rows_of(batch)]
        assert found == [released_index(number, len(data)) for number in range(20, 30)]


def test_with_sparse_attention_inputs_are_as_long_as_whole_blocks(make_batch):
    sparse = {"window_size": 8, "num_windows": 2, "num_pivots": 16}
    dense, padded = make_batch(), make_batch(model={"sparse_attention": sparse})
    length = dense.input_ids.shape[1]
    assert padded.input_ids.shape[1] == -(-length // 8) * 8
    assert torch.equal(padded.input_ids[:, :length], dense.input_ids)
    assert (padded.labels[:, length:] == IGNORED_LABEL).all() and padded.position_ids.max() < 80


def test_texts_are_cut_to_what_fits_and_the_longest_leave_no_room_for_the_last_command(make_batch):
    small = {"max_position_embeddings": 40, "max_super_resolution_length": 46}
    whole, cut = make_batch(), make_batch(model=small)
    assert whole.input_ids.shape[1] > cut.input_ids.shape[1] == 39
    end = make_layout().command("[EOI1]")
    lengths = (cut.labels != IGNORED_LABEL).sum(1)
    assert all(labels[length - 1] == end for labels, length in zip(cut.labels, lengths) if length < 39)
    assert (cut.labels[:, -1] == cut.labels[:, -1].clamp(0, 47)).any()  # some end with an image token
    both = make_batch(model=small, super_resolution_probability=0.5)
    assert both.input_ids.shape[1] == 45 and both.position_ids.max() < 40


def test_image_and_text_loss_are_parts_of_the_loss(script, make_batch):
    model = make_cogview(max_position_embeddings=80)
    batch = make_batch(text_loss_weight=3.0, caption_probability=0.5)
    loss, parts = script.compute_loss(model.config.num_image_tokens, model, batch)
    labelled = batch.labels != IGNORED_LABEL
    with torch.no_grad():
        logits = model(batch.input_ids, batch.position_ids, full_vocabulary=True).logits
        losses = F.cross_entropy(logits[labelled], batch.labels[labelled], reduction="none")
    weights = batch.label_weights[labelled]
    torch.testing.assert_close(loss.detach(), (losses * weights).sum())
    assert script.loss_weight(batch) == pytest.approx(weights.sum().item())
    is_image = batch.input_ids[labelled] < model.config.num_image_tokens
    for name, chosen in (("image_loss", is_image), ("text_loss", ~is_image)):
        total, count = parts[name]
        torch.testing.assert_close(total, losses[chosen].sum())
        assert count == chosen.sum()


# Runs ----------------------------------------------------------------------------------------------------------------


def test_the_models_shape_follows_data_and_tokenizer(run, tokenizer, tmp_path):
    model = run(max_text_tokens=20)
    config = model.config
    assert (config.image_grid, config.max_text_tokens) == ((4, 4), 20)
    assert config.layout.max_super_resolution_text_tokens == 20
    assert (config.num_image_tokens, config.command_token_id) == (48, tokenizer.command_token_id)
    assert config.vocab_size == len(tokenizer)
    assert {"loss", "image_loss", "text_loss", "learning_rate", "step"} <= metrics(tmp_path / "run")[0].keys()


def test_sample_pictures_show_what_is_trained(run, tmp_path):
    names = {0.0: ["pictures"], 0.5: ["pictures", "super_resolution"], 1.0: ["super_resolution"]}
    for share, expected in names.items():
        folder = tmp_path / str(share)
        run(output_dir=folder, super_resolution_probability=share, sample_every_steps=2)
        assert sorted(path.name for path in (folder / "samples").iterdir()) == [
            f"0000002_{name}.png" for name in expected
        ]


SPARSE = {"sparse_attention": {"window_size": 8, "num_windows": 2, "num_pivots": 32}, "attention_dropout": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"super_resolution_probability": 1.0},
        {"caption_probability": 1.0, "text_loss_weight": 3.0},
        {"style_probability": 1.0},
        {"model": {**COGVIEW, **SPARSE}},
        {"model": {**COGVIEW, "pb_relaxation_alpha": 32.0, "embedding_gradient_scale": 0.1}},
    ],
    ids=["pretraining", "super-resolution", "captions", "styles", "sparse", "relaxed"],
)
def test_every_way_of_training_lowers_the_loss(run, options, tmp_path):
    run(max_steps=30, batch_size=8, learning_rate=2e-3, sample_every_steps=0, **options)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_trained_folders_are_components_of_the_pipelines(run, tokenizer, tmp_path):
    quick = {"max_steps": 1, "sample_every_steps": 0}
    run(output_dir=tmp_path / "base", **quick)
    start = {"init_from": tmp_path / "base/final", "model": {}, **quick}
    run(output_dir=tmp_path / "sr", super_resolution_probability=1.0, **start)
    run(output_dir=tmp_path / "caption", caption_probability=1.0, **start)
    base, sr, caption = (CogViewModel.from_pretrained(tmp_path / name / "final") for name in ("base", "sr", "caption"))
    assert not torch.equal(base.word_embeddings.weight, sr.word_embeddings.weight)
    pipe = CogViewPipeline(
        tokenizer, make_cogview_vq(), base, caption_transformer=caption, super_resolution_transformer=sr
    )
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = CogViewPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    output = pipe("a tiger on a blue background", num_candidates=2)
    assert output.images[0].size == (32, 32) and output.scores is not None
    upscale = CogViewUpscalePipeline.from_pipe(pipe)
    assert upscale(tokens=output.tokens, prompt="a tiger").images[0].size == (64, 64)
    assert len(CogViewCaptionPipeline.from_pipe(pipe)(tokens=output.tokens).captions) == 1


def test_finetuning_a_float16_model_trains_in_float32_from_its_weights(run, tmp_path):
    start = run(max_steps=1, output_dir=tmp_path / "first", sample_every_steps=0).half()
    start.save_pretrained(tmp_path / "half")
    tuned = run(init_from=tmp_path / "half", model={}, learning_rate=1e-4, sample_every_steps=0)
    assert tuned.dtype == torch.float32
    changes = [(value - start.state_dict()[name].float()).abs().max() for name, value in tuned.state_dict().items()]
    assert 0 < max(changes) < 1e-3


def test_an_adapter_is_saved_for_the_stage_that_it_is_for(run, tmp_path):
    pytest.importorskip("peft")
    quick = {"max_steps": 1, "sample_every_steps": 0}
    run(output_dir=tmp_path / "base", **quick)
    options = {"init_from": tmp_path / "base/final", "model": {}, "lora_rank": 2, **quick}
    for own, name in (
        ({}, "transformer"),
        ({"super_resolution_probability": 1.0}, "super_resolution_transformer"),
        ({"caption_probability": 1.0}, "caption_transformer"),
    ):
        run(output_dir=tmp_path / name, **own, **options)
        weights = load_file(tmp_path / name / "final/pytorch_lora_weights.safetensors")
        assert weights and all(key.startswith(f"{name}.") for key in weights)


def test_an_adapter_of_captioning_goes_onto_the_model_that_captions(
    run, tokenizer, cogview_tokenizer_folder, tmp_path
):
    """That is the one that draws, too, where there is no `caption_transformer`, as in the shipped model."""
    pytest.importorskip("peft")
    CogViewTokenizer.from_pretrained(cogview_tokenizer_folder, known_words=["a"]).save_pretrained(tmp_path / "words")
    base = make_cogview(max_position_embeddings=80)
    base.save_pretrained(tmp_path / "base")
    options = {"init_from": tmp_path / "base", "tokenizer": tmp_path / "words", "model": {}, "lora_rank": 2}
    trained = run(caption_probability=1.0, max_steps=10, learning_rate=0.05, **options).eval()
    words = CogViewTokenizer.from_pretrained(tmp_path / "words")
    pipe = CogViewCaptionPipeline(words, make_cogview_vq(), transformer=base)
    pipe.set_progress_bar_config(disable=True)
    ids, text = torch.randint(48, (2, 4, 4), generator=torch.Generator().manual_seed(0)), "a red tiger"
    before = pipe(tokens=ids, top_k=1, end="length").captions
    assert pipe.tokenizer.unknown_parts(text) == ["red", "tiger"]
    pipe.load_lora_weights(tmp_path / "run/final")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    sequence = sequences.caption(ids.flatten(1), base.config.layout, [tokenizer.encode(text)] * 2)
    inputs = {"input_ids": sequence.input_ids, "position_ids": sequence.position_ids, "full_vocabulary": True}
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**inputs).logits, trained(**inputs).logits)
    assert pipe(tokens=ids, top_k=1, end="length").captions != before
    assert pipe.tokenizer.unknown_parts(text) == []  # it has learned them
    pipe.delete_adapters("default_0")
    assert pipe(tokens=ids, top_k=1, end="length").captions == before and pipe.tokenizer.unknown_parts(text)

    own = CogViewCaptionPipeline(words, make_cogview_vq(), base, caption_transformer=make_cogview(1))
    own.load_lora_weights(tmp_path / "run/final")
    assert own.get_list_adapters() == {"caption_transformer": ["default_0"]}
    with pytest.raises(ValueError, match=r"for \['caption_transformer'\], which this CogViewPipeline does not have"):
        CogViewPipeline(words, make_cogview_vq(), base).load_lora_weights(tmp_path / "run/final")


def test_a_resumed_adapter_has_the_losses_of_the_whole_run(run, stop_after, tmp_path):
    pytest.importorskip("peft")
    make_cogview().save_pretrained(tmp_path / "base")
    options = {"init_from": tmp_path / "base", "model": {}, "lora_rank": 2, "max_steps": 4, "ema_decay": 0.5}
    options |= {"caption_probability": 0.5, "sample_every_steps": 0}
    run(output_dir=tmp_path / "whole", **options)
    stop_after(2)
    assert run(output_dir=tmp_path / "parts", **options) is None
    run(output_dir=tmp_path / "parts", **options, resume_from_checkpoint="latest")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    names = [tmp_path / name / "final/pytorch_lora_weights.safetensors" for name in ("whole", "parts")]
    whole, parts = map(load_file, names)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(value.any() for name, value in whole.items() if "lora_B" in name)


def test_the_validation_loss_is_that_of_the_trained_model_in_evaluation(run, script, data, tokenizer, tmp_path):
    folder = write_cogview_token_folder(tmp_path / "validation", low=torch.zeros(20, 4, 4).long())
    model = run(
        validation_data=folder, validation_samples=6, sample_every_steps=0, evaluate_every_steps=1, max_steps=1
    )
    (line,) = metrics(tmp_path / "run")
    config = script.CogViewTrainConfig(output_dir="", data="", tokenizer="")
    batch = script.make_batch(config, model.config, TokenData.load(folder, tokenizer), Draw(0, range(6)))
    with torch.no_grad():
        loss, _ = script.compute_loss(48, model.eval(), batch)
    kinds = {name for name in line if name.startswith("validation_loss/")}
    assert kinds <= {f"validation_loss/pretraining/{language}" for language in ("en", "zh")} and kinds
    assert line["validation_loss"] == pytest.approx(loss.item() / script.loss_weight(batch), rel=1e-4)


def test_rates_that_fall_from_the_warm_up_on(run, tmp_path):
    run(max_steps=10, warmup_steps=2, lr_scheduler="cosine", learning_rate=1e-3, sample_every_steps=0)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert rates[0] == 0 and max(rates) == rates[2] == 1e-3 and rates[2:] == sorted(rates[2:], reverse=True)
    assert 1e-4 < rates[-1] < 3e-4


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"caption_probability": 0.7, "super_resolution_probability": 0.5}, "must not be more than 1 together"),
        ({"style_probability": 2}, "`style_probability` must be from 0 to 1, but is 2"),
        ({"text_loss_weight": -1}, "`text_loss_weight` must be at least 0"),
        ({"lr_scheduler": "cosine", "decay_steps": 3}, "`decay_steps` must be 0 with `lr_scheduler` cosine"),
    ],
)
def test_options_that_cannot_be_are_named(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_data_that_lacks_what_a_task_needs_is_named(run, tmp_path):
    folder = write_cogview_token_folder(tmp_path / "low", fine=None, styles=False)
    with pytest.raises(ValueError, match="has no fine tokens"):
        run(data=folder, super_resolution_probability=0.5)
    with pytest.raises(ValueError, match="`style_probability` needs pictures with a `style`"):
        run(data=folder, style_probability=0.5)
    folder = write_cogview_token_folder(tmp_path / "thrice", fine=torch.zeros(20, 12, 12).long())
    with pytest.raises(ValueError, match=r"fine tokens twice as high and wide as 4 x 4 .* they are 12 x 12"):
        run(data=folder, super_resolution_probability=0.5)


def test_pictures_of_another_size_than_the_models_are_an_error(run, tokenizer, tmp_path):
    small = {"low": torch.zeros(20, 2, 2).long(), "fine": torch.zeros(20, 4, 4).long()}
    folder = write_cogview_token_folder(tmp_path / "small", **small)
    make_cogview().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"2 x 2 tokens, but the model makes 4 x 4"):
        run(data=folder, init_from=tmp_path / "model", model={})


def test_models_of_another_family_or_tokenizer_are_refused(run, tmp_path):
    make_cogview(command_token_id=100).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`tokenizer` is not that of the model: its command_token_id is 102"):
        run(init_from=tmp_path / "other", model={})
    make_coglm().save_pretrained(tmp_path / "coglm")
    with pytest.raises(ValueError, match=r"vqvae.*must be an image tokenizer.*'coglm'"):
        run(vqvae=tmp_path / "coglm")


@pytest.mark.parametrize(
    "shares, longest",
    [
        ({}, 40 - 3 - 16),
        ({"super_resolution_probability": 1.0}, 46 - 8 - 4 - 16),
        ({"caption_probability": 1.0}, 40 - 4 - 16),
        ({"caption_probability": 0.5}, 40 - 4 - 16),
        ({"caption_probability": 0.2, "super_resolution_probability": 0.2}, 46 - 8 - 4 - 16),
    ],
)
def test_captions_that_any_task_cuts_are_told_at_the_end(run, shares, longest, caplog, tmp_path):
    make_cogview().save_pretrained(tmp_path / "model")
    data = write_long_captions(tmp_path / "long", write_cogview_token_folder)
    run(data=data, init_from=tmp_path / "model", model={}, max_steps=1, sample_every_steps=0, **shares)
    assert_losses_are_told(caplog, longest)


def test_what_captioning_writes_and_names_of_styles_are_looked_at_where_they_are_trained_on(run, caplog, tmp_path):
    rows = [{"en": "a cat", "targets": {"en": "a Ω"}, "style": "oil Ψ"}] * 20
    data = write_cogview_token_folder(tmp_path / "data", captions=rows)
    for shares, lost in (({}, ""), ({"caption_probability": 0.5}, "Ω"), ({"style_probability": 0.5}, "Ψ")):
        caplog.clear()
        run(data=data, output_dir=tmp_path / f"run {lost}", max_steps=1, sample_every_steps=0, **shares)
        said = [text for text in caplog.messages if text.startswith("Characters that have no piece")]
        assert said == ([f"Characters that have no piece, which no model reads: {lost}."] if lost else [])


def test_an_adapter_brings_the_words_of_the_styles_that_it_has_learned(
    run, cogview_tokenizer_folder, cogview_token_folder, tmp_path
):
    pytest.importorskip("peft")
    CogViewTokenizer.from_pretrained(cogview_tokenizer_folder, known_words=["a", "cat"]).save_pretrained(
        tmp_path / "words"
    )
    run(max_steps=1, output_dir=tmp_path / "base", sample_every_steps=0)
    options = {"init_from": tmp_path / "base/final", "model": {}, "lora_rank": 2, "max_steps": 1}
    for share in (1.0, 0.0):
        folder = tmp_path / f"styles {share}"
        run(tokenizer=tmp_path / "words", style_probability=share, sample_every_steps=0, output_dir=folder, **options)
        words = read_lora(folder / "final", ["transformer"]).known_words
        assert "background" in words and "a" not in words
        assert ({"oil", "painting", "of", "style", "油画"} <= set(words)) is bool(share)
        assert ("painting" in words) is bool(share)


def test_an_adapter_of_captioning_brings_the_words_that_it_writes(script, cogview_tokenizer_folder, tmp_path):
    rows = [{"en": "a red cat", "targets": {"en": "a blue cat"}}] * 20
    tokenizer = CogViewTokenizer.from_pretrained(
        cogview_tokenizer_folder, known_words=["a", "cat"], component_words={"transformer": ["red"]}
    )
    data = TokenData.load(write_cogview_token_folder(tmp_path, styles=False, captions=rows), tokenizer)
    for share, words in ((0.5, []), (1.0, ["blue"])):
        config = script.CogViewTrainConfig(
            output_dir="", data="", tokenizer="", lora_rank=2, caption_probability=share
        )
        assert config.learned_words(data, tokenizer, config.component) == words
    assert config.learned_words(data, CogViewTokenizer.from_pretrained(cogview_tokenizer_folder)) == []


def test_adapters_that_were_saved_with_the_model_are_named(run, cogview_tokenizer_folder, tmp_path, caplog):
    pipe = build_cogview(CogViewTokenizer.from_pretrained(cogview_tokenizer_folder))
    add_adapter(pipe.transformer, "style", 2)
    pipe.save_pretrained(tmp_path / "MODEL")
    parts = {"tokenizer": cogview_tokenizer_folder, "vqvae": tmp_path / "MODEL/vqvae", "output_dir": tmp_path / "made"}
    caplog.clear()
    run(init_from=tmp_path / "MODEL/transformer", max_steps=1)
    assemble = load_script("assemble_cogview_pipeline").main
    assemble(as_arguments({**parts, "transformer": tmp_path / "MODEL/transformer"}))
    said = [text for text in caplog.messages if LEFT_OUT in text]
    assert said == [f"The adapters ['style'] of `{option}` {LEFT_OUT}" for option in ("init_from", "transformer")]
