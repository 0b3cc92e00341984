"""How much memory the stages of CogView2 need for each picture."""

from ...models.cogview2.modeling_coglm import CogLMConfig

# CogLM reads all of its weights for each token, whatever the number of pictures; super-resolution is busy with a few.
MOST_PICTURES = {None: 32, "direct": 8, "iterative": 8}
# Copies of the states of all cells that live at the peak.
STATES = 12


def bytes_per_picture(config: CogLMConfig, itemsize: int) -> int:
    """
    Memory that a stage needs for each picture, besides its weights.

    Without super-resolution it is the cache of keys and values, which grows with the longest text. With it, the states
    of all cells, besides the keys and values of the context.

    Args:
        config (`CogLMConfig`): Of the stage.
        itemsize (`int`): Bytes per number.
    """
    if config.super_resolution is None:
        length = config.max_text_tokens + 1 + config.layout.image_length
        # the prompt's part is there twice while it is handed out to its pictures
        length += config.max_text_tokens + 1
        cells = 1
    else:
        length = config.num_text_slots + (config.super_resolution == "direct") * (1 + config.layout.image_length)
        cells = config.canvas_length
    cache = 2 * config.num_hidden_layers * length * config.hidden_size * itemsize
    return cache + cells * (STATES * config.hidden_size + 2 * config.intermediate_size) * itemsize
