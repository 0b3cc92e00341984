"""Adapters (LoRA) of pipelines: loaded, weighed, fused, saved and removed, under the names of diffusers."""

import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from ..models import adapters
from .adapter_card import write_adapter_card
from .lora_files import WEIGHT_NAME, check_hub_options, read_lora, write_lora

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Mixed  # what the mixin is part of
else:
    Mixed = object

logger = logging.get_logger(__name__)

# In the folder of a saved pipeline: its adapters, one file each, and by how much they count.
LORA_FOLDER, LORA_INDEX = "lora", "adapters.json"
LONGEST_FILE_NAME = 255  # bytes, on the file systems in use
READ_TEXTS = ("transformer", "caption_transformer")  # the components whose adapters know new words, or do not

AdapterWeights = float | Mapping[str, float] | Sequence[float | Mapping[str, float] | None] | None


class LoraLoaderMixin(Mixed):
    """
    A pipeline whose stages take adapters, as those of diffusers do.

    Files are those of diffusers: `pytorch_lora_weights.safetensors`, whose matrices are named after the component
    (`transformer.layers.0.attention.dense.lora_A.weight`). One adapter may adapt several components; several can be
    loaded, and count together. Pipelines that `from_pipe` makes share components, and so adapters.
    """

    model_cpu_offload_seq: str
    _made_for: str
    # Where a component is missing, the one that does its work, and takes its adapters.
    _lora_stand_ins: Mapping[str, str] = {}

    @property
    def _lora_loadable_modules(self) -> list[str]:
        """Names of the components that adapters may be for."""
        return self.model_cpu_offload_seq.split("->")

    def _lora_models(self, components: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
        names = self._lora_loadable_modules
        chosen = names if components is None else _names(components, "components")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ValueError(f"`components` may name {names}, but names {unknown}.")
        models = {name: getattr(self, name, None) for name in chosen}
        return {name: model for name, model in models.items() if model is not None}

    # Loading and saving ----------------------------------------------------------------------------------------------

    @classmethod
    def lora_state_dict(cls, source, weight_name: str | None = None, **hub_options) -> dict[str, torch.Tensor]:
        """The matrices in a file of adapters, as [`LoraLoaderMixin.load_lora_weights`] reads them."""
        check_hub_options("lora_state_dict", hub_options)
        weights = read_lora(source, cls.model_cpu_offload_seq.split("->"), weight_name, **hub_options).weights
        return {f"{part}.{name}": value for part, own in weights.items() for name, value in own.items()}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        **hub_options,
    ) -> None:
        """
        Load an adapter; it counts from now on, beside those that do already. The words that it has learned are known
        as long as it counts, to the model that it is for: `transformer`, which draws prompts (and scores them, where
        there is no other model for it), or `caption_transformer`.

        Args:
            pretrained_model_name_or_path_or_dict: A folder, a file, a Hub id, or the matrices.
            adapter_name (`str`, *optional*): What it is called here; default: `default_0`, `default_1`, ...
            weight_name (`str`, *optional*): The file in the folder, where it holds several.
            hub_options: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ImportError: If PEFT is missing.
            ValueError: If it is damaged, no adapter, one for another model, or the name is taken; then nothing is
                loaded.
            TypeError: If there is no such argument.
            OSError: If there is no such file.
        """
        check_hub_options("load_lora_weights", hub_options)
        adapters.require_peft()
        self._refuse_hooks_of_layers()
        weights, configs, words = read_lora(
            pretrained_model_name_or_path_or_dict, self._lora_loadable_modules, weight_name, **hub_options
        )
        if adapter_name is None:
            taken, number = self._all_adapters(), 0
            while f"default_{number}" in taken:
                number += 1
            adapter_name = f"default_{number}"
        _check_name(adapter_name)
        models = self._lora_models()
        for part, other in self._lora_stand_ins.items():
            if part in weights and part not in models and other in models and other not in weights:
                weights[other], configs[other] = weights.pop(part), configs.pop(part)
        absent = [part for part in weights if part not in models]
        if len(absent) == len(weights):
            raise ValueError(f"The adapter is for {absent}, which this {type(self).__name__} does not have.")
        if absent:
            logger.warning(
                f"Parts of the adapter {adapter_name!r} are left out: there is no {' and no '.join(absent)}."
            )
        done = []
        try:
            for part, own in weights.items():
                if part in models:
                    own_words = words if part in READ_TEXTS else []
                    adapters.load_adapter(models[part], adapter_name, own, configs[part], own_words)
                    done.append(models[part])
        except BaseException:  # the one that failed has cleaned up behind itself
            for model in done:
                adapters.delete_adapters(model, [adapter_name])
            raise
        self._tell_words()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        weight_name: str | None = None,
        **layers: Mapping[str, Any] | nn.Module | None,
    ) -> None:
        """
        Write an adapter, given its matrices, as diffusers does; [`LoraLoaderMixin.save_adapter`] writes a loaded one.

        Args:
            save_directory: The folder; it is made.
            is_main_process (`bool`): Write nothing where it is false.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`): Of the file.
            layers: For each component `<component>_lora_layers`, its matrices by name, and perhaps
                `<component>_lora_adapter_metadata`, the fields of its `peft.LoraConfig`.

        Raises:
            TypeError: If another argument is given.
            ValueError: If no matrices are.
        """
        weights, configs = {}, {}
        for part in cls.model_cpu_offload_seq.split("->"):
            own = layers.pop(f"{part}_lora_layers", None)
            config = layers.pop(f"{part}_lora_adapter_metadata", None)
            if own:
                weights[part] = own.state_dict() if isinstance(own, nn.Module) else dict(own)
                configs[part] = dict(config or {})
        if layers:
            raise TypeError(f"`save_lora_weights` has no argument {sorted(layers)[0]!r}.")
        if not weights:
            raise ValueError(
                f"`{cls.model_cpu_offload_seq.split('->')[0]}_lora_layers` or that of another must be given."
            )
        if is_main_process:
            write_lora(save_directory, weights, configs, weight_name or WEIGHT_NAME)

    def save_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, weight_name: str | None = None
    ) -> Path:
        """
        Write a loaded adapter into a file, for all components that it adapts.

        Args:
            save_directory: The folder; it is made.
            adapter_name (`str`, *optional*): Which; default: the only one.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`): Of the file.

        Returns:
            `Path`: The file.

        Raises:
            ValueError: If there is no such adapter, several and no name, or no adapter is read from such a file.
        """
        names = self._all_adapters()
        if adapter_name is None and len(names) == 1:
            adapter_name = names[0]
        if adapter_name not in names:
            raise ValueError(f"`adapter_name` must be one of {names}, but is {adapter_name!r}.")
        models = {part: m for part, m in self._lora_models().items() if adapter_name in adapters.adapter_names(m)}
        return self._write_adapter(models, adapter_name, save_directory, weight_name or WEIGHT_NAME)

    @staticmethod
    def _write_adapter(
        models: Mapping[str, nn.Module], adapter_name: str, folder: str | os.PathLike, weight_name: str
    ) -> Path:
        """Write an adapter of these components, which all have it."""
        weights = {part: adapters.adapter_weights(model, adapter_name) for part, model in models.items()}
        configs = {part: adapters.adapter_config(model, adapter_name) for part, model in models.items()}
        words = [word for model in models.values() for word in adapters.adapter_words(model, [adapter_name])]
        return write_lora(folder, weights, configs, weight_name, list(dict.fromkeys(words)))

    def push_adapter_to_hub(
        self,
        repo_id: str,
        adapter_name: str | None = None,
        *,
        base_model: str | None = None,
        prompt: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """
        Push a loaded adapter to the Hub, with a model card; [`LoraLoaderMixin.load_lora_weights`] loads it by its id.

        Args:
            repo_id (`str`): Its id there; the repository is made if it is not there.
            adapter_name (`str`, *optional*): Which; default: the only one.
            base_model (`str`, *optional*): Id of the pipeline that it adapts, for the card; default: the id that this
                pipeline was loaded by, if it was.
            prompt (`str`, *optional*): For the card, one that shows what the adapter does. Only pipelines that draw
                from a prompt alone have such an example; cards of others say how the adapter is loaded.
            private (`bool`, *optional*): Whether others may not see it; for a new repository.
            token (*optional*): Of the Hub, if not that of `hf auth login`.
            commit_message (`str`, *optional*): Of the commit.

        Returns:
            `str`: The address of the commit.

        Raises:
            ValueError: If there is no such adapter.
        """
        if base_model is None:
            name = str(self.config.get("_name_or_path") or "")
            base_model = name if name.count("/") == 1 and not os.path.exists(name) else None
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_adapter(folder, adapter_name)
            configs = read_lora(path, self._lora_loadable_modules).configs
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            shown = (prompt or "a cat") if self._made_for == "text to image" else None
            write_adapter_card(folder, repo_id, base_model, type(self).__name__, configs, shown)
            message = commit_message or "Upload adapter"
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))

    # Choosing --------------------------------------------------------------------------------------------------------

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters of each component."""
        found = {part: adapters.adapter_names(model) for part, model in self._lora_models().items()}
        return {part: names for part, names in found.items() if names}

    def _all_adapters(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))

    def get_active_adapters(self) -> list[str]:
        """The adapters that count, in any component."""
        models = self._lora_models().values()
        return list(dict.fromkeys(name for model in models for name in adapters.active_adapters(model)))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: AdapterWeights = None) -> None:
        """
        Let these adapters count, and no others.

        Args:
            adapter_names (`str` or sequence of `str`): Loaded ones.
            adapter_weights (`float`, `dict` or a sequence of them, *optional*): By how much each counts (default: 1);
                a `dict` says so by component. With 0 it does not, and its words are not known.

        Raises:
            ValueError: If there is no such adapter, or not a weight for each; or they are fused.
        """
        names = _names(adapter_names, "adapter_names")
        unknown = [name for name in names if name not in self._all_adapters()]
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"`adapter_names` must be of {self._all_adapters()}, each once, but is {names}.")
        weights = _per_adapter(adapter_weights, len(names))
        if len(weights) != len(names):
            raise ValueError(f"`adapter_weights` must be one for each of {names}, but has {len(weights)}.")
        models = self._unfused_models()
        for each in weights:
            wrong = (
                [part for part in each if part not in self._lora_loadable_modules] if isinstance(each, Mapping) else []
            )
            if wrong:
                raise ValueError(f"`adapter_weights` may name {self._lora_loadable_modules}, but names {wrong}.")
        own = {}
        for part in self._lora_loadable_modules:
            numbers = [each.get(part, 1.0) if isinstance(each, Mapping) else each for each in weights]
            own[part] = [adapters.finite_number(1.0 if each is None else each, "adapter_weights") for each in numbers]
        for part, model in models.items():
            adapters.activate(model, names, own[part])
        self._tell_words()

    def _unfused_models(self) -> dict[str, nn.Module]:
        """All components, if nothing is fused into any: otherwise some would be changed, and others not."""
        models = self._lora_models()
        for model in models.values():
            adapters.require_unfused(model)
        return models

    def disable_lora(self) -> None:
        """Let no adapter count."""
        for model in self._unfused_models().values():
            adapters.activate(model, [])
        self._tell_words()

    def enable_lora(self) -> None:
        """Let all adapters count, as much as they did."""
        for model in self._unfused_models().values():
            adapters.activate(model, adapters.adapter_names(model))
        self._tell_words()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """
        Remove adapters.

        Raises:
            ValueError: If there is no such adapter, or they are fused.
        """
        names = _names(adapter_names, "adapter_names")
        unknown = [name for name in names if name not in self._all_adapters()]
        if unknown:
            raise ValueError(f"`adapter_names` must be of {self._all_adapters()}, but names {unknown}.")
        models = [m for m in self._lora_models().values() if any(name in adapters.adapter_names(m) for name in names)]
        for model in models:
            adapters.require_unfused(model)
        for model in models:
            adapters.delete_adapters(model, names)
        self._tell_words()

    def unload_lora_weights(self) -> None:
        """Remove all adapters. Those that are fused stay in the weights, and their words are known for good."""
        models = self._lora_models()
        stay = {part: adapters.fused_words(model) for part, model in models.items()}
        for model in models.values():
            adapters.unload_adapters(model)
        self._tell_words()
        for part, words in stay.items():
            if words and self.tokenizer is not None:
                self.tokenizer.add_known_words(words, part)

    def _tell_words(self) -> None:
        """Let the tokenizer know which words the adapters of each component bring, as things stand now."""
        if self.tokenizer is None:
            return
        for part, model in self._lora_models().items():
            if part in READ_TEXTS:
                self.tokenizer.set_adapter_words(adapters.active_words(model), adapters.fused_words(model), part)

    # Fusing ----------------------------------------------------------------------------------------------------------

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused."""
        return len(self.fused_loras)

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are fused into the weights of any component."""
        return {name for model in self._lora_models().values() for name in adapters.fused_names(model)}

    def fuse_lora(
        self,
        components: str | Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """
        Add adapters to the weights that they adapt: then a step takes as long as without them, and a CPU runs it in
        one kernel.

        Where two stages share weights, the other one keeps them as they were, which takes memory for the weights that
        are adapted.

        Args:
            components (`str` or sequence of `str`, *optional*): Which components; default: all that have adapters.
            lora_scale (`float`, defaults to 1.0): By how much more than they count.
            safe_fusing (`bool`, defaults to `False`): Raise an error rather than leave NaN in the weights.
            adapter_names (`str` or sequence of `str`, *optional*): Which adapters; default: those that count.

        Raises:
            ValueError: If there are none, some are fused already, `lora_scale` is not finite, or the weights are
                quantised in a way that adapters cannot be added to.
        """
        self._refuse_hooks_of_layers()
        models = self._lora_models(components)
        if adapter_names is not None:
            adapter_names = [*dict.fromkeys(_names(adapter_names, "adapter_names"))]
        wanted = {}
        for part, model in models.items():
            adapters.require_unfused(model)
            own = adapters.adapter_names(model)
            chosen = (
                adapters.active_adapters(model) if adapter_names is None else [n for n in adapter_names if n in own]
            )
            if chosen:
                wanted[part] = chosen
        unknown = [name for name in adapter_names or () if name not in self._all_adapters()]
        if unknown or not wanted:
            raise ValueError(
                f"There is no adapter to fuse: {unknown or 'none counts'}. Loaded are {self._all_adapters()}."
            )
        done = []
        try:
            for part, names in wanted.items():
                adapters.fuse_adapters(models[part], names, lora_scale, safe_fusing)
                done.append(models[part])
        except BaseException:
            for model in done:
                adapters.unfuse_adapters(model)
            raise
        self._tell_words()

    def unfuse_lora(self, components: str | Sequence[str] | None = None) -> None:
        """
        Take fused adapters out of the weights again.

        Weights that another stage uses get back the numbers they had; of others the adapter is subtracted, which
        leaves rounding errors. Adapters that were unloaded after they were fused stay in the weights.

        Args:
            components (`str` or sequence of `str`, *optional*): Which components; default: all.

        Raises:
            ValueError: If all of the adapters have been unloaded since.
        """
        self._refuse_hooks_of_layers()
        models = self._lora_models(components).values()
        loaded = [model for model in models if adapters.fused_names(model)]
        for model in loaded or models:
            adapters.unfuse_adapters(model)
        self._tell_words()

    def _refuse_hooks_of_layers(self) -> None:
        """Hooks of single layers would miss the layers that come and go."""
        for name, model in self._lora_models().items():
            if any(
                hasattr(m, "_diffusers_hook") or (m is not model and hasattr(m, "_hf_hook")) for m in model.modules()
            ):
                raise ValueError(
                    f"`{name}` is offloaded layer by layer. Load, fuse or unfuse adapters first, then call "
                    "`enable_group_offload` or `enable_sequential_cpu_offload`."
                )

    # Saved pipelines -------------------------------------------------------------------------------------------------

    def _save_adapters(self, folder: str | os.PathLike) -> None:
        """Write the adapters that are not fused beside a saved pipeline, and say so."""
        folder, counts, active = Path(folder), {}, {}
        (folder / LORA_FOLDER / LORA_INDEX).unlink(missing_ok=True)  # of another model
        fused = sorted(self.fused_loras)
        if fused:
            logger.warning(f"The adapters {fused} are fused: they are saved as part of the weights.")
        for name in self._all_adapters():  # one may be fused into one component, and not into another
            models = {
                part: model
                for part, model in self._lora_models().items()
                if name in adapters.adapter_names(model) and name not in adapters.fused_names(model)
            }
            if models:
                self._write_adapter(models, name, folder / LORA_FOLDER, f"{name}.safetensors")
                counts[name] = {part: adapters.adapter_scale(model, name) for part, model in models.items()}
                active[name] = [part for part, model in models.items() if name in adapters.active_adapters(model)]
        left = [*counts]
        if not left:
            return
        index = {"active": active, "adapters": counts}
        (folder / LORA_FOLDER / LORA_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        logger.warning(
            f"The weights are saved without the adapters {left}; these are in {folder / LORA_FOLDER}, and "
            "`from_pretrained` of the folder loads them, too. After `fuse_lora` they would be part of the weights."
        )

    def _load_saved_adapters(self, source: str | os.PathLike, **hub_options) -> None:
        """Load the adapters that were saved with a pipeline."""
        names, active = read_saved_adapters(source, **hub_options)
        if not names:
            return
        names = {name: counts for name, counts in names.items() if any(map(self._lora_models().get, counts))}
        for name in names:
            options = {"weight_name": f"{name}.safetensors", "subfolder": LORA_FOLDER, **hub_options}
            self.load_lora_weights(source, name, **options)
        if names:
            self.set_adapters([*names], [*names.values()])
        for part, model in self._lora_models().items():
            adapters.activate(model, [name for name in names if part in active.get(name, ())])
        self._tell_words()


def read_saved_adapters(
    source: str | os.PathLike, **hub_options: Any
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """
    The adapters that were saved beside the weights of a pipeline.

    Args:
        source (`str` or `os.PathLike`): The pipeline's folder or Hub id.
        hub_options: Of `hf_hub_download`.

    Returns:
        By name, by how much each counts in each component, and the components in which it counts; empty if there are
        none, or none in the cache.

    Raises:
        ValueError: If the list of them is damaged.
    """
    path = Path(source) / LORA_FOLDER / LORA_INDEX
    if not os.path.isdir(source):
        try:
            path = Path(hf_hub_download(os.fspath(source), f"{LORA_FOLDER}/{LORA_INDEX}", **hub_options))
        except (HfHubHTTPError, OSError, ValueError):
            return {}, {}
    if not path.is_file():
        return {}, {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = {name: dict(counts) for name, counts in index["adapters"].items()}
        active = {name: list(parts) for name, parts in index["active"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged. Copy or save the model again.") from error
    return names, active


def _per_adapter(weights: Any, count: int) -> list[Any]:
    """A weight for each adapter; a number, an object by component, or `None` is that of all of them."""
    is_one = (
        isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable) or not getattr(weights, "ndim", 1)
    )
    return [weights] * count if is_one else [*weights]


def _names(value: Any, argument: str) -> list[str]:
    """One name, or several."""
    names = [value] if isinstance(value, str) else [*value] if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{argument}` must be a name or several, but is {value!r}.")
    return names


def _check_name(name: object) -> None:
    """Raise `ValueError` if an adapter cannot be called so: it is a key in PEFT, and the name of a file."""
    if (
        not isinstance(name, str)
        or not name
        or any(c in "./\\" or unicodedata.category(c) in ("Cc", "Cs") for c in name)
        or len(f"{name}.safetensors".encode()) > LONGEST_FILE_NAME
    ):
        raise ValueError(
            "`adapter_name` must be a short name without dots, slashes, backslashes and control characters, but is "
            f"{name!r}."
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"`adapter_name` must not be {name!r}, a word that PyTorch needs. Choose another.")
