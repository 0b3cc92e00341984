"""
Files of adapters, as diffusers writes them: `pytorch_lora_weights.safetensors` with the matrices of all components,
and how each adapter is made in its metadata. Beside that, which diffusers leaves alone: the words that the adapter has
learned, where its model has a list of those that it knows.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..foreign_files import describe_foreign_file
from ..pictures.png import write_whole

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
EMBEDDING_NAME = "learned_embeds.safetensors"  # of a learned word, which may lie beside an adapter
METADATA_KEY = "lora_adapter_metadata"
WORDS_KEY = "known_words"
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
Weights = dict[str, dict[str, torch.Tensor]]
Configs = dict[str, dict[str, Any]]


class AdapterFile(NamedTuple):
    """
    What a file of an adapter holds.

    Args:
        weights (`dict[str, dict[str, torch.Tensor]]`): By component, the matrices.
        configs (`dict[str, dict]`): By component, fields of `peft.LoraConfig`.
        known_words (list of `str`): Words that it has learned, and its model does not know without it.
    """

    weights: Weights
    configs: Configs
    known_words: list[str]


def write_lora(
    folder: str | os.PathLike,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    configs: Configs,
    weight_name: str = WEIGHT_NAME,
    known_words: Sequence[str] = (),
) -> Path:
    """
    Write the adapter of one or more components into a file.

    Args:
        folder: Where; it is made.
        weights (`dict[str, dict[str, torch.Tensor]]`): By component, the matrices.
        configs (`dict[str, dict]`): By component, fields of `peft.LoraConfig`.
        weight_name (`str`): Of the file.
        known_words (sequence of `str`): Words that it has learned.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If [`read_lora`] does not read files of such a name.
    """
    path = Path(weight_name)
    if path.suffix != ".safetensors" or path.name != weight_name:
        raise ValueError(
            "`weight_name` must be the name of a file that ends in .safetensors, without folders, but is "
            f"{weight_name!r}."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, own in weights.items()
        for name, value in own.items()
    }
    metadata = {
        f"{part}.{name}": sorted(value) if isinstance(value, (set, frozenset)) else value
        for part, config in configs.items()
        for name, value in config.items()
    }
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    if known_words:
        header[WORDS_KEY] = json.dumps(list(known_words), ensure_ascii=False)
    # not `save_file`, whose files only their owner may read
    content = save(tensors, header)
    write_whole(folder / weight_name, content)
    return folder / weight_name


def read_lora(
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    components: list[str],
    weight_name: str | None = None,
    **hub_options,
) -> AdapterFile:
    """
    The adapter in a file, by component.

    Args:
        source: A folder, a file, a Hub id, or the matrices themselves by `component.layer.lora_A.weight`.
        components (list of `str`): Names that the components may have.
        weight_name (`str`, *optional*): The file in the folder; needed only where there are several.
        hub_options: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        ValueError: If it is no adapter, is damaged, or is for other components.
        TypeError: If there is no such option.
        OSError: If there is no such file.
    """
    check_hub_options("read_lora", hub_options)
    if isinstance(source, Mapping):
        tensors = dict(source)
        metadata: dict[str, Any] = {}
        words: list[str] = []
    else:
        tensors, metadata, words = _read_file(find_weights(os.fspath(source), weight_name, **hub_options))
    weights: Weights = {}
    for name, value in tensors.items():
        part = next((part for part in components if name.startswith(f"{part}.")), None)
        if part is None or ".lora_" not in name:
            raise ValueError(
                f"The file holds {name!r}, which is no matrix of an adapter for {components}. Is it one for another "
                "kind of pipeline?"
            )
        weights.setdefault(part, {})[name.removeprefix(f"{part}.")] = value
    if not weights:
        raise ValueError("The file holds no matrices of adapters.")
    configs = {
        part: {name.removeprefix(f"{part}."): value for name, value in metadata.items() if name.startswith(f"{part}.")}
        for part in weights
    }
    return AdapterFile(weights, configs, words)


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"Adapters are read from .safetensors files only, but this is {path.name}: a pickle can run code."
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            header = file.metadata() or {}
        metadata, words = json.loads(header.get(METADATA_KEY, "{}")), json.loads(header.get(WORDS_KEY, "[]"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, error, "the adapter") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is damaged: its metadata are no object. Copy or save the adapter again.")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path} is damaged: its `{WORDS_KEY}` are no list of texts. Copy or save the adapter again.")
    return tensors, metadata, words


def damaged(path: Path, error: Exception, what: str) -> ValueError:
    """The error of a file that cannot be read."""
    foreign = describe_foreign_file(path)
    return ValueError(f"{path} {foreign}" if foreign else f"{path} is damaged: {error}. Copy or save {what} again.")


def check_hub_options(function: str, options: Mapping[str, Any]) -> None:
    """Raise `TypeError` if a function was given options that are not among [`HUB_OPTIONS`]."""
    unknown = [name for name in options if name not in HUB_OPTIONS]
    if unknown:
        raise TypeError(f"`{function}` has no argument {unknown[0]!r}. Those of the Hub are {', '.join(HUB_OPTIONS)}.")


def find_weights(
    source: str,
    weight_name: str | None = None,
    default: str = WEIGHT_NAME,
    subfolder: str | None = None,
    **hub_options,
) -> Path:
    """
    A file of weights in a folder, on the Hub, or by itself.

    Args:
        source (`str`): A file, a folder, or a Hub id.
        weight_name (`str`, *optional*): The file in it; without, `default`, or the only .safetensors file.
        default (`str`): What such files are called.
        subfolder (`str`, *optional*): Where in it.
        hub_options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        OSError: If there is none, or several and no name.
    """
    path = Path(source)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        folder = path / (subfolder or "")
        names = _weight_names(source, subfolder)
        name = weight_name or _only(names, default)
        if name is None or not (folder / name).is_file():
            raise OSError(f"{folder} must hold one .safetensors file, or name one by `weight_name`, but has: {names}.")
        return folder / name
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no file or folder {source}, and it is no id on the Hub (owner/name) either."
        ) from error
    if weight_name is None and not hub_options.get("local_files_only"):
        weight_name = _only(_weight_names(source, subfolder, **hub_options), default)
    return Path(hf_hub_download(source, weight_name or default, subfolder=subfolder, **hub_options))


def find_trained(source: str) -> list[Path]:
    """
    What training left in a folder or on the Hub: the file of a learned word, that of an adapter, or both; or a file by
    itself.

    Args:
        source (`str`): A file, a folder, or a Hub id.

    Raises:
        OSError: If there is none, or several that could be the adapter.
    """
    if os.path.isfile(source):
        return [Path(source)]
    names = _weight_names(source)
    others = [name for name in names if name != EMBEDDING_NAME]
    found = [find_weights(source, EMBEDDING_NAME)] if EMBEDDING_NAME in names else []
    if others or not found:
        found.append(find_weights(source, _only(others, WEIGHT_NAME)))
    return found


def _weight_names(source: str, subfolder: str | None = None, **hub_options) -> list[str]:
    """Names of the .safetensors files in a folder, or on the Hub."""
    if os.path.isdir(source):
        return sorted(file.name for file in Path(source, subfolder or "").glob("*.safetensors"))
    files = HfApi(token=hub_options.get("token")).list_repo_files(source, revision=hub_options.get("revision"))
    prefix = f"{subfolder}/" if subfolder else ""
    names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    return [name for name in names if name.endswith(".safetensors") and "/" not in name]


def _only(names: list[str], default: str) -> str | None:
    return default if default in names else names[0] if len(names) == 1 else None
