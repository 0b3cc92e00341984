"""An adversary of the image tokenizer: it learns to tell reconstructions from pictures; the decoder learns from it."""

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST_SIDE = 32  # of pictures that the adversary can judge, in pixels


class PatchDiscriminator(nn.Module):
    """
    Says for each patch of a picture how true it looks: `(batch_size, 1, rows, columns)`, above 0 for true.

    Args:
        channels (`int`, defaults to 64): Width of the first layer; each later one has twice as many, at most 8 times.
        num_layers (`int`, defaults to 3): Halvings.

    Source: PatchGAN (https://arxiv.org/abs/1611.07004), as in VQGAN (https://arxiv.org/abs/2012.09841); with group
    norms, which do not depend on the batch.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
        for index in range(1, num_layers + 1):
            wider, stride = channels * min(2**index, 8), 2 if index < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1), nn.GroupNorm(min(32, wider // 2), wider)]
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores of pictures in 0..1."""
        return self.layers(2 * pixel_values - 1)


class WithAdversary(nn.Module):
    """
    An image tokenizer and its adversary as one model, so that one optimizer, one checkpoint and one average hold both.

    Args:
        tokenizer (`PreTrainedModel`): The image tokenizer.
        discriminator ([`PatchDiscriminator`]): The adversary.
    """

    def __init__(self, tokenizer: nn.Module, discriminator: PatchDiscriminator):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, discriminator

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    def forward(self, pixel_values: torch.Tensor, compression_rate: int):
        """
        What the tokenizer returns; the decoder's loss, whose gradient spares the adversary; and the adversary's, whose
        gradient spares the decoder. Both are scalars.
        """
        output = self.tokenizer(pixel_values, compression_rate=compression_rate)
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        fooling = -torch.func.functional_call(self.discriminator, frozen, (output.sample.float(),)).mean()
        true, made = self.discriminator(pixel_values), self.discriminator(output.sample.detach().float())
        telling = 0.5 * (F.relu(1 - true).mean() + F.relu(1 + made).mean())  # the hinge loss
        return output, fooling, telling
