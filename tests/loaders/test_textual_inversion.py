"""Learned words: trained on frozen weights, loaded into all stages, saved; and words that users add themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview_pipelines import (
    CogLMModel,
    CogView2CaptionPipeline,
    CogView2Pipeline,
    CogViewPipeline,
    CogViewUpscalePipeline,
)
from cogview_pipelines.loaders.textual_inversion import EMBEDDING_NAME, write_learned_token
from cogview_pipelines.models.learned_tokens import LearnedTokens, learn_token

from ..pipelines.conftest import build, build_cogview
from ..training_scripts.conftest import (  # noqa: F401 - fixtures
    as_arguments,
    coglm_folder,
    fresh_accelerate_state,
    load_script,
    metrics,
    stop_after,
    tokenizer_folder,
    write_token_folder,
)
from ..utils import make_coglm, make_image_tokens, make_tokenizer, token_config
from ..utils_cogview import make_cogview_tokenizer

WORD = "<my-car>"


@pytest.fixture
def pipe(tmp_path):
    """A pipeline with a tokenizer of its own, which is changed."""
    (tmp_path / "own").mkdir()
    return build(make_tokenizer(tmp_path / "own"), shares_backbone=True)


@pytest.fixture
def learned(tmp_path):
    row = torch.randn(32, generator=torch.Generator().manual_seed(5))
    write_learned_token(tmp_path / "word", WORD, row, "car")
    return tmp_path / "word", row


def draw(pipe, prompt):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator().manual_seed(1), output_type="latent").tokens


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_learned_word_is_a_token_of_its_own_in_all_stages(pipe, learned):
    folder, row = learned
    before, size = draw(pipe, "a car"), len(pipe.tokenizer)
    pipe.load_textual_inversion(folder)
    ids = pipe.tokenizer.encode(f"a {WORD}")
    assert ids[-1] == size and len(pipe.tokenizer) == size + 1
    assert torch.equal(pipe.transformer.word_embeddings.weight[size], row)
    assert pipe.direct_sr_transformer.word_embeddings.weight is pipe.transformer.word_embeddings.weight
    # iterative super-resolution, which did not learn it, reads the words that it began with
    table = pipe.iterative_sr_transformer.word_embeddings.weight
    assert torch.allclose(table[size], table[pipe.tokenizer.encode("car")].mean(0), atol=1e-6)
    assert torch.equal(draw(pipe, "a car"), before)
    assert not torch.equal(draw(pipe, f"a {WORD}"), before)
    assert pipe.tokenizer.unknown_parts(f"a {WORD}") == []


def test_a_pipeline_with_a_learned_word_is_saved_and_loaded(pipe, learned, tmp_path):
    pipe.load_textual_inversion(learned[0], token="<mine>")
    expected = draw(pipe, "a <mine>")
    pipe.save_pretrained(tmp_path / "model")
    loaded = CogView2Pipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(draw(loaded, "a <mine>"), expected)


def test_words_that_a_user_adds_are_saved_and_loaded(pipe, tmp_path):
    """Without a learned embedding: `add_tokens`, `resize_token_embeddings`, and the backbone is lent again."""
    assert pipe.tokenizer.add_tokens(["Zugspitze", "楚格峰"]) == 2
    for model in (pipe.transformer, pipe.iterative_sr_transformer):
        model.resize_token_embeddings(len(pipe.tokenizer))
    pipe = CogView2Pipeline.from_pipe(pipe)
    expected = [draw(pipe, text) for text in ("a cat on a Zugspitze", "一只猫,楚格峰")]
    pipe.save_pretrained(tmp_path / "model")
    loaded = CogView2Pipeline.from_pretrained(tmp_path / "model")
    for text, tokens in zip(("a cat on a Zugspitze", "一只猫,楚格峰"), expected):
        assert loaded.tokenizer.encode(text) == pipe.tokenizer.encode(text)
        assert torch.equal(draw(loaded, text), tokens)


@pytest.mark.parametrize(
    "check",
    [
        lambda pipe: pipe.check_inputs("a Zugspitze"),
        lambda pipe: pipe.check_inputs("a cat", negative_prompt="a Zugspitze", guidance_scale=2.0),
        lambda pipe: CogView2CaptionPipeline.from_pipe(pipe).check_texts("a Zugspitze"),
    ],
    ids=["prompt", "negative", "text"],
)
def test_tokens_without_an_embedding_are_refused_with_what_to_do(pipe, check):
    check(pipe)
    pipe.tokenizer.add_tokens(["Zugspitze"])
    with pytest.raises(ValueError, match=r"prompt` holds 'Zugspitze', a token .* Call `resize_token_embeddings"):
        check(pipe)
    for model in (pipe.transformer, pipe.iterative_sr_transformer):
        model.resize_token_embeddings(len(pipe.tokenizer))
    check(CogView2Pipeline.from_pipe(pipe))


def test_tokens_without_an_embedding_are_refused_by_the_first_cogview(cogview):
    pipe = cogview
    pipe.check_inputs("a Zugspitze")
    room = pipe.transformer.config.vocab_size - len(pipe.tokenizer)  # the table is longer than the vocabulary
    pipe.tokenizer.add_tokens([f"<{number}>" for number in range(room)] + ["Zugspitze"])
    with pytest.raises(ValueError, match=r"`prompt` holds 'Zugspitze', a token .* Call `resize_token_embeddings"):
        pipe.check_inputs("a Zugspitze")


@pytest.fixture
def cogview(tmp_path):
    """The first CogView, with a tokenizer of its own, which is changed."""
    (tmp_path / "cogview_pieces").mkdir()
    return build_cogview(make_cogview_tokenizer(tmp_path / "cogview_pieces"))


def upscale(pipe, prompt):
    tokens = make_image_tokens(1).reshape(1, 4, 4) % 48
    upscaler = CogViewUpscalePipeline.from_pipe(pipe)
    upscaler.set_progress_bar_config(disable=True)
    options = {"generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    return upscaler(tokens=tokens, prompt=prompt, **options).tokens


def test_a_learned_word_of_the_first_cogview_is_saved_and_loaded(cogview, learned, tmp_path):
    folder, row = learned
    before, size = draw(cogview, "a car"), len(cogview.tokenizer)
    cogview.load_textual_inversion(folder)
    assert cogview.tokenizer.encode(f"a {WORD}")[-1] == size
    assert torch.equal(cogview.transformer.word_embeddings.weight[size], row)
    # those that did not learn it read the words that it began with
    for model in (cogview.super_resolution_transformer, cogview.caption_transformer):
        table = model.word_embeddings.weight
        assert torch.allclose(table[size], table[cogview.tokenizer.encode("car")].mean(0), atol=1e-6)
    assert torch.equal(draw(cogview, "a car"), before)
    expected = draw(cogview, f"a {WORD}"), upscale(cogview, f"a {WORD}")
    assert not torch.equal(expected[0], before)
    cogview.save_pretrained(tmp_path / "model")
    loaded = CogViewPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(draw(loaded, f"a {WORD}"), expected[0])
    assert torch.equal(upscale(loaded, f"a {WORD}"), expected[1])


def test_words_that_a_user_adds_to_the_first_cogview_are_saved_and_loaded(cogview, tmp_path):
    assert cogview.tokenizer.add_tokens([f"<{number}>" for number in range(8)] + ["Zugspitze", "楚格峰"]) == 10
    for name in ("transformer", "super_resolution_transformer", "caption_transformer"):
        getattr(cogview, name).resize_token_embeddings(len(cogview.tokenizer))
    texts = ("a cat on a Zugspitze", "一只猫,楚格峰")
    expected = [(draw(cogview, text), upscale(cogview, text)) for text in texts]
    cogview.save_pretrained(tmp_path / "model")
    loaded = CogViewPipeline.from_pretrained(tmp_path / "model")
    for text, tokens in zip(texts, expected):
        assert loaded.tokenizer.encode(text) == cogview.tokenizer.encode(text)
        assert torch.equal(draw(loaded, text), tokens[0]) and torch.equal(upscale(loaded, text), tokens[1])


def test_a_learned_word_needs_the_model_that_learned_it(cogview, learned):
    own = {name: getattr(cogview, name) for name in ("tokenizer", "vqvae", "super_resolution_transformer")}
    pipe, size = CogViewUpscalePipeline(**own), len(cogview.tokenizer)
    with pytest.raises(ValueError, match="of the `transformer`, which this CogViewUpscalePipeline does not have"):
        pipe.load_textual_inversion(learned[0])
    assert len(pipe.tokenizer) == size


def test_a_word_that_was_added_is_known_whatever_the_list_of_words_says(tmp_path):
    from cogview_pipelines import IcetkTokenizer

    make_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    tokenizer = IcetkTokenizer.from_pretrained(tmp_path / "saved", known_words=["a", "cat"])
    tokenizer.add_tokens(["Zugspitze"])
    assert tokenizer.unknown_parts("a cat and a Zugspitze") == ["and"]


def test_mistakes_are_named_and_change_nothing(pipe, learned, tmp_path):
    folder, row = learned
    size = len(pipe.tokenizer)

    def refuse(message, source=folder, **options):
        with pytest.raises(ValueError, match=message):
            pipe.load_textual_inversion(source, **options)
        assert len(pipe.tokenizer) == size
        assert len(pipe.transformer.word_embeddings.weight) == pipe.transformer.config.vocab_size

    refuse("must be a new one, but the tokenizer has '<start_of_image>'", token="<start_of_image>")
    for token in ("", " ", "a car", "x ", "car\u2028", "\ud800", "\0", 5):
        refuse("`token` must be one word of visible letters", token=token)
    save_file({"": row}, tmp_path / "nameless.safetensors")
    refuse("must be one word", tmp_path / "nameless.safetensors")
    save_file({WORD: torch.zeros(31)}, tmp_path / "narrow.safetensors")
    refuse("of a model of width 31", tmp_path / "narrow.safetensors")
    save_file({WORD: row, "<other>": row.clone()}, tmp_path / "two.safetensors")
    refuse("must hold one embedding of one token", tmp_path / "two.safetensors")
    save_file({WORD: row.reshape(2, -1)}, tmp_path / "folded.safetensors")
    refuse("must hold one embedding of one token", tmp_path / "folded.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    refuse("is damaged", tmp_path / "cut.safetensors")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse("is a Git LFS pointer", tmp_path / "pointer.safetensors")
    save_file({WORD: torch.full_like(row, float("nan"))}, tmp_path / "nan.safetensors")
    refuse("whose numbers are not all finite", tmp_path / "nan.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"1234")
    refuse("only, but this is pickle.bin", tmp_path / "pickle.bin")
    with pytest.raises(TypeError, match="`load_textual_inversion` has no argument 'wieght_name'"):
        pipe.load_textual_inversion(folder, wieght_name="x")
    pipe.load_textual_inversion(folder)
    with pytest.raises(ValueError, match="Choose another"):
        pipe.load_textual_inversion(folder)


# Learning ------------------------------------------------------------------------------------------------------------


def test_a_learned_row_acts_like_a_row_of_the_table(tokenizer):
    model, plain = (make_coglm(**token_config(tokenizer)) for _ in range(2))
    size = model.config.vocab_size
    learned = learn_token(model, size, [50, 51])
    plain.resize_token_embeddings(size + 1, mean_resizing=False)
    with torch.no_grad():
        plain.word_embeddings.weight[size] = learned.rows[0]
    ids = make_image_tokens(2)
    ids[0, 3] = ids[1, 7] = size
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for full_vocabulary in (False, True):
        one, other = (m(ids, positions, full_vocabulary=full_vocabulary).logits for m in (model, plain))
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["word_embeddings.rows"]


@pytest.fixture
def run(coglm_folder, tokenizer_folder, tmp_path):  # noqa: F811
    captions = [{"en": [f"a {WORD} on a blue background."]} for _ in range(20)]
    data = write_token_folder(tmp_path / "data", captions=captions)

    def start(folder="run", **options):
        common = {
            "init_from": coglm_folder,
            "tokenizer": tokenizer_folder,
            "data": data,
            "output_dir": tmp_path / folder,
        }
        common |= {"new_token": WORD, "initializer": "a car", "batch_size": 4, "max_steps": 6, "warmup_steps": 0}
        common |= {"learning_rate": 0.05, "log_every_steps": 1}
        result = load_script("train_coglm").main(as_arguments({**common, **options}))
        return result, tmp_path / folder

    return start


def test_one_word_is_learned_on_frozen_weights(run, coglm_folder):  # noqa: F811
    model, folder = run()
    assert [path.name for path in (folder / "final").iterdir()] == [EMBEDDING_NAME]
    assert isinstance(model.word_embeddings, LearnedTokens)
    losses = [line["loss"] for line in metrics(folder)]
    assert losses[-1] < losses[0]
    before = CogLMModel.from_pretrained(coglm_folder, dtype=torch.float32).state_dict()
    after = {name.replace(".table.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    row = load_file(folder / "final" / EMBEDDING_NAME)[WORD]
    assert torch.equal(row, model.word_embeddings.rows[0])


def test_a_resumed_run_learns_the_same_word_and_an_adapter_may_be_learned_with_it(run, stop_after):  # noqa: F811
    _, whole = run("whole", lora_rank=2)
    stop_after(2)
    assert run("parts", lora_rank=2)[0] is None
    _, parts = run("parts", lora_rank=2, resume_from_checkpoint="latest")
    assert metrics(parts) == metrics(whole)
    names = sorted(path.name for path in (whole / "final").iterdir())
    assert names == [EMBEDDING_NAME, "pytorch_lora_weights.safetensors"]
    for name in names:
        one, other = load_file(whole / "final" / name), load_file(parts / "final" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((parts / "run.json").read_text())["state"] == "finished"


def test_a_word_must_be_new_and_the_model_trained(run):
    with pytest.raises(ValueError, match="`new_token` must be a new one, but the tokenizer has '<start_of_image>'"):
        run(new_token="<start_of_image>")
