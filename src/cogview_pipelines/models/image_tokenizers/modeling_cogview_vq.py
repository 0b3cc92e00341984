"""
The image tokenizer of CogView: pixels -> tokens -> pixels, 8 x 8 pixels a token.

Four convolutions each way and one codebook. Parameter names follow the released file (`enc_b.blocks.i` ->
`encoder.i`, `dec.blocks.i` -> `decoder.i`, `quantize_t` -> `quantize`, whose codes are rows here).
"""

import torch
import torch.distributed
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..loading import WholeModelMixin, check_count
from .codebook import (
    as_grids,
    check_pixels,
    choose_by_weight,
    image_statistics,
    nearest_codes,
    same_on_all_processes,
)
from .convolutions import Conv2d, ConvTranspose2d
from .outputs import VQDecoderOutput, VQEncoderOutput, VQModelOutput

CODEBOOK_TRAINING = ("moving_average", "nearest", "gumbel", "fixed")


@strict
class CogViewVQConfig(PreTrainedConfig):
    """
    Configuration of [`CogViewVQModel`]. The defaults are the released architecture.

    Args:
        num_embeddings (`int`, defaults to 8192): Number of codes.
        embedding_dim (`int`, defaults to 256): Width of a code.
        hidden_channels (`int`, defaults to 512): Width of the convolutions.
        num_halvings (`int`, defaults to 3): Strided convolutions; each halves both axes.
        image_mean, image_std (`tuple[float, ...]`): Normalisation of RGB values in 0..1.
        codebook_training (`str`, defaults to `"moving_average"`):
            How the codes are learnt, one of the four ways of the paper's section 2.2. `"moving_average"`: they follow
            the mean of the vectors they stand for. `"nearest"`: by the gradient of their distance to these vectors.
            `"gumbel"`: by the gradient of the reconstruction, through Gumbel-softmax with `gumbel_temperature`.
            `"fixed"`: they stay as they are.
        commitment_cost (`float`, defaults to 0.25): Weight of the distance of vectors to their codes in training.
        codebook_decay (`float`, defaults to 0.99): Decay of the moving averages.
        gumbel_temperature (`float`, defaults to 1.0): Temperature of Gumbel-softmax to begin with; training lets that
            of the codebook (`model.quantize.gumbel_temperature`) fall.
        kl_cost (`float`, defaults to 1e-4): Gumbel-softmax: weight of the divergence of the codes from equal use.
        dead_code_threshold (`float`, defaults to 0.0):
            Moving averages: a code whose average of uses per step falls below this is moved to a vector that the
            codebook serves badly. 0 leaves dead codes alone, as in the release.
    """

    model_type = "cogview_vq"

    num_embeddings: int = 8192
    embedding_dim: int = 256
    hidden_channels: int = 512
    num_halvings: int = 3
    image_mean: tuple[float, ...] | list[float] = (0.79093, 0.76271, 0.75340)
    image_std: tuple[float, ...] | list[float] = (0.30379, 0.32279, 0.32800)
    codebook_training: str = "moving_average"
    commitment_cost: float | int = 0.25
    codebook_decay: float | int = 0.99
    gumbel_temperature: float | int = 1.0
    kl_cost: float | int = 1e-4
    dead_code_threshold: float | int = 0.0

    def __post_init__(self, **kwargs):
        for name in ("image_mean", "image_std"):
            setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__(**kwargs)
        check_count("num_halvings", self.num_halvings, 10)
        if self.codebook_training not in CODEBOOK_TRAINING:
            raise ValueError(
                f"`codebook_training` must be one of {CODEBOOK_TRAINING}, but is {self.codebook_training!r}."
            )

    @property
    def compression_rate(self) -> int:
        """Pixels per token and axis (release: 8)."""
        return 2**self.num_halvings

    @property
    def compression_rates(self) -> tuple[int, ...]:
        """The one rate, as a choice of which other image tokenizers have several."""
        return (self.compression_rate,)


