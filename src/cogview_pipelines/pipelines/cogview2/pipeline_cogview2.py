"""Text to image with CogView2."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import PIL.Image
import torch

from ...evaluation.likelihood import caption_losses
from ...generation.batching import run_in_batches, slices
from ...generation.sampling import Generators
from ...generation.tokens import TO_GENERATE, generate
from ...models.cogview2 import sequences
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
from .base import Batch, CogView2PipelineBase, Stage
from .outputs import CogView2PipelineOutput
from .settings import SamplingSettings

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Scorer = Callable[[list[PIL.Image.Image], list[str]], Sequence[float]]


@dataclass
class Pictures:
    """Text, what guidance leads away from (if it does), and generator of each of some pictures."""

    texts: list[list[int]]
    negatives: list[list[int]] | None
    generators: list[torch.Generator]

    def only(self, indices: Iterable[int]) -> "Pictures":
        """Some of them."""
        indices = list(indices)
        return Pictures(
            [self.texts[index] for index in indices],
            None if self.negatives is None else [self.negatives[index] for index in indices],
            [self.generators[index] for index in indices],
        )

    def contexts(self) -> tuple[list[list[int]], list[int]]:
        """Texts to encode, once for neighbours that share one, then as many negative ones; and how many share each."""
        if self.negatives is None:
            return run_lengths(self.texts)
        pairs, repeats = run_lengths(list(zip(self.texts, self.negatives)))
        return [text for pair in zip(*pairs) for text in pair], repeats


class CogView2Pipeline(PreviewMixin, AttentionMixin, CogView2PipelineBase):
    """
    Pictures from Chinese and English prompts: CogLM writes low-resolution tokens, direct super-resolution enlarges
    them in one pass, and iterative super-resolution (LoPAR) refines them in a few.

    Args:
        tokenizer ([`IcetkTokenizer`]): Text to ids.
        transformer ([`CogLMModel`]): CogLM.
        vqvae ([`IcetkVQModel`]): Tokens to pixels; holds the cluster labels of its codebook.
        direct_sr_transformer, iterative_sr_transformer ([`CogLMCanvasModel`], *optional*): The other two stages;
            without them, pictures are low resolution.
        direct_sr_scheduler, iterative_sr_scheduler ([`LoPARScheduler`], *optional*): Which cells in which pass, and
            how they are drawn.
        compression_rate (`int`, *optional*): Pixels per token along each side, one of the rates of `vqvae`; by default
            its only one, or 8.
        styles (`dict[str, dict]`): Presets: the `suffix` that is added to the prompt (a string, or one for each of
            `"en"` and `"zh"`), and any settings of `__call__`.
        default_style (`str`, *optional*): The preset used when a call names none.
        whole_pictures (`bool`, defaults to `False`): Whether CogLM was trained on whole pictures of one kind only, and
            makes little of parts of them: inpainting then shows it as much of the picture as fits into a square,
            rather than the surroundings of the mask.

    Source: https://arxiv.org/abs/2204.14217.
    """

    @inference
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        num_candidates: int | None = None,
        scorer: Scorer | None = None,
        style: str | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        prompt_translator: PromptTranslator | None = None,
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float | None = None,
        text_attention_bias: float | None = None,
        temperature: float | None = None,
        top_k_clusters: int | None = None,
        cluster_temperature: float | None = None,
        direct_sr_temperature: float | None = None,
        direct_sr_top_k_clusters: int | None = None,
        direct_sr_cluster_temperature: float | None = None,
        iterative_sr_temperature: float | None = None,
        iterative_sr_top_k: int | Sequence[int] | None = None,
        num_lopar_steps: int | None = None,
        max_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_statistics: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> CogView2PipelineOutput | tuple:
        """
        Make pictures.

        Settings left out are those of the style, and else the pipeline's defaults (the released values).

        Args:
            prompt (`str` or list of `str`): One text or many, Chinese and English, of any lengths that fit.
            num_images_per_prompt (`int`): Any number; they come prompt by prompt.
            num_candidates (`int`, *optional*):
                Post-selection: draft so many pictures of each prompt at low resolution, and finish only the
                `num_images_per_prompt` best, best first.
            scorer (*optional*):
                What decides on the best: called with the drafts (PIL) and the prompt of each, it returns one number
                each, higher is better. By default CogLM's own caption loss (`CogView2CaptionPipeline.score`), negated.
            style (`str`, *optional*): A name in `pipe.config.styles`; default: `pipe.config.default_style`.
            height, width (`int`, *optional*): One of `pipe.sizes`, in pixels; default: the largest.
            generator (`torch.Generator` or list of them, *optional*):
                One for all pictures, or one per picture (per candidate, if there are). The picture of a generator is
                the same alone and in any batch.
            prompt_translator (*optional*): Called with each prompt; what it returns is used, and is in the output.
            negative_prompt (`str` or one for each prompt), guidance_scale (`float`, defaults to 1, no guidance):
                Classifier-free guidance of the low-resolution tokens: their logits are led away from those of
                `negative_prompt` (default: no text), the more the higher the scale. It takes a model that was trained
                with a share of texts left out (`drop_text_probability` of `train_coglm.py`), as the shipped model was,
                and takes twice the time.
            text_attention_bias (`float`): Added to the attention scores of the text; higher follows the prompt more
                closely.
            temperature, cluster_temperature (`float`), top_k_clusters (`int`): Cluster sampling of the low-resolution
                tokens: how many clusters stay, the temperature, and a second one inside the drawn cluster.
            direct_sr_temperature, direct_sr_cluster_temperature (`float`), direct_sr_top_k_clusters (`int`): Likewise
                for direct super-resolution.
            iterative_sr_temperature (`float`), iterative_sr_top_k (`int` or one per pass): Token sampling of iterative
                super-resolution.
            num_lopar_steps (`int`, *optional*): Passes of iterative super-resolution: fewer are faster; 0 leaves the
                stage out.
            max_batch_size (`int`, *optional*): Pictures that are computed at a time: on CUDA by default as many as the
                free memory has room for, else 8. When memory runs out, what is finished is kept, and the rest goes on
                with fewer at a time. It changes memory and speed only.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the token ids.
            return_dict (`bool`): Return a [`CogView2PipelineOutput`] rather than a tuple.
            return_statistics (`bool`): Measure seconds and peak memory of each stage; they are in the output's
                `statistics`.
            callback_on_step_end (*optional*):
                Called as `callback(pipe, step, timestep, kwargs)` after every token and every pass of a batch: `step`
                counts through the whole picture, `timestep` through the stage, and `kwargs` holds `"stage"`
                (`"transformer"`, `"direct_sr_transformer"` or `"iterative_sr_transformer"`), `"image_indices"`
                (which pictures these are; of the candidates, in the first stage, if there are), and the tensors asked
                for. A dictionary that it returns may hold other `"tokens"` to go on with; of those that CogLM writes,
                it reads only the latest. A batch for which memory runs out begins again.
            callback_on_step_end_tensor_inputs (list of `str`): Of `("tokens",)`: `(batch_size, rows, columns)`, -1
                where still unknown.

        Raises:
            ValueError: If an argument cannot be used; the message says which and why.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        settings = self._settings(style, locals())
        check_choice("output_type", output_type, OUTPUT_TYPES)
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        if scorer is not None and num_candidates is None:
            raise ValueError("`scorer` has nothing to choose from without `num_candidates`. Set it.")
        prompts, num_kept, num_candidates, max_batch_size = self._check_inputs(
            prompt, num_images_per_prompt, num_candidates, max_batch_size
        )
        super_resolve = self._check_size(height, width)
        negatives = self._encode_negative_prompts(negative_prompt, len(prompts), settings.guidance_scale)
        prompts = translate(prompts, prompt_translator)
        texts = self._encode_prompts(prompts, style, super_resolve)
        stages = self._stages(settings) if super_resolve else []
        num_drafts = len(prompts) * (num_candidates or num_kept)
        drafts = Pictures(
            [text for text in texts for _ in range(num_drafts // len(texts))],
            None if negatives is None else [text for text in negatives for _ in range(num_drafts // len(texts))],
            one_generator_per_image(generator, num_drafts),
        )
        draft_size = self._batch_size(max_batch_size, self.transformer, copies=1 if negatives is None else 2)
        sizes = {stage.name: self._batch_size(max_batch_size, getattr(self, stage.name)) for stage in stages}
        total = self.layout.image_length * len(slices(num_drafts, draft_size))
        total += sum(stage.num_steps * len(slices(len(prompts) * num_kept, sizes[stage.name])) for stage in stages)
        with self._running(
            total=total,
            return_statistics=return_statistics,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        ) as call:
            tokens = self._draft(call, drafts, settings, draft_size)
            pictures, scores = drafts, None
            if num_candidates is not None:
                with call.measure("transformer"):
                    chosen, scores = self._select(tokens, prompts, num_kept, scorer, draft_size)
                tokens, pictures = tokens[chosen], drafts.only(chosen)
            # stage by stage, so that offloading moves the weights of each only once
            num_done = self.layout.image_length
            for stage in stages:
                tokens = self._refine(call, pictures, stage, tokens, num_done, sizes[stage.name])
                num_done += stage.num_steps
            with call.measure("vqvae"):
                images = self._decode(tokens, output_type)
        output = CogView2PipelineOutput(
            images=images,
            tokens=tokens,
            seeds=[generator.initial_seed() for generator in pictures.generators],
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
        style: str | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | Sequence[str] = "",
        max_batch_size: int | None = None,
        **settings,
    ) -> dict:
        """
        Raise the error that a call with these arguments would raise, without computing anything.

        Args:
            prompt, num_images_per_prompt, num_candidates, style, height, width, negative_prompt, max_batch_size:
                As for `__call__`.
            settings: The call's settings of sampling.

        Returns:
            `dict`: Style, size, negative prompt and settings that the call would use: those given, else the style's,
            else the defaults; `None` for what its scheduler decides. With them, `__call__` makes the same pictures.

        Raises:
            TypeError: If there is no such setting.
            ValueError: If an argument cannot be used; the message says which and why.
        """
        unknown = sorted(set(settings) - set(SamplingSettings.declared()))
        if unknown:
            raise TypeError(f"There are no settings {unknown}. Known: {list(SamplingSettings.declared())}.")
        used = self._settings(style, settings)
        prompts, *_ = self._check_inputs(prompt, num_images_per_prompt, num_candidates, max_batch_size)
        super_resolve = self._check_size(height, width)
        if super_resolve:
            self._stages(used)
        self._encode_negative_prompts(negative_prompt, len(prompts), used.guidance_scale)
        self._encode_prompts(prompts, style, super_resolve)
        height, width = self.sizes[int(super_resolve)]
        return {
            "style": self.config.default_style if style is None else style,
            "height": height,
            "width": width,
            "negative_prompt": negative_prompt,
            **asdict(used),
        }

    @property
    def _low_resolution(self) -> dict:
        """See [`AttentionMixin`]."""
        return dict(zip(("height", "width"), self.sizes[0], strict=True))

    def _written_sequence(
        self, prompt: str, tokens: torch.Tensor, call: dict
    ) -> tuple[sequences.TokenSequence, list[int], float]:
        """See [`AttentionMixin`]."""
        style = call.get("style")
        (ids,) = self._encode_prompts([prompt], style, False)
        bias = self._settings(style, call).text_attention_bias
        return sequences.text_to_image([ids], self.layout, tokens), ids, bias

    # Stages ----------------------------------------------------------------------------------------------------------

    def _draft(self, call: Call, drafts: Pictures, settings: SamplingSettings, batch_size: int) -> torch.Tensor:
        """Low-resolution tokens of all drafts, `(num_drafts, rows, columns)`."""
        layout, num_steps = self.layout, self.layout.image_length
        sampler, device = self._cluster_sampler(settings), self._device_of(self.transformer)

        def draft(part: slice) -> torch.Tensor:
            own = drafts.only(range(part.start, part.stop))
            with call.batch(list(range(part.start, part.stop))) as notify, call.measure("transformer"):

                def report(step: int, entries: torch.Tensor) -> torch.Tensor | None:
                    changed = notify("transformer", step, entries.unflatten(1, layout.image_grid))
                    return None if changed is None else changed.flatten(1)

                contexts, repeats = own.contexts()
                return generate(
                    self.transformer,
                    sequences.text_to_image(contexts, layout),
                    sampler,
                    torch.full((len(own.texts), num_steps), TO_GENERATE),
                    layout.image_positions,
                    num_images_per_context=repeats,
                    text_attention_bias=settings.text_attention_bias,
                    guidance_scale=None if own.negatives is None else settings.guidance_scale,
                    generator=own.generators,
                    device=device,
                    decoding=self._decoding,
                    row_length=layout.image_grid[1],
                    callback=report,
                    on_pass=functools.partial(call.count_pass, "transformer"),
                )

        return _in_batches(draft, call, drafts.generators, batch_size, num_steps).unflatten(1, layout.image_grid)

    def _refine(
        self, call: Call, pictures: Pictures, stage: Stage, tokens: torch.Tensor, num_done: int, batch_size: int
    ) -> torch.Tensor:
        """Tokens of all pictures after a stage of super-resolution; `num_done` steps were before it."""

        def refine(part: slice) -> torch.Tensor:
            with call.batch(list(range(part.start, part.stop)), num_done) as notify:
                batch = Batch(pictures.texts[part], pictures.generators[part], notify)
                return self._super_resolve([stage], batch, tokens[part])

        return _in_batches(refine, call, pictures.generators, batch_size, stage.num_steps)

    def _select(
        self,
        tokens: torch.Tensor,
        prompts: list[str],
        num_kept: int,
        scorer: Scorer | None,
        batch_size: int,
    ) -> tuple[list[int], list[float]]:
        """Indices of the `num_kept` best drafts of each prompt, best first, and their scores."""
        num_candidates = len(tokens) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(num_candidates)]
        if scorer is None:
            scores = -caption_losses(
                self.transformer,
                self.tokenizer,
                tokens,
                [self.tokenizer.known_text(prompt) for prompt in repeated],
                max_batch_size=batch_size,
                device=self._device_of(self.transformer),
            )
        else:
            scores = scorer(self._decode(tokens, "pil"), repeated)
            scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
            if scores.shape != (len(repeated),) or scores.isnan().any():
                raise ValueError(
                    f"`scorer` must return a number for each of the {len(repeated)} drafts, but returned {scores}."
                )
        order = scores.view(len(prompts), num_candidates).argsort(dim=1, descending=True, stable=True)
        order = order[:, :num_kept]
        chosen = (order + num_candidates * torch.arange(len(prompts))[:, None]).flatten()
        return chosen.tolist(), scores[chosen].tolist()

    # Arguments -------------------------------------------------------------------------------------------------------

    def _check_inputs(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int,
        num_candidates: int | None,
        max_batch_size: int | None,
    ) -> tuple[list[str], int, int | None, int | None]:
        """These arguments, the prompts as a list and the numbers as plain ones, if they can be used."""
        prompts = check_prompts(prompt)
        (num_images_per_prompt,) = check_numbers_drawn(len(prompts), num_images_per_prompt=num_images_per_prompt)
        (num_candidates,) = check_numbers_drawn(len(prompts), num_candidates=num_candidates)
        (max_batch_size,) = check_counts(max_batch_size=max_batch_size)
        if num_candidates is not None and num_candidates < num_images_per_prompt:
            raise ValueError(
                f"`num_candidates` must be at least `num_images_per_prompt` ({num_images_per_prompt}), the number of "
                f"pictures that are kept, but is {num_candidates}."
            )
        return prompts, num_images_per_prompt, num_candidates, max_batch_size

    def _check_size(self, height: int | None, width: int | None) -> bool:
        """Whether to super-resolve."""
        sizes = self.sizes
        wanted = (sizes[-1][0] if height is None else height, sizes[-1][1] if width is None else width)
        if (height is None) != (width is None):  # the other side follows, where only one size has this one
            fitting = [size for size in sizes if size[0] == height or size[1] == width]
            wanted = fitting[-1] if fitting else wanted
        if wanted not in sizes:
            possible = " or ".join(f"{h} x {w}" for h, w in sizes)
            raise ValueError(
                f"`height` x `width` must be {possible} with this model, but is {wanted[0]} x {wanted[1]}."
            )
        return sizes.index(wanted) == 1


def _in_batches(
    work: Callable[[slice], torch.Tensor],
    call: Call,
    generators: list[torch.Generator],
    batch_size: int,
    num_steps: int,
) -> torch.Tensor:
    """Tokens of all pictures of a stage. Each batch takes `num_steps` steps."""

    def expect_more(num_batches: int) -> None:
        call.expect(num_batches * num_steps)

    return torch.cat(
        run_in_batches(work, len(generators), batch_size, generators=generators, on_more_batches=expect_more)
    )


CogView2Pipeline.__module__ = "cogview_pipelines"
