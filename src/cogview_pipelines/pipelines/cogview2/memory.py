"""How much memory the stages of CogView2 need for each picture."""

from ...models.cogview2.modeling_coglm import CogLMConfig
from ...models.cogview2.modeling_coglm_canvas import CogLMCanvasConfig

# CogLM reads all of its weights for each token, whatever the number of pictures; super-resolution is busy with a few.
MOST_SEQUENCES, MOST_CANVASES = 32, 8
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
    if not isinstance(config, CogLMCanvasConfig):
        length = config.longest_sequence
        # the prompt's part is there twice while it is handed out to its pictures
        length += config.max_text_tokens + 1
        cells = 1
    else:
        length = config.num_text_slots + (config.super_resolution == "direct") * (1 + config.layout.image_length)
        cells = config.canvas_length
    cache = 2 * config.num_hidden_layers * length * config.hidden_size * itemsize
    return cache + cells * (STATES * config.hidden_size + 2 * config.intermediate_size) * itemsize


def most_pictures(config: CogLMConfig) -> int:
    """How many pictures at a time keep a stage busy."""
    return MOST_CANVASES if isinstance(config, CogLMCanvasConfig) else MOST_SEQUENCES
