"""The image tokenizer of a folder, of whichever kind, and how many pixels a token of it stands for."""

import os

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_cogview_vq import CogViewVQConfig, CogViewVQModel
from .modeling_diffusers_vq import DiffusersVQConfig, DiffusersVQModel
from .modeling_icetk_vq import IcetkVQConfig, IcetkVQModel

IMAGE_TOKENIZERS = {
    CogViewVQConfig.model_type: CogViewVQModel,
    DiffusersVQConfig.model_type: DiffusersVQModel,
    IcetkVQConfig.model_type: IcetkVQModel,
}

DEFAULT_RATE = 8  # of those that have several, as the released pipelines use them


def load_image_tokenizer(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """
    A saved [`IcetkVQModel`], [`CogViewVQModel`] or [`DiffusersVQModel`]: what its configuration says.

    Args:
        name_or_path (`str` or path): A folder, or an id on the Hub.
        kwargs: As for `from_pretrained`.

    Raises:
        ValueError: If it is another model.
    """
    hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "subfolder") if name in kwargs}
    config, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
    kind = config.get("model_type")
    if kind not in IMAGE_TOKENIZERS:
        raise ValueError(
            f"`vqvae` must be an image tokenizer ({', '.join(sorted(IMAGE_TOKENIZERS))}), but {name_or_path} holds "
            f"{'nothing' if not config else repr(kind)}."
        )
    return IMAGE_TOKENIZERS[kind].from_pretrained(name_or_path, **kwargs)


def choose_rate(
    vqvae: PreTrainedModel | None, compression_rate: int | None = None, default: int = DEFAULT_RATE
) -> int:
    """
    How many pixels a token stands for along each side: what is asked for, if the image tokenizer has it.

    Args:
        vqvae (`PreTrainedModel`, *optional*): The image tokenizer; where there is none, it is not asked.
        compression_rate (`int`, *optional*): What is asked for; by default the only rate, and of several `default`.
        default (`int`): Which of several.

    Raises:
        ValueError: If it has no such rate.
    """
    if vqvae is None:
        return default if compression_rate is None else compression_rate
    rates = list(vqvae.config.compression_rates)
    if compression_rate is None:
        compression_rate = rates[0] if len(rates) == 1 else default
    if compression_rate not in rates:
        raise ValueError(f"`compression_rate` must be one of {rates}, which `vqvae` has, but is {compression_rate}.")
    return compression_rate
