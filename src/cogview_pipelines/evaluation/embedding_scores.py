"""How well pictures fit texts, judged by a model that embeds both."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

DEFAULT_MAX_BATCH_SIZE = 16


class EmbeddingScorer:
    """
    How well pictures fit texts by another model: the cosine of the embeddings of both, as CLIP gives them.

    Pass it as `scorer` to [`CogView2Pipeline`] with `num_candidates`.

    Args:
        model (`transformers.PreTrainedModel`): One that embeds pictures and texts: `CLIPModel`, `ChineseCLIPModel`,
            `SiglipModel`, ... Its output has `image_embeds` and `text_embeds`.
        processor (`transformers.ProcessorMixin`): That of the model.
        max_batch_size (`int`, defaults to 16): Pairs that are computed at a time.
    """

    def __init__(self, model, processor, max_batch_size: int = DEFAULT_MAX_BATCH_SIZE):
        self.model, self.processor, self.max_batch_size = model, processor, max_batch_size

    @torch.no_grad()
    def __call__(self, images: Sequence, prompts: Sequence[str]) -> list[float]:
        """
        The cosine of each pair, from -1 to 1; higher is better.

        Args:
            images (sequence of `PIL.Image.Image`): Pictures.
            prompts (sequence of `str`): A text for each, cut to what the model can read.

        Raises:
            ValueError: If there is not one text per picture.
        """
        if len(images) != len(prompts):
            raise ValueError(f"`prompts` must be one per picture ({len(images)}), but are {len(prompts)}.")
        cosines: list[float] = []
        for start in range(0, len(images), self.max_batch_size):
            part = slice(start, start + self.max_batch_size)
            inputs = self.processor(
                images=list(images[part]), text=list(prompts[part]), return_tensors="pt", padding=True, truncation=True
            ).to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            output = self.model(**inputs)
            pairs = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float(), dim=-1)
            cosines += pairs.cpu().tolist()
        return cosines
