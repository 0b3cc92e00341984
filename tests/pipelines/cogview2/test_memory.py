"""What the stages of CogView2 are said to need for each picture."""

import pytest

from cogview_pipelines.pipelines.cogview2.memory import bytes_per_picture

from ...utils import make_coglm


@pytest.mark.parametrize("kind", [None, "direct", "iterative"])
def test_the_estimate_counts_the_cache_of_keys_and_values(kind):
    model = make_coglm(kind)
    config = model.config
    length = config.max_text_tokens + 17 if kind is None else config.num_text_slots
    cache = 2 * config.num_hidden_layers * length * config.hidden_size * 4
    estimate = bytes_per_picture(config, 4)
    assert estimate > cache
    assert bytes_per_picture(config, 2) < estimate
