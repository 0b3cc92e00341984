"""How near reconstructed pictures are to the true ones: PSNR and SSIM."""

import torch
import torch.nn.functional as F

# Of SSIM: side and width of the Gaussian window in pixels, and what keeps quotients finite.
WINDOW, WIDTH, STABILISERS = 11, 1.5, (0.01**2, 0.03**2)


def psnr(sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of each picture, in dB; equal pictures have infinity.

    Args:
        sample, target (`torch.Tensor` of shape `(num_pictures, 3, height, width)`): RGB in 0..1.

    Returns:
        `torch.Tensor` of shape `(num_pictures,)`: float32.
    """
    error = (sample.float().clamp(0, 1) - target.float()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity of each picture, 1 where they are equal: the mean over pixels and colours.

    Only windows that lie inside of the picture count.

    Args:
        sample, target (`torch.Tensor` of shape `(num_pictures, 3, height, width)`): RGB in 0..1, sides of at least 11.

    Returns:
        `torch.Tensor` of shape `(num_pictures,)`: float32.

    Raises:
        ValueError: If the pictures are smaller than a window.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    if min(sample.shape[-2:]) < WINDOW:
        raise ValueError(f"`sample` must have sides of at least {WINDOW} pixels, but is {tuple(sample.shape)}.")
    sample, target = sample.float().clamp(0, 1), target.float()
    offsets = torch.arange(WINDOW, dtype=torch.float32, device=sample.device) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * WIDTH**2))
    line = (line / line.sum()).expand(sample.shape[1], 1, 1, -1)

    def blur(pictures: torch.Tensor) -> torch.Tensor:
        pictures = F.conv2d(pictures, line, groups=pictures.shape[1])
        return F.conv2d(pictures, line.transpose(2, 3), groups=pictures.shape[1])

    means = blur(sample), blur(target)
    variances = blur(sample.square()) - means[0].square(), blur(target.square()) - means[1].square()
    covariance = blur(sample * target) - means[0] * means[1]
    first, second = STABILISERS
    luminance = (2 * means[0] * means[1] + first) / (means[0].square() + means[1].square() + first)
    structure = (2 * covariance + second) / (variances[0] + variances[1] + second)
    return (luminance * structure).flatten(1).mean(1)
