"""The VQ model of diffusers as an image tokenizer: pixels to tokens to pixels, like the others of this package."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import VQModel
from diffusers.utils import BaseOutput
from transformers import PreTrainedConfig, PreTrainedModel

from ..loading import WholeModelMixin
from .codebook import as_grids, check_pixels, nearest_codes
from .llamagen import llamagen_to_diffusers
from .modeling_icetk_vq import kmeans_labels


class DiffusersVQConfig(PreTrainedConfig):
    """
    Configuration of [`DiffusersVQModel`].

    Args:
        vq_model (`dict`): The configuration of the `diffusers.VQModel`: its `down_block_types`, `num_vq_embeddings`,
            `latent_channels` and so on; by default that of diffusers.
        num_clusters (`int`, defaults to 500): Default number of clusters of `compute_cluster_labels`.
    """

    model_type = "diffusers_vq"

    def __init__(self, vq_model: dict | None = None, num_clusters: int = 500, **kwargs):
        self.vq_model = {name: value for name, value in (vq_model or {}).items() if not name.startswith("_")}
        self.num_clusters = num_clusters
        super().__init__(**kwargs)

    @property
    def num_embeddings(self) -> int:
        """Number of codes."""
        return self.vq_model.get("num_vq_embeddings", 256)

    @property
    def compression_rates(self) -> tuple[int, ...]:
        """Pixels per token and axis: there is one halving between its levels."""
        return (2 ** (len(self.vq_model.get("down_block_types", ("DownEncoderBlock2D",))) - 1),)


@dataclass
class DiffusersVQEncoderOutput(BaseOutput):
    """
    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, height / rate, width / rate)`): Indices of the nearest codes.
    """

    tokens: torch.Tensor


@dataclass
class DiffusersVQDecoderOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB values in about 0..1, not clamped.
    """

    sample: torch.Tensor


class DiffusersVQModel(WholeModelMixin, PreTrainedModel):
    """
    A `diffusers.VQModel` that `prepare_tokens.py`, the training scripts and the pipelines take as image tokenizer.

    What they ask of one is `encode` to `tokens`, `decode` to `sample`, `config.num_embeddings`,
    `config.compression_rates`, and for cluster sampling `cluster_labels` and `config.num_clusters`.
    """

    config_class = DiffusersVQConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"

    def __init__(self, config: DiffusersVQConfig):
        super().__init__(config)
        self.vq = VQModel.from_config(config.vq_model)
        self.register_buffer("cluster_labels", torch.zeros(config.num_embeddings, dtype=torch.long))
        self.post_init()

    def _init_weights(self, module) -> None:
        """diffusers has drawn them."""

    @classmethod
    def from_vq_model(cls, vq_model: VQModel, num_clusters: int = 500, seed: int = 0) -> "DiffusersVQModel":
        """
        Take over a loaded VQ model.

        Args:
            vq_model (`diffusers.VQModel`): The model; its weights are used, not copied.
            num_clusters (`int`): Groups of codes that cluster sampling draws from, at most as many as codes.
            seed (`int`): Of the grouping.
        """
        num_clusters = min(num_clusters, vq_model.config.num_vq_embeddings)
        model = cls(DiffusersVQConfig(dict(vq_model.config), num_clusters))
        model.vq = vq_model
        model.to(vq_model.device, vq_model.dtype).compute_cluster_labels(seed=seed)
        return model.eval()

    @classmethod
    def from_llamagen(
        cls, source: str | os.PathLike | Mapping[str, torch.Tensor], num_clusters: int = 500, seed: int = 0
    ) -> "DiffusersVQModel":
        """
        Take over an image tokenizer of LlamaGen (`vq_ds16_t2i.pt` and its like).

        Args:
            source: The file, or its tensors by name.
            num_clusters (`int`): As for [`~DiffusersVQModel.from_vq_model`].
            seed (`int`): Of the grouping.

        Raises:
            ValueError: If it is not such a checkpoint, with what is missing or too much.
        """
        return cls.from_vq_model(llamagen_to_diffusers(source), num_clusters, seed)

    def encode(self, pixel_values: torch.Tensor, compression_rate: int | None = None) -> DiffusersVQEncoderOutput:
        """
        Tokens of pictures.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB values in 0..1.
            compression_rate (`int`, *optional*): The one rate.

        Raises:
            ValueError: If it is another, or does not divide the sides.
        """
        check_pixels(pixel_values, self._check_rate(compression_rate))
        latents = self.vq.encode((2 * pixel_values - 1).to(self.dtype)).latents
        tokens, _ = nearest_codes(latents.movedim(1, -1).flatten(0, 2), self.vq.quantize.embedding.weight)
        return DiffusersVQEncoderOutput(tokens=tokens.view(len(pixel_values), *latents.shape[2:]))

    def decode(self, tokens: torch.Tensor, compression_rate: int | None = None) -> DiffusersVQDecoderOutput:
        """
        Pictures of tokens.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, rows, columns)` or `(batch_size, side * side)`): Codes.
            compression_rate (`int`, *optional*): The one rate.

        Raises:
            ValueError: If the rate is another, a code is out of range, or flat codes are no square.
        """
        self._check_rate(compression_rate)
        codes = self.vq.quantize.embedding(as_grids(tokens, self.config.num_embeddings)).movedim(-1, 1)
        sample = self.vq.decode(codes.to(self.dtype), force_not_quantize=True).sample
        return DiffusersVQDecoderOutput(sample=(sample + 1) / 2)

    @torch.no_grad()
    def compute_cluster_labels(self, num_clusters: int | None = None, seed: int = 0) -> torch.Tensor:
        """As [`IcetkVQModel.compute_cluster_labels`]."""
        num_clusters = self.config.num_clusters if num_clusters is None else num_clusters
        if not 1 <= num_clusters <= self.config.num_embeddings:
            raise ValueError(
                f"`num_clusters` must be in 1..{self.config.num_embeddings} (the codes), but is {num_clusters}."
            )
        labels = kmeans_labels(self.vq.quantize.embedding.weight.float().cpu(), num_clusters, seed)
        self.cluster_labels.copy_(labels)
        self.config.num_clusters = num_clusters
        return self.cluster_labels

    def _check_rate(self, compression_rate: int | None) -> int:
        (rate,) = self.config.compression_rates
        if compression_rate not in (None, rate):
            raise ValueError(f"`compression_rate` must be {rate}, which this model has, but is {compression_rate}.")
        return rate


for _public in (DiffusersVQConfig, DiffusersVQModel):
    _public.__module__ = "cogview_pipelines"
