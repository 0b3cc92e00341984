"""
The image tokenizer of CogView2 (icetk): pixels -> tokens -> pixels at compression rates 4, 8 and 16.

One encoder, one codebook and a decoder for each rate. Coarser rates are reached by extra down-samplers between encoder
and codebook, so that all rates speak of the same codes. Parameter names follow the released file (`enc` -> `encoder`,
`decs.i` -> `decoders.<rate>`).
"""

import math
from itertools import pairwise

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
from .convolutions import Conv2d
from .outputs import VQDecoderOutput, VQEncoderOutput, VQModelOutput


@strict
class IcetkVQConfig(PreTrainedConfig):
    """
    Configuration of [`IcetkVQModel`]. The defaults are the released architecture.

    Args:
        num_embeddings (`int`, defaults to 20000): Number of codes.
        embedding_dim (`int`, defaults to 256): Width of a code.
        base_channels (`int`, defaults to 128): Width that the multipliers multiply.
        encoder_channel_multipliers (`tuple[int, ...]`, defaults to `(1, 2, 4)`):
            Width of each encoder level, from the finest; there is a halving between levels.
        decoder_channel_multipliers (`dict[int, tuple[int, ...]]`): The same for the decoder of each compression rate.
        decoder_attention_levels (`dict[int, tuple[int, ...]]`, defaults to `{16: (4,)}`):
            Levels of a decoder that have an attention block, by compression rate.
        compression_rates (`tuple[int, ...]`, defaults to `(4, 8, 16)`): The rates that are built.
        num_res_blocks (`int`, defaults to 2): Residual blocks of each encoder level.
        num_decoder_res_blocks (`int`, defaults to 1): Residual blocks of each decoder level.
        norm_type (`str`, defaults to `"group"`):
            `"group"`, or `"position"`: the channels of each position are normalised by themselves, so that a part of a
            picture is coded and decoded like the whole.
        norm_num_groups (`int`, defaults to 32): Groups of the group normalisation.
        mid_attention (`bool`, defaults to `True`): Whether encoder and decoders have an attention block in the middle.
        encoder_patch_size, decoder_patch_size (`int`, defaults to 1):
            Squares of this side, in pixels, are folded into channels before the encoder and unfolded after the
            decoders. This saves the work at full resolution, where a small model spends most of its time.
        local_encoder (`bool`, defaults to `False`):
            Use 1x1 kernels and normalise each position by itself. If `encoder_patch_size` is the rate, then
            a token is a function of its own square of pixels alone: equal squares have equal tokens wherever they are.
        num_clusters (`int`, defaults to 500): Default number of clusters of `compute_cluster_labels`.
        image_mean, image_std (`tuple[float, ...]`): Normalisation of RGB values in 0..1.
        commitment_cost (`float`, defaults to 0.25): Weight of the commitment loss in training.
        codebook_decay (`float`, defaults to 0.99): Decay of the moving averages that the codes follow in training.
        dead_code_threshold (`float`, defaults to 0.03):
            In training a code whose moving average of uses per step falls below this is moved to where the codebook is
            worst. 0 leaves dead codes alone.
    """

    model_type = "icetk_vq"

    num_embeddings: int = 20000
    embedding_dim: int = 256
    base_channels: int = 128
    encoder_channel_multipliers: tuple[int, ...] | list[int] = (1, 2, 4)
    decoder_channel_multipliers: dict | None = None
    decoder_attention_levels: dict | None = None
    compression_rates: tuple[int, ...] | list[int] = (4, 8, 16)
    num_res_blocks: int = 2
    num_decoder_res_blocks: int = 1
    norm_type: str = "group"
    norm_num_groups: int = 32
    mid_attention: bool = True
    encoder_patch_size: int = 1
    decoder_patch_size: int = 1
    local_encoder: bool = False
    num_clusters: int = 500
    image_mean: tuple[float, ...] | list[float] = (0.79093, 0.76271, 0.75340)
    image_std: tuple[float, ...] | list[float] = (0.30379, 0.32279, 0.32800)
    commitment_cost: float | int = 0.25
    codebook_decay: float | int = 0.99
    dead_code_threshold: float | int = 0.03

    def __post_init__(self, **kwargs):
        if self.decoder_channel_multipliers is None:
            self.decoder_channel_multipliers = {4: (1, 2, 4), 8: (1, 1, 2, 4), 16: (1, 1, 1, 2, 4)}
        if self.decoder_attention_levels is None:
            self.decoder_attention_levels = {16: (4,)}
        # JSON turns integer keys into strings and tuples into lists.
        self.decoder_channel_multipliers = _integer_keys(self.decoder_channel_multipliers)
        self.decoder_attention_levels = _integer_keys(self.decoder_attention_levels)
        for name in ("encoder_channel_multipliers", "compression_rates", "image_mean", "image_std"):
            setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__(**kwargs)
        if self.norm_type not in ("group", "position"):
            raise ValueError(f"`norm_type` must be 'group' or 'position', but is '{self.norm_type}'.")
        for name in ("num_res_blocks", "num_decoder_res_blocks"):
            check_count(name, getattr(self, name))
        for rate in self.compression_rates:
            self._check_rate(rate)

    @property
    def encoder_stride(self) -> int:
        """Pixels per encoder position and axis, before the down-samplers."""
        return self.encoder_patch_size * 2 ** (len(self.encoder_channel_multipliers) - 1)

    def num_down_samplers(self, compression_rate: int) -> int:
        """Halvings between the encoder and the codebook at this rate."""
        return round(math.log2(compression_rate / self.encoder_stride))

    def _check_rate(self, rate: int):
        if rate < self.encoder_stride or self.encoder_stride * 2 ** self.num_down_samplers(rate) != rate:
            raise ValueError(
                f"`compression_rates` must be the encoder's stride {self.encoder_stride} (`encoder_patch_size` and a "
                f"halving between `encoder_channel_multipliers`) times a power of two, but one is {rate}."
            )
        levels = (self.decoder_channel_multipliers or {}).get(rate)
        if levels is None or self.decoder_patch_size * 2 ** (len(levels) - 1) != rate:
            raise ValueError(
                f"`decoder_channel_multipliers[{rate}]` must have a doubling between levels so that, times "
                f"`decoder_patch_size` {self.decoder_patch_size}, it enlarges by {rate}, but it is {levels}."
            )