class Codebook(nn.Module):
    """
    The codes, and how they are learnt.

    Source: VQ-VAE (https://arxiv.org/abs/1711.00937), appendix A, for moving averages; the CogView release.
    """

    def __init__(self, config: CogViewVQConfig):
        super().__init__()
        self.config = config
        self.gumbel_temperature, self.dead_code_threshold = config.gumbel_temperature, config.dead_code_threshold
        self.embed = nn.Embedding(config.num_embeddings, config.embedding_dim)
        # What moving averages have summed up so far: uses of each code, and the vectors it was used for.
        self.register_buffer("cluster_size", torch.zeros(config.num_embeddings))
        self.register_buffer("embed_avg", torch.zeros(config.num_embeddings, config.embedding_dim))

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Quantise `(positions, embedding_dim)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The codes, through which gradients reach the vectors;
                the tokens; the commitment loss. In train mode moving averages take a step, after the codes were read.
        """
        tokens, distances = self.nearest(vectors)
        if self.config.codebook_training == "gumbel":
            return self._gumbel(vectors, tokens)
        codes = self.embed(tokens)
        loss = self.config.commitment_cost * F.mse_loss(vectors, codes.detach())
        if self.config.codebook_training == "nearest":
            loss = loss + F.mse_loss(codes, vectors.detach())
        codes = codes.detach()
        if self.training and self.config.codebook_training == "moving_average":
            self.follow(vectors.detach(), tokens)
            if self.dead_code_threshold:
                self.revive(vectors.detach(), distances)
        return vectors + (codes - vectors).detach(), tokens, loss

    def nearest(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest code of each row of `(positions, embedding_dim)` and its squared distance, in float32."""
        return nearest_codes(vectors, self.embed.weight)

    def _gumbel(self, vectors, tokens):
        scores = -squared_distances(vectors, self.embed.weight)
        loss = self.config.kl_cost * divergence_from_uniform(scores)
        if not self.training:
            return self.embed(tokens), tokens, loss
        chosen = F.gumbel_softmax(scores.float(), tau=self.gumbel_temperature, dim=-1)
        return chosen.to(self.embed.weight.dtype) @ self.embed.weight, tokens, loss

    @torch.no_grad()
    def follow(self, vectors: torch.Tensor, tokens: torch.Tensor) -> None:
        """One step of the moving averages, over the vectors of all processes; unused codes move, too."""
        counts = torch.zeros_like(self.cluster_size).index_add_(
            0, tokens, torch.ones_like(tokens, dtype=self.cluster_size.dtype)
        )
        sums = torch.zeros_like(self.embed_avg).index_add_(0, tokens, vectors.to(self.embed_avg.dtype))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.cluster_size.lerp_(counts, 1 - self.config.codebook_decay)
        self.embed_avg.lerp_(sums, 1 - self.config.codebook_decay)
        total = self.cluster_size.sum()
        sizes = (self.cluster_size + 1e-5) / (total + 1e-5 * len(self.cluster_size)) * total
        self.embed.weight.copy_(self.embed_avg / sizes[:, None])

    @torch.no_grad()
    def revive(self, vectors: torch.Tensor, distances: torch.Tensor) -> None:
        """Move some codes that are hardly used to vectors far from their codes, as if each were used once a step."""
        # few at a time, the least used first, so that they do not all jump to the same bad spot
        num_codes = len(self.cluster_size)
        sizes, codes = self.cluster_size.topk(max(1, min(num_codes // 32, len(vectors))), largest=False)
        num_dead = int((sizes < self.dead_code_threshold).sum())
        if num_dead:
            chosen = vectors[choose_by_weight(distances, num_dead)].to(self.embed.weight.dtype)
            codes, chosen = codes[:num_dead], same_on_all_processes(chosen)
            self.embed.weight[codes] = self.embed_avg[codes] = chosen
            self.cluster_size[codes] = 1.0


def squared_distances(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared distance of each vector to each code: `(positions, dim)`, `(codes, dim)` -> `(positions, codes)`."""
    return vectors.square().sum(1, keepdim=True) - 2 * vectors @ codes.T + codes.square().sum(1)


def divergence_from_uniform(scores: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of the Kullback-Leibler divergence of `softmax(scores)` from the uniform distribution."""
    probabilities = scores.softmax(-1)
    return (probabilities * (probabilities * scores.shape[-1] + 1e-20).log()).sum(-1).mean()


class CogViewVQModel(WholeModelMixin, PreTrainedModel):
    """
    The image tokenizer of CogView: RGB pictures of any size that is a multiple of 8 to codes, and back.

    In eval mode nothing changes. In train mode `forward` also moves the codes, if they are learnt by moving averages.

    Source: the CogView release; https://arxiv.org/abs/2105.13290, section 2.2.
    """

    config_class = CogViewVQConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"

    def __init__(self, config: CogViewVQConfig):
        super().__init__(config)
        width, num_halvings = config.hidden_channels, config.num_halvings
        inputs = [3] + [width] * (num_halvings - 1)
        self.encoder = self._stack(
            *(Conv2d(channels, width, 4, stride=2, padding=1) for channels in inputs),
            Conv2d(width, config.embedding_dim, 1),
        )
        self.quantize = Codebook(config)
        inputs = [config.embedding_dim] + [width] * (num_halvings - 1)
        self.decoder = self._stack(
            *(ConvTranspose2d(channels, width, 4, stride=2, padding=1) for channels in inputs),
            Conv2d(width, 3, 1),
        )
        self.post_init()

    @staticmethod
    def _stack(*convolutions: nn.Module) -> nn.Sequential:
        """Convolutions with a ReLU between two of them."""
        layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()
        elif isinstance(module, Codebook):
            nn.init.xavier_uniform_(module.embed.weight, gain=nn.init.calculate_gain("tanh"))
            module.embed_avg.copy_(module.embed.weight)
            nn.init.zeros_(module.cluster_size)

    def encode(self, pixel_values: torch.Tensor, compression_rate: int | None = None) -> VQEncoderOutput:
        """
        Tokens of pictures.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                RGB values in 0..1; both sides are multiples of 8.
            compression_rate (`int`, *optional*): Pixels per token and axis; this model has one rate only.

        Returns:
            [`VQEncoderOutput`]: `tokens` in raster order, `(batch_size, height / 8, width / 8)`.

        Raises:
            ValueError: If the sides are no multiples of 8, or another rate is asked for.
        """
        self._check_rate(compression_rate)
        features = self.encode_features(pixel_values)
        tokens, _ = self.quantize.nearest(features.flatten(0, 2))
        return VQEncoderOutput(tokens=tokens.view(features.shape[:3]))

    def encode_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is quantised: `(batch_size, 3, height, width)` -> `(batch_size, rows, columns, embedding_dim)`."""
        check_pixels(pixel_values, self.config.compression_rate)
        mean, std = image_statistics(self.config.image_mean, self.config.image_std, pixel_values)
        return self.encoder(((pixel_values - mean) / std).to(self.dtype)).movedim(1, -1)

    def decode(self, tokens: torch.Tensor, compression_rate: int | None = None) -> VQDecoderOutput:
        """
        Pictures of tokens.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, rows, columns)` or `(batch_size, side * side)`):
                Codes in raster order; flat codes are taken as squares.
            compression_rate (`int`, *optional*): As for `encode`.

        Returns:
            [`VQDecoderOutput`]: `sample`, `(batch_size, 3, rows * 8, columns * 8)`, not clamped.

        Raises:
            ValueError: If a code is out of range, flat codes are no square, or another rate is asked for.
        """
        self._check_rate(compression_rate)
        embeddings = self.quantize.embed(as_grids(tokens, self.config.num_embeddings))
        return VQDecoderOutput(sample=self._decode_embeddings(embeddings))

    def forward(self, pixel_values: torch.Tensor, compression_rate: int | None = None) -> VQModelOutput:
        """
        Encode and decode, differentiable as `config.codebook_training` says.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB values in 0..1.
            compression_rate (`int`, *optional*): As for `encode`.

        Returns:
            [`VQModelOutput`]: `sample`, `tokens` and `commitment_loss`.
        """
        self._check_rate(compression_rate)
        features = self.encode_features(pixel_values)
        codes, tokens, loss = self.quantize(features.flatten(0, 2))
        sample = self._decode_embeddings(codes.view(features.shape))
        return VQModelOutput(sample=sample, tokens=tokens.view(features.shape[:3]), commitment_loss=loss)

    def _check_rate(self, compression_rate):
        if compression_rate not in (None, self.config.compression_rate):
            raise ValueError(
                f"`compression_rate` must be {self.config.compression_rate}, the only one that this model has, but is "
                f"{compression_rate}."
            )

    def _decode_embeddings(self, embeddings):
        sample = self.decoder(embeddings.movedim(-1, 1))
        mean, std = image_statistics(self.config.image_mean, self.config.image_std, sample)
        return sample * std + mean


# Saved pipelines name a class by this; the package root holds it, whichever file defines it.
for _public in (CogViewVQConfig, CogViewVQModel):
    _public.__module__ = "cogview_pipelines"
