"""Several positions at once: the same tokens as one by one, in fewer passes of the model."""

import pytest
import torch

from cogview_pipelines.generation.decoders import Decoder, Decoding, FusedDecoder
from cogview_pipelines.generation.parallel import Budget, ParallelLoop, Window
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview import sequences as cogview_sequences
from cogview_pipelines.models.cogview2.sequences import completion, text_to_image
from cogview_pipelines.ops import native

from .. import utils_cogview
from ..utils import IMAGE_GRID, make_coglm, make_image_tokens, make_texts
from .utils import HOLES, LENGTH, MIXED_LENGTHS, cluster_sampler, generators, write_guided, write_images

WINDOWS = [2, 3, LENGTH - 1, LENGTH, 4 * LENGTH]
ONE_BY_ONE = Decoding(fused=False, parallel=1)


def predictable_coglm():
    """A CogLM whose next token hardly depends on what it reads: its tokens are easy to guess."""
    model = make_coglm()
    with torch.no_grad():
        for embeddings in (model.word_embeddings, model.position_embeddings):
            embeddings.weight.mul_(0.01)
        model.final_layernorm.bias.mul_(100)
    return model


def count_passes(write, **options):
    """The result of a call, and how often the model read new tokens."""
    passes = []
    return write(on_pass=lambda: passes.append(1), **options), len(passes)


@pytest.mark.parametrize("size", WINDOWS)
@pytest.mark.parametrize("make_model", [make_coglm, predictable_coglm])
def test_tokens_are_those_of_one_by_one_in_no_more_passes(make_model, size):
    model, texts = make_model(), make_texts(MIXED_LENGTHS)

    def write(**options):
        return write_images(model, texts, generator=generators(1, 2, 3, 4), **options)

    expected, most = count_passes(write, decoding=ONE_BY_ONE)
    assert most == LENGTH - 1
    tokens, passes = count_passes(write, decoding=Decoding(parallel=size))
    assert torch.equal(tokens, expected)
    assert passes <= most


@pytest.mark.skipif(native.library() is None, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [2, 5, LENGTH])
def test_in_one_kernel_tokens_are_those_of_one_by_one_in_16_bits_too(size, dtype):
    model, texts = make_coglm().to(dtype), make_texts(MIXED_LENGTHS)

    def write(parallel):
        decoding = Decoding(parallel=parallel)
        assert isinstance(decoding.decoder(model, 4, 9, False, torch.device("cpu")), FusedDecoder)
        return write_images(model, texts, generator=generators(1, 2, 3, 4), decoding=decoding)

    assert torch.equal(write(size), write(1))


@pytest.mark.parametrize("size", WINDOWS)
def test_guided_tokens_are_those_of_one_by_one(size):
    model, texts = make_coglm(), make_texts([3, 5])
    for scale in (0.0, 2.5):
        expected = write_guided(model, texts, scale, generator=generators(1, 2), decoding=ONE_BY_ONE)
        tokens = write_guided(model, texts, scale, generator=generators(1, 2), decoding=Decoding(parallel=size))
        assert torch.equal(tokens, expected)


def test_several_images_of_a_prompt_and_all_words_are_those_of_one_by_one():
    model, texts = make_coglm(), make_texts([4, 0])
    arguments = (model, text_to_image(texts, model.config.layout), lambda logits, noise: logits.argmax(-1))
    arguments += (torch.full((5, LENGTH), TO_GENERATE), model.config.layout.image_positions)
    options = {"num_images_per_context": [2, 3], "full_vocabulary": True}
    expected = generate(*arguments, **options, decoding=ONE_BY_ONE)
    assert expected.max() >= model.config.num_image_tokens  # or all words would not matter
    assert torch.equal(generate(*arguments, **options, decoding=Decoding(parallel=5)), expected)


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("size", [2, 5, LENGTH])
def test_completion_keeps_what_is_known_and_fills_holes_as_one_by_one_does(name, size):
    model, texts, image = make_coglm(), make_texts([3, 1]), make_image_tokens(2)
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    mask[tuple(zip(*HOLES[name]))] = True
    task = completion(texts, image, mask, model.config.layout)

    def complete(decoding):
        arguments = (model, task.context, cluster_sampler, task.entries, task.positions)
        return generate(*arguments, text_attention_bias=1.4, generator=generators(1, 2), decoding=decoding)

    tokens = complete(Decoding(parallel=size))
    assert torch.equal(tokens, complete(ONE_BY_ONE))
    known = task.entries != TO_GENERATE
    assert torch.equal(tokens[known], task.entries[known])