IcetkVQConfig.__module__ = "cogview_pipelines"


def _integer_keys(value: dict) -> dict:
    return {int(key): tuple(item) for key, item in value.items()}


class PositionNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each position of `(batch_size, channels, height, width)`."""

    def forward(self, hidden_states):
        return super().forward(hidden_states.movedim(1, -1)).movedim(-1, 1)


class VQLayers:
    """Makes the layers of an encoder or decoder: one place decides on kernels and norms."""

    def __init__(self, config: IcetkVQConfig, local: bool = False):
        self.local = local
        self.num_groups = None if local or config.norm_type == "position" else config.norm_num_groups

    def conv(self, in_channels: int, out_channels: int) -> nn.Conv2d:
        return Conv2d(in_channels, out_channels, 1) if self.local else Conv2d(in_channels, out_channels, 3, padding=1)

    def norm(self, channels: int) -> nn.Module:
        if self.num_groups is None:
            return PositionNorm(channels, eps=1e-6)
        return nn.GroupNorm(self.num_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, layers: VQLayers, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.conv(in_channels, out_channels)
        self.norm2 = layers.norm(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states):
        residual = self.nin_shortcut(hidden_states) if hasattr(self, "nin_shortcut") else hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        return residual + self.conv2(F.silu(self.norm2(hidden_states)))


class AttentionBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, layers: VQLayers, channels: int):
        super().__init__()
        self.norm = layers.norm(channels)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, hidden_states):
        normed = self.norm(hidden_states)
        query, key, value = (conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
        return hidden_states + self.proj_out(attended.reshape_as(hidden_states))


class Downsample(nn.Module):
    """Halves both axes: zeros at the right and the bottom, then a strided convolution without padding."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states):
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class CodeDownsample(Downsample):
    """The down-sampler between encoder and codebook, with average pooling as a shortcut."""

    def forward(self, hidden_states):
        return F.avg_pool2d(hidden_states, 2) + super().forward(hidden_states)


