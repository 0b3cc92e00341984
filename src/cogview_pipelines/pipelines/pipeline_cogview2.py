"""Text to image with CogView2."""

import functools
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizer

from .. import sequences
from ..generation import TO_GENERATE, generate, refine
from ..sampling import Generators, sample_cluster_tokens
from ..schedulers.scheduling_lopar import LoPARScheduler
from .pipeline_output import CogView2PipelineOutput

logger = logging.get_logger(__name__)

# The released values; a style preset or a call argument overrides them. Super-resolution defaults are its schedulers'
# own.
DEFAULT_SETTINGS = {
    "text_attention_bias": 1.4,
    "temperature": 1.15,
    "top_k_clusters": 16,
    "cluster_temperature": 1.0,
    "direct_sr_temperature": None,
    "direct_sr_top_k_clusters": None,
    "direct_sr_cluster_temperature": None,
    "iterative_sr_temperature": None,
    "iterative_sr_top_k": None,
    "num_lopar_steps": None,
}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_MAX_BATCH_SIZE = 8


class CogView2Pipeline(DiffusionPipeline):
    """
    Pictures from Chinese and English prompts: CogLM writes low-resolution tokens, direct super-resolution enlarges
        them in one pass, and
    iterative super-resolution (LoPAR) refines them in a few.

    Args:
        tokenizer ([`IcetkTokenizer`]): Text to ids.
        transformer ([`CogLMModel`]): CogLM.
        vqvae ([`IcetkVQModel`]): Tokens to pixels; holds the cluster labels of its codebook.
        direct_sr_transformer, iterative_sr_transformer ([`CogLMModel`], *optional*): The other two stages; without
        them, pictures are low
            resolution.
        direct_sr_scheduler, iterative_sr_scheduler ([`LoPARScheduler`], *optional*): Which cells in which pass, and
        how they are drawn.
        compression_rate (`int`): Pixels per token along each side.
        styles (`dict[str, dict]`): Presets: the `suffix` that is added to the prompt (a string, or one for each of
            `"en"` and `"zh"`), and
            any settings of `__call__`.
        default_style (`str`, *optional*): The preset used when a call names none.

    Source: https://arxiv.org/abs/2204.14217.
    """

    model_cpu_offload_seq = "transformer->direct_sr_transformer->iterative_sr_transformer->vqvae"
    _optional_components = (
        "direct_sr_transformer",
        "iterative_sr_transformer",
        "direct_sr_scheduler",
        "iterative_sr_scheduler",
    )
    _callback_tensor_inputs = ("tokens",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        transformer: PreTrainedModel,
        vqvae: PreTrainedModel,
        direct_sr_transformer: PreTrainedModel | None = None,
        iterative_sr_transformer: PreTrainedModel | None = None,
        direct_sr_scheduler: LoPARScheduler | None = None,
        iterative_sr_scheduler: LoPARScheduler | None = None,
        compression_rate: int = 8,
        styles: dict[str, dict] | None = None,
        default_style: str | None = None,
    ):
        super().__init__()
        if direct_sr_transformer is not None and direct_sr_transformer.config.shares_backbone:
            direct_sr_transformer.share_backbone(transformer)
        self.register_modules(
            tokenizer=tokenizer,
            transformer=transformer,
            vqvae=vqvae,
            direct_sr_transformer=direct_sr_transformer,
            iterative_sr_transformer=iterative_sr_transformer,
            direct_sr_scheduler=direct_sr_scheduler,
            iterative_sr_scheduler=iterative_sr_scheduler,
        )
        self.register_to_config(compression_rate=compression_rate, styles=styles or {}, default_style=default_style)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @property
    def layout(self) -> sequences.SequenceLayout:
        """Where things stand in the transformer's sequences."""
        return self.transformer.config.layout

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the pictures this pipeline can make: low resolution, then super-resolved."""
        rate = self.config.compression_rate
        grids = [self.transformer.config.image_grid]
        if self.direct_sr_transformer is not None:
            grids.append(self.direct_sr_transformer.config.fine_grid)
        return [(rows * rate, columns * rate) for rows, columns in grids]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        style: str | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
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
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> CogView2PipelineOutput | tuple:
        """
        Make pictures.

        Settings left out are those of the style, and else the pipeline's defaults (the released values).

        Args:
            prompt (`str` or list of `str`): One text or many, Chinese and English, of any lengths that fit.
            num_images_per_prompt (`int`): Any number; they come prompt by prompt.
            style (`str`, *optional*): A name in `pipe.config.styles`; default: `pipe.config.default_style`.
            height, width (`int`, *optional*): One of `pipe.sizes`, in pixels; default: the largest.
            generator (`torch.Generator` or list of them, *optional*):
                One for all pictures, or one per picture. The picture of a generator is the same alone and in any
                batch.
            text_attention_bias (`float`): Added to the attention scores of the text; higher follows the prompt more
                closely.
            temperature, cluster_temperature (`float`), top_k_clusters (`int`): Cluster sampling of the low-resolution
                tokens: how many
                clusters stay, the temperature, and a second one that applies inside the drawn cluster.
            direct_sr_temperature, direct_sr_cluster_temperature (`float`), direct_sr_top_k_clusters (`int`): Likewise
                for direct
                super-resolution.
            iterative_sr_temperature (`float`), iterative_sr_top_k (`int` or one per pass): Token sampling of iterative
                super-resolution.
            num_lopar_steps (`int`, *optional*): Passes of iterative super-resolution: fewer are faster; 0 leaves the
                stage out.
            max_batch_size (`int`, defaults to 8): Pictures that are computed at a time. It changes memory and speed
                only.
            output_type (`str`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the token ids.
            return_dict (`bool`): Return a [`CogView2PipelineOutput`] rather than a tuple.
            callback_on_step_end (*optional*):
                Called as `callback(pipe, step, timestep, kwargs)` after every token and every pass: `step` counts
                through the whole
                picture, `timestep` through the stage, and `kwargs` holds `"stage"` (`"transformer"`,
                `"direct_sr_transformer"` or
                `"iterative_sr_transformer"`) and the tensors asked for.
            callback_on_step_end_tensor_inputs (list of `str`): Of `("tokens",)`: `(batch_size, rows, columns)`, -1
            where still unknown.

        Raises:
            ValueError: If an argument cannot be used; the message says which and why.
        """
        prompts = self._check_inputs(
            prompt, num_images_per_prompt, output_type, max_batch_size, callback_on_step_end_tensor_inputs
        )
        super_resolve = self._check_size(height, width)
        settings = self._settings(
            style,
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
        texts = self._encode_prompts(prompts, style, super_resolve)
        texts = [text for text in texts for _ in range(num_images_per_prompt)]
        generators = _one_per_image(generator, len(texts))

        steps = self.layout.image_length + sum(len(scheduler.timesteps) for _, scheduler in schedulers)
        batch_size = max_batch_size or DEFAULT_MAX_BATCH_SIZE
        batches = [slice(start, start + batch_size) for start in range(0, len(texts), batch_size)]
        tokens = []
        with self.progress_bar(total=steps * len(batches)) as progress:
            for batch in batches:
                notify = _Notifier(self, progress, callback_on_step_end, callback_on_step_end_tensor_inputs)
                tokens.append(self._make_tokens(texts[batch], generators[batch], settings, schedulers, notify))
        tokens = torch.cat(tokens)
        images = self._decode(tokens, output_type, batch_size)
        self.maybe_free_model_hooks()
        seeds = [generator.initial_seed() for generator in generators]
        if not return_dict:
            return images, tokens, seeds
        return CogView2PipelineOutput(images=images, tokens=tokens, seeds=seeds)

    def check_inputs(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        style: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_batch_size: int | None = None,
        **settings,
    ) -> dict:
        """
        Raise the error that a call with these arguments would raise, without computing anything.

        Args:
            prompt, num_images_per_prompt, style, height, width, max_batch_size: As for `__call__`.
            settings: The call's settings of sampling.

        Returns:
            `dict`: Style, size and settings that the call would use: those given, else the style's, else the defaults;
            `None` for what its scheduler decides. Passed to `__call__`, they give the same pictures.

        Raises:
            TypeError: If there is no such setting.
            ValueError: If an argument cannot be used; the message says which and why.
        """
        unknown = sorted(set(settings) - set(DEFAULT_SETTINGS))
        if unknown:
            raise TypeError(f"There are no settings {unknown}. Known: {list(DEFAULT_SETTINGS)}.")
        prompts = self._check_inputs(prompt, num_images_per_prompt, "pil", max_batch_size, ())
        super_resolve = self._check_size(height, width)
        used = self._settings(style, **settings)
        if super_resolve:
            self._schedulers(used)
        self._encode_prompts(prompts, style, super_resolve)
        height, width = self.sizes[int(super_resolve)]
        return {
            "style": self.config.default_style if style is None else style,
            "height": height,
            "width": width,
            **used,
        }

    # Stages ----------------------------------------------------------------------------------------------------------

    def _make_tokens(
        self,
        texts: list[list[int]],
        generators: list[torch.Generator],
        settings: dict,
        schedulers: list[tuple[str, LoPARScheduler]],
        notify: "_Notifier",
    ) -> torch.Tensor:
        """All stages for one batch of pictures: `(batch_size, rows, columns)` tokens."""
        layout, device = self.layout, self._execution_device
        cluster_labels = self.vqvae.cluster_labels.to(device)
        num_clusters = self.vqvae.config.num_clusters
        sampler = functools.partial(
            sample_cluster_tokens,
            cluster_labels=cluster_labels,
            num_clusters=num_clusters,
            temperature=settings["temperature"],
            top_k_clusters=settings["top_k_clusters"],
            cluster_temperature=settings["cluster_temperature"],
        )
        unique, repeats = _run_lengths(texts)
        tokens = generate(
            self.transformer,
            sequences.text_to_image(unique, layout),
            sampler,
            torch.full((len(texts), layout.image_length), TO_GENERATE),
            layout.image_positions,
            num_images_per_context=repeats,
            text_attention_bias=settings["text_attention_bias"],
            generator=generators,
            device=device,
            callback=lambda step, entries: notify("transformer", step, entries.unflatten(1, layout.image_grid)),
        )
        tokens = tokens.unflatten(1, layout.image_grid)
        for stage, scheduler in schedulers:
            model = getattr(self, stage)
            slots = model.config.num_text_slots
            if model.config.super_resolution == "direct":
                cut = [text[: slots - 1] for text in texts]
                context, canvas = sequences.direct_super_resolution(cut, tokens.cpu(), slots, layout), None
            else:
                context, canvas = sequences.iterative_super_resolution(texts, slots), tokens
            tokens = refine(
                model,
                scheduler,
                context,
                canvas,
                cluster_labels=cluster_labels,
                generator=generators,
                device=device,
                callback=functools.partial(notify, stage),
            )
        return tokens

    def _decode(self, tokens: torch.Tensor, output_type: str, batch_size: int):
        if output_type == "latent":
            return tokens
        rate = self.config.compression_rate
        images = torch.cat([self.vqvae.decode(part, rate).sample for part in tokens.split(batch_size)])
        return self.image_processor.postprocess(images.float().clamp(0, 1), output_type)

    # Arguments -------------------------------------------------------------------------------------------------------

    def _check_inputs(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int,
        output_type: str,
        max_batch_size: int | None,
        tensor_inputs: Sequence[str],
    ) -> list[str]:
        """The prompts as a list, if all arguments can be used."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
        if not prompts or not all(text.strip() for text in prompts):
            raise ValueError(f"`prompt` must not be empty, but is {prompt!r}. Say what the picture shows.")
        for name, value in (("num_images_per_prompt", num_images_per_prompt), ("max_batch_size", max_batch_size)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, but is {value!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but is {output_type!r}.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {self._callback_tensor_inputs}, but names {unknown}."
            )
        return list(prompts)

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

    def _settings(self, style: str | None, **given) -> dict:
        """Call arguments over the style's settings over the defaults; nothing is kept for the next call."""
        preset = {name: value for name, value in self._preset(style).items() if name != "suffix"}
        unknown = set(preset) - set(DEFAULT_SETTINGS)
        if unknown:
            raise ValueError(
                f"The style {style or self.config.default_style!r} has unknown settings: {sorted(unknown)}."
            )
        settings = {
            **DEFAULT_SETTINGS,
            **preset,
            **{name: value for name, value in given.items() if value is not None},
        }
        for name, value in settings.items():
            if name.endswith("temperature") and value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, but is {value}.")
        if not settings["top_k_clusters"] >= 1:
            raise ValueError(f"`top_k_clusters` must be at least 1, but is {settings['top_k_clusters']}.")
        return settings

    def _preset(self, style: str | None) -> dict:
        style = self.config.default_style if style is None else style
        if style is None:
            return {}
        if style not in self.config.styles:
            raise ValueError(f"`style` must be one of {sorted(self.config.styles)}, but is {style!r}.")
        return self.config.styles[style]

    def _schedulers(self, settings: dict) -> list[tuple[str, LoPARScheduler]]:
        """The super-resolution stages of this call, with its settings in their schedulers."""
        direct = {
            "temperature": settings["direct_sr_temperature"],
            "top_k": settings["direct_sr_top_k_clusters"],
            "cluster_temperature": settings["direct_sr_cluster_temperature"],
        }
        stages = [("direct_sr_transformer", _configure(self.direct_sr_scheduler, direct))]
        num_steps = settings["num_lopar_steps"]
        if self.iterative_sr_transformer is not None and num_steps != 0:
            scheduler = self.iterative_sr_scheduler
            if num_steps is not None:
                scheduler = scheduler.with_num_steps(num_steps)
            iterative = {"temperature": settings["iterative_sr_temperature"], "top_k": settings["iterative_sr_top_k"]}
            stages.append(("iterative_sr_transformer", _configure(scheduler, iterative)))
        return stages

    def _encode_prompts(self, prompts: list[str], style: str | None, super_resolve: bool) -> list[list[int]]:
        """Token ids of each prompt with the suffix of its style."""
        suffix = self._preset(style).get("suffix", "")
        texts, longest = [], self.transformer.config.max_text_tokens
        for prompt in prompts:
            own_suffix = suffix if isinstance(suffix, str) else suffix[self.tokenizer.language(prompt)]
            text = self.tokenizer.encode(prompt + own_suffix)
            if len(text) > longest:
                raise ValueError(
                    f"`prompt` may have {longest} tokens with its style, but {prompt!r} has {len(text)}. Shorten it."
                )
            texts.append(text)
        if super_resolve and max(map(len, texts)) >= self.direct_sr_transformer.config.num_text_slots:
            slots = self.direct_sr_transformer.config.num_text_slots - 1
            logger.warning(
                f"Direct super-resolution reads the first {slots} tokens of a prompt; the longest has more."
            )
        return texts


class _Notifier:
    """Counts the steps of one batch, for the progress bar and the caller's callback."""

    def __init__(self, pipe: CogView2Pipeline, progress, callback: Callable | None, tensor_inputs: Sequence[str]):
        self.pipe, self.progress, self.callback, self.tensor_inputs = pipe, progress, callback, tensor_inputs
        self.step = 0

    def __call__(self, stage: str, timestep: int, tokens: torch.Tensor) -> None:
        self.progress.update()
        if self.callback is not None:
            tensors = {"tokens": tokens} if "tokens" in self.tensor_inputs else {}
            self.callback(self.pipe, self.step, timestep, {"stage": stage, **tensors})
        self.step += 1


def _one_per_image(generator: Generators, num_images: int) -> list[torch.Generator]:
    """A generator for each picture: the caller's, or new ones whose seeds come from the caller's, or from chance."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != num_images or not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(
                f"`generator` must be one generator or one per picture ({num_images}), but is {generator}."
            )
        return list(generator)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, but is {generator!r}.")
    if generator is not None and num_images == 1:
        return [generator]
    source = None if generator is None else generator
    device = "cpu" if source is None else source.device
    seeds = [int(torch.randint(2**63 - 1, (), generator=source, device=device)) for _ in range(num_images)]
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _run_lengths(texts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Neighbouring equal texts as one, with their numbers: each is encoded once."""
    unique: list[list[int]] = []
    repeats: list[int] = []
    for text in texts:
        if unique and unique[-1] == text:
            repeats[-1] += 1
        else:
            unique.append(text)
            repeats.append(1)
    return unique, repeats


def _configure(scheduler: LoPARScheduler, changes: dict) -> LoPARScheduler:
    changes = {name: value for name, value in changes.items() if value is not None}
    return LoPARScheduler.from_config(scheduler.config, **changes) if changes else scheduler


CogView2Pipeline.__module__ = "cogview_pipelines"
