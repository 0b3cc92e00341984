"""What the pipelines of CogView2 share: components, settings, text, and the stages of super-resolution."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizer

from ...generation.canvas import refine
from ...generation.sampling import sample_cluster_tokens
from ...generation.tokens import Sampler
from ...models.cogview2 import sequences
from ...models.image_tokenizers.auto import choose_rate
from ...ops.int8_linear import is_built, set_int8
from ...schedulers.scheduling_lopar import LoPARScheduler
from ..common.arguments import one_per_prompt, quote
from ..common.base import PipelineBase
from ..common.calls import Call
from ..common.notifier import Notifier
from .memory import bytes_per_picture, most_pictures
from .outputs import CogView2PreviewOutput
from .settings import SamplingSettings

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage of super-resolution: the name of its component, and the scheduler with the settings of the call."""

    name: str
    scheduler: LoPARScheduler

    @property
    def num_steps(self) -> int:
        """Passes."""
        return len(self.scheduler.timesteps)


@dataclass
class Batch:
    """
    Pictures that are computed together.

    Args:
        texts (`list[list[int]]`): Token ids of the prompt of each.
        generators (`list[torch.Generator]`): Of each.
        notify ([`Notifier`]): Hears of each step.
    """

    texts: list[list[int]]
    generators: list[torch.Generator]
    notify: Notifier

    @property
    def call(self) -> Call:
        """Which the batch belongs to."""
        return self.notify.call


