"""What the pipelines share: components, settings, text, and the stages of super-resolution."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizer

from ...generation.canvas import refine
from ...generation.sampling import Generators, sample_cluster_tokens
from ...generation.tokens import Sampler
from ...models.cogview2 import sequences
from ...schedulers.scheduling_lopar import LoPARScheduler
from .memory import execution_device, pictures_that_fit
from .offloading import offload_stages
from .outputs import StageStatistics
from .statistics import Meter

logger = logging.get_logger(__name__)

# The released values; a style preset or a call argument overrides them. Super-resolution defaults are its schedulers'
# own.
DEFAULT_SETTINGS = {
    "text_attention_bias": 1.4,
    "guidance_scale": 1.0,
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

Callback = Callable[[DiffusionPipeline, int, int, dict], None]
PromptTranslator = Callable[[str], str]


class GenerationInterrupted(RuntimeError):
    """A call was stopped from outside, by `pipe.interrupt = True`; nothing of it is kept."""


class CogView2PipelineBase(DiffusionPipeline):
    """
    Components and stages of the pipelines that make pictures; [`CogView2Pipeline`] describes the arguments.

    All of these pipelines can be made from one another by `from_pipe`, which shares the components.
    """

    model_cpu_offload_seq = "transformer->direct_sr_transformer->iterative_sr_transformer"
    _optional_components = [  # noqa: RUF012 - diffusers adds lists to it
        "direct_sr_transformer",
        "iterative_sr_transformer",
        "direct_sr_scheduler",
        "iterative_sr_scheduler",
    ]
    _callback_tensor_inputs = ("tokens",)
    # Offload leaves the image tokenizer on the device: it is small, and previews need it while another model works.
    _exclude_from_cpu_offload = ["vqvae"]  # noqa: RUF012 - diffusers takes a list
    _interrupt = False
    _meter: Meter | None = None

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
        whole_pictures: bool = False,
    ):
        super().__init__()
        if direct_sr_transformer is not None and direct_sr_transformer.config.shares_backbone:
            if transformer is None:
                raise ValueError(
                    "`transformer` must be given: the `direct_sr_transformer` has no backbone of its own."
                )
            own = direct_sr_transformer.canvas_position_embeddings.weight.device
            if own != transformer.device:
                raise ValueError(
                    f"`transformer` and `direct_sr_transformer` share weights and must be on one device, but are on "
                    f"{transformer.device} and {own}. Leave `device_map='balanced'` out, or move one of them."
                )
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
        self.register_to_config(
            compression_rate=compression_rate,
            styles=styles or {},
            default_style=default_style,
            whole_pictures=whole_pictures,
        )
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "CogView2PipelineBase":
        """
        This pipeline with the components of another one: the same objects, so that nothing is loaded or copied.

        Unlike that of diffusers, which makes everything float32 by default, this leaves the number format of the
        shared weights alone.

        Args:
            pipeline (`DiffusionPipeline`): One of this package's pipelines.
            kwargs: Components and settings to replace.

        Raises:
            ValueError: If the other pipeline lacks a component that this one needs.
        """
        names, settings = cls._get_signature_keys(cls)
        config = dict(pipeline.config)
        # what an earlier `from_pipe` had no use for is kept with an underscore, and taken up again
        found = {name.removeprefix("_"): value for name, value in config.items()}
        found.update(pipeline.components)
        given = {name: found[name] for name in (*names, *settings) if name in found} | kwargs
        missing = [name for name in names if given.get(name) is None and name not in cls._optional_components]
        if missing:
            raise ValueError(
                f"`pipeline` must have {names} for a `{cls.__name__}`, but this `{type(pipeline).__name__}` lacks "
                f"{missing}. Pass them by name."
            )
        new = cls(**given)
        unused = {name for name in config if name not in given and name not in pipeline.components}
        new.register_to_config(**{f"_{name.removeprefix('_')}": config[name] for name in unused})
        return new

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "CogView2PipelineBase":
        """
        Load a saved pipeline, as [`DiffusionPipeline.from_pretrained`] does.

        Args:
            pretrained_model_name_or_path (`str` or path): A folder, or an id on the Hub.
            dtype (`torch.dtype`, `dict` or `"auto"`, defaults to `torch.float32`): Number format of the weights,
                whatever that of the files: one for all, or one for each component by name. `"auto"` takes that of the
                files.
            quantization_config (*optional*): How the weights of the stages are quantised: a `TorchAoConfig` or
                `BitsAndBytesConfig` of transformers for all of them, or a `PipelineQuantizationConfig` of diffusers.
            kwargs: Further arguments of diffusers; `device_map="cuda"` loads straight to the GPU.
        """
        quantization = kwargs.get("quantization_config")
        if quantization is not None and not isinstance(quantization, PipelineQuantizationConfig):
            stages = dict.fromkeys(cls.model_cpu_offload_seq.split("->"), quantization)
            kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping=stages)
        dtype = kwargs.pop("dtype", None)
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        dtype = torch.float32 if dtype is None else None if dtype == "auto" else dtype
        return super().from_pretrained(pretrained_model_name_or_path, dtype=dtype, **kwargs)

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

    # Memory ----------------------------------------------------------------------------------------------------------

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """
        Keep the weights in main memory, and those of one stage at a time on the GPU, as diffusers does.

        A backbone that two stages share goes there once for both.
        """
        super().enable_model_cpu_offload(gpu_id, device)
        offload_stages(self._models)

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        *args,
        exclude_modules: str | Sequence[str] | None = None,
        offload_to_disk_path: str | None = None,
        **kwargs,
    ) -> None:
        """
        Keep the weights in main memory, and a few layers on the GPU at a time, as diffusers does.

        Args:
            onload_device (`torch.device`): The GPU.
            exclude_modules (list of `str`, *optional*): Components that stay on the GPU, besides the image tokenizer.
            args, offload_to_disk_path, kwargs: Further arguments of diffusers.

        Raises:
            ValueError: If the weights are to be kept on disk: diffusers would give the layers of all stages the same
                names there.
        """
        if offload_to_disk_path is not None:
            raise ValueError(
                f"`offload_to_disk_path` must be left out, but is {str(offload_to_disk_path)!r}: one stage would read "
                "the files of another. Without a backbone that two share, call "
                "`diffusers.hooks.apply_group_offloading` for each component, with a folder of its own."
            )
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        excluded += [name for name in self._exclude_from_cpu_offload if name not in excluded]
        super().enable_group_offload(torch.device(onload_device), *args, exclude_modules=excluded, **kwargs)

    def remove_all_hooks(self) -> None:
        super().remove_all_hooks()
        direct = getattr(self, "direct_sr_transformer", None)
        if direct is not None and direct.config.shares_backbone:
            direct.share_backbone(
                self.transformer
            )  # the hooks of single layers leave each model parameters of its own

    def _device_of(self, model: PreTrainedModel) -> torch.device:
        """Where a component computes."""
        return execution_device(model, lambda: self._execution_device)

    def _batch_size(self, max_batch_size: int | None, model: PreTrainedModel, copies: int = 1) -> int:
        """How many pictures a stage works on at a time: what the caller says, else what fits."""
        if max_batch_size is not None:
            return max_batch_size
        return pictures_that_fit(model, self._device_of(model), self._models, copies)

    @property
    def _models(self) -> list[torch.nn.Module]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    # Calls -----------------------------------------------------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        """
        Set it to True, from a callback or another thread, to stop a call at its next step: it then raises
        [`GenerationInterrupted`]. A new call sets it back.
        """
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = bool(value)

    def _stop_if_interrupted(self) -> None:
        if self._interrupt:
            raise GenerationInterrupted("The call was stopped, because `interrupt` was set to True.")

    @contextlib.contextmanager
    def _running(self, return_statistics: bool) -> Iterator[dict[str, StageStatistics] | None]:
        """The computing part of a call, after which all is as before; gives its statistics if they are asked for."""
        self._interrupt = False
        self._meter = Meter() if return_statistics else None
        try:
            yield self._meter.stages if return_statistics else None
        finally:
            self._meter = None
            self.maybe_free_model_hooks()

    def _measure(self, stage: str) -> contextlib.AbstractContextManager:
        """What runs inside belongs to a stage, which bears the name of its component."""
        if self._meter is None:
            return contextlib.nullcontext()
        return self._meter.measure(stage, self._device_of(getattr(self, stage)))

    # Stages ----------------------------------------------------------------------------------------------------------

    def _cluster_sampler(self, settings: dict) -> Sampler:
        """The sampler of the low-resolution tokens."""
        return functools.partial(
            sample_cluster_tokens,
            cluster_labels=self.vqvae.cluster_labels.to(self._device_of(self.transformer)),
            num_clusters=self.vqvae.config.num_clusters,
            temperature=settings["temperature"],
            top_k_clusters=settings["top_k_clusters"],
            cluster_temperature=settings["cluster_temperature"],
        )

    def _super_resolve(
        self,
        texts: list[list[int]],
        tokens: torch.Tensor,
        generators: list[torch.Generator],
        schedulers: list[tuple[str, LoPARScheduler]],
        notify: "Notifier",
        known: torch.Tensor | None = None,
        cell_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Low-resolution tokens to fine ones, `(batch_size, rows, columns)` each.

        With `known` fine tokens and a `cell_mask` of shape `(rows, columns)`, only cells in the mask are new.
        """
        for stage, scheduler in schedulers:
            model = getattr(self, stage)
            slots = model.config.num_text_slots
            direct = model.config.super_resolution == "direct"
            if direct:
                cut = [text[: slots - 1] for text in texts]
                context = sequences.direct_super_resolution(cut, tokens.cpu(), slots, model.config.layout)
            else:
                context = sequences.iterative_super_resolution(texts, slots)
            device = self._device_of(model)
            with self._measure(stage):
                tokens = refine(
                    model,
                    scheduler,
                    context,
                    None if direct else tokens,
                    cluster_labels=self.vqvae.cluster_labels.to(device),
                    cell_mask=None if direct else cell_mask,
                    generator=generators,
                    device=device,
                    callback=functools.partial(notify, stage),
                )
            if direct and known is not None:  # direct super-resolution reads no fine tokens
                tokens = torch.where(cell_mask.to(tokens.device), tokens, known.to(tokens.device))
        return tokens

    def _decode_pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(num_images, rows, columns)` tokens to float32 pixels in [0, 1], `(num_images, 3, height, width)`."""
        rate, device = self.config.compression_rate, self._device_of(self.vqvae)
        with self._measure("vqvae"):
            # one by one: rounding depends on the size of a batch, and a pixel could differ from that of the picture
            # alone
            images = torch.cat([self.vqvae.decode(part.to(device), rate).sample for part in tokens.split(1)])
            return images.float().clamp(0, 1)

    def _decode(self, tokens: torch.Tensor, output_type: str):
        if output_type == "latent":
            return tokens
        return self.image_processor.postprocess(self._decode_pixels(tokens), output_type)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], `(num_images, 3, height, width)`, to `(num_images, rows, columns)` tokens."""
        pixels = pixels.to(self._device_of(self.vqvae), self.vqvae.dtype)
        with self._measure("vqvae"):
            return self.vqvae.encode(pixels, self.config.compression_rate).tokens

    # Arguments -------------------------------------------------------------------------------------------------------

    def _check_tensor_inputs(self, tensor_inputs: Sequence[str]) -> None:
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {self._callback_tensor_inputs}, but names {unknown}."
            )

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
        if not settings["guidance_scale"] >= 0:
            raise ValueError(f"`guidance_scale` must not be negative, but is {settings['guidance_scale']}.")
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
        model = self.direct_sr_transformer if self.transformer is None else self.transformer
        texts, longest = [], model.config.max_text_tokens
        for prompt in prompts:
            own_suffix = suffix if isinstance(suffix, str) else suffix[self.tokenizer.language(prompt)]
            text = self.tokenizer.encode(prompt + own_suffix)
            if prompt.strip() and not self.tokenizer.encode(prompt):
                raise ValueError(f"`prompt` must not be empty, but {prompt!r} has no visible character.")
            if len(text) > longest:
                raise ValueError(
                    f"`prompt` may have {longest} tokens with its style, but {quote(prompt)} has {len(text)}. Shorten "
                    "it."
                )
            texts.append(text)
        if super_resolve and max(map(len, texts)) >= self.direct_sr_transformer.config.num_text_slots:
            slots = self.direct_sr_transformer.config.num_text_slots - 1
            logger.warning(
                f"Direct super-resolution reads the first {slots} tokens of a prompt; the longest has more."
            )
        return texts

    def _encode_negative_prompt(self, negative_prompt: str, guidance_scale: float) -> list[int] | None:
        """Token ids of what guidance leads away from; `None` if there is no guidance."""
        if not isinstance(negative_prompt, str):
            raise ValueError(f"`negative_prompt` must be a string, but is {negative_prompt!r}.")
        if guidance_scale == 1:
            if negative_prompt.strip():
                raise ValueError("`negative_prompt` has no effect without `guidance_scale` above 1. Set it.")
            return None
        text, longest = self.tokenizer.encode(negative_prompt), self.transformer.config.max_text_tokens
        if len(text) > longest:
            raise ValueError(f"`negative_prompt` may have {longest} tokens, but has {len(text)}. Shorten it.")
        return text


class Notifier:
    """
    Counts the steps of one batch, for the progress bar and the caller's callback, and stops it if asked to.

    Args:
        pipe, progress, callback, tensor_inputs: Of the call.
        image_indices (`list[int]`): Which of the call's pictures these are.
        step (`int`): How many steps they have behind them.
    """

    def __init__(
        self,
        pipe: CogView2PipelineBase,
        progress,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
        image_indices: list[int],
        step: int = 0,
    ):
        self.pipe, self.progress, self.callback, self.tensor_inputs = pipe, progress, callback, tensor_inputs
        self.image_indices, self.step = image_indices, step

    def __call__(self, stage: str, timestep: int, tokens: torch.Tensor) -> None:
        self.progress.update()
        if self.callback is not None:
            tensors = {"tokens": tokens} if "tokens" in self.tensor_inputs else {}
            about = {"stage": stage, "image_indices": self.image_indices, **tensors}
            self.callback(self.pipe, self.step, timestep, about)
        self.step += 1
        self.pipe._stop_if_interrupted()


@contextlib.contextmanager
def progress_of_success(progress) -> Iterator[None]:
    """A progress bar goes back where it was if what runs inside fails."""
    done = progress.n
    try:
        yield
    except BaseException:
        progress.n = done
        raise


def check_prompts(prompt: str | Sequence[str], allow_empty: bool = False) -> list[str]:
    """The prompts as a list, if they are strings."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` must be a string or a list of strings, but is {prompt!r}.")
    if not prompts or not (allow_empty or all(text.strip() for text in prompts)):
        raise ValueError(f"`prompt` must not be empty, but is {prompt!r}. Say what the picture shows.")
    return list(prompts)


