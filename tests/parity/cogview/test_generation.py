"""Greedy tokens with a cache, without one, captions, super-resolution and all nine windows against the original."""

import torch

from cogview_pipelines.generation.sampling import keep_top_p, token_probabilities
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview.sequences import (
    caption,
    fine_positions,
    image_positions,
    sliding_windows,
    super_resolution,
    text_to_image,
    unwritten,
    window_entries,
    window_rounds,
)

from ..comparing import CLEAR_MARGIN, assert_close, assert_same, assert_same_decisions, longs
from .test_model import split


def greedy(logits, noise):
    return logits.argmax(-1)


def fill_in(model, context, num_entries, positions=None, **options):
    entries = torch.full((len(context), num_entries), TO_GENERATE)
    positions = image_positions(context, num_entries) if positions is None else positions[:num_entries]
    sampler = options.pop("sampler", greedy)
    return generate(model, context, sampler, entries, positions, **options).cpu()


def assert_same_until_unclear(ours, theirs, margin):
    """Equal up to the first decision that is unclear: after it, a sequence of its own would be as right."""
    unclear = (torch.from_numpy(margin) <= CLEAR_MARGIN).nonzero()
    stop = int(unclear[0]) if len(unclear) else len(margin)
    assert stop > len(margin) // 2
    assert_same(ours[:stop], theirs[:stop])


@torch.no_grad()
def without_cache(model, ids, positions, first, full_vocabulary=False):
    logits = model(ids.to(model.device), positions.to(model.device), full_vocabulary=full_vocabulary).logits
    return logits[0, first - 1 : -1].cpu()


def test_greedy_pictures_are_the_originals_with_and_without_a_cache(transformer, arrays):
    data, layout = arrays("t2i"), transformer.config.layout
    text, _ = split(data["query_ids"], layout)
    context = text_to_image([text], layout)
    first = context.input_ids.shape[1]
    theirs = longs(data["greedy_tokens"])
    ours = fill_in(transformer, context, layout.image_length)[0]
    assert_same_until_unclear(ours, theirs[first:], data["greedy_margin"])
    positions = torch.cat([context.position_ids, image_positions(context, layout.image_length)], 1)
    assert_same(positions[0, :-1], data["fed_positions"])
    logits = without_cache(transformer, theirs[None], positions, first)
    assert_same_decisions(logits.argmax(-1), data["greedy_argmax"], data["greedy_margin"])


def test_several_pictures_of_a_query_share_the_prompt_and_differ(transformer, arrays):
    data, layout = arrays("t2i"), transformer.config.layout
    num_pictures = -int(data["batch_query"].min())
    given = data["batch_query"][data["batch_query"] >= 0]
    text, _ = split(given, layout)
    context = text_to_image([text], layout)
    assert_same(context.input_ids[0], given)
    assert_same(context.input_ids.expand(num_pictures, -1), data["batch_sampled"][:, : len(given)])
    assert len(torch.from_numpy(data["batch_sampled"]).unique(dim=0)) == num_pictures
    assert data["batch_sampled"][:, len(given) :].max() < layout.num_image_tokens


def test_greedy_super_resolution_is_the_originals(transformer, arrays):
    data, layout = arrays("super_resolution"), transformer.config.layout
    text, coarse = split(data["query_ids"], layout)
    context = super_resolution([text], coarse, layout)
    first = context.input_ids.shape[1]
    count = len(data["greedy_margin"])
    theirs = longs(data["greedy_tokens"])
    ours = fill_in(transformer, context, count, fine_positions(layout))[0]
    assert_same_until_unclear(ours, theirs[first:], data["greedy_margin"])
    positions = torch.cat([context.position_ids[0], fine_positions(layout)[:count]])[None]
    assert_same(positions[0, :-1], data["fed_positions"])
    logits = without_cache(transformer, theirs[None], positions, first)
    assert_same_decisions(logits.argmax(-1), data["greedy_argmax"], data["greedy_margin"])


