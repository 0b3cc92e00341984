"""The losses of the image tokenizer."""

import pytest
import torch

from cogview_pipelines.training.losses import content_weights, reconstruction_loss


def test_flat_squares_weigh_less_and_the_mean_stays_one():
    target = torch.full((1, 3, 16, 16), 0.5)
    target[:, :, :8, :8] = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = content_weights(target, flat_weight=0.25)
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights[0, 0, 0, 0] / weights[0, 0, 15, 15]).item() == pytest.approx(4.0)


def test_reconstruction_loss_is_the_stated_mix():
    target = torch.zeros(1, 3, 4, 4)
    sample = torch.zeros(1, 3, 4, 4)
    sample[..., 2:] = 0.5  # a step between columns 1 and 2, in each of 4 rows
    assert reconstruction_loss(sample, target, 1.0, 0.0).item() == pytest.approx(0.25)
    assert reconstruction_loss(sample, target, 0.0, 2.0).item() == pytest.approx(0.25)
    assert reconstruction_loss(sample, target, 0.0, 0.0, edge_weight=1.0).item() == pytest.approx(0.5 * 4 / 16)
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 2.0
    assert reconstruction_loss(sample, target, 1.0, 1.0, pixel_weights=left).item() == 0.0
