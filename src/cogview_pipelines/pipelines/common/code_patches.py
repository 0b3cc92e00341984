"""A small patch of pixels for each code of an image tokenizer: previews that need no decoder."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

SIDE = 4  # pixels of a patch at most: enough to see what it will be
CELL = 3  # tokens along the sides of the square in which a code is decoded, with itself around it
CELLS = 7  # along the sides of a canvas: with other codes beside it, as in a picture, which norms over a picture need


@torch.no_grad()
def code_patches(vqvae: PreTrainedModel, compression_rate: int, device: torch.device) -> torch.Tensor:
    """
    What each code looks like amid its like; made once from the decoder, and again when its codes change.

    Args:
        vqvae (`PreTrainedModel`): An image tokenizer with `decode`.
        compression_rate (`int`): Pixels per token along each side.
        device (`torch.device`): Where to compute.

    Returns:
        `torch.Tensor` of shape `(num_codes, 3, side, side)`: float32 in [0, 1], on the CPU. The side is 4 pixels, or
        `compression_rate` if that is less.
    """
    codes = vqvae.quantize.embed.weight
    key = (compression_rate, codes.data_ptr(), codes._version)
    known = getattr(vqvae, "_code_patches", None)
    if known is None or known[0] != key:
        known = vqvae._code_patches = (key, _make(vqvae, compression_rate, device))
    return known[1]


def _make(vqvae: PreTrainedModel, rate: int, device: torch.device) -> torch.Tensor:
    count = vqvae.config.num_embeddings
    numbers = torch.arange(-(-count // CELLS**2) * CELLS**2) % count
    patches = []
    for cells in numbers.view(-1, CELLS, CELLS):
        tokens = cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[None]
        pixels = vqvae.decode(tokens.to(device), rate).sample.float().clamp(0, 1)
        side = CELL * rate
        squares = pixels[0].unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
        middle = slice(CELL // 2 * rate, (CELL // 2 + 1) * rate)
        patches.append(F.adaptive_avg_pool2d(squares[..., middle, middle], min(SIDE, rate)).cpu())
    return torch.cat(patches)[:count]