def test_what_is_predictable_takes_few_passes():
    model, texts = predictable_coglm(), make_texts(MIXED_LENGTHS)

    def greedy(logits, noise):
        return logits.argmax(-1)

    _, passes = count_passes(
        lambda **options: write_images(model, texts, greedy, **options), decoding=Decoding(parallel=8)
    )
    assert passes <= 2 + (LENGTH - 1) // 8


def test_guesses_come_from_the_row_above():
    """Of a picture whose rows are alike, the second row is guessed right before it was predicted."""
    model = make_coglm()
    loop = object.__new__(ParallelLoop)
    loop.window = Window(8, row_length=4)
    loop.rows, loop.is_wanted = torch.arange(2), torch.ones(LENGTH, dtype=torch.bool)
    loop.entries = torch.full((2, LENGTH), TO_GENERATE)
    loop.entries[0, :5] = torch.tensor([1, 2, 3, 4, 9])
    loop.entries[1, :2] = torch.tensor([7, 8])
    loop.num_predicted = torch.tensor([5, 2])
    loop._guess(11)
    assert loop.entries[0].tolist() == [1, 2, 3, 4, 9, 2, 3, 4, 9, 2, 3, 4, *[TO_GENERATE] * (LENGTH - 12)]
    # above the first row there is nothing: the last that was predicted
    assert loop.entries[1].tolist() == [7, 8, 8, 8, 7, 8, 8, 8, 7, 8, 8, 8, *[TO_GENERATE] * (LENGTH - 12)]
    assert model.config.image_grid[1] == 4


def record(reports):
    def callback(count, entries):
        reports.append((count, entries.clone()))

    return callback


@pytest.mark.parametrize("size", [1, 3, LENGTH])
def test_each_token_is_reported_once_in_order_with_nothing_after_it(size):
    model, texts, reports = predictable_coglm(), make_texts(MIXED_LENGTHS), []
    tokens = write_images(
        model, texts, generator=generators(1, 2, 3, 4), decoding=Decoding(parallel=size), callback=record(reports)
    )
    assert [count for count, _ in reports] == list(range(1, LENGTH + 1))
    for count, entries in reports:
        assert torch.equal(entries[:, :count], tokens[:, :count])
        assert (entries[:, count:] == TO_GENERATE).all()


@pytest.mark.parametrize("size", [2, 5, LENGTH])
def test_what_follows_changed_tokens_is_predicted_from_them(size):
    model, texts = predictable_coglm(), make_texts([3, 1])

    def write(decoding):
        def change(count, entries):
            if count not in (4, 9):
                return None
            changed = entries.clone()
            changed[1, count - 3 : count] = 5 + count  # the latest and two that have been read
            return changed

        return write_images(model, texts, generator=generators(1, 2), decoding=decoding, callback=change)

    expected = write(ONE_BY_ONE)
    assert expected[1, 1:4].tolist() == [9, 9, 9]
    assert torch.equal(write(Decoding(parallel=size)), expected)
    # and one by one it is what a context with these tokens gives
    start = text_to_image(texts, model.config.layout)
    entries = torch.full((2, LENGTH), TO_GENERATE)
    entries[:, :9] = expected[:, :9]
    again = generate(
        model, start, cluster_sampler, entries, model.config.layout.image_positions, text_attention_bias=1.4,
        generator=generators(1, 2), decoding=ONE_BY_ONE,
    )  # fmt: skip
    assert torch.equal(again, expected)


def test_logits_that_are_not_finite_are_an_error():
    model = make_coglm()
    model.word_embeddings.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write_images(model, make_texts([3]), decoding=Decoding(parallel=4))


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="`parallel` must be at least 1, but is 0"):
        Decoding(parallel=0)


def test_the_window_is_chosen_by_device_and_batch():
    model = make_coglm()
    assert [Decoding().num_parallel(model, count, "cpu") for count in (1, 2, 4, 8, 64)] == [32, 32, 16, 8, 8]
    assert Decoding().num_parallel(model, 64, "cuda") == 32
    assert Decoding(cuda_graph=True).num_parallel(model, 1, "cuda") == 32
    assert Decoding(parallel=7).num_parallel(model, 64, "cpu") == 7


def test_the_window_is_narrowed_on_a_cpu_alone_and_never_against_a_number_that_was_given():
    assert Decoding().fixed_cost("cpu") > 0 and Decoding().fixed_cost("cuda") is None
    assert Decoding(parallel=32).fixed_cost("cpu") is None and Decoding(compile=True).fixed_cost("cpu") is None


