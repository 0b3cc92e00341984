"""`generate` appends tokens to sequences one by one. Tensors only."""

from collections.abc import Callable, Sequence

import torch

from ..models.cogview2.modeling_coglm import CogLMModel
from .decoders import Decoding, encode_context
from .sampling import FiniteCheck, Generators, draw_noise
from .token_sequence import TokenSequence

Sampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TO_GENERATE = -1


@torch.no_grad()
def generate(
    model: CogLMModel,
    context: TokenSequence,
    sampler: Sampler,
    entries: torch.Tensor,
    entry_positions: torch.Tensor,
    *,
    num_images_per_context: int | Sequence[int] = 1,
    text_attention_bias: float = 0.0,
    guidance_scale: float | None = None,
    full_vocabulary: bool = False,
    generator: Generators = None,
    device: torch.device | str | None = None,
    decoding: Decoding | None = None,
    callback: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """
    Append tokens to a context, each seeing the whole context and the tokens before it.

    Args:
        model (`CogLMModel`): The model.
        context (`TokenSequence`): What is known, encoded in one forward pass.
        sampler: Function of float32 logits `(batch_size, tokens)` and noise `(batch_size, 2)` that returns tokens
            `(batch_size,)`.
        entries (`torch.Tensor` of shape `(batch_size, num_entries)`): Tokens to append; -1 where one is generated.
        entry_positions (`torch.Tensor` of shape `(num_entries,)`): Their position ids.
        num_images_per_context (`int` or one per context): Sequences that continue each context, which is encoded once
            for all of them; `batch_size` counts sequences.
        text_attention_bias (`float`): Added to the scores of the text keys for all rows, in all layers and heads.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance: after the contexts, `context` holds as many again to lead away from (with empty
            texts, say), and the sampler gets the logits of those plus this times the difference to them.
        full_vocabulary (`bool`): Give the sampler logits of all tokens, not of image tokens only.
        generator: One generator, or one per sequence.
        device (`torch.device`, *optional*): Where to compute if hooks move the model; default: where it is.
        decoding (`Decoding`, *optional*): How steps run; it keeps what later calls can use. Default: a new one.
        callback: Called with the number of entries written and all entries, after each generated token. If it returns
            entries, they replace them; of those that change, the model reads only the latest.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_entries)`: The entries, filled in. The argument stays as it is.

    Raises:
        ValueError: If `entries` does not have one row per sequence, with -1 in the same columns, or the logits are not
            finite.
    """
    device = model.device if device is None else device
    context, entries, entry_positions = context.to(device), entries.to(device).clone(), entry_positions.to(device)
    batch_size, num_entries = entries.shape
    copies = 1 if guidance_scale is None else 2
    repeats = torch.as_tensor(num_images_per_context).expand(len(context) // copies)
    if batch_size != repeats.sum():
        raise ValueError(
            f"`entries` must have a row for each of the {repeats.sum()} sequences of `num_images_per_context`, but "
            f"has {batch_size}."
        )
    # one pattern for the whole batch: completion masks are shared, and so the loop needs no look at the device
    patterns = (entries == TO_GENERATE).tolist()
    is_wanted = patterns[0]
    if any(pattern != is_wanted for pattern in patterns):
        raise ValueError("`entries` must have -1 in the same columns of every row, but its rows differ.")
    noise = draw_noise((batch_size, num_entries, 2), generator, device)

    cache, bias, logits = encode_context(model, context, text_attention_bias, full_vocabulary, device)
    decoding = Decoding() if decoding is None else decoding
    decoder = decoding.decoder(model, copies * batch_size, cache.length + num_entries, full_vocabulary, device)
    repeats = repeats.repeat(copies).to(device)
    decoder.begin(cache, bias, repeats)
    logits = logits.repeat_interleave(repeats, 0)
    del cache

    check, num_read = FiniteCheck(), 0
    for entry in (index for index, wanted in enumerate(is_wanted) if wanted):
        if entry > num_read:  # the entry written last and the known ones after it, at once
            new = entries[:, num_read:entry]
            logits = decoder.append(new if copies == 1 else new.repeat(copies, 1), entry_positions[num_read:entry])
            num_read = entry
        guided = _guide(logits, guidance_scale)
        check.see(guided)
        entries[:, entry] = sampler(guided, noise[:, entry])
        if callback is not None and (changed := callback(entry + 1, entries)) is not None:
            entries = changed.clone()
    check.finish()
    return entries


def _guide(logits: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """Classifier-free guidance: the second half of the rows is what the first half leads away from."""
    if guidance_scale is None:
        return logits
    wanted, unwanted = logits.chunk(2)
    return unwanted + guidance_scale * (wanted - unwanted)
