"""What the tests of the loops share."""

import functools

import torch

from cogview_pipelines.generation.sampling import sample_cluster_tokens
from cogview_pipelines.generation.tokens import TO_GENERATE, generate
from cogview_pipelines.models.cogview2.sequences import text_to_image

from ..utils import IMAGE_GRID, cluster_labels

LENGTH = IMAGE_GRID[0] * IMAGE_GRID[1]
MIXED_LENGTHS = [3, 0, 7, 1]
cluster_sampler = functools.partial(
    sample_cluster_tokens, cluster_labels=cluster_labels(), temperature=1.15, top_k_clusters=4, cluster_temperature=0.9
)
HOLES = {
    "one": [(1, 2)],
    "first_column": [(0, 0), (2, 0)],
    "row": [(3, 0), (3, 1), (3, 2), (3, 3)],
    "scattered": [(0, 1), (0, 3), (2, 2), (3, 3)],
    "all_but_the_last": [(row, column) for row in range(4) for column in range(4) if row + column < 6],
}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def write_images(model, texts, sampler=cluster_sampler, repeats=1, **arguments):
    """Text-to-image by `generate`, all entries unknown."""
    layout = model.config.layout
    count = len(texts) * repeats if isinstance(repeats, int) else sum(repeats)
    return generate(
        model,
        text_to_image(texts, layout),
        sampler,
        torch.full((count, LENGTH), TO_GENERATE),
        layout.image_positions,
        num_images_per_context=repeats,
        text_attention_bias=1.4,
        **arguments,
    )


def write_guided(model, texts, guidance_scale, sampler=cluster_sampler, repeats=1, **arguments):
    """Text-to-image away from the empty text."""
    layout = model.config.layout
    return generate(
        model,
        text_to_image([*texts, *([] for _ in texts)], layout),
        sampler,
        torch.full((len(texts) * repeats, LENGTH), TO_GENERATE),
        layout.image_positions,
        num_images_per_context=repeats,
        text_attention_bias=1.4,
        guidance_scale=guidance_scale,
        **arguments,
    )
