"""Text to image with CogView."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict

import PIL.Image
import torch

from ...generation.batching import run_in_batches, slices
from ...generation.sampling import Generators
from ...generation.tokens import TO_GENERATE, generate
from ...models.cogview import sequences
from ..common.arguments import (
    PromptTranslator,
    check_choice,
    check_counts,
    check_numbers_drawn,
    check_prompts,
    one_generator_per_image,
    run_lengths,
    translate,
)
from ..common.attention import AttentionMixin
from ..common.calls import Call, inference
from ..common.notifier import Callback
from ..common.previews import PreviewMixin
from .base import CogViewPipelineBase
from .outputs import CogViewPipelineOutput
from .settings import SamplingSettings

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Scorer = Callable[[list[PIL.Image.Image], list[str]], Sequence[float]]


class CogViewPipeline(PreviewMixin, AttentionMixin, CogViewPipelineBase):
    """
    Pictures from Chinese and English prompts, token by token.

    Args:
        tokenizer ([`CogViewTokenizer`]): Text to ids.
        vqvae ([`CogViewVQModel`]): Tokens to pixels.
        transformer ([`CogViewModel`]): Writes pictures (`cogview-base`).
        caption_transformer ([`CogViewModel`], *optional*):
            Describes pictures (`cogview-caption`); decides on candidates. Without it, `transformer` does.
        super_resolution_transformer ([`CogViewModel`], *optional*): Of [`CogViewUpscalePipeline`] (`cogview-sr`).
        compression_rate (`int`, *optional*): Pixels per token along each side, one of the rates of `vqvae`; by default
            its only one, or 8.
        settings (`dict[str, dict]`, *optional*):
            Settings that this model wants in place of the released ones, by the name of the pipeline, such as
            `{"CogViewPipeline": {"temperature": 0.7}}`. What a call says counts more.

    Source: https://arxiv.org/abs/2105.13290.
    """

    _needed = ("transformer",)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the pictures this pipeline can make."""
        rows, columns = self.layout.image_grid
        return [(rows * self.config.compression_rate, columns * self.config.compression_rate)]

    @inference
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        num_candidates: int | None = None,
        scorer: Scorer | None = None,
        generator: Generators = None,
        prompt_translator: PromptTranslator | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_statistics: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> CogViewPipelineOutput | tuple:
        """
        Make pictures.

        Args:
            prompt (`str` or list of `str`): One text or many, Chinese and English, of any lengths that fit (62 tokens
                with the released model). Names of command tokens in it are letters.
            num_images_per_prompt (`int`): Any number; they come prompt by prompt.
            num_candidates (`int`, *optional*): Self-reranking: make so many pictures of each prompt, and keep the
                `num_images_per_prompt` best, best first.
            scorer (*optional*):
                What decides on the best: called with the pictures (PIL) and the prompt of each, it returns one number
                each, higher is better. By default the caption loss of the prompt, negated.
            generator (`torch.Generator` or list of them, *optional*):
                One for all pictures, or one per picture (per candidate, if there are). The picture of a generator is
                the same alone and in any batch.
            prompt_translator (*optional*): Called with each prompt; what it returns is used, and is in the output.
            temperature (`float`, defaults to 1), top_k (`int`, defaults to 200), top_p (`float`, *optional*): How
                tokens are drawn.
            max_batch_size (`int`, *optional*): Pictures that are computed at a time: on CUDA by default as many as the
                free memory has room for, else 8. When memory runs out, what is finished is kept, and the rest goes on
                with fewer at a time. It changes memory and speed only.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the token ids.
            return_dict (`bool`): Return a [`CogViewPipelineOutput`] rather than a tuple.
            return_statistics (`bool`): Measure seconds and peak memory of each stage; they are in the output's
                `statistics`.
            callback_on_step_end (*optional*):
                Called as `callback(pipe, step, timestep, kwargs)` after every token of a batch; `kwargs` holds
                `"stage"`, `"image_indices"` (which pictures these are) and the tensors asked for. A dictionary that it
                returns may hold other `"tokens"` to go on with.
            callback_on_step_end_tensor_inputs (list of `str`): Of `("tokens",)`: `(batch_size, rows, columns)`, -1
                where still unknown.

        Raises:
            ValueError: If an argument cannot be used; the message says which and why.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        settings = SamplingSettings.choose(self._preset, locals())
        check_choice("output_type", output_type, OUTPUT_TYPES)
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        if scorer is not None and num_candidates is None:
            raise ValueError("`scorer` has nothing to choose from without `num_candidates`. Set it.")
        prompts, num_kept, num_candidates, max_batch_size = self._check_inputs(
            prompt, num_images_per_prompt, num_candidates, max_batch_size
        )
        prompts = translate(prompts, prompt_translator)
        texts = self._encode_prompts(prompts, self.layout.max_text_tokens)
        num_drafts = len(prompts) * (num_candidates or num_kept)
        texts = [text for text in texts for _ in range(num_drafts // len(texts))]
        generators = one_generator_per_image(generator, num_drafts)
        batch_size = self._batch_size(max_batch_size, self.transformer)
        with self._running(
            total=self.layout.image_length * len(slices(num_drafts, batch_size)),
            return_statistics=return_statistics,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        ) as call:
            tokens = self._write(call, texts, generators, settings, batch_size)
            scores = None
            if num_candidates is not None:
                chosen, scores = self._select(call, tokens, prompts, texts, num_kept, scorer, batch_size)
                tokens, generators = tokens[chosen], [generators[index] for index in chosen]
            with call.measure("vqvae"):
                images = self._decode(tokens, output_type)
        output = CogViewPipelineOutput(
            images=images,
            tokens=tokens,
            seeds=[generator.initial_seed() for generator in generators],
            prompts=[prompt for prompt in prompts for _ in range(num_kept)],
            scores=scores,
            statistics=call.statistics,
        )
        return output if return_dict else output.to_tuple()

    def check_inputs(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        num_candidates: int | None = None,
        max_batch_size: int | None = None,
        **settings,
    ) -> dict:
        """
        Raise the error that a call with these arguments would raise, without computing anything.

        Args:
            prompt, num_images_per_prompt, num_candidates, max_batch_size: As for `__call__`.
            settings: The call's settings of sampling.

        Returns:
            `dict`: The settings that the call would use: those given, else the defaults. With them, `__call__` makes
                the same pictures.

        Raises:
            TypeError: If there is no such setting.
            ValueError: If an argument cannot be used; the message says which and why.
        """
        unknown = sorted(set(settings) - set(SamplingSettings.declared()))
        if unknown:
            raise TypeError(f"There are no settings {unknown}. Known: {list(SamplingSettings.declared())}.")
        used = SamplingSettings.choose(self._preset, settings)
        prompts, *_ = self._check_inputs(prompt, num_images_per_prompt, num_candidates, max_batch_size)
        self._encode_prompts(prompts, self.layout.max_text_tokens)
        return asdict(used)

    def _check_inputs(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int,
        num_candidates: int | None,
        max_batch_size: int | None,
    ) -> tuple[list[str], int, int | None, int | None]:
        """Prompts and numbers, checked."""
        prompts = check_prompts(prompt)
        (num_kept,) = check_numbers_drawn(len(prompts), num_images_per_prompt=num_images_per_prompt)
        (num_candidates,) = check_numbers_drawn(len(prompts), num_candidates=num_candidates)
        (max_batch_size,) = check_counts(max_batch_size=max_batch_size)
        if num_candidates is not None and num_candidates < num_kept:
            raise ValueError(
                f"`num_candidates` must be at least `num_images_per_prompt` ({num_kept}), the number of pictures that "
                f"are kept, but is {num_candidates}."
            )
        return prompts, num_kept, num_candidates, max_batch_size

    def _written_sequence(
        self, prompt: str, tokens: torch.Tensor, call: dict
    ) -> tuple[sequences.TokenSequence, list[int], float]:
        """See [`AttentionMixin`]."""
        (ids,) = self._encode_prompts([prompt], self.layout.max_text_tokens)
        return sequences.text_to_image([ids], self.layout, tokens), ids, 0.0

    def _write(
        self,
        call: Call,
        texts: list[list[int]],
        generators: list[torch.Generator],
        settings: SamplingSettings,
        batch_size: int,
    ) -> torch.Tensor:
        """Tokens of all pictures, `(num_pictures, rows, columns)`."""
        layout, device = self.layout, self._device_of(self.transformer)

        def write(part: slice) -> torch.Tensor:
            with call.batch(list(range(part.start, part.stop))) as notify, call.measure("transformer"):

                def report(step: int, entries: torch.Tensor) -> torch.Tensor | None:
                    changed = notify("transformer", step, entries.unflatten(1, layout.image_grid))
                    return None if changed is None else changed.flatten(1)

                own, repeats = run_lengths(texts[part])
                context = sequences.text_to_image(own, layout)
                positions = sequences.image_positions(context, layout.image_length)
                alike = bool((positions == positions[:1]).all())
                positions = positions[0] if alike else positions.repeat_interleave(torch.tensor(repeats), 0)
                return generate(
                    self.transformer,
                    context,
                    self._sampler(settings),
                    torch.full((part.stop - part.start, layout.image_length), TO_GENERATE),
                    positions,
                    num_images_per_context=repeats,
                    generator=generators[part],
                    device=device,
                    decoding=self._decoding,
                    row_length=layout.image_grid[1],
                    callback=report,
                    on_pass=functools.partial(call.count_pass, "transformer"),
                )

        def expect_more(num_batches: int) -> None:
            call.expect(num_batches * layout.image_length)

        written = run_in_batches(write, len(texts), batch_size, generators=generators, on_more_batches=expect_more)
        return torch.cat(written).unflatten(1, layout.image_grid)

    def _select(
        self,
        call: Call,
        tokens: torch.Tensor,
        prompts: list[str],
        texts: list[list[int]],
        num_kept: int,
        scorer: Scorer | None,
        batch_size: int,
    ) -> tuple[list[int], list[float]]:
        """Indices of the `num_kept` best drafts of each prompt, best first, and their scores."""
        num_candidates = len(tokens) // len(prompts)
        if scorer is None:
            with call.measure(self.caption_component):
                scores = self._caption_scores(self.caption_component, tokens, texts, batch_size)
        else:
            repeated = [prompt for prompt in prompts for _ in range(num_candidates)]
            scores = torch.as_tensor(scorer(self._decode(tokens, "pil"), repeated), dtype=torch.float32).detach().cpu()
            if scores.shape != (len(repeated),) or scores.isnan().any():
                raise ValueError(
                    f"`scorer` must return a number for each of the {len(repeated)} drafts, but returned {scores}."
                )
        order = scores.view(len(prompts), num_candidates).argsort(dim=1, descending=True, stable=True)
        chosen = (order[:, :num_kept] + num_candidates * torch.arange(len(prompts))[:, None]).flatten()
        return chosen.tolist(), scores[chosen].tolist()


CogViewPipeline.__module__ = "cogview_pipelines"
