"""Scores of pictures by a model that embeds both pictures and texts."""

import pytest
from PIL import Image

from cogview_pipelines.evaluation.embedding_scores import EmbeddingScorer


def test_clip_reads_what_it_can_of_a_long_text_and_wants_a_text_for_each_picture(clip):
    scorer = EmbeddingScorer(*clip)
    image = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 20).convert("RGB")
    assert len(scorer([image] * 2, ["a cat", "a very long story of cats"])) == 2
    with pytest.raises(ValueError, match="`prompts` must be one per picture"):
        scorer([image], ["a cat", "a dog"])
