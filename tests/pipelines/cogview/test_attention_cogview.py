"""Attention maps of the first CogView; what they hold is tested in `tests/evaluation`."""

import torch


def test_cogview_has_them_too_and_draws_the_same_meanwhile(pipe):
    maps = pipe.attention_maps("a tiger", generator=torch.Generator().manual_seed(3))
    expected = pipe("a tiger", generator=torch.Generator().manual_seed(3))
    assert torch.equal(maps.tokens, expected.tokens[0])
    assert maps.maps.shape[2] == len(maps.words) and torch.isfinite(maps.score_scales).all()