class Widths:
    """The widths of the windows that are read, of a decoder that reads as it always does."""

    def __init__(self, monkeypatch):
        self.widths, read = [], Decoder.append_all

        def append_all(decoder, input_ids, position_ids):
            self.widths.append(input_ids.shape[1])
            return read(decoder, input_ids, position_ids)

        monkeypatch.setattr(Decoder, "append_all", append_all)


def worst_guesses(logits, noise):
    """
    Tokens that follow from all before them, so that hardly a guess holds; not from the last bits of the logits, which
    differ from processor to processor.
    """
    return (1e2 * logits).sum(-1).long().remainder(logits.shape[-1])


def test_where_no_guess_holds_the_window_narrows_and_all_passes_take_hardly_longer_than_one_by_one(monkeypatch):
    """By default; with a number given it stays as wide. The tokens are the same."""
    model, texts, seen = make_coglm(), make_texts([3]), Widths(monkeypatch)
    expected = write_images(model, texts, worst_guesses, decoding=ONE_BY_ONE)
    seen.widths.clear()
    assert torch.equal(write_images(model, texts, worst_guesses, decoding=Decoding()), expected)
    narrowed = list(seen.widths)
    assert narrowed[0] > 2 and min(narrowed) <= 2 and narrowed == sorted(narrowed, reverse=True)
    seen.widths.clear()
    assert torch.equal(write_images(model, texts, worst_guesses, decoding=Decoding(parallel=8)), expected)
    assert seen.widths[: LENGTH // 2] == [8] * (LENGTH // 2)


@pytest.mark.parametrize("sequences", [1, 2, 6])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("hold_from", [0, 150, 400])
def test_a_budget_is_kept_whatever_settles_and_the_window_widens_again(sequences, size, hold_from):
    """Of 400 tokens, from one on all guesses hold, and before it none."""
    window = Window(size, fixed_cost=7.0)
    budget, settled, spent, widths = Budget(window, sequences), 0, 0.0, []
    while settled < 400:
        width = min(budget.width(sequences), 400 - settled)
        now = width if settled >= hold_from else 1
        budget.note(width, sequences, now)
        settled, spent = settled + now, spent + 7 + width * sequences
        widths.append(width)
    one_by_one, loan = 400 * (7 + sequences), 2 * (7 + size * sequences)
    assert spent <= 1.125 * one_by_one + loan
    assert hold_from == 400 or max(widths[-10:]) == size
    assert hold_from or widths[:-1] == [size] * (len(widths) - 1)


def write_cogview(decoding, **config):
    """A picture of a small CogView, and how many passes it took."""
    model, layout = utils_cogview.make_cogview(**config), utils_cogview.make_layout()
    context = cogview_sequences.text_to_image(utils_cogview.make_texts([5, 5]), layout)
    positions, passes = cogview_sequences.image_positions(context, layout.image_length)[0], []
    tokens = generate(
        model,
        context,
        lambda logits, noise: (logits + noise[..., :1]).argmax(-1),
        torch.full((2, layout.image_length), TO_GENERATE),
        positions,
        generator=generators(1, 2),
        decoding=decoding,
        row_length=layout.image_grid[1],
        on_pass=lambda: passes.append(1),
    )
    return tokens, len(passes)


@pytest.mark.parametrize("norm_scale", ["token", None])
@pytest.mark.parametrize("decoding", [{}, {"parallel": 2}, {"parallel": 7}, {"parallel": 99}], ids=str)
def test_cogview_writes_the_tokens_of_one_by_one_where_its_norms_look_at_tokens_alone(norm_scale, decoding):
    expected, most = write_cogview(ONE_BY_ONE, norm_scale=norm_scale)
    tokens, passes = write_cogview(Decoding(**decoding), norm_scale=norm_scale)
    assert torch.equal(tokens, expected) and most == len(expected[0]) - 1 and passes < most


@pytest.mark.parametrize("norm_scale", ["sequence", "tensor"])
def test_cogview_writes_one_by_one_where_its_norms_look_at_what_shares_a_pass_unless_told_otherwise(norm_scale):
    """The released norms: a window changes their numbers very slightly, so that it is for the user to ask for it."""
    expected, most = write_cogview(ONE_BY_ONE, norm_scale=norm_scale)
    tokens, passes = write_cogview(Decoding(), norm_scale=norm_scale)
    assert torch.equal(tokens, expected) and passes == most == len(expected[0]) - 1
    assert write_cogview(Decoding(parallel=7), norm_scale=norm_scale)[1] < most
