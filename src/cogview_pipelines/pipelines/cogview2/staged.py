"""
Text to image in parts, for whoever decides what is computed together: a server, say, that has many prompts at work.

Each [`Order`] goes through its stages, with others or alone, and gets the same pictures as from a call of
[`CogView2Pipeline`]: a picture does not depend on its batch.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch

from ..common.calls import inference
from ..common.notifier import Callback
from .base import Stage
from .pipeline_cogview2 import CogView2Pipeline, Pictures
from .settings import SamplingSettings

DECODE = "vqvae"


@dataclass
class Order:
    """
    The pictures of a prompt, and how far they are.

    Args:
        prompt (`str`): What they show.
        num_images (`int`): How many of them are finished.
        num_candidates (`int`, *optional*): How many are drafted, if more.
        settings ([`SamplingSettings`]): Of the draft.
        stages (`list[Stage]`): Of super-resolution, still to come.
        pictures ([`Pictures`]): Texts and generators.
        tokens (`torch.Tensor` of shape `(num_pictures, rows, columns)`, *optional*): After the latest stage.
        scores (`list[float]`, *optional*): Of the chosen candidates.
    """

    prompt: str
    num_images: int
    num_candidates: int | None
    settings: SamplingSettings
    stages: list[Stage]
    pictures: Pictures
    tokens: torch.Tensor | None = None
    scores: list[float] | None = None

    def __post_init__(self):
        self._num_done = 0
        self._remember()

    @property
    def keys(self) -> list[Hashable]:
        """One for each stage still to come, the last for pixels: orders with equal ones may be computed together."""
        settings = self.settings
        guidance = (self.pictures.negatives is None, settings.guidance_scale, settings.text_attention_bias)
        sampling = (settings.temperature, settings.top_k_clusters, settings.cluster_temperature)
        draft = ("transformer", *guidance, *sampling)
        keys: list[Hashable] = [] if self.tokens is not None else [draft]
        keys += [(stage.name, repr(sorted(stage.scheduler.config.items()))) for stage in self.stages]
        return [*keys, DECODE]

    @property
    def seeds(self) -> list[int]:
        """Of the pictures."""
        return [generator.initial_seed() for generator in self.pictures.generators]

    def _remember(self) -> None:
        self._states = [generator.get_state() for generator in self.pictures.generators]

    def _rewind(self) -> None:
        """A stage that failed is tried again with the same numbers."""
        for generator, state in zip(self.pictures.generators, self._states):
            generator.set_state(state)


class StagedPipeline:
    """
    The stages of a [`CogView2Pipeline`] one by one. Each takes orders that are at it and have equal keys, and leaves
    them at the next one; when it raises, they are where they were.

    Args:
        pipe ([`CogView2Pipeline`]): Whose components compute.
    """

    def __init__(self, pipe: CogView2Pipeline):
        self.pipe = pipe

    def order(
        self,
        prompt: str,
        generators: list[torch.Generator],
        *,
        num_images: int = 1,
        num_candidates: int | None = None,
        style: str | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        **settings,
    ) -> Order:
        """
        What a call with these arguments would make.

        Args:
            prompt, num_candidates, style, height, width, negative_prompt, settings: As for `CogView2Pipeline`.
            generators (`list[torch.Generator]`): Fresh ones, one per picture, or per candidate.
            num_images (`int`): Pictures.

        Raises:
            ValueError: If an argument cannot be used; the message says which and why.
        """
        pipe = self.pipe
        pipe._check_inputs(prompt, num_images, num_candidates, None)
        sampling = pipe._settings(style, settings)
        super_resolve = pipe._check_size(height, width)
        negatives = pipe._encode_negative_prompts(negative_prompt, 1, sampling.guidance_scale)
        texts = pipe._encode_prompts([prompt], style, super_resolve)
        count = num_candidates or num_images
        return Order(
            prompt,
            num_images,
            num_candidates,
            sampling,
            pipe._stages(sampling) if super_resolve else [],
            Pictures(texts * count, None if negatives is None else negatives * count, generators),
        )

    @inference
    def draft(self, orders: Sequence[Order], callback: Callback | None = None) -> None:
        """Low-resolution tokens, of which the best are kept if there are candidates."""
        pipe = self.pipe
        pictures = self._begin(orders)
        size = pipe._batch_size(None, pipe.transformer, copies=1 if pictures.negatives is None else 2)
        with pipe._running(total=0, callback=callback, tensor_inputs=("tokens",)) as call:
            tokens = pipe._draft(call, pictures, orders[0].settings, size)
            parts = tokens.split([len(order.pictures.texts) for order in orders])
            chosen = [
                None
                if order.num_candidates is None
                else pipe._select(part, [order.prompt], order.num_images, None, size)
                for order, part in zip(orders, parts)
            ]
        for order, part, choice in zip(orders, parts, chosen):
            order.tokens = part
            if choice is not None:
                indices, order.scores = choice
                order.tokens, order.pictures = part[indices], order.pictures.only(indices)
            self._end(order, pipe.layout.image_length)

    @inference
    def refine(self, orders: Sequence[Order], callback: Callback | None = None) -> None:
        """The next stage of super-resolution."""
        pipe, stage = self.pipe, orders[0].stages[0]
        pictures = self._begin(orders)
        size = pipe._batch_size(None, getattr(pipe, stage.name))
        tokens = torch.cat([order.tokens for order in orders])
        with pipe._running(total=0, callback=callback, tensor_inputs=("tokens",)) as call:
            tokens = pipe._refine(call, pictures, stage, tokens, max(order._num_done for order in orders), size)
        for order, part in zip(orders, tokens.split([len(order.pictures.texts) for order in orders])):
            order.tokens = part
            order.stages = order.stages[1:]
            self._end(order, stage.num_steps)

    @inference
    def decode(self, orders: Sequence[Order]) -> list[list[PIL.Image.Image]]:
        """The pictures of each order."""
        with self.pipe._running():
            return [self.pipe._decode(order.tokens, "pil") for order in orders]

    @staticmethod
    def _begin(orders: Sequence[Order]) -> Pictures:
        for order in orders:
            order._rewind()
        all_of_them = [order.pictures for order in orders]
        negatives = None
        if all_of_them[0].negatives is not None:
            negatives = [text for each in all_of_them for text in each.negatives or ()]
        return Pictures(
            [text for each in all_of_them for text in each.texts],
            negatives,
            [generator for each in all_of_them for generator in each.generators],
        )

    @staticmethod
    def _end(order: Order, num_steps: int) -> None:
        order._num_done += num_steps
        order._remember()
