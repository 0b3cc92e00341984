"""The image tokenizer of a folder, of whichever kind."""

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
