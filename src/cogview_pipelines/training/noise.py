"""Image tokens that are read wrong, so that a model leans on its text, and bears errors of what it reads."""

import torch


def exchange_tokens(
    tokens: torch.Tensor, probability: float, num_image_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Tokens of which some are others, drawn at random.

    Args:
        tokens (`torch.Tensor`): Image tokens, of any shape; they stay as they are.
        probability (`float`): Share of tokens that are exchanged.
        num_image_tokens (`int`): Tokens to draw from.
        generator (`torch.Generator`): Draws which, and the others.
    """
    wrong = torch.rand(tokens.shape, generator=generator) < probability
    return torch.where(wrong, torch.randint(num_image_tokens, tokens.shape, generator=generator), tokens)
