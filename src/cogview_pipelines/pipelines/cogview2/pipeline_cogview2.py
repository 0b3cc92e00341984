"""Text to image with CogView2."""

import functools
from collections.abc import Callable, Sequence

import PIL.Image
import torch

from ...evaluation.likelihood import caption_losses
from ...generation.batching import run_in_batches, slices
from ...generation.sampling import Generators
from ...generation.tokens import TO_GENERATE, generate
from ...models.cogview2 import sequences
from ..common.arguments import (
    PromptTranslator,
    check_counts,
    check_output_type,
    check_prompts,
    one_generator_per_image,
    run_lengths,
    translate,
)
from ..common.calls import Call
from ..common.notifier import Callback, Notifier, progress_of_success
from ..common.previews import PreviewMixin
from .base import DEFAULT_SETTINGS, CogView2PipelineBase
from .outputs import CogView2PipelineOutput

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Scorer = Callable[[list[PIL.Image.Image], list[str]], Sequence[float]]


class CogView2Pipeline(PreviewMixin, CogView2PipelineBase):
    """
    Pictures from Chinese and English prompts: CogLM writes low-resolution tokens, direct super-resolution enlarges
    them in one pass, and iterative super-resolution (LoPAR) refines them in a few.

    Args:
        tokenizer ([`IcetkTokenizer`]): Text to ids.
        transformer ([`CogLMModel`]): CogLM.
        vqvae ([`IcetkVQModel`]): Tokens to pixels; holds the cluster labels of its codebook.
        direct_sr_transformer, iterative_sr_transformer ([`CogLMModel`], *optional*): The other two stages; without
            them, pictures are low resolution.
        direct_sr_scheduler, iterative_sr_scheduler ([`LoPARScheduler`], *optional*): Which cells in which pass, and
            how they are drawn.
        compression_rate (`int`): Pixels per token along each side.
        styles (`dict[str, dict]`): Presets: the `suffix` that is added to the prompt (a string, or one for each of
            `"en"` and `"zh"`), and any settings of `__call__`.
        default_style (`str`, *optional*): The preset used when a call names none.
        whole_pictures (`bool`, defaults to `False`): Whether CogLM was trained on whole pictures of one kind only, and
            makes little of parts of them: inpainting then shows it as much of the picture as fits into a square,
            rather than the surroundings of the mask.

    Source: https://arxiv.org/abs/2204.14217.
    """

    @torch.no_grad()
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
        negative_prompt: str = "",
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
            negative_prompt (`str`), guidance_scale (`float`, defaults to 1, no guidance):
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
                for. A batch for which memory runs out begins again.
            callback_on_step_end_tensor_inputs (list of `str`): Of `("tokens",)`: `(batch_size, rows, columns)`, -1
                where still unknown.

        Raises:
            ValueError: If an argument cannot be used; the message says which and why.
            GenerationInterrupted: If `pipe.interrupt` was set to True meanwhile.
        """
        prompts = self._check_inputs(prompt, num_images_per_prompt, num_candidates, max_batch_size)
        check_output_type(output_type, OUTPUT_TYPES)
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        if scorer is not None and num_candidates is None:
            raise ValueError("`scorer` has nothing to choose from without `num_candidates`. Set it.")
        super_resolve = self._check_size(height, width)
        settings = self._settings(
            style,
            guidance_scale=guidance_scale,
            text_attention_bias=text_attention_bias,
            temperature=temperature,
            top_k_clusters=top_k_clusters,
            cluster_temperature=cluster_temperature,
            direct_sr_temperature=direct_sr_temperature,
            direct_sr_top_k_clusters=direct_sr_top_k_clusters,
            direct_sr_cluster_temperature=direct_sr_cluster_temperature,
            iterative_sr_temperature=iterative_sr_temperature,
            iterative_sr_top_k=iterative_sr_top_k,
            num_lopar_steps=num_lopar_steps,
        )
        schedulers = self._schedulers(settings) if super_resolve else []
        negative = self._encode_negative_prompt(negative_prompt, settings["guidance_scale"])
        prompts = translate(prompts, prompt_translator)
        num_drafts = num_images_per_prompt if num_candidates is None else num_candidates
        texts = [text for text in self._encode_prompts(prompts, style, super_resolve) for _ in range(num_drafts)]
        generators = one_generator_per_image(generator, len(texts))

        num_images = len(prompts) * num_images_per_prompt
        num_draft_steps = self.layout.image_length
        draft_size = self._batch_size(max_batch_size, self.transformer, copies=1 if negative is None else 2)
        sizes = [self._batch_size(max_batch_size, getattr(self, stage)) for stage, _ in schedulers]
        passes = [len(scheduler.timesteps) for _, scheduler in schedulers]
        total = num_draft_steps * len(slices(len(texts), draft_size))
        total += sum(count * len(slices(num_images, size)) for count, size in zip(passes, sizes))
        scores = None
        with self._running(return_statistics) as call, self.progress_bar(total=total) as progress:
            notify = functools.partial(
                Notifier, call, progress, callback_on_step_end, callback_on_step_end_tensor_inputs
            )

            def draft(batch: slice) -> torch.Tensor:
                notifier = notify(image_indices=list(range(batch.start, batch.stop)))
                with progress_of_success(progress):
                    return self._draft(texts[batch], negative, generators[batch], settings, call, notifier)

            tokens = self._batches(draft, draft_size, generators, progress, num_draft_steps)
            if num_candidates is not None:
                with call.measure("transformer"):
                    chosen, scores = self._select(tokens, prompts, num_images_per_prompt, scorer, draft_size)
                tokens = tokens[chosen]
                texts, generators = ([values[index] for index in chosen] for values in (texts, generators))
            # stage by stage, so that offloading moves the weights of each only once
            done = num_draft_steps
            for stage, size, count in zip(schedulers, sizes, passes):

                def refine(batch: slice, tokens=tokens, stage=stage, done=done) -> torch.Tensor:
                    notifier = notify(image_indices=list(range(batch.start, batch.stop)), step=done)
                    with progress_of_success(progress):
                        return self._super_resolve(
                            texts[batch], tokens[batch], generators[batch], [stage], call, notifier
                        )

                tokens = self._batches(refine, size, generators, progress, count)
                done += count
            with call.measure("vqvae"):
                images = self._decode(tokens, output_type)
            output = CogView2PipelineOutput(
                images=images,
                tokens=tokens,
                seeds=[generator.initial_seed() for generator in generators],
                prompts=[prompt for prompt in prompts for _ in range(num_images_per_prompt)],
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
        negative_prompt: str = "",
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
        unknown = sorted(set(settings) - set(DEFAULT_SETTINGS))
        if unknown:
            raise TypeError(f"There are no settings {unknown}. Known: {list(DEFAULT_SETTINGS)}.")
        prompts = self._check_inputs(prompt, num_images_per_prompt, num_candidates, max_batch_size)
        super_resolve = self._check_size(height, width)
        used = self._settings(style, **settings)
        if super_resolve:
            self._schedulers(used)
        self._encode_negative_prompt(negative_prompt, used["guidance_scale"])
        self._encode_prompts(prompts, style, super_resolve)
        height, width = self.sizes[int(super_resolve)]
        return {
            "style": self.config.default_style if style is None else style,
            "height": height,
            "width": width,
            "negative_prompt": negative_prompt,
            **used,
        }

    # Stages ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _batches(
        work: Callable[[slice], torch.Tensor],
        batch_size: int,
        generators: list[torch.Generator],
        progress,
        num_steps: int,
    ) -> torch.Tensor:
        """Tokens of all pictures of a stage, each of whose batches takes so many steps."""

        def lengthen(num_batches: int) -> None:
            progress.total += num_batches * num_steps

        return torch.cat(
            run_in_batches(work, len(generators), batch_size, generators=generators, on_more_batches=lengthen)
        )

    def _draft(
        self,
        texts: list[list[int]],
        negative: list[int] | None,
        generators: list[torch.Generator],
        settings: dict,
        call: Call,
        notify: Notifier,
    ) -> torch.Tensor:
        """Low-resolution tokens of one batch of pictures: `(batch_size, rows, columns)`."""
        layout = self.layout
        unique, repeats = run_lengths(texts)
        contexts = unique if negative is None else unique + [negative] * len(unique)
        with call.measure("transformer"):
            tokens = generate(
                self.transformer,
                sequences.text_to_image(contexts, layout),
                self._cluster_sampler(settings),
                torch.full((len(texts), layout.image_length), TO_GENERATE),
                layout.image_positions,
                num_images_per_context=repeats,
                text_attention_bias=settings["text_attention_bias"],
                guidance_scale=None if negative is None else settings["guidance_scale"],
                generator=generators,
                device=self._device_of(self.transformer),
                callback=lambda step, entries: notify("transformer", step, entries.unflatten(1, layout.image_grid)),
            )
        return tokens.unflatten(1, layout.image_grid)

    def _select(
        self, tokens: torch.Tensor, prompts: list[str], num_kept: int, scorer: Scorer | None, batch_size: int
    ) -> tuple[list[int], list[float]]:
        """Indices of the `num_kept` best drafts of each prompt, best first, and their scores."""
        num_candidates = len(tokens) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(num_candidates)]
        if scorer is None:
            scores = -caption_losses(
                self.transformer,
                self.tokenizer,
                tokens,
                repeated,
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
    ) -> list[str]:
        """The prompts as a list, if these arguments can be used."""
        prompts = check_prompts(prompt)
        check_counts(
            num_images_per_prompt=num_images_per_prompt, num_candidates=num_candidates, max_batch_size=max_batch_size
        )
        if num_candidates is not None and num_candidates < num_images_per_prompt:
            raise ValueError(
                f"`num_candidates` must be at least `num_images_per_prompt` ({num_images_per_prompt}), the number of "
                f"pictures that are kept, but is {num_candidates}."
            )
        return prompts

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


CogView2Pipeline.__module__ = "cogview_pipelines"