class Upsample(nn.Module):
    def __init__(self, layers: VQLayers, channels: int):
        super().__init__()
        self.conv = layers.conv(channels, channels)

    def forward(self, hidden_states):
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if asked for, then a change of resolution."""

    def __init__(
        self, layers, in_channels, out_channels, num_blocks, attention=False, downsample=False, upsample=False
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(layers, *pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(layers, out_channels) for _ in range(num_blocks if attention else 0))
        if downsample:
            self.downsample = Downsample(out_channels)
        if upsample:
            self.upsample = Upsample(layers, out_channels)

    def forward(self, hidden_states):
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if self.attn:
                hidden_states = self.attn[index](hidden_states)
        if hasattr(self, "downsample"):
            hidden_states = self.downsample(hidden_states)
        if hasattr(self, "upsample"):
            hidden_states = self.upsample(hidden_states)
        return hidden_states


class MidBlock(nn.Module):
    def __init__(self, layers: VQLayers, channels: int, attention: bool):
        super().__init__()
        self.block_1 = ResidualBlock(layers, channels, channels)
        self.attn_1 = AttentionBlock(layers, channels) if attention else nn.Identity()
        self.block_2 = ResidualBlock(layers, channels, channels)

    def forward(self, hidden_states):
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class Encoder(nn.Module):
    """`(batch_size, 3, height, width)` -> `(batch_size, embedding_dim, height / stride, width / stride)`."""

    def __init__(self, config: IcetkVQConfig):
        super().__init__()
        layers = VQLayers(config, local=config.local_encoder)
        widths = [config.base_channels * multiplier for multiplier in config.encoder_channel_multipliers]
        self.fold = nn.PixelUnshuffle(config.encoder_patch_size)
        self.conv_in = layers.conv(3 * config.encoder_patch_size**2, widths[0])
        self.down = nn.ModuleList(
            Level(layers, widths[max(level - 1, 0)], width, config.num_res_blocks, downsample=level < len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.mid = MidBlock(layers, widths[-1], config.mid_attention)
        self.norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], config.embedding_dim)

    def forward(self, pixel_values):
        hidden_states = self.conv_in(self.fold(pixel_values))
        for level in self.down:
            hidden_states = level(hidden_states)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden_states))))


class Decoder(nn.Module):
    """`(batch_size, embedding_dim, rows, columns)` -> `(batch_size, 3, rows * rate, columns * rate)`."""

    def __init__(self, config: IcetkVQConfig, rate: int):
        super().__init__()
        layers = VQLayers(config)
        multipliers = (config.decoder_channel_multipliers or {})[rate]
        widths = [config.base_channels * multiplier for multiplier in multipliers]
        attention_levels = (config.decoder_attention_levels or {}).get(rate, ())
        self.conv_in = layers.conv(config.embedding_dim, widths[-1])
        self.mid = MidBlock(layers, widths[-1], config.mid_attention)
        self.up = nn.ModuleList(
            Level(
                layers,
                widths[min(level + 1, len(widths) - 1)],
                width,
                config.num_decoder_res_blocks,
                attention=level in attention_levels,
                upsample=level > 0,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = layers.norm(widths[0])
        self.conv_out = layers.conv(widths[0], 3 * config.decoder_patch_size**2)
        self.unfold = nn.PixelShuffle(config.decoder_patch_size)

    def forward(self, embeddings):
        hidden_states = self.mid(self.conv_in(embeddings))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
        return self.unfold(self.conv_out(F.silu(self.norm_out(hidden_states))))


class VectorQuantizer(nn.Module):
    """
    The nearest code of each position.

    In training the codes follow moving averages of the vectors that choose them (no gradient), start at well-spread
    vectors of the first batch, and dead codes move to vectors that the codebook serves badly.

    Source: van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937), appendix A.1, for the moving averages; the
    spreading is the seeding of k-means++ (Arthur and Vassilvitskii 2007), a few codes at a time.
    """

    def __init__(self, config: IcetkVQConfig):
        super().__init__()
        self.decay, self.dead_code_threshold = config.codebook_decay, config.dead_code_threshold
        self.proj = Conv2d(config.embedding_dim, config.embedding_dim, 1)
        self.embed = nn.Embedding(config.num_embeddings, config.embedding_dim)
        self.embed.weight.requires_grad_(False)  # follows moving averages, not a gradient
        self.register_buffer("cluster_size", torch.zeros(config.num_embeddings))
        self.register_buffer("embed_avg", torch.zeros(config.num_embeddings, config.embedding_dim))

    def forward(self, hidden_states):
        """Projected vectors, their codes' embeddings (both like the input), tokens `(batch_size, rows, columns)`."""
        projected = self.proj(hidden_states).float()
        vectors = projected.movedim(1, -1).flatten(0, 2)
        if self.training:
            with torch.no_grad():
                self._start_if_new(vectors.detach())
        tokens, distances = self.nearest(vectors.detach())
        embeddings = self.embed(tokens).view(*projected.movedim(1, -1).shape).movedim(-1, 1)
        if self.training:
            with torch.no_grad():
                self._follow(vectors.detach(), tokens, distances)
        return projected, embeddings.to(hidden_states.dtype), tokens.view(projected.shape[0], *projected.shape[2:])

    @torch.no_grad()
    def nearest(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest code of each row of `(positions, embedding_dim)` and its squared distance, in float32."""
        return nearest_codes(vectors, self.embed.weight)

    def _start_if_new(self, vectors):
        """Spread the codes over the vectors of the first batch."""
        if self.cluster_size.any():
            return
        num_codes = len(self.cluster_size)
        vectors = vectors.unique(dim=0)
        chosen = vectors[torch.randint(len(vectors), (1,), device=vectors.device)]
        while len(chosen) < min(num_codes, len(vectors)):
            distances = torch.cdist(vectors, chosen).amin(1).square()
            more = choose_by_weight(distances, min(max(1, len(chosen) // 4), num_codes - len(chosen)))
            chosen = torch.cat([chosen, vectors[more]])
        spare = torch.randint(len(chosen), (num_codes - len(chosen),), device=vectors.device)
        noise = torch.randn(len(spare), chosen.shape[1], device=vectors.device) * 0.1 * chosen.std(0, correction=0)
        chosen = same_on_all_processes(torch.cat([chosen, chosen[spare] + noise]))
        self._place(torch.arange(num_codes, device=vectors.device), chosen)

    def _follow(self, vectors, tokens, distances):
        """One step of the moving averages, then revive dead codes."""
        counts = torch.zeros_like(self.cluster_size).index_add_(
            0, tokens, torch.ones_like(tokens, dtype=self.cluster_size.dtype)
        )
        sums = torch.zeros_like(self.embed_avg).index_add_(0, tokens, vectors.to(self.embed_avg.dtype))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        used = self.cluster_size > 1e-5
        means = self.embed_avg / self.cluster_size.clamp_min(1e-5)[:, None]
        self.embed.weight.copy_(torch.where(used[:, None], means, self.embed.weight))
        # Few at a time, the least used first, so that they do not all jump to the same bad spot.
        sizes, codes = self.cluster_size.topk(max(1, min(len(counts) // 32, len(vectors))), largest=False)
        num_dead = int((sizes < self.dead_code_threshold).sum())
        if num_dead:
            chosen = choose_by_weight(distances, num_dead)
            self._place(codes[:num_dead], same_on_all_processes(vectors[chosen]))

    def _place(self, codes, vectors):
        """Put codes at vectors, as if each were used once a step."""
        vectors = vectors.to(self.embed.weight.dtype)
        self.embed.weight[codes] = vectors
        self.embed_avg[codes] = vectors
        self.cluster_size[codes] = 1.0


class IcetkVQModel(WholeModelMixin, PreTrainedModel):
    """
    The image tokenizer: RGB pictures to codes of one shared codebook and back, at one of several compression rates.

    In eval mode nothing changes. In train mode `forward` also moves the codebook towards the vectors it sees.

    Source: icetk, the tokenizer of CogView2 (https://arxiv.org/abs/2204.14217).
    """

    config_class = IcetkVQConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: IcetkVQConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        num_down_samplers = max((config.num_down_samplers(rate) for rate in config.compression_rates), default=0)
        self.down_samplers = nn.ModuleList(CodeDownsample(config.embedding_dim) for _ in range(num_down_samplers))
        self.quantize = VectorQuantizer(config)
        self.decoders = nn.ModuleDict({str(rate): Decoder(config, rate) for rate in config.compression_rates})
        self.register_buffer("cluster_labels", torch.zeros(config.num_embeddings, dtype=torch.long))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, VectorQuantizer):
            nn.init.normal_(module.embed.weight)
            nn.init.zeros_(module.cluster_size)
            nn.init.zeros_(module.embed_avg)
        elif isinstance(module, IcetkVQModel):
            nn.init.zeros_(module.cluster_labels)

    def encode(self, pixel_values: torch.Tensor, compression_rate: int = 8) -> VQEncoderOutput:
        """
        Tokens of pictures.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                RGB values in 0..1; both sides are multiples of `compression_rate`.
            compression_rate (`int`, defaults to 8): Pixels per token and axis.

        Returns:
            [`VQEncoderOutput`]: `tokens` in raster order, `(batch_size, height / rate, width / rate)`.

        Raises:
            ValueError: If the rate is not built or does not divide the sides.
        """
        hidden_states = self.quantize.proj(self._encode_features(pixel_values, compression_rate))
        tokens, _ = self.quantize.nearest(hidden_states.movedim(1, -1).flatten(0, 2))
        return VQEncoderOutput(tokens=tokens.view(len(pixel_values), *hidden_states.shape[2:]))

    def decode(self, tokens: torch.Tensor, compression_rate: int = 8) -> VQDecoderOutput:
        """
        Pictures of tokens.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, rows, columns)` or `(batch_size, side * side)`):
                Codes in raster order; flat codes are taken as squares.
            compression_rate (`int`, defaults to 8): Pixels per token and axis.

        Returns:
            [`VQDecoderOutput`]: `sample`, `(batch_size, 3, rows * rate, columns * rate)`, not clamped.

        Raises:
            ValueError: If the rate is not built, a code is out of range or flat codes are no square.
        """
        self._check_rate(compression_rate)
        tokens = as_grids(tokens, self.config.num_embeddings)
        embeddings = self.quantize.embed(tokens).movedim(-1, 1)
        return VQDecoderOutput(sample=self._decode_embeddings(embeddings, compression_rate))

    def forward(self, pixel_values: torch.Tensor, compression_rate: int = 8) -> VQModelOutput:
        """
        Encode and decode, differentiable by the straight-through estimator. In train mode the codebook takes a step.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB values in 0..1.
            compression_rate (`int`, defaults to 8): Pixels per token and axis.

        Returns:
            [`VQModelOutput`]: `sample`, `tokens` and `commitment_loss`.
        """
        projected, embeddings, tokens = self.quantize(self._encode_features(pixel_values, compression_rate))
        commitment_loss = self.config.commitment_cost * F.mse_loss(projected, embeddings.detach().float())
        straight_through = projected + (embeddings - projected).detach()
        sample = self._decode_embeddings(straight_through.to(embeddings.dtype), compression_rate)
        return VQModelOutput(sample=sample, tokens=tokens, commitment_loss=commitment_loss)

    @torch.no_grad()
    def compute_cluster_labels(self, num_clusters: int | None = None, seed: int = 0) -> torch.Tensor:
        """
        Group the codes by K-means and keep the labels in the buffer `cluster_labels`; cluster sampling draws by them.

        Args:
            num_clusters (`int`, *optional*): Number of groups, by default `config.num_clusters`; none is empty.
            seed (`int`, defaults to 0): Seed of the starting points.

        Returns:
            `torch.LongTensor` of shape `(num_embeddings,)`: The label of each code.

        Raises:
            ValueError: If there are more clusters than codes.
        """
        num_clusters = self.config.num_clusters if num_clusters is None else num_clusters
        if not 1 <= num_clusters <= self.config.num_embeddings:
            raise ValueError(
                f"`num_clusters` must be in 1..{self.config.num_embeddings} (the codes), but is {num_clusters}."
            )
        labels = kmeans_labels(self.quantize.embed.weight.float().cpu(), num_clusters, seed)
        self.cluster_labels.copy_(labels)
        self.config.num_clusters = num_clusters
        return self.cluster_labels

    def _encode_features(self, pixel_values, compression_rate):
        self._check_rate(compression_rate)
        check_pixels(pixel_values, compression_rate)
        mean, std = self._image_statistics(pixel_values)
        hidden_states = self.encoder(((pixel_values - mean) / std).to(self.dtype))
        for down_sampler in self.down_samplers[: self.config.num_down_samplers(compression_rate)]:
            hidden_states = down_sampler(hidden_states)
        return hidden_states

    def _decode_embeddings(self, embeddings, compression_rate):
        sample = self.decoders[str(compression_rate)](embeddings)
        mean, std = self._image_statistics(sample)
        return sample * std + mean

    def _image_statistics(self, like):
        """Mean and standard deviation as tensors that broadcast over pictures."""
        return image_statistics(self.config.image_mean, self.config.image_std, like)

    def _check_rate(self, compression_rate):
        if compression_rate not in self.config.compression_rates:
            raise ValueError(
                f"`compression_rate` must be one of {self.config.compression_rates}, which this model has, "
                f"but is {compression_rate}."
            )


IcetkVQModel.__module__ = "cogview_pipelines"


def kmeans_labels(points: torch.Tensor, num_clusters: int, seed: int = 0, max_iterations: int = 100) -> torch.Tensor:
    """
    Labels of K-means clustering, started by k-means++; no cluster stays empty.

    Args:
        points (`torch.Tensor` of shape `(num_points, dim)`): The points, float.
        num_clusters (`int`): Number of clusters, at most `num_points`.
        seed (`int`, defaults to 0): Seed of the starting points.
        max_iterations (`int`, defaults to 100): Stops earlier when no label changes.

    Returns:
        `torch.LongTensor` of shape `(num_points,)`: The cluster of each point.
    """
    generator = torch.Generator(points.device).manual_seed(seed)
    first = torch.randint(len(points), (1,), generator=generator, device=points.device)
    centres = points[first]
    distances = torch.cdist(points, centres)[:, 0].square()
    for _ in range(num_clusters - 1):
        # The small constant keeps the draw possible when all points are covered.
        chosen = torch.multinomial(distances + 1e-12, 1, generator=generator)
        centres = torch.cat([centres, points[chosen]])
        distances = torch.minimum(distances, (points - points[chosen]).square().sum(1))
    labels = None
    for _ in range(max_iterations):
        new_labels = _fill_empty_clusters(torch.cdist(points, centres), num_clusters)
        if labels is not None and torch.equal(labels, new_labels):
            break
        labels = new_labels
        counts = torch.bincount(labels, minlength=num_clusters)
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / counts[:, None]
    return labels


def _fill_empty_clusters(distances: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Nearest centre of each point; an empty cluster takes the point that lies farthest from its centre."""
    nearest = distances.min(1)
    labels, badness = nearest.indices, nearest.values.clone()
    counts = torch.bincount(labels, minlength=num_clusters)
    for cluster in (counts == 0).nonzero()[:, 0].tolist():
        lonely = counts[labels] == 1  # taking the last point would only move the hole
        point = int(badness.masked_fill(lonely, -1.0).argmax())
        counts[labels[point]] -= 1
        labels[point], badness[point] = cluster, 0.0
        counts[cluster] = 1
    return labels
