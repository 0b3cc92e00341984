"""Learned words: trained on frozen weights, loaded into all stages, saved; and words that users add themselves."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2Pipeline,
    CogViewCaptionPipeline,
    CogViewModel,
    CogViewPipeline,
    CogViewTokenizer,
    CogViewUpscalePipeline,
    IcetkTokenizer,
)
from cogview_pipelines.loaders.textual_inversion import EMBEDDING_NAME, write_learned_token
from cogview_pipelines.models.learned_tokens import LearnedTokens, learn_token

from ..pipelines.conftest import build, build_cogview
from ..training_scripts.conftest import (  # noqa: F401 - fixtures
    as_arguments,
    coglm_folder,
    cogview_tokenizer_folder,
    fresh_accelerate_state,
    load_script,
    metrics,
    stop_after,
    tokenizer_folder,
    write_cogview_token_folder,
    write_token_folder,
)
from ..utils import make_coglm, make_image_tokens, make_tokenizer, token_config
from ..utils_cogview import make_cogview, make_cogview_tokenizer, make_cogview_vq

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
    learned = learn_token(model, size, tokenizer, "a car")
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
def cogview_folder(tmp_path_factory):
    """A tiny CogView, saved as the shipped one is: in float16."""
    folder = tmp_path_factory.mktemp("saved_cogview") / "transformer"
    make_cogview().half().save_pretrained(folder)
    return folder


@pytest.fixture(params=["train_coglm", "train_cogview"])
def trained(request):
    """A script that learns words, and the folders of the model and of the tokenizer that it goes on from."""
    names = {
        "train_coglm": ("coglm_folder", "tokenizer_folder"),
        "train_cogview": ("cogview_folder", "cogview_tokenizer_folder"),
    }[request.param]
    return request.param, *map(request.getfixturevalue, names)


@pytest.fixture
def run(trained, tmp_path):
    script, model, tokenizer = trained
    captions = [{"en": [f"a {WORD} on a blue background."]} for _ in range(20)]
    write = write_token_folder if script == "train_coglm" else write_cogview_token_folder
    data = write(tmp_path / "data", captions=captions)

    def start(folder="run", **options):
        common = {"init_from": model, "tokenizer": tokenizer, "data": data, "output_dir": tmp_path / folder}
        common |= {"new_token": WORD, "initializer": "a car", "batch_size": 4, "max_steps": 6, "warmup_steps": 0}
        common |= {"learning_rate": 0.05, "log_every_steps": 1}
        options = {name: value for name, value in {**common, **options}.items() if value is not None}
        return load_script(script).main(as_arguments(options)), tmp_path / folder

    return start


def test_one_word_is_learned_on_frozen_weights(run, trained):
    model, folder = run()
    assert [path.name for path in (folder / "final").iterdir()] == [EMBEDDING_NAME]
    assert isinstance(model.word_embeddings, LearnedTokens)
    losses = [line["loss"] for line in metrics(folder)]
    assert losses[-1] < losses[0]
    before = type(model).from_pretrained(trained[1], dtype=torch.float32).state_dict()
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


def test_a_word_must_be_new_stand_in_captions_and_begin_with_what_is_known(run, trained, tmp_path):
    script, _, tokenizer = trained
    old = "▁a"  # a piece of both tokenizers
    for message, options in (
        (f"`new_token` must be a new one, but the tokenizer has '{old}'", {"new_token": old}),
        (
            "`new_token` must be a word of the captions in `data`, but none of them has '<other>'",
            {"new_token": "<other>"},
        ),
        ("`new_token` is learned by a trained model. Name it by `init_from`.", {"init_from": None}),
        (
            "`initializer` must be words that the model knows, but is 'a ☃', of which it does not know ☃.",
            {"initializer": "a ☃"},
        ),
        ("`initializer` is what a new word begins with, but there is none, and it is 'a car'.", {"new_token": None}),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(**options)
    kind = IcetkTokenizer if script == "train_coglm" else CogViewTokenizer
    kind.from_pretrained(tokenizer, known_words=["a", "blue", "background", "on"]).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"`initializer` must be words that the model knows, .* does not know car"):
        run(tokenizer=tmp_path / "words")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["caption", "super_resolution"])
def test_a_word_is_learned_by_the_model_that_draws(
    cogview_folder,
    cogview_tokenizer_folder,  # noqa: F811
    tmp_path,
    task,
):
    """Others read, in its place, what it began with."""
    options = {"init_from": cogview_folder, "tokenizer": cogview_tokenizer_folder, "data": tmp_path}
    options |= {"output_dir": tmp_path / "run", "new_token": WORD, f"{task}_probability": 1.0}
    message = f"`{task}_probability` is 1, so that a `{task}_transformer` is trained. Lower it"
    with pytest.raises(ValueError, match=message):
        load_script("train_cogview").main(as_arguments(options))


def test_a_word_without_an_initializer_begins_as_the_mean_of_all_pieces(cogview):
    model, tokenizer = cogview.transformer, cogview.tokenizer
    pieces = model.word_embeddings.weight[tokenizer.num_image_tokens : tokenizer.command_token_id]
    assert torch.allclose(learn_token(model, len(tokenizer), tokenizer, "").rows[0], pieces.mean(0), atol=1e-6)


def test_a_row_has_its_whole_gradient_where_those_of_the_table_are_shrunk(tokenizer):
    """Else it would learn how it is written rather than what it means."""
    gradients = []
    for scale in (1.0, 0.1):
        model = make_coglm(**token_config(tokenizer), embedding_gradient_scale=scale)
        size = model.config.vocab_size
        learned = learn_token(model, size, tokenizer, "car")
        ids = make_image_tokens(1)
        ids[0, 3] = size
        model(ids, torch.arange(ids.shape[1])[None]).logits.logsumexp(-1).sum().backward()
        gradients.append(learned.rows.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_a_word_that_a_cogview_learned_is_read_by_all_that_read_texts(
    cogview_folder,
    cogview_tokenizer_folder,  # noqa: F811
    tmp_path,
):
    """As with the shipped model, one transformer draws, describes and chooses."""
    folder = write_cogview_token_folder(tmp_path / "data", captions=[{"en": f"a {WORD}"}] * 20)
    options = {"init_from": cogview_folder, "tokenizer": cogview_tokenizer_folder, "data": folder, "new_token": WORD}
    options |= {"initializer": "car", "max_steps": 2, "warmup_steps": 0, "learning_rate": 0.5, "batch_size": 2}
    options |= {"caption_probability": 0.5, "output_dir": tmp_path / "run"}
    load_script("train_cogview").main(as_arguments(options))
    tokenizer = CogViewTokenizer.from_pretrained(cogview_tokenizer_folder, known_words=["a", "car"])
    tokenizer.save_pretrained(tmp_path / "words")
    tokenizer = CogViewTokenizer.from_pretrained(tmp_path / "words")
    pipe = CogViewPipeline(tokenizer, make_cogview_vq(), CogViewModel.from_pretrained(cogview_folder))
    pipe.set_progress_bar_config(disable=True)

    def results(pipe, prompt):
        generator = torch.Generator().manual_seed(1)
        chosen = pipe(prompt, num_candidates=3, generator=generator, output_type="latent")
        captioner = CogViewCaptionPipeline.from_pipe(pipe)
        loss = captioner.caption_loss(None, prompt, tokens=torch.arange(16).view(1, 4, 4)).tolist()
        return chosen.tokens.tolist(), chosen.scores, loss

    assert tokenizer.unknown_parts(f"a {WORD}") == [WORD] and tokenizer.known_text(f"a {WORD}") == "a"
    pipe.load_textual_inversion(tmp_path / "run/final")
    assert tokenizer.unknown_parts(f"a {WORD}") == [] and tokenizer.known_text(f"a {WORD}") == f"a {WORD}"
    expected = results(pipe, f"a {WORD}")
    for one, other in zip(expected, results(pipe, "a car")):
        assert one != other
    pipe.save_pretrained(tmp_path / "model")
    loaded = CogViewPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert results(loaded, f"a {WORD}") == expected
    assert loaded.tokenizer.unknown_parts(f"a {WORD} truck") == ["truck"]


@pytest.mark.parametrize("family", ["pipe", "cogview"])
def test_attention_maps_have_a_learned_word_by_itself(request, learned, family):
    pipe = request.getfixturevalue(family)
    pipe.load_textual_inversion(learned[0])
    maps = pipe.attention_maps(f"a {WORD} on", generator=torch.Generator().manual_seed(3))
    assert maps.words == ["a", WORD, "on"]
