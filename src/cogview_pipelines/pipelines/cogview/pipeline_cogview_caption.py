"""Captions of pictures with CogView, and how well captions fit."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from ...generation.batching import run_in_batches
from ...generation.sampling import Generators
from ...generation.texts import WrittenText, write_texts
from ...models.cogview import sequences
from ...pictures.pixels import Images
from ..common.arguments import (
    check_choice,
    check_counts,
    check_numbers_drawn,
    check_prompts,
    check_tokens,
    one_generator_per_image,
)
from ..common.calls import Call, inference
from .base import CogViewPipelineBase
from .outputs import CogViewCaptionPipelineOutput
from .settings import CaptionSettings

ENDS = ("sentence", "length")
REDUCTIONS = ("mean", "sum")
# The release always writes so many.
DEFAULT_MAX_LENGTH = 20
DEFAULT_MAX_BATCH_SIZE = 16


class CogViewCaptionPipeline(CogViewPipelineBase):
    """
    Captions of pictures, and the log-probability of given captions.

    Args:
        tokenizer ([`CogViewTokenizer`]): Ids to text.
        vqvae ([`CogViewVQModel`]): Pixels to tokens.
        caption_transformer ([`CogViewModel`]): Describes pictures (`cogview-caption`). If only `transformer` is there,
            it is used; a model that was trained on pictures after texts alone writes poor captions.
        transformer, super_resolution_transformer ([`CogViewModel`], *optional*): Of the other pipelines.
        compression_rate, settings: As of [`CogViewPipeline`].

    Source: https://arxiv.org/abs/2105.13290, section 3.2.
    """

    _made_for = "captioning"
    _needed = ("caption_transformer", "transformer")
    _lora_stand_ins: Mapping[str, str] = {"caption_transformer": "transformer"}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of what the model sees."""
        rows, columns = self.layout.image_grid
        return [(rows * self.config.compression_rate, columns * self.config.compression_rate)]

    @inference
    def __call__(
        self,
        image: Images | None = None,
        *,
        tokens: torch.Tensor | None = None,
        num_captions_per_image: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_length: int | None = None,
        end: str = "sentence",
        generator: Generators = None,
        max_batch_size: int | None = None,
        return_dict: bool = True,
        return_statistics: bool = False,
    ) -> CogViewCaptionPipelineOutput | tuple:
        """
        Write captions.

        Args:
            image (PIL image, array, tensor, or list of them):
                Pictures of any size, of which the square in the middle is seen; arrays `(height, width, 3)` and
                tensors `(3, height, width)` of bytes, or of floats in [0, 1]. Or give `tokens`.
            tokens (`torch.Tensor` of shape `(num_images, rows, columns)`, *optional*): Image tokens instead.
            num_captions_per_image (`int`): They come picture by picture, as drawn.
            temperature (`float`, defaults to 1), top_k (`int`, defaults to 200), top_p (`float`, *optional*): How
                tokens are drawn; `top_k=1` is greedy.
            max_length (`int`, *optional*): The most tokens; default 20, or what the model takes if that is less.
            end (`str`): `"sentence"`: a caption ends at the first full stop, question or exclamation mark, which is
                not part of it. `"length"`: at `max_length`, always, as in the release.
            generator (`torch.Generator` or list of them, *optional*): One for all, or one per caption.
            max_batch_size (`int`, defaults to 16): Captions that are computed at a time; fewer once memory runs out.
                It changes memory and speed only.
            return_dict (`bool`): Return a [`CogViewCaptionPipelineOutput`] rather than a tuple.
            return_statistics (`bool`): As for [`CogViewPipeline`].

        Raises:
            TypeError: If a picture is none.
            ValueError: If an argument cannot be used; the message says which and why.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        settings = CaptionSettings.choose(self._preset, locals())
        check_choice("end", end, ENDS)
        (num_captions,) = check_numbers_drawn(1, num_captions_per_image=num_captions_per_image)
        max_length, max_batch_size = check_counts(max_length=max_length, max_batch_size=max_batch_size)
        longest = self._longest_caption
        max_length = min(DEFAULT_MAX_LENGTH, longest) if max_length is None else max_length
        if max_length > longest:
            raise ValueError(f"`max_length` may be {longest} with this model, but is {max_length}.")
        batch_size = max_batch_size or DEFAULT_MAX_BATCH_SIZE
        name = self._model
        with self._running(total=0, return_statistics=return_statistics) as call:
            tokens = self._tokens(image, tokens, batch_size, call)
            call.expect(len(tokens))
            check_numbers_drawn(len(tokens), num_captions_per_image=num_captions)
            generators = one_generator_per_image(generator, len(tokens) * num_captions)

            def write(part: slice) -> list[WrittenText]:
                call.stop_if_interrupted()
                own = generators[part.start * num_captions : part.stop * num_captions]
                on_pass = functools.partial(call.count_pass, name)
                written = self._write(tokens[part], own, settings, max_length, end, num_captions, on_pass)
                call.progress.update(part.stop - part.start)
                return written

            with call.measure(name):
                parts = run_in_batches(write, len(tokens), max(1, batch_size // num_captions), generators=generators)
        texts = [text for part in parts for text in part]
        output = CogViewCaptionPipelineOutput(
            captions=[self.tokenizer.decode(text.token_ids) for text in texts],
            scores=[text.mean_log_probability for text in texts],
            token_ids=[text.token_ids for text in texts],
            seeds=[generator.initial_seed() for generator in generators],
            statistics=call.statistics,
        )
        return output if return_dict else output.to_tuple()

    @inference
    def score(
        self,
        image: Images | None,
        prompt: str | Sequence[str],
        *,
        tokens: torch.Tensor | None = None,
        reduction: str = "mean",
        max_batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Log-probability of captions given pictures, in nats: the higher, the better they fit.

        Args:
            image, tokens: As for `__call__`; `image` may be `None` with tokens.
            prompt (`str` or list of `str`): Texts, one per picture; one picture or one text serves all of the others.
                All of their words count, also those that the model does not know; a warning names them.
            reduction (`str`): `"mean"` per text token, or `"sum"` as the release scores. The order of pictures for one
                text is the same.
            max_batch_size (`int`, defaults to 16): Pairs that are computed at a time.

        Returns:
            `torch.Tensor` of shape `(num_pairs,)`: float32 on the CPU.

        Raises:
            TypeError, ValueError: If an argument cannot be used; the message says which and why.
        """
        check_choice("reduction", reduction, REDUCTIONS)
        prompts = check_prompts(prompt)
        (max_batch_size,) = check_counts(max_batch_size=max_batch_size)
        batch_size = max_batch_size or DEFAULT_MAX_BATCH_SIZE
        texts = self._encode_prompts(prompts, self._longest_caption, scored=True)
        with self._running() as call:
            tokens = self._tokens(image, tokens, batch_size, call)
            count = max(len(tokens), len(texts))
            if not {len(tokens), len(texts)} <= {1, count}:
                raise ValueError(
                    f"`prompt` must be one, or one per picture ({len(tokens)}), but there are {len(texts)}."
                )
            texts = texts * (count // len(texts))
            return self._caption_scores(self._model, tokens.expand(count, -1, -1), texts, batch_size, reduction)

    def caption_loss(
        self,
        image: Images | None,
        prompt: str | Sequence[str],
        *,
        tokens: torch.Tensor | None = None,
        max_batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Caption loss of pairs of a picture and a text, in nats per text token: the lower, the better they fit. This is
        `score` with the other sign, and means the same with every family.

        Args:
            image, prompt, tokens, max_batch_size: As for `score`.

        Returns:
            `torch.Tensor` of shape `(num_pairs,)`: float32 on the CPU.

        Raises:
            TypeError, ValueError: If an argument cannot be used; the message says which and why.
        """
        return -self.score(image, prompt, tokens=tokens, max_batch_size=max_batch_size)

    def check_texts(self, prompt: str | Sequence[str]) -> None:
        """
        Raise the error that `score` would raise for these texts, without computing anything.

        Raises:
            ValueError: If a text is empty or too long.
        """
        self._encode_prompts(check_prompts(prompt), self._longest_caption, scored=True)

    @property
    def _longest_caption(self) -> int:
        return self.layout.max_caption_tokens

    def _tokens(self, image: Images | None, tokens: torch.Tensor | None, batch_size: int, call: Call) -> torch.Tensor:
        """Tokens of what came: `(num_images, rows, columns)`."""
        if (image is None) == (tokens is None):
            raise ValueError("Give either `image` or `tokens`.")
        if tokens is not None:
            return check_tokens(tokens, self.layout.num_image_tokens, self.layout.image_grid)
        pixels = self._read_images(image, self.sizes[0])
        with call.measure("vqvae"):
            return torch.cat([self._encode_pixels(part) for part in pixels.split(batch_size)])

    def _write(
        self,
        tokens: torch.Tensor,
        generators: list[torch.Generator],
        settings: CaptionSettings,
        max_length: int,
        end: str,
        num_captions: int,
        on_pass: Callable[[], None],
    ) -> list[WrittenText]:
        model, layout = getattr(self, self._model), self.layout
        allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        allowed[layout.num_image_tokens : layout.command_token_id] = True
        ends = torch.zeros_like(allowed)
        if end == "sentence":
            ends[self.tokenizer.sentence_end_ids] = True
        return write_texts(
            model,
            sequences.caption(tokens.cpu().flatten(1), layout),
            self._sampler(settings),
            allowed,
            ends,
            max_length,
            num_texts_per_context=num_captions,
            generator=generators,
            device=self._device_of(model),
            decoding=self._decoding,
            on_pass=on_pass,
        )


CogViewCaptionPipeline.__module__ = "cogview_pipelines"
