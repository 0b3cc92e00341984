"""Attention maps: against what the model itself computes, and on drawings whose objects are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.demo import Scope, evaluation, load_concepts, slot_boxes
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.evaluation.attention_maps import read_attention, words_of
from cogview_pipelines.models.cogview import sequences as cogview
from cogview_pipelines.models.cogview2 import sequences as cogview2

from .. import utils, utils_cogview


def finished(family: str, length: int = 5):
    """A tiny model of a family, the whole sequence of a picture, and its layout."""
    if family == "cogview":
        model, layout = utils_cogview.make_cogview(), utils_cogview.make_layout()
        texts, tokens = utils_cogview.make_texts([length]), utils_cogview.make_image_tokens(1)
        return model, cogview.text_to_image(texts, layout, tokens), layout
    model = utils.make_coglm()
    layout = model.config.layout
    texts, tokens = utils.make_texts([length]), utils.make_image_tokens(1)
    return model, cogview2.text_to_image(texts, layout, tokens), layout


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize(("family", "bias"), [("cogview", 0.0), ("cogview2", 0.0), ("cogview2", 1.4)])
def test_shares_are_those_of_the_models_own_attention(monkeypatch, family, bias, relaxed):
    model, sequence, layout = finished(family)
    rows, columns = layout.image_grid
    start = sequence.input_ids.shape[1] - rows * columns
    places = sequence.text_mask[0].nonzero().flatten().tolist()
    words = [("first", places[:2]), ("second", places[2:3])]
    seen = []

    def attend(query, key, value, mask=None, dropout_p=0.0, is_causal=False):
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        seen.append((scores, weights))
        return weights @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.no_grad():
        model(sequence.input_ids, sequence.position_ids, sequence.attention_mask, sequence.text_mask, bias)
    monkeypatch.undo()
    if relaxed:
        for layer in model.layers:
            layer.attention.pb_relaxation_alpha = 32.0
    maps = read_attention(model, sequence, (rows, columns), words, text_attention_bias=bias)
    assert maps.words == ["first", "second"]
    assert torch.equal(maps.tokens.flatten(), sequence.input_ids[0, start:])
    for layer, (scores, weights) in enumerate(seen):
        writing = weights[0, :, start - 1 : -1]
        for word, (_, own) in enumerate(words):
            expected = writing[:, :, own].sum(-1).unflatten(-1, (rows, columns))
            torch.testing.assert_close(maps.maps[layer, :, word], expected, rtol=1e-4, atol=1e-6)
        offsets = torch.zeros(len(writing), 2 * rows - 1, 2 * columns - 1)
        for at in range(rows * columns):
            for to in range(rows * columns):
                down, across = to // columns - at // columns, to % columns - at % columns
                offsets[:, down + rows - 1, across + columns - 1] += writing[:, at, start + to] / (rows * columns)
        torch.testing.assert_close(maps.offsets[layer], offsets, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps.cells[layer], cells_of(writing[:, :, start:], columns), rtol=1e-3, atol=1e-5)
        allowed = sequence.attention_mask[0]
        expected = torch.stack([head[allowed].std(correction=0) for head in scores[0]])
        torch.testing.assert_close(maps.score_scales[layer], expected, rtol=1e-4, atol=1e-6)


def cells_of(shares, columns):
    """What each cell got of the later ones, over what cells so far away get on average: written out pair by pair."""
    num_heads, num_cells, _ = shares.shape
    pairs = [(at, to) for at in range(num_cells) for to in range(at)]
    by_distance = {}
    for at, to in pairs:
        by_distance.setdefault((at // columns - to // columns, at % columns - to % columns), []).append((at, to))
    usual = torch.zeros_like(shares)
    for own in by_distance.values():
        mean = sum(shares[:, at, to] for at, to in own) / len(own)
        for at, to in own:
            usual[:, at, to] = mean
    later = torch.ones(num_cells, num_cells).tril(-1)
    cells = (shares * later).sum(1) / usual.sum(1)
    cells[:, -1] = 0  # nothing is written after it
    return cells.view(num_heads, -1, columns)


def test_the_most_attended_cells_belong_to_the_word_that_was_looked_at_there():
    model, sequence, layout = finished("cogview2")
    places = sequence.text_mask[0].nonzero().flatten().tolist()
    maps = read_attention(model, sequence, layout.image_grid, [("a", places[:1]), ("b", places[1:])])
    rows, columns = layout.image_grid
    for head in (None, (1, 0)):
        attended = maps.cells.mean((0, 1)) if head is None else maps.cells[head]
        segments = maps.segments(head, 0.25)
        least = attended.flatten().sort(descending=True).values[rows * columns // 4 - 1]
        assert torch.equal(segments >= 0, attended >= least)
        belongs = (maps.word_map("b", head) > maps.word_map("a", head)).long()
        assert torch.equal(segments[segments >= 0], belongs[segments >= 0])
    assert set(maps.segments(share=1.0).flatten().tolist()) == {0, 1} and (maps.segments(share=0.0) == -1).all()
    with pytest.raises(ValueError, match="`share` must be from 0 to 1, but is 2"):
        maps.segments(share=2)


def test_nothing_stays_on_the_model():
    model, sequence, layout = finished("cogview2")
    read_attention(model, sequence, layout.image_grid, [])
    assert not any(layer.attention._forward_pre_hooks for layer in model.layers)


def test_maps_of_a_word_are_by_index_or_by_name():
    model, sequence, layout = finished("cogview2")
    places = sequence.text_mask[0].nonzero().flatten().tolist()
    maps = read_attention(model, sequence, layout.image_grid, [("a", places[:1]), ("b", places[1:])])
    assert torch.equal(maps.word_map("b"), maps.word_map(1))
    assert maps.word_map("b", (1, 0)).sum() == pytest.approx(1)
    torch.testing.assert_close(maps.word_map(0, (1, 0)), maps.maps[1, 0, 0] / maps.maps[1, 0, 0].sum())
    with pytest.raises(ValueError, match=r"must be one of \['a', 'b'\], but is 'c'"):
        maps.word_map("c")


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["▁a", "▁ti", "ger", "▁", "cat"], [("a", [0]), ("tiger", [1, 2]), ("cat", [3, 4])]),
        (["▁", "一只", "老虎", "，", "蓝"], [("一只", [0, 1]), ("老虎", [2]), ("，", [3]), ("蓝", [4])]),
        (["▁a", "▁star", ",", "▁red"], [("a", [0]), ("star", [1]), (",", [2]), ("red", [3])]),
        (["▁ok", "老虎", "x", "y"], [("ok", [0]), ("老虎", [1]), ("xy", [2, 3])]),
        ([], []),
    ],
)
def test_pieces_are_put_together_to_words(pieces, words):
    assert words_of(pieces) == words


def test_a_piece_that_was_added_is_a_word_of_its_own():
    pieces = ["▁a", "<my-cat>", "s", "▁on", "<my-cat>", "."]
    expected = [("a", [0]), ("<my-cat>", [1]), ("s", [2]), ("on", [3]), ("<my-cat>", [4]), (".", [5])]
    assert words_of(pieces, ["<my-cat>"]) == expected


@pytest.mark.parametrize(("layout", "at_least"), [("single", 0.8), ("pair", 0.5)])
def test_on_drawings_a_word_is_looked_at_where_its_object_is(layout, at_least):
    pipe = CogView2Pipeline.from_pretrained(SHIPPED_MODEL)
    rows, columns = pipe.layout.image_grid
    row, column = ((torch.arange(count) + 0.5) / count for count in (rows, columns))
    cases = evaluation.choose_cases(Scope.load(SHIPPED_MODEL), "train", "en", 100, 1, layout)
    rate = pipe.config.compression_rate
    pixels = evaluation.true_pictures(pipe, [case.scene for case in cases], rows * rate)
    with torch.no_grad():
        tokens = pipe.vqvae.encode(pixels, rate).tokens
    shares = []
    for case, picture in zip(cases, tokens, strict=True):
        maps = pipe.attention_maps(case.caption, tokens=picture)
        for hexcode, (left, top, side) in zip(case.scene.objects, slot_boxes(case.scene, 1), strict=True):
            word = maps.words.index(load_concepts()[hexcode].noun.split()[-1])
            inside = ((row > top) & (row < top + side))[:, None] & ((column > left) & (column < left + side))
            own = maps.maps[:, :, word]
            shares.append((own * inside).sum((-1, -2)) / own.sum((-1, -2)))
    # the head is chosen by half of the objects, and judged by the others
    half = len(shares) // 2
    head = torch.stack(shares[:half]).mean(0).flatten().argmax()
    assert torch.stack(shares[half:]).mean(0).flatten()[head] >= at_least


@pytest.mark.parametrize("text", ["a tiger, blue background", "蓝色背景，老虎在左，蘑菇在右"])
def test_the_tokens_are_those_of_an_ordinary_call(text):
    pipe = CogView2Pipeline.from_pretrained(SHIPPED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    height, width = pipe.sizes[0]
    maps = pipe.attention_maps(text, generator=torch.Generator().manual_seed(3), style="painted")
    expected = pipe(text, height=height, width=width, generator=torch.Generator().manual_seed(3), style="painted")
    assert torch.equal(maps.tokens, expected.tokens[0])
    assert maps.image.tobytes() == expected.images[0].tobytes()
    config = pipe.transformer.config
    grid = pipe.layout.image_grid
    assert maps.maps.shape == (config.num_hidden_layers, config.num_attention_heads, len(maps.words), *grid)
    letters = [letter for letter in text if letter.isalpha()]
    assert [letter for letter in "".join(maps.words) if letter.isalpha()][: len(letters)] == letters


def test_bad_arguments_are_named():
    pipe = CogView2Pipeline.from_pretrained(SHIPPED_MODEL)
    with pytest.raises(ValueError, match="`prompt` must be one text, but there are 2"):
        pipe.attention_maps(["a", "b"])
    with pytest.raises(ValueError, match=r"`tokens` must have the shape \(10, 10\), but have \(3, 3\)"):
        pipe.attention_maps("a tiger", tokens=torch.zeros(3, 3, dtype=torch.long))
