"""What pipelines that write pictures have for looking inside."""

from typing import TYPE_CHECKING

import torch

from ...evaluation.attention_maps import AttentionMaps, read_attention, words_of
from ...generation.token_sequence import TokenSequence
from .arguments import check_prompts
from .calls import inference

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Mixed  # what the mixin is part of
else:
    Mixed = object


class AttentionMixin(Mixed):
    """
    `attention_maps`, for pipelines with a `_written_sequence` that gives the sequence of a finished picture, the ids
    of its text, and the bias that it was written with.
    """

    @inference
    def attention_maps(self, prompt: str, *, tokens: torch.Tensor | None = None, **call) -> AttentionMaps:
        """
        Make a picture of low resolution, and tell where each head looked meanwhile.

        The tokens are those of an ordinary call: attention is read afterwards, in one pass over all of them.

        Args:
            prompt (`str`): One text.
            tokens (`torch.Tensor` of shape `(rows, columns)`, *optional*): Read this picture instead of making one.
            call: Arguments of the pipeline's call: `generator`, `style`, settings.

        Raises:
            ValueError: If an argument cannot be used; the message says which and why.
        """
        prompts = check_prompts(prompt)
        if len(prompts) != 1:
            raise ValueError(f"`prompt` must be one text, but there are {len(prompts)}.")
        if tokens is None:
            output = self(prompts, output_type="latent", **self._low_resolution, **call)
            tokens, prompts = output.tokens[0].cpu(), output.prompts
        rows, columns = self.layout.image_grid
        if tuple(tokens.shape) != (rows, columns):
            raise ValueError(f"`tokens` must have the shape ({rows}, {columns}), but have {tuple(tokens.shape)}.")
        sequence, ids, bias = self._written_sequence(prompts[0], tokens[None], call)
        places = sequence.text_mask[0].nonzero().flatten().tolist()
        names = self.tokenizer.convert_ids_to_tokens(ids)
        words = [
            (word, [places[piece] for piece in pieces])
            for word, pieces in words_of(names, list(filter(self.tokenizer.is_added, names)))
        ]
        with self._running() as running, running.measure("transformer"):
            maps = read_attention(
                self.transformer,
                sequence,
                (rows, columns),
                words,
                text_attention_bias=bias,
                device=self._device_of(self.transformer),
            )
            maps.image = self._decode(tokens[None], "pil")[0]
        return maps

    @property
    def _low_resolution(self) -> dict:
        """Arguments of a call that leaves super-resolution out."""
        return {}

    def _written_sequence(
        self, prompt: str, tokens: torch.Tensor, call: dict
    ) -> tuple[TokenSequence, list[int], float]:
        raise NotImplementedError