def quote(text: str, longest: int = 60) -> str:
    """A text in a message, or its beginning."""
    return repr(text if len(text) <= longest else f"{text[:longest].rstrip()}…")


def translate(prompts: list[str], prompt_translator: PromptTranslator | None) -> list[str]:
    """What the caller's translator makes of each prompt."""
    if prompt_translator is None:
        return prompts
    translated = [prompt_translator(prompt) if prompt.strip() else prompt for prompt in prompts]
    for prompt, text in zip(prompts, translated):
        if not isinstance(text, str) or (prompt.strip() and not text.strip()):
            raise ValueError(f"`prompt_translator` must return a text, but made {text!r} of {prompt!r}.")
    return translated


def check_counts(**counts: int | None) -> None:
    """Raise an error unless each of the named arguments is `None` or a whole number of at least 1."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, but is {value!r}.")


def check_output_type(output_type: str, possible: Sequence[str]) -> None:
    """Raise an error unless the output type is one of those possible."""
    if output_type not in possible:
        raise ValueError(f"`output_type` must be one of {tuple(possible)}, but is {output_type!r}.")


def one_generator_per_image(generator: Generators, num_images: int) -> list[torch.Generator]:
    """
    A generator for each picture, whose seed makes the picture again: the caller's if it is fresh, else a new one whose
    seed comes from the caller's, or from chance.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != num_images or not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(
                f"`generator` must be one generator or one per picture ({num_images}), but is {generator}."
            )
        return [one if _is_fresh(one) else _new_generator(one) for one in generator]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be a `torch.Generator` or a list of them, but is {generator!r}.")
    if generator is not None and num_images == 1 and _is_fresh(generator):
        return [generator]
    return [_new_generator(generator) for _ in range(num_images)]


def _is_fresh(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn since the seed was set."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), fresh.get_state())


def _new_generator(source: torch.Generator | None) -> torch.Generator:
    device = "cpu" if source is None else source.device
    seed = int(torch.randint(2**63 - 1, (), generator=source, device=device))
    return torch.Generator("cpu").manual_seed(seed)


def run_lengths(texts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
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
    """The scheduler with the settings that are not `None`."""
    changes = {name: value for name, value in changes.items() if value is not None}
    return scheduler.with_settings(**changes) if changes else scheduler


GenerationInterrupted.__module__ = "cogview_pipelines"
