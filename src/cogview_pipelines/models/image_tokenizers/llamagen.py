"""
LlamaGen's image tokenizer (Sun et al. 2024, https://arxiv.org/abs/2406.06525) as a `diffusers.VQModel`.

Its network is the one of VQGAN, which diffusers has, under other names. Its codes are compared by angle; stored at
length one, they are the nearest of the same vectors, since the length of what is coded does not change the order.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file

_NORM_GROUPS = 32
_UNUSED = {"quantize.codebook_used"}  # the release counts there which codes its training used
_RESNET = {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OUTER = {"norm_out": "conv_norm_out"}


def llamagen_to_diffusers(source: str | os.PathLike | Mapping[str, torch.Tensor]) -> VQModel:
    """
    Build the `VQModel` that computes what a checkpoint of LlamaGen's image tokenizer does.

    Widths, levels and the number of codes are read from the shapes of the tensors.

    Args:
        source: A file (`vq_ds16_t2i.pt`, or safetensors), or its tensors by name.

    Raises:
        ValueError: If it is not such a checkpoint, with what is missing or too much.
    """
    tensors = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _UNUSED}
    config = _config_of(tensors)
    tensors["quantize.embedding.weight"] = F.normalize(tensors["quantize.embedding.weight"].float(), dim=-1)
    model = VQModel.from_config(config)
    renamed = {_name_in_diffusers(name): tensor for name, tensor in tensors.items()}
    own = model.state_dict()
    for name, tensor in renamed.items():
        if name in own and tensor.ndim == 4 and own[name].ndim == 2:  # projections of attention: 1x1 kernels there
            renamed[name] = tensor.flatten(1)
    missing, unexpected = sorted(own.keys() - renamed), sorted(renamed.keys() - own)
    wrong = [name for name in own.keys() & renamed if own[name].shape != renamed[name].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            "`source` must be an image tokenizer of LlamaGen, but "
            + "; ".join(
                f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for what, names in (("lacks", missing), ("has too much", unexpected), ("other shapes", sorted(wrong)))
                if names
            )
            + "."
        )
    model.load_state_dict(renamed)
    return model.eval()


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"`source` must be a file, but {path} is none.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"`source` cannot be read: {path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # what `weights_only` refuses, damaged pickles included
        raise ValueError(
            f"`source` must hold tensors only, but {path} holds other objects or is damaged. Save its `model` entry "
            "alone, by the program that wrote it."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"`source` must be tensors by name, alone or as the entry `model`, but {path} is not.")
    return content


def _config_of(tensors: Mapping[str, torch.Tensor]) -> dict:
    """The arguments of `VQModel` that give these shapes."""
    running = [name for name in tensors if name.endswith("running_mean")]
    if running:
        raise ValueError(
            "`source` must have group norms, but this tokenizer has batch norms, which are not supported."
        )
    try:
        (code_count, code_width) = tensors["quantize.embedding.weight"].shape
        latent_channels = tensors["quant_conv.weight"].shape[1]
        levels, blocks = _levels(tensors, "encoder"), _blocks(tensors, "encoder")
        widths = [tensors[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0] for level in range(levels)]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"`source` must be an image tokenizer of LlamaGen, but lacks {error} or has another shape there."
        ) from error
    if any(width % _NORM_GROUPS for width in widths):
        raise ValueError(f"`source` must have widths that are multiples of {_NORM_GROUPS}, but has {widths}.")
    return {
        "down_block_types": ("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "latent_channels": latent_channels,
        "num_vq_embeddings": code_count,
        "vq_embed_dim": code_width,
        "norm_num_groups": _NORM_GROUPS,
    }


def _levels(tensors: Mapping[str, torch.Tensor], part: str) -> int:
    found = {int(match[1]) for name in tensors if (match := re.match(rf"{part}\.conv_blocks\.(\d+)\.", name))}
    return len(found)


def _blocks(tensors: Mapping[str, torch.Tensor], part: str) -> int:
    return sum(bool(re.fullmatch(rf"{part}\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)) for name in tensors)


def _name_in_diffusers(name: str) -> str:
    part, _, rest = name.partition(".")
    if part not in ("encoder", "decoder"):
        return name
    pieces = rest.split(".")
    names: Mapping[str, str]
    if pieces[0] == "conv_blocks" and len(pieces) > 3:
        blocks, sampler = ("down_blocks", "downsample") if part == "encoder" else ("up_blocks", "upsample")
        if pieces[2] == sampler:
            where, inner, names = f"{blocks}.{pieces[1]}.{sampler}rs.0", pieces[3:], {}
        else:
            kind, names = {"res": ("resnets", _RESNET), "attn": ("attentions", _ATTENTION)}.get(pieces[2], ("", {}))
            where, inner = f"{blocks}.{pieces[1]}.{kind}.{pieces[3]}", pieces[4:]
    elif pieces[0] == "mid" and len(pieces) > 2:
        kind, names = {
            "0": ("resnets.0", _RESNET),
            "1": ("attentions.0", _ATTENTION),
            "2": ("resnets.1", _RESNET),
        }.get(pieces[1], ("", {}))
        where, inner = f"mid_block.{kind}", pieces[2:]
    else:
        return ".".join([part, _OUTER.get(pieces[0], pieces[0]), *pieces[1:]])
    return ".".join([part, where, *(names.get(piece, piece) for piece in inner)])
