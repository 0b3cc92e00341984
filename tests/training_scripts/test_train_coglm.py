"""`training_scripts/train_coglm.py`: which samples it draws, and what it starts from. Resuming: test_resuming.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines import CogLMModel
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.training.data.draws import Draw
from cogview_pipelines.training.data.tokens import TokenData

from ..utils import captions, make_coglm, token_config
from .conftest import COGLM, as_arguments, assert_losses_are_told, load_script, metrics, write_long_captions

IMAGE_LENGTH = 16
DRAW = Draw(0, range(64))


@pytest.fixture(scope="module")
def script():
    return load_script("train_coglm")


@pytest.fixture(scope="module")
def data(token_folder, tokenizer):
    return TokenData.load(token_folder, tokenizer)


@pytest.fixture(scope="module")
def make_batch(script, data, tokenizer):
    """A batch, given options of the script, of the model, the draw, and perhaps other data."""

    def make(draw=DRAW, max_text_tokens=30, data=data, **options):
        config = script.CogLMTrainConfig(
            output_dir="unused", data="unused", tokenizer="unused", patch_size=2, **options
        )
        model_config = make_coglm(**token_config(tokenizer), max_text_tokens=max_text_tokens).config
        return script.make_batch(config, model_config, tokenizer, data, draw)

    return make


def test_a_batch_depends_on_the_draw_alone(make_batch):
    for draw in (Draw(0, range(8)), Draw(7, range(56, 64))):
        assert torch.equal(make_batch(draw).input_ids, make_batch(draw).input_ids)
    batches = [make_batch(Draw(0, range(start, start + 8))) for start in (0, 8, 16)]
    batches.append(make_batch(Draw(0, range(8)), seed=1))
    assert len({tuple(batch.input_ids.flatten().tolist()) for batch in batches}) == 4


def test_samples_are_the_same_however_a_step_is_shared_out(make_batch):
    options = {"caption_probability": 0.5, "completion_probability": 0.2, "noise_probability": 0.1}
    whole = make_batch(Draw(3, range(24, 36)), **options)
    parts = [make_batch(Draw(3, range(start, start + 3)), **options) for start in (24, 27, 30, 33)]
    for name, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name


def test_text_to_image_predicts_the_whole_image_and_no_text(make_batch, data, tokenizer):
    batch = make_batch(caption_probability=0.0)
    assert (batch.input_ids[:, -IMAGE_LENGTH - 1] == tokenizer.boi_token_id).all()
    assert torch.equal(batch.labels[:, -IMAGE_LENGTH - 1 : -1], batch.input_ids[:, -IMAGE_LENGTH:])
    assert (batch.labels[:, : -IMAGE_LENGTH - 1] == IGNORED_LABEL).all()
    pictures = {tuple(picture.flatten().tolist()) for picture in data.low}
    assert {tuple(row.tolist()) for row in batch.input_ids[:, -IMAGE_LENGTH:]} <= pictures


def test_captioning_predicts_text_after_the_start_token_of_its_language(make_batch, tokenizer):
    batch = make_batch(caption_probability=1.0)
    starts = {"en": tokenizer.start_of_english_id, "zh": tokenizer.start_of_chinese_id}
    known = {tuple(tokenizer.encode(text)): tokenizer.language(text) for text in captions()}
    seen = set()
    for ids, labels in zip(batch.input_ids, batch.labels):
        text = labels[: -IMAGE_LENGTH - 1]
        text = tuple(text[text != IGNORED_LABEL].tolist())
        assert tuple(ids[1 : len(text) + 1].tolist()) == text
        if text in known:  # the fixture has one more wording
            seen.add(known[text])
            assert ids[0] == starts[known[text]]
    assert seen == {"en", "zh"}
    assert (batch.labels[:, -IMAGE_LENGTH:] != IGNORED_LABEL).any(1).all()  # and masked patches, at once


def test_captions_that_are_learnt_end_where_the_pipeline_stops_and_prompts_do_not(make_batch, tokenizer):
    def texts(batch):
        rows = [labels[: -IMAGE_LENGTH - 1] for labels in batch.labels]
        return [row[row != IGNORED_LABEL].tolist() for row in rows]

    ended, endless = (texts(make_batch(caption_probability=1.0, end_captions=end)) for end in (True, False))
    ends, stops = set(tokenizer.sentence_end_ids), {tokenizer.encode(stop)[-1] for stop in (".", "。")}
    assert not all(text[-1] in ends for text in endless) and all(text[-1] in ends for text in ended)
    for text, with_end in zip(endless, ended, strict=True):
        assert with_end == text or (text[-1] not in ends and with_end[:-1] == text and with_end[-1] in stops)
    drawn = [make_batch(caption_probability=0.0, end_captions=end).input_ids for end in (True, False)]
    assert torch.equal(*drawn)


def test_captioning_of_whole_images_reads_them_as_captioning_does(make_batch):
    batch = make_batch(caption_probability=1.0, whole_image_probability=1.0)
    image = slice(batch.input_ids.shape[1] - IMAGE_LENGTH, None)
    assert (batch.labels[:, image] == IGNORED_LABEL).all() and (batch.labels != IGNORED_LABEL).any(1).all()
    assert batch.attention_mask[:, image, image].all()
    some = make_batch(caption_probability=1.0, whole_image_probability=0.5)
    whole = (some.labels[:, image] == IGNORED_LABEL).all(1).float().mean()
    assert 0.2 < whole < 0.8


def test_the_share_of_captioning_is_what_was_asked_for(make_batch, tokenizer):
    shares = []
    for step in range(16):
        batch = make_batch(Draw(step, range(64 * step, 64 * step + 64)), caption_probability=0.25)
        is_generation = batch.input_ids[:, -IMAGE_LENGTH - 1] == tokenizer.boi_token_id
        shares.append(1 - is_generation.float().mean())
    assert torch.tensor(shares).mean().item() == pytest.approx(0.25, abs=0.05)  # three sigma: 0.04


def test_auxiliary_pictures_have_their_own_share_of_captioning(make_batch, data, tokenizer):
    other = dataclasses.replace(data, low=data.low.flip(1))
    mixed = data.with_auxiliary(other, 0.5)
    own, others = ({tuple(picture.flatten().tolist()) for picture in each.low} for each in (data, other))
    assert not own & others

    def captioned(**options):
        """Of which sets pictures are that are captioned, and that are drawn."""
        batch = make_batch(data=mixed, whole_image_probability=1.0, **options)
        found = {True: set(), False: set()}
        for row in batch.input_ids:
            is_own = tuple(row[-IMAGE_LENGTH:].tolist()) in own
            found[(row[-IMAGE_LENGTH - 1] != tokenizer.boi_token_id).item()].add("own" if is_own else "other")
        return found

    assert captioned(caption_probability=0.0, auxiliary_caption_probability=1.0) == {True: {"other"}, False: {"own"}}
    assert captioned(caption_probability=1.0, auxiliary_caption_probability=0.0) == {True: {"own"}, False: {"other"}}
    assert captioned(caption_probability=1.0) == {True: {"own", "other"}, False: set()}


def test_dropped_texts_are_empty_and_only_text_to_image_drops_them(make_batch, tokenizer):
    batch = make_batch(caption_probability=0.0, drop_text_probability=1.0)
    assert (batch.input_ids[:, : -IMAGE_LENGTH - 1] == tokenizer.pad_token_id).all()
    assert not batch.text_mask.any()
    assert (make_batch(caption_probability=1.0, drop_text_probability=1.0).text_mask.sum(1) > 1).all()
    some = make_batch(caption_probability=0.0, drop_text_probability=0.5).text_mask.any(1).float().mean()
    assert 0.2 < some < 0.8
    assert make_batch(caption_probability=0.0).text_mask.any(1).all()


def test_completion_predicts_a_hole_from_all_around_it(make_batch, tokenizer):
    batch = make_batch(caption_probability=0.0, completion_probability=1.0)
    predicted = (batch.labels != IGNORED_LABEL).sum(1)
    assert 0 < predicted.min() < predicted.max() < IMAGE_LENGTH
    text_length = batch.text_mask.sum(1)
    ids = batch.input_ids[torch.arange(len(batch)), text_length]
    assert (ids == tokenizer.boi_token_id).all()
    first = batch.attention_mask[torch.arange(len(batch)), text_length + 1]  # a known cell sees cells behind it
    assert (first.sum(1) > text_length + 2).any()


def test_noise_changes_what_text_to_image_reads_and_not_what_it_predicts(make_batch, tokenizer):
    options = {"caption_probability": 0.5, "completion_probability": 0.25}
    clean, noisy = make_batch(**options), make_batch(noise_probability=0.5, **options)
    is_generation = clean.input_ids[:, -IMAGE_LENGTH - 1] == tokenizer.boi_token_id
    share = (clean.input_ids != noisy.input_ids)[is_generation, -IMAGE_LENGTH:].float().mean()
    assert share.item() == pytest.approx(0.5 * 47 / 48, abs=0.12)  # one random token in 48 is the true one
    assert noisy.input_ids[is_generation, -IMAGE_LENGTH:].max() < tokenizer.num_image_tokens
    before = -IMAGE_LENGTH - 1
    assert torch.equal(clean.labels[is_generation, before:-1], noisy.labels[is_generation, before:-1])
    assert torch.equal(clean.input_ids[is_generation, :before], noisy.input_ids[is_generation, :before])


def test_noise_changes_what_captioning_reads_and_not_what_it_predicts(make_batch, tokenizer):
    options = {"caption_probability": 0.5, "whole_image_probability": 0.5}
    clean, noisy = make_batch(**options), make_batch(caption_noise_probability=0.5, **options)
    is_caption = clean.input_ids[:, -IMAGE_LENGTH - 1] != tokenizer.boi_token_id
    changed = clean.input_ids != noisy.input_ids
    assert changed[is_caption, -IMAGE_LENGTH:].float().mean().item() == pytest.approx(0.5 * 47 / 48, abs=0.12)
    assert not changed[:, :-IMAGE_LENGTH].any() and not changed[~is_caption].any()
    assert torch.equal(clean.labels, noisy.labels)


def test_captions_are_cut_to_what_the_model_takes(make_batch):
    whole, cut = make_batch(caption_probability=0.0), make_batch(caption_probability=0.0, max_text_tokens=6)
    assert whole.text_mask.sum(1).max() > 6
    assert cut.input_ids.shape[1] == 6 + 1 + IMAGE_LENGTH
    assert torch.equal(cut.text_mask.sum(1), whole.text_mask.sum(1).clamp(max=6))
    assert torch.equal(cut.input_ids[:, :6], whole.input_ids[:, :6])


@pytest.mark.parametrize("text_loss_weight", [1.0, 3.0])
def test_image_and_text_loss_are_parts_of_the_loss(text_loss_weight, script, make_batch, tokenizer):
    model = make_coglm(**token_config(tokenizer))
    batch = make_batch(caption_probability=0.5)
    loss, parts = script.compute_loss(model.config.num_image_tokens, text_loss_weight, model, batch)
    loss.backward()
    weight = script.loss_weight(model.config.num_image_tokens, text_loss_weight, batch)
    with torch.no_grad():
        logits = model(batch.input_ids, batch.position_ids, batch.attention_mask, full_vocabulary=True).logits
    is_image = batch.labels[batch.labels != IGNORED_LABEL] < model.config.num_image_tokens
    weights = torch.where(is_image, 1.0, text_loss_weight)
    losses = F.cross_entropy(
        logits[batch.labels != IGNORED_LABEL], batch.labels[batch.labels != IGNORED_LABEL], reduction="none"
    )
    torch.testing.assert_close(loss.detach(), (losses * weights).sum())
    assert weight == pytest.approx(weights.sum().item())
    for name, chosen in (("image_loss", is_image), ("text_loss", ~is_image)):
        total, count = parts[name]
        torch.testing.assert_close(total, losses[chosen].sum())
        assert count == chosen.sum()
    assert model.word_embeddings.weight.grad.abs().sum() > 0


@pytest.fixture
def run(script, tokenizer_folder, vqvae_folder, token_folder, tmp_path):
    def call(**options):
        return script.main(
            as_arguments(
                {
                    "output_dir": tmp_path / "run",
                    "data": token_folder,
                    "tokenizer": tokenizer_folder,
                    "vqvae": vqvae_folder,
                    "batch_size": 2,
                    "max_steps": 2,
                    "warmup_steps": 0,
                    "log_every_steps": 1,
                    "patch_size": 2,
                    **options,
                }
            )
        )

    return call


def test_finetuning_a_float16_model_trains_in_float32(run, coglm_folder, tmp_path):
    start = CogLMModel.from_pretrained(coglm_folder, dtype="auto")
    assert start.dtype == torch.float16
    tuned = run(init_from=coglm_folder, learning_rate=1e-4)
    assert tuned.dtype == torch.float32
    differences = [
        (value - start.state_dict()[name].float()).abs().max() for name, value in tuned.state_dict().items()
    ]
    assert 0 < max(differences) < 1e-3  # two small steps from there, not a new model
    assert CogLMModel.from_pretrained(tmp_path / "run/final").dtype == torch.float32


def test_sample_pictures_take_captions_that_are_too_long(run, tmp_path):
    run(model={**COGLM, "max_text_tokens": 5}, sample_every_steps=1)
    assert sorted(path.name for path in (tmp_path / "run/samples").iterdir()) == ["0000001.png", "0000002.png"]


def test_the_models_shape_follows_data_and_tokenizer(run, tokenizer, tmp_path):
    model = run(model=COGLM, caption_probability=1.0)
    assert model.config.image_grid == (4, 4)
    for name, value in token_config(tokenizer).items():
        assert getattr(model.config, name) == value
    assert {"loss", "image_loss", "text_loss", "learning_rate", "step"} <= metrics(tmp_path / "run")[0].keys()


def test_the_text_loss_is_the_mean_over_captions_however_many_batches_have_none(run, tmp_path):
    """Half of these batches of one sample have no caption; they counted as a loss of 0."""
    options = {"model": COGLM, "batch_size": 1, "learning_rate": 0.0, "weight_decay": 0.0, "sample_every_steps": 0}
    run(**options, max_steps=12, caption_probability=0.4, log_every_steps=12)
    (line,) = metrics(tmp_path / "run")
    run(**options, output_dir=tmp_path / "each", max_steps=12, caption_probability=0.4)
    with_captions = [each["text_loss"] for each in metrics(tmp_path / "each") if "text_loss" in each]
    assert 0 < len(with_captions) < 12 and min(with_captions) > 2
    assert min(with_captions) <= line["text_loss"] <= max(with_captions)


def test_a_tokenizer_of_another_model_is_an_error(run, tokenizer, tmp_path):
    other = make_coglm(**{**token_config(tokenizer), "boi_token_id": 3})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`tokenizer` is not that of the model: its boi_token_id is \d+, .* 3"):
        run(init_from=tmp_path / "other")


def test_the_loss_of_other_pictures_is_told_by_task_and_language_and_changes_nothing(
    script, coglm_folder, token_folder, tokenizer_folder, tmp_path
):
    common = {"init_from": coglm_folder, "tokenizer": tokenizer_folder, "data": token_folder, "batch_size": 4}
    common |= {"max_steps": 6, "warmup_steps": 0, "log_every_steps": 2, "ema_decay": 0.5}
    common |= {"caption_probability": 0.4, "completion_probability": 0.2, "drop_text_probability": 0.2}
    validation = {"validation_data": token_folder, "validation_samples": 40, "evaluate_every_steps": 4}
    script.main(as_arguments({**common, "output_dir": tmp_path / "plain"}))
    model = script.main(as_arguments({**common, **validation, "output_dir": tmp_path / "validation"}))
    lines = metrics(tmp_path / "validation")
    told = [{name: value for name, value in line.items() if name.startswith("validation_loss")} for line in lines]
    assert set(told[0]) == {"validation_loss_before"} and told[1].keys() == told[2].keys()
    kinds = [name.removeprefix("validation_loss/") for name in told[2] if "/" in name]
    tasks = {"captioning": {"en", "zh"}, "text_to_image": {"en", "zh", "no_text"}, "completion": set()}
    assert {kind.split("/")[0] for kind in kinds} == set(tasks)
    assert all(f"{task}/{language}" in kinds for task, languages in tasks.items() for language in languages)
    plain = [{name: value for name, value in line.items() if name not in told[0] | told[2]} for line in lines]
    assert plain == metrics(tmp_path / "plain")

    probabilities = {name: value for name, value in common.items() if name.endswith("_probability")}
    config = script.CogLMTrainConfig(output_dir="", data="", tokenizer="", **probabilities)
    tokenizer = script.IcetkTokenizer.from_pretrained(tokenizer_folder)
    data, sums, tasks = TokenData.load(token_folder, tokenizer), {}, {}
    for number in range(40):
        batch = script.make_batch(config, model.config, tokenizer, data, Draw(0, [number]))
        with torch.no_grad():
            loss, _ = script.compute_loss(model.config.num_image_tokens, 1.0, model, batch)
        weight = script.loss_weight(model.config.num_image_tokens, 1.0, batch)
        is_text = bool((batch.labels >= model.config.num_image_tokens).any())
        kind = script.draw_kind(config, data, Draw(0, [number]), *Draw(0, [number]).generators(config.seed))
        assert is_text == kind.startswith("captioning")
        assert (int((batch.labels >= 0).sum()) == model.config.layout.image_length) == kind.startswith("text_to_image")
        for name in ("validation_loss", f"validation_loss/{kind}"):
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = total + float(loss), count + weight
    assert told[2] == pytest.approx({name: total / count for name, (total, count) in sums.items()}, rel=1e-4)


def test_the_loss_before_is_told_once_also_where_a_stop_came_before_the_first_line(
    script, coglm_folder, token_folder, tokenizer_folder, tmp_path, stop_after
):
    options = {"init_from": coglm_folder, "tokenizer": tokenizer_folder, "data": token_folder, "batch_size": 2}
    options |= {"max_steps": 4, "warmup_steps": 0, "log_every_steps": 2, "resume_from_checkpoint": "latest"}
    options |= {"validation_data": token_folder, "validation_samples": 4}
    script.main(as_arguments({**options, "output_dir": tmp_path / "whole"}))
    for steps in (1, 2):
        stop_after(steps)
        assert script.main(as_arguments({**options, "output_dir": tmp_path / "parts"})) is None
    script.main(as_arguments({**options, "output_dir": tmp_path / "parts"}))
    whole, parts = (
        [line.get("validation_loss_before") for line in metrics(tmp_path / name)] for name in ("whole", "parts")
    )
    assert whole == parts and whole[0] is not None and whole[1:] == [None]


def test_what_is_lost_of_captions_is_told_at_the_end(run, caplog, tmp_path):
    run(data=write_long_captions(tmp_path / "long"), model=COGLM)
    assert_losses_are_told(caplog, 30)
