"""How well captions describe pictures, judged by CogLM itself: the loss of a caption given the tokens of a picture."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..generation.batching import run_in_batches
from ..generation.token_sequence import IGNORED_LABEL
from ..models.cogview2 import sequences
from ..models.cogview2.modeling_coglm import CogLMModel
from ..models.cogview2.tokenization_icetk import IcetkTokenizer

DEFAULT_MAX_BATCH_SIZE = 16


@torch.no_grad()
def caption_losses(
    transformer: CogLMModel,
    tokenizer: IcetkTokenizer,
    tokens: torch.Tensor,
    texts: Sequence[str],
    *,
    languages: Sequence[str] | None = None,
    max_batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Mean cross-entropy per text token of each caption, given its picture; the lower, the better they fit.

    The start token says in which language the text is, as in training. (The release puts the Chinese start token
    before English texts, too: `languages=["zh"] * len(texts)`.)

    Args:
        transformer ([`CogLMModel`]): The model.
        tokenizer ([`IcetkTokenizer`]): Text to ids.
        tokens (`torch.Tensor` of shape `(num_pairs, rows, columns)` or `(num_pairs, image_length)`):
            Low-resolution image tokens.
        texts (sequence of `str`): One caption per picture.
        languages (sequence of `"en"` or `"zh"`, *optional*): By default what `tokenizer.language` says of each text.
        max_batch_size (`int`, defaults to 16): Pairs that are computed at a time; fewer once memory runs out. It
            changes memory and speed only.
        device (`torch.device`, *optional*): Where to compute if hooks move the model; default: where it is.

    Returns:
        `torch.Tensor` of shape `(num_pairs,)`: float32 on the CPU, in nats.

    Raises:
        ValueError: If there is not one text per picture, or a text is empty or too long, or the tokens do not fit.

    Source: inverse prompting and post-selection, CogView (https://arxiv.org/abs/2105.13290), section 3.3.
    """
    layout, longest = transformer.config.layout, transformer.config.max_text_tokens
    texts = list(texts)
    tokens = tokens.flatten(1)
    if len(tokens) != len(texts):
        raise ValueError(f"`texts` must be one per picture ({len(tokens)}), but are {len(texts)}.")
    if tokens.shape[1] != layout.image_length:
        rows, columns = layout.image_grid
        raise ValueError(f"`tokens` must be {rows} x {columns} per picture, but are {tokens.shape[1]} in all.")
    ids = [tokenizer.encode(text) for text in texts]
    for index, text_ids in enumerate(ids):
        if not 0 < len(text_ids) <= longest:
            raise ValueError(f"`texts[{index}]` must have 1 to {longest} tokens, but has {len(text_ids)}.")
    if languages is None:
        languages = [tokenizer.language(text_ids) for text_ids in ids]
    starts = {"en": tokenizer.start_of_english_id, "zh": tokenizer.start_of_chinese_id}
    device = transformer.device if device is None else device

    losses = torch.empty(len(texts))
    # texts of like length together, so that little is computed for padding
    order = sorted(range(len(texts)), key=lambda pair: len(ids[pair]))

    def score(batch: slice) -> None:
        pairs = order[batch]
        sequence = sequences.caption(
            tokens[pairs].cpu(), [starts[languages[pair]] for pair in pairs], layout, [ids[pair] for pair in pairs]
        ).to(device)
        assert sequence.labels is not None
        labelled: torch.Tensor = sequence.labels != IGNORED_LABEL
        output = transformer(
            sequence.input_ids,
            sequence.position_ids,
            sequence.attention_mask,
            labels=sequence.labels,
            full_vocabulary=True,
        )
        token_losses = torch.zeros(labelled.shape, device=device)
        token_losses[labelled] = F.cross_entropy(output.logits, sequence.labels[labelled], reduction="none")
        losses[pairs] = (token_losses.sum(1) / labelled.sum(1)).cpu()

    run_in_batches(score, len(order), max_batch_size or DEFAULT_MAX_BATCH_SIZE)
    return losses


@torch.no_grad()
def image_losses(
    transformer: CogLMModel,
    tokens: torch.Tensor,
    texts: Sequence[Sequence[int]],
    *,
    text_attention_bias: float = 0.0,
    max_batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Mean cross-entropy per image token of each picture, given a text: the other direction, as in text to image.

    Args:
        transformer ([`CogLMModel`]): The model.
        tokens (`torch.Tensor` of shape `(num_pairs, rows, columns)` or `(num_pairs, image_length)`):
            Low-resolution image tokens.
        texts (sequence of sequences of `int`): Token ids of one text per picture.
        text_attention_bias (`float`): As in text to image.
        max_batch_size (`int`, defaults to 16), device (*optional*): As for [`caption_losses`].

    Returns:
        `torch.Tensor` of shape `(num_pairs,)`: float32 on the CPU, in nats.
    """
    layout = transformer.config.layout
    tokens = tokens.flatten(1)
    device = transformer.device if device is None else device
    losses = torch.empty(len(texts))
    order = sorted(range(len(texts)), key=lambda pair: len(texts[pair]))

    def score(batch: slice) -> None:
        pairs = order[batch]
        own = tokens[pairs]
        sequence = sequences.text_to_image([texts[pair] for pair in pairs], layout, own.cpu()).to(device)
        first = sequence.input_ids.shape[1] - layout.image_length - 1  # `<start_of_image>`
        output = transformer(
            sequence.input_ids,
            sequence.position_ids,
            sequence.attention_mask,
            sequence.text_mask,
            text_attention_bias,
            logits_positions=torch.arange(first, first + layout.image_length, device=device),
        )
        each = F.cross_entropy(output.logits.transpose(1, 2), own.to(device), reduction="none")
        losses[pairs] = each.mean(1).cpu()

    run_in_batches(score, len(order), max_batch_size or DEFAULT_MAX_BATCH_SIZE)
    return losses