def test_greedy_captions_are_the_originals(transformer, arrays):
    data, layout = arrays("caption"), transformer.config.layout
    _, codes = split(data["query_ids"], layout)
    context = caption(codes, layout)
    first = context.input_ids.shape[1]
    assert_same(context.input_ids[0], data["query_ids"][:first])

    def only_text(logits, noise):
        return logits[:, layout.num_image_tokens : layout.command_token_id].argmax(-1) + layout.num_image_tokens

    count = len(data["greedy_margin"])
    ours = fill_in(transformer, context, count, full_vocabulary=True, sampler=only_text)[0]
    assert_same_until_unclear(ours, data["greedy_tokens"][first:], data["greedy_margin"])


def test_windows_and_what_each_writes_are_the_originals(transformer, arrays):
    data, layout = arrays("magnify"), transformer.config.layout
    windows = sliding_windows(layout)
    assert_same([[one.row, one.column, one.num_rows] for one in windows], data["windows"])
    fine, result = unwritten(1, layout), longs(data["result"])[None]
    order, owner = torch.full((2, *fine.shape[1:]), -1)
    text, _ = split(data["prefix"], layout)
    coarse, step = longs(data["coarse"])[None], 0
    for index, window in enumerate(windows):
        rows, columns = window.fine(layout)
        context = super_resolution([text], coarse[(slice(None), *window.coarse(layout))].flatten(1), layout)
        entries = window_entries(fine, window, layout)
        new = fine[0, rows, columns] == -1
        assert int(new.sum()) == data["new_cells"][index]
        order[rows, columns][new] = step + torch.arange(int(new.sum()))
        owner[rows, columns][new] = index
        step += int(new.sum())
        name = f"window{index}"
        if f"{name}_sequence" in data:
            assert_same(torch.cat([context.input_ids, entries], 1)[0], data[f"{name}_sequence"])
            positions = torch.cat([context.position_ids[0], fine_positions(layout)[: entries.shape[1]]])
            assert_same(positions[:-1], data[f"{name}_fed_positions"])
        fine[:, rows, columns] = result[:, rows, columns]
        if f"{name}_result" in data:
            whole = torch.cat([context.input_ids, window_entries(fine, window, layout)], 1)
            assert_same(whole[0], data[f"{name}_result"])
    assert_same(order, data["order"])
    assert_same(owner, data["window_of_cell"])


def test_all_nine_windows_are_written_as_by_the_original(transformer, arrays):
    """Each from the original's tokens before it, those of one round side by side; no clear decision differs."""
    data, layout = arrays("magnify"), transformer.config.layout
    windows, result = sliding_windows(layout), longs(data["result"])[None]
    owner, margin = torch.from_numpy(data["window_of_cell"]), torch.from_numpy(data["margin"])
    text, _ = split(data["prefix"], layout)
    coarse, num_unclear = longs(data["coarse"])[None], 0
    for indices in window_rounds(layout):
        contexts, entries = [], []
        for index in indices:
            known = torch.where(owner < index, result, -1)
            contexts.append(coarse[(slice(None), *windows[index].coarse(layout))].flatten(1))
            entries.append(window_entries(known, windows[index], layout))
        context = super_resolution([text] * len(indices), torch.cat(contexts), layout)
        positions = fine_positions(layout)[: entries[0].shape[1]]
        written = generate(transformer, context, greedy, torch.cat(entries), positions).cpu()
        for row, index in enumerate(indices):
            rows, columns = windows[index].fine(layout)
            own = (owner == index)[rows, columns].flatten()
            unclear = ((margin <= CLEAR_MARGIN)[rows, columns].flatten() & own).nonzero()
            # after an unclear decision, another sequence would be as right
            stop = int(unclear[0]) if len(unclear) else len(own)
            num_unclear += len(own) - stop
            assert_same(written[row, :stop], window_entries(result, windows[index], layout)[0, :stop])
    assert num_unclear < owner.numel() // 2


def test_distributions_of_every_setting_are_the_originals(arrays):
    data = {key: torch.from_numpy(value) for key, value in arrays("sampling").items()}
    names = [name for name in data if name.startswith("probs_")]
    assert names
    for name in names:
        temperature, top_k, top_p = (float(part[1:]) for part in name.removeprefix("probs_").split("_"))
        logits = data["logits"] / temperature
        ours = token_probabilities(logits, 1.0, int(top_k) or None, top_p or None)
        assert_close(ours, data[name], 1e-5, name)
    tied = data["logits"][-1]
    assert_same(keep_top_p(tied[None], 1e-9).isfinite().sum(), 1)