class CogView2PipelineBase(PipelineBase):
    """Components and stages of the pipelines that make pictures; [`CogView2Pipeline`] describes the arguments."""

    _preview_output = CogView2PreviewOutput
    model_cpu_offload_seq = "transformer->direct_sr_transformer->iterative_sr_transformer"
    _optional_components: Sequence[str] = [
        "direct_sr_transformer",
        "iterative_sr_transformer",
        "direct_sr_scheduler",
        "iterative_sr_scheduler",
    ]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        transformer: PreTrainedModel,
        vqvae: PreTrainedModel,
        direct_sr_transformer: PreTrainedModel | None = None,
        iterative_sr_transformer: PreTrainedModel | None = None,
        direct_sr_scheduler: LoPARScheduler | None = None,
        iterative_sr_scheduler: LoPARScheduler | None = None,
        compression_rate: int | None = None,
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
            compression_rate=choose_rate(vqvae, compression_rate),
            styles=styles or {},
            default_style=default_style,
            whole_pictures=whole_pictures,
        )

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

    def set_super_resolution(self, *, int8: bool = False) -> None:
        """
        How super-resolution computes on a CPU.

        Args:
            int8 (`bool`): Compute its linear layers with whole numbers of 8 bits: the weights with a scale for each
                output, the inputs with one for each position. Pictures are slightly others than without it, and the
                same on every processor up to rounding elsewhere. Weights, and what is saved, stay as they are. It
                holds for all pipelines that share the models; on a GPU and in training it does nothing.

        Raises:
            ValueError: If there is no kernel for it, or no super-resolution.
        """
        models = [self.direct_sr_transformer, self.iterative_sr_transformer]
        if int8 and not any(models):
            raise ValueError("`int8=True` is about super-resolution, but this pipeline has none.")
        if int8 and not is_built():
            raise ValueError(
                "`int8=True` needs the kernels, which are not built: reinstall the package where a C++ compiler is "
                "found."
            )
        for model in filter(None, models):
            set_int8(model.layers, int8)

    def remove_all_hooks(self) -> None:
        super().remove_all_hooks()
        direct = getattr(self, "direct_sr_transformer", None)
        if direct is not None and direct.config.shares_backbone:
            # the hooks of single layers leave each model parameters of its own
            direct.share_backbone(self.transformer)

    def _memory_per_picture(self, model: PreTrainedModel) -> tuple[int, int]:
        return bytes_per_picture(model.config, model.dtype.itemsize), most_pictures(model.config)

    # Stages ----------------------------------------------------------------------------------------------------------

    def _cluster_sampler(self, settings: SamplingSettings) -> Sampler:
        """The sampler of the low-resolution tokens."""
        return functools.partial(
            sample_cluster_tokens,
            cluster_labels=self.vqvae.cluster_labels.to(self._device_of(self.transformer)),
            num_clusters=self.vqvae.config.num_clusters,
            temperature=settings.temperature,
            top_k_clusters=settings.top_k_clusters,
            cluster_temperature=settings.cluster_temperature,
        )

    def _super_resolve(
        self,
        stages: list[Stage],
        batch: Batch,
        tokens: torch.Tensor,
        known: torch.Tensor | None = None,
        cell_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Low-resolution tokens to fine ones, `(batch_size, rows, columns)` each.

        With `known` fine tokens and a `cell_mask` of shape `(rows, columns)`, only cells in the mask are new.
        """
        for stage in stages:
            model = getattr(self, stage.name)
            slots = model.config.num_text_slots
            direct = model.config.super_resolution == "direct"
            if direct:
                cut = [text[: slots - 1] for text in batch.texts]
                context = sequences.direct_super_resolution(cut, tokens.cpu(), slots, model.config.layout)
            else:
                context = sequences.iterative_super_resolution(batch.texts, slots)
            device = self._device_of(model)
            with batch.call.measure(stage.name):
                tokens = refine(
                    model,
                    stage.scheduler,
                    context,
                    None if direct else tokens,
                    cluster_labels=self.vqvae.cluster_labels.to(device),
                    cell_mask=None if direct else cell_mask,
                    generator=batch.generators,
                    device=device,
                    callback=functools.partial(batch.notify, stage.name),
                )
            if direct and known is not None and cell_mask is not None:  # direct super-resolution reads no fine tokens
                tokens = torch.where(cell_mask.to(tokens.device), tokens, known.to(tokens.device))
        return tokens

    # Arguments -------------------------------------------------------------------------------------------------------

    def _settings(self, style: str | None, given: Mapping[str, Any]) -> SamplingSettings:
        """Call arguments over the style's settings over the defaults; nothing is kept for the next call."""
        preset = {name: value for name, value in self._preset(style).items() if name != "suffix"}
        unknown = set(preset) - set(SamplingSettings.declared())
        if unknown:
            raise ValueError(
                f"The style {style or self.config.default_style!r} has unknown settings: {sorted(unknown)}."
            )
        return SamplingSettings.choose(preset, given)

    def _preset(self, style: str | None) -> dict:
        style = self.config.default_style if style is None else style
        if style is None:
            return {}
        if style not in self.config.styles:
            raise ValueError(f"`style` must be one of {sorted(self.config.styles)}, but is {style!r}.")
        return self.config.styles[style]

    def _stages(self, settings: SamplingSettings) -> list[Stage]:
        """The super-resolution stages of this call."""
        direct = _configure(
            self.direct_sr_scheduler,
            temperature=settings.direct_sr_temperature,
            top_k=settings.direct_sr_top_k_clusters,
            cluster_temperature=settings.direct_sr_cluster_temperature,
        )
        stages = [Stage("direct_sr_transformer", direct)]
        num_steps, scheduler = settings.num_lopar_steps, self.iterative_sr_scheduler
        if self.iterative_sr_transformer is not None and num_steps != 0:
            if num_steps is not None:
                scheduler = scheduler.with_num_steps(num_steps)
            iterative = _configure(
                scheduler, temperature=settings.iterative_sr_temperature, top_k=settings.iterative_sr_top_k
            )
            stages.append(Stage("iterative_sr_transformer", iterative))
        return stages

    def _encode_prompts(self, prompts: list[str], style: str | None, super_resolve: bool) -> list[list[int]]:
        """Token ids of each prompt with the suffix of its style."""
        suffix = self._preset(style).get("suffix", "")
        model = self.direct_sr_transformer if self.transformer is None else self.transformer
        texts, longest = [], model.config.max_text_tokens
        for prompt in prompts:
            own_suffix = suffix if isinstance(suffix, str) else suffix[self.tokenizer.language(prompt)]
            text = self.tokenizer.encode_before_image(self.tokenizer.known_text(prompt) + own_suffix)
            if prompt.strip() and not self.tokenizer.encode(prompt):
                raise ValueError(f"`prompt` must not be empty, but {prompt!r} has no visible character.")
            if len(text) > longest:
                raise ValueError(
                    f"`prompt` may have {longest} tokens with its style, but {quote(prompt)} has {len(text)}. Shorten "
                    "it."
                )
            texts.append(text)
        self._require_embeddings(texts, "`prompt`")
        self._tell_unknown(prompts)
        if super_resolve and max(map(len, texts)) >= self.direct_sr_transformer.config.num_text_slots:
            slots = self.direct_sr_transformer.config.num_text_slots - 1
            told = f"Direct super-resolution reads the first {slots} tokens of a prompt; the longest has more."
            if told not in self._told:
                self._told[told] = set()
                logger.warning(told)
        return texts

    def _encode_negative_prompts(
        self, negative_prompt: str | Sequence[str], num_prompts: int, guidance_scale: float
    ) -> list[list[int]] | None:
        """Token ids of what guidance leads away from, for each prompt; `None` if there is no guidance."""
        prompts = one_per_prompt("negative_prompt", negative_prompt, num_prompts)
        if guidance_scale == 1:
            if any(prompt.strip() for prompt in prompts):
                raise ValueError("`negative_prompt` has no effect without `guidance_scale` above 1. Set it.")
            return None
        texts = [self.tokenizer.encode(self.tokenizer.known_text(prompt)) for prompt in prompts]
        longest = self.transformer.config.max_text_tokens
        for text in texts:
            if len(text) > longest:
                raise ValueError(f"`negative_prompt` may have {longest} tokens, but has {len(text)}. Shorten it.")
        self._require_embeddings(texts, "`negative_prompt`")
        self._tell_unknown(prompts, "`negative_prompt`")
        return texts


def _configure(scheduler: LoPARScheduler, **changes: Any) -> LoPARScheduler:
    """The scheduler with the settings that are not `None`."""
    changes = {name: value for name, value in changes.items() if value is not None}
    return scheduler.with_settings(**changes) if changes else scheduler
