"""PSNR and SSIM: their definitions written out, and what must hold."""

import math

import pytest
import torch

from cogview_pipelines.evaluation.reconstruction import psnr, ssim


def pictures(seed=0, side=24):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_by_its_definition():
    target = pictures()
    sample = (target + 0.1).clamp(0, 1)
    for index, value in enumerate(psnr(sample, target).tolist()):
        mean = float((sample[index] - target[index]).square().mean())
        assert value == pytest.approx(-10 * math.log10(mean), rel=1e-5)
    assert psnr(target, target).tolist() == [math.inf, math.inf]
    assert torch.allclose(psnr(target + 2, target), psnr(torch.ones_like(target), target))  # pixels end at 1


def test_ssim_of_one_window_is_by_its_definition():
    """A picture of 11 x 11 pixels has one window: weighted means, variances and covariance, colour by colour."""
    target, sample = pictures(0, 11)[:1], pictures(1, 11)[:1]
    offsets = torch.arange(11.0) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    values = []
    for one, other in zip(sample[0].double(), target[0].double()):
        weights = window.double()
        mean, mean_other = (weights * one).sum(), (weights * other).sum()
        variance = (weights * one.square()).sum() - mean**2
        variance_other = (weights * other.square()).sum() - mean_other**2
        covariance = (weights * one * other).sum() - mean * mean_other
        values.append(
            (2 * mean * mean_other + 1e-4)
            * (2 * covariance + 9e-4)
            / ((mean**2 + mean_other**2 + 1e-4) * (variance + variance_other + 9e-4))
        )
    assert float(ssim(sample, target)[0]) == pytest.approx(float(sum(values) / 3), rel=1e-4)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    target = pictures()
    assert torch.allclose(ssim(target, target), torch.ones(2), atol=1e-5)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
    falling = [float(ssim(target + scale * noise, target).mean()) for scale in (0.02, 0.1, 0.4)]
    assert 1 > falling[0] > falling[1] > falling[2]
    with pytest.raises(ValueError, match="sides of at least 11 pixels"):
        ssim(target[..., :8], target[..., :8])
